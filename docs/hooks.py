"""Hook of the site: links that leave docs/ lead to copies of the files, as text."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\]\(\.\./(?P<path>[^)#\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files outside docs/ that a page links to, as ``source/PATH.txt``."""
    pages = [page.content_string for page in files.documentation_pages()]
    for path in sorted({match["path"] for page in pages for match in _OUTSIDE.finditer(page)}):
        files.append(File.generated(config, f"source/{path}.txt", content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links that leave docs/ at those copies; one whose file is missing stays, and fails the build."""
    return _OUTSIDE.sub(r"](source/\g<path>.txt)", markdown)
