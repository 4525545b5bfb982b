"""Declares every option: its type, default, unit and meaning, its allowed values, and the conditions for its use.

To add an option, declare it here and read it where it is needed. The command line, its help, a run's config.json and
the error messages follow from this file. Checks that relate several options are in `checks`.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from mnv2_jax.config.rules import Above, AtLeast, Ending, Growing, Within, read_unless, read_when

IGNORED = 255
"""Value of a mask's pixels that belong to no class."""
_IS_DENSE = read_when("model.head", "deeplabv3", "lraspp")
_HAS_BOXES = read_when("model.head", "ssdlite")

STRUCTURE = ("width", "width_rule", "depth", "activation", "padding", "dilation_from")
"""Options of a `ModelConfig` that weights depend on: with other values, the network computes another function."""
HEAD = ("head", "head_channels", "aspp_rates", "aspp_conv", "aux_head", "align_corners", "anchors", "box_scores")
"""Options of a `ModelConfig` that say what follows the features; weights of another head can start the features."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Options of the network. Names of networks are those in `models.registry`."""

    name: str = "mobilenet_v2"
    """Name of the network."""
    width: Annotated[float, Above(0, 16)] = 1.0
    """Width multiplier, of the number of channels."""
    width_rule: Literal["standard", "corenet", "divisor4", "torchvision", "fixed_stem_head", "keras"] = "standard"
    """How scaled widths are rounded, and which layers keep their width. The `plan` of each family in `models` lists its
    rules. corenet also leaves out the activation after V1's depthwise convolutions, as CoreNet does."""
    depth: Annotated[float, Above(0, 8)] = 1.0
    """Depth multiplier, of the number of blocks in a stage; mobilenet_v2 only."""
    activation: Literal["relu", "relu6"] | None = None
    """Activation of mobilenet_v1 and mobilenet_v2. Unset: the activation of the published network."""
    reduced_tail: Literal["paper", "torchvision"] | None = None
    """Halves the channels from the last halving of the map on, for few classes. paper: mobilenet_v2 and mobilenet_v3 of
    V3's paper for segmentation (section 6.4). torchvision: mobilenet_v3, whose first expansion there stays whole, as in
    that paper's detection (section 6.3)."""
    num_classes: Annotated[int | None, AtLeast(2)] = None
    """Number of classes. Unset: the number in the data."""
    strides: Annotated[tuple[int, int, int, int, int], Within(1, 2)] = (2, 2, 2, 2, 2)
    """Strides at the five places where the published network halves its feature map, the stem first. Smaller strides
    suit small images: (1, 1, 2, 2, 2) gives a last map of 4×4 for 32 px, (2, 2, 2, 1, 2) gives 2×2 for 32 px, and
    (1, 2, 2, 2, 2) gives 4×4 for 64 px."""
    output_stride: Literal[8, 16, 32] = 32
    """Largest ratio of the input's size to the feature map's; further strides become dilation."""
    dilation_from: Annotated[Literal["next", "same"], read_unless("model.output_stride", 32)] = "next"
    """Where the dilation begins that replaces a stride. next: behind the block that lost its stride (slim, CoreNet,
    torchvision's ResNet). same: in that block (torchvision's MobileNetV3)."""
    padding: Literal["same", "symmetric", "keras_v1"] = "same"
    """Padding of convolutions. same: as TensorFlow, Keras and slim. symmetric: as PyTorch. keras_v1: as same, but
    depthwise convolutions with a stride pad only the bottom and the right, whatever the size (Keras' MobileNet)."""
    dropout: Annotated[float, Within(0, 0.999), read_unless("model.head", "ssdlite")] = 0.2
    """Share of the pooled features that is dropped in training."""
    drop_path: Annotated[float, Within(0, 0.999), read_unless("model.name", "mobilenet_v1")] = 0.0
    """Rate of stochastic depth: share of the examples for which training skips the last residual branch."""
    drop_path_rule: Annotated[
        Literal["linear", "flat", "timm", "tf_model_garden"], read_when("model.drop_path", Above(0))
    ] = "linear"
    """How the rate changes with depth. linear: it grows from 0 at the first block to `drop_path` at the last (Huang et
    al., arXiv:1603.09382). flat: it is `drop_path` in all blocks. timm: it grows from 0, and stays just below
    `drop_path` at the last block. tf_model_garden: it is `drop_path` in attention blocks, and grows over stem, other
    blocks and head."""
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
    """Initialisation of each kind of layer: a row of `nn.initializers.INITS`, which gives the formulas and sources."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type in which the network computes; parameters, statistics, logits and losses are at least float32."""
    head: Literal["classifier", "deeplabv3", "lraspp", "ssdlite"] = "classifier"
    """What follows the features. classifier: the mean over the map, then classes of the image. deeplabv3, lraspp:
    classes of each pixel (`models.heads`), for task=segmentation. ssdlite: boxes, for task=detection."""
    anchors: Annotated[Literal["tensorflow", "torchvision"], _HAS_BOXES] = "tensorflow"
    """Shapes and order of SSDLite's anchors. tensorflow: 3 at a position of the first map and 6 of the others.
    torchvision: 6 of all, and others than TensorFlow's."""
    box_scores: Annotated[Literal["softmax", "sigmoid"], _HAS_BOXES] = "softmax"
    """What the logits of an anchor mean. softmax: one of the classes or the background (torchvision). sigmoid: a
    probability of each by itself (TensorFlow)."""
    head_channels: Annotated[int, Within(1, 8192), _IS_DENSE] = 256
    """Channels of the layers of a dense head."""
    aspp_rates: Annotated[tuple[int, ...], Within(1, 1024), Growing(), read_when("model.head", "deeplabv3")] = ()
    """Dilations of the 3×3 convolutions of DeepLabv3's ASPP. Unset: there are none, only the 1×1 convolution and the
    pooled image, as in the published DeepLabv3 on MobileNetV2."""
    aspp_conv: Annotated[bool, read_when("model.head", "deeplabv3")] = False
    """Whether a 3×3 convolution follows DeepLabv3's ASPP (torchvision)."""
    aux_head: Annotated[bool, read_when("model.head", "deeplabv3")] = False
    """Whether training adds a small second head at the end of the stage before the last halving."""
    align_corners: Annotated[bool, _IS_DENSE] = False
    """How logits are resized to the image. True: the centres of the corner pixels coincide (TensorFlow, CoreNet).
    False: the corners of the corner pixels do (torchvision)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Options of the weights before the first step."""

    weights: str | None = None
    """Weights to start from: a file of this project, torchvision, timm, CoreNet, Keras or TFLite; the folder of a run;
    or a name of published weights such as timm/mobilenetv2_100.ra_in1k. Unset: random weights."""
    head: Annotated[Literal["load", "new"], read_unless("init.weights", None)] = "load"
    """load: take the classifier from the weights. new: start with a random classifier, for other classes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Options of grouped batch norm (`nn.norm`)."""

    group_size: Annotated[int, AtLeast(1)] = 32
    """Number of images that share batch statistics. This is a hyperparameter, and does not depend on the hardware."""
    decay: Annotated[float, Within(0, 0.99999), read_unless("finetune.train_from", ("classifier",))] = 0.9
    """Decay of the running statistics per step: TensorFlow's momentum, or 1 - PyTorch's momentum."""
    epsilon: Annotated[float, Above(0, 1)] = 1e-3
    """Number that is added to the variance before its square root."""
    statistics: Literal["batch", "running"] = "batch"
    """Statistics by which the norms before the head normalise in training. batch: those of the norm group. running: the
    running statistics, which then stay as they are; scales and biases are trained. For small batches from given
    weights."""


_DECODED = (  # a folder of CIFAR-10 can hold images or an .npz file
    read_unless("data.name", "digits"),
    read_unless("data.name", "cifar10") | read_unless("data.path", Ending(".npz")),
)
_RESIZED = read_when("data.crop", "random_resized")
_IS_CUT = read_when("model.head", "classifier")
_SYNTHETIC = read_when("data.name", "synthetic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Options of the images, and of the batches that are made of them."""

    name: str = "imagenet"
    """Data set. For training: digits, cifar10, imagenet, folder or tfds:NAME. For evaluation only: imagenet_v2,
    imagenet_r, imagenet_a or imagenet_sketch. To test a machine: synthetic, with images made on the fly. For
    segmentation, with masks: mask_folder, ade20k, voc_segmentation or cityscapes. For detection, with boxes: coco,
    voc_detection or box_folder."""
    path: Annotated[str | None, read_unless("data.name", "digits", "synthetic")] = None
    """Path of the data: a directory or .tar, a list of files and labels (.csv, .tsv, .txt; `data.lists`), or a folder
    that `data.prepare` wrote. For TFDS it is the data_dir. Digits come with scikit-learn and have no path."""
    image_root: str | None = None
    """Directory or .tar that holds the files of a list. Unset: the folder of the list."""
    synthetic_classes: Annotated[int, Within(2, 1000), _SYNTHETIC] = 1000
    """Number of classes of the synthetic images."""
    synthetic_images: Annotated[tuple[int, int], AtLeast(1), _SYNTHETIC] = (1_281_167, 50_000)
    """Numbers of synthetic images for training and for evaluation; the default is as many as ImageNet has."""
    resolution: Annotated[int, Within(8, 4096)] = 224
    """Height and width of the network's input, in pixels."""
    scales: Annotated[tuple[int, ...], Within(8, 4096), Growing()] = ()
    """Resolutions of training batches. Set: each batch has one of them, drawn at random, and its number of images is
    chosen so that it has about as many pixels as `batch_size` images of `resolution` (CoreNet's variable batch
    sampler). Unset: all batches have `resolution`."""
    eval_resolution: Annotated[int | None, Within(8, 4096)] = None
    """Resolution of evaluation, in pixels. Unset: `resolution`."""
    size: Annotated[tuple[int, int] | None, Within(8, 8192), _IS_DENSE] = None
    """Height and width of training images, in pixels, where they aren't square. Set: it replaces `resolution`."""
    eval_short_side: Annotated[int | None, Within(8, 8192), _IS_DENSE] = None
    """Short side to which images are resized before an evaluation, in pixels. The classes are resized back, and their
    pixels counted at the size of the mask. Unset: images keep their size."""
    eval_canvas: Annotated[tuple[int, int] | None, Within(8, 8192), _IS_DENSE] = None
    """Height and width of the canvas on which every image is evaluated, in pixels: multiples of the output stride, plus
    1 with `ModelConfig.align_corners`. A larger image is shrunk to fit, and its classes are resized back. Unset: each
    image has the smallest canvas that holds it and whose sides are multiples of 128."""
    eval_window: Annotated[tuple[int, int] | None, Within(8, 8192), _IS_DENSE] = None
    """Height and width of the windows in which an evaluation sees a larger canvas, in pixels: multiples of the output
    stride, plus 1 with `ModelConfig.align_corners`. Neighbours share a third or more, and where windows overlap, the
    mean of their logits counts. Unset: the network sees a canvas at once."""
    eval_mirror: Annotated[bool, _IS_DENSE] = False
    """Whether an evaluation takes the mean of the probabilities for the image and for its mirror image."""
    eval_min_score: Annotated[float, Within(0, 1), _HAS_BOXES] = 0.001
    """Least probability of a box that is found."""
    eval_nms_iou: Annotated[float, Within(0, 1), _HAS_BOXES] = 0.55
    """Overlap (IoU) above which the less probable of two boxes of a class is dropped."""
    eval_max_boxes: Annotated[int, Within(1, 4096), _HAS_BOXES] = 100
    """Largest number of boxes that are found in an image. COCO's scores count 100 of each class."""
    batch_size: Annotated[int, AtLeast(1)] = 96
    """Images per training step, over all devices."""
    eval_batch_size: Annotated[int, AtLeast(1)] = 128
    """Largest number of images per evaluation step. The result doesn't depend on it."""
    train_split: Annotated[str, read_when("data.name", "coco", "voc_detection", "box_folder")] = "train"
    """Split to train on, of images with boxes, as trainval of VOC. `eval_split` must then name one apart from it."""
    eval_split: str | None = None
    """Split for evaluation, by any of its names (valid, dev, testing …). Unset: val, or test where there is no val."""
    holdout_fraction: Annotated[float, Within(0, 0.9)] = 0.0
    """Share of the training images, stratified by class, that is kept out of training and used for evaluation. Data
    without splits use 0.2, unless this option or `eval_split` is set."""
    mask_values: Annotated[Literal["index", "binary", "one_based", "palette"], _IS_DENSE] = "index"
    """What the values of masks mean. index: the number of the class, in the order of classes.txt. binary: 0 is the
    first class, 255 the second. one_based: the number of the class plus 1; 0 is ignored (ADE20K). palette: colours,
    which classes.txt gives for each class. In all, 255 of index and one_based is ignored."""
    ignored_classes: Annotated[tuple[str, ...], _IS_DENSE] = ()
    """Names of classes whose pixels are ignored, in training and in evaluation; the other classes keep their order."""
    crop: Literal["random_resized", "shift", "scale", "iou", "none"] = "random_resized"
    """Random crop of training images. random_resized: crop an area and resize it. shift: pad with `pad_pixels` zeros on
    each side, then crop to the original size. scale: scale image and mask by a factor within `crop_scale`, then crop,
    padding what is too small. iou: crop so that some box overlaps the crop by a drawn share at least (SSD). none: no
    random crop."""
    expand: Annotated[float, Within(1, 16), _HAS_BOXES] = 1.0
    """Largest factor by which half of the training images are made larger, around them the mean colour, before the
    crop, so that objects become smaller (SSD: 4)."""
    max_boxes: Annotated[int, Within(1, 4096), _HAS_BOXES] = 100
    """Largest number of boxes of a training image; of more, the largest are kept. Evaluation counts all."""
    crop_scale: Annotated[tuple[float, float], Above(0, 16), Growing(loosely=True), read_when("data.crop", "scale")] = (
        0.5,
        2.0,
    )
    """Smallest and largest factor by which an image is scaled, uniform in between."""
    crop_short_side: Annotated[
        tuple[int, int] | None, Within(8, 8192), Growing(loosely=True), read_when("data.crop", "scale")
    ] = None
    """Smallest and largest length of the image's short side after scaling, in pixels; any whole number in between. Set:
    it replaces `crop_scale`."""
    crop_long_side: Annotated[int | None, Within(8, 8192), read_unless("data.crop_short_side", None)] = None
    """Largest length of the long side after scaling, in pixels; a longer image is shrunk to it."""
    crop_class_share: Annotated[float, Above(0, 1), read_when("data.crop", "scale")] = 1.0
    """Largest share of the crop's labelled pixels that one class may have; of ten crops the first that keeps to it is
    taken, or the last (mmsegmentation's cat_max_ratio, CoreNet's seg_class_max_ratio)."""
    crop_area: Annotated[tuple[float, float], Above(0, 1), Growing(loosely=True), _RESIZED] = (0.08, 1.0)
    """Smallest and largest area of the crop, as a share of the image."""
    crop_ratio: Annotated[tuple[float, float], Within(0.01, 100), Growing(loosely=True), _RESIZED] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of the crop, width over height."""
    crop_draw: Annotated[Literal["torchvision", "tensorflow", "model_garden"], _RESIZED] = "torchvision"
    """Library whose way of drawing the crop's area and ratio is followed; see `data.images.draw_crop`."""
    pad_pixels: Annotated[int, Within(0, 1024), read_when("data.crop", "shift")] = 4
    """Pixels of padding on each side, before the crop."""
    flip: bool = True
    """Whether half of the training images, chosen at random, are mirrored left to right."""
    eval_crop: Annotated[Literal["resize_crop", "central"], _IS_CUT] = "resize_crop"
    """Crop of evaluation images. resize_crop: resize the short side to resolution / `eval_crop_fraction`, then take the
    centre (PyTorch). central: take the central `eval_crop_fraction` of each side, then resize to a square whatever the
    aspect ratio (TF-slim)."""
    eval_crop_fraction: Annotated[float, Within(0.01, 1), _IS_CUT] = 0.875
    """Share of a side that the crop of evaluation images keeps; see `eval_crop`."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of resized images."""
    antialias: bool = True
    """Whether shrinking an image averages all pixels that a new pixel covers (True: Pillow, torchvision, timm), or only
    the nearest 2 (bicubic: 4) on each axis (False: TensorFlow, Keras)."""
    mean: Annotated[tuple[float, float, float], Within(-255, 255)] = (0.485, 0.456, 0.406)
    """Means of red, green and blue, for values from 0 to 1; see `std`."""
    std: Annotated[tuple[float, float, float], Within(0.001, 255)] = (0.229, 0.224, 0.225)
    """Standard deviations of red, green and blue. A channel is normalised as (x / 255 - mean) / std."""
    num_workers: Annotated[int | None, Within(0, 1024), *_DECODED] = None
    """Number of processes that decode image files. Unset: one per CPU core. 0: the main process decodes."""
    skip_corrupt: Annotated[bool, *_DECODED] = False
    """Whether an image that can't be decoded is skipped, instead of ending the run. Training takes the next image that
    can be decoded, and evaluation leaves it out. The skipped images are counted and named."""

    @property
    def seen_resolution(self) -> int:
        """Resolution of evaluation and prediction: `eval_resolution`, or `resolution` where that is unset."""
        return self.eval_resolution or self.resolution

    @property
    def seen_size(self) -> int | tuple[int, int]:
        """Size of the images for which a run's costs are counted: `size`, or `seen_resolution` for a square."""
        return self.size or self.seen_resolution

    @property
    def train_size(self) -> tuple[int, int]:
        """Height and width of training images: `size`, or the square of `resolution`."""
        return self.size or (self.resolution, self.resolution)


_RANDAUGMENT = read_when("augment.policy", "randaugment", "randaugment_timm", "randaugment_tf")
_RANDAUGMENT_TIMM = read_when("augment.policy", "randaugment_timm")
_HAS_PROBABILITY = read_when("augment.policy", "randaugment_timm", "randaugment_tf")
_JITTERS = read_when("augment.color", "jitter")
_ERASES = read_when("augment.erase_probability", Above(0))
_MIXUP, _CUTMIX = read_when("augment.mixup_alpha", Above(0)), read_when("augment.cutmix_alpha", Above(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Options of the augmentation of training images beyond crop and flip. It is seeded by (seed, epoch, index)."""

    policy: Literal[
        "none", "autoaugment", "autoaugment_tf", "randaugment", "randaugment_timm", "randaugment_tf", "trivialaugment"
    ] = "none"
    """Policy of random operations on the uint8 image, which the workers apply; see `data.policies`. autoaugment:
    torchvision's AutoAugment (IMAGENET). autoaugment_tf: TF model garden's AutoAugment (v0). randaugment: torchvision's
    RandAugment; randaugment_timm and randaugment_tf: those of timm and TF model garden. trivialaugment: TrivialAugment
    (wide)."""
    policy_layers: Annotated[int, Within(1, 100), _RANDAUGMENT] = 2
    """Number of operations per image."""
    policy_magnitude: Annotated[float, Within(0, 30), _RANDAUGMENT] = 9.0
    """Strength of the operations: a whole number from 0 to 30 (torchvision), 0 to 10 (timm), or 0 to 30 (TF, whose
    tables are made for 10)."""
    policy_magnitude_std: Annotated[float, Within(0, 1000), _RANDAUGMENT_TIMM] = 0.0
    """Standard deviation of normal noise on the magnitude. Above 100, the magnitude is uniform from 0 to
    `policy_magnitude`."""
    policy_increasing: Annotated[bool, _RANDAUGMENT_TIMM] = False
    """Whether every operation gets stronger with the magnitude (timm's inc1)."""
    policy_probability: Annotated[float, Within(0, 1), _HAS_PROBABILITY] = 1.0
    """Probability of each operation."""
    policy_excluded: Annotated[tuple[str, ...], _RANDAUGMENT] = ()
    """Operations to leave out, by their names in `data.policies`."""
    color: Literal["none", "inception", "jitter"] = "none"
    """Colour augmentation. inception: random brightness (±32/255) and saturation (0.5 to 1.5) in random order, as in
    TF-slim's fast mode. jitter: torchvision's ColorJitter."""
    color_jitter: Annotated[tuple[float, float, float, float], AtLeast(0), _JITTERS] = (0.4, 0.4, 0.4, 0.0)
    """Strength of brightness, contrast and saturation (factors from 1 - x to 1 + x), and of hue (±x turns, x at most
    0.5)."""
    rotation_degrees: Annotated[float, Within(0, 180)] = 0.0
    """Largest rotation about the centre, in either direction. It is bilinear; pixels from outside repeat the edge."""
    shift_fraction: Annotated[float, Within(0, 0.5)] = 0.0
    """Largest shift in either direction, as a share of the height and, drawn independently, of the width (Keras'
    RandomTranslation). It follows the rotation, in the same resampling; pixels from outside repeat the edge."""
    erase_probability: Annotated[float, Within(0, 1)] = 0.0
    """Probability of random erasing (Zhong et al., arXiv:1708.04896), which erases a rectangle after normalisation."""
    erase_area: Annotated[tuple[float, float], Above(0, 1), Growing(loosely=True), _ERASES] = (0.02, 1 / 3)
    """Smallest and largest area of the rectangle, as a share of the image."""
    erase_fill: Annotated[Literal["zero", "noise"], _ERASES] = "zero"
    """Content of the rectangle. noise: each pixel is drawn from a normal distribution (timm's `pixel`)."""
    mixup_alpha: Annotated[float, Within(0, 100)] = 0.0
    """Parameter of mixup (Zhang et al., arXiv:1710.09412), which mixes images and labels by a share drawn from
    Beta(alpha, alpha). 0: no mixup."""
    cutmix_alpha: Annotated[float, Within(0, 100)] = 0.0
    """Parameter of cutmix (Yun et al., arXiv:1905.04899), which replaces a rectangle by that of another image; its area
    follows from Beta(alpha, alpha). 0: no cutmix."""
    mix_probability: Annotated[float, Within(0, 1), _MIXUP | _CUTMIX] = 1.0
    """Probability that a batch is mixed at all."""
    cutmix_share: Annotated[float, Within(0, 1), _MIXUP, _CUTMIX] = 0.5
    """Share of the mixed batches that get cutmix; the others get mixup."""
    repeats: Annotated[int, Within(1, 64)] = 1
    """Repeated augmentation (Hoffer et al., arXiv:1901.09335): each image is in a batch this many times, with different
    augmentation. The number of images in an epoch stays the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Options of the loss, which is softmax cross-entropy."""

    label_smoothing: Annotated[float, Within(0, 0.999), read_unless("distill.weight", 1.0)] = 0.0
    """Share of the target probability that is spread evenly over all classes."""
    class_weights: Annotated[
        Literal["none", "balanced"] | tuple[tuple[str, float], ...], read_unless("distill.weight", 1.0)
    ] = "none"
    """Weights of the classes. balanced: an example weighs n / (k * images of its class), for n images and k classes, so
    that every class weighs the same. Or weights by class name, as in {cat: 3, dog: 0.5}; other classes have 1. In a
    classification these weights are scaled so that an example weighs 1 on average; in a segmentation they are factors
    for the loss of a pixel."""
    aux_weight: Annotated[float, AtLeast(0), read_when("model.aux_head", True)] = 0.4
    """Weight of the loss of the auxiliary head, beside that of the head."""


_DISTILS = read_unless("distill.teacher", None) | read_unless("distill.logits", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Options of distillation, which adds a teacher's predictions as targets (Hinton et al., arXiv:1503.02531)."""

    teacher: str | None = None
    """Weights of the teacher, as in `init.weights`: a file, the folder of a run, or a name of published weights. The
    teacher sees the same augmented images as the student."""
    teacher_model: Annotated[str | None, read_unless("distill.teacher", None)] = None
    """Name of the network that another library's file of teacher weights holds. Unset: as the file says."""
    logits: str | None = None
    """File of the teacher's logits, one row per image, to use instead of `teacher`; `python -m mnv2_jax.predict
    --store-logits` writes it."""
    temperature: Annotated[float, Above(0, 1000), _DISTILS] = 1.0
    """Temperature by which the logits of teacher and student are divided."""
    weight: Annotated[float, Within(0, 1), _DISTILS] = 0.5
    """Weight of the loss on the teacher's predictions; the loss on the labels has 1 - weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Options that say which parts of the network are trained, and how fast."""

    train_from: tuple[str, ...] = ("stem",)
    """First trained part of the network in each stage of training: stem, block_1, …, head, hidden or classifier (aspp
    or lraspp begin a dense head). That part and all later ones are trained. Earlier parts are frozen: they get no
    gradient, and their norms use their running statistics and leave them unchanged."""
    unfreeze_epochs: Annotated[tuple[float, ...], Above(0), Growing()] = ()
    """Epochs at which the second stage, the third and so on begin."""
    backbone_lr_factor: Annotated[float, Within(0, 100), read_unless("finetune.train_from", ("classifier",))] = 1.0
    """Factor of the learning rate for all parts but the classifier; with a dense head, for all parts before it."""


_RMSPROP, _ADAMW = read_when("optim.name", "rmsprop"), read_when("optim.name", "adamw")
_WITH_MOMENTUM = read_when("optim.momentum", Above(0))
_DECAYS = read_when("optim.weight_decay", Above(0)) | read_when("optim.l2", Above(0))
_COSINE, _EXPONENTIAL = read_when("optim.schedule", "cosine"), read_when("optim.schedule", "exponential")
_WARMS_UP = read_when("optim.warmup_epochs", Above(0)) | read_when("optim.warmup_steps", Above(0))
_AVERAGES = read_unless("optim.ema_decay", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Options of the optimiser and the learning-rate schedule. Times are in epochs, which need not be whole."""

    name: Literal["sgd", "rmsprop", "adamw"] = "sgd"
    """Optimiser."""
    peak_lr: Annotated[float | None, Above(0)] = None
    """Learning rate after the warm-up. Unset: `reference_lr` * (`data.batch_size` / `reference_batch_size`)."""
    reference_lr: Annotated[float, Above(0), read_when("optim.peak_lr", None)] = 0.1
    """Learning rate for batches of `reference_batch_size` images; see `peak_lr`."""
    reference_batch_size: Annotated[int, AtLeast(1), read_when("optim.peak_lr", None)] = 128
    """Batch size for which `reference_lr` is the learning rate; see `peak_lr`."""
    momentum: Annotated[float, Within(0, 0.99999), read_when("optim.name", "sgd", "rmsprop")] = 0.9
    """Decay of the momentum."""
    nesterov: Annotated[bool, read_when("optim.name", "sgd"), _WITH_MOMENTUM] = False
    """Whether SGD uses Nesterov momentum."""
    rms_decay: Annotated[float, Within(0, 0.99999), _RMSPROP] = 0.9
    """Decay of the mean square of the gradients."""
    rms_init: Annotated[float, Within(0, 1), _RMSPROP] = 1.0
    """Initial mean square: 1 in TF1 and timm, 0 in Keras and PyTorch."""
    epsilon_in_sqrt: Annotated[bool, _RMSPROP] = True
    """Whether epsilon is added inside the square root (True: TensorFlow, Keras, timm; False: PyTorch)."""
    lr_in_momentum: Annotated[bool, _RMSPROP, _WITH_MOMENTUM] = True
    """Whether the momentum sums updates, which contain the learning rate (True: TensorFlow, Keras, timm), or scaled
    gradients (False: PyTorch)."""
    b1: Annotated[float, Within(0, 0.99999), _ADAMW] = 0.9
    """Decay of the mean of the gradients (beta 1)."""
    b2: Annotated[float, Within(0, 0.999999), _ADAMW] = 0.999
    """Decay of the mean square of the gradients (beta 2)."""
    epsilon: Annotated[float, Above(0, 10), read_when("optim.name", "rmsprop", "adamw")] = 1e-8
    """Number that keeps the divisor away from 0. adamw adds it outside the square root; for rmsprop see
    `epsilon_in_sqrt`."""
    weight_decay: Annotated[float, Within(0, 10)] = 0.0
    """Weight decay. sgd, rmsprop: added to the gradient, as the gradient of an L2 penalty. adamw: decoupled from the
    gradient, times the learning rate."""
    weight_decay_on: Annotated[Literal["all", "no_norm", "no_norm_bias", "no_depthwise"], _DECAYS] = "no_norm_bias"
    """Parameters that decay. all: every one. no_norm: all but those of norms. no_norm_bias: all but those of norms and
    biases. no_depthwise: all but those of norms, biases and depthwise kernels."""
    l2: Annotated[float, Within(0, 10), _ADAMW] = 0.0
    """L2 penalty in addition to the weight decay: it is added to the gradient, for the same parameters."""
    schedule: Literal["constant", "cosine", "exponential", "step", "poly"] = "cosine"
    """Schedule of the learning rate after the warm-up."""
    warmup_epochs: Annotated[float, Within(0, 1e6), read_when("optim.warmup_steps", None)] = 0.0
    """Length of the warm-up, in which the learning rate grows linearly from `warmup_init_lr`; see `warmup_to`."""
    warmup_steps: Annotated[int | None, AtLeast(0)] = None
    """Length of the warm-up in steps. Set: it replaces `warmup_epochs`."""
    update_every: Literal["step", "epoch"] = "step"
    """How often the learning rate changes. epoch: it is constant within an epoch, except during a warm-up in steps."""
    warmup_init_lr: Annotated[float, AtLeast(0), _WARMS_UP] = 0.0
    """Learning rate at the start of the warm-up."""
    warmup_to: Annotated[Literal["peak", "schedule"], _WARMS_UP] = "peak"
    """Learning rate at the end of the warm-up. peak: the peak. schedule: what the schedule has at that time (TF model
    garden)."""
    final_lr: Annotated[float, AtLeast(0), read_when("optim.schedule", "cosine", "poly")] = 0.0
    """Learning rate at the end of training."""
    poly_power: Annotated[float, Above(0, 100), read_when("optim.schedule", "poly")] = 0.9
    """Power of the polynomial: the rate falls as (1 - share of the training) to this power (DeepLab)."""
    cosine_from: Annotated[Literal["warmup", "start"], _COSINE, _WARMS_UP] = "warmup"
    """Start of the cosine. warmup: the end of the warm-up (torchvision). start: the start of training, so that the
    warm-up replaces the first part of the cosine (timm, CoreNet, TF model garden)."""
    decay_factor: Annotated[float, Above(0, 1), read_when("optim.schedule", "exponential", "step")] = 0.98
    """Factor by which each decay multiplies the learning rate."""
    decay_every_epochs: Annotated[float, Above(0), _EXPONENTIAL, read_when("optim.decay_every_steps", None)] = 1.0
    """Epochs between decays."""
    decay_every_steps: Annotated[int | None, AtLeast(1), _EXPONENTIAL] = None
    """Steps between decays. Set: it replaces `decay_every_epochs`."""
    lr_noise: Annotated[tuple[float, float] | None, Within(0, 1), Growing()] = None
    """Start and end of learning-rate noise, as shares of the training. Between them, the learning rate of each epoch is
    multiplied by 1 + noise, which is normal and within ±0.67 (timm's --lr-noise)."""
    staircase: Annotated[bool, _EXPONENTIAL] = True
    """Whether the learning rate decays in jumps (True) or smoothly (False)."""
    milestones_epochs: Annotated[tuple[float, ...], AtLeast(0), Growing(), read_when("optim.schedule", "step")] = ()
    """Epochs at which the learning rate decays."""
    clip_grad_norm: Annotated[float | None, Above(0)] = None
    """Largest norm of all gradients together; larger gradients are scaled down to it. Unset: no clipping."""
    accumulate_steps: Annotated[int, AtLeast(1)] = 1
    """Number of microbatches per step. Batch-norm groups stay within a microbatch."""
    ema_decay: Annotated[float | None, Within(0, 0.9999999)] = None
    """Decay of the exponential moving average (EMA) of weights and batch-norm statistics. Set: evaluation uses the
    average. Unset: there is none."""
    ema_every_steps: Annotated[int, AtLeast(1), _AVERAGES] = 1
    """Steps between updates of the average."""
    ema_warmup: Annotated[bool, _AVERAGES] = True
    """Whether the decay warms up, as TensorFlow's does with num_updates: decay = min(ema_decay, (1 + step) / (10 +
    step))."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of the length of training. `steps` wins over `epochs`."""

    epochs: Annotated[float, Above(0, 1e6)] = 1.0
    """Length of training in epochs, which need not be whole."""
    steps: Annotated[int | None, AtLeast(1)] = None
    """Length of training in steps. Unset: epochs * training images / batch_size, rounded; with `data.scales` it is the
    mean batch size."""
    eval_every_epochs: Annotated[float, Within(0, 1e6)] = 1.0
    """Epochs between evaluations. There is always one at the end; 0: only that."""
    patience: Annotated[int | None, AtLeast(1), read_when("train.eval_every_epochs", Above(0))] = None
    """Number of evaluations without a new best score after which training ends. Set: evaluation, predict and convert
    take the best checkpoint of the run, unless --checkpoint=latest is given. Unset: training doesn't end early."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Options of the log. They may change when a run is resumed."""

    every_steps: Annotated[int, AtLeast(1)] = 50
    """Steps between lines of the log."""
    tensorboard: bool = True
    """Whether files for TensorBoard are written."""
    batch_hash: bool = False
    """Whether a hash of each batch is logged. It is equal for two runs that have the same batches, on any devices."""
    trace: bool = False
    """Whether trace.jsonl is written. For each step it holds a hash of the batch, the loss, and hash and norm of each
    gradient and of each array of the new state, so that the first difference between two runs can be found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Options of checkpoints. They may change when a run is resumed."""

    every_steps: Annotated[int, AtLeast(1)] = 1000
    """Steps between checkpoints. Each evaluation, a signal to stop and the end of training save one as well."""
    keep_latest: Annotated[int, AtLeast(1)] = 2
    """Number of latest checkpoints to keep."""
    keep_best: Annotated[int, AtLeast(0)] = 1
    """Number of best checkpoints to keep, by the score of their evaluations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Options of when a process gives up, which ends it with exit code 75. They may change when a run is resumed."""

    start_timeout_s: Annotated[float, Within(1, 1e6)] = 300.0
    """Seconds in which all processes must have started, and then again in which all must have opened the data."""
    heartbeat_timeout_s: Annotated[int, Within(2, 3600)] = 60
    """Seconds without a sign of life after which a process counts as lost, and the others end."""
    step_timeout_s: Annotated[float | None, Within(1, 1e6)] = None
    """Longest time in seconds for a step, a batch of evaluation, or writing a checkpoint. Unset: 600 with several
    processes, which would wait for a stuck one for ever; no limit with one process, until a signal asks it to stop."""
    compile_timeout_s: Annotated[float, Within(1, 1e6)] = 3600.0
    """Longest time in seconds where something may be compiled or read, such as a batch or a checkpoint. It takes the
    place of `step_timeout_s` there, where that limit applies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a whole experiment."""

    seed: Annotated[int, AtLeast(0)] = 0
    """Seed of the initial weights, the order of the data, augmentation and dropout."""
    task: str = "classification"
    """Name of a task that was registered with `tasks.base.register_task`."""
    modules: tuple[str, ...] = ()
    """Modules outside the package that register the task, model or data of the config. Modules that the config file
    imports are added automatically."""
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
        """Checkpoint to use by default: the best if `train.patience` is set, as the latest is then past it."""
        return "latest" if self.train.patience is None else "best"

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up: `optim.peak_lr`, or the reference learning rate scaled to the batch size."""
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
"""Prefixes of the keys that may change when a run is resumed. None of them changes a bit of the trained weights, unless
an image is damaged; without `data.skip_corrupt`, a run can't go on then."""

GONE: Mapping[str, Any] = {"optim.trust_clip": False}
"""Keys of older versions, each with its old default. A file that has the default is read without an error."""


def to_dict(config: Config) -> dict[str, Any]:
    """Converts a `Config` to a nested dict of JSON types; tuples become lists."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested mapping: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def resolved(config: Config) -> dict[str, Any]:
    """Returns the value of every key as JSON types. The peak learning rate is a number even where it is unset."""
    return flatten(to_dict(config)) | {"optim.peak_lr": config.peak_lr}


def differences(old: Config, new: Config) -> list[str]:
    """Lists ``key: old -> new`` for every key that differs and influences training (see `MAY_DIFFER`)."""
    before, after = resolved(old), resolved(new)
    return [
        f"{key}: {before[key]!r} -> {after[key]!r}"
        for key in before
        if before[key] != after[key] and not key.startswith(MAY_DIFFER)
    ]
