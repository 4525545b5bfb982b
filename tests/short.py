"""A network of four blocks and images of noise, for tests of runs rather than of networks and data.

The network is traced and compiled in half the time of a MobileNetV2, and noise is there without scikit-learn, which a
process imports for a second. Both are registered as a user's own are: `cli.SHORT` has the flags.
"""

import numpy as np

from mnv2_jax import Dataset, Split, register_dataset, register_model
from mnv2_jax.models.mobilenet_v2 import Row, Table, plan

TABLE = Table(
    stem=32,
    stages=(
        Row(expand_ratio=1, channels=16, repeats=1, stride=2),
        Row(expand_ratio=1, channels=16, repeats=1, stride=2),
        Row(expand_ratio=1, channels=16, repeats=1, stride=2),
        Row(expand_ratio=6, channels=32, repeats=1, stride=2),
    ),
    head=1280,
)


def short(model):
    return plan(model, TABLE)


def noise(data, evaluates):
    """As many images as the digits have, and as small."""
    del data, evaluates
    rng = np.random.default_rng(0)

    def split(name, count):
        return Split.of_arrays(name, rng.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count) % 10)

    return Dataset("noise", tuple("0123456789"), split("train", 1437), split("test", 360))


register_model("short", short)
register_dataset("noise", noise, num_classes=10)
