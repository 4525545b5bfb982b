"""Optimisers: builds optax transformations from the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from mnv2_jax.config import OptimConfig
from mnv2_jax.types import Array, PyTree


class Optimizer(NamedTuple):
    """An optax transformation and the learning rate that it follows."""

    tx: optax.GradientTransformation
    schedule: optax.Schedule


def decay_mask(params: PyTree, decayed: str) -> PyTree:
    """Marks the parameters that `weight_decay_on` decays.

    Norms, biases and LayerScale are vectors, depthwise kernels [r, s, 1, c]. The name of a norm's module ends in
    ``_norm``, which tells its bias from that of another layer. LayerScale is not a norm: no_norm decays it (as
    torchvision's --norm-weight-decay and TF model garden's exclude_from_weight_decay: [batch_normalization] would),
    no_norm_bias doesn't (as timm).
    """
    rules: dict[str, Callable[[Any, Array], bool]] = {
        "all": lambda path, p: True,
        "no_norm": lambda path, p: not any(str(key.key).endswith("_norm") for key in path),
        "no_norm_bias": lambda path, p: p.ndim > 1,
        "no_depthwise": lambda path, p: p.ndim > 1 and not (p.ndim == 4 and p.shape[2] == 1),
    }
    return jax.tree.map_with_path(rules[decayed], params)


def make_transformation(optim: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Makes the transformation that clips gradients, decays weights, and follows the schedule.

    - sgd and rmsprop apply weight decay as L2: it is added to the clipped gradient before the momentum (PyTorch,
      TF-slim).
    - rmsprop with (rms_init, epsilon_in_sqrt, lr_in_momentum) = (1, True, True) is TF1's and timm's RMSpropTF, with
      (0, True, True) Keras', with (0, False, False) PyTorch's.
    - adamw applies decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101).
    - `l2` is added to the gradient of adamw after clipping and before the moments.
    """

    def mask(params: PyTree) -> PyTree:
        return decay_mask(params, optim.weight_decay_on)

    coupled = optim.weight_decay if optim.name in ("sgd", "rmsprop") else optim.l2
    chain = []
    if optim.clip_grad_norm is not None:
        chain.append(optax.clip_by_global_norm(optim.clip_grad_norm))
    if coupled:
        chain.append(optax.add_decayed_weights(coupled, mask))
    chain.append(_RULES[optim.name](optim, schedule, mask))
    return optax.chain(*chain)


_Mask = Callable[[PyTree], PyTree]


def _sgd(optim: OptimConfig, schedule: optax.Schedule, mask: _Mask) -> optax.GradientTransformation:
    return optax.sgd(schedule, optim.momentum or None, optim.nesterov)


def _rmsprop(optim: OptimConfig, schedule: optax.Schedule, mask: _Mask) -> optax.GradientTransformation:
    scaled = optax.scale_by_rms(optim.rms_decay, optim.epsilon, optim.rms_init, optim.epsilon_in_sqrt)
    momentum = optax.trace(optim.momentum) if optim.momentum else optax.identity()
    lr = optax.scale_by_learning_rate(schedule)
    return optax.chain(scaled, lr, momentum) if optim.lr_in_momentum else optax.chain(scaled, momentum, lr)


def _adamw(optim: OptimConfig, schedule: optax.Schedule, mask: _Mask) -> optax.GradientTransformation:
    return optax.adamw(schedule, optim.b1, optim.b2, optim.epsilon, weight_decay=optim.weight_decay, mask=mask)


_RULES = {"sgd": _sgd, "rmsprop": _rmsprop, "adamw": _adamw}
