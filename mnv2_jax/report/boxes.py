"""Pictures of boxes over an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mnv2_jax.report.overlays import colour_of

_LINE_SHARE = 200
"""The long side of an image over the width of lines."""


def drawn(
    image: np.ndarray, boxes: np.ndarray, classes: Sequence[int] | np.ndarray, *, is_dashed: bool = False
) -> np.ndarray:
    """Draws boxes over an image in the colours of their classes; returns uint8 [h, w, 3].

    Args:
      image: uint8 [h, w, 3].
      boxes: [n, 4], (y0, x0, y1, x1) in pixels; the first is drawn last, above the others.
      classes: numbers of classes [n].
      is_dashed: whether lines are broken, as for boxes that aren't predictions.
    """
    picture = Image.fromarray(image).convert("RGB")
    draw = ImageDraw.Draw(picture)
    width = max(round(max(picture.size) / _LINE_SHARE), 1)
    for (y0, x0, y1, x1), number in zip(boxes[::-1].tolist(), reversed(list(classes)), strict=True):
        colour = colour_of(int(number))
        right, bottom = max(x1 - 1, x0), max(y1 - 1, y0)
        if not is_dashed:
            draw.rectangle((x0, y0, right, bottom), outline=colour, width=width)
            continue
        for start, end in (
            ((x0, y0), (right, y0)),
            ((x0, bottom), (right, bottom)),
            ((x0, y0), (x0, bottom)),
            ((right, y0), (right, bottom)),
        ):
            _dashes(draw, start, end, colour, width)
    return np.asarray(picture)


def _dashes(
    draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: tuple[int, ...], width: int
) -> None:
    length = abs(end[0] - start[0]) + abs(end[1] - start[1])
    count = max(int(length / (4 * width)), 1)
    places = np.linspace(start, end, 2 * count + 1)
    for first, last in zip(places[::2], places[1::2], strict=False):
        draw.line((*first, *last), fill=colour, width=width)
