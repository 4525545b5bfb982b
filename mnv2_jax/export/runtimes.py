"""Runs an exported file in its own runtime: ``python -m mnv2_jax.export.runtimes FORMAT FILE IMAGES OUT CORES``.

The check starts this in a fresh process, which imports the runtime and none of the package's models.
"""

from __future__ import annotations

import base64
import gzip
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

Run: TypeAlias = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Computes the outputs of a batch."""

_BUDGET_S, _MOST_RUNS = 1.0, 50
"""Seconds and runs after which timing ends."""


def _open_onnx(path: str | bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names, image = [output.name for output in session.get_outputs()], session.get_inputs()[0].name
    return lambda images: dict(zip(names, session.run(None, {image: images}), strict=True))


def _open_web(path: str) -> Run:
    """Opens the ONNX file within the page's script; the page itself is tested in a browser."""
    _, content, _ = pathlib.Path(path, "network.js").read_text().rsplit('"', 2)
    return _open_onnx(gzip.decompress(base64.b64decode(content)))


def _open_stablehlo(path: str) -> Run:
    import jax
    from jax import export

    exported = export.deserialize(bytearray(pathlib.Path(path).read_bytes()))
    call = jax.jit(exported.call)
    return lambda images: {name: np.asarray(value) for name, value in call(images).items()}


RUNTIMES: Mapping[str, Callable[[str], Run]] = {
    "onnx": _open_onnx,
    "stablehlo": _open_stablehlo,
    "web": _open_web,
}
"""Functions that open a file in the runtime of its format."""


def main() -> None:
    """Writes the outputs for the images, and the milliseconds at batch 1 on ``CORES``: one or all."""
    form, path, images_path, out, cores = sys.argv[1:]
    if cores == "one" and hasattr(os, "sched_setaffinity"):  # Linux; before the runtime starts its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    run = RUNTIMES[form](path)
    images = np.load(images_path)
    outputs: dict[str, Any] = dict(run(images))
    single = images[:1]
    run(single)
    times: list[float] = []
    start = time.monotonic()
    while len(times) < _MOST_RUNS and (time.monotonic() - start < _BUDGET_S or len(times) < 3):
        begin = time.perf_counter()
        run(single)
        times.append(1000 * (time.perf_counter() - begin))
    assert "flax" not in sys.modules
    np.savez(out, **{f"output_{name}": value for name, value in outputs.items()}, ms=statistics.median(times))


if __name__ == "__main__":
    main()
