"""Golden outputs: what networks give for weights, images and checksums that a rule makes of NumPy alone.

`tests/golden/make_outputs.py` writes down what the reference libraries give, `test_golden_outputs.py` computes ours.
"""

import json
import pathlib
import zlib

import jax
import numpy as np

from mnv2_jax.config import NormConfig
from mnv2_jax.models.registry import create_model, variable_shapes

PATH = pathlib.Path(__file__).parents[1] / "golden" / "outputs.json"
CLASSES = 8
SIZE = (72, 41)
"""Maps are 36×21, 18×11, 9×6, 5×3 and 3×2: sizes of either parity meet each stride on either axis or the other."""
RANGES = {"scale": (0.5, 1.5), "bias": (-0.5, 0.5), "mean": (-0.5, 0.5), "var": (0.4, 1.6)}
"""Of leaves; a new network's 0, 1 and 1e-5 would hide what they are added to, multiplied or divided by."""
BRANCH_ENDS = (("project_norm", "scale"), ("output", "kernel"))
"""Smaller, or the sums of dozens of residual blocks would grow."""
LINEAR = ("query", "key_depthwise", "key", "value_depthwise", "value", "output")
"""Layers in attention, which has no activations: with more, each place would attend to one other."""


def load():
    """By name: how our network is made, and what the reference library's gives."""
    return json.loads(PATH.read_text())["networks"]


def create(name, how, dtype="float64"):
    """Our network as it was compared."""
    norm = NormConfig(epsilon=how["epsilon"])
    return create_model(name, CLASSES, norm=norm, dtype=dtype, **how["options"])


def uniform(name, shape, low=-1.0, high=1.0):
    """The same numbers whatever the version of NumPy, which keeps the stream of `RandomState`."""
    return np.random.RandomState(zlib.crc32(name.encode())).uniform(low, high, shape)


def weights(model):
    """Values that keep activations of about 1, each leaf by its path."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        *_, layer, kind = (key.key for key in path)
        damped = 0.3 if (layer, kind) in BRANCH_ENDS else 1.0
        if kind != "kernel":
            return uniform(name, leaf.shape, *RANGES[kind]) * damped
        gain = 1 if layer in LINEAR else 2  # He's, where an activation came before
        return uniform(name, leaf.shape) * (3 * gain / np.prod(leaf.shape[:-1])) ** 0.5 * damped

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model))


def images():
    """Two, so that what one does to the other would show; coarse squares, so that they differ, and noise."""
    coarse = uniform("coarse", (2, SIZE[0] // 8, -(-SIZE[1] // 8), 3)).repeat(8, 1).repeat(8, 2)[:, :, : SIZE[1]]
    return coarse + uniform("fine", coarse.shape)


def checksums(output):
    """Mean, deviation and a projection of an endpoint, which sees each place and channel with another factor."""
    values = np.asarray(output, np.float64).ravel()
    return [values.mean(), values.std(), values @ uniform("projection", values.shape) / values.size**0.5]
