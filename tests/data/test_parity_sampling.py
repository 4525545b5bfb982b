"""Resizing without antialiasing against TensorFlow, PyTorch and JAX, whose results aren't rounded."""

import jax
import numpy as np
import pytest

from mnv2_jax.data.sampling import sample

pytestmark = pytest.mark.parity
SIZES = [((375, 500), (224, 224)), ((31, 97), (64, 20)), ((449, 447), (224, 224)), ((7, 5), (16, 3)), ((1, 9), (8, 2))]


def tensorflow(image, size, interpolation):
    tf = pytest.importorskip("tensorflow")
    return tf.image.resize(image, size, interpolation).numpy()


def pytorch(image, size, interpolation):
    torch = pytest.importorskip("torch")
    if interpolation == "bicubic":
        pytest.skip("its cubic is another, with a = -0.75")
    planes = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, size, mode=interpolation, align_corners=False, antialias=False)
    return resized[0].permute(1, 2, 0).numpy()


def jax_image(image, size, interpolation):
    return np.asarray(jax.image.resize(image.astype(np.float32), (*size, 3), interpolation, antialias=False))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("library", [tensorflow, pytorch, jax_image])
def test_it_resizes_as_they_do(library, interpolation):
    # TensorFlow takes its cubic from a table of 1024 steps a pixel.
    slack = 0.25 if interpolation == "bicubic" and library is tensorflow else 0.03
    for size, target in SIZES:
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        theirs = np.clip(library(image, target, interpolation), 0, 255)
        assert np.abs(sample(image, *target, interpolation) - theirs).max() <= 0.5 + slack
