"""Writes small images and masks for tests of semantic segmentation."""

import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (6, 8)


def write(path: pathlib.Path, pixels) -> pathlib.Path:
    """Writes a Pillow image, or an array as one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(path)
    return path


def image(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def mask(*values, size=SIZE):
    """Returns a mask that repeats these values, uint8."""
    return np.resize(np.array(values, np.uint8), size)


def pair(images: pathlib.Path, masks: pathlib.Path, name, *values, ending="jpg"):
    write(images / f"{name}.{ending}", image(len(name)))
    write(masks / f"{name}.png", mask(*values))


def palette(indices, colours):
    """Returns an image with a palette."""
    made = Image.fromarray(np.asarray(indices, np.uint8), "L").copy()
    made.putpalette([channel for colour in colours for channel in colour])
    return made


def grey_png(path: pathlib.Path, values, bits):
    """Writes grey values of few bits, which Pillow writes as 8; returns the path."""
    rows = [np.unpackbits(row[:, None], axis=1)[:, -bits:].reshape(-1) for row in np.asarray(values, np.uint8)]
    packed = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    height, width = np.shape(values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    )
    return path


def streets(top: pathlib.Path, classes="sky\nroad\ncar\n"):
    """Writes 3 pairs to train on, 2 to validate and an unmasked test image, with three classes and ignored pixels."""
    for split, names in (("train", "abc"), ("val", "de")):
        for name in names:
            pair(top / "images" / split, top / "masks" / split, name, 0, 1, 2, 255)
    write(top / "images" / "test" / "f.jpg", image())
    (top / "classes.txt").write_text(classes)
    return top
