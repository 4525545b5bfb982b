"""Opens weights by a name of any kind: a run folder, a file, or the name of published weights."""

from __future__ import annotations

import os
import pathlib
from typing import Any, Literal

from mnv2_jax.config import ModelConfig
from mnv2_jax.errors import UserError
from mnv2_jax.registry import TASKS
from mnv2_jax.runs.checkpoint import restore_variables
from mnv2_jax.runs.folder import read_run
from mnv2_jax.weights.file import Preprocessing, Weights, WeightsInfo
from mnv2_jax.weights.hub import is_published_name
from mnv2_jax.weights.load import Head, kind_of
from mnv2_jax.weights.load import load_weights as load_file


def read_run_weights(workdir: pathlib.Path, checkpoint: Literal["latest", "best"] | None = None) -> Weights:
    """Reads a checkpoint of a run, with the run's preprocessing and classes.

    Args:
      workdir: the run folder.
      checkpoint: which checkpoint; None for `Config.usual_checkpoint`.

    Raises:
      UserError: if there is no run with a checkpoint.
    """
    settings, names = read_run(workdir)
    kind = TASKS.find(settings.task, settings.modules)
    model = kind.model(settings.model, settings.norm, len(names))
    checkpoint = checkpoint or settings.usual_checkpoint
    step, variables = restore_variables(workdir, checkpoint)
    info = WeightsInfo(
        preprocessing=Preprocessing.of(settings.data),
        labels=tuple(names),
        task=kind.saved_as or settings.task,
        notes=(f"step {step} of the run {workdir.name}, its {checkpoint} checkpoint",),
    )
    return Weights(model, variables, info)


def load_weights(
    source: str | os.PathLike[str],
    model: str | None = None,
    *,
    checkpoint: Literal["latest", "best"] | None = None,
    **options: Any,
) -> Weights:
    """Reads the weights of a run, or weights of any other kind.

    Args:
      source: a run folder, a file, or the name of published weights, as in `weights.load.load_weights`.
      model: the network that another library's file holds, one of `list_models`.
      checkpoint: which checkpoint of a run; None for `config.Config.usual_checkpoint`.
      **options: arguments of `weights.load.load_weights`: ``library``, ``preprocessing``, ``labels``, ``take``, and
        those of `create_model`, such as ``width=0.35``. A run and our own files need none of them.

    Returns:
      ``(model, variables, info)``; the variables are NumPy arrays.

    Raises:
      UserError: in one line, if the source can't be downloaded or read, or doesn't hold exactly the weights of the
        model.
    """
    path = pathlib.Path(os.path.expanduser(os.fspath(source)))
    if is_published_name(os.fspath(source)) or not path.is_dir():
        if checkpoint is not None:
            raise UserError(f"checkpoint={checkpoint!r} is used with a run folder only; leave it out")
        return load_file(source, model, **options)
    if model is not None or options:
        raise UserError(f"{source}: a run records its own model; leave the model and its options out")
    return read_run_weights(path, checkpoint)


def open_weights(source: str, model: ModelConfig, head: Head = "load") -> Weights:
    """Opens the weights that ``init.weights`` names.

    Args:
      source: a run folder, a file of ours or of another library, or the name of published weights.
      model: the network that a file of another library holds.
      head: with ``new`` the weights may lack parts of the head (`Weights.absent`).

    Raises:
      UserError: if the weights can't be opened, or belong to another network.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return read_run_weights(pathlib.Path(path))
    if is_published_name(source) or kind_of(pathlib.Path(path)) == "ours":
        return load_file(source)
    default = ModelConfig()
    keys = ("width", "width_rule", "depth", "activation")  # not the padding: the file's library decides it
    options = {key: getattr(model, key) for key in keys if getattr(model, key) != getattr(default, key)}
    return load_file(source, model.name, head=head, **options)
