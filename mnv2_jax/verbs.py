"""The modes of the command line. Each function runs one mode and prints its answer."""

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
from mnv2_jax.training import evaluate as evaluating
from mnv2_jax.training import loop, range_test, results
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment, Setup, open_experiment, open_setup
from mnv2_jax.training.initial import check_network, resolve_weights
from mnv2_jax.weights.file import describe

_RATE_TABLE_ROWS = 21


class Output(NamedTuple):
    """Output of a verb: text for people, or one JSON object on standard output with all text on standard error."""

    as_json: bool

    @property
    def text(self) -> TextIO:
        """Stream for the text that people read."""
        return sys.stderr if self.as_json else sys.stdout

    def note(self, line: str) -> None:
        """Prints a remark that is not part of the answer, on standard error."""
        if together.is_first():
            print(line, file=sys.stderr)

    def answer(self, tree: Mapping[str, Any], text: str = "") -> None:
        """Prints the answer, as JSON or as text. Where several processes run, only the first one prints."""
        if not together.is_first():
            return
        if self.as_json:
            print(json.dumps(jsonable(tree), allow_nan=False))
        elif text:
            print(text)


def train(loaded: Loaded, workdir: pathlib.Path, out: Output) -> None:
    """Trains a run to its end, or resumes it.

    The result is in the run folder, so a closed or broken standard output doesn't stop the training.
    """
    outputs.drop_errors(sys.stdout)
    together.check_compiles()
    runtime.configure()
    summary = loop.train(_open_training(loaded, _saved_config(workdir)), workdir, out.text)
    out.answer({"stopped": True} if summary is None else summary)


def _open_training(loaded: Loaded, saved: Config | None = None) -> Experiment:
    """Opens the experiment to train, after checking its initial weights. ``saved``: config of the run to resume."""
    if loaded.config.init.weights is None and loaded.config.init.head == "new":
        raise UserError("init.head='new' puts a new head on init.weights, which is not set; give --config.init.weights")
    check_path(loaded.config.data)
    config, weights = resolve_weights(loaded, saved=saved)
    experiment = open_experiment(config)
    if config.init.weights is not None and saved is None:
        weights = weights or open_weights(config.init.weights, config.model, config.init.head)
        check_network(config, weights)
        experiment.kind.check_head(config, weights, experiment.dataset)
    return experiment  # without the weights, which would stay in memory all through training; they are read again


def find_lr(
    loaded: Loaded, lowest: float, highest: float, steps: int, folder: pathlib.Path | None, out: Output
) -> None:
    """Tries learning rates from ``lowest`` to ``highest`` in ``steps`` steps, and suggests one.

    Writes lr_find.json and a page to ``folder``, unless that is None.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out={folder}: can't make this folder ({error.strerror}); give another") from error
    together.check_compiles()
    runtime.configure()
    experiment = _open_training(loaded)
    for note in (*experiment.dataset.notes, *experiment.task.notes):
        out.note(note)
    out.note(f"trying {steps} learning rates from {lowest:g} to {highest:g}, one step at each …")
    try:
        with tqdm.tqdm(total=steps, unit="step", disable=None, file=sys.stderr) as bar:
            test = range_test.range_test(experiment, lowest, highest, steps, bar.write, bar.update)
    except Stopped:
        return out.answer({"stopped": True}, "stopped before the end; there is no result")
    config, advice = experiment.config, range_test.advise(test.points)
    tree = {
        "suggestion": advice.rates.get("tenth"),
        "suggestions": advice.rates,
        "fall": advice.fall,
        "noise": advice.noise,
        "peak_lr": config.peak_lr,
        "diverged": test.diverged,
        "from": lowest,
        "to": highest,
        "steps": len(test.points),
        "batch_size": config.data.batch_size,
        "optimizer": config.optim.name,
        "points": [point._asdict() for point in test.points],
    }
    sentences = _rate_sentences(test, advice, config)
    out.answer(tree, "\n".join([*_rate_table(test.points), *sentences]))
    if folder is not None:
        model, data = describe(experiment.task.model), experiment.dataset.name
        write_json(folder / "lr_find.json", tree)
        write_lr_find(
            folder / "lr_find.html",
            f"{model} on {data}",
            ". ".join(line[0].upper() + line[1:] for line in sentences) + ".",
            tree,
        )
        print(f"  page         {folder / 'lr_find.html'}\n  numbers      {folder / 'lr_find.json'}", file=out.text)


def _rate_table(points: Sequence[range_test.Point]) -> list[str]:
    """Lines of a table with learning rate and loss, a row for about every twentieth of the steps."""
    steps = sorted({round(step) for step in np.linspace(0, len(points) - 1, _RATE_TABLE_ROWS)}) if points else []
    rows = [(f"{lr:.2e}", f"{loss:.4f}", f"{smoothed:.4f}") for lr, loss, smoothed in (points[step] for step in steps)]
    return [f"{lr:>13}  {loss:>9}  {mean:>9}" for lr, loss, mean in [("learning rate", "loss", "smoothed"), *rows]]


def _rate_sentences(test: range_test.RangeTest, advice: range_test.Advice, config: Config) -> list[str]:
    """Says how a range test ended, which rate it suggests, and which rate the config has."""
    points, rates = test.points, advice.rates
    if not points:
        return ["the first loss is not finite, so no rate can be suggested; give a smaller --from, and check the data"]
    end = f"step {len(points)}, learning rate {points[-1].lr:.2g}"
    ending = f"the loss went out of bounds after {end}" if test.diverged else f"the loss stayed in bounds up to {end}"
    current = f"the config has optim.peak_lr={config.peak_lr:.4g}, for batches of {config.data.batch_size}"
    if not rates:
        fall = f"the smoothed loss fell by {advice.fall:.2g}, no more than batches differ ({advice.noise:.2g})"
        mend = f"give --steps={4 * len(points)}, or a higher --from"
        return [ending, f"{fall}, so no rate can be suggested; {mend}", current]
    suggestion = (
        f"suggested: --config.optim.peak_lr={rates['tenth']:.2g}, a tenth of the rate with the lowest loss; the loss"
        f" falls fastest at {rates['steepest']:.2g}, and is half way down its longest descent at {rates['valley']:.2g}"
    )
    return [ending, suggestion, current]


def _saved_config(workdir: pathlib.Path) -> Config | None:
    """Config of the run in this folder, or None where there is no run. Process 0 reads it for all."""
    tree = None
    if together.is_first() and (workdir / run_folder.CONFIG).is_file():
        tree = to_dict(run_folder.read_run(workdir)[0])
    tree = together.from_first(tree)
    return None if tree is None else build(tree)


def evaluate(
    loaded: Loaded,
    workdir: pathlib.Path,
    checkpoint: Literal["latest", "best"] | None,
    out: Output,
    predictions: pathlib.Path | None = None,
) -> None:
    """Evaluates a checkpoint of a run, on any devices; at `data.resolution` where the command line sets that.

    The result is written to a file of its own in the run folder, and to the report. ``predictions`` is the CSV file
    that gets the prediction for every image.
    """
    if not workdir.exists():
        raise UserError(
            f"{workdir}: no run is there; train it first, give the --workdir of another run, or evaluate a weights"
            " file with --config.init.weights=FILE"
        )
    _check_predictions(predictions)
    runtime.configure()
    config, origins = loaded.config, loaded.origins
    if origins["data.resolution"] == "flag" != origins["data.eval_resolution"]:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_resolution=None))
    try:
        checkpoint, step, setup, evaluation = evaluating.evaluate_run(config, workdir, checkpoint, out.note)
    except Stopped:
        return out.answer({"stopped": True}, "stopped before the end; there is no result")
    weights_name, facts = f"{workdir}, {checkpoint} checkpoint, step {step}", {"step": step, "checkpoint": checkpoint}
    evaluation = _answer_evaluation(weights_name, setup, evaluation, out, predictions, **facts)
    if together.is_first():
        _save_evaluation(workdir, setup, evaluation, facts, out)


def _check_predictions(path: pathlib.Path | None) -> None:
    """Refuses a path where no file can be written, before the evaluation. Only the first process checks and writes."""
    if path is None or not together.is_first() or (path.parent.is_dir() and not path.is_dir()):
        return
    fault = "is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
    raise UserError(f"--predictions={str(path)!r}: {fault}; give the path of a file in a folder that exists")


def _save_evaluation(
    workdir: pathlib.Path, setup: Setup, evaluation: Evaluation, facts: Mapping[str, Any], out: Output
) -> None:
    """Writes an evaluation and a new report to the run folder. Where that is read-only, prints a note instead."""
    run_config, _ = run_folder.read_run(workdir)
    path = workdir / results.evaluation_file(setup.dataset.eval.name, setup.config.data.name, run_config.data.name)
    if not os.access(workdir, os.W_OK):
        return out.note(f"note: {workdir} is read-only, so {path.name} and the report are not written")
    session = provenance(meshes.describe(setup.mesh)) | {"memory": meshes.peak_memory(setup.mesh)}
    results.save_evaluation(path, setup, evaluation, **facts, provenance=session)
    report = write_report(workdir, setup.kind.page)
    print(f"  evaluation   {path}\n  report       {report}", file=out.text)


def evaluate_weights(loaded: Loaded, out: Output, predictions: pathlib.Path | None = None) -> None:
    """Evaluates `init.weights` unchanged, on images preprocessed as their publisher does.

    Such weights have no run folder, so the result is only printed. ``predictions`` is the CSV file that gets the
    prediction for every image.
    """
    _check_predictions(predictions)
    runtime.configure()
    head = loaded.config.init.head
    if head != "load" and "init.head" in loaded.explicit_keys:
        raise UserError(f"init.head={head!r}: a new head is untrained, so there is nothing to evaluate; leave it out")
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
        evaluation = evaluating.evaluate_weights(setup, weights)
    except Stopped:
        return out.answer({"stopped": True}, "stopped before the end; there is no result")
    _answer_evaluation(str(config.init.weights), setup, evaluation, out, predictions, weights=config.init.weights)


def _answer_evaluation(
    weights_name: str,
    setup: Setup,
    evaluation: Evaluation,
    out: Output,
    predictions: pathlib.Path | None,
    **facts: Any,
) -> Evaluation:
    """Prints an evaluation, and writes the predictions after that, as writing may fail.

    Returns:
      The evaluation, with the path of each example where the split knows it.
    """
    if not together.is_first():
        return evaluation
    evaluation = results.with_paths(evaluation, setup.dataset.eval)
    for line in (*(f"left out: {line}" for line in evaluation.skipped), *evaluation.notes):
        out.note(line)
    split, resolution = setup.dataset.eval.name, setup.config.data.seen_size
    without = f", without {len(evaluation.skipped)} that can't be decoded" if evaluation.skipped else ""
    at = f" at {resolution} px" if setup.config.model.head == "classifier" else ""  # a dense head: at their own size
    headline = f"{weights_name}: {split}{at}, {setup.task.headline(evaluation.scalars)}{without}"
    skipped = {"skipped": list(evaluation.skipped)} if setup.config.data.skip_corrupt else {}
    scalars = dict(evaluation.scalars)
    answer = {**facts, "split": split, "resolution": resolution, "eval": scalars, **evaluation.tables, **skipped}
    answer |= {"examples": list(evaluation.examples)}
    out.answer(answer, "\n".join([headline, *setup.task.details(evaluation)]))
    if predictions is not None:
        results.write_predictions(predictions, setup.dataset.eval, evaluation)
        print(f"  predictions  {predictions}", file=out.text)
    return evaluation


def print_summary(loaded: Loaded, out: Output) -> None:
    """Prints the layer table of a config's model, without reading its data."""
    runtime.configure()
    config, weights = resolve_weights(loaded)
    weights_classes = weights.model.num_classes if weights and config.init.head == "load" else None
    classes = config.model.num_classes or weights_classes or known_num_classes(config.data)
    model = kind_of(config).model(config.model, config.norm, classes)
    summary = counting.count_layers(model, config.data.seen_size)
    rows = [("layer", "output", "params", "MAdds")]
    for layer in summary.layers:
        shape = "×".join(map(str, layer.output_shape or ()))
        rows.append((layer.name, shape, f"{layer.params:,}", f"{layer.madds:,}"))
    rows.append(("total", "", f"{summary.params:,}", f"{summary.madds:,}"))
    name_width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{name_width}}  {shape:>14}  {params:>11}  {madds:>13}" for name, shape, params, madds in rows]
    out.answer(dataclasses.asdict(summary), "\n".join(lines))
