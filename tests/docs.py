"""Splits the pages of docs/ into blocks that tests can run, and turns a page into a notebook.

python -m tests.docs    # writes the notebooks
"""

import json
import pathlib
import re
import shlex
from typing import NamedTuple

DOCS = pathlib.Path(__file__).parents[1] / "docs"
LIBRARY = DOCS / "library.md"


class Block(NamedTuple):
    """A block of text, or a fenced block: a Python file with its name, or commands."""

    language: str
    title: str
    source: str


def blocks(page):
    """Returns the blocks of a page in order."""
    parts = re.split(
        r"^```(\w+)(?: title=\"([^\"\n]+)\")?\n(.*?)^```\n", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    blocks = [Block("", "", parts[0])]
    for first in range(1, len(parts), 4):
        language, title, source, text = parts[first : first + 4]
        blocks += [Block(language, title or "", source), Block("", "", text)]
    return [block for block in blocks if block.source.strip()]


def files(page):
    """Returns the Python files of a page by name."""
    return {block.title: block.source for block in blocks(page) if block.language == "python"}


def commands(page):
    """Returns the commands of a page, each split into words."""
    return [shlex.split(line) for block in blocks(page) if block.language == "sh" for line in block.source.splitlines()]


def write_files(page, folder):
    """Writes the Python files of a page into a folder."""
    for name, source in files(page).items():
        (folder / name).write_text(source)


def cells(page):
    """Yields the cells of a page as a notebook.

    A script that the page runs becomes a code cell; any other file is written by %%writefile.
    """
    scripts = {words[1] for words in commands(page)} & set(files(page))
    for block in blocks(page):
        if not block.language:
            yield "markdown", block.source.strip()
        elif block.language == "python":
            yield (
                "code",
                block.source.strip() if block.title in scripts else f"%%writefile {block.title}\n{block.source}",
            )
        elif other_commands := [
            f"!{line}" for line in block.source.splitlines() if shlex.split(line)[1] not in scripts
        ]:
            yield "code", "\n".join(other_commands)


def notebook(page):
    """Returns the page as the JSON text of a notebook without outputs."""

    def cell(number, kind, source):
        more = {"execution_count": None, "outputs": []} if kind == "code" else {}
        return {"cell_type": kind, "id": str(number), "metadata": {}, **more, "source": source.splitlines(True)}

    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": [cell(number, *entry) for number, entry in enumerate(cells(page))],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    LIBRARY.with_suffix(".ipynb").write_text(notebook(LIBRARY))
