"""Studies: their design, workers on one folder, and a report that is a function of the runs."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from mnv2_jax import config as configs
from mnv2_jax.bench import __main__ as bench
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import write_json
from mnv2_jax.runs import folder as run_folders
from mnv2_jax.study import design, measure, plan, state, work
from mnv2_jax.study.design import Claim, Relation, Study
from tests import cli

SMALL = Study(
    base="w0_35:data=digits",
    axes={"model.width": (0.35, 0.5), "res": (16, 32)},
    seeds=(0, 1, 2),
    settings={"train.epochs": 2},
    claims=[
        Claim(cell={"model.width": 0.5, "res": 32}, published=0.9, tolerance=0.05, source="a paper"),
        Claim(cell={"model.width": 0.5, "res": 16}, published=0.95, tolerance=0.005),
    ],
    relations=[Relation(better={"model.width": 0.5, "res": 32}, worse={"model.width": 0.35, "res": 32})],
)


def fake_run(folder, run, score):
    """Writes what a finished training leaves."""
    top = state.run_folder(folder, run)
    top.mkdir(parents=True, exist_ok=True)
    config = state.planned_config(run)
    write_json(top / "config.json", configs.to_dict(config))
    write_json(top / "provenance.json", {"sessions": [{"git": {"commit": "abc", "dirty": False}}]})
    lines = []
    for epoch in (1, 2):
        lines.append({"step": 10 * epoch, "split": "train", "epoch": float(epoch), "seconds": 3.0 * epoch, "loss": 1.0})
        lines.append({"step": 10 * epoch, "split": "eval", "top1": score * epoch / 2, "seconds": 3.0 * epoch})
    (top / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    width = config.model.width
    summary = {"eval": {"top1": score, "count": 360}, "best": {"step": 20, "top1": score}, "seconds": 6.0}
    if run.seed:  # a summary of an earlier version has neither
        devices = {"platform": "cpu", "kind": "some chip", "count": 2, "processes": 1}
        summary |= {"seed": run.seed, "commit": "0123456789abcdef-dirty", "devices": devices}
    write_json(top / "summary.json", summary | {"params": int(1e6 * width), "madds": int(1e7 * width)})


def test_cells_and_runs_follow_from_the_axes():
    runs = design.runs_of(SMALL)
    assert len(runs) == 12
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4 + [2] * 4
    assert runs[1].name == "width_0.35-res_32-seed_0"
    assert runs[1].config == "w0_35:data=digits,res=32"
    config = state.planned_config(runs[1])
    assert (config.model.width, config.data.resolution, config.train.epochs, config.seed) == (0.35, 32, 2, 0)


def test_the_projects_studies_can_be_planned():
    assert {"digits_widths", "cifar10_widths", "imagenet_table"} <= set(design.study_files())
    for name in design.study_files():
        runs = design.runs_of(design.load_study(name))
        assert state.planned_config(runs[-1]).seed == runs[-1].seed


def test_cells_of_a_study_may_have_a_recipe_each():
    study = design.load_study("imagenet_table")
    top1 = {claim.cell["published"]: claim.published for claim in study.claims}
    assert len(top1) == len(study.claims) == 26
    cells = {run.cell.point["published"]: state.planned_config(run) for run in design.runs_of(study)[:26]}
    for width, published in {0.25: 0.5357, 0.5: 0.6528, 0.75: 0.7042, 1.0: 0.7293}.items():
        config = cells.pop(f"corenet_{width}")
        assert top1[f"corenet_{width}"] == pytest.approx(published)
        assert (config.model.width, config.model.width_rule, config.train.epochs) == (width, "corenet", 300)
        assert config.model.dropout == pytest.approx(0.2 * width)
        assert len(config.data.scales) == 5
    assert not any(config.data.scales or config.model.width_rule == "corenet" for config in cells.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "get_study"),
        ("def get_study(): return 3", "Study"),
        ("def get_study(): return 1 / 0", "ZeroDivisionError"),
        ("raise OSError('no disk')", "no disk"),
        (
            "from mnv2_jax.study.design import *\n"
            "def get_study(): return Study(base='w1_0', axes={'a': (1,)}, claims=[Claim(cell={'b': 1}, published=1,"
            " tolerance=0)])",
            "'b' is no axis",
        ),
        ("from mnv2_jax.study.design import *\ndef get_study(): return Study(base='w1_0', axes={'a': ()})", "empty"),
        (
            "from mnv2_jax.study.design import *\ndef get_study(): return Study(base='w1_0', axes={}, seeds=(1, 1))",
            "different",
        ),
    ],
)
def test_a_file_that_is_no_study_is_one_line(content, message, tmp_path):
    (tmp_path / "x.py").write_text(content)
    result = cli.here("study.__main__", "plan", tmp_path / "x.py")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


# --- workers ------------------------------------------------------------------------------------------------

TRAINING = """
import pathlib, shutil, sys, time
from mnv2_jax.runs.folder import lock
folder, name, code = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with lock(folder / "runs" / name):
    if (folder / "runs" / name / "summary.json").is_file():
        raise SystemExit  # as a finished run does
    with (folder / "trained.txt").open("a") as log:
        log.write(f"{name}\\n")
    time.sleep(0.3)
    if code:
        print("the reason", flush=True)
        raise SystemExit(code)
    shutil.copytree(folder / "made" / "runs" / name, folder / "runs" / name, dirs_exist_ok=True)
"""


def fake_command(folder, runs, codes=()):
    """Makes the commands of trainings of ``runs`` that take no time; ``codes`` are exit codes by the run's name."""
    codes = dict(codes)
    for run in runs:
        fake_run(folder / "made", run, 0.9)
    return lambda run, place: [sys.executable, "-c", TRAINING, str(folder), run.name, str(codes.get(run.name, 0))]


def test_two_workers_train_every_run_once_and_failures_do_not_stop_them(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # only the main thread may set handlers
    monkeypatch.setenv("PYTHONPATH", str(cli.ROOT))
    monkeypatch.setattr(work, "_POLL_S", 0.1)
    runs = design.runs_of(SMALL)[:4]
    command = fake_command(tmp_path, runs, {runs[1].name: 2})
    ends, lines = [], []
    workers = [
        threading.Thread(target=lambda: ends.append(work.work(tmp_path, runs, lines.append, command))) for _ in "ab"
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for states in ends:
        assert [each.name for each in states] == ["done", "failed", "done", "done"]
    assert ends[0][1].failure == {
        "exit_code": 2,
        "line": "the reason",
        "command": list(command(runs[1], state.run_folder(tmp_path, runs[1]))),
    }
    trained = (tmp_path / "trained.txt").read_text().split()
    assert sorted(set(trained)) == sorted(run.name for run in runs)
    assert all(trained.count(run.name) == 1 for run in (runs[0], runs[2], runs[3]))
    work.retry(tmp_path, runs)
    assert [each.name for each in work.work(tmp_path, runs, lines.append, fake_command(tmp_path, runs))] == ["done"] * 4


def test_a_training_that_is_refused_is_no_failure_and_leaves_the_log_of_the_other_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(cli.ROOT))
    (run,) = design.runs_of(SMALL)[:1]
    others_log = state.log_file(tmp_path, run, 1)
    with contextlib.ExitStack() as other:

        def command(run, folder):
            if not others_log.exists():  # another worker begins between this one's look and its training
                other.enter_context(run_folders.lock(folder))
                others_log.parent.mkdir()
                others_log.write_text("of the other")
            return fake_command(tmp_path, [run])(run, folder)

        monkeypatch.setattr(time, "sleep", lambda seconds: other.close())
        (final,) = work.work(tmp_path, [run], lambda line: None, command)
    assert (final.name, final.failure) == ("done", {})
    own_log = state.log_file(tmp_path, run, 2)
    assert sorted(others_log.parent.iterdir()) == [others_log, own_log]
    assert (others_log.read_text(), own_log.read_text()) == ("of the other", "")


def test_faults_of_the_machine_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(cli.ROOT))
    (run,) = design.runs_of(SMALL)[:1]
    (final,) = work.work(tmp_path, [run], lambda line: None, fake_command(tmp_path, [run], {run.name: 75}))
    assert (final.name, final.failure["exit_code"]) == ("failed", 75)
    assert (tmp_path / "trained.txt").read_text().split() == [run.name] * 3


def test_a_folder_is_locked_while_a_process_holds_it(tmp_path):
    assert not run_folders.is_locked(tmp_path / "none")
    code = f"import time, pathlib; from mnv2_jax.runs.folder import lock\nwith lock(pathlib.Path({str(tmp_path)!r})):\n"
    code += "    print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=cli.ROOT)
    assert holder.stdout.readline() == b"held\n"
    assert run_folders.is_locked(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert not run_folders.is_locked(tmp_path)


def test_a_run_with_other_settings_is_refused(tmp_path):
    runs = design.runs_of(SMALL)
    fake_run(tmp_path, runs[0], 0.9)
    path = state.run_folder(tmp_path, runs[0]) / "config.json"
    tree = json.loads(path.read_text())
    tree["train"]["epochs"] = 3.0
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"train\.epochs"):
        state.read_state(tmp_path, runs[0])


# --- the report ---------------------------------------------------------------------------------------------


@pytest.fixture
def studied(tmp_path):
    """A study whose runs are done but for one; returns its file and its folder."""
    file, folder = tmp_path / "small.py", tmp_path / "study"
    file.write_text("from tests.study.test_study import SMALL\n\n\ndef get_study():\n    return SMALL\n")
    for number, run in enumerate(design.runs_of(SMALL)[:-1]):
        base = 0.88 if run.cell.point["model.width"] == 0.35 else 0.91
        fake_run(folder, run, base + 0.001 * (number % 3))
    return file, folder


def test_a_report_says_what_is_reproduced_and_is_the_same_again(studied):
    file, folder = studied
    result = cli.here("study.__main__", "report", file, f"--workdir={folder}", "--json")
    claims = cli.answer(result)["claims"]
    assert [claim["verdict"] for claim in claims] == ["reproduced", "not reproduced", "reproduced"]
    assert claims[2]["seeds"] == [0, 1]  # those that both cells have
    names = ("report.html", "report.md", "results.csv", "verdicts.json")
    first = {name: (folder / name).read_bytes() for name in names}
    time.sleep(1.1)  # no time may stand in them
    cli.answer(cli.here("study.__main__", "report", file, f"--workdir={folder}", "--json"))
    assert {name: (folder / name).read_bytes() for name in names} == first
    page = first["report.html"].decode()
    for part in (
        "Verdicts",
        "Score and cost",
        "Learning curves",
        "What differs",
        "11 of 12 runs",
        "2 × some chip",
        "0123456789-dirty",
    ):
        assert part in page
    rows = first["results.csv"].decode().splitlines()
    assert len(rows) == 5
    assert [row["state"] for row in json.loads(first["verdicts.json"])["unfinished"]] == ["waiting"]
    assert rows[0].startswith("cell,model.width,res,metric,when,params,madds,seeds,mean,spread")


@pytest.fixture
def begun(studied):
    """A study of which one run alone has begun; returns its file, its folder and that run."""
    file, folder = studied
    run, *others = design.runs_of(SMALL)
    for other in others:
        shutil.rmtree(state.run_folder(folder, other), ignore_errors=True)
    (state.run_folder(folder, run) / "summary.json").unlink()
    return file, folder, run


def test_a_report_of_runs_that_are_not_done_counts_none(begun):
    file, folder, run = begun
    claims = cli.answer(cli.here("study.__main__", "report", file, f"--workdir={folder}", "--json"))["claims"]
    assert [(claim["verdict"], claim["seeds"], claim["planned"]) for claim in claims] == [("undecided", [], 3)] * 3
    assert all("0 of 3" in claim["missing"] for claim in claims)
    names = ("report.html", "report.md", "results.csv", "verdicts.json")
    first = {name: (folder / name).read_bytes() for name in names}
    cli.answer(cli.here("study.__main__", "report", file, f"--workdir={folder}", "--json"))
    assert {name: (folder / name).read_bytes() for name in names} == first
    verdicts = json.loads(first["verdicts.json"])
    assert all(cell["mean"] is None and cell["scores"] == [] for cell in verdicts["cells"])
    row, *others = verdicts["unfinished"]
    assert (row["run"], row["state"], row["share"]) == (run.name, "stopped", 1.0)
    assert (row["score_so_far"], row["step"]) == (pytest.approx(0.88), 20)
    assert {other["state"] for other in others} == {"waiting"}
    for name in ("report.html", "report.md"):
        assert "88.00" in first[name].decode()
    status = cli.answer(cli.here("study.__main__", "status", file, f"--workdir={folder}", "--json"))
    assert status["runs"][0]["score"] == pytest.approx(0.88)


def test_a_report_of_a_study_that_has_not_begun_is_one_line(studied, tmp_path):
    result = cli.here("study.__main__", "report", studied[0], f"--workdir={tmp_path / 'none'}")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_status_counts_and_estimates(studied):
    file, folder = studied
    answer = cli.answer(cli.here("study.__main__", "status", file, f"--workdir={folder}", "--json"))
    assert [run["state"] for run in answer["runs"]] == ["done"] * 11 + ["waiting"]
    assert answer["seconds_left"] == pytest.approx(6.0)


def test_a_plan_counts_costs_and_jobs(studied):
    file, folder = studied
    answer = cli.answer(cli.here("study.__main__", "plan", file, "--json"))
    assert len(answer["runs"]) == 12
    assert answer["runs"][0]["images"] == 2 * 1437
    assert 0.9 < answer["claims"][0]["decided"] < 1.01
    for form in ("commands", "slurm-array"):
        text = cli.here("study.__main__", "plan", file, f"--workdir={folder}", f"--format={form}").stdout
        assert text.count("python -m mnv2_jax.main --config=w0_35:data=digits,res=") == 12
    assert "--array=0-11" in text


TIMING = """
import json, sys
if "--config.model.width=0.35" in sys.argv and "--config=w0_35:data=digits,res=16" in sys.argv:
    raise SystemExit("error: too large")
print(json.dumps({"rows": [{"ms": 20.0, "images_per_second": 3200.0, "facts": {"devices": 1, "device": "chip"}}]}))
"""


def test_a_plan_times_the_step_of_each_cell(studied, monkeypatch):
    run, *_ = design.runs_of(SMALL)
    _, _, *arguments = measure.command_of(run)
    parsed, overrides = bench._parser().parse(arguments[1:])
    assert (arguments[0], parsed.what, parsed.config, parsed.json) == ("mnv2_jax.bench", "step", run.config, True)
    assert tuple(overrides) == run.overrides
    monkeypatch.setattr(plan, "cost_of", lambda run, images: plan.Cost(1, 1, 64_000.0, 1_000.0, 3.0, ""))
    monkeypatch.setattr(measure, "command_of", lambda run: [sys.executable, "-c", TIMING, *run.arguments])
    result = cli.here("study.__main__", "plan", studied[0], "--measure", "--json")
    answer = cli.answer(result)
    assert [row["ms"] for row in answer["measured"]] == [None, 20.0, 20.0, 20.0]
    assert "too large" in answer["measured"][0]["why"]
    assert answer["hours_of_steps"] == pytest.approx(9 * 20 / 3600)  # of the nine runs whose cells were timed
    monkeypatch.setattr(measure, "command_of", lambda run: [sys.executable, "-c", "raise SystemExit('no')"])
    refused = cli.here("study.__main__", "plan", studied[0], "--measure")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_training_of_several_sizes_is_counted_size_by_size():
    sizes = {"small": {"res": 16}, "large": {"res": 32}, "both": {"data.scales": (16, 32)}}
    study = Study(
        base="w0_35:data=digits", axes={"size": sizes}, settings={"train.steps": 10, "model.depth": 0.3}, seeds=(0,)
    )
    small, large, both = map(plan.cost_of, design.runs_of(study))
    assert both.images == 10 * (256 + 64) / 2  # a batch of either size has about as many pixels
    assert both.training_madds == plan.PASSES * 10 * (256 * small.madds + 64 * large.madds) / 2


def test_runs_are_compared(studied, tmp_path):
    _, folder = studied
    runs = [state.run_folder(folder, run) for run in design.runs_of(SMALL)[:2]]
    for run in runs:
        write_json(run / "dataset.json", {"class_names": ["a", "b"]})
    result = cli.here("study.__main__", "compare", *runs, f"--html={tmp_path / 'c.html'}", "--json")
    answer = cli.answer(result)
    assert set(answer["settings"]) == {"data.resolution"}
    assert [row["top1"] for row in answer["results"].values()] == pytest.approx([0.88, 0.881])
    assert "Settings that differ" in (tmp_path / "c.html").read_text()
    alone = cli.here("study.__main__", "compare", runs[0])
    assert (alone.returncode, alone.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_a_study_is_trained_and_reported(tmp_path):
    content = (
        "from mnv2_jax.study.design import Study\n\n\ndef get_study():\n"
        "    return Study(base='w0_35:data=digits,res=16', axes={'model.width': (0.25, 0.35)}, seeds=(0,),\n"
        "                 settings={'train.steps': 2, 'model.depth': 0.3})\n"
    )
    (tmp_path / "tiny.py").write_text(content)
    done = cli.run("study", "run", tmp_path / "tiny.py", f"--workdir={tmp_path / 's'}", "--json")
    assert [run["state"] for run in cli.answer(done)["runs"]] == ["done", "done"]
    assert (tmp_path / "s" / "runs" / "width_0.25-seed_0" / "report.html").is_file()
    report = cli.here("study.__main__", "report", tmp_path / "tiny.py", f"--workdir={tmp_path / 's'}")
    assert report.returncode == 0
