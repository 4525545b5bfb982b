"""Writes files, checks each, and keeps what passes: no file stands under its name before it was checked."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.export import check, evaluation
from mnv2_jax.export.check import Checked, RejectedError
from mnv2_jax.export.evaluation import Comparison
from mnv2_jax.export.formats import FORMATS, Precision, Source
from mnv2_jax.export.runtimes import STAND_INS
from mnv2_jax.tasks.base import Evaluation
from mnv2_jax.training.experiment import Setup


class Row(NamedTuple):
    """What is known of a file after its check."""

    path: pathlib.Path
    form: str
    precision: Precision
    checked: Checked
    steps: int | None
    """Largest difference of an operator in integers, in steps of its grid; None for a file in floats."""
    comparison: Comparison | None
    """Scores of file and network, if files are evaluated."""

    def to_json(self) -> dict[str, Any]:
        """Returns the row as values that JSON can hold."""
        row = {"path": str(self.path), "format": self.form, "precision": self.precision, **self.checked._asdict()}
        row |= {} if self.steps is None else {"steps": self.steps}
        row |= {"stand_in": STAND_INS[self.form]} if self.form in STAND_INS else {}
        return row | ({} if self.comparison is None else self.comparison._asdict())


class Evaluator(NamedTuple):
    """The evaluation of files, and that of the network with which they are compared."""

    setup: Setup
    network: Evaluation


def path_of(folder: pathlib.Path, stem: str, form: str, precision: Precision) -> pathlib.Path:
    """Returns the path of a file: ``NAME.onnx``, or ``NAME-int8.onnx`` for another precision than float32."""
    suffix = "" if precision == "float32" else f"-{precision}"
    return folder / f"{stem}{suffix}{FORMATS[form].ending}"


def make(
    source: Source,
    chosen: Sequence[tuple[str, Precision]],
    folder: pathlib.Path,
    stem: str,
    images: np.ndarray,
    evaluator: Evaluator | None = None,
) -> Iterator[Row]:
    """Writes and checks files, one after the other, and yields a row for each that is right.

    Args:
      source: what is written.
      chosen: the files, by format and precision.
      folder: where they are written.
      stem: their name without endings.
      images: the input for the check, [n, h, w, 3].
      evaluator: evaluates each file; None: files aren't evaluated.

    Raises:
      RejectedError: at the end, if files differ from the network; they stay, as ``*.rejected``.
    """
    errors: list[str] = []
    expected = check.expected_outputs(source.exportable, images)
    for form, precision in chosen:
        path = path_of(folder, stem, form, precision)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unchecked-") as made:
            unchecked = pathlib.Path(made, path.name)
            FORMATS[form].write(unchecked, source, precision)
            try:
                checked, steps = _check(unchecked, form, precision, source, images, expected)
            except RejectedError as error:
                rejected = path.with_name(f"{path.name}.rejected")
                _move(unchecked, rejected)
                errors.append(f"{str(error).replace(made, str(folder))}; it is kept as {rejected.name}")
                continue
            comparison = None
            if evaluator is not None:
                file = evaluation.evaluate_file(evaluator.setup, source.exportable, form, unchecked)
                comparison = evaluation.compare(evaluator.setup, evaluator.network, file)
            for each in sorted(pathlib.Path(made).iterdir()):
                _move(each, folder / each.name)
        yield Row(path, form, precision, checked, steps, comparison)
    if errors:
        raise RejectedError("; ".join(errors))


def _check(
    path: pathlib.Path,
    form: str,
    precision: Precision,
    source: Source,
    images: np.ndarray,
    expected: Mapping[str, np.ndarray],
) -> tuple[Checked, int | None]:
    checked = check.check(path, form, images, expected, check.comparison_of(source.exportable))
    steps = check.check_steps(path, form, source.quantised, images) if precision == "int8" else None
    check.check_bound(path, precision, checked, len(images))
    return checked, steps


def _move(path: pathlib.Path, to: pathlib.Path) -> None:
    """Moves a file or folder, in place of an old one of either kind."""
    if to.is_dir() and not to.is_symlink():
        shutil.rmtree(to)
    elif path.is_dir():
        to.unlink(missing_ok=True)
    path.replace(to)


def refuse_existing(folder: pathlib.Path, stem: str, chosen: Sequence[tuple[str, Precision]]) -> None:
    """Raises a `UserError` if one of the files that `make` would write exists."""
    for form, precision in chosen:
        path = path_of(folder, stem, form, precision)
        for each in (path, *map(path.with_suffix, FORMATS[form].beside)):
            if each.exists():
                raise UserError(f"{each}: already exists; give another --out, or --force to replace it")
