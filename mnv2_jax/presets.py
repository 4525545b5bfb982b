"""Recipes as `ConfigDict`s, and the argument that every config file takes after its colon."""

from __future__ import annotations

from typing import Any

import ml_collections

from mnv2_jax.config import DataConfig, ModelConfig, NormConfig
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.recipes import RECIPES, REFUSED, resolve

RECIPE_OF_DATA = {"digits": "digits", "cifar10": "cifar", "folder": "scratch", "tfds": "scratch"}
"""Which recipe a data set has where none is asked for; the others have that of the config file."""

WHATEVER_THE_DATA = ("finetune",)
"""Recipes of config files that don't give way to that of a data set."""

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
        last = next(reversed(parsed.items()), ("", ""))
        is_path = last[0] == "path" or (last[0] == "data" and ":" in last[1] and not last[1].startswith("tfds:"))
        hint = f"; if that belongs to {last[1]!r}, give the path by --config.data.path" if is_path else ""
        if key not in ARGUMENT_KEYS:
            raise UserError(f"unknown argument {(item if hint else key)!r}{nearest(key, ARGUMENT_KEYS)}{hint}")
        if not separator or not value:
            raise UserError(f"argument {key!r} needs a value, as in {key}=…{hint}")
        if key in parsed:
            raise UserError(f"argument {key!r} is given twice{hint}")
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


def preset(arg: str = "", recipe: str = "paper", **model: Any) -> ml_collections.ConfigDict:
    """A recipe with the deltas of ``arg`` and of ``model``.

    Args:
      arg: comma-separated ``key=value``. data: digits, cifar10, imagenet, folder:PATH or tfds:NAME (unset: the
        recipe's); path: where it lies; res: resolution in pixels, of training and evaluation; recipe: a key of
        `recipes.RECIPES`; classes: number of classes; batch: images a step, which the recipe's schedule follows
        (`_follow_batch`), and which sets the norm group to its largest divisor up to the recipe's.
        Where neither it nor the recipe has a resolution, it is the network's own (`native_resolution`).
      recipe: where ``arg`` names none: that of ImageNet, or one of `WHATEVER_THE_DATA`.
      **model: fields of `config.ModelConfig`, as ``width=0.35``.

    Raises:
      UserError: for an argument that can't be used.
    """
    parsed = parse_arg(arg)
    data, _, folder = parsed.get("data", "").partition(":")
    if "recipe" in parsed:
        recipe = parsed["recipe"]
    elif recipe not in WHATEVER_THE_DATA:
        recipe = RECIPE_OF_DATA.get(data, recipe)
    if recipe in REFUSED:
        raise UserError(f"recipe={recipe} can't be run: {REFUSED[recipe]}")
    if recipe not in RECIPES:
        raise UserError(f"recipe={recipe} is not one of ours{nearest(recipe, RECIPES)}")
    tree = resolve(recipe, model.get("name", ModelConfig.name), model.get("width", ModelConfig.width))
    config = ml_collections.ConfigDict(tree, convert_dict=True)
    config.model.update(model)
    data = data or config.data.name
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
        config.data.resolution, config.data.eval_resolution = _integer(parsed, "res"), None
    elif "resolution" not in config.data:
        config.data.resolution = native_resolution(config.model.get("name"))
    if "classes" in parsed:
        config.model.num_classes = _integer(parsed, "classes")
    if "batch" in parsed:
        _follow_batch(config, _integer(parsed, "batch"))
    return config


def _follow_batch(config: ml_collections.ConfigDict, batch: int) -> None:
    """Sets the batch size and what hangs on it.

    Learning rates change with it (that of the peak in `Config.linear_lr`), and numbers of steps so that they are as
    many images. What is said per step of an average, `norm.decay` and `optim.ema_decay`, stays.
    """
    factor = batch / config.data.batch_size
    config.data.batch_size = batch
    optim = config.optim
    optim.update({key: optim[key] * factor for key in ("warmup_init_lr", "final_lr") if key in optim})
    optim.update(
        {key: max(round(optim[key] / factor), 1) for key in ("warmup_steps", "decay_every_steps") if key in optim}
    )
    # Of several resolutions, a batch of the largest has the fewest images; they should be a group at least.
    resolution = config.data.resolution
    fewest = batch * resolution**2 // max(config.data.get("scales", (resolution,))) ** 2
    largest = max(min(config.norm.get("group_size", NormConfig.group_size), batch, fewest), 1)
    group = config.norm.group_size = max(n for n in range(1, largest + 1) if batch % n == 0)
    if group < min(8, largest // 2 + 1):
        raise UserError(
            f"batch={batch} divides into norm groups of no more than {group}; take {-(-batch // 8) * 8}, or set"
            " --config.data.batch_size and --config.norm.group_size"
        )
