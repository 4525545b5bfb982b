"""Learning-rate schedules and optimisers, from the config to optax."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mnv2_jax.config import OptimConfig
from mnv2_jax.types import Array, PyTree


class Optimizer(NamedTuple):
    """An optax transformation and the learning rate that it follows."""

    tx: optax.GradientTransformation
    schedule: optax.Schedule


def make_schedule(optim: OptimConfig, peak_lr: float, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """The learning rate by step, counted from 0; traced or not.

    The decays of `exponential` and `step` count from the start of training, warm-up included (TF model garden's
    and PyTorch's rule); `cosine` runs from the end of the warm-up to the end of training.

    Args:
      optim: see `config.OptimConfig`.
      peak_lr: where the warm-up ends.
      steps_per_epoch: training images / batch size; need not be whole.
      total_steps: of the whole training.
    """
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)

    def decayed(step: Array) -> Array:
        if optim.schedule == "cosine":
            progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
            return optim.final_lr + (peak_lr - optim.final_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress.clip(0, 1)))
        if optim.schedule == "exponential":
            decays = step / (optim.decay_every_epochs * steps_per_epoch)
            return peak_lr * jnp.power(optim.decay_factor, jnp.floor(decays) if optim.staircase else decays)
        if optim.schedule == "step":
            boundaries = [round(epoch * steps_per_epoch) for epoch in optim.milestones_epochs]
            passed = (step >= jnp.asarray(boundaries)).sum()
            return peak_lr * jnp.power(optim.decay_factor, passed)
        return jnp.full_like(step, peak_lr)

    def schedule(count: Array) -> Array:
        step = jnp.asarray(count, jnp.result_type(float))
        warm = optim.warmup_init_lr + (peak_lr - optim.warmup_init_lr) * step / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, warm, decayed(step))

    return schedule


def decay_mask(params: PyTree, decayed: str) -> PyTree:
    """Which parameters `weight_decay_on` decays. Norms and biases are vectors, depthwise kernels [r, s, 1, c]."""
    rules = {
        "all": lambda p: True,
        "no_norm_bias": lambda p: p.ndim > 1,
        "no_depthwise": lambda p: p.ndim > 1 and not (p.ndim == 4 and p.shape[2] == 1),
    }
    return jax.tree.map(rules[decayed], params)


def make_optimizer(optim: OptimConfig, peak_lr: float, steps_per_epoch: float, total_steps: int) -> Optimizer:
    """Clips, decays the weights, and follows the schedule.

    sgd and rmsprop take weight decay as L2, added to the clipped gradient before the momentum (PyTorch, TF-slim);
    adamw takes it decoupled (Loshchilov & Hutter, arXiv:1711.05101). rmsprop is TensorFlow's: the mean square
    starts at 1, epsilon stands inside the root, the learning rate inside the momentum.
    """
    schedule = make_schedule(optim, peak_lr, steps_per_epoch, total_steps)

    def mask(params: PyTree) -> PyTree:
        return decay_mask(params, optim.weight_decay_on)

    chain = []
    if optim.clip_grad_norm is not None:
        chain.append(optax.clip_by_global_norm(optim.clip_grad_norm))
    if optim.name == "adamw":
        chain.append(
            optax.adamw(schedule, optim.b1, optim.b2, optim.epsilon, weight_decay=optim.weight_decay, mask=mask)
        )
    else:
        if optim.weight_decay:
            chain.append(optax.add_decayed_weights(optim.weight_decay, mask))
        if optim.name == "sgd":
            chain.append(optax.sgd(schedule, optim.momentum or None, optim.nesterov))
        else:
            chain.append(
                optax.rmsprop(
                    schedule,
                    optim.rms_decay,
                    optim.epsilon,
                    initial_scale=1.0,
                    eps_in_sqrt=True,
                    momentum=optim.momentum or None,
                )
            )
    return Optimizer(optax.chain(*chain), schedule)
