"""The state that a session of a run begins with."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np

from mnv2_jax.data import streams
from mnv2_jax.models.registry import variable_shapes
from mnv2_jax.ops.augment import normalise
from mnv2_jax.processes import together
from mnv2_jax.runs.checkpoint import from_leaves
from mnv2_jax.runs.weights import open_weights
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment
from mnv2_jax.training.initial import check_network, with_weights
from mnv2_jax.training.run import RESTART_ALL, Run, agree_on
from mnv2_jax.training.state import TrainState
from mnv2_jax.weights.file import Weights
from mnv2_jax.weights.unfold import are_folded, unfold

_UNFOLDING_BATCH, _UNFOLDING_BATCHES = 64, 8
"""Images per batch, and number of batches, that are enough to estimate the statistics of a channel."""


def begin(experiment: Experiment, run: Run) -> TrainState:
    """Makes a fresh state, or takes the saved one that process 0 has restored.

    The state is on the devices, and is the same on all processes.

    Raises:
      UserError: if `init.weights` can't be opened or belong to another network, or an image can't be decoded.
      FaultError: if the processes don't have the same state.
    """
    if run.has_checkpoint:
        return _restored(experiment, run)
    return fresh(experiment, run.say)


def fresh(experiment: Experiment, say: Callable[[str], None]) -> TrainState:
    """Makes the state before the first step, with `init.weights` where they are set; ``say`` takes notes for the user.

    Raises:
      UserError: if the weights can't be opened or belong to another network, or an image can't be decoded.
      FaultError: if the processes don't have the same state.
    """
    config, mesh = experiment.config, experiment.mesh
    state = meshes.compile_init(mesh, experiment.init_state)()
    if config.init.weights is not None:
        weights = open_weights(config.init.weights, config.model, config.init.head)
        check_network(config, weights)
        if are_folded(weights.model, weights.variables):
            say(
                "the weights have their norms folded into the convolutions; measuring the norms' statistics on"
                f" {_UNFOLDING_BATCH * _UNFOLDING_BATCHES} training images …"
            )
            weights = unfolded(experiment, weights)
        if config.init.head == "load":
            weights = experiment.kind.arrange_weights(weights, experiment.dataset)
        begun = with_weights(state, weights, config.init.head, experiment.task.model)
        state = meshes.put(mesh, together.broadcast(begun))
    if together.are_several():
        agree_on(state, 0, "start all with the same weights, on the same kind of machine")
    return state


def _restored(experiment: Experiment, run: Run) -> TrainState:
    like = jax.eval_shape(experiment.init_state)
    leaves = run.take_restored()
    empty = functools.partial(jax.tree.map, lambda leaf: np.zeros(leaf.shape, leaf.dtype))
    saved = empty(like) if leaves is None else from_leaves(leaves, like)
    state = meshes.put(experiment.mesh, together.broadcast(saved))
    run.say(f"restored the state {agree_on(state, run.start, RESTART_ALL)[:16]}")
    return state


def unfolded(experiment: Experiment, weights: Weights) -> Weights:
    """Returns the weights with the folded norms given back their statistics, measured on some training images."""
    # Whole images in the order of training: that stream skips the images that `data.skip_corrupt` lets it skip.
    data = dataclasses.replace(experiment.config.data, batch_size=_UNFOLDING_BATCH)
    view = experiment.task.eval_view.at(data.resolution)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variable_shapes(weights.model))
    # No norm follows a part that the weights may lack, so zeros there change no statistics.
    variables = {name: {**zeros[name], **branch} for name, branch in weights.variables.items()}
    measure = jax.jit(lambda x: weights.model.norm_inputs(variables, normalise(x, data.mean, data.std)))
    batches = streams.train_batches(data, view, experiment.dataset.train, experiment.config.seed)
    with contextlib.closing(batches), streams.naming_all_damaged(data, experiment.dataset.train):
        inputs = [jax.device_get(measure(batch["image"])) for batch in itertools.islice(batches, _UNFOLDING_BATCHES)]
    mean = jax.tree.map(lambda *means: np.mean(means, axis=0), *inputs)
    return weights._replace(variables=unfold(weights.model, weights.variables, mean))
