"""The modes of the command line, each with its answer printed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
import tqdm

from mnv2_jax import outputs
from mnv2_jax.config import Config, Loaded, build, to_dict
from mnv2_jax.data.sources import check_path, known_num_classes
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import jsonable, write_json
from mnv2_jax.models import counting
from mnv2_jax.processes import runtime, together
from mnv2_jax.processes.supervisor import Stopped
from mnv2_jax.report.lr_find import write_lr_find
from mnv2_jax.report.page import write_report
from mnv2_jax.runs import folder as run_folder
from mnv2_jax.runs.provenance import provenance
from mnv2_jax.runs.weights import open_weights
from mnv2_jax.tasks.base import Evaluation, kind_of
from mnv2_jax.training import evaluate as evaluation
from mnv2_jax.training import loop, range_test, results
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment, Setup, open_experiment, open_setup
from mnv2_jax.training.initial import check_network, resolve_weights
from mnv2_jax.weights.file import describe

_ROWS_OF_RATES = 21


class Output(NamedTuple):
    """Output of a verb: for people, or one JSON object on standard output with all text on standard error."""

    as_json: bool

    @property
    def text(self) -> TextIO:
        """The stream for people."""
        return sys.stderr if self.as_json else sys.stdout

    def note(self, line: str) -> None:
        """Says something beside the answer, on standard error."""
        if together.is_first():
            print(line, file=sys.stderr)

    def answer(self, tree: Mapping[str, Any], text: str = "") -> None:
        """Prints the answer in the one form or the other; of several processes the first does."""
        if not together.is_first():
            return
        if self.as_json:
            print(json.dumps(jsonable(tree), allow_nan=False))
        elif text:
            print(text)


def train(loaded: Loaded, workdir: pathlib.Path, out: Output) -> None:
    """Trains a run to its end, or goes on with it.

    It is in the run's folder what came of it: a standard output that is closed or broken doesn't stop it.
    """
    outputs.drop_errors(sys.stdout)
    together.check_compiles()
    runtime.configure()
    summary = loop.train(_open_training(loaded, _saved_config(workdir)), workdir, out.text)
    out.answer({"stopped": True} if summary is None else summary)


def _open_training(loaded: Loaded, saved: Config | None = None) -> Experiment:
    """What is to be trained, with its weights looked at; ``saved`` is the config of a run that is gone on with."""
    if loaded.config.init.weights is None and loaded.config.init.head == "new":
        raise UserError("init.head='new' is a new head for init.weights, which are not set; give --config.init.weights")
    check_path(loaded.config.data)
    config, weights = resolve_weights(loaded, saved=saved)
    experiment = open_experiment(config)
    if config.init.weights is not None and saved is None:
        weights = weights or open_weights(config.init.weights, config.model, config.init.head)
        check_network(config, weights)
        experiment.kind.check_head(config, weights, experiment.dataset)
    return experiment  # without the weights, which are read again: they would stay in memory all through training


def find_lr(
    loaded: Loaded, lowest: float, highest: float, steps: int, folder: pathlib.Path | None, out: Output
) -> None:
    """Tries learning rates from ``lowest`` to ``highest`` in so many steps, and suggests one.

    ``folder`` gets lr_find.json and a page; None: nothing is written.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out={folder}: no folder can be made there ({error.strerror}); give another") from error
    together.check_compiles()
    runtime.configure()
    experiment = _open_training(loaded)
    for note in (*experiment.dataset.notes, *experiment.task.notes):
        out.note(note)
    try:
        with tqdm.tqdm(total=steps, unit="step", disable=None, file=sys.stderr) as bar:
            found = range_test.range_test(experiment, lowest, highest, steps, bar.write, bar.update)
    except Stopped:
        return out.answer({"stopped": True}, "stopped before the end; nothing was found")
    config, advice = experiment.config, range_test.advise(found.points)
    tree = {
        "suggestion": advice.rates.get("tenth"),
        "suggestions": advice.rates,
        "fall": advice.fall,
        "noise": advice.noise,
        "peak_lr": config.peak_lr,
        "diverged": found.diverged,
        "from": lowest,
        "to": highest,
        "steps": len(found.points),
        "batch_size": config.data.batch_size,
        "optimizer": config.optim.name,
        "points": [point._asdict() for point in found.points],
    }
    said = _sentences_of_rates(found, advice, config)
    out.answer(tree, "\n".join([*_table_of_rates(found.points), *said]))
    if folder is not None:
        model, data = describe(experiment.task.model), experiment.dataset.name
        write_json(folder / "lr_find.json", tree)
        write_lr_find(
            folder / "lr_find.html",
            f"{model} on {data}",
            ". ".join(line[0].upper() + line[1:] for line in said) + ".",
            tree,
        )
        print(f"  page         {folder / 'lr_find.html'}\n  numbers      {folder / 'lr_find.json'}", file=out.text)


def _table_of_rates(points: Sequence[range_test.Point]) -> list[str]:
    """A row for about each twentieth of the steps."""
    places = sorted({round(place) for place in np.linspace(0, len(points) - 1, _ROWS_OF_RATES)}) if points else []
    rows = [(f"{lr:.2e}", f"{loss:.4f}", f"{smoothed:.4f}") for lr, loss, smoothed in (points[at] for at in places)]
    return [f"{lr:>13}  {loss:>9}  {mean:>9}" for lr, loss, mean in [("learning rate", "loss", "smoothed"), *rows]]


def _sentences_of_rates(found: range_test.Found, advice: range_test.Advice, config: Config) -> list[str]:
    """How a test ended, what it suggests, and what the config has."""
    points, rates = found.points, advice.rates
    if not points:
        return [
            "the first loss is not finite, so nothing can be suggested; give a smaller --from, and look at the data"
        ]
    end = f"step {len(points)}, learning rate {points[-1].lr:.2g}"
    ended = f"the loss went out of bounds after {end}" if found.diverged else f"the loss stayed in bounds up to {end}"
    own = f"the config's own: optim.peak_lr={config.peak_lr:.4g}, for batches of {config.data.batch_size}"
    if not rates:
        fell = f"the smoothed loss fell by {advice.fall:.2g}, no more than batches differ ({advice.noise:.2g})"
        return [ended, f"{fell}, so nothing can be suggested; give --steps={4 * len(points)}, or a higher --from", own]
    suggested = (
        f"suggested: --config.optim.peak_lr={rates['tenth']:.2g}, a tenth of the rate with the least loss; it falls"
        f" fastest at {rates['steepest']:.2g}, and half way down the longest descent is {rates['valley']:.2g}"
    )
    return [ended, suggested, own]


def _saved_config(workdir: pathlib.Path) -> Config | None:
    """Config of the run that the folder holds, if any; process 0 reads it."""
    found = None
    if together.is_first() and (workdir / run_folder.CONFIG).is_file():
        found = to_dict(run_folder.read_run(workdir)[0])
    told = together.from_first(found)
    return None if told is None else build(told)


def evaluate(
    loaded: Loaded,
    workdir: pathlib.Path,
    which: Literal["latest", "best"] | None,
    out: Output,
    predictions: pathlib.Path | None = None,
) -> None:
    """Evaluates a checkpoint of a run, on any devices; at `data.resolution` where the command line says it.

    What is found stays in the run's folder, in a file of its own and in the report. ``predictions`` is a file for all
    answers.
    """
    if not workdir.exists():
        raise UserError(
            f"{workdir}: no run is there; train it first, give the --workdir of another, or evaluate weights by"
            " --config.init.weights=FILE"
        )
    _check_predictions(predictions)
    runtime.configure()
    config, origins = loaded.config, loaded.origins
    if origins["data.resolution"] == "flag" != origins["data.eval_resolution"]:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_resolution=None))
    try:
        which, step, setup, found = evaluation.evaluate_run(config, workdir, which, out.note)
    except Stopped:
        return out.answer({"stopped": True}, "stopped before the end; nothing was evaluated")
    what, facts = f"{workdir}, its {which} checkpoint, step {step}", {"step": step, "checkpoint": which}
    found = _answer_evaluation(what, setup, found, out, predictions, **facts)
    if together.is_first():
        _keep(workdir, setup, found, facts, out)


def _check_predictions(path: pathlib.Path | None) -> None:
    """Refuses, before anything is evaluated, a file that can't be; the first process, which writes it, does."""
    if path is None or not together.is_first() or (path.parent.is_dir() and not path.is_dir()):
        return
    what = "a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
    raise UserError(f"--predictions={str(path)!r}: {what}; give the path of a file in a folder that is there")


def _keep(workdir: pathlib.Path, setup: Setup, found: Evaluation, facts: Mapping[str, Any], out: Output) -> None:
    """Writes an evaluation into the run's folder, and the report anew; in a folder that is read only, says so."""
    own, _ = run_folder.read_run(workdir)
    path = workdir / results.file_of(setup.dataset.eval.name, setup.config.data.name, own.data.name)
    if not os.access(workdir, os.W_OK):
        return out.note(f"note: {workdir} is read only: {path.name} and the report aren't written")
    session = provenance(meshes.describe(setup.mesh)) | {"memory": meshes.peak_memory(setup.mesh)}
    results.keep(path, setup, found, **facts, provenance=session)
    report = write_report(workdir, setup.kind.page)
    print(f"  evaluation   {path}\n  report       {report}", file=out.text)


def evaluate_weights(loaded: Loaded, out: Output, predictions: pathlib.Path | None = None) -> None:
    """Evaluates `init.weights` as they are, on images as their publisher sees them.

    They have no run's folder: what is found is printed, and ``predictions`` is a file for all answers.
    """
    _check_predictions(predictions)
    runtime.configure()
    head = loaded.config.init.head
    if head != "load" and "init.head" in loaded.said:
        raise UserError(f"init.head={head!r}: a new head has learnt nothing to evaluate; leave it out")
    check_path(loaded.config.data)
    config, weights = resolve_weights(loaded, evaluates=True)
    assert config.init.weights is not None
    weights = weights or open_weights(config.init.weights, config.model)
    check_network(config, weights)
    classes = f"init.weights={config.init.weights!r}", weights.info, weights.model.num_classes
    setup = open_setup(config, classes=classes)
    for note in setup.dataset.notes:
        out.note(note)
    try:
        found = evaluation.evaluate_weights(setup, weights)
    except Stopped:
        return out.answer({"stopped": True}, "stopped before the end; nothing was evaluated")
    _answer_evaluation(str(config.init.weights), setup, found, out, predictions, weights=config.init.weights)


def _answer_evaluation(
    what: str, setup: Setup, found: Evaluation, out: Output, predictions: pathlib.Path | None, **facts: Any
) -> Evaluation:
    """Prints an evaluation before anything is written, which may fail; gives it with the places of its examples."""
    if not together.is_first():
        return found
    found = results.located(found, setup.dataset.eval)
    for line in (*(f"left out: {line}" for line in found.skipped), *found.notes):
        out.note(line)
    split, resolution = setup.dataset.eval.name, setup.config.data.seen_resolution
    without = f", without {len(found.skipped)} that can't be decoded" if found.skipped else ""
    headline = f"{what}: {split} at {resolution} px, {setup.task.headline(found.scalars)}{without}"
    skipped = {"skipped": list(found.skipped)} if setup.config.data.skip_corrupt else {}
    answer = {**facts, "split": split, "resolution": resolution, "eval": dict(found.scalars), **found.tables, **skipped}
    answer |= {"examples": list(found.examples)}
    out.answer(answer, "\n".join([headline, *setup.task.details(found)]))
    if predictions is not None:
        results.write_predictions(predictions, setup.dataset.eval, found)
        print(f"  predictions  {predictions}", file=out.text)
    return found


def summarise(loaded: Loaded, out: Output) -> None:
    """Prints the layer table of a config's model; reads no data."""
    runtime.configure()
    config, weights = resolve_weights(loaded)
    theirs = weights.model.num_classes if weights and config.init.head == "load" else None
    classes = config.model.num_classes or theirs or known_num_classes(config.data)
    model = kind_of(config).model(config.model, config.norm, classes)
    summary = counting.count_layers(model, config.data.seen_resolution)
    rows = [("layer", "output", "params", "MAdds")]
    for layer in summary.layers:
        shape = "×".join(map(str, layer.output_shape or ()))
        rows.append((layer.name, shape, f"{layer.params:,}", f"{layer.madds:,}"))
    rows.append(("total", "", f"{summary.params:,}", f"{summary.madds:,}"))
    name_width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{name_width}}  {shape:>14}  {params:>11}  {madds:>13}" for name, shape, params, madds in rows]
    out.answer(dataclasses.asdict(summary), "\n".join(lines))
