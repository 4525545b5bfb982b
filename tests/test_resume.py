"""A run that was killed and resumed equals, to the bit, a run that wasn't killed."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests import cli


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Is of a process of its own, as the runs that are killed are: in this one, XLA rounds otherwise."""
    workdir = tmp_path_factory.mktemp("resume") / "uninterrupted"
    assert cli.answer(cli.run("main", *cli.SHORT_RUN, f"--workdir={workdir}", "--json"))["steps"] == 24
    return workdir


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """Copies a finished run, because every command writes to its folder."""
    return shutil.copytree(uninterrupted, tmp_path / "finished")


def being_written(workdir):
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("orbax-checkpoint-tmp" in p.name for p in folder.iterdir())


def kill(workdir, flags, rng, *, writing):
    """Starts or resumes a run and kills it at a random point; with ``writing``, while a checkpoint is being written.

    Returns:
      Whether a checkpoint was being written.
    """
    process = cli.start("main", *flags, f"--workdir={workdir}")
    kill_step, starting = cli.logged_steps(workdir) + rng.randint(1, 3), not writing and rng.random() < 0.2
    if writing:
        assert cli.until(process, lambda: cli.checkpoints(workdir) and not being_written(workdir))  # of the kill before
        assert cli.until(process, lambda: being_written(workdir))
        time.sleep(rng.uniform(0, 0.02))
    elif starting:  # somewhere in the imports, in reading the checkpoint, or in compiling
        time.sleep(rng.uniform(0, 8))
    else:
        # With a checkpoint that is whole, or else the next session would begin anew.
        assert cli.until(process, lambda: cli.logged_steps(workdir) >= kill_step and cli.checkpoints(workdir))
        time.sleep(rng.uniform(0, 0.02))
    process.kill()
    process.communicate()
    return being_written(workdir) and not starting  # what is there may be of the kill before


def kills(workdir, flags, number, seed):
    """Kills a run ``number`` times, at least half while a checkpoint is written; returns both counts.

    The first kill is at another time, so that later sessions resume from a checkpoint and don't begin anew.
    """
    rng, hit, not_hit = random.Random(seed), 0, 0
    while hit < number // 2 or hit + not_hit < number:
        was_hit = kill(workdir, flags, rng, writing=not_hit > hit)
        hit, not_hit = hit + was_hit, not_hit + (not was_hit)
    return hit, not_hit


def assert_goes_on(workdir, flags, uninterrupted):
    """Asserts that a killed run, once finished, equals a run that wasn't killed, even if its log was torn mid-line."""
    log = workdir / "metrics.jsonl"
    seconds = max(json.loads(line)["seconds"] for line in log.read_text().splitlines())
    log.write_bytes(log.read_bytes() + b'{"step": 999, "split": "train", "lo')
    output, error = cli.start("main", *flags, f"--workdir={workdir}").communicate(timeout=600)
    assert "going on at step" in output, error
    cli.assert_same(workdir, uninterrupted)
    assert json.loads((workdir / "summary.json").read_text())["seconds"] > seconds


def test_two_kills_one_while_a_checkpoint_is_written(uninterrupted, tmp_path):
    hit, _ = kills(tmp_path / "run", cli.SHORT_RUN, 2, seed=0)
    assert hit >= 1
    assert cli.logged_steps(tmp_path / "run") < 24
    assert_goes_on(tmp_path / "run", cli.SHORT_RUN, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_half_while_a_checkpoint_is_written(tmp_path):
    flags = [*cli.SHRUNK, "--config.train.steps=150", "--config.checkpoint.every_steps=4"]
    hit, not_hit = kills(tmp_path / "run", flags, 20, seed=1)
    assert hit >= 10
    assert hit + not_hit >= 20
    assert cli.logged_steps(tmp_path / "run") < 150
    cli.start("main", *flags, f"--workdir={tmp_path / 'uninterrupted'}").communicate(timeout=600)
    assert_goes_on(tmp_path / "run", flags, tmp_path / "uninterrupted")


def broken_pipe():
    """Opens a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def full_disk():
    return open("/dev/full", "w")


def assert_locked(workdir, process):
    """Asserts that the folder of a process that trains is refused to another."""
    second = cli.here("main", *cli.SHORT_RUN, f"--workdir={workdir}")
    assert second.returncode == 2
    assert f"process {process.pid} is training there" in second.stderr
    assert second.stderr.count("\n") == 1


def test_a_run_locks_its_folder_saves_and_exits_0_at_a_signal_and_goes_on_without_an_output(uninterrupted, tmp_path):
    """Sends a hangup in training and SIGTERM in the next evaluation, then lets the run end."""
    workdir, evaluated = tmp_path / "run", {line["step"] for line in cli.metrics(uninterrupted, "eval")}
    flags = (*cli.SHORT_RUN, f"--workdir={workdir}")
    slowly = "--config.data.eval_batch_size=1"

    def is_evaluating():
        return cli.logged_steps(workdir) > began and cli.logged_steps(workdir) in evaluated

    for sent, more, output, is_there in (
        (signal.SIGHUP, [], contextlib.nullcontext(subprocess.PIPE), lambda: cli.logged_steps(workdir) >= 3),
        (signal.SIGTERM, [slowly], broken_pipe(), is_evaluating),
    ):
        began = cli.logged_steps(workdir)
        with output as stream:
            process = cli.start("main", *flags, *more, stdout=stream)
        if not began:
            assert cli.until(process, lambda: (workdir / "config.json").exists())
            assert_locked(workdir, process)  # long before the first step is compiled
        assert cli.until(process, is_there)
        process.send_signal(sent)
        start = time.monotonic()
        output, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert time.monotonic() - start < 10
        assert output is None or "the same command goes on" in output
        assert not (workdir / "summary.json").exists()
    assert cli.logged_steps(workdir) not in {line["step"] for line in cli.metrics(workdir, "eval")}
    with full_disk() as stream:
        last = cli.start("main", *flags, stdout=stream, stderr=stream)
        assert last.wait(300) == 0
    cli.assert_same(workdir, uninterrupted)


def test_a_finished_run_says_so_and_stays(finished):
    before = cli.digests(finished), (finished / "metrics.jsonl").read_bytes()
    result = cli.here("main", *cli.SHORT_RUN, f"--workdir={finished}", "--json")
    assert "finished already, at step 24" in result.stderr
    assert cli.answer(result) == json.loads((finished / "summary.json").read_text())
    assert (cli.digests(finished), (finished / "metrics.jsonl").read_bytes()) == before


def test_another_config_is_refused_and_one_that_only_logs_otherwise_is_not(finished):
    other = cli.here("main", *cli.SHORT_RUN, "--config.optim.peak_lr=0.5", f"--workdir={finished}")
    assert other.returncode == 2
    assert "optim.peak_lr" in other.stderr
    assert other.stderr.count("\n") == 1
    # The run's own config.json works too.
    result = cli.here("main", f"--config={finished}/config.json", "--config.log.every_steps=7", f"--workdir={finished}")
    assert result.returncode == 0, result.stderr
    assert "finished already" in result.stdout


def test_more_epochs_of_a_cosine_are_refused_with_the_way(finished):
    before = cli.contents(finished)
    result = cli.here("main", f"--workdir={finished}", "--config.train.steps=None", "--config.train.epochs=2")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "train.epochs" in result.stderr
    assert f"--config.init.weights={finished} " in result.stderr
    assert cli.contents(finished).keys() == before.keys()
    assert (finished / "config.json").read_bytes() == before["config.json"]


@pytest.mark.slow
def test_a_finished_run_that_goes_on_is_the_run_that_was_longer_from_its_start(tmp_path):
    flags = (*cli.SHRUNK, "--config.optim.schedule=constant")
    run, longer = tmp_path / "run", tmp_path / "longer"
    assert cli.here("main", *flags, "--config.train.steps=5", f"--workdir={run}").returncode == 0
    result = cli.here("main", f"--workdir={run}", "--config.train.steps=12", "--json")
    assert cli.answer(result)["steps"] == 12
    assert f"{run}: going on at step 5 of 12" in result.stderr
    assert cli.here("main", *flags, f"--workdir={longer}").returncode == 0
    cli.assert_same(run, longer)
    for name in ("config.json", "dataset.json"):
        assert (run / name).read_bytes() == (longer / name).read_bytes()
    rerun = cli.here("main", f"--workdir={run}")
    assert "finished already, at step 12" in rerun.stdout
