"""Provides a small image folder, as a directory and as a tar."""

import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

COUNTS = {"train": {"cat": 7, "dog": 5, "emu": 5}, "val": {"cat": 4, "emu": 3}}


def smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns an image with structure at every scale, uint8 [height, width, 3]."""
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    fine = rng.integers(-10, 11, (height, width, 3))
    return np.clip(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + fine, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Writes 17 training and 7 validation images of several sizes and formats into class folders."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, classes in COUNTS.items():
        for name, count in classes.items():
            (root / split / name / "more").mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(20, 90, 2)
                suffix = ("png", "JPEG", "webp", "bmp", "gif", "tiff", "ppm")[i % 7]
                place = root / split / name / ("more" if i == 2 else ".")
                Image.fromarray(smooth_image(rng, height, width)).save(place / f"{i}.{suffix}")
    (root / "classes.txt").write_text("not an image")
    (root / "train" / "cat" / "._0.png").write_text("not an image")
    (root / "train" / "cat" / "Thumbs.db").write_text("not an image")
    (root / "train" / ".hidden").mkdir()
    return root


@pytest.fixture(scope="session")
def photos_tar(photos: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tar") / "photos.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(photos, arcname="wrapper")
    return path
