"""Times the train step and inference of a config, in this project's forms and in plain XLA convolutions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any
from unittest import mock

from mnv2_jax import config


def time_step(settings: config.Config, given: Collection[str], repeats: int) -> dict[str, dict[str, float]]:
    """Medians over turns of the train step and of inference.

    Returns:
      For "train" and "inference": ours_ms, xla_ms (milliseconds a batch), ratio (median of the turns' ratios),
      images_per_second (ours).
    """
    from mnv2_jax.nn import conv
    from mnv2_jax.training import runtime
    from mnv2_jax.training.experiment import check_training, open_experiment
    from mnv2_jax.training.initial import prepare

    runtime.configure()
    experiment = open_experiment(prepare(settings, given)[0])
    check_training(experiment)
    plain = mock.patch.multiple(
        conv, _depthwise=conv._depthwise_lax_form, _pointwise=conv._lax_form, _of_image=conv._lax_form
    )
    ours = timers(experiment)
    with plain:  # the forms are chosen when a program is traced
        xla = timers(experiment)
    found = {}
    for name, mine in ours.items():
        turns = [(mine(), xla[name]()) for _ in range(repeats)]
        median = statistics.median(turn[0] for turn in turns)
        found[name] = {
            "ours_ms": 1e3 * median,
            "xla_ms": 1e3 * statistics.median(turn[1] for turn in turns),
            "ratio": statistics.median(turn[1] / turn[0] for turn in turns),
            "images_per_second": mean_batch(experiment) / median,
        }
    return found


def mean_batch(experiment: Any) -> float:
    """Images of a step; with `data.scales` on average, as its pixels are level."""
    return statistics.mean(images for _, images in experiment.batch_shapes)


def timers(experiment: Any) -> dict[str, Callable[[], float]]:
    """Compiled functions that return the seconds of one train step and of one inference."""
    import jax

    from mnv2_jax.training import mesh as meshes

    batch = dict(next(experiment.train_batches()(0)))
    whole = batch | {"mask": batch["index"] >= 0}
    state = meshes.compile_init(experiment.mesh, experiment.init_state)()
    variables = jax.tree.map(lambda x: x.copy(), state.variables)
    train_step = meshes.compile_train_step(experiment.mesh, experiment.train_step(0))
    inference = jax.jit(lambda *both: experiment.task.metrics(*both))  # a function of its own, or the trace is shared

    def train() -> float:
        nonlocal state
        begun = time.perf_counter()
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begun

    def infer() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(inference(variables, whole))
        return time.perf_counter() - begun

    train(), infer()  # compilation
    return {"train": train, "inference": infer}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """What `time_step` found, for people."""
    lines = [f"{'':<10} {'ours ms':>10} {'XLA ms':>10} {'ratio':>7} {'ours images/s':>14}"]
    for name, row in found.items():
        lines.append(
            f"{name:<10} {row['ours_ms']:>10.1f} {row['xla_ms']:>10.1f} {row['ratio']:>7.2f}"
            f" {row['images_per_second']:>14,.0f}"
        )
    return "\n".join(lines)
