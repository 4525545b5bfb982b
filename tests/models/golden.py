"""Golden outputs of networks, for weights and images that NumPy alone computes by a fixed rule.

`tests/golden/make_outputs.py` stores the outputs of the reference libraries, `test_golden_outputs.py` computes ours.
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
"""Size of the images. Maps are 36×21, 18×11, 9×6, 5×3 and 3×2, so odd and even sizes occur at each stride."""
RANGES = {"scale": (0.5, 1.5), "bias": (-0.5, 0.5), "mean": (-0.5, 0.5), "var": (0.4, 1.6)}
"""Ranges of the norms' values. The initial 0 and 1 of a new network would hide errors in how they are used."""
BRANCH_ENDS = (("project_norm", "scale"), ("output", "kernel"))
"""Leaves at the end of a residual branch. They are scaled down, since the sums of many blocks would grow."""
LINEAR = ("query", "key_depthwise", "key", "value_depthwise", "value", "output")
"""Layers of attention, which have no activation. Larger weights would make each position attend to one other."""


def load():
    """Returns for each network the options of ours and the outputs of the reference library."""
    return json.loads(PATH.read_text())["networks"]


def create(name, entry, dtype="float64"):
    """Creates our network with the options of its golden entry."""
    norm = NormConfig(epsilon=entry["epsilon"])
    return create_model(name, CLASSES, norm=norm, dtype=dtype, **entry["options"])


def uniform(name, shape, low=-1.0, high=1.0):
    """Draws uniform numbers that are the same in every version of NumPy, which never changes `RandomState`."""
    return np.random.RandomState(zlib.crc32(name.encode())).uniform(low, high, shape)


def weights(model):
    """Draws each leaf by its path, scaled to keep activations at about 1."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        *_, layer, kind = (key.key for key in path)
        damped = 0.3 if (layer, kind) in BRANCH_ENDS else 1.0
        if kind != "kernel":
            return uniform(name, leaf.shape, *RANGES[kind]) * damped
        gain = 1 if layer in LINEAR else 2  # He initialisation if an activation precedes the layer
        return uniform(name, leaf.shape) * (3 * gain / np.prod(leaf.shape[:-1])) ** 0.5 * damped

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model))


def images():
    """Returns two images, so that leaks between them would show: coarse squares, to make them differ, plus noise."""
    coarse = uniform("coarse", (2, SIZE[0] // 8, -(-SIZE[1] // 8), 3)).repeat(8, 1).repeat(8, 2)[:, :, : SIZE[1]]
    return coarse + uniform("fine", coarse.shape)


def checksums(output):
    """Returns mean, standard deviation and a projection of an endpoint; it weights every value differently."""
    values = np.asarray(output, np.float64).ravel()
    return [values.mean(), values.std(), values @ uniform("projection", values.shape) / values.size**0.5]
