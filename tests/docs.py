"""The pages of the documentation, taken apart: their Python files, their commands, and a page as a notebook.

python -m tests.docs    # writes the notebook anew
"""

import json
import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "docs" / "library.md"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


class Block(NamedTuple):
    """A piece of a page: text (no language), Python with the file that it is, or commands."""

    language: str
    title: str
    source: str


def blocks(page):
    """The pieces of a page from top to bottom."""
    parts = re.split(
        r"^```(\w+)(?: title=\"([^\"\n]+)\")?\n(.*?)^```\n", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    blocks = [Block("", "", parts[0])]
    for first in range(1, len(parts), 4):
        language, title, source, text = parts[first : first + 4]
        blocks += [Block(language, title or "", source), Block("", "", text)]
    return [block for block in blocks if block.source.strip()]


def files(page):
    """The Python files of a page, by their names."""
    return {block.title: block.source for block in blocks(page) if block.language == "python" and block.title}


def lines(source):
    """Commands of a block, split into words: continued lines joined, comments left out, parts of ``&&`` apart."""
    for line in source.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            place = words.index("&&")
            yield words[:place]
            words = words[place + 1 :]
        if words:
            yield words


def commands(page):
    """Commands of the fenced blocks of a page, split into words."""
    return [words for block in blocks(page) if block.language == "sh" for words in lines(block.source)]


def quoted_commands(page):
    """Whole commands of ours in the text of a page, between backquotes."""
    texts = [block.source for block in blocks(page) if not block.language]
    quoted = (" ".join(code.split()) for text in texts for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))
    ours = (code for code in quoted if re.match(r"(mnv2 \w+|python -m mnv2_jax\S*|make) \S", code) and "…" not in code)
    return [words for code in ours for words in lines(code)]


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
        elif kept := [f"!{shlex.join(words)}" for words in lines(block.source) if words[1] not in scripts]:
            yield "code", "\n".join(kept)


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
