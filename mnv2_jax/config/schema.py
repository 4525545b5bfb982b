"""Every option: its type, default, unit, meaning, which values it can have, and with which others it is read.

Whoever adds one adds it here and reads it where it belongs: the command line, its help, a run's config.json and what is
refused follow from this file. What relates several options stands in `checks`.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from mnv2_jax.config.rules import Above, AtLeast, Ending, Growing, Within, read_unless, read_when


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network. Names are those of `models.registry`."""

    name: str = "mobilenet_v2"
    width: Annotated[float, Above(0, 16)] = 1.0
    """Multiplier of the channels."""
    width_rule: Literal["standard", "corenet", "divisor4", "torchvision", "fixed_stem_head", "keras"] = "standard"
    """How widths round and what they leave alone; each family's `plan` in `models` says which it has. corenet is also
    without the activation after V1's depthwise convolutions, as CoreNet's network."""
    depth: Annotated[float, Above(0, 8)] = 1.0
    """Multiplier of the blocks of a stage; mobilenet_v2."""
    activation: Literal["relu", "relu6"] | None = None
    """Unset: the family's; mobilenet_v1, mobilenet_v2."""
    num_classes: Annotated[int | None, AtLeast(2)] = None
    """Unset: counted in the data."""
    strides: Annotated[tuple[int, int, int, int, int], Within(1, 2)] = (2, 2, 2, 2, 2)
    """At the five places where the published network halves its map, the stem first. For small images:
    (1, 1, 2, 2, 2) gives 4×4 for 32 px, (2, 2, 2, 1, 2) 2×2, (1, 2, 2, 2, 2) 4×4 for 64."""
    output_stride: Literal[8, 16, 32] = 32
    """Largest ratio of input to feature map; strides beyond it become dilation."""
    padding: Literal["same", "symmetric", "keras_v1"] = "same"
    """same: TensorFlow, Keras, slim. symmetric: PyTorch. keras_v1: as same, but depthwise convolutions with a stride
    pad after the map only, whatever its size (Keras' MobileNet)."""
    dropout: Annotated[float, Within(0, 0.999)] = 0.2
    """Share of the pooled features that is dropped in training."""
    drop_path: Annotated[float, Within(0, 0.999), read_unless("model.name", "mobilenet_v1")] = 0.0
    """Stochastic depth: share of the examples for which the last residual branch is left out in training."""
    drop_path_rule: Annotated[
        Literal["linear", "flat", "timm", "tf_model_garden"], read_when("model.drop_path", Above(0))
    ] = "linear"
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
    """Weights before the first step."""

    weights: str | None = None
    """A file of weights (ours, or of torchvision, timm, CoreNet, Keras, TFLite), the folder of a run, or a name such as
    timm/mobilenetv2_100.ra_in1k. Unset: random."""
    head: Annotated[Literal["load", "new"], read_unless("init.weights", None)] = "load"
    """new: a random classifier, for other classes than those of the weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Grouped batch norm (`nn.norm`)."""

    group_size: Annotated[int, AtLeast(1)] = 32
    """Images whose statistics are taken together; a hyperparameter, not a property of the hardware."""
    decay: Annotated[float, Within(0, 0.99999), read_unless("finetune.train_from", ("classifier",))] = 0.9
    """Decay of the running statistics, per step: TensorFlow's momentum, 1 - PyTorch's."""
    epsilon: Annotated[float, Above(0, 1)] = 1e-3


_DECODED = (  # a folder of CIFAR-10 can hold images or an .npz file
    read_unless("data.name", "digits"),
    read_unless("data.name", "cifar10") | read_unless("data.path", Ending(".npz")),
)
_RESIZED = read_when("data.crop", "random_resized")
_SYNTHETIC = read_when("data.name", "synthetic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they become batches."""

    name: str = "imagenet"
    """digits, cifar10, imagenet, folder or tfds:NAME; to evaluate on imagenet_v2, imagenet_r, imagenet_a or
    imagenet_sketch; to try a machine synthetic, images made on the fly."""
    path: Annotated[str | None, read_unless("data.name", "digits", "synthetic")] = None
    """Directory or .tar, a list of files and labels (.csv, .tsv, .txt; `data.lists`), or what `data.prepare` wrote; for
    TFDS its data_dir. Digits come with scikit-learn."""
    image_root: str | None = None
    """Directory or .tar in which the files of a list are looked for. Unset: the folder of the list."""
    synthetic_classes: Annotated[int, Within(2, 1000), _SYNTHETIC] = 1000
    """Classes of synthetic images."""
    synthetic_images: Annotated[tuple[int, int], AtLeast(1), _SYNTHETIC] = (1_281_167, 50_000)
    """Synthetic images to train and to evaluate on; as many as ImageNet has."""
    resolution: Annotated[int, Within(8, 4096)] = 224
    """Height and width of what the network sees, in pixels."""
    scales: Annotated[tuple[int, ...], Within(8, 4096), Growing()] = ()
    """Set: each training batch has one of these resolutions, drawn anew, and as many images as keep its pixels at those
    of `batch_size` images of `resolution` (CoreNet's variable batch sampler)."""
    eval_resolution: Annotated[int | None, Within(8, 4096)] = None
    """Resolution of evaluation; unset: `resolution`."""
    batch_size: Annotated[int, AtLeast(1)] = 96
    """Images a step, over all devices."""
    eval_batch_size: Annotated[int, AtLeast(1)] = 128
    """At most this many images an evaluation step; the result doesn't depend on it."""
    eval_split: str | None = None
    """Split to evaluate on, by any of its names (valid, dev, testing …). Unset: val, or test where there is no val."""
    holdout_fraction: Annotated[float, Within(0, 0.9)] = 0.0
    """This share of the training images (stratified) is kept out of training and evaluated on instead. Images without
    splits are trained on with 0.2 where nothing else is said."""
    crop: Literal["random_resized", "shift", "none"] = "random_resized"
    """Crop of training images. shift: pad by `pad_pixels` zeros on each side, then crop back at random."""
    crop_area: Annotated[tuple[float, float], Above(0, 1), Growing(loosely=True), _RESIZED] = (0.08, 1.0)
    """The least and the largest share of the image that is cropped."""
    crop_ratio: Annotated[tuple[float, float], Within(0.01, 100), Growing(loosely=True), _RESIZED] = (3 / 4, 4 / 3)
    """The least and the largest width over height of the crop."""
    crop_draw: Annotated[Literal["torchvision", "tensorflow", "model_garden"], _RESIZED] = "torchvision"
    """How area and ratio of the crop are drawn; see `data.images.draw_crop`."""
    pad_pixels: Annotated[int, Within(0, 1024), read_when("data.crop", "shift")] = 4
    flip: bool = True
    """Half of the training images are mirrored, left to right."""
    eval_crop: Literal["resize_crop", "central"] = "resize_crop"
    """resize_crop: short side to resolution / fraction, then the centre (PyTorch). central: the central
    fraction of each side, then resized without keeping the aspect (TF-slim)."""
    eval_crop_fraction: Annotated[float, Within(0.01, 1)] = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    """Whether, where images shrink, all pixels that one of the result covers count (Pillow, torchvision, timm) or only
    the 2 (bicubic: 4) a side that are nearest to its centre (TensorFlow, Keras)."""
    mean: Annotated[tuple[float, float, float], Within(-255, 255)] = (0.485, 0.456, 0.406)
    """Means of red, green and blue, which run from 0 to 1."""
    std: Annotated[tuple[float, float, float], Within(0.001, 255)] = (0.229, 0.224, 0.225)
    """Channels are normalised as (x / 255 - mean) / std."""
    num_workers: Annotated[int | None, Within(0, 1024), *_DECODED] = None
    """Processes that decode image files; unset: one a CPU core, 0: none."""
    skip_corrupt: Annotated[bool, *_DECODED] = False
    """An image that can't be decoded is replaced by the next one that can in training, left out of an evaluation, and
    counted and named, instead of ending the run."""

    @property
    def seen_resolution(self) -> int:
        """Resolution of evaluation and of whoever uses the weights: `eval_resolution` or else `resolution`."""
        return self.eval_resolution or self.resolution


_RANDAUGMENT = read_when("augment.policy", "randaugment", "randaugment_timm", "randaugment_tf")
_TIMMS = read_when("augment.policy", "randaugment_timm")
_BY_CHANCE = read_when("augment.policy", "randaugment_timm", "randaugment_tf")
_JITTERS = read_when("augment.color", "jitter")
_ERASES = read_when("augment.erase_probability", Above(0))
_MIXUP, _CUTMIX = read_when("augment.mixup_alpha", Above(0)), read_when("augment.cutmix_alpha", Above(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images beyond crop and flip, each by (seed, epoch, index)."""

    policy: Literal[
        "none", "autoaugment", "autoaugment_tf", "randaugment", "randaugment_timm", "randaugment_tf", "trivialaugment"
    ] = "none"
    """Operations on the uint8 image in the workers: torchvision's AutoAugment (IMAGENET), TF model garden's (v0),
    RandAugment of torchvision, timm and TF model garden, TrivialAugment (wide); see `data.policies`."""
    policy_layers: Annotated[int, Within(1, 100), _RANDAUGMENT] = 2
    """Operations an image."""
    policy_magnitude: Annotated[float, Within(0, 30), _RANDAUGMENT] = 9.0
    """Whole numbers from 0 to 30 (torchvision), 0 to 10 (timm), 0 to 30 (TF, whose tables are for 10)."""
    policy_magnitude_std: Annotated[float, Within(0, 1000), _TIMMS] = 0.0
    """Standard deviation of a normal deviate added to the magnitude; above 100, the magnitude is uniform from 0 up."""
    policy_increasing: Annotated[bool, _TIMMS] = False
    """Every operation gets stronger with the magnitude (timm's inc1)."""
    policy_probability: Annotated[float, Within(0, 1), _BY_CHANCE] = 1.0
    """With which each operation is applied."""
    policy_excluded: Annotated[tuple[str, ...], _RANDAUGMENT] = ()
    """Operations that are left out, by the names in `data.policies`."""
    color: Literal["none", "inception", "jitter"] = "none"
    """inception: random brightness (±32/255) and saturation (0.5 to 1.5) in random order, as TF-slim's fast mode.
    jitter: torchvision's ColorJitter."""
    color_jitter: Annotated[tuple[float, float, float, float], AtLeast(0), _JITTERS] = (0.4, 0.4, 0.4, 0.0)
    """Brightness, contrast, saturation (factors 1 - x to 1 + x), hue (±, at most 0.5 turns)."""
    rotation_degrees: Annotated[float, Within(0, 180)] = 0.0
    """Rotated about the centre by up to ± this, bilinearly; what comes in from outside repeats the edge."""
    shift_fraction: Annotated[float, Within(0, 0.5)] = 0.0
    """Then shifted by up to ± this share of the height and, drawn by itself, of the width (Keras' RandomTranslation),
    in one resampling with the rotation; the edge is repeated, too."""
    erase_probability: Annotated[float, Within(0, 1)] = 0.0
    """Random erasing (Zhong et al., arXiv:1708.04896): with which a rectangle is erased, after normalisation."""
    erase_area: Annotated[tuple[float, float], Above(0, 1), Growing(loosely=True), _ERASES] = (0.02, 1 / 3)
    """The least and the largest share of the image that is erased."""
    erase_fill: Annotated[Literal["zero", "noise"], _ERASES] = "zero"
    """noise: each pixel from a normal distribution (timm's `pixel`)."""
    mixup_alpha: Annotated[float, Within(0, 100)] = 0.0
    """Images and labels are mixed by a share drawn from Beta(alpha, alpha) (Zhang et al., arXiv:1710.09412)."""
    cutmix_alpha: Annotated[float, Within(0, 100)] = 0.0
    """A rectangle comes from another image (Yun et al., arXiv:1905.04899)."""
    mix_probability: Annotated[float, Within(0, 1), _MIXUP | _CUTMIX] = 1.0
    """With which a batch is mixed at all."""
    cutmix_share: Annotated[float, Within(0, 1), _MIXUP, _CUTMIX] = 0.5
    """The share of mixed batches that gets cutmix, the others get mixup."""
    repeats: Annotated[int, Within(1, 64)] = 1
    """Repeated augmentation (Hoffer et al., arXiv:1901.09335): each image that is drawn stands so often in a batch; an
    epoch has as many images as without."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Softmax cross-entropy."""

    label_smoothing: Annotated[float, Within(0, 0.999), read_unless("distill.weight", 1.0)] = 0.0
    class_weights: Annotated[
        Literal["none", "balanced"] | tuple[tuple[str, float], ...], read_unless("distill.weight", 1.0)
    ] = "none"
    """balanced: an example counts n / (k * images of its class), so that every class counts the same. Or weights by the
    names of classes, as {cat: 3, dog: 0.5}, 1 for the others: in these proportions, an example counts 1 on average."""


_DISTILS = read_unless("distill.teacher", None) | read_unless("distill.logits", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher's predictions as further targets (Hinton et al., arXiv:1503.02531)."""

    teacher: str | None = None
    """Teacher, as in `init.weights`: a file of weights, a run's folder, or a name. It sees what the student sees."""
    teacher_model: Annotated[str | None, read_unless("distill.teacher", None)] = None
    """Which network a foreign file holds; unset: the file says it."""
    logits: str | None = None
    """Instead of a teacher: logits stored once an image by `python -m mnv2_jax.predict --store-logits`."""
    temperature: Annotated[float, Above(0, 1000), _DISTILS] = 1.0
    weight: Annotated[float, Within(0, 1), _DISTILS] = 0.5
    """Weight of the soft targets' loss; that of the labels' loss is 1 - weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Parts of a network that are trained, and how fast."""

    train_from: tuple[str, ...] = ("stem",)
    """A name for each stage: this part of the network (stem, block_1, …, head, hidden, classifier) and what comes after
    it are trained. What comes before is frozen: no gradient, and its norms use and keep their running statistics."""
    unfreeze_epochs: Annotated[tuple[float, ...], Above(0), Growing()] = ()
    """When the second stage begins, the third, and so on."""
    backbone_lr_factor: Annotated[float, Within(0, 100), read_unless("finetune.train_from", ("classifier",))] = 1.0
    """Learning rate of all but the classifier, as a share of the schedule's."""


_RMSPROP, _ADAMW = read_when("optim.name", "rmsprop"), read_when("optim.name", "adamw")
_WITH_MOMENTUM = read_when("optim.momentum", Above(0))
_DECAYS = read_when("optim.weight_decay", Above(0)) | read_when("optim.l2", Above(0))
_COSINE, _EXPONENTIAL = read_when("optim.schedule", "cosine"), read_when("optim.schedule", "exponential")
_WARMS_UP = read_when("optim.warmup_epochs", Above(0)) | read_when("optim.warmup_steps", Above(0))
_AVERAGES = read_unless("optim.ema_decay", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule; times are in epochs and need not be whole."""

    name: Literal["sgd", "rmsprop", "adamw"] = "sgd"
    peak_lr: Annotated[float | None, Above(0)] = None
    """Learning rate after the warm-up. Unset: reference_lr * (batch_size / reference_batch_size); `Config.peak_lr`."""
    reference_lr: Annotated[float, Above(0), read_when("optim.peak_lr", None)] = 0.1
    reference_batch_size: Annotated[int, AtLeast(1), read_when("optim.peak_lr", None)] = 128
    momentum: Annotated[float, Within(0, 0.99999), read_when("optim.name", "sgd", "rmsprop")] = 0.9
    nesterov: Annotated[bool, read_when("optim.name", "sgd"), _WITH_MOMENTUM] = False
    rms_decay: Annotated[float, Within(0, 0.99999), _RMSPROP] = 0.9
    """Decay of the mean square."""
    rms_init: Annotated[float, Within(0, 1), _RMSPROP] = 1.0
    """Start of the mean square: 1 in TF1 and timm, 0 in Keras and PyTorch."""
    epsilon_in_sqrt: Annotated[bool, _RMSPROP] = True
    """TensorFlow, Keras, timm; not PyTorch."""
    lr_in_momentum: Annotated[bool, _RMSPROP, _WITH_MOMENTUM] = True
    """The momentum adds up updates (TensorFlow, Keras, timm); False: it adds up scaled gradients (PyTorch)."""
    b1: Annotated[float, Within(0, 0.99999), _ADAMW] = 0.9
    b2: Annotated[float, Within(0, 0.999999), _ADAMW] = 0.999
    epsilon: Annotated[float, Above(0, 10), read_when("optim.name", "rmsprop", "adamw")] = 1e-8
    """rmsprop: see `epsilon_in_sqrt`; adamw: outside the root."""
    weight_decay: Annotated[float, Within(0, 10)] = 0.0
    """sgd, rmsprop: L2 added to the gradient. adamw: decoupled, times the learning rate."""
    weight_decay_on: Annotated[Literal["all", "no_norm", "no_norm_bias", "no_depthwise"], _DECAYS] = "no_norm_bias"
    """no_norm: biases of other layers are decayed. no_depthwise: not norms, biases and depthwise kernels."""
    l2: Annotated[float, Within(0, 10), _ADAMW] = 0.0
    """L2 added to the gradient besides, on the same parameters."""
    schedule: Literal["constant", "cosine", "exponential", "step"] = "cosine"
    warmup_epochs: Annotated[float, Within(0, 1e6), read_when("optim.warmup_steps", None)] = 0.0
    """Linear from warmup_init_lr to the peak."""
    warmup_steps: Annotated[int | None, AtLeast(0)] = None
    """Set: instead of `warmup_epochs`."""
    update_every: Literal["step", "epoch"] = "step"
    """epoch: the learning rate stands still in between, and only a warm-up in steps moves by the step."""
    warmup_init_lr: Annotated[float, AtLeast(0), _WARMS_UP] = 0.0
    """Learning rate at the start of the warm-up."""
    warmup_to: Annotated[Literal["peak", "schedule"], _WARMS_UP] = "peak"
    """schedule: what the schedule has come to when the warm-up ends (TF model garden)."""
    final_lr: Annotated[float, AtLeast(0), _COSINE] = 0.0
    """Learning rate at the end."""
    cosine_from: Annotated[Literal["warmup", "start"], _COSINE, _WARMS_UP] = "warmup"
    """Start of the cosine. warmup: at its end (torchvision); start: of training, of which the warm-up takes the
    first part (timm, CoreNet, TF model garden)."""
    decay_factor: Annotated[float, Above(0, 1), read_when("optim.schedule", "exponential", "step")] = 0.98
    """Factor of each decay."""
    decay_every_epochs: Annotated[float, Above(0), _EXPONENTIAL, read_when("optim.decay_every_steps", None)] = 1.0
    decay_every_steps: Annotated[int | None, AtLeast(1), _EXPONENTIAL] = None
    """Set: instead of `decay_every_epochs`."""
    lr_noise: Annotated[tuple[float, float] | None, Within(0, 1), Growing()] = None
    """From this share of the training to that one the learning rate of each epoch is multiplied by 1 + noise, normal
    within ±0.67 (timm's --lr-noise)."""
    staircase: Annotated[bool, _EXPONENTIAL] = True
    """In jumps, or else smoothly."""
    milestones_epochs: Annotated[tuple[float, ...], AtLeast(0), Growing(), read_when("optim.schedule", "step")] = ()
    """When it decays."""
    clip_grad_norm: Annotated[float | None, Above(0)] = None
    """Largest norm of all gradients together."""
    accumulate_steps: Annotated[int, AtLeast(1)] = 1
    """Microbatches a step; batch-norm groups stay within a microbatch."""
    ema_decay: Annotated[float | None, Within(0, 0.9999999)] = None
    """Set: evaluation uses the exponential moving average of weights and batch-norm statistics."""
    ema_every_steps: Annotated[int, AtLeast(1), _AVERAGES] = 1
    """How often the average takes in the weights."""
    ema_warmup: Annotated[bool, _AVERAGES] = True
    """Whether the decay warms up as TensorFlow's with num_updates: decay = min(ema_decay, (1 + step) / (10 + step))."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long. `steps` wins where both are set."""

    epochs: Annotated[float, Above(0, 1e6)] = 1.0
    steps: Annotated[int | None, AtLeast(1)] = None
    """Unset: epochs * training images / batch_size (with `data.scales` the mean one), rounded."""
    eval_every_epochs: Annotated[float, Within(0, 1e6)] = 1.0
    """Also evaluated at the end. 0: only there."""
    patience: Annotated[int | None, AtLeast(1), read_when("train.eval_every_epochs", Above(0))] = None
    """Set: training ends after so many evaluations without a better score than before. Whoever uses the run then gets
    its best checkpoint, unless another is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """May differ between a run and its resumption."""

    every_steps: Annotated[int, AtLeast(1)] = 50
    tensorboard: bool = True
    batch_hash: bool = False
    """Logs a number that says whether two runs were fed the same batches, on any devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """May differ between a run and its resumption."""

    every_steps: Annotated[int, AtLeast(1)] = 1000
    """Also saved at the end of each evaluation, at a signal and at the end."""
    keep_latest: Annotated[int, AtLeast(1)] = 2
    keep_best: Annotated[int, AtLeast(0)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """When a process gives up; it then ends with exit code 75. May differ between a run and its resumption."""

    start_timeout_s: Annotated[float, Within(1, 1e6)] = 300.0
    """In which all processes must have come, and again have opened the data."""
    heartbeat_timeout_s: Annotated[int, Within(2, 3600)] = 60
    """A process that wasn't heard of for so long is lost, and the others end."""
    step_timeout_s: Annotated[float | None, Within(1, 1e6)] = None
    """In which a step, a batch of evaluation and a checkpoint must be done. Unset: 600 with several processes, which
    would wait for a stuck one for ever; no limit with one, until a signal asks it to stop."""
    compile_timeout_s: Annotated[float, Within(1, 1e6)] = 3600.0
    """In place of it where something may be compiled, or is read: a batch, a checkpoint. Read where `step_timeout_s`
    holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment."""

    seed: Annotated[int, AtLeast(0)] = 0
    """Seed of the initial weights, the data order, augmentation and dropout."""
    task: str = "classification"
    """Task: a name that `tasks.base.register_task` has made known."""
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
        """Learning rate after the warm-up: `optim.peak_lr`, or else that of the reference batch, scaled to ours."""
        optim = self.optim
        if optim.peak_lr is not None:
            return optim.peak_lr
        return linear_lr(optim.reference_lr, self.data.batch_size, optim.reference_batch_size)


def linear_lr(reference_lr: float, batch_size: int, reference_batch_size: int) -> float:
    """Scales a learning rate linearly to the batch (Goyal et al., arXiv:1706.02677, 2.1)."""
    return reference_lr * (batch_size / reference_batch_size)


MAY_DIFFER = (
    "log.",
    "checkpoint.",
    "faults.",
    "data.path",
    "data.image_root",
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


def resolved(config: Config) -> dict[str, Any]:
    """Every key with what is meant by it, fit for JSON: the learning rate is a number where it follows from others."""
    return flatten(to_dict(config)) | {"optim.peak_lr": config.peak_lr}


def differences(old: Config, new: Config) -> list[str]:
    """``key: old -> new`` for every key that differs and decides what is trained (see `MAY_DIFFER`)."""
    before, after = resolved(old), resolved(new)
    return [
        f"{key}: {before[key]!r} -> {after[key]!r}"
        for key in before
        if before[key] != after[key] and not key.startswith(MAY_DIFFER)
    ]
