"""Text, numbers and tables as HTML."""

from __future__ import annotations

import html
import os
import pathlib
from collections.abc import Iterable
from typing import Any


def text(value: Any) -> str:
    """A value as text, with HTML markup escaped."""
    return html.escape(str(value))


def percent(fraction: float | None) -> str:
    """A fraction written as ``97.22 %``; a dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.2f}\N{NO-BREAK SPACE}%"


def number(value: float | None, form: str = ",.0f") -> str:
    """A number in a format; a dash for None."""
    return "–" if value is None else format(value, form)


def short(value: float | None) -> str:
    """A number written as ``2.24 M``; hovering shows the exact number."""
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f'<span title="{value:,.0f}">{value / size:.3g} {unit}</span>'
    return f"{value:,.0f}"


def place(path: str) -> str:
    """End of an image's path; hovering shows the whole path. It is a link if the file exists on this machine."""
    short = f'<span title="{text(path)}">{text("/".join(pathlib.PurePath(path).parts[-2:]))}</span>'
    is_here = os.path.isabs(path) and os.path.isfile(path)
    return f'<a href="{text(pathlib.Path(path).as_uri())}">{short}</a>' if is_here else short


def table(head: Iterable[str], rows: Iterable[Iterable[str]], css: str = "") -> str:
    """A table of cells that are HTML; the first column is text, the others are numbers."""
    titles = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class=scroll><table class="{css}"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
