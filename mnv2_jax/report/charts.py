"""Charts as SVG inside the page.

matplotlib draws them in placeholder colours, which are replaced by the page's CSS variables. So the charts follow light
and dark mode, and their text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnv2_jax.report.words import text

_POINTS = 300
"""Number of points to which a long curve is reduced."""
_TICKS = (1, 2, 2.5, 5, 10)

_INK, _MUTED, _GRID, _MAIN, _SECOND = (f"#00000{digit}" for digit in range(1, 6))
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 2)), (0, (1, 1.5)))
_LINES = [(colour, dash) for dash in _DASHES for colour in (_MAIN, _SECOND, _INK, _MUTED)]
"""Colour and dashes of each of up to twelve lines in a chart."""
_COLOURS = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _MAIN: "--main", _SECOND: "--second"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keeps text as text
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


class Panel(NamedTuple):
    """A chart of one logged value over steps."""

    caption: str
    key: str
    """Key of the value in metrics.jsonl."""
    splits: tuple[str, ...]
    form: str
    """Format of the numbers on the value's axis."""
    scale: float = 1
    """Factor by which the log's values are multiplied."""


_LOSS = Panel("Loss", "loss", ("train", "eval"), "{:g}")
_PACE = (
    Panel("Learning rate", "lr", ("train",), "{:g}"),
    Panel("Images per second", "images_per_second", ("train",), "{:,.0f}"),
)


def curves(metrics: Sequence[Mapping[str, Any]], panels: Sequence[Panel] = ()) -> str:
    """HTML with curves over steps: loss, the ``panels``, learning rate and speed, as far as the log has them."""
    figures = []
    for caption, key, splits, form, scale in (_LOSS, *panels, *_PACE):
        series = {split: points for split in splits if len(points := _series(metrics, split, key))}
        if not series:
            continue

        def draw(figure: Figure, series: Any = series, key: str = key, form: str = form, scale: float = scale) -> None:
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


def losses_by_rate(points: np.ndarray, marks: Mapping[str, float]) -> str:
    """Chart of the losses of a learning-rate range test.

    Args:
      points: [n, 3] with learning rate, loss and smoothed loss.
      marks: learning rates to mark, by name; the first is the most prominent.
    """
    rates, losses, smoothed = points.T

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(rates, losses, ".", color=_MUTED, markersize=3, alpha=0.6, label="batches")
        axes.plot(rates, smoothed, color=_MAIN, label="smoothed")
        for (name, rate), colour in zip(marks.items(), (_SECOND, _INK), strict=False):
            axes.axvline(rate, color=colour, linewidth=1, linestyle=(0, (4, 3)), label=f"{name}: {rate:.3g}")
        low, high = np.min(smoothed, initial=np.inf), np.max(smoothed, initial=-np.inf)
        if len(smoothed):
            axes.set_ylim(low - 0.1 * (high - low) - 1e-6, high + 0.1 * (high - low) + 1e-6)
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend(loc="best")

    return _figure(_svg(draw, "Loss by learning rate", (6.5, 3.4)), "Loss of training batches")


def reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """Chart of accuracy by confidence, above the number of images with each confidence."""
    count = np.array([row["count"] for row in bins], float)
    filled = count > 0
    accuracy = np.array([row["accuracy"] or 0 for row in bins], float)
    confidence = np.array([row["confidence"] or 0 for row in bins], float)
    width = 1 / len(bins)
    starts = np.arange(len(bins)) * width

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        above.bar(starts[filled], accuracy[filled], width * 0.92, align="edge", color=_MAIN, alpha=0.55)
        above.plot((0, 1), (0, 1), color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
        above.plot(confidence[filled], accuracy[filled], "o", color=_SECOND, markersize=3.5, label="mean confidence")
        above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        figure.legend(loc="outside upper left", ncols=2, borderaxespad=0)  # bars can be anywhere inside
        below.bar(starts, count, width * 0.92, align="edge", color=_MUTED, alpha=0.55)
        below.set(xlabel="confidence", ylabel="images")
        below.yaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
        below.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))

    return _figure(_svg(draw, "Accuracy by confidence", (5.0, 3.6)), "Reliability: accuracy by confidence")


def precision_recall(curves: Mapping[str, Sequence[float]]) -> str:
    """Chart of precision over recall, one line a class; "" without classes.

    Args:
      curves: precisions (0 to 1) by the class' name, at recalls that divide 0 to 1 evenly.
    """
    if not curves:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (name, precision) in enumerate(curves.items()):
            colour, style = _LINES[number % len(_LINES)]
            recall = np.linspace(0, 1, len(precision))
            axes.plot(recall, precision, color=colour, linestyle=style, label=name, linewidth=1.3)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="lower left", fontsize=7)

    return _figure(_svg(draw, "Precision over recall", (5.0, 3.4)), "Precision over recall at an IoU of 0.5")


class Point(NamedTuple):
    """A score at a cost."""

    label: str
    cost: float
    score: float
    low: float | None = None
    high: float | None = None
    """Ends of an interval; None: there is none."""


def scores_by_cost(ours: Sequence[Point], published: Sequence[Point], name: str) -> str:
    """Chart of scores, as shares of 1, over a cost on a logarithmic axis: intervals of ours, published ones beside.

    Args:
      ours: measured scores.
      published: published scores.
      name: name of the cost, such as "MAdds".
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for points, colour, label, marker in ((ours, _MAIN, "here", "o"), (published, _SECOND, "published", "D")):
            if points:
                x, y = ([getattr(point, key) for point in points] for key in ("cost", "score"))
                axes.plot(x, [100 * each for each in y], marker, color=colour, markersize=4.5, label=label)
            for point in points:
                if point.low is not None and point.high is not None:
                    ends = (100 * point.low, 100 * point.high)
                    axes.plot((point.cost, point.cost), ends, color=colour, linewidth=1.2)
        for point in ours:
            place = (point.cost, 100 * point.score)
            axes.annotate(point.label, place, (4, -9), textcoords="offset points", fontsize=7, color=_MUTED)
        axes.set(xscale="log", xlabel=name, ylabel="score, %")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        if published:
            axes.legend(loc="lower right")

    return _figure(_svg(draw, f"Score by {name}", (5.0, 3.4)), f"Score by {name}")


def overlaid(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], split: str, key: str, caption: str, scale: float = 1
) -> str:
    """Chart of one logged value of several runs over steps; "" if no log has it.

    Args:
      logs: lines of metrics.jsonl by the name of the run.
      split: train or eval.
      key: the value.
      caption: its name.
      scale: factor by which it is multiplied.
    """
    series = {name: points for name, lines in logs.items() if len(points := _series(lines, split, key))}
    if not series:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (name, points) in enumerate(series.items()):
            colour, style = _LINES[number % len(_LINES)]
            axes.plot(*(points * (1, scale)).T, color=colour, linestyle=style, label=name, linewidth=1.3)
        axes.set_xlim(left=0)
        axes.set(xlabel="step", ylabel=caption)
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.legend(loc="best", fontsize=7)

    return _figure(_svg(draw, f"{caption} over steps", (6.5, 3.4)), caption)


def band(curve: np.ndarray, caption: str, bottom: float, top: float) -> str:
    """Chart of a learning curve over epochs, [n, 4]: epoch, mean, lowest and highest score; the axis has these ends."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        epochs, mean, low, high = curve.T
        axes.fill_between(epochs, 100 * low, 100 * high, color=_MAIN, alpha=0.18, linewidth=0)
        axes.plot(epochs, 100 * mean, color=_MAIN, marker="o", markersize=3)
        axes.set(xlabel="epoch", ylabel="score, %", xlim=(0, None), ylim=(100 * bottom, 100 * top))

    return _figure(_svg(draw, f"Learning curve of {caption}", (4.0, 2.4)), text(caption))


def _svg(draw: Callable[[Figure], None], label: str, size: tuple[float, float] = (5.0, 2.6)) -> str:
    """Draws a figure of a size in inches as inline SVG that fills its container."""
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Remove what only a separate file needs: namespaces, metadata, and a style that would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    svg = f'<svg {view_box[0]} role="img" aria-label="{text(label)}">' + svg[svg.index(">") + 1 :]
    for placeholder, variable in _COLOURS.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg


def _figure(svg: str, caption: str) -> str:
    return f"<figure class=chart><figcaption>{caption}</figcaption>{svg}</figure>"


def _series(metrics: Sequence[Mapping[str, Any]], split: str, key: str) -> np.ndarray:
    """Steps and values, [n, 2], without lines whose value isn't finite."""
    points = [(line["step"], line[key]) for line in metrics if line.get("split") == split and line.get(key) is not None]
    return np.array(points, float).reshape(-1, 2)


def _plot(axes: Axes, points: np.ndarray, colour: str, label: str, dots: bool = False) -> None:
    """Plots a line. A line of many points is drawn as means over stretches, with a band between their extremes."""
    if len(points) > 2 * _POINTS:
        stretches = np.array_split(points, _POINTS)
        low, high = (np.array([extreme(part[:, 1]) for part in stretches]) for extreme in (np.min, np.max))
        points = np.array([part.mean(axis=0) for part in stretches])
        axes.fill_between(points[:, 0], low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(*points.T, color=colour, label=label, marker="o" if dots or len(points) == 1 else None, markersize=3.5)
