"""Checks an exported file in its own runtime, in a fresh process, against the JAX model on real images."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from mnv2_jax import graph as graphs
from mnv2_jax.errors import UserError
from mnv2_jax.export.biases import known_reals
from mnv2_jax.export.formats import Precision
from mnv2_jax.export.function import INPUT, LOGITS, Exportable
from mnv2_jax.export.quantise import CAST, UNSIGNED, Quantised
from mnv2_jax.export.runtimes import STAND_INS
from mnv2_jax.export.shapes import names_of
from mnv2_jax.graph import Node, Value
from mnv2_jax.tasks.base import HasLooseOrder, Likeness

Compare: TypeAlias = Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], Likeness]
"""Compares the outputs of a file with those that are expected."""


class Bound(NamedTuple):
    """The most by which a file may differ from the network."""

    difference: float
    """Largest difference of an output, as a share of the largest absolute value of the output, or of 1."""
    agreement: float
    """Least share of images with the same first answer; at least one image may have another, but for 1."""


BOUNDS: Mapping[Precision, Bound] = {
    "float32": Bound(1e-4, 1.0),
    "float16": Bound(0.05, 0.95),
    "dynamic": Bound(0.25, 0.0),
    "int8": Bound(0.5, 0.0),
}
"""Bounds by precision. In 8 bits the answers of an unsure network change for many images, which is no fault of the
file; what is strict there is each operator on its own."""
MOST_STEPS = 1
"""Most steps of its grid by which an operator in integers may differ from the same operator in floats."""
_BORDER = 1e-4
"""Share of the positions of a map whose classes may differ in float32."""
_STEP_IMAGES = 4
"""Images on which every operator is checked."""


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
    """Share of the images with the same first answer; of maps, the share of the positions; of lists, of what they
    list."""
    ms_one_core: float | None
    ms_all_cores: float | None
    """Milliseconds an image at batch 1, the median of up to 50 runs; None for the stand-in of a runtime."""
    unsure: float = 0.0
    """Share of the answers that may be others by rounding alone."""


def expected_outputs(exportable: Exportable, images: np.ndarray) -> dict[str, np.ndarray]:
    """Computes the outputs of the JAX model by their names."""
    outputs = jax.jit(exportable.apply)(exportable.variables, images)
    return {name: np.asarray(value) for name, value in outputs.items()}


def by_place(expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> Likeness:
    """Compares number by number, and the classes at each position."""
    differences = [
        float(abs(actual[name] - value).max() / max(1.0, abs(value).max()))
        for name, value in expected.items()
        if value.dtype.kind == "f"
    ]
    names = [name for name, value in expected.items() if value.dtype.kind in "iu" or name == LOGITS]
    same = [_first_answers(actual[name]) == _first_answers(expected[name]) for name in names]
    has_positions = any(each.shape[1] > 1 for each in same)
    agreement = min((float(each.mean()) for each in same), default=1.0)
    return Likeness(float(np.max([0.0, *differences])), agreement, _BORDER if has_positions else 0.0)


def comparison_of(exportable: Exportable) -> Compare:
    """Returns the comparison for what is exported."""
    answers = exportable.answers
    return answers.compare if isinstance(answers, HasLooseOrder) else by_place


def check(
    path: pathlib.Path,
    form: str,
    images: np.ndarray,
    expected: Mapping[str, np.ndarray],
    compare: Compare = by_place,
) -> Checked:
    """Runs a file in its runtime and compares.

    Args:
      path: the file.
      form: name of the format, of `runtimes.RUNTIMES`.
      images: input [n, h, w, 3] of the type that the file takes.
      expected: the outputs of the JAX model.
      compare: compares the file's with them.

    Raises:
      RejectedError: if the runtime can't run the file, or its outputs have other names, shapes or types.
    """
    actual, ms_one_core = _run(path, form, images, "one")
    times = (None, None) if form in STAND_INS else (ms_one_core, _run(path, form, images[:1], "all")[1])
    kinds, right = ({name: (x.shape, x.dtype.name) for name, x in outputs.items()} for outputs in (actual, expected))
    if kinds != right:
        raise RejectedError(f"{path}: its outputs are {kinds}; the model's are {right}")
    difference, agreement, unsure = compare(expected, actual)
    return Checked(_size_mb(path), difference, agreement, times[0], times[1], unsure)


def check_bound(path: pathlib.Path, precision: Precision, checked: Checked, count: int) -> None:
    """Refuses a file that differs by more than its precision may.

    Raises:
      RejectedError: with the differences.
    """
    bound = BOUNDS[precision]
    least = min(bound.agreement, 1 - 1 / count) if bound.agreement < 1 else 1 - checked.unsure
    if not (checked.difference <= bound.difference and checked.agreement >= least):
        raise RejectedError(
            f"{path}: differs from the model by {checked.difference:.2g} of the largest output (at most"
            f" {bound.difference:g} is right), with the same first answer for {checked.agreement:.2%} of {count} images"
            f" (at least {least:.2%})"
        )


def check_steps(path: pathlib.Path, form: str, quantised: Quantised, images: np.ndarray) -> int:
    """Compares every operator in integers with the same operator in floats, on the inputs that it has in the file.

    From end to end a simulation can't agree: two kernels of one runtime don't.

    Returns:
      The largest difference, in steps of the operator's grid.

    Raises:
      RejectedError: if an operator differs by more than `MOST_STEPS`, or isn't computed in integers.
    """
    images, names = images[:_STEP_IMAGES], names_of(quantised.graph)
    found, _ = _run(path, form, images, "integers")
    for node in quantised.graph.nodes:
        if node.op == CAST and node in quantised.nodes:  # the pixels themselves, which need no operator in some formats
            found[names[node.output]] = images.astype(np.int16) - UNSIGNED
    if images.dtype == np.float32:
        (image,) = quantised.graph.inputs
        found.setdefault(INPUT, quantised.grids[image].integers(images))
    worst, layer = 0, ""
    for node in quantised.graph.nodes:
        if node not in quantised.nodes or node.op == CAST:
            continue
        read = [x for x in node.operands if isinstance(x, Value)]
        if missing := [names[x] for x in (*read, node.output) if names[x] not in found]:
            raise RejectedError(f"{path}: {missing[0]} isn't computed in integers")
        steps = _steps(quantised, node, {x: found[names[x]] for x in (*read, node.output)})
        if steps > worst:
            worst, layer = steps, names[node.output]
    if worst > MOST_STEPS:
        raise RejectedError(f"{path}: {layer} differs by {worst} steps of its grid (at most {MOST_STEPS} is right)")
    return worst


def _steps(quantised: Quantised, node: Node, integers: Mapping[Value, np.ndarray]) -> int:
    held = known_reals(quantised, node)
    grid, (output,) = quantised.grids[node.output], node.outputs
    compute = jax.jit(lambda operands: graphs.compute(node, operands)[0])
    worst = 0
    for row in range(len(integers[output])):
        operands: list[Any] = []
        for place, x in enumerate(node.operands):
            if isinstance(x, Value):
                operands.append(quantised.grids[x].reals(integers[x][row : row + 1]))
            else:
                operands.append(held[place])
        right = grid.integers(np.asarray(compute(operands))).astype(int)
        worst = max(worst, int(abs(right - integers[output][row : row + 1].astype(int)).max()))
    return worst


def _first_answers(value: np.ndarray) -> np.ndarray:
    """Returns the answers [n, p] of an output: the class of the largest value, or the first integer, at each position.

    An output [n, k] has one position, a map [n, h, w, k] of values or [n, h, w] of integers has h · w.
    """
    if value.dtype.kind not in "iu":
        return value.argmax(-1).reshape(len(value), -1)
    return value[:, :1] if value.ndim == 2 else value.reshape(len(value), -1)


def _run(path: pathlib.Path, form: str, images: np.ndarray, what: str) -> tuple[dict[str, np.ndarray], float]:
    """Runs a file in a fresh process; returns what `runtimes.main` writes: arrays by name, and milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        images_path, out = pathlib.Path(folder, "images.npy"), pathlib.Path(folder, "out.npz")
        np.save(images_path, images)
        command = [sys.executable, "-m", "mnv2_jax.export.runtimes", form, str(path), str(images_path), str(out), what]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RejectedError(f"{path}: its runtime can't run it ({reason[:300]})")
        with np.load(out) as archive:
            outputs = {key.removeprefix("output_"): archive[key] for key in archive.files if key != "ms"}
            return outputs, float(archive["ms"]) if "ms" in archive.files else 0.0


def _size_mb(path: pathlib.Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6
