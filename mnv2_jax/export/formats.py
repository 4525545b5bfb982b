"""Formats of files: what each is called, what it needs, which precisions it has, and what writes it."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.export.function import Exportable, Storage
from mnv2_jax.export.quantise import Quantised
from mnv2_jax.export.web import Runtime
from mnv2_jax.graph import Graph

Precision: TypeAlias = Literal["float32", "float16", "dynamic", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class Source:
    """What is written: the function, its graph, and the graph in integers, each made once, when it is needed."""

    def __init__(
        self, exportable: Exportable, calibration: Callable[[], np.ndarray], browser_runtime: Runtime | None = None
    ):
        """Keeps its arguments.

        Args:
          exportable: the function.
          calibration: reads the images for calibration, [n, h, w, 3].
          browser_runtime: what a page for browsers needs.
        """
        self.exportable, self.browser_runtime = exportable, browser_runtime
        self._calibration = calibration

    @functools.cached_property
    def graph(self) -> Graph:
        """The graph in floats."""
        return self.exportable.graph()

    @functools.cached_property
    def quantised(self) -> Quantised:
        """The graph in integers.

        Raises:
          UserError: if there are no images for calibration.
        """
        from mnv2_jax.export import biases, quantise

        images = [image[None] for image in self._calibration()]
        return biases.correct(quantise.quantise(self.graph, images), images)

    def traced(self, precision: Precision) -> tuple[Graph | Quantised, Storage]:
        """Returns the graph of a precision, and how its weights are stored."""
        return (self.quantised, "float32") if precision == "int8" else (self.graph, precision)


Writer: TypeAlias = Callable[[pathlib.Path, Source, Precision], None]


class Format(NamedTuple):
    """A format of files."""

    ending: str
    precisions: tuple[Precision, ...]
    packages: tuple[str, ...]
    """Packages that writing and checking need."""
    extra: str
    """The extra of the project that brings them."""
    write: Writer
    is_default: bool = True
    """Whether it is written where no format is named."""
    beside: tuple[str, ...] = ()
    """Endings of the files that are written beside it."""


def _stablehlo(path: pathlib.Path, source: Source, precision: Precision) -> None:
    from mnv2_jax.export import stablehlo

    stablehlo.write(source.exportable, path)


def _tflite(path: pathlib.Path, source: Source, precision: Precision) -> None:
    from mnv2_jax.export import tflite_file

    traced, storage = source.traced(precision)
    tflite_file.write(path, traced, source.exportable.facts(), storage)


def _onnx(path: pathlib.Path, source: Source, precision: Precision) -> None:
    from mnv2_jax.export import onnx_file

    traced, storage = source.traced(precision)
    onnx_file.write(path, traced, source.exportable.facts(), storage)


def _coreml(path: pathlib.Path, source: Source, precision: Precision) -> None:
    from mnv2_jax.export import coreml

    assert precision != "int8"
    coreml.write(path, source.exportable, source.graph, precision)


def _web(path: pathlib.Path, source: Source, precision: Precision) -> None:
    from mnv2_jax.export import onnx_file, web

    assert source.browser_runtime is not None
    traced, storage = source.traced(precision)
    network = onnx_file.to_bytes(traced, source.exportable.facts(), storage)
    web.write(path, source.exportable, network, source.browser_runtime)


FORMATS: Mapping[str, Format] = {
    "stablehlo": Format(".stablehlo", ("float32",), (), "export", _stablehlo, beside=(".json",)),
    "tflite": Format(".tflite", PRECISIONS, ("ai_edge_litert",), "export", _tflite),
    "onnx": Format(".onnx", ("float32", "float16", "int8"), ("onnx", "onnxruntime"), "export", _onnx),
    "coreml": Format(
        ".mlpackage", ("float32", "float16", "dynamic"), ("coremltools",), "coreml", _coreml, is_default=False
    ),
    "web": Format("-web", ("float32", "float16", "int8"), ("onnx", "onnxruntime"), "export", _web, is_default=False),
}
"""The formats by name."""


def missing_packages(form: str) -> list[str]:
    """Returns the packages that a format needs and that aren't installed."""
    return [name for name in FORMATS[form].packages if importlib.util.find_spec(name) is None]


def choose(formats: str | None, precisions: str) -> list[tuple[str, Precision]]:
    """Returns the files to write, by format and precision.

    Args:
      formats: names with commas; None: every usual format that has one of the precisions.
      precisions: names with commas.

    Raises:
      UserError: for a name that doesn't exist, a format that has none of the precisions, or packages that aren't
        installed.
    """
    usual = [form for form, each in FORMATS.items() if each.is_default]
    forms = usual if formats is None else _names("format", formats, list(FORMATS))
    wanted = _names("precision", precisions, PRECISIONS)
    chosen: list[tuple[str, Precision]] = []
    for form in forms:
        found: list[tuple[str, Precision]] = [(form, each) for each in FORMATS[form].precisions if each in wanted]
        if formats is not None and not found:
            has = ", ".join(FORMATS[form].precisions)
            raise UserError(f"--precision={precisions}: {form} has none of them; give some of {has}")
        if found and (missing := missing_packages(form)):
            raise UserError(
                f"--format={form} needs {' and '.join(missing)}: pip install 'mnv2_jax[{FORMATS[form].extra}]'"
            )
        chosen += found
    return chosen


def _names(flag: str, text: str, existing: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in existing:
            raise UserError(f"--{flag}={text}: there is no {flag} {name!r}; give some of {', '.join(existing)}")
    return names
