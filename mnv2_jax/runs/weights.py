"""Weights by whatever names them: a run's folder, a file, or a published name."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Literal

from mnv2_jax.config import ModelConfig
from mnv2_jax.registry import TASKS
from mnv2_jax.runs.checkpoint import restore_variables
from mnv2_jax.runs.folder import read_run
from mnv2_jax.weights.file import Preprocessing, Weights, WeightsInfo
from mnv2_jax.weights.hub import is_name
from mnv2_jax.weights.load import Head, kind_of, load_weights


def read_run_weights(workdir: pathlib.Path, which: Literal["latest", "best"] | None = None) -> Weights:
    """A run's checkpoint, with its preprocessing and its classes; None: `Config.usual_checkpoint`.

    Raises:
      UserError: if there is no run with a checkpoint.
    """
    settings, names = read_run(workdir)
    kind = TASKS.find(settings.task, settings.modules)
    model = kind.model(settings.model, settings.norm, len(names))
    which = which or settings.usual_checkpoint
    step, variables = restore_variables(workdir, which)
    seen = {field.name: getattr(settings.data, field.name) for field in dataclasses.fields(Preprocessing)}
    info = WeightsInfo(
        preprocessing=Preprocessing(**seen | {"resolution": settings.data.seen_resolution}),
        labels=tuple(names),
        task=kind.saved_as or settings.task,
        notes=(f"step {step} of the run {workdir.name}, its {which} checkpoint",),
    )
    return Weights(model, variables, info)


def open_weights(source: str, model: ModelConfig, head: Head = "load") -> Weights:
    """Opens what ``init.weights`` names: a run's folder, our file, another library's, or published weights.

    Args:
      source: path or name.
      model: says which network a foreign file holds.
      head: new: `Weights.absent` parts are allowed.

    Raises:
      UserError: if it can't be had, or isn't that network.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return read_run_weights(pathlib.Path(path))
    if is_name(source) or kind_of(pathlib.Path(path)) == "ours":
        return load_weights(source)
    default = ModelConfig()
    options = ("width", "width_rule", "depth", "activation")  # the padding is its library's, not asked for
    asked = {key: getattr(model, key) for key in options if getattr(model, key) != getattr(default, key)}
    return load_weights(source, model.name, head=head, **asked)
