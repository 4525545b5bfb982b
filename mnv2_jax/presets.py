"""Recipes as `ConfigDict`s, and the argument that every config file takes after its colon.

A recipe is a table of deltas from the defaults in `config`; where a number comes from stands beside it.
`mobilenets.json` names the sources; "tf_slim_v2" is TF-slim's `mobilenet_v2` README and code.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from mnv2_jax.config import DataConfig, ModelConfig, NormConfig
from mnv2_jax.errors import UserError, nearest

SMALL_IMAGE_STRIDES = (1, 1, 2, 2, 2)
"""For 32 px: a 4×4 last feature map, as chenyaofo/pytorch-cifar-models."""

PAPER = dict(
    # The paper gives batch 96, 0.045 and ×0.98 per epoch (section 6.1); the rest is tf_slim_v2, which decays per
    # 2.5 epochs instead. 412 epochs are its 5.5 M steps of 96. Its random crop draws the ratio uniformly, ours
    # log-uniformly.
    model=dict(dropout=0.2, init="truncated_normal"),
    norm=dict(decay=0.997, epsilon=1e-3),
    data=dict(
        name="imagenet",
        batch_size=96,
        crop="random_resized",
        crop_area=(0.05, 1.0),
        crop_ratio=(0.75, 1.33),
        eval_crop="central",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    augment=dict(color="inception"),
    loss=dict(label_smoothing=0.1),
    optim=dict(
        name="rmsprop",
        reference_lr=0.045,
        reference_batch_size=96,
        momentum=0.9,
        rms_decay=0.9,
        epsilon=1.0,
        weight_decay=4e-5,
        weight_decay_on="no_depthwise",
        schedule="exponential",
        decay_factor=0.98,
        decay_every_epochs=1.0,
        ema_decay=0.9999,
    ),
    train=dict(epochs=412.0),
    checkpoint=dict(every_steps=5000),
)

CIFAR = dict(
    # chenyaofo's cifar10.conf (SGD with Nesterov momentum, 0.1, 5e-4, cosine over 200 epochs, padded crop and
    # flip, dropout 0.2) at kuangliu's batch of 128.
    model=dict(dropout=0.2, strides=SMALL_IMAGE_STRIDES),
    norm=dict(decay=0.9, epsilon=1e-3),
    data=dict(
        name="cifar10",
        resolution=32,
        batch_size=128,
        crop="shift",
        pad_pixels=4,
        eval_crop_fraction=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    optim=dict(
        name="sgd",
        reference_lr=0.1,
        reference_batch_size=128,
        nesterov=True,
        weight_decay=5e-4,
        weight_decay_on="no_norm_bias",
    ),
    train=dict(epochs=200.0),
    checkpoint=dict(every_steps=2000),
)

CLIPPED_SGD = dict(name="sgd", reference_batch_size=64, nesterov=True, weight_decay=5e-4, clip_grad_norm=1.0)
"""For small sets; what clipping is for stands in `DIGITS`."""

DIGITS = dict(
    # 1,437 training images of 8×8, shown at 32×32: small enough that a laptop's CPU learns them in a minute or
    # two. Everything was chosen on training images (data.holdout_fraction of 0.2, 0.3 and 0.5). On so small images
    # the gradient's norm begins at 20 (50 to 80 with the paper's strides, in PyTorch too), and without clipping
    # the network errs twice as often or diverges.
    model=dict(dropout=0.3, init="kaiming_fan_out", strides=(2, 2, 2, 1, 2)),
    # On 861 held-out images of three seeds 4 errors with groups of 16, 9 with 64, 8 with 8; 16 are for 1 to 4 devices.
    norm=dict(group_size=16, decay=0.99, epsilon=1e-3),
    data=dict(
        name="digits",
        resolution=32,
        batch_size=64,
        crop="shift",
        pad_pixels=3,
        flip=False,
        eval_crop_fraction=1.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    loss=dict(label_smoothing=0.1),
    optim=dict(CLIPPED_SGD, reference_lr=0.05),
    train=dict(epochs=60.0, eval_every_epochs=20.0),
    log=dict(every_steps=20),
    checkpoint=dict(every_steps=1000),
)

SCRATCH = dict(
    # Random weights and some thousand images: the paper's RMSProp, made for millions, learns next to nothing in so few
    # steps. SGD and cosine as in `CIFAR`, the crops of torchvision's ImageNet training, clipped as in `DIGITS`.
    model=dict(dropout=0.2, init="kaiming_fan_out"),
    norm=dict(decay=0.9, epsilon=1e-3),
    data=dict(name="folder", batch_size=64),
    loss=dict(label_smoothing=0.1),
    optim=dict(CLIPPED_SGD, reference_lr=0.1),
    train=dict(epochs=60.0),
)

RECIPES: dict[str, dict[str, Any]] = {"paper": PAPER, "cifar": CIFAR, "digits": DIGITS, "scratch": SCRATCH}
RECIPE_OF_DATA = {"digits": "digits", "cifar10": "cifar", "folder": "scratch", "tfds": "scratch"}
"""Which recipe a data set has where none is asked for; the others have the paper's."""

_NATIVE_RESOLUTION = {
    "mobilenet_v4_conv_medium": 256,
    "mobilenet_v4_conv_large": 384,
    "mobilenet_v4_hybrid_medium": 256,
    "mobilenet_v4_hybrid_large": 384,
}
"""Where it isn't 224."""


def native_resolution(model: str | None) -> int:
    """What a network was published for, in pixels."""
    return _NATIVE_RESOLUTION.get(model or ModelConfig.name, DataConfig.resolution)


ARGUMENT_KEYS = ("data", "path", "res", "recipe", "classes", "batch")


def parse_arg(arg: str) -> dict[str, str]:
    """Parses ``data=cifar10,path=DIR`` (keys: `ARGUMENT_KEYS`).

    Raises:
      UserError: for a key that isn't one of them, a missing value, or a key given twice.
    """
    parsed: dict[str, str] = {}
    for item in filter(None, arg.split(",")):
        key, separator, value = item.partition("=")
        if key not in ARGUMENT_KEYS:
            raise UserError(f"unknown argument {key!r}{nearest(key, ARGUMENT_KEYS)}")
        if not separator or not value:
            raise UserError(f"argument {key!r} needs a value, as in {key}=…")
        if key in parsed:
            raise UserError(f"argument {key!r} is given twice")
        parsed[key] = value
    return parsed


def _integer(parsed: dict[str, str], key: str) -> int:
    try:
        value = int(parsed[key])
    except ValueError:
        value = 0
    if value < 1:
        raise UserError(f"{key}={parsed[key]} must be a whole number of at least 1")
    return value


def preset(arg: str = "", **model: Any) -> ml_collections.ConfigDict:
    """A recipe with the deltas of ``arg`` and of ``model``.

    Args:
      arg: comma-separated ``key=value``. data: digits, cifar10, imagenet, folder:PATH or tfds:NAME (unset: the
        recipe's); path: where it lies; res: resolution in pixels; recipe: a key of `RECIPES`; classes: number of
        classes; batch: images a step, which also sets the norm group to its largest divisor up to the recipe's.
        Where neither it nor the recipe has a resolution, it is the network's own (`native_resolution`).
      **model: fields of `config.ModelConfig`, as ``width=0.35``.

    Raises:
      UserError: for an argument that can't be used.
    """
    parsed = parse_arg(arg)
    data, _, folder = parsed.get("data", "").partition(":")
    recipe = parsed.get("recipe", RECIPE_OF_DATA.get(data, "paper"))
    if recipe not in RECIPES:
        raise UserError(f"recipe={recipe} is not one of ours{nearest(recipe, RECIPES)}")
    data = data or RECIPES[recipe]["data"]["name"]
    config = ml_collections.ConfigDict(RECIPES[recipe], convert_dict=True)
    config.model.update(model)
    config.data.name = parsed["data"] if data == "tfds" else data
    if data == "digits" and (folder or "path" in parsed):
        raise UserError(f"data=digits comes with scikit-learn; leave {folder or parsed['path']!r} out")
    if folder and data != "tfds":
        if "path" in parsed:
            raise UserError(f"data={parsed['data']} and path={parsed['path']} both give the path; leave one out")
        config.data.path = folder
    if "path" in parsed:
        config.data.path = parsed["path"]
    if "res" in parsed:
        config.data.resolution = _integer(parsed, "res")
    elif "resolution" not in config.data:
        config.data.resolution = native_resolution(config.model.get("name"))
    if "classes" in parsed:
        config.model.num_classes = _integer(parsed, "classes")
    if "batch" in parsed:
        batch = config.data.batch_size = _integer(parsed, "batch")
        largest = min(config.norm.get("group_size", NormConfig.group_size), batch)
        group = config.norm.group_size = max(n for n in range(1, largest + 1) if batch % n == 0)
        if group < min(8, batch):
            raise UserError(
                f"batch={batch} divides into norm groups of no more than {group}; take {-(-batch // 8) * 8}, or set"
                " --config.data.batch_size and --config.norm.group_size"
            )
    return config
