"""The report shows the content of a run folder, even an incomplete one, and needs nothing else."""

import base64
import csv
import html.parser
import io
import json
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mnv2_jax.config import build
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import write_json
from mnv2_jax.report import page as report
from mnv2_jax.report.sections import CLASSIFICATION
from mnv2_jax.runs import folder as run_folder
from mnv2_jax.runs.metrics_log import MetricsLog

TWO_MISTAKES = [
    {"index": 3, "label": 0, "prediction": 1, "confidence": 0.9876, "loss": 4.5},
    {"index": 1, "label": 1, "prediction": 0, "confidence": 0.6, "loss": 1.0},
]
VOID = {"meta", "img", "br", "hr"}


class Page(html.parser.HTMLParser):
    """Reads a page strictly: every tag is closed in its order; keeps text, tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.links = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def make_run(workdir, names, lines=40):
    """A made-up finished run, in which one class has no images."""
    rng = np.random.default_rng(0)
    k = len(names)
    config = build({"model": {"width": 0.35}, "data": {"name": "digits"}})
    facts = {"name": "digits", "class_names": names, "num_train": 1437, "num_eval": 360, "eval_split": "test"}
    run_folder.begin_session(workdir, config, facts | {"steps": lines}, {"platform": "cpu", "kind": "x<y", "count": 2})
    log = MetricsLog(workdir, 0)
    for step in range(1, lines + 1):
        loss = float("nan") if step == 7 else 2 / step
        log.write(step, "train", {"loss": loss, "top1": 0.5, "lr": 0.1, "images_per_second": 300.0})
    log.write(lines, "eval", {"loss": 0.1, "top1": 0.9, "top5": 1.0, "ece": 0.02, "count": 360})
    log.close()
    confusion = rng.integers(0, 3, (k, k)) + 20 * np.eye(k, dtype=int)
    confusion[1] = 0
    images, right = confusion.sum(1), confusion.diagonal()
    scores = {"top1": right.sum() / images.sum(), "top5": 1.0, "loss": 0.1, "ece": 0.02, "count": images.sum()}
    per_class = [
        {"label": name, "count": n, "accuracy": r / n if n else None}
        for name, n, r in zip(names, images, right, strict=True)
    ]
    bins = [
        {"confidence": (i + 0.5) / 15 if i > 3 else None, "accuracy": 0.9 if i > 3 else None, "count": 9 * (i > 3)}
        for i in range(15)
    ]
    tables = {"per_class": per_class, "confusion": confusion, "calibration": bins}
    write_json(workdir / "evaluation.json", {"step": lines, **scores, **tables, "examples": []})
    summary = {"model": "mobilenet_v2", "params": 410114, "madds": 6_170_000, "steps": lines, "seconds": 143.2}
    speeds = {"images_per_second": 311.3, "images_per_second_per_device": 155.6}
    write_json(workdir / "summary.json", {**summary, **speeds, "eval": scores})


def render(workdir):
    return report.write_report(workdir, CLASSIFICATION).read_text()


def test_report_holds_the_run(tmp_path):
    make_run(tmp_path, [f"digit {i}" for i in range(10)])
    page = Page(render(tmp_path))
    for words in (
        "mobilenet_v2 ×0.35 on digits",
        "2:23",
        "images/s per device 156",
        "410 k",
        "6.17 M",
        "images of the test split",
        "Learning curves",
        "training batches",
        "Most frequent mistakes",
        "digit 9",
        "model.width",
        "2 × x<y",
    ):
        assert words in page.text
    assert page.tags.count("svg") == 5
    assert page.tags.count("img") == 0


def test_what_was_set_comes_before_what_is_the_default(tmp_path):
    make_run(tmp_path, ["a", "b"])
    session = json.loads((tmp_path / "provenance.json").read_text())["sessions"][0]
    run_folder.note_memory(tmp_path, {"device_bytes": 12_340_000_000, "host_bytes": 56_700_000_000})
    text = Page(render(tmp_path)).text
    assert "changed value default model.width 0.35 1.0 data.name digits imagenet" in text
    assert f"Session, {session['started']}, 2 × x<y, 12.34 GB on a device, 56.70 GB on the host" in text


def evaluated_later(workdir, name, **facts):
    """Writes the files of an evaluation of another split, with changes."""
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    write_json(workdir / f"evaluation-{name}.json", {**evaluation, "split": name, "resolution": 32, **facts})


def test_evaluations_stand_beside_each_other(tmp_path):
    make_run(tmp_path, ["a<b", "c"])
    evaluated_later(tmp_path, "val", top1=0.25, data={"name": "digits", "path": None})
    evaluated_later(tmp_path, "other-val", split="val", step=7, data={"name": "other", "path": "/x"})
    evaluated_later(tmp_path, "test")  # says what evaluation.json says
    page = Page(render(tmp_path))
    assert "split step px top-1 loss" in page.text
    headings = [f"Evaluation on {name} At step" for name in ("test", "val", "val of other in /x")]
    assert [page.text.count(heading) for heading in headings] == [1, 1, 1]
    assert {"#evaluation", "#evaluation-val", "#evaluation-other-val"} <= {*page.links}
    assert "25.00 % top-1 on" in page.text.replace("\xa0", " ")
    evaluated_later(tmp_path, "test", top1=0.5)  # of other images, or by other code
    assert Page(render(tmp_path)).text.count("Evaluation on test At step") == 2


def test_top5_is_said_where_it_says_something(tmp_path):
    for classes in (2, 10, 11):
        workdir = tmp_path / str(classes)
        workdir.mkdir()
        make_run(workdir, [str(label) for label in range(classes)])
        assert ("top-5" in Page(render(workdir)).text) == (classes == 11)


def test_report_asks_the_network_for_nothing(tmp_path):
    make_run(tmp_path, [str(i) for i in range(40)])
    text = render(tmp_path)
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import", text)
    assert all(link.startswith(("#", "data:image/png;base64,", "data:text/csv;")) for link in page.links)
    assert not {"script", "link", "iframe", "metadata"} & set(page.tags)


@pytest.mark.parametrize(("classes", "named"), [(43, True), (128, True), (129, False)])
def test_many_classes_are_the_worst_and_a_matrix_that_names_its_cells_or_a_picture(tmp_path, classes, named):
    make_run(tmp_path, [f"class {i}" for i in range(classes)])
    page = Page(text := render(tmp_path))
    assert page.tags.count("img") == (not named)
    confusion = np.array(json.loads((tmp_path / "evaluation.json").read_text())["confusion"])
    hints = dict(re.findall(r'title="class (\d+ as class \d+): (\d+) \(', text))
    cells = {f"{i} as class {j}": str(n) for (i, j), n in np.ndenumerate(confusion) if n}
    assert hints == (cells if named else {})
    assert "The 20 classes " in page.text
    assert f"All {classes} classes" in page.text


def test_all_confusions_are_in_a_csv_the_largest_mistakes_first(tmp_path):
    make_run(tmp_path, [f'"{i}", <é>' for i in range(40)])
    page = Page(render(tmp_path))
    (link,) = [link for link in page.links if link.startswith("data:text/csv")]
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(link.partition("base64,")[2]).decode())))
    confusion = np.zeros((40, 40), int)
    for row in rows:
        confusion[tuple(int(row[name].split('"')[1]) for name in ("true", "predicted"))] = row["images"]
    assert confusion.tolist() == json.loads((tmp_path / "evaluation.json").read_text())["confusion"]
    counts = [int(row["images"]) for row in rows if row["true"] != row["predicted"]]
    assert counts == sorted(counts, reverse=True)
    assert [row["true"] != row["predicted"] for row in rows[: len(counts)]] == [True] * len(counts)
    assert f"All {len(counts):,} confusions" in page.text


def test_names_are_text(tmp_path):
    names = ["<script>alert(1)</script>", 'a"b', "é 中 & co", "{braces}", "%s", "$x^2$"]
    make_run(tmp_path, names)
    page = Page(render(tmp_path))
    assert "script" not in page.tags
    for name in names:
        assert name in page.text


def test_same_run_same_page_and_no_global_state(tmp_path):
    make_run(tmp_path, ["a", "b", "c"])
    before = dict(matplotlib.rcParams)
    first = render(tmp_path)
    assert render(tmp_path) == first
    assert dict(matplotlib.rcParams) == before


def test_classes_without_images_are_noted(tmp_path):
    make_run(tmp_path, ["a", "b<c", "d"])
    assert "test has no images of 1 of 3 classes: b<c." in Page(render(tmp_path)).text
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    for row in evaluation["per_class"]:
        row["count"] = 1
    write_json(tmp_path / "evaluation.json", evaluation)
    assert "no images of" not in Page(render(tmp_path)).text


def test_skipped_images_are_counted_and_named(tmp_path):
    make_run(tmp_path, ["a", "b"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    for skipped in ({}, {"skipped": 0}):
        write_json(tmp_path / "summary.json", summary | skipped)
        assert "Skipped images" not in Page(render(tmp_path)).text
    write_json(tmp_path / "summary.json", summary | {"skipped": 1234})
    (tmp_path / "skipped.txt").write_text("".join(f"<{i}>.jpg: damaged\n" for i in range(50)) + "torn")
    text = Page(render(tmp_path)).text
    assert "can't be decoded: 50; skipped over all epochs: 1,234 times" in text
    assert all(f"<{i}>.jpg: damaged" in text for i in range(50))
    assert "torn" not in text
    assert "more in skipped.txt" not in text
    (tmp_path / "skipped.txt").write_text("".join(f"<{i}>.jpg: damaged\n" for i in range(1060)))
    text = Page(render(tmp_path)).text
    assert "<49>.jpg" in text
    assert "<50>.jpg" not in text
    assert "and 1,010 more in skipped.txt" in text


@pytest.mark.parametrize("missing", ["summary", "evaluation", "config", "dataset", "provenance", "metrics", "all"])
def test_what_is_not_there_is_left_out(tmp_path, missing):
    make_run(tmp_path, ["a", "b", "c"])
    for path in tmp_path.iterdir():
        if path.stem == missing or missing == "all":
            path.unlink()
    assert "<h1>" in render(tmp_path)


@pytest.mark.parametrize("lines", [0, 1, 2, 1000])
def test_any_number_of_points(tmp_path, lines):
    make_run(tmp_path, ["a", "b"], lines)
    Page(text := render(tmp_path))
    assert len(text) < 300_000


def test_a_damaged_file_is_named(tmp_path):
    make_run(tmp_path, ["a", "b"])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json"):
        report.write_report(tmp_path, CLASSIFICATION)


def interval(workdir, share, count):
    """Interval on the page, which rounds to a tenth of a percent."""
    write_json(workdir / "summary.json", {"eval": {"top1": share, "count": count}})
    low, high = re.search(r"95 % interval ([\d.]+) to ([\d.]+)", render(workdir)).groups()
    return float(low) / 100, float(high) / 100


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (1.0, 360), (0.5, 10), (0.9889, 360)])
def test_interval_holds_the_share_and_stays_a_share(tmp_path, share, count):
    low, high = interval(tmp_path, share, count)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_interval_ends_where_the_share_is_just_not_surprising(tmp_path):
    """Wilson's definition: at both ends p, the share is z standard errors of p away."""
    share, count = 0.9, 50
    for p in interval(tmp_path, share, count):
        assert abs(share - p) == pytest.approx(1.96 * np.sqrt(p * (1 - p) / count), abs=1e-3)


def test_worst_mistakes_are_shown_as_pictures(tmp_path):
    names = ["a<b", "c"]
    make_run(tmp_path, names)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    (tmp_path / "ä b.png").touch()
    places = [str(tmp_path / "ä b.png"), f"{tmp_path}/x.tar: val/a/7.png"]
    mistakes = [mistake | {"path": path} for mistake, path in zip(TWO_MISTAKES, places, strict=True)]
    write_json(tmp_path / "evaluation.json", evaluation | {"examples": mistakes})
    images = np.random.default_rng(0).integers(0, 256, (4, 300, 200, 3), np.uint8)
    split = Split("val", np.array([0, 1, 1, 0], np.int32), images.__getitem__, in_memory=True)
    pictures = report.pictures_of(tmp_path / "evaluation.json")
    pictures.mkdir()
    (pictures / "99.png").write_bytes(b"of an earlier session")
    report.save_pictures(pictures, split, [mistake["index"] for mistake in TWO_MISTAKES])
    assert sorted(path.name for path in pictures.iterdir()) == ["1.png", "3.png"]
    with Image.open(pictures / "3.png") as picture:
        assert picture.height == 160
    page = Page(report.write_report(tmp_path, CLASSIFICATION).read_text())
    assert "Worst mistakes" in page.text
    assert page.text.index("98.76") < page.text.index("60.00")
    assert "a<b → c" in page.text
    assert sum(link.startswith("data:image/png") for link in page.links) >= 2
    # A file that is here is a link; one that isn't, or lies in an archive, is only named.
    assert [link for link in page.links if link.startswith("file:")] == [(tmp_path / "ä b.png").as_uri()]
    assert "a/7.png" in page.text
