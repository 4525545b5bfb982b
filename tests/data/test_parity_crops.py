"""The random-resized crops against the libraries that they come from, by their distributions."""

import numpy as np
import pytest

from mnv2_jax.config import DataConfig
from mnv2_jax.data.images import draw_crop

pytestmark = pytest.mark.parity
DRAWS = 4000


@pytest.mark.parametrize("size", [(375, 500), (600, 300), (40, 47)])
@pytest.mark.parametrize("area", [(0.05, 1.0), (0.08, 1.0), (0.5, 0.6)])
def test_tensorflows_draw(size, area):
    tf = pytest.importorskip("tensorflow")
    ratio = (3 / 4, 4 / 3)

    @tf.function
    def theirs(seed):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            (*size, 3),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=seed,
            min_object_covered=0.1,
            aspect_ratio_range=ratio,
            area_range=area,
            max_attempts=100,
        )
        return tf.concat([begin[:2], extent[:2]], 0)

    seeds = tf.stack([tf.range(DRAWS), tf.zeros(DRAWS, tf.int32)], axis=1)
    expected = tf.map_fn(theirs, seeds).numpy().astype(float)
    data, rng = DataConfig(crop_draw="tensorflow", crop_area=area, crop_ratio=ratio), np.random.default_rng(0)
    ours = np.array([draw_crop(*size, data, rng) for _ in range(DRAWS)], float)
    # Kolmogorov-Smirnov between two samples: above this with probability 1e-4 if they are of one distribution.
    limit = np.sqrt(-np.log(1e-4 / 2) / DRAWS)
    for of in (lambda c: c[:, 0], lambda c: c[:, 1], lambda c: c[:, 2], lambda c: c[:, 3], lambda c: c[:, 2] * c[:, 3]):
        a, b = np.sort(of(ours)), np.sort(of(expected))
        grid = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / DRAWS
        assert gap < limit
