"""report.html: one run on one page. The page contains everything that it shows and loads nothing from the network."""

from __future__ import annotations

import base64
import io
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from mnv2_jax.config import Config, flatten, to_dict
from mnv2_jax.data.split import Example, Split
from mnv2_jax.json_files import jsonable, read_json, write_bytes, write_text, writing
from mnv2_jax.report.charts import Panel, curves
from mnv2_jax.report.words import number, short, table, text
from mnv2_jax.runs.folder import CONFIG, DATASET, EVALUATION, PROVENANCE, SKIPPED, SUMMARY, read_skipped
from mnv2_jax.runs.metrics_log import read_metrics, speeds
from mnv2_jax.runs.progress import duration

NAME = "report.html"
_SHOWN = 50

Facts: TypeAlias = Mapping[str, Any]
"""Content of a JSON file in a run folder."""


Written: TypeAlias = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Label and HTML format of each scalar, by the scalar's name."""


def _no_sentences(summary: Facts, dataset: Facts) -> Sequence[str]:
    del summary, dataset
    return ()


def _no_formats(dataset: Facts) -> Written:
    del dataset
    return {}


def fitting(pixels: np.ndarray, most_px: int = 160) -> np.ndarray:
    """Shrinks an image, uint8 [h, w, 3], so that no side is longer than ``most_px``."""
    image = Image.fromarray(pixels)
    image.thumbnail((most_px, most_px))
    return np.asarray(image)


def _image_alone(example: Example, answer: np.ndarray | None) -> np.ndarray:
    del answer
    return fitting(np.asarray(example["image"]))


def _no_sections(evaluation: Facts, dataset: Facts, pictures: Mapping[int, str]) -> str:
    del evaluation, dataset, pictures
    return ""


class Page(NamedTuple):
    """Parts of the page that a task adds."""

    lead: Callable[[Facts, Facts], Sequence[str]] = _no_sentences
    """Makes sentences, as HTML, on the result of the run, from summary.json and dataset.json."""
    tiles: Callable[[Facts], Written] = _no_formats
    """Selects the scalars to show, with their formats, from dataset.json. Empty: all scalars, unformatted."""
    panels: Sequence[Panel] = ()
    """Curves of further values in the log."""
    sections: Callable[[Facts, Facts, Mapping[int, str]], str] = _no_sections
    """Makes HTML for an evaluation, below a heading of the second level, from three arguments: the evaluation's file;
    dataset.json with the evaluation's `eval_split`; and the pictures of its examples (HTML, by index)."""
    draw: Callable[[Example, np.ndarray | None], np.ndarray] = _image_alone
    """Draws the picture of an example, uint8 [h, w, 3], from it and, if it has one, its map in ``Evaluation.maps``."""


PLAIN = Page()


def write_report(workdir: pathlib.Path, page: Page) -> pathlib.Path:
    """Writes ``report.html`` from the files in a run folder. If a file doesn't exist yet, its section is left out.

    Args:
      workdir: a run folder with any of summary, evaluation, evaluation-*, config, dataset, provenance (.json),
        metrics.jsonl. Without a summary the run isn't finished, and the log tells how far it is.
      page: the parts of the task.

    Returns:
      The path of the page.

    Raises:
      UserError: if one of the JSON files can't be read, or the page can't be written.
    """
    summary, config, dataset, provenance = (_read(workdir / name) for name in (SUMMARY, CONFIG, DATASET, PROVENANCE))
    metrics, evaluations = read_metrics(workdir), _evaluations(workdir, config, dataset)
    title = _title(config, dataset) or workdir.resolve().name
    so_far = summary or _so_far(metrics)
    lead = [
        *_unfinished(summary, metrics, dataset),
        *page.lead(so_far, dataset),
        *_default_checkpoint(summary),
        *_trained_on(dataset),
    ]
    body = "\n".join(
        (
            f"<header><p class=eyebrow>{text(workdir.resolve().name)}</p><h1>{text(title)}</h1>",
            f"<p class=lead>{' '.join(lead)}</p></header>",
            _tiles(page, so_far, dataset),
            _overview(page, evaluations, dataset),
            curves(metrics, page.panels),
            *(_evaluation(page, evaluation, dataset) for evaluation in evaluations),
            _skipped(summary, read_skipped(workdir)),
            _config(config),
            _provenance(provenance, evaluations),
        )
    )
    path = workdir / NAME
    write_text(path, whole_page(title, body))
    return path


def whole_page(title: str, body: str) -> str:
    """A whole HTML page with the common style, around a body of HTML."""
    return _PAGE.format(title=text(title), css=_CSS, body=body)


def pictures_of(evaluation: pathlib.Path) -> pathlib.Path:
    """Folder with the pictures of an evaluation's examples: examples-x beside evaluation-x.json."""
    return evaluation.with_name(evaluation.stem.replace("evaluation", "examples", 1))


def save_pictures(
    folder: pathlib.Path,
    split: Split,
    indices: Iterable[int],
    page: Page = PLAIN,
    maps: Mapping[int, np.ndarray] | None = None,
) -> None:
    """Replaces the folder by pictures ``INDEX.png`` of some images of a split, drawn by the page."""
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir()
    for index in indices:
        content = io.BytesIO()
        Image.fromarray(page.draw(split.example(index), (maps or {}).get(index))).save(content, "PNG")
        write_bytes(folder / f"{index}.png", content.getvalue())


def _title(config: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    if not config:
        return ""
    model = config["model"]
    return f"{model['name']} ×{model['width']:g} on {dataset.get('name', config['data']['name'])}"


class _Evaluation(NamedTuple):
    """An evaluation in a run folder."""

    path: pathlib.Path
    facts: Facts
    name: str
    """Name of the split, and of the data if they aren't the run's."""

    @property
    def anchor(self) -> str:
        """Anchor of the evaluation's section on the page."""
        return text(self.path.stem)


_WHICH = ("split", "step", "resolution", "data")
"""Keys that identify what was evaluated."""


def _read(path: pathlib.Path) -> Facts:
    return read_json(path) if path.exists() else {}


def _evaluations(workdir: pathlib.Path, config: Facts, dataset: Facts) -> list[_Evaluation]:
    """Reads the evaluation at the end of the training and the later ones, without duplicates."""
    evaluations = []
    for path in (workdir / EVALUATION, *sorted(workdir.glob(f"{pathlib.Path(EVALUATION).stem}-*.json"))):
        if not (facts := _read(path)):
            continue
        split = facts.get("split") or dataset.get("eval_split") or "the evaluation split"
        data = {} if path.name == EVALUATION else facts.get("data", {})  # the run's own data may have moved since
        is_own = all(config.get("data", {}).get(key) == value for key, value in data.items())
        origin = "" if is_own else f" of {data['name']}" + (f" in {data['path']}" if data["path"] else "")
        evaluations.append(_Evaluation(path, {**facts, "split": split}, f"{split}{origin}"))
    return [
        one
        for number, one in enumerate(evaluations)
        if not any(_is_same(one.facts, earlier.facts) for earlier in evaluations[:number])
    ]


def _is_same(one: Facts, other: Facts) -> bool:
    """Whether two evaluations used the same images and weights, and their numbers are the same up to rounding."""
    if any(one.get(key, other.get(key)) != other.get(key, one.get(key)) for key in _WHICH):
        return False
    numbers = [key for key, value in one.items() if isinstance(value, float) and isinstance(other.get(key), float)]
    return all(math.isclose(one[key], other[key], rel_tol=1e-3, abs_tol=1e-6) for key in numbers)


def _so_far(metrics: Sequence[Facts]) -> Facts:
    """Summary of an unfinished run, from its log."""
    evaluations = [line for line in metrics if line["split"] == "eval"]
    if not metrics:
        return {}
    return {
        "eval": evaluations[-1] if evaluations else {},
        "steps": max(line["step"] for line in metrics),
        "seconds": max(line.get("seconds") or 0 for line in metrics),
        **speeds(metrics),
    }


def _unfinished(summary: Facts, metrics: Sequence[Facts], dataset: Facts) -> Iterator[str]:
    """Sentence on how far a run without a summary has come."""
    if summary:
        return
    total = f" of {number(dataset['steps'])}" if "steps" in dataset else ""
    step = number(_so_far(metrics)["steps"]) if metrics else "0"
    evaluated = [line["step"] for line in metrics if line["split"] == "eval"]
    last = f", the last evaluation was at step {number(evaluated[-1])}" if evaluated else ""
    yield f"<strong>Not finished</strong>: the log ends at step {step}{total}{last}."


def _pictures(evaluation: _Evaluation) -> dict[int, str]:
    """Existing pictures of an evaluation's examples, as HTML by index."""
    folder = pictures_of(evaluation.path)
    paths = {example["index"]: folder / f"{example['index']}.png" for example in evaluation.facts.get("examples", ())}
    return {index: picture(path.read_bytes(), "png") for index, path in paths.items() if path.exists()}


def picture(content: bytes, form: str) -> str:
    """An image of a format such as png, embedded in the page."""
    return f'<img alt="" src="data:image/{form};base64,{base64.b64encode(content).decode()}">'


def _default_checkpoint(summary: Facts) -> Iterator[str]:
    """Sentence on the step of the numbers, and on the checkpoint that other commands use by default."""
    if checkpoint := summary.get("checkpoint"):
        yield (
            f"Measured at the last step, {number(summary['steps'])}. By default, evaluation, predict and convert use"
            f" the {text(checkpoint['taken'])} checkpoint, step {number(checkpoint['step'])}."
        )


def _trained_on(dataset: Facts) -> Iterator[str]:
    if dataset.get("num_train"):
        classes = len(dataset.get("class_names") or ())
        yield f"Trained on {number(dataset['num_train'])} images of {number(classes)} classes."


_LOGGED = ("step", "split", "seconds", "score")
"""Keys of a log line that aren't scalars of an evaluation."""


def _tiles(page: Page, summary: Facts, dataset: Facts) -> str:
    """Tiles with the facts of a run; an unknown fact has no tile."""
    scores = {key: value for key, value in summary.get("eval", {}).items() if key not in _LOGGED}
    run: Written = {
        "params": ("parameters", short),
        "madds": ("MAdds per image", short),
        "steps": ("steps", number),
        "seconds": ("wall time", duration),
        "images_per_second": ("images/s in training", number),
    }
    if summary.get("images_per_second_per_device") != summary.get("images_per_second"):  # several devices
        run = {**run, "images_per_second_per_device": ("images/s per device", number)}
    tiles = [
        (label, written(values[name]))
        for named, values in ((_named(page, scores, dataset), scores), (run, summary))
        for name, (label, written) in named.items()
        if values.get(name) is not None
    ]
    cells = (f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles)
    return f"<dl class=tiles>{''.join(cells)}</dl>" if tiles else ""


def _named(page: Page, scores: Facts, dataset: Facts) -> Written:
    return page.tiles(dataset) or {name: (name, text) for name in scores}


def _overview(page: Page, evaluations: Sequence[_Evaluation], dataset: Facts) -> str:
    """Table that compares the evaluations, if there are several."""
    if len(evaluations) < 2:
        return ""
    scalars = {key: value for key, value in evaluations[0].facts.items() if isinstance(value, int | float)}
    named = _named(page, {key: value for key, value in scalars.items() if key not in _WHICH}, dataset)
    rows = (
        (
            f'<a href="#{evaluation.anchor}">{text(evaluation.name)}</a>',
            number(evaluation.facts.get("step")),
            number(evaluation.facts.get("resolution")),
            *(
                written(evaluation.facts[name]) if name in evaluation.facts else "–"
                for name, (_, written) in named.items()
            ),
        )
        for evaluation in evaluations
    )
    head = ("split", "step", "px", *(label for label, _ in named.values()))
    return f"<section><h2>Evaluations</h2>{table(head, rows)}</section>"


def _evaluation(page: Page, evaluation: _Evaluation, dataset: Facts) -> str:
    """Section of an evaluation: its heading, and the parts of the task."""
    facts, skipped = evaluation.facts, evaluation.facts.get("skipped", ())
    used_checkpoint = f", the run's {text(facts['checkpoint'])} checkpoint" if "checkpoint" in facts else ""
    notes = [f"At step {number(facts.get('step'))}{used_checkpoint}"]
    notes += [f"at {facts['resolution']} px"] if "resolution" in facts else []
    notes += [f"without {number(len(skipped))} images that can't be decoded"] if skipped else []
    sections = page.sections(facts, {**dataset, "eval_split": facts["split"]}, _pictures(evaluation))
    return (
        f"<section><h2 id={evaluation.anchor}>Evaluation on {text(evaluation.name)}</h2>"
        f"<p class=note>{', '.join(notes)}.</p></section>{sections}"
    )


def _skipped(summary: Facts, lines: Sequence[str]) -> str:
    """Section on the images that can't be decoded."""
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
    """Section with the settings that differ from the defaults, and the other settings folded away."""
    if not config:
        return ""
    defaults, flat = jsonable(flatten(to_dict(Config()))), flatten(config)
    changed = {key: value for key, value in flat.items() if key not in defaults or defaults[key] != value}
    rows = ((text(key), text(value), text(defaults.get(key, "–"))) for key, value in changed.items())
    unchanged = ((text(key), text(value)) for key, value in flat.items() if key not in changed)
    return (
        f"<section><h2>Config</h2>{table(('changed', 'value', 'default'), rows, 'facts')}<details><summary>The"
        f" other {len(flat) - len(changed)} values, which are the defaults</summary>"
        f"{table(('key', 'value'), unchanged, 'facts')}</details></section>"
    )


def _provenance(provenance: Facts, evaluations: Sequence[_Evaluation]) -> str:
    """Section on the provenance of the training's sessions and of later evaluations."""
    named = [("Session", session) for session in provenance.get("sessions", [])]
    named += [
        (f"Evaluation on {one.name}", one.facts["provenance"]) for one in evaluations if "provenance" in one.facts
    ]
    parts = []
    for name, session in named:
        git = session.get("git")
        facts = {
            "command": f"<code>{text(session.get('command', '–'))}</code>",
            "commit": text(git["commit"] + (" with local changes" if git["dirty"] else "")) if git else "–",
            "devices": text(_devices(session.get("devices", {}))),
            "peak memory": text(_memory(session.get("memory", {})) or "–"),
            "versions": text(", ".join(f"{key} {value}" for key, value in session.get("versions", {}).items())),
            "settings": text(", ".join(f"{k}={v}" for k, v in session.get("settings", {}).items() if v is not None)),
        }
        summary = (text(name), text(session.get("started", "")), facts["devices"], _memory(session.get("memory", {})))
        parts.append(
            f"<details><summary>{', '.join(filter(None, summary))}</summary>"
            f"{table(('', ''), facts.items(), 'facts')}</details>"
        )
    return f"<section><h2>Provenance</h2>{''.join(parts)}</section>" if parts else ""


def _devices(devices: Facts) -> str:
    processes = devices.get("processes", 1)
    return f"{devices.get('count', '?')} × {devices.get('kind', '?')}" + (
        f" in {processes} processes" if processes > 1 else ""
    )


def _memory(memory: Facts) -> str:
    """Peak memory as text, as far as it is known; a killed session doesn't record it."""
    places = {"device_bytes": "on a device", "host_bytes": "on the host"}
    peaks = (f"{memory[key] / 1e9:.2f} GB {place}" for key, place in places.items() if key in memory)
    return ", ".join(peaks)


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
