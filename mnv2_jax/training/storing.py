"""Stores a teacher's logits: goes through the training images once, and writes its logits for each to a file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys

import numpy as np
import tqdm

from mnv2_jax.config import Config
from mnv2_jax.data import streams
from mnv2_jax.data.sources import check_trainable, open_dataset
from mnv2_jax.data.views.classification import EvalView
from mnv2_jax.errors import UserError
from mnv2_jax.ops.augment import normalise
from mnv2_jax.tasks.teacher import answers_of, write_logits
from mnv2_jax.training import mesh as meshes
from mnv2_jax.types import Array, Batch, PyTree
from mnv2_jax.weights.file import Weights


def store_logits(path: pathlib.Path, weights: Weights, config: Config) -> int:
    """Writes the teacher's logits of every training image, preprocessed as for an evaluation of the teacher.

    Args:
      path: a path that ends in .npz; an existing file is replaced. See `tasks.teacher.write_logits`.
      weights: the teacher.
      config: its section `data` names the images.

    Returns:
      The number of images.

    Raises:
      UserError: if the data can't be read, if their classes differ from the teacher's, or if the file can't be written.
    """
    if path.suffix != ".npz":
        raise UserError(f"{path}: the name of a file of logits must end in .npz; add that ending")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: can't write a file there; make the folder, or give another path")
    dataset, mesh = open_dataset(config.data), meshes.make_mesh()
    check_trainable(dataset)
    for note in dataset.notes:
        tqdm.tqdm.write(note, file=sys.stderr)
    split, preprocessing = dataset.train, weights.info.preprocessing
    answer = answers_of(weights, dataset)
    data = dataclasses.replace(config.data, eval_resolution=None, **dataclasses.asdict(preprocessing))
    view = EvalView(data)

    def compute_logits(variables: PyTree, batch: Batch) -> Array:
        return answer(variables, normalise(batch["image"], preprocessing.mean, preprocessing.std))

    compiled, feed = meshes.compile_rows(mesh, compute_logits), meshes.make_feed(mesh, None)
    variables = meshes.put(mesh, weights.variables)
    logits = np.empty((len(split), len(dataset.class_names)), np.float16)
    labels = np.empty(len(split), np.int32)
    size = -(-min(data.eval_batch_size, len(split)) // mesh.size) * mesh.size
    total, damaged = -(-len(split) // size), dict[int, str]()
    batches = streams.without_damaged(view, split, streams.eval_batches(data, view, split, size), damaged)
    for batch in tqdm.tqdm(batches, total=total, disable=None):
        rows, mask = batch["index"][batch["mask"]], batch["mask"]
        logits[rows] = np.asarray(compiled(variables, feed(batch)))[mask]
        labels[rows] = batch["label"][mask]
    if damaged:
        raise streams.damage_error(split, damaged)
    write_logits(path, dataset, logits, labels)
    return len(split)
