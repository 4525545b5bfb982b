"""Checks an exported file in its own runtime, in a fresh process, against the JAX model on real images."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.export.function import Exportable

BOUND = 1e-4
"""Largest difference that a float32 file may have, as a share of the largest absolute value of the output, or of 1."""


class RejectedError(UserError):
    """A file that was written doesn't compute what the model computes."""

    exit_code = 1


class Checked(NamedTuple):
    """Result of a check."""

    size_mb: float
    """Size of the file, or of all in a folder, in millions of bytes."""
    difference: float
    """Largest difference of an output, as a share of its largest absolute value, or of 1 if that is larger."""
    agreement: float
    """Share of the images with the same first answer."""
    ms_one_core: float
    ms_all_cores: float
    """Milliseconds an image at batch 1, the median of up to 50 runs."""


def expected_outputs(exportable: Exportable, images: np.ndarray) -> dict[str, np.ndarray]:
    """Computes the outputs of the JAX model by their names."""
    outputs = jax.jit(exportable.apply)(exportable.variables, images)
    return {name: np.asarray(value) for name, value in outputs.items()}


def check(path: pathlib.Path, form: str, images: np.ndarray, expected: Mapping[str, np.ndarray]) -> Checked:
    """Runs a file in its runtime and compares.

    Args:
      path: the file.
      form: name of the format, of `runtimes.RUNTIMES`.
      images: input [n, h, w, 3] of the type that the file takes.
      expected: the outputs of the JAX model.

    Raises:
      UserError: if the runtime can't run the file.
    """
    actual, ms_one_core = _run(path, form, images, "one")
    _, ms_all_cores = _run(path, form, images[:1], "all")
    kinds, right = ({name: (x.shape, x.dtype.name) for name, x in outputs.items()} for outputs in (actual, expected))
    if kinds != right:
        raise RejectedError(f"{path}: its outputs are {kinds}; the model's are {right}")
    floats = [name for name, value in expected.items() if value.dtype.kind == "f"]
    differences = [
        float(abs(actual[name] - expected[name]).max() / max(1.0, abs(expected[name]).max())) for name in floats
    ]
    same = [_first_answer(name, actual) == _first_answer(name, expected) for name in expected]
    agreement = float(np.mean(np.stack([np.broadcast_to(each, len(images)) for each in same]).all(axis=0)))
    files = [path, *path.rglob("*")]  # some formats are folders
    size_mb = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    return Checked(size_mb, float(np.max([0.0, *differences])), agreement, ms_one_core, ms_all_cores)


def _first_answer(name: str, outputs: Mapping[str, np.ndarray]) -> Any:
    """Returns an integer for each image: the class of the largest value, or the first of the integers."""
    value = outputs[name].reshape(len(outputs[name]), -1)
    return value[:, 0] if value.dtype.kind in "iu" else value.argmax(axis=1)


def _run(path: pathlib.Path, form: str, images: np.ndarray, cores: str) -> tuple[dict[str, np.ndarray], float]:
    with tempfile.TemporaryDirectory() as folder:
        images_path, out = pathlib.Path(folder, "images.npy"), pathlib.Path(folder, "out.npz")
        np.save(images_path, images)
        command = [sys.executable, "-m", "mnv2_jax.export.runtimes", form, str(path), str(images_path), str(out), cores]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RejectedError(f"{path}: its runtime can't run it ({reason[:300]})")
        with np.load(out) as archive:
            outputs = {key.removeprefix("output_"): archive[key] for key in archive.files if key != "ms"}
            return outputs, float(archive["ms"])


def is_right(checked: Checked) -> bool:
    """Whether a float32 file computes what the model computes."""
    return checked.difference <= BOUND and checked.agreement == 1.0


def to_input(images: np.ndarray, pixels: str) -> np.ndarray:
    """Turns uint8 images into the input of a file."""
    return images if pixels == "uint8" else (images / np.float32(255)).astype(np.float32)
