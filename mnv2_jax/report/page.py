"""report.html: one run on one page, which holds everything it shows and asks the network for nothing."""

from __future__ import annotations

import base64
import io
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from mnv2_jax import config as config_lib
from mnv2_jax.data.split import Split
from mnv2_jax.json_files import read_json, write_bytes, write_text, writing
from mnv2_jax.report.charts import Panel, curves
from mnv2_jax.report.words import number, short, table, text
from mnv2_jax.runs.folder import SKIPPED, read_skipped
from mnv2_jax.runs.metrics_log import read_metrics
from mnv2_jax.runs.progress import duration

NAME, PICTURES = "report.html", "examples"
_SHOWN = 50

Facts: TypeAlias = Mapping[str, Any]
"""What a JSON file of a run folder holds."""


def _no_sentences(summary: Facts, dataset: Facts) -> Sequence[str]:
    del summary, dataset
    return ()


def _no_sections(evaluation: Facts, dataset: Facts, pictures: Mapping[int, str]) -> str:
    del evaluation, dataset, pictures
    return ""


class Page(NamedTuple):
    """What a task has on the page besides what all have."""

    lead: Callable[[Facts, Facts], Sequence[str]] = _no_sentences
    """From summary.json and dataset.json to sentences, HTML: what was reached."""
    tiles: Mapping[str, tuple[str, Callable[[Any], str]]] = {}
    """By the name of a scalar: what it is called, and how it is written. Empty: all, as they are."""
    panels: Sequence[Panel] = ()
    """Curves of further values of the log."""
    sections: Callable[[Facts, Facts, Mapping[int, str]], str] = _no_sections
    """From evaluation.json, dataset.json and the pictures of its examples (HTML, by index) to HTML."""


PLAIN = Page()


def write_report(workdir: pathlib.Path, page: Page) -> pathlib.Path:
    """Writes ``report.html`` from what the run folder holds; a file that isn't there yet leaves its section out.

    Args:
      workdir: a run folder with any of summary, evaluation, config, dataset, provenance (.json), metrics.jsonl.
      page: the task's.

    Returns:
      The page's path.

    Raises:
      UserError: if one of the JSON files can't be read, or the page not be written.
    """
    read = {
        name: read_json(path) if (path := workdir / f"{name}.json").exists() else {}
        for name in ("summary", "evaluation", "config", "dataset", "provenance")
    }
    summary, evaluation, dataset = read["summary"], read["evaluation"], read["dataset"]
    title = _title(read["config"], dataset) or workdir.resolve().name
    sections = page.sections(evaluation, dataset, _pictures(workdir, evaluation)) if evaluation else ""
    body = "\n".join(
        (
            f"<header><p class=eyebrow>{text(workdir.resolve().name)}</p><h1>{text(title)}</h1>",
            f"<p class=lead>{' '.join(_lead(page, summary, dataset))}</p></header>",
            _tiles(page, summary),
            curves(read_metrics(workdir), page.panels),
            sections,
            _skipped(summary, read_skipped(workdir)),
            _config(read["config"]),
            _provenance(read["provenance"]),
        )
    )
    path = workdir / NAME
    write_text(path, whole_page(title, body))
    return path


def whole_page(title: str, body: str) -> str:
    """A page of HTML, with the style of all, around a body of HTML."""
    return _PAGE.format(title=text(title), css=_CSS, body=body)


def save_pictures(workdir: pathlib.Path, split: Split, indices: Iterable[int]) -> None:
    """Writes ``examples/INDEX.png``, at most 160 pixels wide and high, for these images of a split, and no others."""
    folder = workdir / PICTURES
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir()
    for index in indices:
        image = Image.fromarray(np.asarray(split.read(index)))
        image.thumbnail((160, 160))
        content = io.BytesIO()
        image.save(content, "PNG")
        write_bytes(folder / f"{index}.png", content.getvalue())


def _title(config: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    if not config:
        return ""
    model = config["model"]
    return f"{model['name']} ×{model['width']:g} on {dataset.get('name', config['data']['name'])}"


def _pictures(workdir: pathlib.Path, evaluation: Facts) -> dict[int, str]:
    """The examples' pictures that are there, as HTML."""
    paths = {
        example["index"]: workdir / PICTURES / f"{example['index']}.png" for example in evaluation.get("examples", ())
    }
    return {index: picture(path.read_bytes(), "png") for index, path in paths.items() if path.exists()}


def picture(content: bytes, form: str) -> str:
    """A file of some format, as png, that lies in the page."""
    return f'<img alt="" src="data:image/{form};base64,{base64.b64encode(content).decode()}">'


def _lead(page: Page, summary: Facts, dataset: Facts) -> list[str]:
    sentences = [*page.lead(summary, dataset)]
    if dataset.get("num_train"):
        classes = len(dataset.get("class_names") or ())
        sentences.append(f"Trained on {number(dataset['num_train'])} images of {number(classes)} classes.")
    return sentences


def _tiles(page: Page, summary: Facts) -> str:
    if not summary:
        return ""
    scores, seconds = summary.get("eval", {}), summary.get("seconds")
    named = page.tiles or {name: (name, text) for name in scores}
    tiles = {label: written(scores.get(name)) for name, (label, written) in named.items()} | {
        "parameters": short(summary.get("params")),
        "MAdds an image": short(summary.get("madds")),
        "steps": number(summary.get("steps")),
        "wall time": "–" if seconds is None else duration(seconds),
        "images/s in training": number(summary.get("images_per_second")),
    }
    cells = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())
    return f"<dl class=tiles>{''.join(cells)}</dl>"


def _skipped(summary: Facts, lines: Sequence[str]) -> str:
    """How many images can't be decoded, and which."""
    times, evaluated = summary.get("skipped"), summary.get("eval_skipped")
    if not times and not evaluated and not lines:
        return ""
    items = "".join(f"<li>{text(line)}</li>" for line in lines[:_SHOWN])
    more = f"<p class=note>and {len(lines) - _SHOWN:,} more in {SKIPPED}</p>" if len(lines) > _SHOWN else ""
    return (
        f"<section><h2>Skipped images</h2><p class=note>Images that can't be decoded: {number(len(lines))};"
        f" skipped over all epochs: {number(times)} times; left out of the evaluation:"
        f" {number(evaluated)}.</p><ul class=note>{items}</ul>{more}</section>"
    )


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    defaults = config_lib.flatten(config_lib.to_dict(config_lib.Config()))
    flat = config_lib.flatten(config)
    rows = (
        (text(key), f"<b>{text(value)}</b>" if defaults.get(key, ...) != value else text(value))
        for key, value in flat.items()
    )
    note = "<p class=note>Bold: not the default.</p>"
    values = table(("key", "value"), rows, "facts")
    return f"<section><h2>Config</h2><details><summary>{len(flat)} values</summary>{note}{values}</details></section>"


def _provenance(provenance: Mapping[str, Any]) -> str:
    parts = []
    for session in provenance.get("sessions", []):
        git = session.get("git")
        facts = {
            "command": f"<code>{text(session.get('command', '–'))}</code>",
            "commit": text(git["commit"] + (" with local changes" if git["dirty"] else "")) if git else "–",
            "devices": text(", ".join(f"{key} {value}" for key, value in session.get("devices", {}).items())),
            "versions": text(", ".join(f"{key} {value}" for key, value in session.get("versions", {}).items())),
            "settings": text(", ".join(f"{k}={v}" for k, v in session.get("settings", {}).items() if v is not None)),
        }
        parts.append(
            f"<details><summary>Session of {text(session.get('started', '–'))}</summary>"
            f"{table(('', ''), facts.items(), 'facts')}</details>"
        )
    return f"<section><h2>Provenance</h2>{''.join(parts)}</section>" if parts else ""


_CSS = (pathlib.Path(__file__).parent / "style.css").read_text()

_PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
