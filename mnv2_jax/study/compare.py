"""Any runs side by side: results, what differs in their settings, and their curves."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mnv2_jax.config import flatten
from mnv2_jax.errors import UserError
from mnv2_jax.flags import Parser, file_type, run_folder_type
from mnv2_jax.json_files import read_json, write_text
from mnv2_jax.report.charts import overlaid
from mnv2_jax.report.page import whole_page
from mnv2_jax.report.words import table, text
from mnv2_jax.runs.folder import CONFIG, SUMMARY, read_run
from mnv2_jax.runs.metrics_log import read_metrics
from mnv2_jax.runs.progress import duration

_RESULTS = ("steps", "seconds", "images_per_second", "params", "madds")


def main(argv: Sequence[str]) -> None:
    """Prints the comparison, and writes it as a page if a file is named."""
    parser = Parser("Compares runs: their results, what differs in their settings, and their curves.")
    parser.add_argument("runs", nargs="+", type=run_folder_type, metavar="RUN", help="run folders, two or more")
    parser.add_argument("--html", type=file_type, metavar="FILE.html", help="write a page with the curves")
    parser.add_json_flag()
    args, overrides = parser.parse(list(argv))
    if overrides or len(args.runs) < 2:
        raise UserError("compare needs two or more run folders, and no config keys")
    names = _names(args.runs)
    results = {name: result_of(run) for name, run in zip(names, args.runs, strict=True)}
    settings = differing_settings(dict(zip(names, args.runs, strict=True)))
    if args.html is not None:
        logs = {name: read_metrics(run) for name, run in zip(names, args.runs, strict=True)}
        write_text(args.html, _page(results, settings, logs))
    if args.json:
        return print(json.dumps({"results": results, "settings": settings}))
    _print(
        ("run", *results), [[key, *(_cell(key, row.get(key)) for row in results.values())] for key in _keys(results)]
    )
    print()
    _print(("setting", *results), [[key, *map(str, values.values())] for key, values in settings.items()])
    if not settings:
        print("all settings are the same")
    if args.html is not None:
        print(args.html)


def result_of(run: pathlib.Path) -> dict[str, Any]:
    """Returns the scalars of a run's last evaluation, its best score and its cost; of an unfinished run, those so far.

    Raises:
      UserError: if no run is there.
    """
    read_run(run)
    lines = read_metrics(run)
    if (run / SUMMARY).is_file():
        summary = read_json(run / SUMMARY)
        best = {f"best {key}": value for key, value in summary.get("best", {}).items()}
        return {**summary.get("eval", {}), **best, **{key: summary[key] for key in _RESULTS if key in summary}}
    evaluated = [line for line in lines if line.get("split") == "eval"]
    skipped = ("split", "score", "step")
    so_far = {key: value for key, value in evaluated[-1].items() if key not in skipped} if evaluated else {}
    return so_far | {"steps": lines[-1]["step"] if lines else 0}


def differing_settings(runs: Mapping[str, pathlib.Path]) -> dict[str, dict[str, Any]]:
    """Returns the values of the config keys that aren't the same in all runs, by key and run."""
    flat = {name: flatten(read_json(run / CONFIG)) for name, run in runs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    found = {key: {name: values.get(key, "–") for name, values in flat.items()} for key in keys}
    return {key: values for key, values in found.items() if len({repr(value) for value in values.values()}) > 1}


def _names(runs: Sequence[pathlib.Path]) -> list[str]:
    """Returns the names of the folders, with their parents' where two have one name."""
    short = [run.resolve().name for run in runs]
    return [
        name if short.count(name) == 1 else "/".join(run.resolve().parts[-2:])
        for name, run in zip(short, runs, strict=True)
    ]


def _keys(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in results.values() for key in row))


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key == "seconds":
        return duration(value)
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
        for row in (head, *rows):
            print(
                "  ".join(
                    f"{cell:>{width}}" if n else f"{cell:<{width}}"
                    for n, (cell, width) in enumerate(zip(row, widths, strict=True))
                )
            )


def _page(
    results: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Mapping[str, Any]],
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    rows = [[text(key), *(text(_cell(key, row.get(key))) for row in results.values())] for key in _keys(results)]
    changed = [[text(key), *(text(value) for value in values.values())] for key, values in settings.items()]
    keys = [line["score"] for lines in logs.values() for line in lines if "score" in line][:1] or ["top1"]
    charts = [
        overlaid(logs, "eval", keys[0], f"{keys[0]} of evaluations, %", 100),
        overlaid(logs, "train", "loss", "loss of training batches"),
        overlaid(logs, "train", "lr", "learning rate"),
    ]
    heads = tuple(map(text, results))
    differing = table(("key", *heads), changed) if changed else "<p>None.</p>"
    body = (
        f"<header><p class=eyebrow>comparison</p><h1>{text(' · '.join(results))}</h1></header>"
        f"<section><h2>Results</h2>{table(('', *heads), rows)}</section>"
        f"<section><h2>Settings that differ</h2>{differing}</section>"
        f"<section><h2>Curves</h2>{''.join(charts)}</section>"
    )
    return whole_page(" · ".join(results), body)
