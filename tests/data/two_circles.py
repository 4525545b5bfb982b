"""A data set that the package doesn't have: bright discs of two sizes."""

import numpy as np

from mnv2_jax.config import DataConfig
from mnv2_jax.data.sources import Dataset, MemoryReader, register_dataset
from mnv2_jax.data.split import Split


def open_it(data: DataConfig, evaluates: bool) -> Dataset:
    """64 images to train on, and 32 to evaluate on."""
    del data, evaluates
    return Dataset("two_circles", ("small", "large"), _split("train", 64), _split("test", 32))


def _split(name: str, count: int) -> Split:
    rng = np.random.default_rng(count)
    labels = np.arange(count, dtype=np.int32) % 2
    y, x = np.mgrid[:16, :16]
    centres = rng.uniform(6, 10, (count, 2, 1, 1))
    inside = (y[None] - centres[:, 0]) ** 2 + (x[None] - centres[:, 1]) ** 2 < (2 + 3 * labels[:, None, None]) ** 2
    return Split(name, labels, MemoryReader(np.repeat(255 * inside[..., None].astype(np.uint8), 3, -1)), in_memory=True)


register_dataset("two_circles", open_it, num_classes=2)
