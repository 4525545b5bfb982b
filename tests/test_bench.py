"""The benchmark runs, and says what it says it does."""

import numpy as np
import pytest
from PIL import Image

from mnv2_jax.bench.input import table, time_input
from mnv2_jax.config import Config, DataConfig
from mnv2_jax.errors import UserError
from tests import cli


@pytest.mark.slow
def test_step_is_timed_in_both_forms():
    found = cli.answer(cli.run("bench", "step", cli.SHRUNK[0], "--repeats=3", "--json"))
    assert set(found) == {"train", "inference"}
    for row in found.values():
        assert min(row.values()) > 0
        assert row["ratio"] == pytest.approx(row["xla_ms"] / row["ours_ms"], rel=0.5)


def test_mistakes_are_one_line():
    for arguments in (
        ["steps", cli.SHRUNK[0]],
        ["step"],
        ["step", cli.SHRUNK[0], "--repeats=0"],
        ["pod", cli.SHRUNK[0], "--topology=v5e"],
        ["input"],
        ["input", "--data=folder"],
        ["input", f"--data=folder:{cli.ROOT / 'tests'}"],  # has no train/
    ):
        result = cli.run("bench", *arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight JPEG files in two classes, without images to evaluate on."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(8):
        folder = root / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((160, 120))
        image.save(folder / f"{number}.jpg")
    return root


def test_input_is_timed_beside_decoding(photos):
    settings = Config(data=DataConfig(name="folder", path=str(photos), resolution=32, batch_size=32, num_workers=0))
    found = time_input(settings, None, repeats=2, turn_seconds=0.1)
    assert (found["workers"], found["cores"]) == (0, 1)
    for name in ("pipeline", "decoding"):
        assert found[name]["images_per_second"] == found[name]["images_per_second_per_core"] > 0
    assert 0.2 < found["ratio"] < 5
    assert "limit" not in found
    assert f"{found['ratio']:.0%}" in table(found)


@pytest.mark.slow
def test_input_says_what_the_limit_is(photos):
    config = f"--config={cli.W0_25}:res=32,batch=32,classes=2"
    given = (config, f"--data=folder:{photos}", "--config.data.eval_split=train", "--config.data.num_workers=1")
    found = cli.answer(cli.run("bench", "input", *given, "--repeats=1", "--json"))
    assert found["workers"] == found["cores"] == 1
    faster = found["step_images_per_second"] > found["pipeline"]["images_per_second"]
    assert found["limit"] == ("input" if faster else "step")


def test_input_needs_files_to_decode(photos):
    digits = Config(data=DataConfig(name="digits"))
    once = Config(data=DataConfig(name="folder", path=str(photos), crop="none"))
    for settings in (digits, once):
        with pytest.raises(UserError, match="without an input pipeline"):
            time_input(settings, None, repeats=1)
