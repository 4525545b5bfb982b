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
    """Takes steps. It compiles a program when it is first needed, and doesn't count that time as training."""

    def __init__(self, experiment: Experiment, run: Run, supervisor: Supervisor):
        """Puts `Task.frozen` (a teacher's variables) on the devices, and compiles nothing yet."""
        self._plan, self._run, self._supervisor = experiment.plan, run, supervisor
        self._frozen = meshes.put(experiment.mesh, experiment.task.frozen)
        self._throttle = meshes.make_throttle()
        self._compiled = functools.cache(
            lambda stage: meshes.compile_train_step(experiment.mesh, experiment.train_step(stage))
        )
        self._compiled_programs: set[tuple[int, tuple[int, ...]]] = set()
        if len(self._plan.batch_shapes) > 1:
            listed = ", ".join(f"{resolution} px × {images}" for resolution, images in self._plan.batch_shapes)
            run.say(f"batches of {len(self._plan.batch_shapes)} shapes: {listed}")

    def __call__(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes a step, counted from 1: dispatches it, and waits for the step before the last one.

        The first step of a program is waited for, so that compilation is over when this returns.
        """
        program = self._plan.stage_of(step), batch["image"].shape
        images = program[1][0]
        with jax.transfer_guard("disallow"):
            if program in self._compiled_programs:
                state, metrics = self._compiled(program[0])(state, self._frozen, batch)
                self._run.speed.step_done(images)
            else:
                state, metrics = self._compile_and_take(program, step, state, batch)
            self._throttle(metrics)
        return state, metrics

    def _compile_and_take(
        self, program: tuple[int, tuple[int, ...]], step: int, state: TrainState, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        stage, shape = program
        max_programs = len(self._plan.stages) * len(self._plan.batch_shapes)
        number = f" program {len(self._compiled_programs) + 1} of at most {max_programs}" if max_programs > 1 else ""
        self._run.say(f"compiling{number} …")
        start = time.monotonic()
        with self._run.speed.stopped(), self._supervisor.compiling():
            state, metrics = self._compiled(stage)(state, self._frozen, batch)
            jax.block_until_ready(metrics)
        if not self._compiled_programs:
            self._run.speed.restart()  # the time before the first step was not training
        self._compiled_programs.add(program)
        train_from = self._plan.stages[stage].train_from
        details = f": {shape[1]} px × {shape[0]}, trained from {train_from} on" if max_programs > 1 else ""
        self._run.say(f"step {step}: compiled in {time.monotonic() - start:.1f} s{details}")
        return state, metrics
