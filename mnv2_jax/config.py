"""The one configuration record of a run: frozen dataclasses, built strictly from a file and flags.

    configs/w1_0.py:data=cifar10  +  --config.optim.peak_lr=0.2   ->   Config

A key that no dataclass declares, a value of the wrong type and a value out of range are a `UserError` of one
line that names the key. Code reads attributes of `Config` and nothing else, so an option can't be misspelt.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import math
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mnv2_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network. Names are those of `models.registry`."""

    name: str = "mobilenet_v2"
    width: float = 1.0
    """Width multiplier, > 0."""
    width_rule: Literal["standard", "corenet", "divisor4"] = "standard"
    num_classes: int | None = None
    """Unset: counted in the data."""
    stem_stride: int = 2
    stage_strides: tuple[int, ...] | None = None
    """Unset: the paper's. The table for small images is in `models.mobilenet_v2`."""
    output_stride: Literal[8, 16, 32] = 32
    """Largest ratio of input to feature map; strides beyond it become dilation."""
    padding: Literal["same", "symmetric"] = "same"
    """`same`: TensorFlow, Keras, slim. `symmetric`: PyTorch."""
    dropout: float = 0.2
    """Share of the pooled features that is dropped in training, in [0, 1)."""
    init: Literal["truncated_normal", "kaiming_fan_out", "kaiming_fan_out_grouped"] = "kaiming_fan_out_grouped"
    """TF-slim's, torchvision's, timm's; see `nn.conv.conv_init`."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type; parameters, statistics, logits and losses are at least float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Grouped batch norm (`nn.norm`)."""

    group_size: int = 32
    """Images whose statistics are taken together; a hyperparameter, not a property of the hardware."""
    decay: float = 0.9
    """Of the running statistics, per step: TensorFlow's momentum, 1 - PyTorch's."""
    epsilon: float = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they become batches."""

    name: str = "imagenet"
    """digits, cifar10, imagenet, folder or tfds:NAME."""
    path: str | None = None
    """Directory or .tar; for TFDS its data_dir."""
    resolution: int = 224
    """Height and width of what the network sees, in pixels."""
    batch_size: int = 96
    """Images a step, over all devices."""
    eval_batch_size: int = 128
    """At most this many images an evaluation step; the result doesn't depend on it."""
    eval_split: str | None = None
    """Unset: val, or test where there is no val."""
    holdout_fraction: float = 0.0
    """> 0: this share of the training images (stratified) is kept out of training and evaluated on instead."""
    crop: Literal["random_resized", "shift", "none"] = "random_resized"
    """Training crop. shift: pad by `pad_pixels` zeros on each side, then crop back at random."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random-resized crop."""
    pad_pixels: int = 4
    flip: bool = True
    color: Literal["none", "inception"] = "none"
    """inception: random brightness (±32/255) and saturation (0.5 to 1.5) in random order, as TF-slim's fast mode."""
    eval_crop: Literal["resize_crop", "central"] = "resize_crop"
    """resize_crop: short side to resolution / fraction, then the centre (PyTorch). central: the central
    fraction of each side, then resized without keeping the aspect (TF-slim)."""
    eval_crop_fraction: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channels are normalised as (x / 255 - mean) / std."""
    num_workers: int | None = None
    """Processes that decode image files; unset: one a CPU core, 0: none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Softmax cross-entropy."""

    label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule; times are in epochs and need not be whole."""

    name: Literal["sgd", "rmsprop", "adamw"] = "sgd"
    peak_lr: float | None = None
    """Unset: reference_lr * (batch_size / reference_batch_size)."""
    reference_lr: float = 0.1
    reference_batch_size: int = 128
    momentum: float = 0.9
    """sgd, rmsprop."""
    nesterov: bool = False
    """sgd."""
    rms_decay: float = 0.9
    """rmsprop."""
    b1: float = 0.9
    """adamw."""
    b2: float = 0.999
    """adamw."""
    epsilon: float = 1e-8
    """rmsprop (inside the root), adamw (outside it)."""
    weight_decay: float = 0.0
    """sgd, rmsprop: L2 added to the gradient. adamw: decoupled, times the learning rate."""
    weight_decay_on: Literal["all", "no_norm_bias", "no_depthwise"] = "no_norm_bias"
    """no_depthwise: nor on norms, biases and depthwise kernels."""
    schedule: Literal["constant", "cosine", "exponential", "step"] = "cosine"
    warmup_epochs: float = 0.0
    """Linear from warmup_init_lr to the peak."""
    warmup_init_lr: float = 0.0
    final_lr: float = 0.0
    """cosine: what it ends at."""
    decay_factor: float = 0.98
    """exponential, step: what each decay multiplies by."""
    decay_every_epochs: float = 1.0
    """exponential."""
    staircase: bool = True
    """exponential: in jumps (True) or smoothly."""
    milestones_epochs: tuple[float, ...] = ()
    """step: when it decays."""
    clip_grad_norm: float | None = None
    accumulate_steps: int = 1
    """Microbatches a step; batch-norm groups stay within a microbatch."""
    ema_decay: float | None = None
    """Set: evaluation uses the exponential moving average of weights and batch-norm statistics."""
    ema_warmup: bool = True
    """As TensorFlow with num_updates: decay = min(ema_decay, (1 + step) / (10 + step))."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long. `steps` wins where both are set."""

    epochs: float = 1.0
    steps: int | None = None
    """Unset: epochs * training images / batch_size, rounded."""
    eval_every_epochs: float = 1.0
    """Also evaluated at the end. 0: only there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """May differ between a run and its resumption."""

    every_steps: int = 50
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """May differ between a run and its resumption."""

    every_steps: int = 1000
    """Also saved at the end of each evaluation, at a signal and at the end."""
    keep_latest: int = 2
    keep_best: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment."""

    seed: int = 0
    """Of the initial weights, the data order, augmentation and dropout."""
    model: ModelConfig = ModelConfig()
    norm: NormConfig = NormConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up; always set once `build` has resolved the config."""
        assert self.optim.peak_lr is not None
        return self.optim.peak_lr


MAY_DIFFER = ("log.", "checkpoint.", "data.path", "data.num_workers", "data.eval_batch_size")
"""Prefixes of the keys that may differ when a run is continued: none changes a bit of what is trained."""


def load(spec: str, overrides: Sequence[str] = ()) -> tuple[str, Config]:
    """Reads ``FILE.py[:ARG]`` or ``FILE.json`` and applies overrides.

    Args:
      spec: the value of ``--config``.
      overrides: ``a.b=value`` each; later ones win. A value is a Python literal or else a string.

    Returns:
      The name of the config (the file's stem; the run's folder for a ``config.json``) and the `Config`.

    Raises:
      UserError: on anything that can't be read, isn't declared, or is out of range.
    """
    path_text, _, arg = spec.partition(":")
    path = pathlib.Path(path_text)
    if path.suffix not in (".py", ".json"):
        raise UserError(f"--config={spec}: expected a .py or .json file, as in --config=configs/w1_0.py")
    if not path.is_file():
        siblings = [str(p) for pattern in ("*.py", "*.json") for p in path.parent.glob(pattern)]
        hint = nearest(path_text, siblings) if siblings else "; no config is there"
        if not path.parent.is_dir():
            hint = f"; there is no folder {str(path.parent)!r} here"
        raise UserError(f"--config={spec}: no file {path_text!r}{hint}")
    if path.suffix == ".json":
        if arg:
            raise UserError(f"--config={spec}: a .json config takes no argument; use --config.KEY=VALUE")
        tree = read_json(path)
        _forget_derived(tree)
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
    else:
        tree, name = _run_python(path, arg), path.stem
    for override in overrides:
        _set(tree, override)
    return name, build(tree)


def build(tree: Mapping[str, Any]) -> Config:
    """Turns a nested mapping into a checked `Config` with `peak_lr` filled in.

    Raises:
      UserError: naming the key, for an unknown key, a wrong type or an impossible value.
    """
    config: Config = _build(Config, tree, "")
    _check(config)
    optim = config.optim
    if optim.peak_lr is None:
        peak_lr = optim.reference_lr * (config.data.batch_size / optim.reference_batch_size)
        config = dataclasses.replace(config, optim=dataclasses.replace(optim, peak_lr=peak_lr))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The nested dict of a `Config`, fit for JSON (tuples become lists)."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: if the file isn't one.
    """
    try:
        tree = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore it or give another file") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def differences(old: Config, new: Config) -> list[str]:
    """``key: old -> new`` for every key that differs and decides what is trained (see `MAY_DIFFER`)."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return [
        f"{key}: {before[key]!r} -> {after[key]!r}"
        for key in before
        if before[key] != after[key] and not key.startswith(MAY_DIFFER)
    ]


def check_devices(config: Config, num_devices: int) -> None:
    """Refuses a batch that the devices, the accumulation or the norm groups don't divide.

    Raises:
      UserError: with the nearest valid value.
    """
    batch, group, accumulate = config.data.batch_size, config.norm.group_size, config.optim.accumulate_steps
    pieces = num_devices * accumulate
    if batch % pieces:
        below, above = batch // pieces * pieces, -(-batch // pieces) * pieces
        best = above if not below or above - batch <= batch - below else below
        raise UserError(
            f"data.batch_size={batch} does not divide over {num_devices} devices"
            f" x {accumulate} accumulation steps; the nearest that does: {best}"
        )
    share = batch // pieces
    if share % group:
        best = min((d for d in range(1, share + 1) if share % d == 0), key=lambda d: (abs(d - group), -d))
        raise UserError(
            f"norm.group_size={group} does not divide the {share} images of data.batch_size={batch} that each of"
            f" {num_devices} devices takes at once; the nearest that does: {best}"
        )


# --- strict building ---------------------------------------------------------------------------------------


def _run_python(path: pathlib.Path, arg: str) -> dict[str, Any]:
    """Runs ``get_config(arg)`` of a config file."""
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return typing.cast(dict[str, Any], module.get_config(arg).to_dict())
    except UserError as error:
        raise UserError(f"--config={path}{':' + arg if arg else ''}: {error}") from error
    except Exception as error:
        raise UserError(f"--config={path}: {type(error).__name__} in the config file: {error}") from error


def _forget_derived(tree: dict[str, Any]) -> None:
    """Unsets the learning rate of a run's config if it is what the batch size made it, so that it follows a new one."""
    optim, data = tree.get("optim"), tree.get("data")
    if isinstance(optim, dict) and isinstance(data, dict):
        try:
            derived = optim["reference_lr"] * (data["batch_size"] / optim["reference_batch_size"])
        except (KeyError, TypeError, ZeroDivisionError):
            return  # `build` will say what is wrong
        if optim.get("peak_lr") == derived:
            del optim["peak_lr"]


def _set(tree: dict[str, Any], override: str) -> None:
    """Writes ``a.b=value`` into the nested dict; unknown keys are left for `build` to refuse."""
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--config.{key}: expected --config.{key}=VALUE")
    *parents, leaf = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--config.{key}: {'.'.join(parents[: depth + 1])!r} is a value, not a section")
    try:
        value = ast.literal_eval(text)
        if isinstance(value, dict):
            raise UserError(f"--config.{key}: {key!r} is a section; set one of its keys")
        node[leaf] = value
    except (ValueError, SyntaxError):
        node[leaf] = {"true": True, "false": False}.get(text.lower(), text)


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"config key {prefix[:-1]!r} is a section, not a value ({tree!r}); set one of its keys")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise UserError(f"unknown config key {prefix + key!r}{_suggest(prefix + key)}")
        hint = hints[key]
        is_section = dataclasses.is_dataclass(hint)
        values[key] = _build(hint, value, f"{prefix}{key}.") if is_section else _typed(prefix + key, value, hint)
    return cls(**values)


def _suggest(key: str) -> str:
    """The nearest declared key: of the same section where there is one that is close, else of all."""
    every = flatten(dataclasses.asdict(Config()))
    section = key.rpartition(".")[0]
    siblings = {k for k in every if k.rpartition(".")[0] == section}
    hint = nearest(key, siblings) if siblings else ""
    return hint if "did you mean" in hint else nearest(key, every)


def _typed(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the declared type, or a `UserError`; only int -> float and list -> tuple are converted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value in (None, "none", "null"):  # as a command line may have it
            return None
        return _typed(key, value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise UserError(f"{key}={value!r} is not a choice{nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        if len(kinds) != len(value):
            raise UserError(f"{key}={value!r} has {len(value)} entries; expected {len(kinds)}")
        return tuple(_typed(key, item, kind) for item, kind in zip(value, kinds, strict=True))
    if hint is str and isinstance(value, int | float):  # a folder may be called 123
        value = str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint if origin is None else origin) or (isinstance(value, bool) and hint is not bool):
        wanted = getattr(hint, "__name__", str(hint)) if origin is None else "a tuple"
        raise UserError(f"{key}={value!r} is {type(value).__name__}; expected {wanted}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{key}={value!r} is not finite")
    return value


# --- ranges: (key, lowest, highest, whether the lowest itself is allowed) -----------------------------------

_INF = math.inf
_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("seed", 0, 2**31 - 1, True),
    ("model.width", 0, 16, False),
    ("model.num_classes", 2, _INF, True),
    ("model.stem_stride", 1, 2, True),
    ("model.dropout", 0, 0.999, True),
    ("norm.group_size", 1, _INF, True),
    ("norm.decay", 0, 0.99999, True),
    ("norm.epsilon", 0, 1, False),
    ("data.resolution", 8, 4096, True),
    ("data.batch_size", 1, _INF, True),
    ("data.eval_batch_size", 1, _INF, True),
    ("data.holdout_fraction", 0, 0.9, True),
    ("data.pad_pixels", 0, 1024, True),
    ("data.eval_crop_fraction", 0, 1, False),
    ("data.num_workers", 0, 1024, True),
    ("loss.label_smoothing", 0, 0.999, True),
    ("optim.peak_lr", 0, _INF, False),
    ("optim.reference_lr", 0, _INF, False),
    ("optim.reference_batch_size", 1, _INF, True),
    ("optim.momentum", 0, 0.99999, True),
    ("optim.rms_decay", 0, 0.99999, True),
    ("optim.b1", 0, 0.99999, True),
    ("optim.b2", 0, 0.999999, True),
    ("optim.epsilon", 0, 10, False),
    ("optim.weight_decay", 0, 10, True),
    ("optim.warmup_epochs", 0, _INF, True),
    ("optim.warmup_init_lr", 0, _INF, True),
    ("optim.final_lr", 0, _INF, True),
    ("optim.decay_factor", 0, 1, False),
    ("optim.decay_every_epochs", 0, _INF, False),
    ("optim.clip_grad_norm", 0, _INF, False),
    ("optim.accumulate_steps", 1, _INF, True),
    ("optim.ema_decay", 0, 0.9999999, True),
    ("train.epochs", 0, _INF, False),
    ("train.steps", 1, _INF, True),
    ("train.eval_every_epochs", 0, _INF, True),
    ("log.every_steps", 1, _INF, True),
    ("checkpoint.every_steps", 1, _INF, True),
    ("checkpoint.keep_latest", 1, _INF, True),
    ("checkpoint.keep_best", 0, _INF, True),
)


def _check(config: Config) -> None:
    flat = flatten(dataclasses.asdict(config))
    for key, low, high, closed in _RANGES:
        value = flat[key]
        if value is None:
            continue
        high = min(high, 2**31 - 1) if isinstance(value, int) else high
        if value < low or value > high or (value == low and not closed):
            bound = f"at least {low:g}" if closed else f"greater than {low:g}"
            upper = "" if high == _INF else f" and at most {high:g}"
            raise UserError(f"{key}={value!r} is out of range; it must be {bound}{upper}")
    data, optim, train = config.data, config.optim, config.train
    for key, (low, high) in (("data.crop_area", data.crop_area), ("data.crop_ratio", data.crop_ratio)):
        if not 0 < low <= high:
            raise UserError(f"{key}={[low, high]} must be two growing numbers above 0")
    if data.crop_area[1] > 1:
        raise UserError(f"data.crop_area={list(data.crop_area)} must not exceed the whole image, 1.0")
    if min(data.std) <= 0:
        raise UserError(f"data.std={list(data.std)} must be greater than 0")
    if any(stride not in (1, 2) for stride in config.model.stage_strides or ()):
        raise UserError(f"model.stage_strides={list(config.model.stage_strides or ())} must be of 1 and 2")
    if train.steps is None and optim.warmup_epochs > train.epochs:
        raise UserError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} is longer than train.epochs={train.epochs:g};"
            f" the most it can be: {train.epochs:g}"
        )
    if data.holdout_fraction and data.eval_split:
        raise UserError(
            f"data.eval_split={data.eval_split!r} and data.holdout_fraction={data.holdout_fraction:g} both say what is"
            " evaluated; set one of them to none or 0"
        )
    if optim.schedule == "step" and not optim.milestones_epochs:
        raise UserError("optim.schedule='step' needs optim.milestones_epochs, as in (60, 120, 160)")
    if list(optim.milestones_epochs) != sorted(set(optim.milestones_epochs)):
        raise UserError(f"optim.milestones_epochs={list(optim.milestones_epochs)} must grow")
