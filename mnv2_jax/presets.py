"""Experiments as `ConfigDict`s, and the argument that every config file takes after its colon."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mnv2_jax.config import DataConfig, ModelConfig, NormConfig, Origin, Preset, Source, flatten
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.recipes import RECIPES, REFUSED, Recipe, resolve

RECIPE_OF_DATA = {"digits": "digits", "cifar10": "cifar", "folder": "scratch", "tfds": "scratch"}
"""Which recipe a data set takes where none is asked for; the others take that of the config file."""

_WITHOUT_FILES = {"digits": "comes with scikit-learn", "synthetic": "is made on the fly"}
"""Data sets that lie nowhere, and why."""

WHATEVER_THE_DATA = ("finetune",)
"""Recipes of config files that every data set takes."""

_NATIVE_RESOLUTION = {
    "mobilenet_v4_conv_medium": 256,
    "mobilenet_v4_conv_large": 384,
    "mobilenet_v4_hybrid_medium": 256,
    "mobilenet_v4_hybrid_large": 384,
}
"""Published resolutions other than 224, in pixels."""


def native_resolution(model: str | None) -> int:
    """Resolution that a network was published for, in pixels."""
    return _NATIVE_RESOLUTION.get(model or ModelConfig.name, DataConfig.resolution)


_ARGUMENT = {
    "data": ("data.name", "data.path"),
    "path": ("data.path",),
    "res": ("data.resolution", "data.eval_resolution"),
    "recipe": (),
    "classes": ("model.num_classes",),
    "batch": ("data.batch_size",),
}
"""Keys of the argument of a config file, each with the keys of the config that it says."""
ARGUMENT_KEYS = tuple(_ARGUMENT)
_CHANGED = ("model", "norm", "data", "optim")
"""Sections that an argument may change; a recipe of one's own needn't have them all."""


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


def preset(arg: str, *, data: str, recipe: str, recipes: Mapping[str, Recipe] | None = None, **model: Any) -> Preset:
    """The experiment of a config file, or what the argument makes of it.

    Args:
      arg: comma-separated ``key=value``. data: digits, cifar10, imagenet, synthetic, folder:PATH or tfds:NAME; path:
        where it lies; res: resolution in pixels, of training and evaluation; recipe: a key of `recipes.RECIPES` or of
        ``recipes``; classes: number of classes; batch: images a step, which the recipe's schedule follows
        (`_follow_batch`), and which sets the norm group to its largest divisor up to the recipe's. Other data than the
        file's take a recipe of theirs (`RECIPE_OF_DATA`), another recipe data of its, unless both are said. Where
        neither it nor the recipe has a resolution, it is the network's own (`native_resolution`).
      data: the file's.
      recipe: the file's.
      recipes: its own, beside those of the package: a tree of config keys each, which names its data (``data.name``),
        or a function from the model's name and width to one.
      **model: fields of `config.ModelConfig`, as ``name="mobilenet_v2", width=0.35``.

    Raises:
      UserError: for an argument that can't be used.
    """
    parsed = parse_arg(arg)
    kind, _, folder = parsed.get("data", "").partition(":")
    taken = parsed.get("recipe") or _usual_recipe(kind or data, data, recipe)
    known = {**RECIPES, **(recipes or {})}
    if doubled := sorted({*RECIPES, *REFUSED} & {*(recipes or {})}):
        raise UserError(f"recipes: {doubled[0]!r} is the package's own; give yours another name")
    if taken in REFUSED:
        raise UserError(f"recipe={taken} can't be run: {REFUSED[taken]}")
    if taken not in known:
        raise UserError(f"recipe={taken} is not known{nearest(taken, known)}")
    said = resolve(taken, known[taken], model.get("name", ModelConfig.name), model.get("width", ModelConfig.width))
    tree: dict[str, Any] = {section: {} for section in _CHANGED} | said
    if "name" not in tree["data"]:
        raise UserError(f"recipe={taken}: it doesn't say data.name; add the data that it was made for")
    kind = kind or (data if taken == recipe else tree["data"]["name"])
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
    origins |= {"data.name": "file"} if taken == recipe else {}
    origins |= dict.fromkeys((key for name in parsed for key in _ARGUMENT[name]), "argument")
    variant = _variant(config.data.name, taken, tree["data"]["name"], data, recipe)
    config.begin(Source(taken, variant, origins, values))
    return config


def _usual_recipe(kind: str, data: str, recipe: str) -> str:
    """Which recipe data take where none is asked for, given data and recipe of the config file."""
    return recipe if kind == data or recipe in WHATEVER_THE_DATA else RECIPE_OF_DATA.get(kind, recipe)


def _variant(name: str, taken: str, its_data: str, data: str, recipe: str) -> str:
    """Suffix that tells an experiment on the data ``name`` by the recipe ``taken`` from that of the config file."""
    if (name, taken) == (data, recipe):
        return ""
    if taken == _usual_recipe(name.partition(":")[0], data, recipe):
        told = name
    else:
        told = taken if name == its_data else f"{name}-{taken}"
    return "-" + re.sub(r"[^\w.-]+", "_", told)  # a part of a path


def _follow_batch(config: Preset, batch: int) -> None:
    """Sets the batch size and what hangs on it.

    Learning rates change with it (that of the peak in `Config.peak_lr`), and numbers of steps so that they are as
    many images. What is said per step of an average, `norm.decay` and `optim.ema_decay`, stays.
    """
    factor = batch / config.data.get("batch_size", DataConfig.batch_size)
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
