"""The benchmarks' command line and arithmetic; most tests replace the contenders by a short script, `STUB`."""

import json
import os
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from mnv2_jax import config
from mnv2_jax.bench import __main__ as door
from mnv2_jax.bench import contest, costs, synthetic
from mnv2_jax.bench.contest import OUR_ENTRY, Entry
from mnv2_jax.bench.input import table, time_input
from mnv2_jax.config import Config, DataConfig, Loaded
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.nn.forms import LIBRARY
from mnv2_jax.tasks.distillation import TEACHER_LOGITS
from tests import cli

DIGITS = cli.SHRUNK[0]


def bench(monkeypatch, *arguments):
    """Runs the command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    try:
        exit_on_user_error(door.main)
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["steps", DIGITS], "'steps'"),
        (["step"], "--config"),
        (["memory"], "--config"),
        (["step", DIGITS, "--repeats=0"], "--repeats=0"),
        (["step", DIGITS, "--repeats=many"], "many"),
        (["step", DIGITS, "--against=tensorflow"], "torch and xla"),
        (["infer", DIGITS, "--against=torch,"], "--against=torch,"),
        (["step", "--config=configs/nothing.py"], "configs/nothing.py"),
        (["step", DIGITS, "--config.model.widht=1"], "model.width"),
        (["step", DIGITS, "--timeout_s=3"], "step takes no --timeout_s; only pod"),
        (["memory", DIGITS, "--roofline"], "memory takes no --roofline; only step and infer"),
        (["memory", DIGITS, "--repeats=3"], "memory takes no --repeats"),
        (["input", "--data=folder:x", "--against=torch"], "input takes no --against"),
        (["input"], "--data"),
        (["input", "--data=folder"], "NAME:PATH"),
        (["input", f"--data=folder:{cli.ROOT / 'tests'}"], "train"),  # tests/ has no folder train/
        (["input", "--data=folder:runs/12:30"], "'runs/12:30'"),
        (["pod", DIGITS], "--topology"),
        (["pod", DIGITS, "--topology=v5e"], "v5e"),
        (["gpu", "--minutes=3"], "--out"),
        (["gpu", "--out=x"], "--minutes"),
        (["gpu", "--out=x", "--minutes=0"], "--minutes=0"),
        (["gpu", "--out=x", "--minutes=nan"], "--minutes=nan"),
        (["gpu", "--out=x", "--minutes=3", "--parts=nonsense"], "checks, digits"),
        (["gpu", "--out=x", "--minutes=3", "--parts=cifar"], "--cifar"),
        (["gpu", "--out=x", "--minutes=3", "--cifar=/nowhere"], "/nowhere"),
        (["gpu", "--out=x", "--minutes=3", DIGITS], "--config"),
        (["gpu", "--out=README.md", "--minutes=3"], "README.md"),
        (["step", DIGITS, "--allow-cpu"], "step takes no --allow-cpu"),
    ],
    ids=lambda x: " ".join(x).replace(DIGITS, "CONFIG") if isinstance(x, list) else "",
)
def test_mistakes_are_one_line(arguments, named, monkeypatch, capfd):
    monkeypatch.chdir(cli.ROOT)
    code = bench(monkeypatch, *arguments)
    printed = capfd.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1), printed
    assert named in printed.err


def test_a_mistake_ends_the_command():
    result = cli.run("bench", "step", DIGITS, "--against=tensorflow")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "'tensorflow'" in result.stderr


# --- contenders ---------------------------------------------------------------------------------------------

STUB = """\
import json, os, sys, time

job = json.loads(sys.stdin.readline())
who = job["who"]
open(os.path.join({folder!r}, who), "w").write(str(os.getpid()))


def answer(**content):
    print(json.dumps(content), flush=True)


if who == "late":
    time.sleep(600)
if who == "missing":
    answer(unavailable="no such library")
    sys.exit()
if who in ("crashes", "wrong") or job["config"]["seed"] == 13:
    sys.stderr.write("a line\\n" * 30_000 + "error: the last line\\n")  # more text than a pipe holds
    sys.exit(2 if who != "crashes" else 11)
answer(ready={{"compile_seconds": 2.0 if who == "ours" else 8.0, "trace_seconds": 1.0 if who == "ours" else None,
    "program_bytes": 1000 + 10 * job["config"]["data"]["batch_size"], "memory_limit_bytes": 5000, "devices": 2}})
times = dict(ours=[9, 2, 4, 3], slow=[9, 4, 4, 9], dies=[9, 1], halts=[9, 1], still=[9] * 4)[who]
for line in sys.stdin:
    request = json.loads(line)
    if "peak" in request:
        answer(bytes=None if who == "slow" else 10)
    elif times:
        answer(seconds=times.pop(0) * request["repeat"])
    elif who == "dies":
        os.write(1, b'{{"seco')  # and stops in the middle of a line
        sys.exit(3)
    else:
        answer(unavailable="out of memory")
        sys.exit()
"""
SMALL = dict(name="mobilenet_v2", depth=0.3, width=0.1, num_classes=10)
COUNT = 4


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Replaces the contenders by `STUB`, which acts by the contender's name; returns the folder of process ids."""
    script = tmp_path / "stub.py"
    (tmp_path / "ids").mkdir()
    script.write_text(STUB.format(folder=str(tmp_path / "ids")))
    monkeypatch.setattr(contest, "_COMMAND", (sys.executable, "-S", "-E", str(script)))
    monkeypatch.setattr(contest, "variable_shapes", lambda model: {"params": {"w": jax.ShapeDtypeStruct((2, 3), int)}})
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(contest, "TURN_SECONDS", 20.0)  # so that a turn has several steps
    return tmp_path / "ids"


def settings(**tree):
    return config.build({"model": SMALL, "data": {"batch_size": COUNT}} | tree)


DESCRIPTION = {
    "model": "mobilenet_v2",
    "width": 0.1,
    "dtype": "float32",
    "resolution": 224,
    "batch": 4,
    "optimizer": "sgd",
}
"""Keys with which the commands' JSON describes `settings()`."""


def assert_gone(ids):
    for path in ids.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def entries(*names):
    return [OUR_ENTRY, *(Entry(name, implementation=name) for name in names)]


@pytest.mark.parametrize("cores", [2, 64])  # contenders start one after the other, or all at once
def test_turns_are_compared_one_by_one(stubs, monkeypatch, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    names = ("slow", "missing", "crashes", "wrong", "dies", "halts")
    rows = contest.compare(entries(*names), "train", settings(), 3)
    ours, slow, *unavailable = rows
    assert [row["name"] for row in rows] == ["ours", *names]
    assert (ours["ms"], ours["ms_min"], ours["ms_max"]) == (3000, 2000, 4000)
    assert ours["images_per_second"] == pytest.approx(COUNT / 3)
    assert (ours["ratio"], ours["ratio_min"], ours["ratio_max"]) == (1, 1, 1)
    assert (slow["ms"], slow["ratio"], slow["ratio_min"], slow["ratio_max"]) == (4000, 0.5, pytest.approx(1 / 3), 1)
    assert (ours["peak_bytes"], slow["peak_bytes"]) == (10, None)
    assert ours["facts"]["compile_seconds"] == 2
    ended = "its process ended with exit code"
    assert [row["unavailable"] for row in unavailable] == [
        "no such library",
        f"{ended} 11: the last line",
        f"{ended} 2: the last line",
        f"{ended} 3: no error message",
        "out of memory",
    ]
    text = contest.table({"what": "step", **DESCRIPTION, "rows": rows})
    assert "train step of mobilenet_v2 0.1, 224 px, batch 4, float32, sgd" in text
    assert "(0.33 to 1.00)" in text
    assert "halts          not measured: out of memory" in text
    assert_gone(stubs)


def test_rows_come_after_every_turn(stubs):
    turns = list(contest.turns(entries("dies"), "infer", settings(), 2))
    assert [len(rows) for rows in turns] == [2, 2]
    assert turns[0][0]["ms"] == 2000
    assert turns[0][1]["ratio"] == 2
    assert "unavailable" in turns[1][1]
    first = next(contest.turns(entries("slow"), "infer", settings(), 2))  # a caller may stop early
    assert first[1]["ms"] == 4000
    assert_gone(stubs)


def test_a_contender_that_is_not_ready_in_time_is_unavailable(stubs):
    (rows,) = contest.turns(entries("late", "slow"), "train", settings(), 1, ready_s=1.0)
    assert rows[1].keys() == {"name", "unavailable"}
    assert "not ready" in rows[1]["unavailable"]
    assert "ms" in rows[0]
    assert_gone(stubs)


@pytest.mark.parametrize(
    ("first", "tree", "reason"),
    [
        (Entry("ours", implementation="missing"), {}, "no such library"),
        (Entry("ours", implementation="halts"), {}, "out of memory"),
        (OUR_ENTRY, {"seed": 13}, "^the last line$"),  # an error that the user can fix is passed on unchanged
    ],
)
def test_without_ours_there_is_nothing_to_compare(stubs, first, tree, reason):
    with pytest.raises(UserError, match=reason):
        contest.compare([first, Entry("slow", implementation="slow")], "train", settings(**tree), 3)
    assert_gone(stubs)


def test_the_commands_print_what_was_compared(stubs, monkeypatch, capfd):
    monkeypatch.setattr(contest, "RIVALS", {"torch": entries("slow")[1:], "xla": entries("missing")[1:]})
    assert bench(monkeypatch, "infer", DIGITS, "--against=torch,xla", "--repeats=2", "--json") == 0
    results = json.loads(capfd.readouterr().out)
    assert results.keys() == {"what", "rows", *DESCRIPTION}
    digits_description = {
        "model": "mobilenet_v2",
        "width": 0.25,
        "dtype": "float32",
        "resolution": 16,
        "batch": 32,
        "optimizer": "sgd",
    }
    assert {key: results[key] for key in DESCRIPTION} == digits_description
    assert results["what"] == "infer"
    assert [row["name"] for row in results["rows"]] == ["ours", "slow", "missing"]
    assert bench(monkeypatch, "compile", DIGITS, "--against=torch,xla", "--repeats=2") == 0
    text = capfd.readouterr().out
    assert "train step of mobilenet_v2 0.25" in text
    assert "not measured: no such library" in text
    assert bench(monkeypatch, "step", DIGITS, "--config.seed=13", "--json") == 2
    assert capfd.readouterr() == ("", "error: the last line\n")


def test_compile_times(stubs):
    rows = costs.compile_times(entries("slow", "missing"), "train", settings(), 2)
    assert rows[0] == {"name": "ours", "seconds": 3, "seconds_min": 3, "seconds_max": 3, "trace_seconds": 1, "ratio": 1}
    assert (rows[1]["seconds"], rows[1]["trace_seconds"], rows[1]["ratio"]) == (8, 0, 3 / 8)
    assert rows[2] == {"name": "missing", "unavailable": "no such library"}


def test_memory(stubs):
    results = costs.memory(entries("slow", "crashes"), settings(norm={"group_size": 2}))
    ours, slow, crashes = results["rows"]
    assert (ours["program_bytes"], ours["peak_bytes"], slow["peak_bytes"]) == (1040, 10, None)
    assert "the last line" in crashes["unavailable"]
    # A batch needs 1000 bytes and 10 per image; it grows in steps of 2 images on each of 2 devices.
    largest = {"images": 400, "program_bytes": 5000, "limit_bytes": 5000, "was_run": True}
    assert results["largest"] == largest
    text = costs.memory_table(DESCRIPTION | results)
    assert "400 images, 0.0 of 0.0 GB (run)" in text
    assert_gone(stubs)


def test_the_largest_batch(monkeypatch):
    calls = []

    def planned(settings, images, *, runs=False):
        calls.append((images, runs))
        return None if images > fits else 100 + images**2 // 100

    monkeypatch.setattr(costs, "_planned", planned)
    fits = 10_000
    largest = costs.largest_batch(settings(optim={"accumulate_steps": 2}, norm={"group_size": 1}), 10_000, 1)
    assert largest["images"] % 2 == 0
    assert largest["program_bytes"] <= 10_000
    assert calls[0] == (2, False)
    assert calls[-1] == (largest["images"], True)
    fits = 5
    with pytest.raises(UserError, match="6 images"):
        costs.largest_batch(settings(norm={"group_size": 2}), 10_000, 1)
    fits = 10_000
    monkeypatch.setattr(costs.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000))
    largest = costs.largest_batch(settings(norm={"group_size": 1}), None, 1)  # the host's memory
    assert (largest["was_run"], largest["limit_bytes"]) == (False, 900)
    monkeypatch.setattr(costs, "_planned", lambda settings, images, **runs: 1000 + images)
    with pytest.raises(UserError, match="1 images"):
        costs.largest_batch(settings(norm={"group_size": 1}), 900, 1)


# --- random images ------------------------------------------------------------------------------------------


def test_batches_of_noise():
    settings = synthetic.load(DIGITS.removeprefix("--config="), ["model.depth=0.3"])
    assert settings.model.num_classes == 10
    experiment = synthetic.without_data(settings, forms=LIBRARY, devices=jax.devices()[:1])
    batch = synthetic.random_batch(experiment)
    spec = synthetic.abstract_batch(experiment)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in spec.items()
    }
    assert batch["image"].shape == (32, 16, 16, 3)
    assert 0 <= batch["label"].min() < batch["label"].max() <= 9
    assert batch["image"].max() > 250
    images = synthetic.normalised(experiment, batch)
    assert (images.shape, images.dtype) == ((32, 16, 16, 3), np.float32)
    assert abs(float(images.mean())) < 2


def test_batches_of_noise_have_a_teacher():
    settings = synthetic.load(DIGITS.removeprefix("--config="), ["distill.teacher=/a/run", "data.batch_size=16"])
    experiment = synthetic.without_data(settings, forms=LIBRARY, devices=jax.devices()[:1])
    batch = synthetic.random_batch(experiment)
    assert (batch[TEACHER_LOGITS].shape, batch[TEACHER_LOGITS].dtype) == ((16, 10), np.float32)


# --- real measurements --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_step_is_timed():
    results = cli.answer(cli.run("bench", "step", DIGITS, "--against=torch,xla", "--roofline", "--repeats=2", "--json"))
    ours, eager, _, xla = results["rows"]
    assert [row["name"] for row in results["rows"]] == ["ours", "torch eager", "torch.compile", "XLA's forms"]
    for row in (ours, xla):
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["images_per_second"] == pytest.approx(32e3 / row["ms"])
    assert ours["ratio"] == 1
    assert ("ms" in eager) != ("unavailable" in eager)  # depends on whether PyTorch is installed
    assert results["roofline"]["shares"].keys() == {row["name"] for row in results["rows"] if "ms" in row}
    assert results["roofline"]["shares"]["ours"] == pytest.approx(results["roofline"]["bound_ms"] / ours["ms"])


@pytest.mark.slow
def test_inference_is_timed():
    result = cli.run("bench", "infer", DIGITS, "--config.model.depth=0.3", "--repeats=1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("inference of mobilenet_v2 0.25, 16 px, batch 32, float32\n")


@pytest.mark.slow
def test_memory_and_compilation_are_measured():
    small = (DIGITS, "--config.model.depth=0.3", "--json")
    found = cli.answer(cli.run("bench", "compile", *small))
    assert found["rows"][0]["seconds"] > found["rows"][0]["trace_seconds"] > 0
    settings = synthetic.load(DIGITS.removeprefix("--config="), ["model.depth=0.3"])
    found = costs.largest_batch(settings, 2**25, len(jax.devices()))
    assert 2**24 < found["program_bytes"] <= 2**25
    assert found["images"] % (16 * len(jax.devices())) == 0


# --- input --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight JPEG files in two classes, without evaluation images."""
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
    results = time_input(Loaded("", settings, {}), repeats=2, turn_seconds=0.1, times_step=False)
    assert (results["workers"], results["cores"]) == (0, 1)
    for name in ("pipeline", "decoding"):
        assert results[name]["images_per_second"] == results[name]["images_per_second_per_core"] > 0
    assert 0.2 < results["ratio"] < 5
    assert "limit" not in results
    assert f"{results['ratio']:.0%}" in table(results)


@pytest.mark.slow
def test_input_reports_the_limit(photos):
    config = f"--config={cli.W0_25}:res=32,batch=32,classes=2"
    flags = (config, f"--data=folder:{photos}", "--config.data.eval_split=train", "--config.data.num_workers=1")
    results = cli.answer(cli.run("bench", "input", *flags, "--repeats=1", "--json"))
    assert results["workers"] == results["cores"] == 1
    faster = results["step_images_per_second"] > results["pipeline"]["images_per_second"]
    assert results["limit"] == ("input" if faster else "step")


def test_input_needs_files_to_decode(photos):
    digits = Config(data=DataConfig(name="digits"))
    uncropped = Config(data=DataConfig(name="folder", path=str(photos), crop="none"))
    for settings in (digits, uncropped):
        with pytest.raises(UserError, match=r"data\.name="):
            time_input(Loaded("", settings, {}), repeats=1)
