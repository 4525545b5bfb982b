"""Resizing without antialiasing against its formula, written again as whole matrices in float64."""

import numpy as np
import pytest

from mnv2_jax.data.sampling import sample

SIZES = [
    ((375, 500), (224, 224)),
    ((97, 31), (20, 64)),  # one side shrinks, the other grows
    ((7, 5), (33, 17)),
    ((40, 3), (7, 8)),
    ((1, 9), (4, 2)),
    ((1, 1), (3, 5)),
    ((65, 64), (64, 64)),
]


def shares(size, target, interpolation):
    """The weight of each of ``size`` pixels in each of ``target`` pixels, float64 [target, size]."""
    centre = (np.arange(target)[:, None] + 0.5) * size / target - 0.5
    far = np.abs(centre - np.arange(size))
    if interpolation == "bilinear":
        kernel = np.maximum(1 - far, 0)
    else:  # Keys with a = -1/2
        kernel = np.select(
            [far <= 1, far < 2], [1.5 * far**3 - 2.5 * far**2 + 1, -0.5 * far**3 + 2.5 * far**2 - 4 * far + 2]
        )
    return kernel / kernel.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "target"), SIZES)
def test_every_pixel_is_its_formula_rounded_once(size, target, interpolation):
    image = np.random.default_rng(0).choice([0, 1, 128, 254, 255], (*size, 3)).astype(np.uint8)
    rows, columns = (shares(*pair, interpolation) for pair in zip(size, target, strict=True))
    exact = np.clip(np.einsum("ij,jkc,lk->ilc", rows, image.astype(float), columns, optimize=True), 0, 255)
    resized = sample(image, *target, interpolation)
    assert (resized.dtype, resized.shape) == (np.uint8, (*target, 3))
    assert np.abs(resized - exact).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0, 10, 100, 200], [5, 150]),  # by two pixels each; antialiased it would be by all four
        ([0, 10, 100, 200, 250, 255], [10, 250]),  # by the one at the centre
        ([0, 100], [0, 25, 75, 100]),  # beyond the outermost centres as at them
        ([1, 2], [2]),  # halves go up
    ],
)
def test_by_hand(row, expected):
    image = np.array(row, np.uint8)[None, :, None]
    assert sample(image, 1, len(expected), "bilinear").ravel().tolist() == expected
    assert sample(image.swapaxes(0, 1), len(expected), 1, "bilinear").ravel().tolist() == expected


def test_parts_of_arrays_are_resized_as_copies_of_them():
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    part = image[3:47, 11:50]
    np.testing.assert_array_equal(sample(part, 16, 24, "bilinear"), sample(part.copy(), 16, 24, "bilinear"))
    np.testing.assert_array_equal(sample(image, 50, 60, "bicubic"), image)
