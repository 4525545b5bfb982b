"""The compiled steps of a training: one for each stage of fine-tuning and each shape of a batch."""

from __future__ import annotations

import functools
import time

import jax

from mnv2_jax.processes.supervisor import Supervisor
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment
from mnv2_jax.training.run import Run
from mnv2_jax.training.state import TrainState
from mnv2_jax.training.step import Metrics
from mnv2_jax.types import Batch


class Programs:
    """Called as the step is. A program is compiled when it is first needed; that time is not counted as training."""

    def __init__(self, experiment: Experiment, run: Run, supervisor: Supervisor):
        """Compiles nothing yet, and puts what the loss reads besides on the devices."""
        self._plan, self._run, self._supervisor = experiment.plan, run, supervisor
        self._frozen = meshes.put(experiment.mesh, experiment.task.frozen)
        self._throttle = meshes.make_throttle()
        self._compiled = functools.cache(
            lambda stage: meshes.compile_train_step(experiment.mesh, experiment.train_step(stage))
        )
        self._known: set[tuple[int, tuple[int, ...]]] = set()
        if len(self._plan.batch_shapes) > 1:
            listed = ", ".join(f"{resolution} px × {images}" for resolution, images in self._plan.batch_shapes)
            run.say(f"batches of {len(self._plan.batch_shapes)} shapes: {listed}")

    def __call__(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes a step, counted from 1: dispatches it, and waits for that of two steps ago.

        The first time it waits for the result: what comes of compiling is then over.
        """
        program = self._plan.stage_of(step), batch["image"].shape
        images = program[1][0]
        with jax.transfer_guard("disallow"):
            if program in self._known:
                state, metrics = self._compiled(program[0])(state, self._frozen, batch)
                self._run.speed.step_done(images)
            else:
                state, metrics = self._first_time(program, step, state, batch)
            self._throttle(metrics)
        return state, metrics

    def _first_time(
        self, program: tuple[int, tuple[int, ...]], step: int, state: TrainState, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        stage, shape = program
        most = len(self._plan.stages) * len(self._plan.batch_shapes)
        self._run.say(f"compiling{f' program {len(self._known) + 1} of at most {most}' if most > 1 else ''} …")
        begun = time.monotonic()
        with self._run.speed.stopped(), self._supervisor.compiling():
            state, metrics = self._compiled(stage)(state, self._frozen, batch)
            jax.block_until_ready(metrics)
        if not self._known:
            self._run.speed.restart()  # what came before the first step was no training
        self._known.add(program)
        train_from = self._plan.stages[stage].train_from
        of_what = f": {shape[1]} px × {shape[0]}, trained from {train_from} on" if most > 1 else ""
        self._run.say(f"step {step}: compiled in {time.monotonic() - begun:.1f} s{of_what}")
        return state, metrics
