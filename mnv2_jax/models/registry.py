"""Registry of models: makes them by name, as pure functions over plain dicts."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mnv2_jax import config
from mnv2_jax.config import ModelConfig, NormConfig
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.models import base, mobilenet_v1, mobilenet_v2, mobilenet_v3, mobilenet_v4, resnet
from mnv2_jax.models.network import Network
from mnv2_jax.models.plan import Plan, check_plan, part_of
from mnv2_jax.nn.forms import LIBRARY, Forms
from mnv2_jax.nn.norm import INPUTS
from mnv2_jax.registry import MODELS, OR_MODULE, module_of
from mnv2_jax.types import Array, Key, PyTree, Variables

_OPTIONS = ("width", "depth", "activation")
"""Options of a `ModelConfig` that some networks don't have."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A registered network, and which of the options of a `ModelConfig` it has that some networks don't have."""

    plan: Callable[[ModelConfig], Plan]
    options: tuple[str, ...] = ("width",)
    width_rules: tuple[str, ...] = ("standard",)
    reduced_tails: tuple[str, ...] = ()


def _family(plan: Callable[..., Plan], tables: Mapping[str, Any], **facts: Any) -> dict[str, Architecture]:
    return {name: Architecture(functools.partial(plan, table=table), **facts) for name, table in tables.items()}


_MODELS: dict[str, Architecture] = {
    **_family(
        mobilenet_v1.plan,
        {"mobilenet_v1": mobilenet_v1.TABLE_1},
        options=("width", "activation"),
        width_rules=("standard", "corenet"),
    ),
    **_family(
        mobilenet_v2.plan,
        {"mobilenet_v2": mobilenet_v2.TABLE_2},
        options=("width", "activation", "depth"),
        width_rules=("standard", "corenet", "divisor4", "fixed_stem_head"),
        reduced_tails=("paper",),
    ),
    **_family(
        mobilenet_v3.plan,
        {
            "mobilenet_v3_large": mobilenet_v3.LARGE,
            "mobilenet_v3_small": mobilenet_v3.SMALL,
            "mobilenet_v3_large_minimalistic": mobilenet_v3.minimalistic(mobilenet_v3.LARGE),
            "mobilenet_v3_small_minimalistic": mobilenet_v3.minimalistic(mobilenet_v3.SMALL),
        },
        width_rules=("standard", "torchvision", "fixed_stem_head", "keras"),
        reduced_tails=("paper", "torchvision"),
    ),
    **_family(
        mobilenet_v4.plan,
        {
            "mobilenet_v4_conv_small": mobilenet_v4.CONV_SMALL,
            "mobilenet_v4_conv_medium": mobilenet_v4.CONV_MEDIUM,
            "mobilenet_v4_conv_large": mobilenet_v4.CONV_LARGE,
            "mobilenet_v4_hybrid_medium": mobilenet_v4.HYBRID_MEDIUM,
            "mobilenet_v4_hybrid_large": mobilenet_v4.HYBRID_LARGE,
        },
    ),
    **_family(resnet.plan, {"resnet50": resnet.RESNET_50}, options=()),
}
_DEFAULT_NORM = NormConfig()


def register_model(
    name: str,
    plan: Callable[[ModelConfig], Plan],
    *,
    options: tuple[str, ...] = ("width",),
    width_rules: tuple[str, ...] = ("standard",),
) -> None:
    """Registers a network under a name, for configs and for `create_model`.

    A command that opens a run of this network first imports the module in which ``plan`` is defined.

    Args:
      name: lower-case letters, digits and underscores.
      plan: makes the network from the options of a config. Its blocks are those of `nn.blocks`, or your own blocks that
        take the same attributes.
      options: which of width, depth and activation ``plan`` reads; a config that sets another of them is refused.
      width_rules: the width rules that ``plan`` knows.

    Raises:
      UserError: if the name is taken or invalid, or an option is none of these.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(f"model name {name!r} is invalid; use lower-case letters, digits and underscores")
    if isinstance(options, str) or not set(options) <= set(_OPTIONS):
        raise UserError(f"model.name={name!r}: options={options!r} must be a tuple of some of {', '.join(_OPTIONS)}")
    if name in _MODELS:
        raise UserError(f"model.name={name!r} is the package's own model; give yours another name")
    MODELS.add(name, Architecture(plan, options, width_rules), module_of(plan))


def _architecture(name: str) -> Architecture:
    if name not in list_models():
        raise UserError(f"unknown model {name!r}{nearest(name, list_models())}{OR_MODULE}")
    architecture: Architecture = _MODELS[name] if name in _MODELS else MODELS.find(name)
    return architecture


@dataclasses.dataclass(frozen=True)
class Model:
    """A network without its weights. Models with equal options are equal and have the same hash.

    Variables are plain nested dicts, ``{"params": ..., "batch_stats": ...}``. Only this file may use ``module``.
    """

    name: str
    num_classes: int
    module: Network

    def init(self, key: Key, x: Any) -> Variables:
        """Draws the weights.

        Args:
          key: typed PRNG key.
          x: images [b, h, w, 3], or a `jax.ShapeDtypeStruct` of them; only the number of channels is read.
        """
        return _draw(self.module, key, x.shape[-1])

    def apply(
        self, variables: Variables, x: Any, train: bool = False, dropout_keys: Key | None = None
    ) -> tuple[Array, PyTree]:
        """Computes logits.

        Args:
          variables: variables as `init` returns them.
          x: float images [b, h, w, 3], NumPy or JAX, of any height and width.
          train: use the statistics of the batch and dropout.
          dropout_keys: [b] typed PRNG keys, one per example; needed in training with dropout.

        Returns:
          Logits [b, k] and ``{"batch_stats": ...}``, which is unchanged unless ``train``. The parts that
          `training_from` freezes have no gradient.
        """
        x = jnp.asarray(x)
        parts = self.parts
        frozen = parts[: parts.index(self.module.train_from)] if train else ()
        if frozen:
            params = {
                name: jax.lax.stop_gradient(branch) if part_of(name) in frozen else branch
                for name, branch in variables["params"].items()
            }
            variables = {**variables, "params": params}
        if not train:
            logits: Any = self.module.apply(variables, x)
            return logits, {"batch_stats": variables["batch_stats"]}
        result: Any = self.module.apply(variables, x, train=True, dropout_keys=dropout_keys, mutable=["batch_stats"])
        return result

    def endpoints(self, variables: Variables, x: Any) -> dict[str, Array]:
        """Computes every named output of the network in inference; `endpoint_strides` has their order and strides."""
        points: Any = self.module.apply(variables, jnp.asarray(x), method="endpoints")
        return points

    def norm_inputs(self, variables: Variables, x: Any) -> dict[str, dict[str, Array]]:
        """Computes mean and mean square [c] of the input of each norm in inference, over all images and positions.

        Returns:
          ``{"block_1/project_norm": {"mean": ..., "square": ...}}`` and so on.
        """
        _, collections = self.module.apply(variables, jnp.asarray(x), mutable=[INPUTS])
        paths = jax.tree_util.tree_flatten_with_path(collections[INPUTS])[0]
        inputs: dict[str, dict[str, Array]] = {}
        for path, value in paths:
            *norm, leaf = (key.key for key in path)
            inputs.setdefault("/".join(norm), {})[leaf] = value
        return inputs

    def training_from(self, part: str) -> Model:
        """Returns the same model with only ``part`` and the parts behind it trained."""
        return dataclasses.replace(self, module=self.module.clone(train_from=part))

    def with_forms(self, forms: Forms) -> Model:
        """Returns the same function up to rounding, with its convolutions computed by these `nn.forms`."""
        return dataclasses.replace(self, module=self.module.clone(forms=forms))

    @property
    def options(self) -> ModelConfig:
        """The config that the model was built from, with ``num_classes`` set."""
        return self.module.model

    @property
    def norm(self) -> NormConfig:
        """The options of the model's batch norms."""
        return self.module.norm

    @property
    def plan(self) -> Plan:
        """The plan of the network: its blocks, and the channels of its layers."""
        return self.module.plan

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that have parameters, in order; the branches of a part x are named x and x_norm."""
        return self.module.parts

    @property
    def head_parts(self) -> tuple[str, ...]:
        """Names of the `parts` behind the mean, which a file of weights may lack."""
        return self.module.head_parts

    @property
    def endpoint_strides(self) -> dict[str, int]:
        """Height of the image over height of the map, for every endpoint that is a map, in order."""
        return self.module.endpoint_strides


@functools.partial(jax.jit, static_argnums=(0, 2))
def _draw(module: Network, key: Key, channels: int) -> Variables:
    """Draws the variables. The network is traced once, for its shapes and for its weights; its output isn't computed.

    The forms of the layers don't matter here, so the library's forms are used: they are the fastest to trace.
    """
    variables: Variables = module.clone(forms=LIBRARY).init(key, jnp.zeros((1, 32, 32, channels)))
    return variables


@functools.cache
def variable_shapes(model: base.Model) -> Variables:
    """Returns the variables of a model as `jax.ShapeDtypeStruct`s. They don't depend on the size of images."""
    shapes: Variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    return shapes


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of the models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter([*_MODELS, *MODELS.names()], pattern))


def options_of(name: str) -> tuple[str, ...]:
    """Returns which of width, depth and activation a model follows."""
    return _architecture(name).options


def create_model(name: str, num_classes: int, *, norm: NormConfig = _DEFAULT_NORM, **overrides: Any) -> Model:
    """Builds a model by name.

    Args:
      name: one of `list_models`.
      num_classes: number of logits, at least 2.
      norm: options of batch norm.
      **overrides: fields of `config.ModelConfig`, such as ``width=0.35``.

    Raises:
      UserError: for an unknown name or option, or an invalid value.
    """
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"name", "num_classes"}
    for key in overrides:
        if key not in fields:
            raise UserError(f"unknown model option {key!r}{nearest(key, fields)}")
    tree = {"model": {"name": name, "num_classes": num_classes, **overrides}, "norm": dataclasses.asdict(norm)}
    settings = config.build(tree)
    return from_config(settings.model, settings.norm)


def from_config(model: ModelConfig, norm: NormConfig) -> Model:
    """Builds the model of a config whose ``num_classes`` is set.

    Raises:
      UserError: for an unknown name or an invalid value.
    """
    architecture = _architecture(model.name)
    if model.num_classes is None:
        raise UserError("model.num_classes is not set; a network needs the number of classes")
    _check_options(model, architecture)
    if model.name not in _MODELS:
        check_plan(model.name, architecture.plan(model))
    return Model(model.name, model.num_classes, Network(model, norm, architecture.plan))


def for_classes(model: ModelConfig, norm: NormConfig, num_classes: int) -> Model:
    """Builds the model of a config with a number of classes, whatever the config says of that; see `from_config`."""
    return from_config(dataclasses.replace(model, num_classes=num_classes), norm)


def _check_options(model: ModelConfig, architecture: Architecture) -> None:
    """Refuses an option that the network doesn't have."""
    if model.width_rule not in architecture.width_rules:
        raise UserError(
            f"model.width_rule={model.width_rule!r}: {model.name} has no such rule; give one of:"
            f" {', '.join(architecture.width_rules)}"
        )
    if model.reduced_tail is not None and model.reduced_tail not in architecture.reduced_tails:
        having = [name for name, other in _MODELS.items() if model.reduced_tail in other.reduced_tails]
        raise UserError(
            f"model.reduced_tail={model.reduced_tail!r}: {model.name} has no such tail; these models have it:"
            f" {', '.join(having)}"
        )
    default = ModelConfig()
    for option in _OPTIONS:
        value = getattr(model, option)
        if option not in architecture.options and value != getattr(default, option):
            having = [name for name, other in _MODELS.items() if option in other.options]
            raise UserError(
                f"model.{option}={value!r}: {model.name} has no option {option}; these models have it:"
                f" {', '.join(having)}"
            )
