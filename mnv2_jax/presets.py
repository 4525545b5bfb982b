"""Builds the `ConfigDict` of an experiment from a config file and the argument that follows its colon."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mnv2_jax.config import DataConfig, ModelConfig, NormConfig, Origin, Preset, Source, flatten
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.recipes import RECIPES, REFUSED, Recipe, resolve

RECIPE_OF_DATA = {"digits": "digits", "cifar10": "cifar", "folder": "scratch", "tfds": "scratch"}
"""Default recipes of data sets. A data set that isn't listed uses the recipe of the config file."""

_WITHOUT_FILES = {"digits": "comes with scikit-learn", "synthetic": "is made on the fly"}
"""Data sets that have no path, and the reason."""

DATA_INDEPENDENT_RECIPES = ("finetune", "segment", "detect")
"""Recipes of config files that stay the default for every data set."""

_NATIVE_RESOLUTION = {
    "mobilenet_v4_conv_medium": 256,
    "mobilenet_v4_conv_large": 384,
    "mobilenet_v4_hybrid_medium": 256,
    "mobilenet_v4_hybrid_large": 384,
}
"""Published resolutions of networks, in pixels, where that is not 224."""


def native_resolution(model: str | None) -> int:
    """Returns the resolution that a network was published for, in pixels."""
    return _NATIVE_RESOLUTION.get(model or ModelConfig.name, DataConfig.resolution)


_ARGUMENT = {
    "data": ("data.name", "data.path"),
    "path": ("data.path",),
    "res": ("data.resolution", "data.eval_resolution"),
    "recipe": (),
    "classes": ("model.num_classes",),
    "batch": ("data.batch_size",),
}
"""Keys of the argument of a config file, each with the keys of the config that it sets."""
ARGUMENT_KEYS = tuple(_ARGUMENT)
_ARGUMENT_SECTIONS = ("model", "norm", "data", "optim")
"""Sections that an argument may change. They are made empty where a user's own recipe lacks them."""


def parse_arg(arg: str) -> dict[str, str]:
    """Parses ``data=cifar10,path=DIR`` (keys: `ARGUMENT_KEYS`).

    Raises:
      UserError: for a key that isn't one of them, a missing value, or a key that is given twice.
    """
    parsed: dict[str, str] = {}
    for item in filter(None, arg.split(",")):
        key, separator, value = item.partition("=")
        last_key, last_value = next(reversed(parsed.items()), ("", ""))
        is_path = last_key == "path" or (
            last_key == "data" and ":" in last_value and not last_value.startswith("tfds:")
        )
        hint = f"; if that belongs to {last_value!r}, set the path with --config.data.path" if is_path else ""
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


def preset(arg: str, *, data: str, recipe: str, recipes: Mapping[str, Recipe] | None = None, **model: Any) -> Preset:
    """Builds the experiment of a config file, as the argument changes it.

    Args:
      arg: comma-separated ``key=value``.
        data: digits, cifar10, imagenet, synthetic, folder:PATH or tfds:NAME. Data other than the file's come with their
          default recipe (`RECIPE_OF_DATA`), unless the argument names a recipe.
        path: where the data are.
        res: resolution in pixels, of training and evaluation; if neither the argument nor the recipe sets it, the
          network's own (`native_resolution`).
        recipe: a key of `recipes.RECIPES` or of ``recipes``. A recipe other than the file's comes with its own data,
          unless the argument names data.
        classes: number of classes.
        batch: images per step. The recipe's schedule follows it (`_follow_batch`), and the norm group becomes its
          largest divisor up to the recipe's group.
      data: data of the config file.
      recipe: recipe of the config file.
      recipes: recipes of the config file, beside those of the package. Each is a tree of config keys, which has
        ``data.name``, or a function from the model's name and width to such a tree.
      **model: fields of `config.ModelConfig`, as in ``name="mobilenet_v2", width=0.35``.

    Raises:
      UserError: for an argument that can't be used.
    """
    parsed = parse_arg(arg)
    kind, _, folder = parsed.get("data", "").partition(":")
    recipe_name = parsed.get("recipe") or _default_recipe(kind or data, data, recipe)
    all_recipes = {**RECIPES, **(recipes or {})}
    if duplicates := sorted({*RECIPES, *REFUSED} & {*(recipes or {})}):
        raise UserError(f"recipes: {duplicates[0]!r} is the package's own; give yours another name")
    if recipe_name in REFUSED:
        raise UserError(f"recipe={recipe_name} can't be run: {REFUSED[recipe_name]}")
    if recipe_name not in all_recipes:
        raise UserError(f"recipe={recipe_name} does not exist{nearest(recipe_name, all_recipes)}")
    network = model.get("name", ModelConfig.name), model.get("width", ModelConfig.width)
    recipe_tree = resolve(recipe_name, all_recipes[recipe_name], *network)
    tree: dict[str, Any] = {section: {} for section in _ARGUMENT_SECTIONS} | recipe_tree
    if "name" not in tree["data"]:
        raise UserError(f"recipe={recipe_name}: the recipe has no data.name; add the data that it was made for")
    kind = kind or (data if recipe_name == recipe else tree["data"]["name"])
    config = Preset(tree, convert_dict=True)
    config.model.update(model)
    config.data.name = parsed["data"] if kind == "tfds" else kind
    if kind in _WITHOUT_FILES and (folder or "path" in parsed):
        raise UserError(f"data={kind} {_WITHOUT_FILES[kind]}; leave {folder or parsed['path']!r} out")
    if folder and kind != "tfds":
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
        if kind == "synthetic":
            config.data.synthetic_classes = config.model.num_classes
    if "batch" in parsed:
        _follow_batch(config, _integer(parsed, "batch"))

    values = flatten(config.to_dict())
    origins: dict[str, Origin] = dict.fromkeys(values, "recipe")
    origins |= dict.fromkeys((f"model.{key}" for key in model), "file")
    origins |= {"data.name": "file"} if recipe_name == recipe else {}
    origins |= dict.fromkeys((key for name in parsed for key in _ARGUMENT[name]), "argument")
    variant = _variant(config.data.name, recipe_name, tree["data"]["name"], data, recipe)
    config.begin(Source(recipe_name, variant, origins, values))
    return config


def _default_recipe(kind: str, data: str, recipe: str) -> str:
    """Returns the recipe for data of this kind where the argument names none; ``data``, ``recipe``: the file's."""
    return recipe if kind == data or recipe in DATA_INDEPENDENT_RECIPES else RECIPE_OF_DATA.get(kind, recipe)


def _variant(data_name: str, recipe_name: str, recipe_data: str, data: str, recipe: str) -> str:
    """Returns the suffix that tells an experiment from the config file's, which has ``data`` and ``recipe``.

    Args:
      data_name: data of the experiment.
      recipe_name: its recipe.
      recipe_data: the data that the recipe was made for.
      data: data of the config file.
      recipe: recipe of the config file.
    """
    if (data_name, recipe_name) == (data, recipe):
        return ""
    if recipe_name == _default_recipe(data_name.partition(":")[0], data, recipe):
        suffix = data_name
    else:
        suffix = recipe_name if data_name == recipe_data else f"{data_name}-{recipe_name}"
    return "-" + re.sub(r"[^\w.-]+", "_", suffix)  # becomes a part of a path


def _follow_batch(config: Preset, batch: int) -> None:
    """Sets the batch size and the options that depend on it.

    Learning rates are scaled with the batch (`Config.peak_lr` does so for the peak), and numbers of steps are changed
    so that they span as many images as before. The decays per step of averages, `norm.decay` and `optim.ema_decay`,
    stay as they are.
    """
    factor = batch / config.data.get("batch_size", DataConfig.batch_size)
    config.data.batch_size = batch
    optim = config.optim
    optim.update({key: optim[key] * factor for key in ("warmup_init_lr", "final_lr") if key in optim})
    optim.update(
        {key: max(round(optim[key] / factor), 1) for key in ("warmup_steps", "decay_every_steps") if key in optim}
    )
    # Where there are several resolutions, the batch of the largest has the fewest images. It should be a whole group.
    resolution = config.data.resolution
    smallest_batch = batch * resolution**2 // max(config.data.get("scales", (resolution,))) ** 2
    largest = max(min(config.norm.get("group_size", NormConfig.group_size), batch, smallest_batch), 1)
    group = config.norm.group_size = max(n for n in range(1, largest + 1) if batch % n == 0)
    if group < min(8, largest // 2 + 1):
        raise UserError(
            f"batch={batch} divides into norm groups of no more than {group} images; take {-(-batch // 8) * 8}, or set"
            " --config.data.batch_size and --config.norm.group_size"
        )
