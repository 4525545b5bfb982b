"""report.html: one run on one page, which holds everything it shows and asks the network for nothing."""

from __future__ import annotations

import io
import math
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from mnv2_jax import config as config_lib
from mnv2_jax.data.split import Split
from mnv2_jax.json_files import read_json, write_bytes, write_text, writing
from mnv2_jax.report.charts import curves
from mnv2_jax.report.sections import evaluation, mistakes, skipped
from mnv2_jax.report.words import number, percent, short, table, text
from mnv2_jax.runs.folder import read_skipped
from mnv2_jax.runs.metrics_log import read_metrics
from mnv2_jax.runs.progress import duration

NAME, PICTURES = "report.html", "mistakes"


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes ``report.html`` from what the run folder holds; a file that isn't there yet leaves its section out.

    Args:
      workdir: a run folder with any of summary, evaluation, config, dataset, provenance (.json), metrics.jsonl.

    Returns:
      The page's path.

    Raises:
      UserError: if one of the JSON files can't be read, or the page not be written.
    """
    read = {
        name: read_json(path) if (path := workdir / f"{name}.json").exists() else {}
        for name in ("summary", "evaluation", "config", "dataset", "provenance")
    }
    metrics = read_metrics(workdir)
    title = _title(read["config"], read["dataset"]) or workdir.resolve().name
    body = "\n".join(
        (
            f"<header><p class=eyebrow>{text(workdir.resolve().name)}</p><h1>{text(title)}</h1>",
            f"{_lead(read['summary'], read['dataset'])}</header>",
            _tiles(read["summary"]),
            curves(metrics),
            evaluation(read["evaluation"], read["dataset"]),
            mistakes(read["evaluation"].get("mistakes"), read["dataset"].get("class_names") or [], workdir / PICTURES),
            skipped(read["summary"], read_skipped(workdir)),
            _config(read["config"]),
            _provenance(read["provenance"]),
        )
    )
    path = workdir / NAME
    write_text(path, _PAGE.format(title=text(title), css=_CSS, body=body))
    return path


def save_pictures(workdir: pathlib.Path, split: Split, indices: Iterable[int]) -> None:
    """Writes ``mistakes/INDEX.png``, at most 160 pixels wide and high, for these images of a split, and no others."""
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


def _lead(summary: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    """One sentence: what was reached on how many images, and how sure so many images can make us."""
    scores = summary.get("eval", {})
    sentences = []
    top1, count = scores.get("top1"), scores.get("count")
    if top1 is not None and count:
        low, high = _wilson(top1, int(count))
        split = f" of the {text(dataset['eval_split'])} split" if dataset.get("eval_split") else ""
        sentences.append(
            f"<strong>{percent(top1)}</strong> top-1 on {number(count)} images{split}"
            f" (95 % interval {100 * low:.1f} to {100 * high:.1f})."
        )
    best = summary.get("best", {})
    if best and best["step"] != summary.get("steps"):
        sentences.append(f"The best evaluation was at step {number(best['step'])}: {percent(best['top1'])}.")
    if dataset.get("num_train"):
        classes = len(dataset.get("class_names") or ())
        sentences.append(f"Trained on {number(dataset['num_train'])} images of {number(classes)} classes.")
    return f"<p class=lead>{' '.join(sentences)}</p>"


def _wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): unlike the normal one it stays within 0 to 1."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _tiles(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    scores = summary.get("eval", {})
    seconds = summary.get("seconds")
    tiles = {
        "top-1": percent(scores.get("top1")),
        "top-5": percent(scores.get("top5")),
        "loss": number(scores.get("loss"), ".4f"),
        "calibration error": percent(scores.get("ece")),
        "images evaluated": number(scores.get("count")),
        "parameters": short(summary.get("params")),
        "MAdds an image": short(summary.get("madds")),
        "steps": number(summary.get("steps")),
        "wall time": "–" if seconds is None else duration(seconds),
        "images/s in training": number(summary.get("images_per_second")),
    }
    cells = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())
    return f"<dl class=tiles>{''.join(cells)}</dl>"


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
