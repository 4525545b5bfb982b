"""Page about a data set, with some pictures of each class."""

from __future__ import annotations

import pathlib
from typing import Any

from mnv2_jax.data.inspection import Inspection, Table
from mnv2_jax.json_files import write_text
from mnv2_jax.report.page import picture, whole_page
from mnv2_jax.report.words import number, table, text

_ROWS = 50
"""Most rows of a table that are shown at once."""
_MOST_ROWS = 2000
"""Most rows of a table on the page; those after the first `_ROWS` are folded away."""


def write_inspection(path: pathlib.Path, source: str, lead: str, inspection: Inspection, tables: list[Table]) -> None:
    """Writes the page.

    Args:
      path: the file; replaced if it exists.
      source: the data that were inspected, such as a folder.
      lead: the summary in one sentence.
      inspection: the inspection that holds the pictures.
      tables: the tables to show.

    Raises:
      UserError: if the page can't be written.
    """
    body = "\n".join(
        (
            f"<header><p class=eyebrow>{text(source)}</p><h1>{text(pathlib.Path(source).resolve().name)}</h1>",
            f"<p class=lead>{text(lead)}</p></header>",
            *map(_section, tables),
            _pictures(inspection),
        )
    )
    write_text(path, whole_page(pathlib.Path(source).resolve().name, body))


def _section(content: Table) -> str:
    note = f"<p class=note>{text(content.note)}.</p>" if content.note else ""
    if not content.rows:
        return f"<section><h2>{text(content.title)}</h2><p class=note>None.</p></section>"
    if content.name == "classes":
        return f"<section><h2>{text(content.title)}</h2>{note}{_classes(content)}</section>"
    head, rows = [text(word) for word in content.head], [[_cell(cell) for cell in row] for row in content.rows]
    # Text breaks into lines and is aligned to the left.
    css = "facts" if any(isinstance(cell, str) for cell in content.rows[0][1:]) else ""
    more = rows[_ROWS:_MOST_ROWS]
    folded = f"<details><summary>{len(rows) - _ROWS:,} more</summary>{table(head, more, css)}</details>" if more else ""
    return f"<section><h2>{text(content.title)}</h2>{note}{table(head, rows[:_ROWS], css)}{folded}</section>"


def _classes(content: Table) -> str:
    """Table of classes, with bars for the numbers of images. If there are many, only the smallest are unfolded."""
    top = max((row[-1] for row in content.rows[:-1]), default=1) or 1
    head = ["class", "images", "", *map(text, content.head[1:-1])]
    rows = [
        (
            text(name),
            number(count),
            f'<span class=meter style="--s:{100 * count / top:.1f}%"></span>' if row is not content.rows[-1] else "",
            *(number(value) for value in values),
        )
        for row in content.rows
        for name, *values, count in [row]
    ]
    if len(rows) <= _ROWS:
        return table(head, rows, "classes")
    order = sorted(range(len(rows) - 1), key=lambda place: content.rows[place][-1])
    smallest = [rows[place] for place in order[: _ROWS // 2]]
    return (
        f"<p class=note>The {len(smallest)} classes with the fewest images.</p>{table(head, smallest, 'classes')}"
        f"<details><summary>All {len(rows) - 1:,} classes</summary>{table(head, rows, 'classes')}</details>"
    )


def _cell(value: Any) -> str:
    return text(value) if isinstance(value, str) else number(value, ",.4g" if isinstance(value, float) else ",.0f")


def _pictures(inspection: Inspection) -> str:
    by_class: dict[str, list[str]] = {}
    for finding in inspection.findings:
        if (content := inspection.pictures.get((finding.split, finding.index))) is not None:
            caption = f"<figcaption>{text(pathlib.Path(finding.name).name)}</figcaption>"
            card = f"<figure>{picture(content, 'jpeg')}{caption}</figure>"
            by_class.setdefault(inspection.class_of(finding), []).append(card)
    if not by_class:
        return ""
    classes = "".join(
        f"<h3>{text(name)}</h3><div class=pictures>{''.join(cards)}</div>" for name, cards in sorted(by_class.items())
    )
    whole = len(inspection.inventory.class_names)
    note = f"<p class=note>Shown: {len(by_class):,} of {whole:,} classes.</p>" if len(by_class) < whole else ""
    return f"<section><h2>Pictures</h2>{note}{classes}</section>"
