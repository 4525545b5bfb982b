"""Layers of Keras and TFLite files to our variables, by their place among those of the same kind."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from mnv2_jax.convert.layers import ForeignLayer, ForeignNetwork
from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import summarise
from mnv2_jax.models.registry import Model
from mnv2_jax.models.weights import describe, raise_mismatch, shapes_of


def _products(network: ForeignNetwork) -> list[ForeignLayer]:
    """Convolutions, then dense layers, which come last in every network here that has both."""
    return [layer for kind in ("conv", "dense") for layer in network.layers if layer.kind == kind]


def num_classes(path: pathlib.Path, network: ForeignNetwork) -> int:
    """How many the last layer of a file has.

    Raises:
      UserError: if it holds no layer that could be a classifier.
    """
    products = _products(network)
    if not products:
        raise UserError(f"{path}: holds no convolution and no dense layer; give another file")
    return int(products[-1].arrays["kernel"].shape[-1])


def leaves_of(path: pathlib.Path, model: Model, network: ForeignNetwork) -> dict[str, np.ndarray]:
    """Every leaf of ours from the file's layer of the same kind at the same place.

    A bias before a norm is taken out of the norm's mean, where it would be subtracted again; where the norms are folded
    into the convolutions, each becomes an identity with that bias.

    Raises:
      UserError: listing layers that are missing, left over, or of another shape.
    """
    shapes = shapes_of(model)
    what = f"{path}: not the weights of {describe(model)}"
    leaves: dict[str, np.ndarray] = {}
    wrong, left = [], []
    biases = {}
    for layer, other in _pairs(model, network, shapes, what):
        for leaf, array in other.arrays.items():
            if leaf == "bias" and f"params/{layer}_norm/bias" in shapes:
                biases[f"{layer}_norm"] = array
                continue
            place = f"{'batch_stats' if leaf in ('mean', 'var') else 'params'}/{layer}/{leaf}"
            shape = shapes.get(place)
            if shape is None:
                left.append(f"{leaf} of {other.name}")
                continue
            if len(shape) == 2 and array.ndim == 4 and array.shape[:2] == (1, 1):
                array = array[0, 0]  # a dense layer as a 1×1 convolution
            if array.shape != shape:
                wrong.append(f"{leaf} of {other.name} is {list(array.shape)} instead of {list(shape)} for {layer}")
            leaves[place] = array
    for norm, bias in biases.items():
        if network.folded:
            leaves |= _identity(norm, bias, model.module.norm.epsilon)
        elif (mean := leaves.get(f"batch_stats/{norm}/mean")) is not None and mean.shape == bias.shape:
            leaves[f"batch_stats/{norm}/mean"] = mean - bias
    missing = sorted(set(shapes) - set(leaves))
    raise_mismatch({"missing": missing, "left over": left, "of another shape": wrong}, what)
    return leaves


def _pairs(
    model: Model, network: ForeignNetwork, shapes: Mapping[str, tuple[int, ...]], what: str
) -> list[tuple[str, ForeignLayer]]:
    """Our layers, in the order of computation, with theirs."""
    ours: dict[str, list[str]] = {"depthwise": [], "product": [], "norm": []}
    for layer in (row.name for row in summarise(model, 64).layers):
        kernel = shapes.get(f"params/{layer}/kernel")
        if kernel is not None:
            ours["depthwise" if len(kernel) == 4 and kernel[2] == 1 else "product"].append(layer)
        elif f"batch_stats/{layer}/mean" in shapes and not network.folded:
            ours["norm"].append(layer)
    theirs: dict[str, list[ForeignLayer]] = {"product": _products(network)}
    theirs |= {kind: [layer for layer in network.layers if layer.kind == kind] for kind in ("depthwise", "norm")}
    missing = [name for kind in ours for name in ours[kind][len(theirs[kind]) :]]
    left = [layer.name for kind in ours for layer in theirs[kind][len(ours[kind]) :]]
    raise_mismatch({"missing": missing, "left over": left}, what)
    return [pair for kind in ours for pair in zip(ours[kind], theirs[kind], strict=True)]


def _identity(norm: str, bias: np.ndarray, epsilon: float) -> dict[str, np.ndarray]:
    """Leaves of a norm that only adds: scale / sqrt(var + epsilon) = 1."""
    one = np.ones_like(bias)
    return {
        f"params/{norm}/scale": one,
        f"params/{norm}/bias": bias,
        f"batch_stats/{norm}/mean": 0 * one,
        f"batch_stats/{norm}/var": one - np.float32(epsilon),
    }
