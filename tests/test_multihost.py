"""Several processes on this machine, by the public command: what they do together, and that none outlives a fault."""

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests import cli
from tests.tasks import test_detection, test_segmentation

STEPS = 12  # several more than a signal waits for, so that it comes before the end on a busy machine, too
SHRUNK = (
    *cli.SHORT,
    "--config.norm.group_size=8",
    f"--config.train.steps={STEPS}",
    "--config.train.eval_every_epochs=0.12",
    "--config.data.eval_batch_size=4",  # an evaluation takes a while, so that a signal can come in the middle of it
    "--config.log.every_steps=1",
    "--config.log.batch_hash=True",
    "--config.log.tensorboard=False",
    "--config.checkpoint.every_steps=1",
    "--config.faults.heartbeat_timeout_s=6",
)
SECONDS = 10
"""In which a run must have stopped."""
LOST = (75, -signal.SIGABRT, 1)
"""How a process ends whose peer is gone: by itself, or by JAX's runtime."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Run:
    """The processes of one run, and what they said."""

    def __init__(self, workdir, processes=2, devices=1, *more, programs=None, environment=None, each=None):
        """``programs`` has Python code that some processes run first; ``each`` further flags of some."""
        port, self.workdir = free_port(), workdir
        self.logs = [workdir.with_suffix(f".{number}.log") for number in range(processes)]
        self.processes = []
        for number in range(processes):
            flags = [
                f"--coordinator_address=localhost:{port}",
                f"--num_processes={processes}",
                f"--process_id={number}",
            ]
            if environment is not None:
                flags = []
            code = (programs or {}).get(number)
            verb = ["-c", code, "--"] if code else ["-m", "mnv2_jax.main"]
            command = [
                sys.executable,
                *verb,
                *SHRUNK,
                f"--workdir={workdir}",
                *flags,
                *more,
                *(each or {}).get(number, []),
            ]
            own = {name: value.format(number=number, port=port) for name, value in (environment or {}).items()}
            with self.logs[number].open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, env=cli.environment(devices) | own, cwd=cli.ROOT, stdout=log, stderr=subprocess.STDOUT
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, number=0):
        return self.logs[number].read_text()

    def logged(self, split="train"):
        return len(cli.metrics(self.workdir, split)) if (self.workdir / "metrics.jsonl").exists() else 0

    def until(self, condition):
        deadline = time.monotonic() + 200
        while not condition():
            assert all(p.poll() is None for p in self.processes), [self.said(n) for n in range(len(self.processes))]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def codes(self, within_s=300, only=None):
        """The exit codes of all (or ``only`` these), which must come in time."""
        deadline = time.monotonic() + within_s
        chosen = self.processes if only is None else [self.processes[number] for number in only]
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in chosen]

    def finished(self):
        assert set(self.codes()) == {0}, [self.said(n) for n in range(len(self.processes))]
        return self


def assert_same(workdir, reference):
    for split in ("train", "eval"):
        assert cli.metrics(workdir, split) == cli.metrics(reference, split)
    (step, proof), (other_step, other) = cli.digests(workdir), cli.digests(reference)
    assert (step, proof["state"]) == (other_step, other["state"])  # what was evaluated later, only the log knows


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "{number}",
    "SLURM_LOCALID": "{number}",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "JAX_COORDINATOR_PORT": "{port}",
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Of two processes that srun has started, as far as they can see; the others are started by flags."""
    workdir = tmp_path_factory.mktemp("pods") / "uninterrupted"
    with Run(workdir, environment=SLURM) as run:
        run.finished()
        assert run.logged() == STEPS
        assert "top-1" in run.said(0)
        assert "top-1" not in run.said(1)  # one speaks for all
    return workdir


# --- together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "sent", "in_evaluation"),
    [
        pytest.param(1, signal.SIGUSR1, False, marks=pytest.mark.slow),
        (0, signal.SIGTERM, True),
    ],
)
def test_a_signal_to_one_stops_all_and_the_same_command_goes_on(uninterrupted, tmp_path, number, sent, in_evaluation):
    workdir = tmp_path / "run"
    with Run(workdir) as run:
        run.until(lambda: run.logged() in (6, STEPS) if in_evaluation else run.logged() >= 1)
        run.processes[number].send_signal(sent)
        assert run.codes(SECONDS) == [0, 0], [run.said(n) for n in range(2)]
        assert "the same command goes on" in run.said(0)
        if in_evaluation:
            assert run.logged() not in {line["step"] for line in cli.metrics(workdir, "eval")}
    assert not (workdir / "summary.json").exists()
    with Run(workdir) as run:
        run.finished()
    assert_same(workdir, uninterrupted)


@pytest.mark.slow
def test_worker_killed_then_coordinator_then_relaunched(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    for killed, steps in ((1, 2), (0, 4)):
        with Run(workdir) as run:
            run.until(lambda steps=steps: run.logged() >= steps)
            run.processes[killed].kill()
            (code,) = run.codes(6 + SECONDS, only=[1 - killed])
            assert code in LOST
    with Run(workdir) as run:
        run.finished()
        assert "going on at step" in run.said(0)
    assert_same(workdir, uninterrupted)


@pytest.mark.slow
def test_layouts_go_on_from_each_other(tmp_path):
    """1 × 4, 2 × 1, 2 × 2 (processes × devices) and back, with a network so slow that a signal comes in time."""
    x64, steps = {"JAX_ENABLE_X64": "1"}, 24  # some pass before a signal is answered
    flags = (
        *("--config.model.name=mobilenet_v2", "--config.model.depth=0.1", "--config.model.dtype=float64"),
        *("--config.data.name=digits", "--config.data.eval_batch_size=8"),
        *(f"--config.train.steps={steps}", "--config.train.eval_every_epochs=0.12"),
    )
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    environment = cli.environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "environment", lambda devices=1: environment(devices) | x64)
        with Run(whole, 1, 4, *flags) as run:
            run.finished()
        for number, (processes, devices) in enumerate(((1, 4), (2, 1), (2, 2), (1, 4))):
            with Run(workdir, processes, devices, *flags) as run:
                before, begun = newest_fingerprint(workdir), run.logged()
                if number < 3:
                    run.until(lambda begun=begun: run.logged() > begun)
                    run.processes[-1].send_signal(signal.SIGTERM)
                run.finished()
                if before is not None:
                    assert f"restored the state {before[:16]}" in run.said(0)
    ours, reference = (cli.metrics(folder, "train") for folder in (workdir, whole))
    assert [line["batch_hash"] for line in ours] == [line["batch_hash"] for line in reference]
    assert len({line["batch_hash"] for line in ours}) == steps
    for split in ("train", "eval"):
        ours, reference = (cli.metrics(folder, split) for folder in (workdir, whole))
        assert [line["step"] for line in ours] == [line["step"] for line in reference]
        for mine, other in zip(ours, reference, strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-9, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "data", "score"), [(test_segmentation, "painted", "miou"), (test_detection, "framed", "ap")]
)
def test_two_processes_train_and_evaluate_a_dense_task_as_one(task, data, score, tmp_path):
    """With images of several sizes, of which each process reads its part; stopped once, and resumed."""
    config, steps = tmp_path / "dense.py", 16
    config.write_text(task.CONFIG)
    flags = (
        f"--config={config}",
        *(f"--config.{override}" for override in task.SMALL),
        *(f"--config.modules=tests.tasks.{data}", "--config.model.name=mobilenet_v2", f"--config.data.name={data}"),
        *("--config.model.dtype=float64", f"--config.train.steps={steps}", "--config.train.eval_every_epochs=2"),
    )
    environment = cli.environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "environment", lambda devices=1: environment(devices) | {"JAX_ENABLE_X64": "1"})
        with Run(tmp_path / "whole", 1, 2, *flags) as run:
            run.finished()
        with Run(tmp_path / "run", 2, 1, *flags) as run:
            run.until(lambda: run.logged() >= 1)
            run.processes[1].send_signal(signal.SIGTERM)
            run.finished()
        assert not (tmp_path / "run" / "summary.json").exists()
        with Run(tmp_path / "run", 2, 1, *flags) as run:
            run.finished()
    for split in ("train", "eval"):
        ours, reference = (cli.metrics(tmp_path / name, split) for name in ("run", "whole"))
        assert [line["step"] for line in ours] == [line["step"] for line in reference]
        for mine, other in zip(ours, reference, strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-9, abs=0)
            assert mine.get(score) == other.get(score)
            assert mine.get("batch_hash") == other.get("batch_hash")


def newest_fingerprint(workdir):
    if not (workdir / "checkpoints").is_dir():
        return None
    _, proof = cli.digests(workdir)
    return hashlib.sha256(json.dumps(proof["state"], sort_keys=True).encode()).hexdigest()


@pytest.mark.slow
def test_a_finished_run_says_so_once(uninterrupted):
    with Run(uninterrupted, environment=SLURM) as run:
        assert run.codes() == [0, 0]
        assert f"finished already, at step {STEPS}" in run.said(0)
        assert "finished" not in run.said(1)


def test_two_processes_evaluate_as_one(uninterrupted, tmp_path):
    """What they found at the end of the training, one process finds again."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    found = cli.answer(cli.here("main", "--mode=eval", f"--workdir={workdir}", "--json", devices=2))["eval"]
    (*_, last) = cli.metrics(uninterrupted, "eval")
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found["count"] == json.loads((uninterrupted / "summary.json").read_text())["eval"]["count"] == 360


@pytest.mark.slow
def test_two_processes_evaluate_by_themselves_and_one_answers(uninterrupted):
    with Run(uninterrupted, 2, 1, "--mode=eval", "--json") as run:
        run.finished()
        (answer,) = [line for line in run.said(0).splitlines() if line.startswith("{")]
        assert "{" not in run.said(1)
    (*_, last) = cli.metrics(uninterrupted, "eval")
    assert json.loads(answer)["eval"]["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert json.loads(answer)["eval"]["count"] == 360
    assert json.loads((uninterrupted / "evaluation-test.json").read_text())["provenance"]["devices"]["processes"] == 2


@pytest.mark.slow
def test_an_evaluation_by_itself_is_stopped_too(uninterrupted):
    slow = IN_THE_SECOND_BATCH.format(fault="print('slow', flush=True); time.sleep(4)")
    with Run(uninterrupted, 2, 1, "--mode=eval", programs={0: slow}) as run:
        run.until(lambda: "slow" in run.said(0))
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.codes(SECONDS) == [0, 0]
        assert "stopped before the end" in run.said(0)


@pytest.mark.slow
def test_two_processes_skip_what_one_would(tmp_path):
    """Decoded images, of which each process reads its half; what either skips stands in one file and one log."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for name in ("cat", "dog"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(place / f"{number}.jpg")
    for name in ("cat/3", "dog/5", "dog/6"):
        (tmp_path / "train" / f"{name}.jpg").write_bytes(b"\xff\xd8 not much of a picture")
    flags = (
        "--config.data.name=folder",
        f"--config.data.path={tmp_path}",
        "--config.data.skip_corrupt=True",
        "--config.data.num_workers=1",
    )
    found = []
    for processes, devices in ((1, 2), (2, 1)):
        with Run(tmp_path / f"run{processes}", processes, devices, *flags) as run:
            run.finished()
        skipped = (run.workdir / "skipped.txt").read_text().splitlines()
        assert len(skipped) == 3
        hashes = [line["batch_hash"] for line in cli.metrics(run.workdir, "train")]
        found.append((sorted(skipped), cli.metrics(run.workdir, "data"), hashes))
    assert found[0] == found[1]


# --- faults ------------------------------------------------------------------------------------------------

IN_THE_SECOND_BATCH = """
import sys, time
from mnv2_jax.training import mesh
make_feed = mesh.make_feed
def slow_feed(*arguments):
    feed, fed = make_feed(*arguments), []
    def slowly(batch):
        fed.append(batch)
        if len(fed) == 2:
            {fault}
        return feed(batch)
    return slowly
mesh.make_feed = slow_feed
sys.argv = ["main", *sys.argv[2:]]
from mnv2_jax import main, errors
errors.exit_on_user_error(main.main)
"""


@pytest.mark.slow  # by themselves, the limits and tracebacks are tested in processes/test_together.py
def test_a_stuck_peer_ends_all_with_a_traceback(tmp_path):
    stuck = IN_THE_SECOND_BATCH.format(fault="time.sleep(3600)")
    limits = ("--config.faults.step_timeout_s=4", "--config.faults.compile_timeout_s=120")
    with Run(tmp_path / "run", 2, 1, *limits, programs={1: stuck}) as run:
        run.until(lambda: run.logged() >= 1)
        assert run.codes(4 + SECONDS) == [75, 75]
        assert "in slowly" in run.said(1)  # where it is
        assert "stuck for 4 s" in run.said(0) + run.said(1)
        assert 'File "' in run.said(0)


def test_an_error_of_one_ends_all_at_once_with_its_line_and_code(tmp_path):
    failing = IN_THE_SECOND_BATCH.format(fault="raise errors.UserError('image 7 is damaged; mend it')")
    with Run(tmp_path / "run", programs={1: failing}) as run:
        run.until(lambda: run.logged() >= 1)
        assert run.codes(SECONDS) == [2, 2]
        assert run.said(1).count("error: image 7 is damaged; mend it") == 1
        assert "process 1 has failed, and so ends process 0: error: image 7 is damaged; mend it" in run.said(0)


@pytest.mark.slow
def test_an_error_of_one_of_four_ends_all_with_its_code(tmp_path):
    failing = IN_THE_SECOND_BATCH.format(fault="raise errors.UserError('image 7 is damaged; mend it')")
    with Run(tmp_path / "run", 4, programs={2: failing}) as run:
        run.until(lambda: run.logged() >= 1)
        assert run.codes(2 * SECONDS) == [2, 2, 2, 2]


@pytest.mark.slow
def test_a_bug_of_the_first_ends_all_with_a_traceback(tmp_path):
    broken = IN_THE_SECOND_BATCH.format(fault="raise KeyError('what')")
    with Run(tmp_path / "run", programs={0: broken}) as run:
        run.until(lambda: run.logged() >= 1)
        assert run.codes(SECONDS) == [1, 1]
        assert "Traceback" in run.said(0)
        assert "process 0 has failed, and so ends process 1: error: KeyError: 'what'" in run.said(1)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_peer_ends_all(tmp_path, stopped):
    with Run(tmp_path / "run") as run:
        run.until(lambda: run.logged() >= 1)
        run.processes[stopped].send_signal(signal.SIGSTOP)
        (code,) = run.codes(6 + SECONDS, only=[1 - stopped])
        assert code in LOST
        run.processes[stopped].send_signal(signal.SIGCONT)
        (code,) = run.codes(6 + SECONDS, only=[stopped])
        assert code in LOST


@pytest.mark.parametrize("present", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_missing_peer_is_waited_for_so_long_and_no_longer(tmp_path, present):
    flags = ["--coordinator_address", f"localhost:{free_port()}", "--num_processes=2", f"--process_id={present}"]
    begun = time.monotonic()
    result = cli.run("main", *SHRUNK, *flags, "--config.faults.start_timeout_s=3", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 75, result.stderr
    assert 3 <= time.monotonic() - begun < 3 + SECONDS
    assert result.stderr.count("\n") == 1
    assert "faults.start_timeout_s=3 s" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        pytest.param("--config.optim.peak_lr=0.5", "optim.peak_lr is 0.0", marks=pytest.mark.slow),
        ("--config.checkpoint.every_steps=3", "checkpoint.every_steps is 1 in process 0 and 3 in process 1"),
    ],
)
def test_processes_that_disagree_are_refused(tmp_path, differs, message):
    with Run(tmp_path / "run", each={1: [differs]}) as run:
        assert run.codes(60) == [2, 2]
        for number in range(2):
            assert message in run.said(number)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "--coordinator_address, --num_processes and --process_id go together; give all three"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "--process_id=2 is not one of"),
        (["--coordinator_address=a:b", "--num_processes=2", "--process_id=1"], "'a:b' is not of the form HOST:PORT"),
        (["--workdir=gs://bucket/run"], "argument --workdir: 'gs://bucket/run'"),
    ],
)
def test_flags_are_refused_in_one_line(flags, message):
    result = cli.here("main", *SHRUNK, *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
