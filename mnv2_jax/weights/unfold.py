"""Statistics for norms that were folded into the convolutions before them, as in TFLite files.

A folded norm only adds: its mean is 0 and its scale undoes its deviation. The network infers as it should, but what its
norms are given has no mean of 0 and no deviation of 1, so that the first training step, which normalises by the batch,
would make another function of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mnv2_jax.models.registry import Model
from mnv2_jax.types import PyTree, Variables


def are_folded(model: Model, variables: Variables) -> bool:
    """Whether no norm of these variables scales or shifts by statistics."""
    epsilon = model.norm.epsilon
    norms = [dict(own, **held) for _, own, held in _norms(variables["params"], variables["batch_stats"])]
    return bool(norms) and all(
        not np.any(norm["mean"]) and np.allclose(norm["scale"] / np.sqrt(norm["var"] + epsilon), 1, rtol=0, atol=1e-6)
        for norm in norms
    )


def unfold(model: Model, variables: Variables, inputs: Mapping[str, Mapping[str, Any]]) -> Variables:
    """The same function in inference, with the statistics of what the norms are given.

    Args:
      model: whose variables they are.
      variables: whose norms are given other statistics; not changed.
      inputs: `Model.norm_inputs`, averaged over some images.

    Returns:
      NumPy variables. A norm y = a x + b with the input's mean m and variance v has scale a sqrt(v + epsilon), bias
      b + a m, mean m and variance v.
    """
    epsilon = model.norm.epsilon
    params, stats = _copied(variables["params"]), _copied(variables["batch_stats"])
    for path, own, held in _norms(params, stats):
        mean = np.asarray(inputs[path]["mean"], np.float64)
        var = np.maximum(np.asarray(inputs[path]["square"], np.float64) - mean**2, 0)
        factor = own["scale"] / np.sqrt(held["var"].astype(np.float64) + epsilon)
        offset = own["bias"] - factor * held["mean"]
        new = {"scale": factor * np.sqrt(var + epsilon), "bias": offset + factor * mean, "mean": mean, "var": var}
        for tree in (own, held):
            tree.update({name: new[name].astype(tree[name].dtype) for name in tree})
    return {"params": params, "batch_stats": stats}


def _norms(params: PyTree, stats: PyTree, prefix: str = "") -> Iterator[tuple[str, PyTree, PyTree]]:
    """Path, parameters and statistics of each norm."""
    for name, held in stats.items():
        if "mean" in held:
            yield prefix + name, params[name], held
        else:
            yield from _norms(params[name], held, f"{prefix}{name}/")


def _copied(tree: PyTree) -> PyTree:
    return {name: _copied(branch) if isinstance(branch, Mapping) else np.array(branch) for name, branch in tree.items()}
