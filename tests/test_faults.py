"""Faults in one process: a damaged checkpoint, a full disk, a loss that isn't finite. Each is reported in one line."""

import contextlib
import errno
import os
import re
import resource
import shutil
import types

import numpy as np
import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.report.page import save_pictures
from mnv2_jax.runs import folder as run_folder
from mnv2_jax.runs.metrics_log import MetricsLog
from tests import cli

NO_CACHE = {"JAX_COMPILATION_CACHE_DIR": ""}
"""Environment without a compilation cache: JAX warns if it can't write it, and warnings are errors here."""
LATE = (*cli.SHRUNK, "--config.checkpoint.every_steps=1000", "--config.train.eval_every_epochs=0")
"""Flags of a run that writes only its logs until the end."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Is made in this process, which compiles its programs once for all runs that go on here."""
    workdir = tmp_path_factory.mktemp("faults") / "uninterrupted"
    assert cli.answer(cli.here("main", *cli.SHORT_RUN, f"--workdir={workdir}", "--json", devices=1))["steps"] == 24
    return workdir


@pytest.fixture
def unfinished(uninterrupted, tmp_path):
    """Makes a run whose newest checkpoint is at step 22 of 24, as if it was killed later; its log is complete."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "24")
    for name in ("summary.json", "evaluation.json", "report.html"):
        (workdir / name).unlink()
    assert cli.checkpoints(workdir)[-1] == 22
    return workdir


def ended(process):
    """Returns the exit code, standard output and standard error of a process."""
    try:
        output, error = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, output, error


# --- a damaged checkpoint ----------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_told_in_a_line_and_the_run_is_the_same(uninterrupted, unfinished):
    before, newest = cli.checkpoints(unfinished)[-2:]
    folder = unfinished / "checkpoints" / str(newest)
    arrays = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    damaged = cli.contents(folder)
    result = cli.here("main", *cli.SHORT_RUN, f"--workdir={unfinished}", devices=1)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith(f"warning: checkpoint {newest} is damaged")
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"going on at step {before} of 24" in result.stdout
    assert cli.contents(unfinished / "checkpoints.damaged" / str(newest)) == damaged
    cli.assert_same(unfinished, uninterrupted)


# --- a full disk -------------------------------------------------------------------------------------------------


def fill(process, room):
    """Limits the files of a process to ``room`` bytes, which looks to it like a full disk."""
    _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, most))


def limited(workdir, flags, room, **variables):
    """Starts a run whose files can't be larger than ``room`` bytes."""
    process = cli.start("main", *flags, f"--workdir={workdir}", **(NO_CACHE | variables))
    fill(process, room)
    return ended(process)


def assert_one_line(code, error, name):
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    assert name in error
    assert os.strerror(errno.EFBIG) in error


def test_no_room_for_a_checkpoint_and_once_there_is_the_run_is_the_same(uninterrupted, unfinished):
    folder = unfinished / "checkpoints"
    older = cli.contents(folder)
    code, _, error = limited(unfinished, cli.SHORT_RUN, 100_000)
    assert_one_line(code, error, f"{folder}: a checkpoint can't be written")
    assert "make room and start again" in error
    assert cli.checkpoints(unfinished)[-1] == 22
    kept = cli.contents(folder)
    assert {name: kept[name] for name in older} == older
    assert not (unfinished / "summary.json").exists()
    result = cli.here("main", *cli.SHORT_RUN, f"--workdir={unfinished}", devices=1)
    assert result.returncode == 0, result.stderr
    assert "going on at step 22 of 24" in result.stdout
    cli.assert_same(unfinished, uninterrupted)


@contextlib.contextmanager
def filled(room):
    """Applies `fill` to this process, inside the context."""
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))


@pytest.mark.timeout(20)  # no code waits for a dead writer
@pytest.mark.parametrize(("keys", "name"), [((), "metrics.jsonl"), ("abcdefgh", "tensorboard")])
def test_no_room_for_a_log_is_an_error_that_names_it(tmp_path, keys, name):
    log = MetricsLog(tmp_path, 0, tensorboard=bool(keys))

    def train():
        for step in range(1000):
            log.write(step, "train", dict.fromkeys(keys, 0.5))

    with filled(20_000), pytest.raises(UserError, match=f"{tmp_path}.*{name}.*{os.strerror(errno.EFBIG)}"):
        train()
    log.close()


def lock(workdir):
    with run_folder.lock(workdir):
        pass


def save_picture(workdir):
    split = types.SimpleNamespace(example=lambda index: {"image": np.zeros((8, 8, 3), np.uint8)})
    save_pictures(workdir / "examples", split, [0])


@pytest.mark.parametrize("write", [lock, save_picture])
def test_no_room_at_all_is_an_error_that_names_the_folder(tmp_path, write):
    with filled(0), pytest.raises(UserError, match=f"{tmp_path}.*{os.strerror(errno.EFBIG)}"):
        write(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "flags", "name"),
    [
        (100, (), "dataset.json"),  # the first that a run writes
        (900, (), "provenance.json"),
        (4_000, ("--config.train.steps=60", "--config.log.tensorboard=False"), "metrics.jsonl"),
        (10_000, ("--config.train.steps=60",), "tensorboard"),
    ],
)
def test_no_room_for_a_record_or_a_log(tmp_path, room, flags, name):
    workdir = tmp_path / "run"
    code, _, error = limited(workdir, (*LATE, *flags), room)
    assert_one_line(code, error, str(workdir))
    assert name in error
    assert not (workdir / "summary.json").exists()


@pytest.mark.slow
def test_a_disk_that_fills_while_a_run_trains(trained, tmp_path):
    workdir = tmp_path / "run"
    process = cli.start("main", *cli.SHRUNK, f"--workdir={workdir}", **NO_CACHE)
    assert cli.until(process, lambda: cli.logged_steps(workdir) >= 5 and cli.checkpoints(workdir))
    older = cli.checkpoints(workdir)[0]
    kept = cli.contents(workdir / "checkpoints" / str(older))
    fill(process, 0)
    code, _, error = ended(process)
    assert_one_line(code, error, str(workdir))
    assert cli.contents(workdir / "checkpoints" / str(older)) == kept
    result = cli.run("main", *cli.SHRUNK, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert re.search(r"going on at step [1-9]", result.stdout)
    cli.assert_same(workdir, trained[0])


@pytest.mark.slow
@pytest.mark.parametrize(("room", "name"), [(4_000, "evaluation.json"), (40_000, "report.html")])
def test_no_room_for_the_last_files_of_a_run(trained, tmp_path, room, name):
    # The run has all its steps but not its end; its report may have been written before it finished.
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    for last in ("summary.json", "evaluation.json"):
        (workdir / last).unlink()
    checkpoints = cli.contents(workdir / "checkpoints")
    code, _, error = limited(workdir, cli.SHRUNK, room)
    assert_one_line(code, error, f"{workdir / name}: can't be written")
    assert not (workdir / name).exists()
    assert not list(workdir.glob("*.tmp"))
    result = cli.run("main", *cli.SHRUNK, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert cli.contents(workdir / "checkpoints") == checkpoints
    assert (workdir / name).exists()
    cli.assert_same(workdir, trained[0])


@pytest.mark.slow
def test_no_room_for_the_compilation_cache_is_a_warning_and_does_no_harm(tmp_path):
    cache, runs = tmp_path / "cache", (tmp_path / "full", tmp_path / "again")
    variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONWARNINGS": "default"}
    process = cli.start("main", *LATE, f"--workdir={runs[0]}", **variables)
    assert cli.until(process, lambda: any(cache.glob("*")))  # the first of several programs
    fill(process, 50_000)
    assert cli.until(process, lambda: cli.logged_steps(runs[0]) >= 1)
    fill(process, resource.RLIM_INFINITY)
    code, _, error = ended(process)
    assert code == 0, error
    assert "Traceback" not in error
    # A cut-off file in the cache is not used as a program.
    rerun = cli.start("main", *LATE, f"--workdir={runs[1]}", **variables)
    code, _, error = ended(rerun)
    assert code == 0, error
    assert "Traceback" not in error
    cli.assert_same(*runs)


def test_no_room_for_standard_output():
    with open("/dev/full", "w") as full:
        process = cli.start("main", f"--config={cli.W0_25}:data=digits", "--mode=summary", stdout=full)
        code, _, error = ended(process)
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert os.strerror(errno.ENOSPC) in error


# --- a loss that isn't finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "flags"),
    [
        (7, ()),
        # A checkpoint is due at that step, before its loss was read.
        pytest.param(6, ("--config.log.every_steps=50",), marks=pytest.mark.slow),
        pytest.param(6, ("--config.log.every_steps=50", "--config.checkpoint.every_steps=1"), marks=pytest.mark.slow),
        pytest.param(7, ("--config.optim.accumulate_steps=2", "--config.norm.group_size=16"), marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_not_finite_is_told_by_its_step_again_and_again(tmp_path, warmup, flags):
    """The cosine goes from 0 after the warm-up to 1e38 at the end, so its second step explodes."""
    workdir, bad = tmp_path / "run", warmup + 2
    explodes = (f"--config.optim.warmup_steps={warmup}", "--config.optim.final_lr=1e38", *flags)
    for attempt in range(2):
        result = cli.here("main", *cli.SHORT_RUN, *explodes, f"--workdir={workdir}", devices=1)
        assert result.returncode == 1, result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith(f"error: the loss, gradient or weights of step {bad} are not finite")
        assert cli.checkpoints(workdir)[-1] == last_saved(flags, bad)
        assert not (workdir / "summary.json").exists()
        start = f"going on at step {last_saved(flags, bad)} of 24" if attempt else "starting; step 0 of 24"
        assert start in result.stdout
    assert all(line["loss"] is not None for line in cli.metrics(workdir, "train") if line["step"] < bad)


def last_saved(flags, bad):
    every = 1 if "--config.checkpoint.every_steps=1" in flags else 2
    return (bad - 1) // every * every
