"""Scores of a study's cells, from the folders of its runs."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnv2_jax.config import flatten
from mnv2_jax.json_files import read_json
from mnv2_jax.runs.folder import CONFIG, PROVENANCE
from mnv2_jax.runs.metrics_log import read_metrics
from mnv2_jax.study.design import Cell, Study, cells_of
from mnv2_jax.study.state import State, run_folder


class Scores(NamedTuple):
    """The scores of a cell's finished runs."""

    cell: Cell
    by_seed: Mapping[int, float]
    images: int
    """Number of evaluated images; 0 before a run is done."""
    params: int
    madds: int
    """Multiply-adds of inference for one image."""
    seconds: float
    """Seconds of training, of all runs together."""


def scores_of(study: Study, states: Iterable[State], metric: str, when: str) -> dict[str, Scores]:
    """Returns the scores of all cells by their names; a cell without a finished run has none."""
    found: dict[str, list[State]] = {cell.name: [] for cell in cells_of(study)}
    for state in states:
        if state.name == "done":
            found[state.run.cell.name].append(state)
    scores = {}
    for cell in cells_of(study):
        done = found[cell.name]
        by_seed = {state.run.seed: value for state in done if (value := score(state.summary, metric, when)) is not None}
        first: Mapping[str, Any] = done[0].summary if done else {}
        scores[cell.name] = Scores(
            cell,
            by_seed,
            int(first.get("eval", {}).get("count", 0)),
            int(first.get("params", 0)),
            int(first.get("madds", 0)),
            sum(state.seconds for state in done),
        )
    return scores


def metric_of(study: Study) -> tuple[str, str]:
    """Returns the score of the tables, metric and when: that of the first claim or relation, or the last top-1."""
    pairs = [*((each.metric, each.when) for each in study.claims), *((x.metric, x.when) for x in study.relations)]
    return pairs[0] if pairs else ("top1", "final")


def unfinished_of(states: Iterable[State], metric: str) -> list[dict[str, Any]]:
    """Returns a row for each run that isn't done: its state, and its last evaluation so far, which no claim counts."""
    return [
        {
            "run": state.run.name,
            "state": state.name,
            "share": state.share,
            "seconds": state.seconds,
            "step": state.evaluation.get("step"),
            "score_so_far": state.evaluation.get(metric),
        }
        for state in states
        if state.name != "done"
    ]


def score(summary: Mapping[str, Any], metric: str, when: str) -> float | None:
    """Returns a scalar of a run's last evaluation or of its best; None if the summary doesn't have it."""
    value = summary.get("best" if when == "best" else "eval", {}).get(metric)
    return None if value is None else float(value)


def curves_of(study: pathlib.Path, states: Sequence[State], metric: str) -> dict[str, np.ndarray]:
    """Returns the learning curves of cells by name: [n, 4], with epoch, mean, lowest and highest score over seeds.

    Only steps at which all runs of the cell were evaluated are there.
    """
    curves = {}
    for name in dict.fromkeys(state.run.cell.name for state in states):
        logs = []
        for state in states:
            if state.run.cell.name == name and state.name == "done":
                logs.append(_curve(read_metrics(run_folder(study, state.run)), metric))
        steps = sorted(set.intersection(*(set(log) for log in logs))) if logs else []
        if steps:
            values = np.array([[log[step][1] for log in logs] for step in steps])
            epochs = [logs[0][step][0] for step in steps]
            curves[name] = np.stack([epochs, values.mean(1), values.min(1), values.max(1)], axis=1)
    return curves


def _curve(lines: Sequence[Mapping[str, Any]], metric: str) -> dict[int, tuple[float, float]]:
    """Returns epoch and score of each evaluation by its step; the epoch is that of the last logged training step."""
    epochs: dict[int, float] = {0: 0.0}
    curve = {}
    for line in lines:
        if "epoch" in line:
            epochs[line["step"]] = line["epoch"]
        elif line.get("split") == "eval" and line.get(metric) is not None:
            near = max((step for step in epochs if step <= line["step"]), default=0)
            curve[line["step"]] = (epochs[near] * line["step"] / near if near else 0.0, float(line[metric]))
    return curve


def differences_within(study: pathlib.Path, states: Iterable[State]) -> list[str]:
    """Returns what differs between the finished runs of each cell, besides the seed: code, machine, settings."""
    lines = []
    by_cell: dict[str, list[State]] = {}
    for state in states:
        if state.name == "done":
            by_cell.setdefault(state.run.cell.name, []).append(state)
    for name, done in by_cell.items():
        facts = [_facts(run_folder(study, state.run)) for state in done]
        for key in sorted(set().union(*facts)):
            values = {str(each.get(key)) for each in facts}
            if len(values) > 1:
                lines.append(f"{name}: {key}: {', '.join(sorted(values))}")
    return lines


def _facts(folder: pathlib.Path) -> dict[str, Any]:
    """Returns settings without the seed, and what is known of the code and the machine in all sessions."""
    facts: dict[str, Any] = {key: str(x) for key, x in flatten(read_json(folder / CONFIG)).items() if key != "seed"}
    sessions = read_json(folder / PROVENANCE).get("sessions", []) if (folder / PROVENANCE).is_file() else []
    for part in ("git", "versions", "devices", "settings"):
        for key in sorted({key for session in sessions for key in session.get(part, {})}):
            values = sorted({str(session.get(part, {}).get(key)) for session in sessions})
            facts[f"{part}.{key}"] = ", then ".join(values)
    return facts
