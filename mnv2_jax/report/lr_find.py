"""Page with the results of a learning-rate range test."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mnv2_jax.json_files import write_text
from mnv2_jax.report.charts import losses_by_rate
from mnv2_jax.report.page import whole_page
from mnv2_jax.report.words import table, text

_ROWS = 200


def write_lr_find(path: pathlib.Path, title: str, lead: str, result: Mapping[str, Any]) -> None:
    """Writes the page.

    Args:
      path: the file; replaced if it exists.
      title: name of the experiment.
      lead: the result in one or two sentences.
      result: points (lr, loss, smoothed), suggestions by rule, suggestion, peak_lr.

    Raises:
      UserError: if the page can't be written.
    """
    points = np.array([[point[key] for key in ("lr", "loss", "smoothed")] for point in result["points"]], float)
    marks = {name: rate for name, rate in (("suggested", result["suggestion"]), ("config", result["peak_lr"])) if rate}
    chart = losses_by_rate(points.reshape(-1, 3), marks)
    rules = [(text(name), f"{rate:.3g}") for name, rate in result["suggestions"].items()]
    rows = [[f"{value:.4g}" for value in point] for point in points[:: max(-(-len(points) // _ROWS), 1)]]
    body = (
        f"<header><p class=eyebrow>Learning-rate range test</p><h1>{text(title)}</h1><p class=lead>{text(lead)}</p>"
        f"</header><section><h2>Loss by learning rate</h2><div class=charts>{chart}</div></section>"
        f"<section><h2>Suggestions by rule</h2>{table(('rule', 'learning rate'), rules)}</section>"
        f"<section><h2>Steps</h2><details><summary>{len(points)} steps</summary>"
        f"{table(('learning rate', 'loss', 'smoothed'), rows)}</details></section>"
    )
    write_text(path, whole_page(title, body))
