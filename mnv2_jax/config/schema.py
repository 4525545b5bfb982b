"""Every option with its type, default, unit and meaning."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network. Names are those of `models.registry`."""

    name: str = "mobilenet_v2"
    width: float = 1.0
    """Width multiplier, > 0."""
    width_rule: Literal["standard", "corenet", "divisor4", "torchvision", "fixed_stem_head", "keras"] = "standard"
    """How widths round and what they leave alone; each family's `plan` in `models` says which it has. corenet is also
    without the activation after V1's depthwise convolutions, as CoreNet's network."""
    depth: float = 1.0
    """Multiplier of the blocks of a stage; mobilenet_v2."""
    activation: Literal["relu", "relu6"] | None = None
    """Unset: the family's; mobilenet_v1, mobilenet_v2."""
    num_classes: int | None = None
    """Unset: counted in the data."""
    strides: tuple[int, ...] = (2, 2, 2, 2, 2)
    """1 or 2, at the five places where the published network halves its map, the stem first. For small images:
    (1, 1, 2, 2, 2) gives 4×4 for 32 px, (2, 2, 2, 1, 2) 2×2, (1, 2, 2, 2, 2) 4×4 for 64."""
    output_stride: Literal[8, 16, 32] = 32
    """Largest ratio of input to feature map; strides beyond it become dilation."""
    padding: Literal["same", "symmetric", "keras_v1"] = "same"
    """same: TensorFlow, Keras, slim. symmetric: PyTorch. keras_v1: as same, but depthwise convolutions with a stride
    pad after the map only, whatever its size (Keras' MobileNet)."""
    dropout: float = 0.2
    """Share of the pooled features that is dropped in training, in [0, 1)."""
    init: Literal["truncated_normal", "kaiming_fan_out", "kaiming_fan_out_grouped"] = "kaiming_fan_out_grouped"
    """TF-slim's, torchvision's, timm's; see `nn.conv.conv_init`."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type; parameters, statistics, logits and losses are at least float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What the weights are before the first step."""

    weights: str | None = None
    """A file of weights (ours, or of torchvision, timm, CoreNet, Keras, TFLite), the folder of a run, or a name such as
    timm/mobilenetv2_100.ra_in1k. Unset: random."""
    head: Literal["load", "new"] = "load"
    """new: a random classifier, for other classes than those of the weights."""


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
    init: InitConfig = InitConfig()
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

    @property
    def linear_lr(self) -> float:
        """The recipe's learning rate, scaled linearly to the batch (Goyal et al., arXiv:1706.02677, 2.1)."""
        return self.optim.reference_lr * (self.data.batch_size / self.optim.reference_batch_size)


MAY_DIFFER = ("log.", "checkpoint.", "data.path", "data.num_workers", "data.eval_batch_size")
"""Prefixes of the keys that may differ when a run is continued: none changes a bit of what is trained."""


def to_dict(config: Config) -> dict[str, Any]:
    """The nested dict of a `Config`, fit for JSON (tuples become lists)."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


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
