"""Random images, random weights and the comparison for all parity tests."""

import os
import pathlib

import jax
import numpy as np

SIZES = ((96, 96), (75, 71))
"""One size that is even at every stride of 2 but the last, and one that is odd at several."""
TOLERANCE = 1e-4


def images(size, count=2):
    return np.random.default_rng(sum(size)).standard_normal((count, *size, 3), np.float32)


CALIBRATION = images(SIZES[0], 8)
"""Images for the statistics of the norms. With random statistics maps grow until rounding decides in attention."""


def values(rng, shape):
    """He initialisation for a kernel [..., inputs, outputs]; 0.5 to 1 for a vector, as 0 and 1 would hide swaps."""
    *inputs, outputs = shape
    if not inputs:
        return rng.uniform(0.5, 1.0, outputs).astype(np.float32)
    return rng.normal(0.0, (2 / np.prod(inputs)) ** 0.5, shape).astype(np.float32)


def difference(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare(library, name, weights, x, theirs):
    """Compares endpoints; writes the largest differences to the file that MNV2_JAX_PARITY_TABLE names."""
    ours = jax.jit(weights.model.endpoints)(weights.variables, x)
    assert sorted(ours) == sorted(theirs)
    off = {point: difference(ours[point], theirs[point].reshape(ours[point].shape)) for point in theirs}
    logits = theirs["logits"]
    spread = np.abs(logits[0] - logits[1]).max() / np.abs(logits).max()
    worst = max(off, key=off.get)
    if table := os.environ.get("MNV2_JAX_PARITY_TABLE"):
        with pathlib.Path(table).open("a") as file:
            row = (library, name, "×".join(map(str, x.shape[1:3])), f"{off['logits']:.1e}", f"{off[worst]:.1e} {worst}")
            file.write(f"| {' | '.join(row)} |\n")
    assert spread > 0.05  # else the logits would say little of the image
    assert off[worst] < TOLERANCE, {point: value for point, value in off.items() if value >= TOLERANCE}
