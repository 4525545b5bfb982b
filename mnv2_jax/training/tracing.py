"""Traces of training: what a step says of its batch, its gradients and its new state, with `log.trace`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.ops.hashing import array_hash
from mnv2_jax.training.state import TrainState
from mnv2_jax.types import Array, PyTree

Traced = dict[str, Any]
"""batch: uint32 []; gradients and state: two arrays [n], the hash and the L2 norm of each leaf, in JAX's order."""


def traced(batch_hash: Array, grads: PyTree, state: TrainState) -> Traced:
    """Computes, on the devices, what a step's line of the trace says.

    Args:
      batch_hash: of the batch.
      grads: gradients of the step, before they are clipped.
      state: the state after the step.
    """
    # Without the barrier XLA would compute hashes and norms together with the values, which may then round otherwise.
    grads, state = jax.lax.optimization_barrier((grads, state))
    return {"batch": batch_hash, "gradients": _described(_gradients(grads)), "state": _described(state)}


def _described(tree: PyTree) -> tuple[Array, Array]:
    leaves = jax.tree.leaves(tree)
    return jnp.stack([array_hash(leaf) for leaf in leaves]), jnp.stack([_norm(leaf) for leaf in leaves])


def _norm(leaf: Array) -> Array:
    values = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(values * values))


def _gradients(grads: PyTree) -> PyTree:
    return {"params": grads}  # so that a gradient has the name of its parameter in the state


class TraceLines:
    """Makes the lines of a trace; their tensors have the names of a checkpoint's arrays, and are in network order."""

    def __init__(self, state: TrainState, layers: Sequence[str]):
        """Takes the names.

        Args:
          state: a state, or its shapes.
          layers: paths of the layers, such as ``block_1/depthwise``, in the order in which they compute.
        """
        trees = {"gradients": _gradients(state.params), "state": state}
        self._places = {kind: _in_network_order(tree, layers) for kind, tree in trees.items()}

    def line(self, step: int, loss: float, on_host: Mapping[str, Any]) -> dict[str, Any]:
        """Makes the line of a step: step, batch, loss, gradients and state, both ``{name: [hash, norm]}``.

        Args:
          step: the step, counted from 1.
          loss: its loss.
          on_host: its `Traced`, as NumPy arrays.
        """
        described = {kind: list(zip(*map(np.ndarray.tolist, on_host[kind]), strict=True)) for kind in self._places}
        tensors = {
            kind: {name: described[kind][place] for name, place in places.items()}
            for kind, places in self._places.items()
        }
        return {"step": step, "batch": int(on_host["batch"]), "loss": loss, **tensors}


def _in_network_order(tree: PyTree, layers: Sequence[str]) -> dict[str, int]:
    """Returns the names of the leaves, and their places in JAX's order, which is that of the alphabet.

    Fields of the state keep their order. Within each, leaves are in the order of their layers, and others come last.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    fields = list(dict.fromkeys(name.partition(".")[0] for name in names))
    ranks = {layer: rank for rank, layer in enumerate(layers)}

    def rank(name: str) -> tuple[int, int]:
        field, *keys = name.split(".")
        owners = ("/".join(keys[start:-1]) for start in range(len(keys)))
        return fields.index(field), next((ranks[owner] for owner in owners if owner in ranks), len(layers))

    return {names[place]: place for place in sorted(range(len(names)), key=lambda place: rank(names[place]))}
