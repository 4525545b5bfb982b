"""Training, evaluation and summary through the command line."""

import csv
import importlib
import json
import shutil
import sys

import pytest
from jax._src import xla_bridge

from mnv2_jax.errors import UserError
from mnv2_jax.flags import run_folder_type
from tests import cli


@pytest.fixture
def own(trained, tmp_path):
    """A copy of the run, to be written to."""
    return shutil.copytree(trained[0], tmp_path / "run")


def test_summary_has_what_scripts_rely_on(trained):
    workdir, summary, _ = trained
    assert {"model", "params", "madds", "steps", "seconds", "images_per_second", "eval"} <= summary.keys()
    assert set(summary["eval"]) == {"top1", "top5", "loss", "ece", "count"}
    assert (summary["model"], summary["steps"], summary["eval"]["count"]) == ("mobilenet_v2", 12, 360)
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary["seconds"] > 1
    (session,) = json.loads((workdir / "provenance.json").read_text())["sessions"]
    assert (summary["seed"], summary["devices"]) == (0, session["devices"])
    assert {"kind", "count", "processes"} <= summary["devices"].keys()
    assert summary["commit"] is None or summary["commit"].startswith(session["git"]["commit"])
    assert summary["images_per_second"] == summary["images_per_second_per_device"] > 0


def test_run_folder_is_complete(trained):
    workdir, _, _ = trained
    for name in ("config.json", "provenance.json", "metrics.jsonl", "summary.json", "report.html", "checkpoints"):
        assert (workdir / name).exists(), name
    assert any((workdir / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "split", "loss"} <= lines[0].keys()
    # A tenth of an epoch is 4.49 steps, 1437 images in batches of 32.
    assert [line["step"] for line in lines if line["split"] == "eval"] == [5, 9, 12]
    provenance = json.loads((workdir / "provenance.json").read_text())
    (session,) = provenance["sessions"]
    assert session["devices"] == {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1}
    assert 1e8 < session["memory"]["host_bytes"] < 1e11
    assert f"{session['memory']['host_bytes'] / 1e9:.2f} GB" in (workdir / "report.html").read_text()


def test_nothing_but_the_answer_on_standard_output(trained):
    _, _, streams = trained
    assert streams["stdout"].count("\n") == 1
    assert "step 12/12" in streams["stderr"]


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_eval_counts_every_image_once_on_any_number_of_devices(trained, own, devices):
    summary = trained[1]
    answer = cli.answer(cli.here("main", "--mode=eval", f"--workdir={own}", "--json", devices=devices))
    # A training step of 32 images doesn't divide over 3 devices, but evaluation doesn't need that.
    for name in ("top1", "top5", "count"):
        assert answer["eval"][name] == summary["eval"][name], name
    assert answer["eval"]["loss"] == pytest.approx(summary["eval"]["loss"], rel=1e-5)
    assert sum(map(sum, answer["confusion"])) == 360
    saved = json.loads((own / "evaluation-test.json").read_text())
    assert (saved["split"], saved["step"], saved["confusion"]) == ("test", 12, answer["confusion"])
    assert saved["provenance"]["devices"]["count"] == devices
    # The report doesn't repeat the evaluation at the end of training.
    assert "evaluation-test" not in (own / "report.html").read_text()


def test_eval_prints_a_table_and_stays_beside_the_others(own, tmp_path):
    split, file = "--config.data.holdout_fraction=0.1", tmp_path / "all.csv"
    before = (own / "evaluation.json").read_bytes()
    result = cli.here("main", "--mode=eval", f"--workdir={own}", "--checkpoint=best", split, f"--predictions={file}")
    assert result.returncode == 0, result.stderr
    assert "top-1" in result.stdout
    assert "top-5" not in result.stdout  # of ten classes
    assert "confusion" in result.stdout
    assert (own / "evaluation.json").read_bytes() == before
    saved = json.loads((own / "evaluation-holdout.json").read_text())
    assert {path.stem for path in (own / "examples-holdout").iterdir()} == {str(e["index"]) for e in saved["examples"]}
    assert {str(own / "evaluation-holdout.json"), str(own / "report.html"), str(file)} <= {*result.stdout.split()}
    page = (own / "report.html").read_text()
    for place in ("evaluation", "evaluation-holdout"):
        assert f'href="#{place}"' in page
        assert f"id={place}>" in page
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    assert [int(row["index"]) for row in rows] == list(range(saved["count"]))
    assert {row["path"] for row in rows} == {""}
    right = [row["label"] == row["prediction"] for row in rows]
    assert sum(right) / len(right) == pytest.approx(saved["top1"])
    confidences = [[float(row[f"confidence{rank}"]) for rank in ("", "_2", "_3", "_4", "_5")] for row in rows]
    assert all(row == sorted(row, reverse=True) and sum(row) < 1.001 for row in confidences)


@pytest.mark.parametrize("lines", [0, 8])
def test_a_run_that_is_not_finished_has_a_report_which_needs_no_devices(own, monkeypatch, lines):
    for name in ("summary.json", "evaluation.json", "report.html"):
        (own / name).unlink()
    log = (own / "metrics.jsonl").read_text().splitlines(keepends=True)
    (own / "metrics.jsonl").write_text("".join(log[:lines]))
    monkeypatch.setattr(xla_bridge, "backends", lambda: pytest.fail("asked for devices"))
    result = cli.here("report.__main__", f"--workdir={own}")
    assert (result.returncode, result.stdout) == (0, f"{own / 'report.html'}\n"), result.stderr
    page = (own / "report.html").read_text()
    assert "Not finished" in page
    assert f"ends at step {json.loads(log[lines - 1])['step'] if lines else 0} of 12" in page
    assert ("95 % interval" in page) == (lines > 5)  # it was evaluated at step 5


def test_the_log_as_csv(trained, tmp_path):
    result = cli.here("report.__main__", f"--workdir={trained[0]}", f"--csv={tmp_path / 'log.csv'}")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'log.csv'}\n"), result.stderr
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    with (tmp_path / "log.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert {*rows[0]} == {key for line in lines for key in line}
    written = [{key: "" if value is None else str(value) for key, value in line.items()} for line in lines]
    assert [{key: cell for key, cell in row.items() if cell} for row in rows] == [
        {key: cell for key, cell in line.items() if cell} for line in written
    ]
    nowhere = cli.here("report.__main__", f"--workdir={trained[0]}", f"--csv={tmp_path / 'none' / 'log.csv'}")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1)
    assert str(tmp_path / "none" / "log.csv") in nowhere.stderr


def test_which_checkpoint_counts_stands_beside_every_number(trained, own):
    workdir, summary, streams = trained
    assert summary["checkpoint"] == {"taken": "latest", "step": 12}
    assert "step 12, the last: test top-1" in streams["stderr"]
    assert "the latest, step 12)" in streams["stderr"]
    assert streams["stderr"].count(f"tensorboard --logdir={workdir / 'tensorboard'}") == 1
    assert json.loads((workdir / "evaluation.json").read_text())["checkpoint"] == "latest"
    best = cli.answer(cli.here("main", "--mode=eval", f"--workdir={own}", "--checkpoint=best", "--json"))
    assert (best["checkpoint"], best["step"]) == ("best", summary["best"]["step"])
    page = (own / "report.html").read_text()
    assert "last step, 12" in page
    assert "latest checkpoint, step 12" in page
    assert f"At step {best['step']}, the run's best checkpoint" in page or best["step"] == 12


def test_a_report_of_what_is_no_run_is_refused(tmp_path):
    for flags in ((), (f"--workdir={tmp_path}",), (f"--workdir={tmp_path}", "--config.seed=1"), ("--csv=a.csv",)):
        result = cli.here("report.__main__", *flags)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert not list(tmp_path.iterdir())


def test_eval_refuses_another_model_and_an_empty_folder(trained, tmp_path):
    workdir, _, _ = trained
    other = cli.here("main", "--mode=eval", *cli.SHRUNK, "--config.model.width=0.5", f"--workdir={workdir}")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "model.width: 0.25 -> 0.5" in other.stderr
    empty = cli.here("main", "--mode=eval", f"--workdir={tmp_path}")
    assert (empty.returncode, empty.stderr.count("\n")) == (2, 1)


def test_summary_of_a_run_is_that_of_its_config(trained):
    workdir, summary, _ = trained
    answer = cli.answer(cli.here("main", "--mode=summary", f"--workdir={workdir}", "--json"))
    assert (answer["params"], answer["madds"]) == (summary["params"], summary["madds"])


@pytest.mark.parametrize("flag", ["--checkpoint=best", "--predictions=all.csv"])
def test_a_flag_that_its_mode_does_not_read_is_refused(flag):
    result = cli.here("main", *cli.SHRUNK, flag)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert flag in result.stderr
    assert "--mode=eval only" in result.stderr


def test_predictions_where_no_file_can_be_are_refused_before_anything_is_evaluated(own, tmp_path):
    for path in (tmp_path, tmp_path / "none" / "all.csv"):
        result = cli.here("main", "--mode=eval", f"--workdir={own}", f"--predictions={path}")
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert str(path) in result.stderr


def test_eval_is_at_the_resolution_that_is_asked_for_even_where_the_run_has_one_of_its_own(trained, own):
    config = json.loads((own / "config.json").read_text())
    config["data"]["eval_resolution"] = 8
    (own / "config.json").write_text(json.dumps(config))
    answer = cli.answer(cli.here("main", "--mode=eval", f"--workdir={own}", "--json", "--config.data.resolution=24"))
    assert answer["resolution"] == 24
    assert answer["eval"] != trained[1]["eval"]


def test_summary_mode_reads_no_data():
    answer = cli.answer(cli.here("main", f"--config={cli.ROOT}/configs/w1_0.py", "--mode=summary", "--json"))
    assert (answer["params"], answer["madds"]) == (3504872, 300774272)
    assert sum(layer["params"] for layer in answer["layers"]) == answer["params"]
    table = cli.here("main", f"--config={cli.ROOT}/configs/w1_0.py:classes=10", "--mode=summary")
    assert "block_17/depthwise" in table.stdout


def test_a_run_that_is_not_one(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = cli.here("main", *cli.SHRUNK, f"--workdir={tmp_path}")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_devices_that_do_not_divide_the_batch_are_refused_before_compiling(tmp_path):
    result = cli.run("main", *cli.SHRUNK, f"--workdir={tmp_path / 'run'}", devices=3)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "data.batch_size=32 does not divide over 3 devices" in result.stderr
    assert not (tmp_path / "run").exists()


def test_data_that_are_not_there(tmp_path):
    result = cli.here("main", f"--config={cli.W0_25}:data=folder:{tmp_path}/nowhere", f"--workdir={tmp_path / 'run'}")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "nowhere" in result.stderr


@pytest.mark.parametrize(
    ("verb", "platform"),
    [("main", "cuda"), ("predict", "cpuu")],  # JAX asserts the one and raises the other
)
def test_devices_that_are_not_there_are_told_at_the_start_and_nothing_else_is_blamed(trained, verb, platform):
    last = "--mode=eval" if verb == "main" else cli.ROOT / "README.md"
    process = cli.start(verb, f"--workdir={trained[0]}", last, JAX_PLATFORMS=platform)
    output, error = process.communicate(timeout=100)
    assert (process.returncode, output, error.count("\n")) == (2, "", 1), error
    assert f"JAX_PLATFORMS='{platform}'" in error
    assert error.endswith(": cpu\n")  # the devices of this machine


@pytest.mark.parametrize("name", ["x" * 300, "/".join(40 * ["x" * 100]), "caf\udce9"])
def test_a_path_where_no_checkpoint_could_be_written_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="--workdir"):
        run_folder_type(str(tmp_path / name))


def test_a_path_that_can_be_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_folder_type("~/ä b/c") == tmp_path / "ä b" / "c"
    assert str(run_folder_type("~nobody_has_this_name/x")) == "~nobody_has_this_name/x"
    assert str(run_folder_type("runs/x" + "y" * 240)) == "runs/x" + "y" * 240


@pytest.mark.parametrize(
    "door", ["main", "predict", "convert", "lr_find", "report.__main__", "data.prepare.__main__", "bench.__main__"]
)
def test_help_begins_with_the_command(door, monkeypatch, capsys):
    module = importlib.import_module(f"mnv2_jax.{door}")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module.__spec__)  # as `python -m` does
    monkeypatch.setattr("sys.argv", [module.__file__, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m mnv2_jax.{door.removesuffix('.__main__')} ")
