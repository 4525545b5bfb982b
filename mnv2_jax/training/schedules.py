"""Learning-rate schedules: makes functions of the step from the config."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from mnv2_jax.config import OptimConfig
from mnv2_jax.types import Array

_MOST_NOISE = 0.67
_NOISE_SEED = 42
"""timm's seed of the noise. It is fixed, because the noise belongs to the recipe and not to the run."""


class _Span(NamedTuple):
    """Lengths of time, all in one unit: a step or an epoch."""

    steps: float
    """Number of steps in a unit."""
    epoch: float
    warmup: float
    total: float


def make_schedule(optim: OptimConfig, peak_lr: float, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """Makes a function from the step, counted from 0, to the learning rate; the step may be traced.

    `exponential` and `step` count their decays from the start of training, warm-up included (the rule of TF-slim,
    PyTorch and timm). `cosine` runs from the point that `cosine_from` names to the end of training.

    With ``update_every=epoch`` the rate depends on the whole number of the epoch (as in the schedulers of PyTorch and
    timm), and only a warm-up given in steps changes it at every step (CoreNet's rule). An epoch begins with the first
    step all of whose images belong to it.

    Args:
      optim: see `config.OptimConfig`.
      peak_lr: learning rate at which the schedule begins, after the warm-up.
      steps_per_epoch: training images / batch size; need not be whole.
      total_steps: steps of the whole training.
    """
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch) if optim.warmup_steps is None else optim.warmup_steps
    in_steps = _Span(1, steps_per_epoch, warmup_steps, total_steps)
    epochs = total_steps / steps_per_epoch
    if round(round(epochs) * steps_per_epoch) == total_steps:
        epochs = round(epochs)  # the number in the config, before it was rounded to whole steps
    warmup = optim.warmup_epochs if optim.warmup_steps is None else optim.warmup_steps / steps_per_epoch
    in_epochs = _Span(steps_per_epoch, 1, warmup, epochs)

    def of_epoch(count: Array, table: np.ndarray) -> Array:
        # On the host and in float64, so that rounding can't delay a decay that is due at the start of an epoch.
        starts = np.ceil(np.round(np.arange(len(table)) * steps_per_epoch, 6)).astype(np.int32)
        return jnp.asarray(table, jnp.result_type(float))[(starts <= count).sum() - 1]

    def schedule(count: Array) -> Array:
        step = jnp.asarray(count, jnp.result_type(float))
        if optim.update_every == "step":
            lr = _rate(jnp, optim, peak_lr, step, in_steps)
        else:
            table = _rate if optim.warmup_steps is None else _decayed
            lr = of_epoch(count, table(np, optim, peak_lr, np.arange(math.ceil(epochs), dtype=np.float64), in_epochs))
            if optim.warmup_steps is not None:
                lr = jnp.where(step < warmup_steps, _warming(optim, peak_lr, step, in_steps), lr)
        if optim.lr_noise is not None:
            lr = lr * of_epoch(count, _noise_factors(optim.lr_noise, epochs))
        return lr

    return schedule


def _rate(xp: Any, optim: OptimConfig, peak_lr: float, time: Any, span: _Span) -> Any:
    """Returns the learning rate at ``time``, an array of the module ``xp`` in the unit of ``span``."""
    warming = _warming(optim, peak_lr, time, span)
    return xp.where(time < span.warmup, warming, _decayed(xp, optim, peak_lr, time, span))


def _warming(optim: OptimConfig, peak_lr: float, time: Any, span: _Span) -> Any:
    end = peak_lr
    if optim.warmup_to == "schedule":
        end = float(_decayed(np, optim, peak_lr, np.float64(span.warmup), span))
    return optim.warmup_init_lr + (end - optim.warmup_init_lr) * time / max(span.warmup, 1)


def _decayed(xp: Any, optim: OptimConfig, peak_lr: float, time: Any, span: _Span) -> Any:
    if optim.schedule == "cosine":
        begin = span.warmup if optim.cosine_from == "warmup" else 0
        progress = (time - begin) / max(span.total - begin, 1)
        return optim.final_lr + (peak_lr - optim.final_lr) * 0.5 * (1 + xp.cos(xp.pi * progress.clip(0, 1)))
    if optim.schedule == "poly":
        left = 1 - ((time - span.warmup) / max(span.total - span.warmup, 1)).clip(0, 1)
        return optim.final_lr + (peak_lr - optim.final_lr) * xp.power(left, optim.poly_power)
    if optim.schedule == "exponential":
        if optim.decay_every_steps is None:
            decays = time / (optim.decay_every_epochs * span.epoch)
        else:
            decays = time * span.steps / optim.decay_every_steps
        return peak_lr * xp.power(optim.decay_factor, xp.floor(decays) if optim.staircase else decays)
    if optim.schedule == "step":
        boundaries = [round(epoch * span.epoch) for epoch in optim.milestones_epochs]
        passed = (time[..., None] >= xp.asarray(boundaries)).sum(-1)
        return peak_lr * xp.power(optim.decay_factor, passed)
    return xp.full_like(time, peak_lr)


def _noise_factors(lr_noise: tuple[float, float], epochs: float) -> np.ndarray:
    """Returns the factor of the learning rate of each epoch; the same in every training."""
    begin, end = (share * epochs for share in lr_noise)
    return np.array([1 + _noise(epoch) if begin <= epoch < end else 1.0 for epoch in range(math.ceil(epochs))])


def _noise(epoch: int) -> float:
    """Draws a normal deviate again and again until its absolute value is small enough."""
    rng = np.random.default_rng((_NOISE_SEED, epoch))
    return next(noise for noise in iter(rng.normal, None) if abs(noise) < _MOST_NOISE)
