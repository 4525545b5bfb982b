"""What is installed from a wheel is what the checkout is: in an empty folder, without the repository."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import setuptools
from PIL import Image

from tests import cli


def test_no_package_is_missing():
    listed = tomllib.loads((cli.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = setuptools.find_namespace_packages(cli.ROOT, include=["mnv2_jax*"], exclude=["*__pycache__*"])
    assert sorted(listed) == sorted([*found, "mnv2_jax.configs"])


@pytest.fixture
def installed(tmp_path):
    """The folder of a wheel's content, which is all that Python finds of the package."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # setuptools leaves its build folder where it builds
    for folder in ("mnv2_jax", "configs"):
        shutil.copytree(cli.ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(cli.ROOT / file, source)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True, env=os.environ | {"PYTHONWARNINGS": "default"})
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    return site


@pytest.mark.slow
def test_the_wheel_trains_fine_tunes_and_predicts_in_an_empty_folder(installed, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        place = empty / "photos" / ["cat", "dog"][number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8) // (1 + number % 2)
        Image.fromarray(pixels).save(place / f"{number}.png")

    def run(verb, *arguments):
        command = [sys.executable, "-m", f"mnv2_jax.{verb}", *arguments]
        result = subprocess.run(
            command, env=cli.environment() | {"PYTHONPATH": str(installed)}, cwd=empty, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    code = "import mnv2_jax; print(mnv2_jax.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=empty,
        capture_output=True,
        text=True,
    )
    assert pathlib.Path(where.stdout.strip()).is_relative_to(installed)
    small = ("--config.model.depth=0.3", "--config.train.steps=4", "--json")
    digits = json.loads(run("main", "--config=w0_25:data=digits,res=16,batch=32", *small))
    assert (digits["steps"], digits["eval"]["count"]) == (4, 360)
    tuned = json.loads(
        run(
            "main",
            "--config=finetune:data=folder:photos,res=32,batch=8",
            "--config.init.weights=runs/w0_25-digits",
            "--config.init.head=new",
            "--config.model.width=0.25",
            *small,
        )
    )
    assert tuned["steps"] == 4
    answers = json.loads(run("predict", "--workdir=runs/finetune", "--json", "photos/cat"))
    assert len(answers) == 12
    assert {answer["top"][0]["label"] for answer in answers} <= {"cat", "dog"}
    run("convert", "runs/finetune", "mine.safetensors")
    assert (empty / "mine.safetensors").stat().st_size > 1e5
