"""What a study will cost, before anything runs."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from mnv2_jax.config import DataConfig
from mnv2_jax.config.checks import batch_shapes
from mnv2_jax.data.sources import known_num_classes, open_dataset
from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import count_layers
from mnv2_jax.study.design import Run
from mnv2_jax.study.state import planned_config
from mnv2_jax.tasks.base import kind_of

PASSES = 3
"""Times the multiply-adds of inference that a training step takes: once forward, and twice for the gradients."""


class Cost(NamedTuple):
    """Cost of a run."""

    madds: int
    """Multiply-adds of inference for one image."""
    params: int
    images: float | None
    """Images in all epochs; None where the data can't be opened on this machine."""
    steps: float | None
    training_madds: float | None
    """Multiply-adds of all steps; with `data.scales` each resolution counts as often as its batches come."""
    why: str
    """Why images, steps and multiply-adds of the training aren't known."""


def cost_of(run: Run, known_images: int | None = None) -> Cost:
    """Counts the cost of a run.

    Args:
      run: the run.
      known_images: number of training images, used where the data can't be opened.

    Raises:
      UserError: if its config can't be used.
    """
    config = planned_config(run)
    found, why = _train_images(config.data)
    train_images = found or known_images
    model = kind_of(config).model(config.model, config.norm, config.model.num_classes or known_num_classes(config.data))
    summary, shapes = _count(model, config.data.seen_resolution), batch_shapes(config)
    images_a_step = sum(images for _, images in shapes) / len(shapes)
    madds_a_step = PASSES * sum(images * _count(model, size).madds for size, images in shapes) / len(shapes)
    steps: float | None = config.train.steps
    if steps is None and train_images is not None:
        steps = train_images * config.train.epochs / images_a_step
    if steps is None:
        return Cost(summary.madds, summary.params, None, None, None, why)
    return Cost(summary.madds, summary.params, steps * images_a_step, steps, steps * madds_a_step, "")


_count = functools.lru_cache(count_layers)


@functools.lru_cache
def _train_images(data: DataConfig) -> tuple[int | None, str]:
    """Returns the number of training images, or None and why it isn't known."""
    try:
        return len(open_dataset(data).train), ""
    except UserError as error:
        return None, str(error)


def job_lines(runs: Sequence[Run], workdir: str) -> list[str]:
    """Returns the commands of the runs, one a line, for a scheduler: each trains or resumes its run."""
    return [
        shlex.join(["python", "-m", "mnv2_jax.main", *run.arguments, f"--workdir={workdir}/runs/{run.name}"])
        for run in runs
    ]


def slurm_array(runs: Sequence[Run], workdir: str) -> str:
    """Returns a script for ``sbatch``, one run an index of the array; after exit code 75 an index is queued again."""
    lines = "\n".join(f"  {shlex.quote(line)}" for line in job_lines(runs, workdir))
    return f"""\
#!/bin/bash
#SBATCH --array=0-{len(runs) - 1}
#SBATCH --requeue
commands=(
{lines}
)
eval "${{commands[$SLURM_ARRAY_TASK_ID]}}"
code=$?
# A fault of the machine: the run goes on from its checkpoint
if [ $code -eq 75 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; fi
exit $code
"""
