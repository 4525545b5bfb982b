"""Prediction through the command line, on images as evaluation sees them."""

import csv
import io
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from mnv2_jax import config, predict, verbs
from mnv2_jax.data.sources import open_dataset
from mnv2_jax.errors import UserError
from mnv2_jax.ops.augment import normalise
from mnv2_jax.runs.weights import load_weights
from mnv2_jax.tasks.predictor import Predictor
from mnv2_jax.weights.file import Weights
from tests import cli


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A run, and its evaluation images as PNG files in class folders."""
    top = tmp_path_factory.mktemp("predict")
    split = open_dataset(config.DataConfig(name="digits", resolution=16)).eval
    for place in range(len(split)):
        folder = top / "images" / str(int(split.labels[place]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(split.read(place))).save(folder / f"{place:03}.png")
    return pathlib.Path(shutil.copytree(trained[0], top / "run")), top / "images"


def test_predictions_are_those_of_the_evaluation(run):
    workdir, images = run
    answers = cli.answer(cli.here("predict", f"--workdir={workdir}", "--top=10", "--json", images))
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    confusion, losses = np.zeros((10, 10), int), []
    for answer in answers:
        true = int(answer["path"].split("/")[-2])
        confusion[true, answer["top"][0]["index"]] += 1
        losses += [-np.log(row["probability"]) for row in answer["top"] if row["index"] == true]
    assert confusion.tolist() == evaluation["confusion"]
    assert len(losses) == 360
    assert np.mean(losses) == pytest.approx(evaluation["loss"], rel=1e-5)


def test_answer_has_what_scripts_rely_on(run):
    workdir, images = run
    paths = [images / "3", sorted((images / "1").iterdir())[0]]
    answers = cli.answer(cli.here("predict", f"--workdir={workdir}", "--top=99", "--json", "--checkpoint=best", *paths))
    assert [answer["path"] for answer in answers] == [*map(str, sorted((images / "3").iterdir())), str(paths[1])]
    for answer in answers:
        assert set(answer) == {"path", "top"}
        assert sorted(row["index"] for row in answer["top"]) == list(range(10))
        probabilities = [row["probability"] for row in answer["top"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert all(row["label"] == str(row["index"]) for row in answer["top"])


def test_table_for_people(run):
    workdir, images = run
    path = sorted((images / "7").iterdir())[0]
    result = cli.run("predict", f"--workdir={workdir}", "--top=2", path)
    assert (result.returncode, result.stderr) == (0, "step 12 of the run run, its latest checkpoint\n")
    first, *rows = result.stdout.splitlines()
    assert first == str(path)
    assert len(rows) == 2
    assert all(0 <= float(row.split()[1]) <= 1 for row in rows)


def test_an_image_does_not_depend_on_its_neighbours_nor_on_how_it_is_given(run):
    workdir, images = run
    paths = sorted((images / "5").iterdir())[:35]  # more than one batch
    predictor = Predictor(workdir)
    together, alone = predictor(paths), predictor(paths[-1])
    opened = Image.open(paths[-1])
    for other in (predictor([paths[-1]])[0], predictor(opened), predictor(np.asarray(opened.convert("RGB"))), alone):
        assert [row["index"] for row in together[-1]["top"]] == [row["index"] for row in other["top"]]
        for ours, its in zip(together[-1]["top"], other["top"], strict=True):
            assert ours["probability"] == pytest.approx(its["probability"], rel=1e-5)
    assert predictor.labels == tuple("0123456789")
    features = predictor.features(paths[:3])
    model, variables, _ = load_weights(workdir)
    given = predictor.weights.info.preprocessing
    images = jax.numpy.stack([predictor.preprocess(path) for path in paths[:3]])
    pixels = normalise(images, given.mean, given.std)
    np.testing.assert_allclose(
        features, model.endpoints(jax.tree.map(jax.numpy.asarray, variables), pixels)["pooled"], rtol=1e-5, atol=1e-6
    )
    assert model.num_classes == len(predictor.labels)


def test_a_loop_over_single_images_compiles_once(run):
    workdir, images = run
    predictor = Predictor(workdir, top=1)
    for path in sorted((images / "6").iterdir())[:5]:
        predictor(path)
    assert predictor._answer._cache_size() == 1
    predictor(sorted((images / "6").iterdir())[:2])
    assert predictor._answer._cache_size() == 2  # another size of the batch


def test_what_is_no_image_is_refused(run, tmp_path):
    predictor = Predictor(run[0])
    (tmp_path / "cut.png").write_bytes(b"x")
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), tmp_path / "none.png"):
        with pytest.raises(UserError):
            predictor(bad)
    with pytest.raises(UserError, match=r"1 of the 2 images.*cut\.png"):
        predictor([tmp_path / "cut.png", np.zeros((4, 4, 3), np.uint8)])


def test_weights_whose_outputs_are_not_numbers_predict_nothing(run):
    model, variables, info = load_weights(run[0])
    variables["params"]["classifier"]["bias"][1] = np.nan
    path = sorted((run[1] / "5").iterdir())[0]
    with pytest.raises(UserError, match=str(path)):
        Predictor(Weights(model, variables, info))(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_rows_and_the_others_are_answered(run, tmp_path, workers):
    workdir, images = run
    good = sorted((images / "7").iterdir())
    (tmp_path / "cut.png").write_bytes(good[0].read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    listed = [tmp_path / "empty.png", *good, tmp_path / "ä\udcff.png", tmp_path / "cut.png"]
    (tmp_path / "list.txt").write_bytes(b"\r\n".join(map(os.fsencode, listed)))
    flags = (f"--workdir={workdir}", f"--workers={workers}", f"--from-list={tmp_path / 'list.txt'}", "--top=2")
    result = cli.here("predict", *flags, "--json")
    assert (result.returncode, result.stderr.count("\n")) == (2, 2)  # the checkpoint, and how many can't be read
    answers = json.loads(result.stdout)
    assert [answer["path"] for answer in answers] == list(map(str, listed))
    assert [place for place, answer in enumerate(answers) if "error" in answer] == [0, len(good) + 1, len(good) + 2]
    for ours, its in zip(answers[1:-2], Predictor(workdir, top=2)(good), strict=True):
        assert [row["probability"] for row in ours["top"]] == pytest.approx([row["probability"] for row in its["top"]])
    table = cli.here("predict", *flags, "--csv", "--min-confidence=0.5")
    assert table.returncode == 2
    rows = list(csv.DictReader(io.StringIO(table.stdout)))
    assert {row["path"] for row in rows} == set(map(str, listed))
    assert all(bool(row["error"]) != bool(row["label"]) or not row["error"] for row in rows)
    assert all(float(row["probability"]) >= 0.5 for row in rows if row["probability"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir"),
        (["--workdir=.", "--json"], "give either images"),
        (["--wrokdir=.", "x.png"], "did you mean '--workdir'"),
        (["--workdir=.", "nowhere.png"], "nowhere.png: no such image or folder"),
        (["--workdir=.", "--top=0", "nowhere.png"], "--top: '0' must be a whole number"),
        (["--workdir=.", "--top=many", "nowhere.png"], "--top: 'many' must be a whole number"),
        (["--workdir=.", "--checkpoint=oldest", "nowhere.png"], "oldest"),
        (["--workdir=.", "--json", "--csv", "x.png"], "give one of them"),
        (["--workdir=.", "--min-confidence=2", "x.png"], "number from 0 to 1"),
        (["--workdir=.", "--workers=-1", "x.png"], "--workers: '-1' must be a whole number"),
        (["--workdir=.", "--from-list=nowhere"], "--from-list=nowhere: can't be read"),
        (["--workdir=.", "--from-list=nowhere", "x.png"], "give either"),
        (["--workdir=.", "--config.seed=3", "nowhere.png"], "leave it out"),
        (["--workdir=.", "--config=x.py", "nowhere.png"], "--config=x.py"),
        (["--workdir=.", "--store-logits=x.npz"], "--store-logits needs --config"),
        (["--workdir=.", "--store-logits=x.npz", "--config=x.py", "--top=3"], "leave --top out"),
        (["--workdir=.", "--store-logits=x.npz", "--config=x.py", "a.png"], "leave a.png out"),
        (["--workdir=.", "--store-logits=x.npz", "--config=x.py"], "no file 'x.py'"),
    ],
)
def test_wrong_arguments(monkeypatch, arguments, message):
    monkeypatch.setattr("sys.argv", ["predict", *arguments])
    with pytest.raises(UserError) as error:
        predict.main()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_is_complete():
    result = cli.run("predict", "--help")
    assert result.returncode == 0
    for flag in (
        "--workdir",
        "--checkpoint",
        "--store-logits",
        "--top",
        "--json",
        "IMAGE_OR_FOLDER",
    ):
        assert flag in result.stdout


def test_stored_logits_are_those_of_the_predictions_in_the_order_of_the_split(run, tmp_path, monkeypatch):
    workdir, _ = run
    file = tmp_path / "logits.npz"
    flags = (f"--workdir={workdir}", "--checkpoint=best", f"--config={cli.W0_25}:data=digits,res=32")
    monkeypatch.setattr("sys.argv", ["predict", *flags, "--config.data.batch_size=32", f"--store-logits={file}"])
    predict.main()
    train = open_dataset(config.DataConfig(name="digits")).train
    with np.load(file) as archive:
        logits, labels = archive["logits"].astype(np.float32), archive["labels"]
    np.testing.assert_array_equal(labels, train.labels)
    paths = []
    for place in (3, 700, 1436):
        paths.append(str(tmp_path / f"{place}.png"))
        Image.fromarray(np.asarray(train.read(place))).save(paths[-1])
    answers = Predictor(workdir, top=10, checkpoint="best")(paths)
    for place, answer in zip((3, 700, 1436), answers, strict=True):
        expected = np.empty(10)
        for row in answer["top"]:
            expected[row["index"]] = np.log(row["probability"])
        stored = logits[place] - np.log(np.exp(logits[place]).sum())
        np.testing.assert_allclose(stored, expected, atol=0.05)


def test_find_images(tmp_path):
    for name in ("b.JPG", "a/c.png", "a/.hidden.png", ".trash/d.png", "notes.txt", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images, other_files = predict.find_images([str(tmp_path), str(tmp_path / "notes.txt")])
    assert [path.removeprefix(f"{tmp_path}/") for path in images] == ["a/c.png", "b.JPG", "notes.txt"]
    assert [path.removeprefix(f"{tmp_path}/") for path in other_files] == [
        ".trash",
        "a/.hidden.png",
        "empty/readme.md",
        "notes.txt",
    ]
    with pytest.raises(UserError, match=r"empty: .* 1 file: \.md 1; as .*readme\.md$"):
        predict.find_images([str(tmp_path / "empty")])


def test_a_folder_that_is_no_run(tmp_path, monkeypatch, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "x.JFIF", "JPEG")
    (tmp_path / "y.heic").touch()
    monkeypatch.setattr("sys.argv", ["predict", f"--workdir={tmp_path}", str(tmp_path)])
    with pytest.raises(UserError, match=str(tmp_path)):
        predict.main()
    assert capsys.readouterr().err == f"left out: 1 file: .heic 1; as {tmp_path}/y.heic\n"


def test_a_run_is_evaluated_on_folders_of_its_classes(run, capsys):
    workdir, images = run
    loaded = config.load(str(workdir / "config.json"), ["data.name=folder", f"data.path={images}"])
    verbs.evaluate(loaded, workdir, None, verbs.Output(True), images.parent / "all.csv")
    answer, evaluation = json.loads(capsys.readouterr().out), json.loads((workdir / "evaluation.json").read_text())
    assert (answer["split"], answer["confusion"]) == ("images", evaluation["confusion"])
    # The file has another name than for the run's own data, and holds the path of each image.
    saved = json.loads((workdir / "evaluation-folder-images.json").read_text())
    assert saved["data"] == {"name": "folder", "path": str(images)}
    assert saved["examples"] == answer["examples"]
    for example in saved["examples"]:
        path = pathlib.Path(example["path"])
        assert path.parent == images / str(example["label"])
        assert f'href="{path.as_uri()}"' in (workdir / "report.html").read_text()
    with (images.parent / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(map(str, images.rglob("*.png")))
    assert all(pathlib.Path(row["path"]).parent.name == row["label"] for row in rows)
