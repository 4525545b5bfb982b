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
from mnv2_jax.training.tracing import traced
from mnv2_jax.types import Array, Batch, Key, PyTree

Metrics = dict[str, Any]
"""Arrays [] by name, and with `log.trace` a `tracing.Traced`, ``trace``."""
TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[PyTree, Batch], tuple[PyTree, dict[str, Array]]]


def make_train_step(
    task: Task, optimizer: Optimizer, config: Config, spread: Callable[[PyTree], PyTree] = lambda tree: tree
) -> TrainStep:
    """Makes the train step of a stage.

    Args:
      task: the task to learn.
      optimizer: optimiser of the stage.
      config: the experiment.
      spread: places microbatches, arrays [accumulate_steps, b / accumulate_steps, ...], on the devices along their
        second axis, and keeps their values.

    The step takes the state, `Task.frozen` and a batch. Its metrics are the means of the task's metrics, ``lr``,
    ``grad_norm``, ``first_bad_step``, with `log.batch_hash` ``batch_hash``, and with `log.trace` ``trace``. They
    describe this step alone.
    """
    gradient = jax.value_and_grad(task.loss, has_aux=True)
    accumulate, group = config.optim.accumulate_steps, config.norm.group_size

    def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        variables = state.params, state.model_state, frozen
        key = step_key(state.seed, state.step)
        if accumulate == 1:
            (loss, aux), grads = gradient(*variables, batch, key)
        else:
            microbatches = spread(jax.tree.map(lambda x: split_batch(x, accumulate, group), batch))
            (loss, aux), grads = _accumulate(task, gradient, variables, microbatches, key)
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
            ema=_update_ema(state, {"params": params, **aux.model_state}, config),
        )
        metrics: Metrics = aux.metrics | {"lr": lr, "grad_norm": grad_norm, "first_bad_step": first_bad_step}
        from_view = {name: array for name, array in batch.items() if name not in task.columns}
        if config.log.batch_hash:
            metrics["batch_hash"] = batch_hash(from_view)
        if config.log.trace:
            metrics["trace"] = traced(batch_hash(from_view), grads, new_state)
        return new_state, metrics

    return step


def split_batch(x: Array, accumulate_steps: int, group_size: int) -> Array:
    """Splits an array [b, ...] into microbatches [accumulate_steps, b / accumulate_steps, ...].

    Norm groups stay whole, and neighbouring groups go to different microbatches. The batch is cut over the devices in
    contiguous pieces, so each device already holds its share of every microbatch if that share is whole groups.
    """
    pieces = x.reshape(-1, accumulate_steps, group_size, *x.shape[1:])
    return jnp.moveaxis(pieces, 1, 0).reshape(accumulate_steps, -1, *x.shape[1:])


def _accumulate(
    task: Task, gradient: Callable[..., Any], variables: tuple[PyTree, PyTree, PyTree], microbatches: PyTree, key: Key
) -> tuple[tuple[Array, Aux], PyTree]:
    """Computes the result of ``gradient`` for a whole batch, with one microbatch in memory at a time.

    Losses, metrics and gradients are averaged with the weights `Aux.weight`. Every microbatch starts from the same
    running statistics, and the updated statistics are averaged. They are linear in the statistics of the batch, so the
    step is the same function as without accumulation.
    """
    count = len(jax.tree.leaves(microbatches)[0])
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), microbatches)
    # The shapes of the forward pass are enough: gradients have the shapes of the parameters.
    loss, aux = jax.eval_shape(task.loss, *variables, one, key)

    def add(totals: PyTree, microbatch: Batch) -> tuple[PyTree, None]:
        (loss, aux), grads = gradient(*variables, microbatch, key)
        means, weight = (loss, aux.metrics, grads), 1.0
        if aux.weight is not None:
            means, weight = jax.tree.map(lambda x: x * aux.weight, means), aux.weight
        return jax.tree.map(jnp.add, totals, ((*means, aux.model_state), jnp.asarray(weight, loss.dtype))), None

    params, model_state, _ = variables
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ((loss, aux.metrics, params, model_state), loss))
    ((*sums, state), weight), _ = jax.lax.scan(add, zeros, microbatches)
    # A batch whose weight is 0, such as one without a labelled pixel, has no loss and no gradient.
    divisor = jnp.where(weight == 0, 1, weight)
    loss, metrics, grads = jax.tree.map(lambda x: x / divisor, tuple(sums))
    return (loss, Aux(jax.tree.map(lambda x: x / count, state), metrics)), grads


def _update_ema(state: TrainState, variables: PyTree, config: Config) -> PyTree:
    """Returns the new moving average, which covers the batch-norm statistics as well as the weights."""
    if config.optim.ema_decay is None:
        return None
    # The number of updates includes this step, as in TensorFlow's num_updates.
    ceiling = (2.0 + state.step) / (11.0 + state.step) if config.optim.ema_warmup else 1.0
    decay = jnp.minimum(config.optim.ema_decay, ceiling)
    if config.optim.ema_every_steps > 1:
        # Steps are counted over the whole training; torchvision starts the count again in each epoch.
        decay = jnp.where((state.step + 1) % config.optim.ema_every_steps == 0, decay, 1.0)
    return jax.tree.map(lambda mean, new: (mean * decay + new * (1 - decay)).astype(new.dtype), state.ema, variables)
