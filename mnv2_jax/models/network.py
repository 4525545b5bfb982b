"""The network that is built from any table of this folder.

    image ─► stem ─► (pool) ─► block_1 ─► … ─► block_n ─► (head) ─► mean ─► (hidden) ─► classifier ─► logits

A family is a table and a function from a `ModelConfig` to a `Plan`; no other code knows about it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from mnv2_jax.config import ModelConfig, NormConfig
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.models.classifier import Classifier
from mnv2_jax.nn.activations import ACTIVATIONS, Activation, activate
from mnv2_jax.nn.blocks import Layers, MobileAttention, bind_layers, drop_path, max_pool
from mnv2_jax.nn.conv import Conv, DepthwiseConv
from mnv2_jax.nn.forms import AUTO, Forms
from mnv2_jax.nn.initializers import INITS
from mnv2_jax.nn.norm import GroupedBatchNorm
from mnv2_jax.nn.window import Window
from mnv2_jax.types import Array, Key

STRIDES = 5
"""Number of times that every network here halves its map, and the length of `ModelConfig.strides`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a table, with everything decided except its number of input channels."""

    module: type[nn.Module]
    """A class of `nn.blocks`."""
    options: FrozenDict[str, Any]
    """Attributes of the module, except ``layers``, ``stride`` and ``dilation``, which the network sets."""
    stride: int
    """Published stride: 1 or 2."""
    stage: int
    """Index of the block's stage in the table of the family, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The network that a config describes; numbers are channels."""

    stem: int
    blocks: tuple[Block, ...]
    act: Activation
    """Activation after the stem, the head and the hidden layer."""
    stem_kernel_size: int = 3
    stem_pool: bool = False
    """Whether a 3×3 max-pool of stride 2 follows the stem (ResNet)."""
    head: int | None = None
    """Channels of the 1×1 convolution before the mean; None: there is none."""
    hidden: int | None = None
    """Channels of the dense layer behind the mean; None: there is none."""
    hidden_norm: bool = False
    """Whether the hidden layer has a batch norm, and so no bias."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Stride and dilation of a part of the network, and the scale of the map behind it."""

    stride: int
    dilation: int
    ratio: int
    """Height of the image over height of the map."""


def places(plan: Plan, model: ModelConfig) -> tuple[Place, ...]:
    """Returns stride, dilation and ratio of the stem, of the pool if there is one, and of each block."""
    published = [2, *([2] if plan.stem_pool else []), *(block.stride for block in plan.blocks)]
    assert published.count(2) == STRIDES
    configured_strides = iter(model.strides)
    result = []
    ratio, dilation = 1, 1
    for index, halves in enumerate(published):
        stride = next(configured_strides) if halves == 2 else 1
        block_dilation = dilation
        # DeepLab's rule, as in slim: a stride that would go beyond the output stride becomes dilation, from the next
        # block on. The block that lost its stride keeps the dilation that it would have had.
        if ratio * stride > model.output_stride and index > plan.stem_pool:
            dilation, stride = dilation * stride, 1
        ratio *= stride
        result.append(Place(stride, block_dilation, ratio))
    return tuple(result)


def check_plan(name: str, plan: Plan) -> None:
    """Checks the plan of a registered network.

    Raises:
      UserError: in one line, for what no network can be built from.
    """
    if not isinstance(plan, Plan):
        raise UserError(f"model.name={name!r}: its function returned {plan!r:.60}; let it return a Plan")
    halvings = 1 + plan.stem_pool + sum(block.stride == 2 for block in plan.blocks)
    if halvings != STRIDES:
        raise UserError(
            f"model.name={name!r}: its plan halves the map {halvings} times, with the stem; it must be {STRIDES} times,"
            " and model.strides turns some of them off, as in --config.model.strides=(1,1,2,2,2)"
        )
    channels = {"stem": plan.stem, "head": plan.head, "hidden": plan.hidden}
    acts = {"act": plan.act}
    for number, block in enumerate(plan.blocks, 1):
        fields = set(block.module.__dataclass_fields__) - {"parent", "name"}
        for key, value in block.options.items():
            if key not in fields:
                raise UserError(
                    f"model.name={name!r}: block {number}: {block.module.__name__} has no field {key!r}"
                    f"{nearest(key, fields)}"
                )
            if block.module.__module__ != MobileAttention.__module__:
                continue  # a block of the user's own, whose fields may mean something else
            if key in ("features", "hidden", "squeezed"):
                channels[f"block {number}: {key}"] = value
            elif key == "act":
                acts[f"block {number}: act"] = value
    for place, count in channels.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1):
            raise UserError(f"model.name={name!r}: {place}={count!r} must be a whole number of channels, at least 1")
    for place, act in acts.items():
        if act is not None and act not in ACTIVATIONS:
            raise UserError(f"model.name={name!r}: {place}={act!r} is no activation{nearest(str(act), ACTIVATIONS)}")


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


def part_of(name: str) -> str:
    """Returns the name of the part (`Network.parts`) to which a branch of the parameters belongs."""
    return name.removesuffix("_norm")


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

    def __call__(self, x: Array, train: bool = False, dropout_keys: Key | None = None) -> Array:
        """Maps float images [b, h, w, 3] to logits [b, k], float32 at least; see `endpoints`."""
        return self.endpoints(x, train, dropout_keys)["logits"]

    @property
    def plan(self) -> Plan:
        """Stem, blocks and head of the network."""
        return self.plan_of(self.model)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that have parameters, in order; the branches of a part x are named x and x_norm."""
        plan = self.plan
        blocks = (f"block_{i}" for i in range(1, len(plan.blocks) + 1))
        return ("stem", *blocks, *(["head"] if plan.head else []), *(["hidden"] if plan.hidden else []), "classifier")

    @property
    def head_parts(self) -> tuple[str, ...]:
        """Names of the `parts` behind the mean, which a file of weights may lack."""
        return self.parts[-2:] if self.plan.hidden else self.parts[-1:]

    @property
    def endpoint_strides(self) -> dict[str, int]:
        """Height of the image over height of the map, for each endpoint that is a map, in order."""
        plan = self.plan
        names = ["stem", *(["pool"] if plan.stem_pool else [])]
        names += [f"block_{i}" for i in range(1, len(plan.blocks) + 1)]
        ratios = {name: place.ratio for name, place in zip(names, places(plan, self.model), strict=True)}
        return ratios | ({"head": ratios[names[-1]]} if plan.head else {})

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
          where ``padding="keras_v1"`` meets an odd size); then pooled [b, c], (hidden [b, d]) and logits [b, k],
          float32 at least.
        """
        plan, layers, parts = self.plan, self._layers(), self.parts
        trained = {part: train and place >= parts.index(self.train_from) for place, part in enumerate(parts)}
        points: dict[str, Array] = {}
        placed = iter(places(plan, self.model))
        x = layers.conv_norm(
            x,
            trained["stem"],
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
            options = dict(block.options, layers=block_layers, stride=place.stride, dilation=place.dilation)
            x = block.module(**options, name=name)(x, trained[name])
            points[name] = x
        if plan.head:
            x = points["head"] = layers.conv_norm(x, trained["head"], plan.head, "head", plan.act)
        x = points["pooled"] = x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        if plan.hidden:
            dense = functools.partial(layers.dense, use_bias=not plan.hidden_norm, kernel_init=layers.inits.hidden)
            x = dense(plan.hidden, name="hidden")(x)
            x = (
                layers.norm(name="hidden_norm")(x, trained["hidden"], plan.act)
                if plan.hidden_norm
                else activate(x, plan.act)
            )
            points["hidden"] = x
        assert self.model.num_classes is not None
        classifier = Classifier(
            num_classes=self.model.num_classes,
            dropout=self.model.dropout,
            kernel_init=layers.inits.classifier,
            bias_init=layers.inits.classifier_bias(x.shape[-1]),
            name="classifier",
        )
        points["logits"] = classifier(x, train, dropout_keys)
        return points

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


def _conv_padding(model: ModelConfig) -> Any:
    return "same" if model.padding == "keras_v1" else model.padding
