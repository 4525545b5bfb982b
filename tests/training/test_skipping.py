"""Images that can't be decoded, in a run that may skip them: counted, named, and the same after an interruption."""

import dataclasses
import html
import io
import json
import types

import numpy as np
import pytest
from PIL import Image

from mnv2_jax.config import Config, TrainConfig, build
from mnv2_jax.data.sources import Dataset
from mnv2_jax.data.split import Split
from mnv2_jax.data.tfds_source import TfdsLabels
from mnv2_jax.runs.folder import read_skipped
from mnv2_jax.tasks.builtin import student_of
from mnv2_jax.training.plan import make_plan
from mnv2_jax.training.run import FolderContent, Run
from mnv2_jax.training.writer import open_writer
from tests import cli


@pytest.fixture
def folder(tmp_path):
    """Makes a folder: train has three classes of 16 images, val two of 4; one image of each is damaged."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", {"cat": 6, "dog": 5, "emu": 5}), ("val", {"cat": 2, "dog": 2})):
        for name, count in counts.items():
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
                image.save(place / f"{number}.jpg")
    (tmp_path / "train" / "cat" / "3.jpg").write_bytes(b"\xff\xd8 not much of a picture")
    (tmp_path / "val" / "dog" / "1.jpg").write_bytes(b"")
    return tmp_path


def test_what_is_skipped_or_absent_is_said_and_kept(folder, tmp_path):
    command = (
        f"--config={cli.W0_25}:data=folder:{folder},batch=8,res=16",
        "--config.model.depth=0.3",
        "--config.train.steps=4",
        "--config.log.every_steps=1",
        "--config.data.num_workers=0",
    )
    for refused in (
        cli.here("main", *command, f"--workdir={tmp_path / 'strict'}"),
        cli.here("lr_find", *command, "--steps=20"),
    ):
        assert refused.returncode == 2
        assert "1 of the 16 images of train" in refused.stderr
        assert "3.jpg" in refused.stderr
        assert refused.stderr.endswith("--config.data.skip_corrupt=True\n")
    command = (*command, "--config.data.skip_corrupt=True", f"--workdir={tmp_path / 'strict'}", "--json")
    result = cli.here("main", *command, devices=1)
    summary = cli.answer(result)
    assert summary["skipped"] == 2  # four batches of eight are two epochs of sixteen images
    assert (summary["eval"]["count"], summary["eval_skipped"]) == (3, 1)
    assert result.stderr.count("skipped: ") == 2
    assert (
        f"  skipped      2 images that can't be decoded, listed in {tmp_path / 'strict' / 'skipped.txt'}"
        in result.stderr
    )
    skipped, of_val = sorted((tmp_path / "strict" / "skipped.txt").read_text().splitlines())
    assert of_val.startswith(f"{folder / 'val' / 'dog' / '1.jpg'}: ")
    assert skipped.startswith(f"{folder / 'train' / 'cat' / '3.jpg'}: ")
    assert f"skipped: {skipped}\n" in result.stderr
    absent = "val has no images of 1 of 3 classes: emu"
    assert result.stderr.count(f"{absent}\n") == 1
    page = (tmp_path / "strict" / "report.html").read_text()
    assert f"{absent}." in page
    assert "can't be decoded: 2; skipped over all epochs: 2 times; left out of the evaluation: 1" in page
    assert skipped in html.unescape(page)
    lines = [json.loads(line) for line in (tmp_path / "strict" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["skipped"] for line in lines if line["split"] == "data") == 2


# --- skipped.txt --------------------------------------------------------------------------------------------

LINES = {
    7: "a/ä b.jpg: can't be decoded (…); replace or remove it",
    2: "a/2.jpg: the file is empty",
    9: "two\nlines \udcff.jpg: not an image",
}
WHOLE = (
    b"a/2.jpg: the file is empty\n"
    + "a/ä b.jpg: can't be decoded (…); replace or remove it\n".encode()
    + b"two\\nlines \\udcff.jpg: not an image\n"
)


def session(workdir, batches, start=0):
    """Runs one session that skips the images of ``batches``, by step; returns its output."""
    config = build({"data": {"skip_corrupt": True}})
    plan = make_plan(dataclasses.replace(config, train=TrainConfig(steps=100)), 64, ("stem",))
    experiment = types.SimpleNamespace(config=config, plan=plan, mesh=types.SimpleNamespace(size=1))
    stream, content = io.StringIO(), FolderContent(start, [], None)
    with open_writer(experiment, workdir, None, start, stream) as writer:
        run = Run(experiment, writer, content, None)
        for step, lines in batches.items():
            run.skipped(step, len(lines), lines)
        run.share_skipped()
    return stream.getvalue()


def test_each_image_is_named_once_over_all_sessions(tmp_path):
    first = {index: LINES[index] for index in (7, 2)}
    output = session(tmp_path, {1: first, 2: first})
    assert output.splitlines() == [f"skipped: {LINES[2]}", f"skipped: {LINES[7]}"]
    output += session(tmp_path, {2: first, 3: LINES, 4: LINES}, start=1)
    assert output.count("skipped: ") == 3
    assert (tmp_path / "skipped.txt").read_bytes() == WHOLE
    assert read_skipped(tmp_path) == WHOLE.decode().split("\n")[:-1]
    counts = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in counts] == [(1, 2), (2, 2), (3, 3), (4, 3)]


def test_cut_off_at_any_byte_no_line_is_lost_or_doubled(tmp_path):
    """After a kill while the lines are written, the steps are repeated, and their images are met again."""
    for cut in range(len(WHOLE) + 1):
        (tmp_path / "skipped.txt").write_bytes(WHOLE[:cut])
        assert len(read_skipped(tmp_path)) == WHOLE[:cut].count(b"\n")
        session(tmp_path, {1: LINES})
        assert (tmp_path / "skipped.txt").read_bytes() == WHOLE


def test_a_run_that_skips_nothing_has_no_list(tmp_path):
    session(tmp_path, {})
    assert not (tmp_path / "skipped.txt").exists()
    assert read_skipped(tmp_path) == []


# --- classes without images ---------------------------------------------------------------------------------


def notes_before_training(labels):
    """Returns the notes that a classification task on these labels prints before training."""
    split = Split("val", labels, lambda index: pytest.fail("read an image"))
    return student_of(Config(), Dataset("folder", tuple("abcdefgh"), split, split), False).notes


def test_classes_without_images_are_named():
    assert notes_before_training(np.arange(8, dtype=np.int32)) == ()
    assert notes_before_training(np.array([0, 0, 3, 4, 5, 6, 7], np.int32)) == (
        "val has no images of 2 of 8 classes: b, c",
    )
    assert notes_before_training(np.array([5], np.int32)) == (
        "val has no images of 7 of 8 classes: a, b, c, d, e and 2 more",
    )
    # Labels that are stored with the pixels aren't read for these notes.
    assert notes_before_training(TfdsLabels(None, 10**6)) == ()
