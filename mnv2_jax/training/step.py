"""The train step: a pure function from (state, batch) to (state, metrics). No mesh, no I/O, no host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mnv2_jax.config import Config
from mnv2_jax.ops.hashing import batch_hash
from mnv2_jax.ops.random import step_key
from mnv2_jax.tasks.base import Task
from mnv2_jax.tasks.distillation import TEACHER_LOGITS
from mnv2_jax.training.optim import Optimizer
from mnv2_jax.training.state import NEVER, TrainState
from mnv2_jax.types import Array, Batch, PyTree

Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[PyTree, Batch], tuple[PyTree, dict[str, Array]]]


def make_train_step(
    task: Task, optimizer: Optimizer, config: Config, spread: Callable[[PyTree], PyTree] = lambda tree: tree
) -> TrainStep:
    """Builds the step.

    Args:
      task: what is learnt.
      optimizer: of the stage.
      config: the experiment.
      spread: lays microbatches, arrays [accumulate_steps, b / accumulate_steps, ...], over the devices along their
        second axis; what it gives has the same values.

    The metrics are this step's own: the task's, as means, ``lr``, ``grad_norm``, ``first_bad_step`` and, where it is
    asked for, ``batch_hash``.
    """
    gradient = jax.value_and_grad(task.loss, has_aux=True)
    accumulate, group = config.optim.accumulate_steps, config.norm.group_size

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = step_key(state.seed, state.step)
        if accumulate == 1:
            (loss, (model_state, metrics)), grads = gradient(state.params, state.model_state, batch, key)
        else:
            # Every microbatch starts from the same statistics, and their results are averaged: the running
            # statistics are linear in them, so the step is the same function as without accumulation.
            microbatches = spread(jax.tree.map(lambda x: split_batch(x, accumulate, group), batch))
            (loss, (model_state, metrics)), grads = jax.tree.map(
                lambda x: x / accumulate,
                _summed(lambda b: gradient(state.params, state.model_state, b, key), microbatches),
            )
        lr = optimizer.schedule(state.step)
        updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(params))
        bad = ~finite & (state.first_bad_step == NEVER)
        first_bad_step = jnp.where(bad, state.step + 1, state.first_bad_step)
        new_state = state.replace(
            step=state.step + 1,
            first_bad_step=first_bad_step,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            ema=_averaged(state, {"params": params, **model_state}, config),
        )
        fed = {name: array for name, array in batch.items() if name != TEACHER_LOGITS}  # computed on the devices
        hashed = {"batch_hash": batch_hash(fed)} if config.log.batch_hash else {}
        return new_state, metrics | {"lr": lr, "grad_norm": grad_norm, "first_bad_step": first_bad_step} | hashed

    return step


def split_batch(x: Array, accumulate_steps: int, group_size: int) -> Array:
    """[b, ...] as microbatches [accumulate_steps, b / accumulate_steps, ...].

    Norm groups stay whole, and neighbouring groups go to different microbatches: with the batch cut over devices
    in contiguous pieces, each device finds its share of every microbatch at home where that is whole groups.
    """
    pieces = x.reshape(-1, accumulate_steps, group_size, *x.shape[1:])
    return jnp.moveaxis(pieces, 1, 0).reshape(accumulate_steps, -1, *x.shape[1:])


def _summed(f: Callable[[Any], Any], microbatches: PyTree) -> Any:
    """The sum of f over the leading axis, one microbatch in memory at a time."""
    first = jax.tree.map(lambda x: x[0], microbatches)
    rest = jax.tree.map(lambda x: x[1:], microbatches)
    total, _ = jax.lax.scan(lambda total, b: (jax.tree.map(jnp.add, total, f(b)), None), f(first), rest)
    return total


def _averaged(state: TrainState, variables: PyTree, config: Config) -> PyTree:
    """The new moving average; batch-norm statistics are averaged with the weights they belong to."""
    if config.optim.ema_decay is None:
        return None
    # TensorFlow's num_updates counts this step too.
    ceiling = (2.0 + state.step) / (11.0 + state.step) if config.optim.ema_warmup else 1.0
    decay = jnp.minimum(config.optim.ema_decay, ceiling)
    if config.optim.ema_every_steps > 1:
        # Counted over the whole training, the first time after so many steps; torchvision's counts in each epoch anew.
        decay = jnp.where((state.step + 1) % config.optim.ema_every_steps == 0, decay, 1.0)
    return jax.tree.map(lambda mean, new: (mean * decay + new * (1 - decay)).astype(new.dtype), state.ema, variables)
