"""The run folder survives what can happen to a process between any two of its instructions."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from mnv2_jax.config import build, to_dict
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import write_json
from mnv2_jax.runs import folder as run_folder
from mnv2_jax.training.experiment import open_experiment

CONFIG = build({})
DATASET = {
    "name": "digits",
    "class_names": ("0", "1", "2"),
    "num_train": 1437,
    "num_eval": 360,
    "eval_split": "test",
    "digest": {"train.labels": "ab" * 32, "train.names": "cd" * 32, "eval.names": "ef" * 32},
    "steps": 440,
}
DEVICES = {"platform": "cpu", "kind": "cpu", "count": 4}

HOLD = """
import pathlib, sys
from mnv2_jax.runs import folder as run_folder
with run_folder.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- lock ---


def test_lock_refuses_a_second_process_and_dies_with_the_first(tmp_path):
    workdir = tmp_path / "deep" / "run"
    command = [sys.executable, "-c", HOLD, str(workdir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, run_folder.lock(workdir):
            pass
        assert str(workdir) in one_line(error)
        assert f"process {holder.pid} " in one_line(error)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with run_folder.lock(workdir):
        assert (workdir / ".lock").read_text() == f"{os.getpid()}\n"


def test_lock_is_released_by_an_exception_and_holds_against_ourselves(tmp_path):
    with pytest.raises(KeyError), run_folder.lock(tmp_path):
        raise KeyError
    (tmp_path / ".lock").write_text("12345678901\n")  # the id of a killed process
    with run_folder.lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} "), run_folder.lock(tmp_path):
            pass
        with pytest.raises(UserError), run_folder.lock(tmp_path):  # the refusal changed nothing
            pass
    with run_folder.lock(tmp_path):
        pass


def test_lock_refuses_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError) as error, run_folder.lock(workdir):
            pass
        assert str(workdir) in one_line(error)


# --- begin_session ---


def test_begin_session_begins_then_resumes(tmp_path):
    assert not run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    first = (tmp_path / "config.json").read_bytes()
    assert json.loads(first) == to_dict(CONFIG)
    assert json.loads((tmp_path / "dataset.json").read_text())["class_names"] == ["0", "1", "2"]

    data = dataclasses.replace(CONFIG.data, path="elsewhere", num_workers=3)
    log = dataclasses.replace(CONFIG.log, every_steps=7)
    assert run_folder.begin_session(
        tmp_path, dataclasses.replace(CONFIG, data=data, log=log), {**DATASET, "name": "b"}, DEVICES
    )
    assert (tmp_path / "config.json").read_bytes() == first
    sessions = json.loads((tmp_path / "provenance.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[0]["devices"] == DEVICES
    assert sessions[0]["versions"]["jax"]
    assert sessions[0]["started"].endswith("+00:00")
    assert sessions[0]["command"].startswith("python ")
    assert sessions[0]["git"] is None or len(sessions[0]["git"]["commit"]) == 40


def test_origin_is_of_the_last_session(tmp_path):
    assert run_folder.origin(tmp_path) == {"commit": None, "devices": {}}  # somebody has removed the file
    sessions = [{"git": {"commit": "ab", "dirty": False}, "devices": {"count": 1}}, {"git": {"commit": "cd"}}]
    for number, commit in ((1, "ab"), (2, "cd")):
        write_json(tmp_path / "provenance.json", {"sessions": sessions[:number]})
        assert run_folder.origin(tmp_path)["commit"] == commit
    sessions[-1]["git"]["dirty"] = True
    write_json(tmp_path / "provenance.json", {"sessions": sessions})
    assert run_folder.origin(tmp_path)["commit"] == "cd-dirty"


def test_begin_session_refuses_a_provenance_that_is_none(tmp_path):
    run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    (tmp_path / "provenance.json").write_text('{"sessions": 3}')
    with pytest.raises(UserError) as error:
        run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    assert "sessions is not a list" in one_line(error)
    assert (tmp_path / "provenance.json").read_text() == '{"sessions": 3}'


def test_begin_session_refuses_another_config(tmp_path):
    run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = dataclasses.replace(CONFIG, seed=5, model=dataclasses.replace(CONFIG.model, width=0.35))
    with pytest.raises(UserError) as error:
        run_folder.begin_session(tmp_path, changed, DATASET, DEVICES)
    assert "seed: 0 -> 5, model.width: 1.0 -> 0.35" in one_line(error)
    assert "--workdir" in one_line(error)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"class_names": ["0", "1"]}, "class_names: 3 -> 2"),
        ({"class_names": ["0", "one", "2"]}, "class_names[1]: '1' -> 'one'"),
        ({"num_train": 1436}, "num_train: 1437 -> 1436"),
        ({"eval_split": "val"}, "eval_split: 'test' -> 'val'"),
        ({"class_names": None}, "class_names: ['0', '1', '2'] -> None"),
        ({"digest": {**DATASET["digest"], "train.names": "00" * 32}}, "names of train"),
        ({"digest": {**DATASET["digest"], "train.labels": "00" * 32}}, "labels of train"),
        ({"digest": {"eval.names": "00" * 32}}, "names of eval"),
    ],
)
def test_begin_session_refuses_other_data(tmp_path, change, named):
    run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    with pytest.raises(UserError) as error:
        run_folder.begin_session(tmp_path, CONFIG, {**DATASET, **change}, DEVICES)
    assert named in one_line(error)


def test_begin_session_compares_what_is_known_of_the_images_before_and_now(tmp_path, capsys):
    """A packed folder also has sizes; a copy made by TFDS has neither names nor labels."""
    run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    packed = {**DATASET, "digest": {**DATASET["digest"], "train.sizes": "12" * 32}}
    assert run_folder.begin_session(tmp_path, CONFIG, packed, DEVICES)
    assert capsys.readouterr().err == ""
    copied = {**DATASET, "digest": {"train.copy": "34" * 32}}
    for num_lines in (1, 0):  # the note is printed once: then it is recorded
        assert run_folder.begin_session(tmp_path, CONFIG, copied, DEVICES)
        assert capsys.readouterr().err.count("\n") == num_lines
    for key, dataset in (("train.copy", copied), ("train.names", DATASET)):
        changed = {**dataset, "digest": {**dataset["digest"], key: "00" * 32}}
        with pytest.raises(UserError, match="of train"):
            run_folder.begin_session(tmp_path, CONFIG, changed, DEVICES)


def test_a_folder_of_an_older_version_goes_on_with_one_line(tmp_path, capsys):
    run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    dataset, provenance = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("dataset", "provenance"))
    del dataset["digest"], provenance["sessions"][0]["settings"]
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    (tmp_path / "provenance.json").write_text(json.dumps(provenance))
    other = {**DATASET, "digest": {"train.names": "00" * 32}}
    for num_lines in (1, 0):
        with jax.enable_x64(True):
            assert run_folder.begin_session(tmp_path, CONFIG, other, DEVICES)
        assert capsys.readouterr().err.count("\n") == num_lines
    with pytest.raises(UserError, match="JAX_ENABLE_X64"):
        run_folder.begin_session(tmp_path, CONFIG, other, DEVICES)
    with pytest.raises(UserError, match="names of train"), jax.enable_x64(True):
        run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)


@pytest.mark.parametrize("other_first", [True, False])
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: jax.enable_x64(True), "JAX_ENABLE_X64"),
        (lambda: jax.default_prng_impl("rbg"), "JAX_DEFAULT_PRNG_IMPL"),
        (lambda: jax.threefry_partitionable(False), "JAX_THREEFRY_PARTITIONABLE"),
    ],
)
def test_begin_session_refuses_settings_that_draw_other_numbers(tmp_path, other, named, other_first):
    first, second = other(), contextlib.nullcontext()
    if not other_first:
        first, second = second, first
    with first:
        run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with second, pytest.raises(UserError) as error:
        run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    assert named in one_line(error)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_begin_session_warns_of_settings_that_round_otherwise(tmp_path, monkeypatch, capsys):
    def flags(*xla_flags):
        monkeypatch.setenv("XLA_FLAGS", " ".join(xla_flags))

    def warned():
        run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) <= 1
        return "".join(lines)

    flags("--xla_a=1", "--xla_b=2", "--xla_force_host_platform_device_count=4")
    assert not warned()
    flags("--xla_force_host_platform_device_count=8", "--xla_b=2", "--xla_a=1")
    assert not warned()
    flags("--xla_a=2", "--xla_b=2")
    assert "XLA_FLAGS" in warned()
    assert not warned()
    with jax.default_matmul_precision("highest"):
        monkeypatch.delenv("XLA_FLAGS")
        line = warned()
    assert "XLA_FLAGS" in line
    assert "JAX_DEFAULT_MATMUL_PRECISION: None -> 'highest'" in line
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert "JAX_DEFAULT_MATMUL_PRECISION: 'highest' -> None" in warned()


def test_other_images_of_equal_number_are_other_data(tmp_path):
    """Compares the facts of real experiments, as a resumed run does."""
    rng = np.random.default_rng(0)

    def facts(name):
        arrays = {f"x_{split}": rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8) for split in ("train", "test")}
        path = tmp_path / f"{name}.npz"
        if not path.exists():
            np.savez(path, **arrays | {f"y_{split}": np.arange(40) % 10 for split in ("train", "test")})
        config = build({"data": {"name": "cifar10", "path": str(path), "resolution": 32}})
        return config, open_experiment(config).facts

    run = tmp_path / "run"
    run.mkdir()
    assert not run_folder.begin_session(run, *facts("a"), DEVICES)
    (tmp_path / "a.npz").rename(tmp_path / "moved.npz")
    assert run_folder.begin_session(run, *facts("moved"), DEVICES)
    with pytest.raises(UserError, match="pixels of"):
        run_folder.begin_session(run, *facts("b"), DEVICES)


@pytest.mark.parametrize(
    ("distill", "option"),
    [({"logits": "kept.npz"}, "distill.logits='kept.npz'"), ({"teacher": "runs/big"}, "distill.teacher='runs/big'")],
)
def test_begin_session_refuses_another_teacher(tmp_path, distill, option):
    config = build({"distill": distill})
    run_folder.begin_session(tmp_path, config, {**DATASET, "teacher": "cf05" * 16}, DEVICES)
    assert run_folder.begin_session(tmp_path, config, {**DATASET, "teacher": "cf05" * 16}, DEVICES)
    with pytest.raises(UserError) as error:
        run_folder.begin_session(tmp_path, config, {**DATASET, "teacher": "ca8d" * 16}, DEVICES)
    assert "data" not in one_line(error)
    assert f"another teacher: {option} has changed since (SHA-256 cf05cf05… -> ca8dca8d…)" in one_line(error)


@pytest.mark.parametrize("name", ["thesis.tex", ".git"])
def test_begin_session_refuses_a_folder_that_holds_something_else(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"'{re.escape(name)}'.*config\\.json"):
        run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("broken", [b"", b'{"seed": 0', b"[]", b"\0\0\0", b'{"sed": 0}', b'{"seed": "x"}', b"\xff"])
def test_begin_session_refuses_a_broken_config(tmp_path, broken):
    run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    (tmp_path / "config.json").write_bytes(broken)
    with pytest.raises(UserError) as error:
        run_folder.begin_session(tmp_path, CONFIG, DATASET, DEVICES)
    assert "config.json" in one_line(error)


def test_begin_session_can_be_killed_at_every_write(tmp_path, monkeypatch):
    """If the process dies before or just after the n-th rename, the same command can resume in the folder."""

    class Killed(BaseException):
        pass

    rename = os.replace
    for after in (False, True):
        for kill_at in range(3):
            workdir = tmp_path / f"{after}{kill_at}"
            renames = []

            def dying(source, target, after=after, kill_at=kill_at, renames=renames):
                renames.append(target)
                if len(renames) - 1 != kill_at or after:
                    rename(source, target)
                if len(renames) - 1 == kill_at:
                    raise Killed

            with run_folder.lock(workdir):
                monkeypatch.setattr(os, "replace", dying)
                with pytest.raises(Killed):
                    run_folder.begin_session(workdir, CONFIG, DATASET, DEVICES)
                monkeypatch.setattr(os, "replace", rename)
                (workdir / ".config.json.1.tmp").touch()  # SIGKILL leaves no time to remove it
                complete = after and kill_at == 2
                assert run_folder.begin_session(workdir, CONFIG, DATASET, DEVICES) == complete
                assert run_folder.begin_session(workdir, CONFIG, DATASET, DEVICES)
