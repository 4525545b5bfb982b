"""Files that an evaluation leaves: numbers and pictures in its run's folder, and a table of all its answers."""

from __future__ import annotations

import csv
import io
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import write_json, write_text
from mnv2_jax.report.page import pictures_of, save_pictures
from mnv2_jax.runs.folder import EVALUATION
from mnv2_jax.tasks.base import Evaluation
from mnv2_jax.training.experiment import Setup


def located(evaluation: Evaluation, split: Split) -> Evaluation:
    """The same with the "path" of each example, where the split knows it."""
    return evaluation._replace(examples=[_located(example, split) for example in evaluation.examples])


def _located(example: Mapping[str, Any], split: Split) -> Mapping[str, Any]:
    path = split.where(example["index"])
    return example if path is None else {**example, "path": path}


def file_of(split: str, data: str, own_data: str) -> str:
    """Name of the file of an evaluation, beside that of the training's end: by the split, and by the data set
    where it isn't the run's own."""
    name = re.sub(r"[^\w.-]+", "_", split if data == own_data else f"{data}-{split}")
    return f"{pathlib.Path(EVALUATION).stem}-{name}.json"


def keep(path: pathlib.Path, setup: Setup, evaluation: Evaluation, *, step: int, checkpoint: str, **facts: Any) -> None:
    """Writes an evaluation and the pictures of its examples.

    Args:
      path: of the file, in a run's folder; replaced where it exists.
      setup: what was evaluated.
      evaluation: `located`.
      step: of the checkpoint.
      checkpoint: which of the run's it was: latest or best.
      facts: what else is to be said.

    Raises:
      UserError: if they can't be written.
    """
    data, split = setup.config.data, setup.dataset.eval
    what = {"split": split.name, "resolution": data.seen_resolution, "data": {"name": data.name, "path": data.path}}
    skipped = {"skipped": list(evaluation.skipped)} if data.skip_corrupt else {}
    tables = {**evaluation.scalars, **evaluation.tables, "examples": list(evaluation.examples)}
    write_json(path, {"step": step, "checkpoint": checkpoint, **what, **tables, **skipped, **facts})
    save_pictures(pictures_of(path), split, [example["index"] for example in evaluation.examples])


def write_predictions(path: pathlib.Path, split: Split, evaluation: Evaluation) -> None:
    """Writes `Evaluation.predictions` as CSV, a line an image in the order of the split: index, path ("" where the
    image has no name), and the task's columns.

    Raises:
      UserError: if the task has none, or the file can't be written.
    """
    columns = dict(evaluation.predictions)
    if not columns:
        raise UserError(f"--predictions={path}: the task has no predictions an image; leave it out")
    indices = [int(index) for index in columns.pop("index")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["index", "path", *columns])
    for index, *row in zip(indices, *columns.values(), strict=True):
        writer.writerow([index, split.where(index) or "", *map(_cell, row)])
    write_text(path, file.getvalue())


def _cell(value: Any) -> Any:
    """A fraction by six digits, "" where it isn't finite; other values as they are."""
    if not isinstance(value, float | np.floating):
        return value
    return f"{value:.6g}" if math.isfinite(value) else ""
