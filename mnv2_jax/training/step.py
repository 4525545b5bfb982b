"""The train step: a pure function from (state, frozen, batch) to (state, metrics). No mesh, no I/O, no host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mnv2_jax.config import Config
from mnv2_jax.ops.hashing import batch_hash
from mnv2_jax.ops.random import step_key
from mnv2_jax.tasks.base import Aux, Task
from mnv2_jax.training.optim import Optimizer
from mnv2_jax.training.state import NEVER, TrainState
from mnv2_jax.types import Array, Batch, Key, PyTree

Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]
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

    The step takes `Task.frozen` besides state and batch. Its metrics are its own: the task's, as means, ``lr``,
    ``grad_norm``, ``first_bad_step`` and, where it is asked for, ``batch_hash``.
    """
    gradient = jax.value_and_grad(task.loss, has_aux=True)
    accumulate, group = config.optim.accumulate_steps, config.norm.group_size

    def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        known = state.params, state.model_state, frozen
        key = step_key(state.seed, state.step)
        if accumulate == 1:
            (loss, aux), grads = gradient(*known, batch, key)
        else:
            microbatches = spread(jax.tree.map(lambda x: split_batch(x, accumulate, group), batch))
            (loss, aux), grads = _accumulated(task, gradient, known, microbatches, key)
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
            model_state=aux.model_state,
            opt_state=opt_state,
            ema=_averaged(state, {"params": params, **aux.model_state}, config),
        )
        fed = {name: array for name, array in batch.items() if name not in task.columns}
        hashed = {"batch_hash": batch_hash(fed)} if config.log.batch_hash else {}
        return new_state, aux.metrics | {"lr": lr, "grad_norm": grad_norm, "first_bad_step": first_bad_step} | hashed

    return step


def split_batch(x: Array, accumulate_steps: int, group_size: int) -> Array:
    """[b, ...] as microbatches [accumulate_steps, b / accumulate_steps, ...].

    Norm groups stay whole, and neighbouring groups go to different microbatches: with the batch cut over devices
    in contiguous pieces, each device finds its share of every microbatch at home where that is whole groups.
    """
    pieces = x.reshape(-1, accumulate_steps, group_size, *x.shape[1:])
    return jnp.moveaxis(pieces, 1, 0).reshape(accumulate_steps, -1, *x.shape[1:])


def _accumulated(
    task: Task, gradient: Callable[..., Any], known: tuple[PyTree, PyTree, PyTree], microbatches: PyTree, key: Key
) -> tuple[tuple[Array, Aux], PyTree]:
    """Result of ``gradient`` for a whole batch, with one microbatch in memory at a time.

    Losses, their metrics and gradients count by `Aux.weight`. Every microbatch starts from the same statistics, and
    their results are averaged: the running statistics are linear in them, so the step is the same function as without
    accumulation.
    """
    count = len(jax.tree.leaves(microbatches)[0])
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), microbatches)
    loss, aux = jax.eval_shape(task.loss, *known, one, key)  # the forward pass alone; gradients are like parameters

    def add(totals: PyTree, microbatch: Batch) -> tuple[PyTree, None]:
        (loss, aux), grads = gradient(*known, microbatch, key)
        means, weight = (loss, aux.metrics, grads), 1.0
        if aux.weight is not None:
            means, weight = jax.tree.map(lambda x: x * aux.weight, means), aux.weight
        return jax.tree.map(jnp.add, totals, ((*means, aux.model_state), jnp.asarray(weight, loss.dtype))), None

    params, model_state, _ = known
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ((loss, aux.metrics, params, model_state), loss))
    ((*sums, state), weight), _ = jax.lax.scan(add, zeros, microbatches)
    loss, metrics, grads = jax.tree.map(lambda x: x / weight, tuple(sums))
    return (loss, Aux(jax.tree.map(lambda x: x / count, state), metrics)), grads


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
