"""A run that was killed and started again is, to the bit, the run that was not."""

import json
import random
import signal
import subprocess
import time

import pytest

from tests import cli


@pytest.fixture(scope="module")
def uninterrupted(trained):
    workdir, summary, _ = trained
    assert summary["steps"] == 12
    return workdir


def start(workdir):
    return subprocess.Popen(
        cli.command("main", *cli.SHRUNK, f"--workdir={workdir}"),
        env=cli.environment(),
        cwd=cli.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(process, condition):
    """Waits, watching closely, for a condition; False if the process ended first."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return False


def logged_steps(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def writes_checkpoint(workdir):
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("orbax-checkpoint-tmp" in p.name for p in folder.iterdir())


def has_checkpoint(workdir):
    return (workdir / "checkpoints").is_dir() and any(p.name.isdigit() for p in (workdir / "checkpoints").iterdir())


def assert_same(workdir, uninterrupted):
    for split in ("train", "eval"):
        assert cli.metrics(workdir, split) == cli.metrics(uninterrupted, split)
    assert [line["step"] for line in cli.metrics(workdir, "train")] == list(range(1, 13))
    assert cli.digests(workdir) == cli.digests(uninterrupted)
    summary, other = (json.loads((w / "summary.json").read_text()) for w in (workdir, uninterrupted))
    assert summary["eval"] == other["eval"]


def test_three_kills_one_while_a_checkpoint_is_written(uninterrupted, tmp_path):
    workdir, rng, hit = tmp_path / "run", random.Random(0), 0
    for kill in range(3):
        process = start(workdir)
        before, more = logged_steps(workdir), rng.randint(1, 3)
        if kill == 1:
            # Not the first: the run shall go on from a checkpoint, not begin anew.
            hit += until(process, lambda before=before: has_checkpoint(workdir) and writes_checkpoint(workdir))
        else:
            assert until(process, lambda before=before, more=more: logged_steps(workdir) >= before + more)
        process.kill()
        process.communicate()
    assert hit == 1
    lost = logged_steps(workdir)
    log = workdir / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 99, "split": "train", "lo')  # torn in the middle of a line
    seconds = max(json.loads(line)["seconds"] for line in log.read_text().splitlines()[:-1])
    assert lost < 12
    output, _ = start(workdir).communicate(timeout=300)
    assert "going on at step" in output
    assert_same(workdir, uninterrupted)
    assert json.loads((workdir / "summary.json").read_text())["seconds"] > seconds


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit_0_in_time(uninterrupted, tmp_path, sent):
    workdir = tmp_path / "run"
    process = start(workdir)
    assert until(process, lambda: logged_steps(workdir) >= 3)
    process.send_signal(sent)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert time.monotonic() - begun < 10
    assert "the same command goes on" in output
    assert not (workdir / "summary.json").exists()
    cli.answer(cli.run("main", *cli.SHRUNK, f"--workdir={workdir}", "--json"))
    assert_same(workdir, uninterrupted)


def test_a_finished_run_says_so_and_stays(uninterrupted):
    before = cli.digests(uninterrupted), (uninterrupted / "metrics.jsonl").read_bytes()
    result = cli.run("main", *cli.SHRUNK, f"--workdir={uninterrupted}", "--json")
    assert "finished already, at step 12" in result.stderr
    assert cli.answer(result) == json.loads((uninterrupted / "summary.json").read_text())
    assert (cli.digests(uninterrupted), (uninterrupted / "metrics.jsonl").read_bytes()) == before


def test_another_config_is_refused_and_one_that_only_logs_otherwise_is_not(uninterrupted):
    other = cli.run("main", *cli.SHRUNK, "--config.optim.peak_lr=0.5", f"--workdir={uninterrupted}")
    assert other.returncode == 2
    assert "optim.peak_lr" in other.stderr
    assert other.stderr.count("\n") == 1
    same = cli.run("main", *cli.SHRUNK, "--config.log.every_steps=7", f"--workdir={uninterrupted}")
    assert same.returncode == 0, same.stderr


def test_a_run_goes_on_from_its_own_json(uninterrupted):
    result = cli.run("main", f"--config={uninterrupted}/config.json", f"--workdir={uninterrupted}")
    assert result.returncode == 0, result.stderr
    assert "finished already" in result.stdout


def test_a_folder_in_training_is_locked(tmp_path):
    workdir = tmp_path / "run"
    first = start(workdir)
    try:
        assert until(first, lambda: (workdir / "config.json").exists())
        second = cli.run("main", *cli.SHRUNK, f"--workdir={workdir}")
        assert second.returncode == 2
        assert f"process {first.pid} is training there" in second.stderr
        assert second.stderr.count("\n") == 1
    finally:
        first.kill()
        first.communicate()
