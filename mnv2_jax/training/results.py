"""Files that an evaluation writes: numbers and pictures in the run folder, and a table of all its predictions."""

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


def with_paths(evaluation: Evaluation, split: Split) -> Evaluation:
    """Adds the "path" of each example, where the split knows it."""
    return evaluation._replace(examples=[_located(example, split) for example in evaluation.examples])


def _located(example: Mapping[str, Any], split: Split) -> Mapping[str, Any]:
    path = split.path_of(example["index"])
    return example if path is None else {**example, "path": path}


def evaluation_file(split: str, data: str, own_data: str) -> str:
    """Returns the file name of an evaluation made after training: evaluation-<split>.json if it used the run's own data
    set, otherwise evaluation-<data>-<split>.json."""
    name = re.sub(r"[^\w.-]+", "_", split if data == own_data else f"{data}-{split}")
    return f"{pathlib.Path(EVALUATION).stem}-{name}.json"


def save_evaluation(
    path: pathlib.Path, setup: Setup, evaluation: Evaluation, *, step: int, checkpoint: str, **facts: Any
) -> None:
    """Writes an evaluation and the pictures of its examples.

    Args:
      path: path of the file, in a run folder; an existing file is replaced.
      setup: the setup of the evaluation.
      evaluation: the evaluation, after `with_paths`.
      step: step of the checkpoint.
      checkpoint: latest or best.
      facts: further keys and values of the file.

    Raises:
      UserError: if a file can't be written.
    """
    data, split = setup.config.data, setup.dataset.eval
    source: dict[str, Any] = {"split": split.name, "data": {"name": data.name, "path": data.path}}
    if setup.config.model.head == "classifier":  # a dense head sees each image at its own size
        source["resolution"] = data.seen_resolution
    skipped = {"skipped": list(evaluation.skipped)} if data.skip_corrupt else {}
    tables = {**evaluation.scalars, **evaluation.tables, "examples": list(evaluation.examples)}
    write_json(path, {"step": step, "checkpoint": checkpoint, **source, **tables, **skipped, **facts})
    indices = [example["index"] for example in evaluation.examples]
    save_pictures(pictures_of(path), split, indices, setup.kind.page, evaluation.maps)


def write_predictions(path: pathlib.Path, split: Split, evaluation: Evaluation) -> None:
    """Writes `Evaluation.predictions` as CSV, one line per image in the order of the split.

    The columns are index, path ("" if the image has none), and those of the task.

    Raises:
      UserError: if the task has no predictions, or the file can't be written.
    """
    columns = dict(evaluation.predictions)
    if not columns:
        raise UserError(f"--predictions={path}: the task makes no predictions per image; leave --predictions out")
    indices = [int(index) for index in columns.pop("index")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["index", "path", *columns])
    for index, *row in zip(indices, *columns.values(), strict=True):
        writer.writerow([index, split.path_of(index) or "", *map(_cell, row)])
    write_text(path, file.getvalue())


def _cell(value: Any) -> Any:
    """Formats a float with six digits, or as "" if it isn't finite; returns other values unchanged."""
    if not isinstance(value, float | np.floating):
        return value
    return f"{value:.6g}" if math.isfinite(value) else ""
