"""Draws the pictures of the documentation into docs/images/: ``python docs/figures.py arrow family``.

``report`` is the picture of a run's page, taken by Chromium: ``python docs/figures.py report --run=runs/quickstart``.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.published import published
from mnv2_jax.models.registry import create_model, list_models

IMAGES = pathlib.Path(__file__).with_name("images")
_INK, _MUTED, _BOX = "#1f2933", "#697586", "#e0f2f1"
_FAMILIES = {
    "mobilenet_v1": ("MobileNet V1", "#9e9e9e", "o"),
    "mobilenet_v2": ("MobileNet V2", "#00897b", "s"),
    "mobilenet_v3": ("MobileNet V3", "#ef6c00", "^"),
    "mobilenet_v4": ("MobileNet V4", "#3949ab", "D"),
}
"""Prefix of the models' names: label, colour and marker."""
_AUTHORS = ("arXiv", "tensorflow/models")
"""Beginnings of the sources that are the authors' own: papers, TF-slim and the TF model garden."""

_ROOMS = {
    "configs": (0, 1),
    "config": (1, 1),
    "data": (2, 1),
    "tasks": (3, 1),
    "step": (4, 1),
    "loop": (5, 1),
    "runs": (6, 1),
    "report": (7, 1),
    "nn": (1, 0),
    "models": (2, 0),
    "weights": (5, 0),
    "ops": (3, 2),
}
"""Column and row of each room."""
_ARROWS = (
    ("configs", "config"),
    ("config", "data"),
    ("data", "tasks"),
    ("tasks", "step"),
    ("step", "loop"),
    ("loop", "runs"),
    ("runs", "report"),
    ("nn", "models"),
    ("models", "tasks"),
    ("runs", "weights"),
    ("weights", "models"),
    ("ops", "tasks"),
)


def draw_arrow() -> None:
    """Draws the way of the data through the rooms."""
    figure = Figure(figsize=(9.2, 2.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.55, 7.55), ylim=(-0.45, 2.45))
    axes.axis("off")
    boxes = {}
    for name, (x, y) in _ROOMS.items():
        box = boxes[name] = FancyBboxPatch(
            (x - 0.32, y - 0.2), 0.64, 0.4, boxstyle="round,pad=0.05", fc=_BOX, ec=_MUTED
        )
        axes.add_patch(box)
        axes.text(x, y, name, ha="center", va="center", color=_INK, fontsize=10)
    for start, end in _ARROWS:
        ends = {"patchA": boxes[start], "patchB": boxes[end], "shrinkA": 1, "shrinkB": 1}
        arrow = {"arrowstyle": "-|>", "color": _MUTED, **ends}
        axes.annotate("", xy=_ROOMS[end], xytext=_ROOMS[start], arrowprops=arrow)
    _save(figure, "arrow")


def draw_family() -> None:
    """Draws the authors' top-1 accuracy over multiply-adds, which are counted at each row's width and resolution."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for prefix, (label, colour, marker) in _FAMILIES.items():
        rows = [
            row
            for name in list_models(f"{prefix}*")
            for row in published(name)
            if row["source"].startswith(_AUTHORS) and "precision" not in row
            if row.get("training", "ImageNet-1k only") == "ImageNet-1k only"
        ]
        points = [(_madds(row) / 1e6, row["top1"]) for row in rows]
        axes.scatter(*zip(*points, strict=True), s=22, color=colour, marker=marker, label=label, alpha=0.85)
    axes.set(xscale="log", xlabel="multiply-adds of one image, millions", ylabel="ImageNet top-1 of the authors, %")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, "family")


def _madds(row: dict[str, object]) -> int:
    model = create_model(row["model"], 1000, width=row["width"], depth=row.get("depth", 1.0))
    return count_layers(model, row["resolution"]).madds


def draw_report(run: pathlib.Path) -> None:
    """Takes the picture of the top of a run's page; needs Chromium."""
    page = (run / "report.html").resolve()
    size = "--window-size=1180,1130"  # the scores and the curves
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", size, f"--screenshot={IMAGES / 'report.png'}"]
    subprocess.run(["chromium", *flags, page.as_uri()], check=True)


def _save(figure: Figure, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "mnv2_jax"}):  # the same picture is the same bytes
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    """Draws what is asked for."""
    parser = argparse.ArgumentParser(description="Draws the pictures of the documentation into docs/images/.")
    parser.add_argument("names", nargs="+", choices=("arrow", "family", "report"))
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/quickstart"), help="for the report")
    args = parser.parse_args()
    for name in args.names:
        {"arrow": draw_arrow, "family": draw_family, "report": lambda: draw_report(args.run)}[name]()


if __name__ == "__main__":
    main()
