"""Page on a folder of images, with some pictures of each class."""

from __future__ import annotations

import pathlib
from typing import Any

from mnv2_jax.data.inspection import Inspection, Table
from mnv2_jax.json_files import write_text
from mnv2_jax.report.page import picture, whole_page
from mnv2_jax.report.words import number, table, text

_ROWS = 50
"""Rows of a table that are shown at once, and that are on the page at most, behind a click."""
_MOST_ROWS = 2000


def write_inspection(path: pathlib.Path, what: str, lead: str, inspection: Inspection, tables: list[Table]) -> None:
    """Writes the page.

    Args:
      path: the file, replaced where it exists.
      what: is looked at.
      lead: what is said of it in a sentence.
      inspection: of which the pictures are taken.
      tables: what was found.

    Raises:
      UserError: if it can't be written.
    """
    body = "\n".join(
        (
            f"<header><p class=eyebrow>{text(what)}</p><h1>{text(pathlib.Path(what).resolve().name)}</h1>",
            f"<p class=lead>{text(lead)}</p></header>",
            *map(_section, tables),
            _pictures(inspection),
        )
    )
    write_text(path, whole_page(pathlib.Path(what).resolve().name, body))


def _section(found: Table) -> str:
    note = f"<p class=note>{text(found.note)}.</p>" if found.note else ""
    if not found.rows:
        return f"<section><h2>{text(found.title)}</h2><p class=note>None.</p></section>"
    if found.name == "classes":
        return f"<section><h2>{text(found.title)}</h2>{note}{_classes(found)}</section>"
    head, rows = [text(word) for word in found.head], [[_cell(cell) for cell in row] for row in found.rows]
    css = "facts" if any(isinstance(cell, str) for cell in found.rows[0][1:]) else ""  # texts break, to the left
    more = rows[_ROWS:_MOST_ROWS]
    rest = f"<details><summary>{len(rows) - _ROWS:,} more</summary>{table(head, more, css)}</details>" if more else ""
    return f"<section><h2>{text(found.title)}</h2>{note}{table(head, rows[:_ROWS], css)}{rest}</section>"


def _classes(found: Table) -> str:
    """With a bar for the images of each, the largest behind the fewest folded away."""
    most = max((row[-1] for row in found.rows[:-1]), default=1) or 1
    head = ["class", "images", "", *map(text, found.head[1:-1])]
    rows = [
        (
            text(name),
            number(count),
            f'<span class=meter style="--s:{100 * count / most:.1f}%"></span>' if row is not found.rows[-1] else "",
            *(number(value) for value in rest),
        )
        for row in found.rows
        for name, *rest, count in [row]
    ]
    if len(rows) <= _ROWS:
        return table(head, rows, "classes")
    order = sorted(range(len(rows) - 1), key=lambda place: found.rows[place][-1])
    fewest = [rows[place] for place in order[: _ROWS // 2]]
    return (
        f"<p class=note>The {len(fewest)} classes with the fewest images.</p>{table(head, fewest, 'classes')}"
        f"<details><summary>All {len(rows) - 1:,} classes</summary>{table(head, rows, 'classes')}</details>"
    )


def _cell(value: Any) -> str:
    return text(value) if isinstance(value, str) else number(value, ",.4g" if isinstance(value, float) else ",.0f")


def _pictures(inspection: Inspection) -> str:
    by_class: dict[str, list[str]] = {}
    for look in inspection.looks:
        if (content := inspection.pictures.get((look.split, look.index))) is not None:
            caption = f"<figcaption>{text(pathlib.Path(look.name).name)}</figcaption>"
            card = f"<figure>{picture(content, 'jpeg')}{caption}</figure>"
            by_class.setdefault(inspection.class_of(look), []).append(card)
    if not by_class:
        return ""
    classes = "".join(
        f"<h3>{text(name)}</h3><div class=pictures>{''.join(cards)}</div>" for name, cards in sorted(by_class.items())
    )
    whole = len(inspection.inventory.class_names)
    note = f"<p class=note>Of {len(by_class):,} of {whole:,} classes.</p>" if len(by_class) < whole else ""
    return f"<section><h2>Pictures</h2>{note}{classes}</section>"
