"""The GPU benchmark writes its results so far, whatever happens to a part or to the script."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mnv2_jax.bench import __main__ as door
from mnv2_jax.bench import gpu, gpu_parts, gpu_report
from mnv2_jax.bench.gpu import NotMeasuredError, Options, Part
from mnv2_jax.errors import exit_on_user_error
from tests import cli

GOLDEN = pathlib.Path(__file__).parent / "golden" / "gpu_results.json"
STUB = """\
import json, os, subprocess, sys, threading, time

request = json.loads(sys.stdin.readline())
part = request["part"]


def write(**row):
    print(json.dumps(row), flush=True)


def end():
    os.read(0, 1)
    os._exit(9)


write(what="fact", of=part, limit_s=request["limit_s"])
if part == "hangs":
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    write(what="child", pid=child.pid, own=os.getpid())
    sys.stderr.write("compiling\\n" * 30_000)
    sys.stderr.flush()
    threading.Thread(target=end, daemon=True).start()
    time.sleep(600)
elif part == "endless":
    while True:
        write(key="again", ms=1)
elif part == "fails":
    sys.stdout.write('{"what": "ha')
    sys.exit("Traceback\\nValueError: the reason")
elif part == "mends":
    sys.exit(2)
elif part == "keyed":
    for ms in (1, 2):
        write(key=["train", "ours"], ms=ms)
        write(key=["train", "torch"], ms=10 * ms)
elif part == "wrong":
    write(what="form", form="lax", shape="5", dtype="float32", passed=False, error="the error")
elif part == "refuses":
    write(refused="the device is a cpu, no GPU; give --allow-cpu")
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Replaces the parts by those of `STUB`; returns the folder of the results."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(gpu, "_COMMAND", (sys.executable, "-S", "-E", str(tmp_path / "stub.py")))
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 0.1)
    limits = dict.fromkeys(("good", "fails", "mends", "keyed", "wrong", "refuses"), 30.0) | dict(hangs=1.5, endless=1.0)
    monkeypatch.setattr(gpu, "PARTS", tuple(Part(name, f"The part {name}", limit) for name, limit in limits.items()))
    return tmp_path / "out"


def measure(out, *parts, minutes=1.0):
    """Runs the parts; returns their records in results.json, the text of report.md, and the error."""
    error = None
    try:
        gpu.measure(Options(out=out, minutes=minutes, parts=parts))
    except NotMeasuredError as raised:
        error = str(raised)
    return json.loads((out / gpu.RESULTS).read_text())["parts"], (out / gpu.REPORT).read_text(), error


def is_running(pid):
    """Whether a process runs; a zombie, which has ended but wasn't waited for, doesn't count."""
    try:
        return "zombie" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_parts_that_go_well(stubs):
    parts, report, error = measure(stubs, "good", "keyed")
    assert error is None
    assert [part["state"] for part in parts.values()] == ["done", "done"]
    assert parts["good"]["rows"] == [{"what": "fact", "of": "good", "limit_s": 30.0}]
    assert [row["ms"] for row in parts["keyed"]["rows"] if "key" in row] == [2, 20]  # later rows replace earlier ones
    assert "## The part keyed" in report


@pytest.mark.parametrize(("hurdle", "seconds"), [("hangs", "2 s"), ("endless", "1 s")])
def test_a_part_is_cut_off_at_its_limit(stubs, hurdle, seconds):
    start = time.monotonic()
    parts, report, error = measure(stubs, hurdle, "good")
    assert time.monotonic() - start < 10
    assert hurdle in error
    assert str(stubs / "report.md") in error
    cut = parts[hurdle]
    assert cut["state"] == f"cut off after {seconds}"
    assert cut["rows"][0]["of"] == hurdle
    assert f"Part `{hurdle}`: cut off after {seconds}, " in report
    assert f"* fact: of {hurdle}" in report
    assert parts["good"]["state"] == "done"
    if hurdle == "hangs":
        assert cut["said"].endswith("compiling")
        assert not any(is_running(cut["rows"][1][which]) for which in ("pid", "own"))


def test_a_part_that_fails_is_named_and_the_next_one_runs(stubs):
    parts, report, error = measure(stubs, "fails", "mends", "wrong", "good")
    assert (parts["fails"]["state"], parts["fails"]["error"]) == ("failed: exit code 1", "ValueError: the reason")
    assert len(parts["fails"]["rows"]) == 1
    assert parts["mends"]["state"] == "failed: exit code 2"  # exit code 2 of a part is an ordinary failure
    assert (parts["wrong"]["state"], parts["good"]["state"]) == ("done", "done")
    assert "Error: `ValueError: the reason`" in report
    assert "convolutions: 1, failed: 1" in report
    assert "fails, mends;" in error
    assert "check failed" in measure(stubs, "wrong")[2]


def test_without_a_gpu_nothing_else_is_tried(stubs, monkeypatch, capfd):
    monkeypatch.setattr(
        sys, "argv", ["bench", "gpu", f"--out={stubs}", "--minutes=1", "--parts=refuses,good", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(door.main)
    printed = capfd.readouterr()
    assert (ended.value.code, printed.err) == (1, "error: the device is a cpu, no GPU; give --allow-cpu\n")
    parts = json.loads(printed.out)["parts"]
    assert (parts["refuses"]["state"], parts["good"]["state"]) == ("refused", "not begun")
    assert "no GPU" in parts["refuses"]["error"]
    assert "no GPU" in (stubs / "report.md").read_text()


def test_the_minutes_are_kept(stubs, monkeypatch):
    monkeypatch.setattr(gpu, "_SPARE_SECONDS", 0.5)
    start = time.monotonic()
    parts, _, error = measure(stubs, "hangs", "endless", "good", minutes=2.4 / 60)
    assert time.monotonic() - start < 5
    assert (parts["hangs"]["state"], parts["good"]["state"]) == ("cut off after 2 s", "not begun")
    assert parts["endless"]["state"] in ("cut off after 0 s", "not begun")  # depends on the time that remains
    assert "endless, good" in error


def test_a_killed_script_leaves_its_results(stubs):
    script = (
        "from mnv2_jax.bench import gpu; import pathlib, sys\n"
        f"gpu._COMMAND = {gpu._COMMAND!r}\n"
        "gpu.PARTS = tuple(gpu.Part(name, name, 300) for name in ('good', 'hangs'))\n"
        f"gpu.measure(gpu.Options(out=pathlib.Path({str(stubs)!r}), minutes=9))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=cli.ROOT, stderr=subprocess.DEVNULL)
    results = stubs / gpu.RESULTS

    def has_a_child():
        return results.exists() and "own" in results.read_text()

    assert cli.until(process, has_a_child)
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = json.loads(results.read_text())["parts"]
    assert [(part["state"], len(part["rows"])) for part in parts.values()] == [("done", 1), ("running", 2)]
    assert "Part `hangs`: running" in (stubs / gpu.REPORT).read_text()
    pids = parts["hangs"]["rows"][1]
    deadline = time.monotonic() + 10
    while is_running(pids["own"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pids["own"])  # its standard input was closed
    os.kill(pids["pid"], signal.SIGKILL)  # the stub does not stop its child


def test_every_part_has_a_function_and_a_limit():
    assert {part.name for part in (*gpu.PARTS, gpu.CIFAR)} == set(gpu_parts.PARTS)
    assert all(part.limit_s >= gpu._LEAST_SECONDS for part in gpu.PARTS)


# --- the report ---------------------------------------------------------------------------------------------


def test_the_report_of_an_h200():
    """Formats stored results of an H200, from which some rows were removed."""
    results = json.loads(GOLDEN.read_text())
    assert gpu_report.failed_checks(results) == []
    text = gpu_report.markdown(results)
    for line in (
        "Part `checks`: cut off after 70 s, 70 s.",
        "* device: kind NVIDIA H200, platform gpu, python 3.12.3",
        "* checked forms of convolutions: 5, failed: 0",
        "| 112×112×96 3×3 stride 2 | value | 5,174.1 µs (2 %) | 202.0 µs (47 %) | 137.9 µs (69 %) | triton |",
        "| 56×56×144 3×3 stride 1 | kernel_gradient | 158.5 µs (36 %) | 756.5 µs (8 %) | 210.0 µs (27 %) | lax |",
        "| 256 | train | torch.compile | 25.02 (24.98 to 25.12) | 10,234 | 0.97 (0.97 to 0.98) | 21% | 7.2 |",
        "| input_reduce_select_fusion_2 | block_2/expand_norm | backward | 1,417.3 | 1 | 5.9% |",
    ):
        assert line in text.splitlines(), line
    assert text.index("`checks`") < text.index("`depthwise`") < text.index("`train`") < text.index("`profile`")


def test_the_report_of_missing_measurements():
    def timed(kind, form, part, microseconds):
        row = {"kind": kind, "form": form, "shape": "7×7×8 1×1 stride 1", "part": part, "bytes_moved": 1000}
        return row | {"microseconds": microseconds}

    rows = [
        timed("image", "patches", "value", 7.0),
        timed("pointwise", "lax", "value", 2.0),
        timed("pointwise", "lax", "input_gradient", 3.0),
        timed("pointwise", "matmul", "value", 1.0),
        {"kind": "pointwise", "form": "triton", "unavailable": "no such kernel"},
        {"what": "train", "batch": 8, "name": "torch", "unavailable": "a | b"},
        {"what": "cifar", "seconds": 3.0, "train": {"loss": 1.5}, "summary": {"top1": 0.5}},
    ]
    text = gpu_report.markdown({"parts": {"all": {"title": "All", "state": "done", "rows": rows}}})
    lines = text.splitlines()
    assert "| 7×7×8 1×1 stride 1 | value | 2.0 µs | 1.0 µs | matmul |" in lines
    assert "| 7×7×8 1×1 stride 1 | input_gradient | 3.0 µs |  | lax |" in lines
    assert "| sum | | 5 µs |  | |" in lines  # a form that was timed on fewer cases has no sum
    assert "| sum | | 7 µs | |" in lines
    assert "* triton: not measured: no such kernel" in lines
    assert "| 8 | train | torch | not measured: a \\| b | | | | |" in lines
    assert "* train: loss 1.5" in lines
    assert "nan" not in text


# --- real measurements --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_gpu(tmp_path):
    result = cli.run("bench", "gpu", f"--out={tmp_path}", "--minutes=2")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "--allow-cpu" in result.stderr
    assert "--allow-cpu" in json.loads((tmp_path / gpu.RESULTS).read_text())["parts"]["checks"]["error"]


@pytest.mark.slow
def test_the_script_in_its_small_form(tmp_path):
    result = cli.run("bench", "gpu", f"--out={tmp_path}", "--minutes=2", "--allow-cpu", "--parts=checks,digits")
    assert result.returncode == 0, result.stderr
    parts = json.loads((tmp_path / gpu.RESULTS).read_text())["parts"]
    checks, digits = (part["rows"] for part in parts.values())
    assert {row["form"] for row in checks if row["what"] == "form"} == {"lax", "shifted", "rows", "matmul", "patches"}
    assert all(row["passed"] for row in checks if "passed" in row)
    assert digits[0]["differs_from_step"] is None  # a CPU gives the same bits
    assert digits[0]["last_loss"] < digits[0]["first_loss"] < 3
    assert result.stdout == (tmp_path / gpu.REPORT).read_text() + "\n"
