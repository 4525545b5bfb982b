"""The network that is built from any table of this folder.

    image ─► stem ─► (pool) ─► block_1 ─► … ─► block_n ─► (head) ─► one of `heads` ─► logits

The part called head is the last 1×1 convolution, as in the papers. A family is a table and a function from a
`ModelConfig` to a `Plan`; no other code knows about it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnv2_jax.config import ModelConfig, NormConfig
from mnv2_jax.models.heads import HEADS
from mnv2_jax.models.heads.base import EXPANDED, Body, Head
from mnv2_jax.models.plan import Plan, places
from mnv2_jax.nn.blocks import Layers, MobileAttention, bind_layers, drop_path, max_pool
from mnv2_jax.nn.conv import Conv, DepthwiseConv
from mnv2_jax.nn.forms import AUTO, Forms
from mnv2_jax.nn.initializers import INITS
from mnv2_jax.nn.norm import GroupedBatchNorm
from mnv2_jax.nn.window import Window
from mnv2_jax.types import Array, Key


def _grown(plan: Plan, index: int) -> float:
    return (index - 1) / max(len(plan.blocks) - 1, 1)


def _flat(plan: Plan, index: int) -> float:
    del plan, index
    return 1.0


def _timm(plan: Plan, index: int) -> float:
    """timm's rule: the last convolution counts as a block if a hidden layer follows it (V3; in V4 it is a block)."""
    return (index - 1) / (len(plan.blocks) + bool(plan.head and plan.hidden))


def _garden(plan: Plan, index: int) -> float:
    """TF model garden's rule: the rate of a block grows with its index, counted with the stem, the pooling and the
    layers behind them. Attention blocks ignore ``flat_stochastic_depth_drop_rate=false`` and have the full rate."""
    if plan.blocks[index - 1].module is MobileAttention:
        return 1.0
    count = 1 + len(plan.blocks) + bool(plan.head) + 2 * bool(plan.hidden)
    return (index + 1) / count


DROP_PATH_RULES: Mapping[str, Callable[[Plan, int], float]] = {
    "linear": _grown,
    "flat": _flat,
    "timm": _timm,
    "tf_model_garden": _garden,
}
"""Functions that give a block (counted from 1) its share of `drop_path`, by `config.ModelConfig.drop_path_rule`."""


class Network(nn.Module):
    """The network of a `ModelConfig` (its ``num_classes`` set) and a `NormConfig`.

    Attributes:
      plan_of: the function of the family that makes the plan.
      train_from: one of `parts`. Training doesn't change the parts before it: their norms use the running statistics,
        as in inference.
      forms: how layers are computed.
    """

    model: ModelConfig
    norm: NormConfig
    plan_of: Callable[[ModelConfig], Plan]
    train_from: str = "stem"
    forms: Forms = AUTO

    def __call__(self, x: Array, train: bool = False, dropout_keys: Key | None = None) -> Any:
        """Maps float images [b, h, w, 3] to the outputs of the head: for a classifier logits [b, k], float32 at least.

        The arguments are those of `endpoints`.
        """
        return self.head.outputs(self.endpoints(x, train, dropout_keys))

    @property
    def plan(self) -> Plan:
        """Stem, blocks and head of the network."""
        return self.plan_of(self.model)

    @property
    def head(self) -> Head:
        """What follows the features."""
        return HEADS[self.model.head]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that have parameters, in order; the branches of a part x are named x and x_norm."""
        plan = self.plan
        blocks = (f"block_{i}" for i in range(1, len(plan.blocks) + 1))
        return ("stem", *blocks, *(["head"] if self.head.has_last_conv(plan) else []), *self.head_parts)

    @property
    def head_parts(self) -> tuple[str, ...]:
        """Names of the `parts` behind the features, which a file of weights may lack."""
        return self.head.parts(self.plan, self.model)

    @property
    def endpoint_strides(self) -> dict[str, int]:
        """Height of the image over height of the map, for each endpoint of the features that ends a part, in order."""
        plan = self.plan
        names = ["stem", *(["pool"] if plan.stem_pool else [])]
        names += [f"block_{i}" for i in range(1, len(plan.blocks) + 1)]
        ratios = {name: place.ratio for name, place in zip(names, places(plan, self.model), strict=True)}
        return ratios | ({"head": ratios[names[-1]]} if self.head.has_last_conv(plan) else {})

    @nn.compact
    def endpoints(self, x: Array, train: bool = False, dropout_keys: Key | None = None) -> dict[str, Array]:
        """Computes the output of every part.

        Args:
          x: float images [b, h, w, 3] of any height and width.
          train: use dropout, stochastic depth, and the statistics of the batch, which the norm groups must divide.
          dropout_keys: [b], one typed PRNG key per example; only read in training.

        Returns:
          A dict in this order (which `jax.jit` doesn't keep): stem, (pool), block_1 and so on, (head), each
          [b, h / stride, w / stride, c] in the compute type, strides as in `endpoint_strides`, sizes rounded up (down
          where ``padding="keras_v1"`` meets an odd size); then those of the head. For a classifier: pooled [b, c],
          (hidden [b, d]) and logits [b, k], float32 at least.
        """
        plan, layers, parts = self.plan, self._layers(), self.parts
        trained = {part: train and place >= parts.index(self.train_from) for place, part in enumerate(parts)}
        # Whether norms use the statistics of the batch
        by_batch = dict(trained)
        if self.norm.statistics == "running":
            by_batch |= {part: False for part in parts if part not in self.head_parts}
        points: dict[str, Array] = {}
        placed = iter(places(plan, self.model))
        x = layers.conv_norm(
            x,
            by_batch["stem"],
            plan.stem,
            "stem",
            plan.act,
            kernel_size=plan.stem_kernel_size,
            stride=next(placed).stride,
        )
        points["stem"] = x
        if plan.stem_pool:
            x = points["pool"] = max_pool(x, Window(next(placed).stride, padding=_conv_padding(self.model)))
        for index, (block, place) in enumerate(zip(plan.blocks, placed, strict=True), 1):
            name = f"block_{index}"
            block_layers = self._with_drop_path(layers, index, dropout_keys) if trained[name] else layers
            if name == self.head.tap(plan):
                tapped = [x]
                block_layers = dataclasses.replace(block_layers, tap=functools.partial(_recorded, tapped))
            options = dict(block.options, layers=block_layers, stride=place.stride, dilation=place.dilation)
            x = block.module(**options, name=name)(x, by_batch[name])
            if name == self.head.tap(plan):
                points[EXPANDED] = tapped[-1]
            points[name] = x
        if self.head.has_last_conv(plan):
            assert plan.head is not None
            points["head"] = layers.conv_norm(x, by_batch["head"], plan.head, "head", plan.act)
        body = Body(
            plan=plan,
            model=self.model,
            layers=layers,
            points=dict(points),
            by_batch=by_batch,
            train=train,
            dropout_keys=dropout_keys,
            is_initializing=self.is_initializing(),
        )
        return points | self.head.compute(body)

    def _with_drop_path(self, layers: Layers, index: int, keys: Key | None) -> Layers:
        """Adds stochastic depth to the layers, at the rate of block ``index``, counted from 1."""
        model = self.model
        rate = model.drop_path * DROP_PATH_RULES[model.drop_path_rule](self.plan, index)
        if not rate:
            return layers
        if keys is None:
            raise ValueError(f"training with drop_path={model.drop_path:g} needs dropout_keys, one key per example")
        block_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        return dataclasses.replace(layers, branch=functools.partial(drop_path, keys=block_keys, rate=rate))

    def _layers(self) -> Layers:
        model, dtype = self.model, jnp.dtype(self.model.dtype)
        options: dict[str, Any] = dict(dtype=dtype, forms=self.forms)
        return bind_layers(
            conv=functools.partial(Conv, padding=_conv_padding(model), **options),
            depthwise=functools.partial(
                DepthwiseConv, padding="trailing" if model.padding == "keras_v1" else model.padding, **options
            ),
            norm=functools.partial(
                GroupedBatchNorm,
                group_size=self.norm.group_size,
                decay=self.norm.decay,
                epsilon=self.norm.epsilon,
                form=self.forms.norm,
            ),
            dtype=dtype,
            inits=INITS[model.init],
        )


def _recorded(record: list[Array], y: Array) -> Array:
    record.append(y)
    return y


def _conv_padding(model: ModelConfig) -> Any:
    return "same" if model.padding == "keras_v1" else model.padding
