"""Tests other libraries' names of options, and the help on config keys."""

import pytest

from mnv2_jax import config
from mnv2_jax.config import OPTIONS
from mnv2_jax.config.explain import explain
from mnv2_jax.config.synonyms import FLAGS, KEYS, synonym_of
from mnv2_jax.errors import UserError
from tests import cli

SPEC = f"{cli.W0_25}:data=digits"


def test_every_word_stands_for_an_option_and_is_none_itself():
    assert set(KEYS.values()) <= set(OPTIONS)
    assert not set(KEYS) & set(FLAGS)
    assert not [word for word in KEYS if word in OPTIONS]


@pytest.mark.parametrize("word", KEYS)
def test_a_word_is_refused_with_the_right_key_and_is_no_alias(word):
    for key in {word, f"optim.{word}", f"train.{word}", f"data.{word}"} - set(OPTIONS):
        if key in {other.rpartition(".")[0] for other in OPTIONS}:
            continue  # a section, as model
        with pytest.raises(UserError, match=f"unknown config key '{key}'; did you mean '{KEYS[word]}'"):
            config.load(SPEC, [f"{key}=1"])


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--epochs=3", "--config.train.epochs"),
        ("--lr", "--config.optim.peak_lr"),
        ("--learning-rate=1", "--config.optim.peak_lr"),
        ("--data", "--config=NAME:data=folder:DIR"),
        ("--imgsz=64", "--config.data.resolution"),
        ("--device=0", "JAX_PLATFORMS"),
        ("--output-dir=x", "--workdir"),
        ("--amp", "--config.model.dtype"),
    ],
)
def test_flags_of_others_are_refused_with_ours(flag, meant):
    result = cli.here("main", f"--config={SPEC}", flag)
    assert result.returncode == 2
    assert result.stderr.partition("did you mean '")[2].startswith(meant)


def test_a_word_that_nobody_knows_has_few_candidates():
    with pytest.raises(UserError) as error:
        config.load(SPEC, ["zzqx=1"])
    assert str(error.value).count(",") <= 6
    assert synonym_of("zzqx") is None


@pytest.mark.parametrize("key", OPTIONS)
def test_help_says_what_every_key_is(key):
    text = explain(key)
    assert text.startswith(f"--config.{key}=")
    for rule in OPTIONS[key].rules:
        assert str(rule) in text


def test_help_of_a_section_a_word_and_of_nothing(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.here("main", "--help", "optim.momentum")
    assert not ended.value.code
    assert explain("checkpoint").count("--config.checkpoint.") == len(
        [k for k in OPTIONS if k.startswith("checkpoint.")]
    )
    assert explain("lr") == explain("optim.peak_lr")
    assert "Learning rate after the warm-up" in explain("lr")
    with pytest.raises(UserError, match="--help momentumm"):
        explain("momentumm")
