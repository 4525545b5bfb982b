"""The package as it is installed from a wheel, in a folder with nothing else."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import cli

SHORT = ("--config.train.steps=4", "--json")


def pip(*arguments):
    """Runs pip without a network, in silence."""
    flags = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    command = [sys.executable, "-m", "pip", *map(str, arguments), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where a wheel of the sources lies installed."""
    top = tmp_path_factory.mktemp("wheel")
    for name in ("mnv2_jax", "configs"):  # copied, for setuptools builds beside them
        shutil.copytree(cli.ROOT / name, top / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(cli.ROOT / name, top / "sources")
    pip("wheel", top / "sources", "--no-build-isolation", "--wheel-dir", top)
    pip("install", "--target", top / "target", next(top.glob("*.whl")))
    return top / "target"


@pytest.mark.slow
def test_a_wheel_is_all_that_is_needed(installed, tmp_path):
    def run(*command):
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            env=cli.environment() | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = pathlib.Path(run("-c", "import mnv2_jax; print(mnv2_jax.__file__)").strip())
    assert where.parent == installed / "mnv2_jax"

    shrunk = "--config.model.depth=0.3"
    first = run(installed / "bin" / "mnv2", "train", "--config=w0_35:data=digits,batch=32,res=16", shrunk, *SHORT)
    assert json.loads(first)["eval"]["count"] == 360
    weights = "runs/w0_35-digits"
    assert (tmp_path / weights / "report.html").is_file()

    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{n}.png")
    tuned = run(
        *("-m", "mnv2_jax.main", "--config=finetune:data=folder:images,res=32,batch=8", "--config.model.width=0.35"),
        *(f"--config.init.weights={weights}", "--config.init.head=new", shrunk, *SHORT),
    )
    assert json.loads(tuned)["eval"]["count"] == 4
    answer = run("-m", "mnv2_jax.predict", "--workdir=runs/finetune", "images/val/cat/0.png", "--json")
    assert '"cat"' in answer
    assert '"dog"' in answer
