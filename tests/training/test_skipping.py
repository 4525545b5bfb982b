"""Images that can't be decoded, in a run that may skip them: counted, named, and the same after an interruption."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import cli


@pytest.fixture
def folder(tmp_path):
    """Two classes of eight images in train, one of them damaged, and of two in val."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
                image.save(place / f"{number}.jpg")
    (tmp_path / "train" / "cat" / "3.jpg").write_bytes(b"\xff\xd8 not much of a picture")
    return tmp_path


def test_damaged_images_are_skipped_counted_and_named_once(folder, tmp_path):
    command = (
        f"--config={cli.W0_25}:data=folder:{folder},batch=8,res=16",
        "--config.train.steps=4",
        "--config.log.every_steps=1",
        "--config.data.num_workers=0",
    )
    refused = cli.run("main", *command, f"--workdir={tmp_path / 'strict'}")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "3.jpg" in refused.stderr
    result = cli.run("main", *command, "--config.data.skip_corrupt=True", f"--workdir={tmp_path / 'lenient'}", "--json")
    summary = cli.answer(result)
    assert summary["skipped"] == 2  # four batches of eight are two epochs of sixteen images
    assert result.stderr.count("skipped: ") == 1
    assert "3.jpg" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "lenient" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["skipped"] for line in lines if line["split"] == "data") == 2
