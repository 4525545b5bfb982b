"""Networks that the tests of exported files share: small, with drawn weights, and quantised once."""

from typing import NamedTuple

import numpy as np
import pytest

from mnv2_jax import create_model
from mnv2_jax.export import biases, check, onnx_file, quantise
from mnv2_jax.export.function import Exportable
from mnv2_jax.graph import Graph
from mnv2_jax.weights.file import Preprocessing, Weights, WeightsInfo
from tests.test_graph import drawn


def exportable(name="mobilenet_v2", resolution=64, pixels="uint8", outputs="raw", **options):
    """Makes what is exported of a network with drawn weights and seven classes."""
    model = create_model(name, 7, **options)
    preprocessing = Preprocessing(resolution=resolution, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    info = WeightsInfo(labels=tuple("abcdefg"), preprocessing=preprocessing)
    return Exportable(Weights(model, drawn(model), info), (resolution, resolution), pixels, outputs)


def images_of(exported, batch):
    """Draws images."""
    rng = np.random.default_rng(0)
    return exported.to_input(rng.integers(0, 256, (batch, *exported.size, 3), np.uint8))


class Small(NamedTuple):
    """A small network in floats and in integers."""

    exported: Exportable
    graph: Graph
    quantised: quantise.Quantised
    images: np.ndarray
    expected: dict[str, np.ndarray]


def small(*arguments, **options):
    """Traces and quantises a network."""
    exported = exportable(*arguments, **options)
    graph, images = exported.graph(), images_of(exported, 6)
    calibration = [image[None] for image in images]
    quantised = biases.correct(quantise.quantise(graph, calibration), calibration)
    return Small(exported, graph, quantised, images, check.expected_outputs(exported, images))


@pytest.fixture(scope="session")
def v2():
    """MobileNetV2 0.35 with fewer layers; the first norm's channel 3 has no kernel, but an offset."""
    return small(width=0.35, depth=0.3)


def swap_channels(model):
    """Exchanges two output channels of the first kernel of an ONNX model."""
    onnx = pytest.importorskip("onnx")
    kernel = next(x for x in model.graph.initializer if len(x.dims) == 4 and x.dims[0] > 1)
    array = onnx.numpy_helper.to_array(kernel).copy()
    array[[0, 1]] = array[[1, 0]]
    kernel.CopyFrom(onnx.numpy_helper.from_array(array, kernel.name))


@pytest.fixture
def tampered(monkeypatch):
    """Changes what the writer of ONNX makes."""

    def plant(change):
        to_model = onnx_file.to_model

        def changed(*args):
            model = to_model(*args)
            change(model)
            return model

        monkeypatch.setattr(onnx_file, "to_model", changed)

    return plant
