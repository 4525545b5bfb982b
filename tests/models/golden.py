"""Golden outputs: checksums of the outputs of networks, for weights and images that a rule makes with NumPy alone.

`tests/golden/make_outputs.py` records the outputs of the reference libraries; `test_golden_outputs.py` computes ours.
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
"""Ranges of leaves by name. The 0, 1 and 1e-5 of a new network would hide errors in sums and products."""
BRANCH_ENDS = (("project_norm", "scale"), ("output", "kernel"))
"""Leaves with smaller values, because sums over dozens of residual blocks would grow otherwise."""
LINEAR = ("query", "key_depthwise", "key", "value_depthwise", "value", "output")
"""Layers in attention, which has no activations: with more, each place would attend to one other."""


def load():
    """Loads, by name, how our network is made and the outputs of the reference library."""
    return json.loads(PATH.read_text())["networks"]


def create(name, how, dtype="float64"):
    """Makes our network as it was compared."""
    norm = NormConfig(epsilon=how["epsilon"])
    return create_model(name, CLASSES, norm=norm, dtype=dtype, **how["options"])


def uniform(name, shape, low=-1.0, high=1.0):
    """Draws numbers that don't depend on the version of NumPy, which keeps the stream of `RandomState`."""
    return np.random.RandomState(zlib.crc32(name.encode())).uniform(low, high, shape)


def weights(model):
    """Draws each leaf by its path, with values that keep activations at about 1."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        *_, layer, kind = (key.key for key in path)
        damped = 0.3 if (layer, kind) in BRANCH_ENDS else 1.0
        if kind != "kernel":
            return uniform(name, leaf.shape, *RANGES[kind]) * damped
        gain = 1 if layer in LINEAR else 2  # He's factor, if an activation came before
        return uniform(name, leaf.shape) * (3 * gain / np.prod(leaf.shape[:-1])) ** 0.5 * damped

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model))


def images():
    """Makes two images of coarse squares and noise, so that an effect of one on the other would show."""
    coarse = uniform("coarse", (2, SIZE[0] // 8, -(-SIZE[1] // 8), 3)).repeat(8, 1).repeat(8, 2)[:, :, : SIZE[1]]
    return coarse + uniform("fine", coarse.shape)


def checksums(output):
    """Computes mean, deviation and a projection of an endpoint with a factor per position and channel."""
    values = np.asarray(output, np.float64).ravel()
    return [values.mean(), values.std(), values @ uniform("projection", values.shape) / values.size**0.5]
