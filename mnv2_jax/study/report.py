"""The report of a study: a page, a Markdown table, results.csv and verdicts.json. The same runs give the same bytes."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from mnv2_jax.json_files import write_json, write_text
from mnv2_jax.report.charts import Point, band, scores_by_cost
from mnv2_jax.report.page import whole_page
from mnv2_jax.report.words import number, percent, short, table, text
from mnv2_jax.runs.folder import PROVENANCE
from mnv2_jax.runs.progress import duration
from mnv2_jax.study import verdict
from mnv2_jax.study.design import Study, find_cell
from mnv2_jax.study.judgement import Judged, judge_all
from mnv2_jax.study.results import Scores, curves_of, differences_within, metric_of, scores_of, unfinished_of
from mnv2_jax.study.state import State, run_folder

HTML, MARKDOWN, CSV, VERDICTS = "report.html", "report.md", "results.csv", "verdicts.json"


def write_report(folder: pathlib.Path, name: str, study: Study, states: Sequence[State]) -> pathlib.Path:
    """Writes the four files into the study's folder; returns the path of the page.

    Args:
      folder: the study's folder.
      name: name of the study.
      study: the design.
      states: the states of all its runs.
    """
    judged, rows = judge_all(study, states), _rows(study, states)
    unfinished = unfinished_of(states, metric_of(study)[0])
    verdicts = {"study": name, "claims": [each.to_json() for each in judged], "cells": rows, "unfinished": unfinished}
    write_text(folder / CSV, _csv(rows))
    write_json(folder / VERDICTS, verdicts)
    write_text(folder / MARKDOWN, _markdown(name, states, judged, rows, unfinished))
    write_text(folder / HTML, whole_page(name, _body(folder, name, study, states, judged, rows, unfinished)))
    return folder / HTML


def _rows(study: Study, states: Sequence[State]) -> list[dict[str, Any]]:
    """Returns a row of numbers for each cell."""
    metric, when = metric_of(study)
    return [_row(scores, metric, when) for scores in scores_of(study, states, metric, when).values()]


def _row(scores: Scores, metric: str, when: str) -> dict[str, Any]:
    values = list(scores.by_seed.values())
    row: dict[str, Any] = {"cell": scores.cell.name, **scores.cell.point, "metric": metric, "when": when}
    row |= {"params": scores.params or None, "madds": scores.madds or None, "seeds": len(values)}
    empty = dict.fromkeys(("mean", "spread", "low", "high", "sampling_error"))
    if values:
        summary = verdict.summarise(values, images=scores.images or None)
        row |= {key: getattr(summary, key) for key in empty}
    else:
        row |= empty
    return row | {"images": scores.images or None, "seconds": scores.seconds, "scores": values}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "scores": " ".join(map(str, row["scores"]))})
    return file.getvalue()


def _markdown(
    name: str,
    states: Sequence[State],
    judged: Sequence[Judged],
    rows: Sequence[dict[str, Any]],
    unfinished: Sequence[dict[str, Any]],
) -> str:
    lines = [f"# {name}", "", _progress(states), ""]
    if judged:
        lines += ["| claim | seeds | verdict |", "| --- | --- | --- |"]
        lines += [f"| {each.what} | {len(each.seeds)} | {each.sentence} |" for each in judged]
        lines += ["", _tested(judged), ""]
    lines += ["| cell | seeds | mean | spread | 95 % interval | params | MAdds |", "| --- |" + " --- |" * 6]
    for row in rows:
        interval = "–" if row["low"] is None else f"{_share(row['low'])} to {_share(row['high'])}"
        lines.append(
            f"| {row['cell']} | {row['seeds']} | {_share(row['mean'])} | {_share(row['spread'])} | {interval} |"
            f" {number(row['params'])} | {number(row['madds'])} |"
        )
    if unfinished:
        lines += ["", "| run not done | state | trained | last evaluation, not counted |", "| --- |" + " --- |" * 3]
    for row in unfinished:
        lines.append(f"| {row['run']} | {row['state']} | {row['share']:.0%} | {_so_far(row)} |")
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _so_far(row: dict[str, Any]) -> str:
    """Writes the last evaluation of a run that isn't done."""
    return "–" if row["score_so_far"] is None else f"{_share(row['score_so_far'])} at step {row['step']:,}"


def _progress(states: Sequence[State]) -> str:
    done, failed = (sum(state.name == name for state in states) for name in ("done", "failed"))
    failures = f", {failed} failed" if failed else ""
    trained = duration(sum(state.seconds for state in states))
    return f"{done} of {len(states)} runs are done{failures}; {trained} of training in all."


def _tested(judged: Sequence[Judged]) -> str:
    count = len(judged)
    if all(each.judgement is None for each in judged):
        return "No claim is tested yet."
    if count == 1:
        return "One claim was tested, at a level of 95 %."
    level = verdict.family_level(count)
    return (
        f"{count} claims were tested at once, each at a level of 95 %: up to one wrong verdict in twenty is to be"
        f" expected. For at most 5 % over all of them each would need a level of {100 * level:.2f} %."
    )


def _body(
    folder: pathlib.Path,
    name: str,
    study: Study,
    states: Sequence[State],
    judged: Sequence[Judged],
    rows: Sequence[dict[str, Any]],
    unfinished: Sequence[dict[str, Any]],
) -> str:
    metric, when = metric_of(study)
    parts = [
        f"<header><p class=eyebrow>study</p><h1>{text(name)}</h1><p class=lead>{text(_progress(states))}"
        f" The score is the {when} {text(metric)}.</p></header>",
        _claims(judged),
        _charts(study, rows),
        _cells(rows),
        _unfinished(unfinished, metric),
        _curves(folder, states, metric, rows),
        _differences(folder, states),
        _runs(folder, states, metric, when),
    ]
    return "\n".join(filter(None, parts))


def _claims(judged: Sequence[Judged]) -> str:
    if not judged:
        return ""
    body, notes = [], []
    for each in judged:
        summary = None if each.judgement is None else each.judgement.summary
        ends = "–"
        if summary is not None and summary.low is not None:
            ends = f"{percent(summary.low)} to {percent(summary.high)}"
        holds = None if each.prediction is None else each.prediction.holds
        body.append(
            (
                text(each.what),
                text(each.word),
                str(len(each.seeds)),
                percent(None if summary is None else summary.mean),
                ends,
                percent(None if summary is None else summary.sampling_error),
                {None: "–", True: "yes", False: "no"}[holds],
            )
        )
        notes += [f"<li>{text(each.what)}: {text(note)}</li>" for note in (each.missing, each.source) if note]
    head = ("claim", "verdict", "seeds", "mean", "95 % interval", "test set’s own ±", "published run likely")
    explained = (
        "The mean of a relation is that of the paired differences; runs of one seed share the order of the data, and"
        " the first weights where the networks have the same shapes."
    )
    return (
        f"<section><h2>Verdicts</h2>{table(head, body)}<p>{text(_tested(judged))} {explained}</p>"
        f"<ul>{''.join(notes)}</ul></section>"
    )


def _charts(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    figures = []
    for key, label in (("madds", "MAdds"), ("params", "parameters")):
        by_cell = {row["cell"]: row for row in rows if row["mean"] is not None and row[key]}
        ours = [Point(_point(row, study), row[key], row["mean"], row["low"], row["high"]) for row in by_cell.values()]
        published = [
            Point("", by_cell[cell.name][key], claim.published)
            for claim in study.claims
            if (cell := find_cell(study, claim.cell)).name in by_cell
        ]
        if ours:
            figures.append(scores_by_cost(ours, published, label))
    return f"<section><h2>Score and cost</h2><div class=charts>{''.join(figures)}</div></section>" if figures else ""


def _point(row: dict[str, Any], study: Study) -> str:
    return " ".join(str(row[name]) for name in study.axes)


def _cells(rows: Sequence[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        ends = "–" if row["low"] is None else f"{percent(row['low'])} to {percent(row['high'])}"
        body.append(
            (
                text(row["cell"]),
                str(row["seeds"]),
                percent(row["mean"]),
                percent(row["spread"]),
                ends,
                percent(row["sampling_error"]),
                short(row["params"]),
                short(row["madds"]),
                duration(row["seconds"]),
            )
        )
    head = ("cell", "seeds", "mean", "spread", "95 % interval", "test set’s own ±", "params", "MAdds", "training")
    return f"<section><h2>Cells</h2>{table(head, body)}</section>"


def _unfinished(rows: Sequence[dict[str, Any]], metric: str) -> str:
    if not rows:
        return ""
    body = [
        (text(row["run"]), row["state"], f"{row['share']:.0%}", duration(row["seconds"]), text(_so_far(row)))
        for row in rows
    ]
    head = ("run", "state", "share of its epochs", "training", f"last {text(metric)} so far, not counted")
    return (
        f"<section><h2>Not done yet</h2><p>No claim counts these runs before they are done.</p>"
        f"{table(head, body)}</section>"
    )


def _curves(folder: pathlib.Path, states: Sequence[State], metric: str, rows: Sequence[dict[str, Any]]) -> str:
    curves = curves_of(folder, states, metric)
    if not curves:
        return ""
    bottom = min(float(curve[:, 2].min()) for curve in curves.values())
    figures = [band(curves[row["cell"]], row["cell"], bottom, 1.0) for row in rows if row["cell"] in curves]
    return (
        f"<section><h2>Learning curves</h2><p>Mean over seeds, and between the lowest and the highest.</p>"
        f"<div class=charts>{''.join(figures)}</div></section>"
    )


def _differences(folder: pathlib.Path, states: Sequence[State]) -> str:
    if not any(state.name == "done" for state in states):
        return ""
    lines = differences_within(folder, states)
    found = "".join(f"<li>{text(line)}</li>" for line in lines)
    content = f"<ul>{found}</ul>" if lines else "<p>Nothing but the seed: the same code, machine and settings.</p>"
    return f"<section><h2>What differs between runs of one cell</h2>{content}</section>"


def _runs(folder: pathlib.Path, states: Sequence[State], metric: str, when: str) -> str:
    body = []
    for state in states:
        name = state.run.name
        link = f'<a href="runs/{text(name)}/report.html">{text(name)}</a>' if state.name == "done" else text(name)
        value = state.summary.get("best" if when == "best" else "eval", {}).get(metric)
        note = f"exit code {state.failure['exit_code']}: {state.failure['line']}" if state.failure else ""
        record = run_folder(folder, state.run) / PROVENANCE
        origin = f'<a href="runs/{text(name)}/{PROVENANCE}">record</a>' if record.is_file() else "–"
        cells = (percent(value), duration(state.seconds), text(_devices(state)), text(_commit(state)), origin)
        body.append((link, state.name, *cells, text(note)))
    head = ("run", "state", metric, "training", "devices", "commit", "provenance", "failure")
    return f"<section><h2>Runs</h2>{table(head, body)}</section>"


def _devices(state: State) -> str:
    """Writes the devices that finished a run; summaries of version 0.4 don't name them."""
    devices = state.summary.get("devices") or {}
    return f"{devices['count']} × {devices['kind']}" if {"count", "kind"} <= devices.keys() else "–"


def _commit(state: State) -> str:
    """Writes the commit that finished a run, in ten digits."""
    commit, dirty, _ = (state.summary.get("commit") or "–").partition("-dirty")
    return commit[:10] + dirty
