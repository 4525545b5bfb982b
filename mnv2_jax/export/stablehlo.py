"""StableHLO by `jax.export`: one file for CPU, CUDA and TPU, with a symbolic batch, which runs without flax."""

from __future__ import annotations

import json
import pathlib

import jax
from jax import export

from mnv2_jax.export.function import Exportable
from mnv2_jax.json_files import write_bytes, write_json
from mnv2_jax.nn.forms import AUTO

PLATFORMS = ("cpu", "cuda", "tpu")


def write(exportable: Exportable, path: pathlib.Path) -> None:
    """Writes the file, and its facts as JSON beside it. Read it by `jax.export.deserialize(bytes).call(images)`."""
    variables = jax.device_put(exportable.variables)
    (batch,) = export.symbolic_shape("batch")
    function = jax.jit(lambda images: exportable.apply(variables, images, AUTO))  # the fast forms of each platform
    exported = export.export(function, platforms=PLATFORMS)(exportable.spec(batch))
    write_bytes(path, bytes(exported.serialize()))
    write_json(path.with_suffix(".json"), {key: _decoded(text) for key, text in exportable.facts().items()})


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
