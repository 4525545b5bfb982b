"""Every command of README.md and docs/ exists: its flags, its config and its options are read as if it ran."""

import importlib
import re
import shutil
import tomllib

import jax
import numpy as np
import pytest
from PIL import Image

import mnv2_jax
from mnv2_jax import config, flags
from mnv2_jax.__main__ import DOORS
from mnv2_jax.config.options import OPTIONS
from mnv2_jax.data import imagenet
from tests import cli, docs
from tests.data import boxed, masked
from tests.data.test_prepare import original_files, write_tars

OTHERS = {".", "docker", "export", "tensorboard", "sed", "python3.11", "pytest"}
"""Programs of others that the pages name, whose flags aren't looked at."""
MODULES = {module.removesuffix(".__main__") for module, _ in DOORS.values()}


class Parsed(Exception):  # noqa: N818
    """Raised instead of running a command: its flags and its overrides."""


@pytest.fixture
def only_parsed(monkeypatch):
    """Makes every command end once its flags are parsed."""
    parse = flags.Parser.parse

    def parse_and_end(self, argv):
        raise Parsed(*parse(self, argv))

    monkeypatch.setattr(flags.Parser, "parse", parse_and_end)


def every_command():
    """All different commands of the pages, by their page and their words."""
    found = {}
    for page in docs.PAGES:
        for words in [*docs.commands(page), *docs.quoted_commands(page)]:
            found.setdefault(tuple(words), page)
    return [pytest.param(page, words, id=" ".join(words)[:100]) for words, page in found.items()]


def door(words):
    """The module of a command of ours and its arguments; None for another program."""
    while words and re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
        words = words[1:]
    if words[0] == "mnv2":
        return (DOORS[words[1]][0], words[2:]) if words[1] != "--help" else ("__main__", words[1:])
    if words[:2] == ("python", "-m") and words[2].startswith("mnv2_jax"):
        name = words[2].removeprefix("mnv2_jax").removeprefix(".")
        assert name in MODULES
        return next(module for module, _ in DOORS.values() if module.removesuffix(".__main__") == name), words[3:]
    if "launch/" in " ".join(words[:5]):
        script = next(word for word in words if word.startswith("launch/"))
        assert (docs.ROOT / script).is_file()
        return ("main", [word for word in words if word.startswith("--config")])
    return None


@pytest.mark.parametrize(("page", "words"), every_command())
def test_a_command_of_the_pages_can_be_given(page, words, only_parsed, monkeypatch, tmp_path):
    opened = door(words)
    if opened is None:
        return check_another_program(page, words)
    module, arguments = opened
    docs.write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mnv2", *arguments])
    try:
        importlib.import_module(f"mnv2_jax.{module}").main()
    except SystemExit as end:
        answered = end.code == 0
    except Parsed as parsed:
        answered, (args, overrides) = False, parsed.args
    else:
        answered = True
    if {"--help", "--list"} & {*arguments}:
        assert answered
        return None
    keys = {override.partition("=")[0] for override in overrides}
    assert keys <= set(OPTIONS)
    spec = getattr(args, "config", None)
    if spec and spec.partition(":")[0] in config.config_files():
        assert config.load(spec, overrides)
    return None


def check_another_program(page, words):
    """A target of the Makefile, an extra of the package, a file of the page or of the repository."""
    program, *rest = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (docs.ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program in ("pip", ".venv/bin/pip"):
        project = tomllib.loads((docs.ROOT / "pyproject.toml").read_text())["project"]
        extras = {name for word in rest for name in re.findall(r"^\.\[([\w,]+)\]$", word)}
        assert extras <= set(project["optional-dependencies"])
    elif program == "python":
        name = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
        assert name in docs.files(page) or (docs.ROOT / name).is_file()
    else:
        assert program in OTHERS


# --- run, in a small world ----------------------------------------------------------------------------------

CLASSES = ("n01443537", "n01484850")  # goldfish and white shark, which ImageNet-R has, too
SMALL = (
    *("--config.data.resolution=32", "--config.data.batch_size=8", "--config.norm.group_size=8"),
    "--config.log.tensorboard=False",
)
"""What makes a training of the pages short; its epochs are in `EPOCHS`."""
EPOCHS = {"data=digits": 0.1, "data=": 1, "path=": 1}
FURTHER = {
    "recipe=corenet_v2": ("--config.data.scales=()", "--config.optim.warmup_steps=1"),
    "data=synthetic": ("--config.data.synthetic_images=(16,8)",),
    "photos": ("--config.data.num_workers=0",),
    "imagenet": ("--config.data.num_workers=0",),
}
"""Flags that some trainings need besides."""
IN_SMALL = {
    "--config.train.epochs=90": "--config.train.epochs=0.2",
    "timm/mobilenetv2_100.ra_in1k": "v2.safetensors",  # a name is fetched from a server: tests/weights/test_hub.py
    "--steps=400": "--steps=20",
    "/share/imagenet": "imagenet",
}
"""Words of the commands that the small world has otherwise."""
ELSEWHERE = {
    r"\bbench\b": "tests/test_bench*.py, and the numbers of docs/results.md",
    r"launch/": "tests/test_launch.py",
    r"\bstudy\b": "takes minutes: tests/study/",
    r"--format=web": "fetches a package by npm: tests/export/test_web.py",
    r"--format=coreml": "needs an extra of its own: tests/export/test_coreml.py",
    r"data=imagenet_r": "needs all its 200 classes: tests/data/test_sources.py",
    r"\.tflite|\.h5|timm/mobilenetv3": "tests/test_convert.py, with real files",
    r"\.pth|v3\.safetensors|ssdlite\.safetensors": "torchvision's dense networks: tests/weights/test_parity_dense.py",
}
"""Commands that aren't run here, with where they are, or why not."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with small data under the names that the pages use, weights, and two trained runs."""
    world = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for number in range(count):
            path = world / "photos" / split / CLASSES[number % 2] / f"{split}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    for name in ("imagenet", "clothes", "samples"):
        shutil.copytree(world / "photos", world / name)
    shutil.copytree(world / "photos" / "val", world / "imagenet-r")
    masked.streets(world / "streets")
    masked.pair(*(world / "streets" / name / "test" for name in ("images", "masks")), "f", 0, 1, 2, 255)
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for number in range(count):
            name = f"{split}/{split}_{number}"
            boxed.picture(world / "cells" / "images" / f"{name}.png")
            boxed.lines(world / "cells" / "labels" / f"{name}.txt", (number % 2, 0.5, 0.5, 0.4, 0.4))
    (world / "cells" / "classes.txt").write_text("red\nwhite\n")
    arrays = {f"x_{split}": rng.integers(0, 256, (20, 32, 32, 3), np.uint8) for split in ("train", "test")}
    arrays |= {f"y_{split}": np.arange(20) % 10 for split in ("train", "test")}
    (world / "cifar10").mkdir()
    np.savez(world / "cifar10" / "cifar10.npz", **arrays)
    model = mnv2_jax.create_model("mobilenet_v2", 1000)
    variables = model.init(jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))
    info = mnv2_jax.WeightsInfo(preprocessing=mnv2_jax.Preprocessing(resolution=32), labels=imagenet.class_ids())
    mnv2_jax.save_weights(world / "v2.safetensors", model, variables, info)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for command in (
            "mnv2 train --config=w0_35:data=digits",
            "mnv2 train --config=finetune:data=folder:photos --config.init.weights=v2.safetensors",
        ):
            run(tuple(command.split()))
    return world


def run(words):
    """Runs a command of a page, made small, in this process."""
    module, arguments = door(words)
    arguments = [
        next((word.replace(large, small) for large, small in IN_SMALL.items() if large in word), word)
        for word in arguments
    ]
    line = " ".join(arguments)
    if module in ("main", "lr_find") and "--config=" in line and "--mode=" not in line and "--help" not in line:
        epochs = next((count for key, count in EPOCHS.items() if key in line), 1)
        given = {word.partition("=")[0] for word in arguments}
        small = [
            *SMALL,
            f"--config.train.epochs={epochs}",
            *(f for key, f in FURTHER.items() if key in line for f in f),
        ]
        arguments += [flag for flag in dict.fromkeys(small) if flag.partition("=")[0] not in given]
    result = cli.here(module, *arguments)
    assert result.returncode == 0, (arguments, result.stderr)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", docs.PAGES, ids=lambda page: page.name)
def test_a_page_from_its_first_command_to_its_last(page, world, tmp_path, monkeypatch):
    if page == docs.LIBRARY:
        pytest.skip("tests/test_docs.py runs it")
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    docs.write_files(page, tmp_path / "world")
    for words in map(tuple, docs.commands(page)):
        line = " ".join(words)
        if door(words) is None or any(re.search(pattern, line) for pattern in ELSEWHERE):
            continue
        if words[:3] == ("mnv2", "prepare", "imagenet"):
            write_tars(tmp_path / "world" / "tars", original_files())
            shutil.rmtree("imagenet")
            words += ("--allow-incomplete",)
        run(words)
