"""Gives statistics to norms that were folded into the convolutions before them, as in TFLite files.

A folded norm only adds a bias: its mean is 0, and its scale cancels its standard deviation. The network is right in
inference. But the real inputs of its norms don't have a mean of 0 and a standard deviation of 1, so the first training
step, which normalises by the batch, would compute another function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mnv2_jax.models.registry import Model
from mnv2_jax.types import PyTree, Variables


def are_folded(model: Model, variables: Variables) -> bool:
    """Whether no norm of these variables uses its statistics: all means are 0 and all scales cancel the variance."""
    epsilon = model.norm.epsilon
    norms = [dict(params, **stats) for _, params, stats in _norms(variables["params"], variables["batch_stats"])]
    return bool(norms) and all(
        not np.any(norm["mean"]) and np.allclose(norm["scale"] / np.sqrt(norm["var"] + epsilon), 1, rtol=0, atol=1e-6)
        for norm in norms
    )


def unfold(model: Model, variables: Variables, inputs: Mapping[str, Mapping[str, Any]]) -> Variables:
    """Returns variables whose norms have the statistics of their inputs, and which compute the same in inference.

    Args:
      model: the model of the variables.
      variables: the variables with folded norms; not changed.
      inputs: `Model.norm_inputs`, averaged over some images.

    Returns:
      NumPy variables. A norm y = a x + b with the input's mean m and variance v has scale a sqrt(v + epsilon), bias
      b + a m, mean m and variance v.
    """
    epsilon = model.norm.epsilon
    params, stats = _copy(variables["params"]), _copy(variables["batch_stats"])
    for path, norm_params, norm_stats in _norms(params, stats):
        mean = np.asarray(inputs[path]["mean"], np.float64)
        var = np.maximum(np.asarray(inputs[path]["square"], np.float64) - mean**2, 0)
        factor = norm_params["scale"] / np.sqrt(norm_stats["var"].astype(np.float64) + epsilon)
        offset = norm_params["bias"] - factor * norm_stats["mean"]
        new = {"scale": factor * np.sqrt(var + epsilon), "bias": offset + factor * mean, "mean": mean, "var": var}
        for tree in (norm_params, norm_stats):
            tree.update({name: new[name].astype(tree[name].dtype) for name in tree})
    return {"params": params, "batch_stats": stats}


def _norms(params: PyTree, stats: PyTree, prefix: str = "") -> Iterator[tuple[str, PyTree, PyTree]]:
    """Yields path, parameters and statistics of each norm."""
    for name, branch in stats.items():
        if "mean" in branch:
            yield prefix + name, params[name], branch
        else:
            yield from _norms(params[name], branch, f"{prefix}{name}/")


def _copy(tree: PyTree) -> PyTree:
    return {name: _copy(branch) if isinstance(branch, Mapping) else np.array(branch) for name, branch in tree.items()}
