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
    drop_path: float = 0.0
    """Stochastic depth: share of the examples for which the last residual branch is left out in training, in [0, 1)."""
    drop_path_rule: Literal["linear", "flat", "timm", "tf_model_garden"] = "linear"
    """linear: from 0 at the first block to `drop_path` at the last (Huang et al., arXiv:1603.09382); flat: in all;
    timm: from 0, short of `drop_path` at the last; tf_model_garden: in all attention blocks, and growing over stem,
    other blocks and head."""
    init: Literal[
        "truncated_normal",
        "kaiming_fan_out",
        "kaiming_fan_out_grouped",
        "torchvision_v3",
        "torchvision_resnet",
        "timm",
        "efficientnet_jax",
        "corenet_v3",
        "tf_model_garden",
    ] = "kaiming_fan_out_grouped"
    """How each kind of layer begins: a row of `nn.initializers.INITS`, which says what it is and whose."""
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
    """digits, cifar10, imagenet, folder or tfds:NAME; to evaluate on imagenet_v2, imagenet_r, imagenet_a or
    imagenet_sketch."""
    path: str | None = None
    """Directory or .tar, or what `data.prepare` wrote; for TFDS its data_dir."""
    resolution: int = 224
    """Height and width of what the network sees, in pixels."""
    scales: tuple[int, ...] = ()
    """Set: each training batch has one of these resolutions, drawn anew, and as many images as keep its pixels at those
    of `batch_size` images of `resolution` (CoreNet's variable batch sampler)."""
    eval_resolution: int | None = None
    """Of evaluation; unset: `resolution`."""
    batch_size: int = 96
    """Images a step, over all devices."""
    eval_batch_size: int = 128
    """At most this many images an evaluation step; the result doesn't depend on it."""
    eval_split: str | None = None
    """By any name that such a split has (valid, dev, testing …). Unset: val, or test where there is no val."""
    holdout_fraction: float = 0.0
    """> 0: this share of the training images (stratified) is kept out of training and evaluated on instead."""
    crop: Literal["random_resized", "shift", "none"] = "random_resized"
    """Training crop. shift: pad by `pad_pixels` zeros on each side, then crop back at random."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random-resized crop."""
    crop_draw: Literal["torchvision", "tensorflow", "model_garden"] = "torchvision"
    """How area and ratio of the random-resized crop are drawn; see `data.images.draw_crop`."""
    pad_pixels: int = 4
    flip: bool = True
    eval_crop: Literal["resize_crop", "central"] = "resize_crop"
    """resize_crop: short side to resolution / fraction, then the centre (PyTorch). central: the central
    fraction of each side, then resized without keeping the aspect (TF-slim)."""
    eval_crop_fraction: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    """Where images shrink, whether all pixels that one of the result covers count (Pillow, torchvision, timm) or only
    the 2 (bicubic: 4) a side that are nearest to its centre (TensorFlow, Keras)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channels are normalised as (x / 255 - mean) / std."""
    num_workers: int | None = None
    """Processes that decode image files; unset: one a CPU core, 0: none."""
    skip_corrupt: bool = False
    """An image that can't be decoded is replaced by the next one that can in training, left out of an evaluation, and
    counted and named, instead of ending the run."""

    @property
    def seen_resolution(self) -> int:
        """What evaluation, and so whoever uses the weights, sees: `eval_resolution` or else `resolution`."""
        return self.eval_resolution or self.resolution


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to training images beyond crop and flip, each by (seed, epoch, index)."""

    policy: Literal[
        "none", "autoaugment", "autoaugment_tf", "randaugment", "randaugment_timm", "randaugment_tf", "trivialaugment"
    ] = "none"
    """Operations on the uint8 image in the workers: torchvision's AutoAugment (IMAGENET), TF model garden's (v0),
    RandAugment of torchvision, timm and TF model garden, TrivialAugment (wide); see `data.policies`."""
    policy_layers: int = 2
    """randaugment*: operations an image."""
    policy_magnitude: float = 9.0
    """randaugment*: whole numbers from 0 to 30 (torchvision), 0 to 10 (timm), 0 to 30 (TF, whose tables are for 10)."""
    policy_magnitude_std: float = 0.0
    """randaugment_timm: of the normal deviate added to the magnitude; above 100: it is drawn uniformly from 0 up."""
    policy_increasing: bool = False
    """randaugment_timm: every operation gets stronger with the magnitude (timm's inc1)."""
    policy_probability: float = 1.0
    """randaugment_timm, randaugment_tf: with which each operation is applied."""
    policy_excluded: tuple[str, ...] = ()
    """randaugment*: operations that are left out, by the names in `data.policies`."""
    color: Literal["none", "inception", "jitter"] = "none"
    """inception: random brightness (±32/255) and saturation (0.5 to 1.5) in random order, as TF-slim's fast mode.
    jitter: torchvision's ColorJitter."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.0)
    """jitter: brightness, contrast, saturation (factors 1 - x to 1 + x), hue (±, at most 0.5 turns)."""
    rotation_degrees: float = 0.0
    """Rotated about the centre by up to ± this, bilinearly; what comes in from outside repeats the edge."""
    shift_fraction: float = 0.0
    """Then shifted by up to ± this share of the height and, drawn by itself, of the width (Keras' RandomTranslation),
    in one resampling with the rotation; the edge is repeated, too."""
    erase_probability: float = 0.0
    """Random erasing (Zhong et al., arXiv:1708.04896): with which a rectangle is erased, after normalisation."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    erase_fill: Literal["zero", "noise"] = "zero"
    """noise: each pixel from a normal distribution (timm's `pixel`)."""
    mixup_alpha: float = 0.0
    """> 0: images and labels are mixed by a share drawn from Beta(alpha, alpha) (Zhang et al., arXiv:1710.09412)."""
    cutmix_alpha: float = 0.0
    """> 0: a rectangle comes from another image (Yun et al., arXiv:1905.04899)."""
    mix_probability: float = 1.0
    """With which a batch is mixed at all."""
    cutmix_share: float = 0.5
    """Where mixup and cutmix are both set: the share of mixed batches that gets cutmix."""
    repeats: int = 1
    """Repeated augmentation (Hoffer et al., arXiv:1901.09335): each image that is drawn stands so often in a batch; an
    epoch has as many images as without."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Softmax cross-entropy."""

    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: an example counts n / (k * images of its class), so that every class counts the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher's predictions as further targets (Hinton et al., arXiv:1503.02531)."""

    teacher: str | None = None
    """As `init.weights`: a file of weights, the folder of a run, or a name. It sees what the student sees."""
    teacher_model: str | None = None
    """Which network a foreign file holds; unset: the file says it."""
    logits: str | None = None
    """Instead of a teacher: logits stored once an image by `python -m mnv2_jax.predict --store-logits`."""
    temperature: float = 1.0
    weight: float = 0.5
    """Of the soft targets' loss; 1 - weight is that of the labels'."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What of a network is trained, and how fast."""

    train_from: tuple[str, ...] = ("stem",)
    """A name for each stage: this part of the network (stem, block_1, …, head, hidden, classifier) and what comes after
    it are trained. What comes before is frozen: no gradient, and its norms use and keep their running statistics."""
    unfreeze_epochs: tuple[float, ...] = ()
    """When the second stage begins, the third, and so on."""
    backbone_lr_factor: float = 1.0
    """Learning rate of all but the classifier, as a share of the schedule's."""


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
    rms_init: float = 1.0
    """rmsprop: of the mean square; 1 in TF1 and timm, 0 in Keras and PyTorch."""
    epsilon_in_sqrt: bool = True
    """rmsprop: TensorFlow, Keras, timm; not PyTorch."""
    lr_in_momentum: bool = True
    """rmsprop: the momentum adds up updates (TensorFlow, Keras, timm); False: it adds up scaled gradients (PyTorch)."""
    b1: float = 0.9
    """adamw."""
    b2: float = 0.999
    """adamw."""
    epsilon: float = 1e-8
    """rmsprop (see `epsilon_in_sqrt`), adamw (outside the root)."""
    weight_decay: float = 0.0
    """sgd, rmsprop: L2 added to the gradient. adamw: decoupled, times the learning rate."""
    weight_decay_on: Literal["all", "no_norm", "no_norm_bias", "no_depthwise"] = "no_norm_bias"
    """no_norm: biases of other layers are decayed. no_depthwise: not norms, biases and depthwise kernels."""
    l2: float = 0.0
    """adamw: L2 added to the gradient besides, on the same parameters."""
    schedule: Literal["constant", "cosine", "exponential", "step"] = "cosine"
    warmup_epochs: float = 0.0
    """Linear from warmup_init_lr to the peak."""
    warmup_steps: int | None = None
    """Set: instead of `warmup_epochs`."""
    update_every: Literal["step", "epoch"] = "step"
    """epoch: the learning rate stands still in between, and only a warm-up in steps moves by the step."""
    warmup_init_lr: float = 0.0
    warmup_to: Literal["peak", "schedule"] = "peak"
    """schedule: what the schedule has come to when the warm-up ends (TF model garden)."""
    final_lr: float = 0.0
    """cosine: what it ends at."""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """Where the cosine begins. warmup: at its end (torchvision); start: of training, of which the warm-up takes the
    first part (timm, CoreNet, TF model garden)."""
    decay_factor: float = 0.98
    """exponential, step: what each decay multiplies by."""
    decay_every_epochs: float = 1.0
    """exponential."""
    decay_every_steps: int | None = None
    """exponential. Set: instead of `decay_every_epochs`."""
    lr_noise: tuple[float, float] | None = None
    """From this share of the training to that one the learning rate of each epoch is multiplied by 1 + noise, normal
    within ±0.67 (timm's --lr-noise)."""
    staircase: bool = True
    """exponential: in jumps (True) or smoothly."""
    milestones_epochs: tuple[float, ...] = ()
    """step: when it decays."""
    clip_grad_norm: float | None = None
    accumulate_steps: int = 1
    """Microbatches a step; batch-norm groups stay within a microbatch."""
    ema_decay: float | None = None
    """Set: evaluation uses the exponential moving average of weights and batch-norm statistics."""
    ema_every_steps: int = 1
    """How often the average takes in the weights."""
    ema_warmup: bool = True
    """As TensorFlow with num_updates: decay = min(ema_decay, (1 + step) / (10 + step))."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long. `steps` wins where both are set."""

    epochs: float = 1.0
    steps: int | None = None
    """Unset: epochs * training images / batch_size (with `data.scales` the mean one), rounded."""
    eval_every_epochs: float = 1.0
    """Also evaluated at the end. 0: only there."""
    patience: int | None = None
    """Set: training ends after so many evaluations without a better top-1 than before. Whoever uses the run then gets
    its best checkpoint, unless another is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """May differ between a run and its resumption."""

    every_steps: int = 50
    tensorboard: bool = True
    batch_hash: bool = False
    """Logs a number that says whether two runs were fed the same batches, on any devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """May differ between a run and its resumption."""

    every_steps: int = 1000
    """Also saved at the end of each evaluation, at a signal and at the end."""
    keep_latest: int = 2
    keep_best: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """When a process gives up; it then ends with exit code 75. May differ between a run and its resumption."""

    start_timeout_s: float = 300.0
    """In which all processes must have come, and again have opened the data."""
    heartbeat_timeout_s: int = 60
    """A process that wasn't heard of for so long is lost, and the others end."""
    step_timeout_s: float | None = None
    """In which a step, a batch of evaluation and a checkpoint must be done. Unset: 600 with several processes, which
    would wait for a stuck one for ever; no limit with one, until a signal asks it to stop."""
    compile_timeout_s: float = 3600.0
    """In place of it where something may be compiled, or is read: a batch, a checkpoint. Read where `step_timeout_s`
    holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment."""

    seed: int = 0
    """Of the initial weights, the data order, augmentation and dropout."""
    task: str = "classification"
    """What is learnt: a name that `tasks.base.register_task` has made known."""
    modules: tuple[str, ...] = ()
    """Modules outside the package that register what the config names; filled in where they are imported by then."""
    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    norm: NormConfig = NormConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()

    @property
    def usual_checkpoint(self) -> Literal["latest", "best"]:
        """Which one of the run is used where none is asked for: the latest, unless it is known to be past the best."""
        return "latest" if self.train.patience is None else "best"

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up; always set once `build` has resolved the config."""
        assert self.optim.peak_lr is not None
        return self.optim.peak_lr

    @property
    def linear_lr(self) -> float:
        """The recipe's learning rate, scaled linearly to the batch (Goyal et al., arXiv:1706.02677, 2.1)."""
        return self.optim.reference_lr * (self.data.batch_size / self.optim.reference_batch_size)


MAY_DIFFER = (
    "log.",
    "checkpoint.",
    "faults.",
    "data.path",
    "data.num_workers",
    "data.eval_batch_size",
    "data.skip_corrupt",
)
"""Prefixes of the keys that may differ when a run is continued: none changes a bit of what is trained, unless an image
is damaged, where a run without `data.skip_corrupt` can't go on at all."""

GONE: Mapping[str, Any] = {"optim.trust_clip": False}
"""Keys of older versions, each with what it was where nothing was said: there, it is passed over."""


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
