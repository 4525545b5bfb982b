"""report.html: one run on one page, which holds everything it shows and asks the network for nothing.

Charts are drawn by matplotlib as SVG in placeholder colours, which become the page's CSS variables: so they
follow light and dark, and their text is text.
"""

from __future__ import annotations

import base64
import html
import io
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mnv2_jax import config as config_lib
from mnv2_jax.data.split import Split
from mnv2_jax.json_files import read_json, write_bytes, write_text, writing
from mnv2_jax.runs.folder import SKIPPED, read_skipped
from mnv2_jax.runs.metrics_log import read_metrics
from mnv2_jax.runs.progress import duration

NAME, PICTURES = "report.html", "mistakes"

_NAMED_CLASSES = 30
"""Up to so many the confusion matrix is a table with names; beyond that it is a picture."""
_WORST_CLASSES, _PAIRS, _POINTS = 20, 8, 300
_ABSENT_CLASSES, _SKIPPED = 5, 50
_TICKS = (1, 2, 2.5, 5, 10)

_INK, _MUTED, _GRID, _MAIN, _SECOND = (f"#00000{digit}" for digit in range(1, 6))
_COLOURS = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _MAIN: "--main", _SECOND: "--second"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mnv2_jax",  # the same run gives the same bytes
    "font.size": 9.0,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.labelcolor": _MUTED,
    "lines.linewidth": 1.6,
}


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
            f"<header><p class=eyebrow>{_text(workdir.resolve().name)}</p><h1>{_text(title)}</h1>",
            f"{_lead(read['summary'], read['dataset'])}</header>",
            _tiles(read["summary"]),
            _curves(metrics),
            _evaluation(read["evaluation"], read["dataset"]),
            _mistakes(read["evaluation"].get("mistakes"), read["dataset"].get("class_names") or [], workdir / PICTURES),
            _skipped(read["summary"], read_skipped(workdir)),
            _config(read["config"]),
            _provenance(read["provenance"]),
        )
    )
    path = workdir / NAME
    write_text(path, _PAGE.format(title=_text(title), css=_CSS, body=body))
    return path


def absent_classes(split: str, class_names: Sequence[str], counts: Iterable[int]) -> str:
    """Says which classes a split has no images of, at most 5 by name; "" where it has some of each.

    Args:
      split: its name.
      class_names: in the order of the labels.
      counts: the number of its images by label.
    """
    absent = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if not absent:
        return ""
    more = f" and {len(absent) - _ABSENT_CLASSES:,} more" if len(absent) > _ABSENT_CLASSES else ""
    named = ", ".join(absent[:_ABSENT_CLASSES]) + more
    return f"{split} has no images of {len(absent):,} of {len(class_names):,} classes: {named}"


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


# --- words and numbers -------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return html.escape(str(value))


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.2f}\N{NO-BREAK SPACE}%"


def _number(value: float | None, form: str = ",.0f") -> str:
    return "–" if value is None else format(value, form)


def _short(value: float | None) -> str:
    """As ``2.24 M``, with the exact number a hover away."""
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f'<span title="{value:,.0f}">{value / size:.3g} {unit}</span>'
    return f"{value:,.0f}"


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
        split = f" of the {_text(dataset['eval_split'])} split" if dataset.get("eval_split") else ""
        sentences.append(
            f"<strong>{_percent(top1)}</strong> top-1 on {_number(count)} images{split}"
            f" (95 % interval {100 * low:.1f} to {100 * high:.1f})."
        )
    best = summary.get("best", {})
    if best and best["step"] != summary.get("steps"):
        sentences.append(f"The best evaluation was at step {_number(best['step'])}: {_percent(best['top1'])}.")
    if dataset.get("num_train"):
        classes = len(dataset.get("class_names") or ())
        sentences.append(f"Trained on {_number(dataset['num_train'])} images of {_number(classes)} classes.")
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
        "top-1": _percent(scores.get("top1")),
        "top-5": _percent(scores.get("top5")),
        "loss": _number(scores.get("loss"), ".4f"),
        "calibration error": _percent(scores.get("ece")),
        "images evaluated": _number(scores.get("count")),
        "parameters": _short(summary.get("params")),
        "MAdds an image": _short(summary.get("madds")),
        "steps": _number(summary.get("steps")),
        "wall time": "–" if seconds is None else duration(seconds),
        "images/s in training": _number(summary.get("images_per_second")),
    }
    cells = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())
    return f"<dl class=tiles>{''.join(cells)}</dl>"


# --- charts ------------------------------------------------------------------------------------------------


def _svg(draw: Callable[[Figure], None], label: str, size: tuple[float, float] = (5.0, 2.6)) -> str:
    """A figure (size in inches) as inline SVG that fills its container."""
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # What a drawing of its own would need: its namespaces, its metadata and a style that would hold for the page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    svg = f'<svg {view_box[0]} role="img" aria-label="{_text(label)}">' + svg[svg.index(">") + 1 :]
    for placeholder, variable in _COLOURS.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg


def _figure(svg: str, caption: str) -> str:
    return f"<figure class=chart><figcaption>{caption}</figcaption>{svg}</figure>"


def _series(metrics: Sequence[Mapping[str, Any]], split: str, key: str) -> np.ndarray:
    """[n, 2] of step and value; lines whose value wasn't finite are left out."""
    points = [(line["step"], line[key]) for line in metrics if line.get("split") == split and line.get(key) is not None]
    return np.array(points, float).reshape(-1, 2)


def _plot(axes: Axes, points: np.ndarray, colour: str, label: str, dots: bool = False) -> None:
    """A line; one of many points becomes its mean over stretches, within the band of their extremes."""
    if len(points) > 2 * _POINTS:
        stretches = np.array_split(points, _POINTS)
        low, high = (np.array([extreme(part[:, 1]) for part in stretches]) for extreme in (np.min, np.max))
        points = np.array([part.mean(axis=0) for part in stretches])
        axes.fill_between(points[:, 0], low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(*points.T, color=colour, label=label, marker="o" if dots or len(points) == 1 else None, markersize=3.5)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    panels = (
        # caption, key of metrics.jsonl, splits, unit of one
        ("Loss", "loss", ("train", "eval"), "{:g}"),
        ("Top-1 accuracy", "top1", ("train", "eval"), "{:.4g} %"),
        ("Learning rate", "lr", ("train",), "{:g}"),
        ("Images per second", "images_per_second", ("train",), "{:,.0f}"),
    )
    figures = []
    for caption, key, splits, form in panels:
        series = {split: points for split in splits if len(points := _series(metrics, split, key))}
        if not series:
            continue
        scale = 100 if key == "top1" else 1

        def draw(figure: Figure, series: Any = series, key: str = key, form: str = form, scale: int = scale) -> None:
            axes = figure.add_subplot()
            for split, points in series.items():
                name = {"train": "training batches", "eval": "evaluation"}[split]
                colour = _SECOND if split == "eval" else _MAIN
                _plot(axes, points * (1, scale), colour, name, dots=split == "eval")
            if len(series) > 1:
                axes.legend(loc="best")
            if key in ("lr", "images_per_second"):
                axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=_TICKS))
            axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=_TICKS))
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: form.format(value)))

        figures.append(_figure(_svg(draw, f"{caption} over steps"), caption))
    return f"<section><h2>Learning curves</h2><div class=charts>{''.join(figures)}</div></section>" if figures else ""


def _reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """How often the network was right, by how sure it was, over how many images there were of each."""
    count = np.array([row["count"] for row in bins], float)
    filled = count > 0
    accuracy = np.array([row["accuracy"] or 0 for row in bins], float)
    confidence = np.array([row["confidence"] or 0 for row in bins], float)
    width = 1 / len(bins)
    left = np.arange(len(bins)) * width

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        above.bar(left[filled], accuracy[filled], width * 0.92, align="edge", color=_MAIN, alpha=0.55)
        above.plot((0, 1), (0, 1), color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
        above.plot(confidence[filled], accuracy[filled], "o", color=_SECOND, markersize=3.5, label="mean confidence")
        above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        above.legend(loc="upper left")
        below.bar(left, count, width * 0.92, align="edge", color=_MUTED, alpha=0.55)
        below.set(xlabel="confidence", ylabel="images")
        below.yaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
        below.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))

    return _figure(_svg(draw, "Accuracy by confidence", (5.0, 3.6)), "Reliability: is it right as often as it is sure?")


# --- evaluation --------------------------------------------------------------------------------------------


def _evaluation(evaluation: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    if not evaluation:
        return ""
    names = list(dataset.get("class_names") or ()) or [str(row["label"]) for row in evaluation["per_class"]]
    counts = [row["count"] for row in evaluation["per_class"]]
    absent = absent_classes(dataset.get("eval_split", "the split"), names, counts)
    note = f"<p class=note>{_text(absent)}.</p>" if absent else ""
    confusion = np.array(evaluation["confusion"], np.int64)
    few = len(names) <= _NAMED_CLASSES
    wide = _confusion_table(confusion, names) if few else _confusion_picture(confusion)
    return (
        f"<section><h2>Evaluation at step {_number(evaluation.get('step'))}</h2>{note}"
        f"<div class=charts>{_reliability(evaluation['calibration'])}{_pairs(confusion, names)}</div>"
        f"<h3>Confusion matrix</h3><p class=note>Rows are the true classes, columns the predicted ones; shades are"
        f" shares of the row.</p>{wide}"
        f"<h3>Accuracy by class</h3>{_classes(evaluation['per_class'], names)}</section>"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], css: str = "") -> str:
    """A table of ready cells; the first column is text, the others are numbers."""
    titles = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class=scroll><table class="{css}"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _shades(confusion: np.ndarray) -> np.ndarray:
    """[k, k] in [0, 1]: square roots of row shares, so that one mistake in a hundred is seen."""
    return np.sqrt(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1))


def _confusion_table(confusion: np.ndarray, names: Sequence[str]) -> str:
    shades = _shades(confusion)
    head = "".join(f"<th scope=col><span>{_text(name)}</span></th>" for name in names)
    rows = []
    for true, name in enumerate(names):
        cells = []
        for predicted, count in enumerate(confusion[true]):
            colour = "--main" if true == predicted else "--second"
            style = f'style="--c:var({colour});--s:{65 * shades[true, predicted]:.0f}%"' if count else ""
            hint = f"{name} as {names[predicted]}: {count}"
            cells.append(f'<td {style} title="{_text(hint)}">{count or ""}</td>')
        rows.append(f"<tr><th scope=row>{_text(name)}</th>{''.join(cells)}</tr>")
    return (
        f"<div class=scroll><table class=confusion><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _confusion_picture(confusion: np.ndarray) -> str:
    """One pixel a cell: ink of one colour and varying opacity, so that it suits any background."""
    shades = _shades(confusion)
    pixels = np.empty((*shades.shape, 4), np.uint8)
    pixels[...] = (202, 107, 47, 0)
    pixels[np.eye(len(shades), dtype=bool)] = (47, 124, 160, 0)
    pixels[..., 3] = np.round(255 * shades)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class=matrix alt="Confusion matrix" src="data:image/png;base64,{data}">'


def _pairs(confusion: np.ndarray, names: Sequence[str]) -> str:
    """The most frequent mistakes."""
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    totals = np.maximum(confusion.sum(axis=1), 1)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:_PAIRS]
    places = [divmod(int(place), len(confusion)) for place in order if mistakes.flat[place]]
    rows = (
        (
            f"{_text(names[true])} <span class=arrow>→</span> {_text(names[predicted])}",
            _number(mistakes[true, predicted]),
            _percent(mistakes[true, predicted] / totals[true]),
        )
        for true, predicted in places
    )
    table = _table(("true → predicted", "images", "of the class"), rows) if places else "<p class=note>None.</p>"
    return f"<figure><figcaption>Most frequent mistakes</figcaption>{table}</figure>"


def _mistakes(mistakes: Sequence[Mapping[str, Any]] | None, names: Sequence[str], folder: pathlib.Path) -> str:
    """The pictures that are there, each with what it is and what it was taken for."""
    cards = [
        f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
        f"<figcaption>{_text(names[mistake['label']])} <span class=arrow>→</span> {_text(names[mistake['prediction']])}"
        f"<span class=note> {_percent(mistake['confidence'])}, image {mistake['index']}</span></figcaption></figure>"
        for mistake in (mistakes or () if names else ())
        if (picture := folder / f"{mistake['index']}.png").exists()
    ]
    if not cards:
        return ""
    return (
        "<section><h2>Worst mistakes</h2><p class=note>The wrongly classified images of highest loss: true class →"
        f" prediction, with its confidence.</p><div class=pictures>{''.join(cards)}</div></section>"
    )


def _classes(per_class: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    rows = [
        (
            _text(name),
            _number(row["count"]),
            f'<span class=meter style="--s:{100 * (row["accuracy"] or 0):.1f}%"></span>',
            _percent(row["accuracy"] if row["count"] else None),
        )
        for name, row in zip(names, per_class, strict=True)
    ]
    head = ("class", "images", "", "accuracy")
    if len(rows) <= _NAMED_CLASSES:
        return _table(head, rows, "classes")
    seen = [i for i, row in enumerate(per_class) if row["count"]]
    worst = sorted(seen, key=lambda i: per_class[i]["accuracy"])[:_WORST_CLASSES]
    return (
        f"<p class=note>The {len(worst)} classes that did worst.</p>{_table(head, (rows[i] for i in worst), 'classes')}"
        f"<details><summary>All {len(rows)} classes</summary>{_table(head, rows, 'classes')}</details>"
    )


def _skipped(summary: Mapping[str, Any], lines: Sequence[str]) -> str:
    """How many images can't be decoded, and which."""
    times, evaluated = summary.get("skipped"), summary.get("eval_skipped")
    if not times and not evaluated and not lines:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in lines[:_SKIPPED])
    more = f"<p class=note>and {len(lines) - _SKIPPED:,} more in {SKIPPED}</p>" if len(lines) > _SKIPPED else ""
    return (
        f"<section><h2>Skipped images</h2><p class=note>Images that can't be decoded: {_number(len(lines))};"
        f" skipped over all epochs: {_number(times)} times; left out of the evaluation:"
        f" {_number(evaluated)}.</p><ul class=note>{items}</ul>{more}</section>"
    )


# --- config and provenance ---------------------------------------------------------------------------------


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    defaults = config_lib.flatten(config_lib.to_dict(config_lib.Config()))
    flat = config_lib.flatten(config)
    rows = (
        (_text(key), f"<b>{_text(value)}</b>" if defaults.get(key, ...) != value else _text(value))
        for key, value in flat.items()
    )
    note = "<p class=note>Bold: not the default.</p>"
    table = _table(("key", "value"), rows, "facts")
    return f"<section><h2>Config</h2><details><summary>{len(flat)} values</summary>{note}{table}</details></section>"


def _provenance(provenance: Mapping[str, Any]) -> str:
    parts = []
    for session in provenance.get("sessions", []):
        git = session.get("git")
        facts = {
            "command": f"<code>{_text(session.get('command', '–'))}</code>",
            "commit": _text(git["commit"] + (" with local changes" if git["dirty"] else "")) if git else "–",
            "devices": _text(", ".join(f"{key} {value}" for key, value in session.get("devices", {}).items())),
            "versions": _text(", ".join(f"{key} {value}" for key, value in session.get("versions", {}).items())),
            "settings": _text(", ".join(f"{k}={v}" for k, v in session.get("settings", {}).items() if v is not None)),
        }
        parts.append(
            f"<details><summary>Session of {_text(session.get('started', '–'))}</summary>"
            f"{_table(('', ''), facts.items(), 'facts')}</details>"
        )
    return f"<section><h2>Provenance</h2>{''.join(parts)}</section>" if parts else ""


# --- page --------------------------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #ffffff; --ink: #23272e; --muted: #69707b;
  --grid: #e3e0da; --main: #2b7193; --second: #c8642b; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --card: #1c1f24; --ink: #e4e6e9; --muted: #99a1ac;
  --grid: #31363e; --main: #69b3d6; --second: #e8985f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 62rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem); }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.2rem); line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 3.2rem 0 1rem; }
h3 { font-size: 1rem; font-weight: 650; margin: 2.2rem 0 .5rem; }
.eyebrow { margin: 0 0 .3rem; color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
.lead { margin: .8rem 0 0; max-width: 44rem; color: var(--muted); }
.lead strong { color: var(--ink); }
.note { color: var(--muted); font-size: .88rem; margin: .3rem 0 .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin: 2rem 0 0;
  background: var(--grid); border: 1px solid var(--grid); border-radius: 12px; overflow: hidden; }
.tiles div { background: var(--card); padding: .9rem 1.1rem; }
.tiles dt { color: var(--muted); font-size: .8rem; }
.tiles dd { margin: .1rem 0 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums;
  letter-spacing: -.01em; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem;
  align-items: start; }
figure { margin: 0; padding: 1rem 1.1rem; background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  min-width: 0; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .6rem; }
.chart svg { display: block; width: 100%; height: auto; }
.chart svg * { stroke-linejoin: round; }
.chart text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .32rem .7rem .32rem 0; text-align: right; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 500; }
td:not(:first-child) { white-space: nowrap; }
.facts td:not(:first-child) { white-space: normal; }
td:first-child, th:first-child, .facts :is(td, th) { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
.facts td { vertical-align: top; overflow-wrap: anywhere; }
.facts td:first-child { color: var(--muted); white-space: nowrap; width: 1%; padding-right: 1.5rem; }
.arrow { color: var(--muted); }
.classes td:nth-child(3) { width: 45%; min-width: 6rem; }
.meter { display: block; height: .5rem; border-radius: .25rem;
  background: linear-gradient(var(--main), var(--main)) 0 / var(--s) 100% no-repeat var(--grid); }
.confusion { width: auto; font-size: .8rem; border-collapse: separate; border-spacing: 2px; }
.confusion :is(th, td) { border: 0; padding: 0; }
.confusion td { width: 2.3rem; min-width: 2.3rem; height: 2.3rem; text-align: center; border-radius: 4px;
  background: color-mix(in srgb, var(--c, var(--grid)) var(--s, 35%), var(--card)); }
.confusion th[scope=row] { padding: 0 .6rem; text-align: right; white-space: nowrap; position: sticky; left: 0;
  background: var(--paper); max-width: min(16rem, 40vw); overflow: hidden; text-overflow: ellipsis; }
.confusion th[scope=col] { vertical-align: bottom; padding-bottom: .4rem; }
.confusion th[scope=col] span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.matrix { display: block; width: 100%; max-width: 44rem; image-rendering: pixelated; background: var(--card);
  border: 1px solid var(--grid); border-radius: 4px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
.pictures figure { padding: .5rem; }
.pictures img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
.pictures figcaption { font-size: .8rem; font-weight: 500; margin: .4rem 0 0; overflow-wrap: anywhere; }
.pictures .note { display: block; font-size: inherit; margin: 0; }
details { border-top: 1px solid var(--grid); padding: .6rem 0; }
summary { cursor: pointer; color: var(--muted); }
ul { overflow-wrap: anywhere; padding-left: 1.2rem; }
code { font: .84rem ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""

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
