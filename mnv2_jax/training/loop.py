"""The train loop, in the order in which things happen."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from typing import Any, TextIO

from mnv2_jax.processes import together
from mnv2_jax.processes.supervisor import Stopped, supervise
from mnv2_jax.training.begin import begin
from mnv2_jax.training.evaluate import make_evaluate
from mnv2_jax.training.experiment import Experiment, config_facts
from mnv2_jax.training.feeds import train_batches
from mnv2_jax.training.introduction import introduce
from mnv2_jax.training.programs import Programs
from mnv2_jax.training.run import open_run


def train(experiment: Experiment, workdir: pathlib.Path, stream: TextIO = sys.stdout) -> dict[str, Any] | None:
    """Trains to the end, from the newest checkpoint if the folder has one.

    SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save a checkpoint and return; the same call resumes from there, to the bit. Of
    several processes only the first uses the folder and the log; the others need no access to it.

    Args:
      experiment: the experiment to train.
      workdir: the run folder; made if it doesn't exist.
      stream: where text is printed, by the first process only.

    Returns:
      The content of `summary.json`; None if a signal came first.

    Raises:
      UserError: if the folder belongs to another run, if another process uses it, or if an image can't be read.
      NonFiniteLossError: naming the first step whose loss, gradient or weights are not finite. No checkpoint holds
        that step or a later one.
    """
    config, plan = experiment.config, experiment.plan
    together.agree({**config_facts(config), **experiment.facts}, config.faults.start_timeout_s)
    with supervise(config.faults) as supervisor, open_run(experiment, workdir, stream, supervisor) as run:
        if run.summary is not None:
            return run.summary
        for line in introduce(experiment, workdir, run.start):
            run.say(line)
        step = run.start
        with contextlib.suppress(Stopped):
            with supervisor.compiling():
                state = begin(experiment, run)
            programs, evaluate = Programs(experiment, run, supervisor), make_evaluate(experiment, supervisor)
            if run.owes_evaluation:
                run.evaluated(step, evaluate(state.variables))
            batches = train_batches(experiment, step, supervisor.should_stop, run.skipped)
            with contextlib.closing(batches):  # closing ends the workers
                following = supervisor.each(batches)
                while not run.is_over(step) and not supervisor.should_stop():
                    # Arrays may have to be loaded first; a process that is stuck here keeps the others waiting.
                    with run.fetching(step, state), supervisor.compiling():
                        batch = next(following)
                    state, metrics = programs(step + 1, state, batch)  # only dispatched: the device is busy from here
                    run.read()  # the metrics of the step before, which is done: the device isn't kept waiting
                    step += 1
                    run.note(step, metrics)
                    if plan.evaluates_at(step):
                        with run.evaluating(step, state):
                            evaluation = evaluate(state.variables)
                        run.evaluated(step, evaluation)
                    if run.saves_at(step):
                        run.save(step, state)
        with supervisor.compiling():
            if step > run.start and step not in run.scores:  # stopped; an evaluated step is saved already
                run.save(step, state)
            return run.end(step)
