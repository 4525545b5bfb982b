"""The state that training carries from step to step; all of it is checkpointed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mnv2_jax.ops.random import stream_key
from mnv2_jax.tasks.base import Task
from mnv2_jax.training.optim import Optimizer
from mnv2_jax.types import Array, PyTree, Variables

NEVER = -1
"""Value of `TrainState.first_bad_step` while every loss, gradient and weight has been finite."""


class TrainState(struct.PyTreeNode):
    """State of training, one frozen record; every leaf is a device array."""

    step: Array
    """int32 []: steps done."""
    seed: Array
    """uint32 []: the step's randomness is `step_key(seed, step)`."""
    first_bad_step: Array
    """int32 []: first step, counted from 1, whose loss, gradient or new weights were not finite; otherwise `NEVER`."""
    params: PyTree
    model_state: PyTree
    """Variables without a gradient: ``{"batch_stats": ...}``."""
    opt_state: PyTree
    ema: PyTree
    """Moving average of ``{"params": ..., **model_state}``; None if `optim.ema_decay` is None."""

    @property
    def variables(self) -> Variables:
        """Variables for evaluation: the moving average, with its own batch-norm statistics, if there is one."""
        return {"params": self.params, **self.model_state} if self.ema is None else self.ema


def init_state(task: Task, optimizer: Optimizer, seed: int, *, use_ema: bool) -> TrainState:
    """Makes the state before the first step. Pure; `mesh.compile_init` compiles it."""
    variables: dict[str, Any] = dict(task.init(stream_key(seed, "init")))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        first_bad_step=jnp.full((), NEVER, jnp.int32),
        params=params,
        model_state=variables,
        opt_state=optimizer.tx.init(params),
        # A copy, not an alias: the state is donated, and a buffer can be donated only once.
        ema=jax.tree.map(jnp.copy, {"params": params, **variables}) if use_ema else None,
    )
