"""The log: reading a torn log, and cutting it back."""

import json
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mnv2_jax.runs.metrics_log import MetricsLog, process_seconds, read_metrics, read_scores


def write_log(workdir, steps=range(10, 60, 10)) -> bytes:
    log = MetricsLog(workdir, 0)
    for step in steps:
        log.write(step, "train", {"loss": 1 / step, "lr": 0.1})
    log.close()
    return (workdir / "metrics.jsonl").read_bytes()


def test_metrics_are_lines_of_json_without_nan(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, "train", {"loss": np.float32("nan"), "top1": float("inf"), "lr": np.float32(0.5), "count": 3})
    # A line can be read at once, even by another process.
    (text,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    line = json.loads(text, parse_constant=pytest.fail)
    assert 0 < line.pop("seconds") < 3600
    assert line == {"step": 1, "split": "train", "loss": None, "top1": None, "lr": 0.5, "count": 3}
    log.close()


def test_metrics_torn_at_every_byte(tmp_path):
    """Wherever the end is cut off, exactly the whole lines remain, and the log continues after them."""
    whole = write_log(tmp_path, (10, 20, 30))
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        # An object with its closing brace is whole, even if its newline is missing.
        steps = [10, 20, 30][: whole[:cut].count(b"}")]
        assert [line["step"] for line in read_metrics(tmp_path)] == steps
        log = MetricsLog(tmp_path, 30)
        log.write(40, "train", {"loss": 0.0})
        log.close()
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*steps, 40]


GARBAGE = [
    b"\0" * 64,
    b"\xff\xfe",
    b'{"step": 4',
    b"[1]",
    b'{"step": "x"}',
    b"7",
    b'{"step": 3}',
    b'{"step": 3, "split": "eval", "seconds": "abc"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_line_costs_no_other_and_is_kept_aside(tmp_path, garbage, capsys):
    whole = write_log(tmp_path, (10, 20))
    path = tmp_path / "metrics.jsonl"
    first, second = whole.splitlines(keepends=True)
    path.write_bytes(first + garbage + b"\n" + second)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]
    MetricsLog(tmp_path, 99).close()
    assert path.read_bytes() == whole
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == first + garbage + b"\n" + second
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("garbage", [b"\n", *GARBAGE])
def test_a_torn_end_is_dropped_without_a_word(tmp_path, garbage, capsys):
    whole = write_log(tmp_path, (10, 20))
    (tmp_path / "metrics.jsonl").write_bytes(whole + garbage)
    MetricsLog(tmp_path, 99).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("resume_step", "num_lines"), [(0, 0), (9, 0), (10, 1), (29, 2), (50, 5), (99, 5)])
def test_metrics_are_cut_back_to_the_restored_step(tmp_path, resume_step, num_lines):
    whole = write_log(tmp_path)
    last = read_metrics(tmp_path)[-1]
    log = MetricsLog(tmp_path, resume_step)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(whole.splitlines(keepends=True)[:num_lines])
    # The time of the lost steps still counts.
    assert log.seconds_before == last["seconds"]
    assert log.seconds >= last["seconds"] + process_seconds() - 0.1


def test_evaluations_of_steps_that_are_lost_do_not_count(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step, values in ((2, {"top1": 0.5}), (4, {"top1": 0.9}), (6, {"score": "miou", "top1": 1.0, "miou": 0.25})):
        log.write(step, "eval", values)
    log.close()
    assert read_scores(tmp_path) == {2: 0.5, 4: 0.9, 6: 0.25}
    MetricsLog(tmp_path, 2).close()
    assert read_scores(tmp_path) == {2: 0.5}


def test_reading_metrics_that_are_not_there(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_the_same_numbers(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for resume_step in (0, 10):
            log = MetricsLog(tmp_path, resume_step, tensorboard=True)
            log.write(resume_step + 10, "train", {"loss": 0.25, "top1": float("nan")})
            log.write(resume_step + 10, "eval", {"loss": 0.5})
            log.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        assert b"train/loss" in content
        assert b"eval/loss" in content
        assert b"train/top1" not in content
    # Values of the first file for steps after the restored one no longer hold.
    starts = [[event.step for event in events(file) if event.HasField("session_log")] for file in files]
    assert starts == [[], [11]]


def events(file):
    content = file.read_bytes()
    while content:
        (size,) = struct.unpack_from("<Q", content)
        yield event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def test_process_seconds_counts_from_the_start_of_the_process():
    code = "import time; time.sleep(0.3); from mnv2_jax.runs import metrics_log as r; print(r.process_seconds())"
    seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert 0.3 <= seconds < 30
