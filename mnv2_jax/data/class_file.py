"""Reads classes.txt, which names the classes of images with masks or boxes, one in a line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mnv2_jax.errors import UserError

CLASSES_FILE = "classes.txt"

Colour = tuple[int, int, int]
"""Red, green and blue, from 0 to 255."""

_MOST_DIGITS = 9
"""Digits of a class's number at most."""
_COLOUR = re.compile(r"(.*\S)\s+(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})")


def parse_classes(file: str, content: bytes, with_colours: bool) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Parses the lines, each of which has the name of a class, optionally with a number before it.

    Args:
      file: the name of the file in errors.
      content: the bytes of the file.
      with_colours: whether red, green and blue may follow a name; they are read where every line has them.

    Returns:
      The names of the classes in the order of their numbers, or else of the lines; and their colours, if any.

    Raises:
      UserError: if the file is no text, or a number is missing, or a name or colour is given twice.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not text in UTF-8 ({error.reason}); save it as such") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    colours: list[Colour] = []
    matches = [_COLOUR.fullmatch(line) for line in lines]
    if with_colours and lines and all(matches):
        lines = [match[1] for match in matches if match]
        colours = [(int(match[2]), int(match[3]), int(match[4])) for match in matches if match]
    numbered = [line.split(maxsplit=1) for line in lines]
    if all(len(words) == 2 and words[0].isdecimal() and len(words[0]) <= _MOST_DIGITS for words in numbered):
        numbers = [int(number) for number, _ in numbered]
        if absent := sorted(set(range(len(numbers))) - set(numbers)):
            raise UserError(
                f"{file}: no line has number {absent[0]}; number the {len(numbers)} classes from 0 to"
                f" {len(numbers) - 1}, or leave the numbers out"
            )
        order = np.argsort(numbers).tolist()
        lines = [numbered[place][1] for place in order]
        colours = [colours[place] for place in order] if colours else []
    check_different(file, lines, "class")
    check_different(file, colours, "colour")
    if strange := next((colour for colour in colours if max(colour) > 255), None):
        raise UserError(f"{file}: {strange} is no colour; write red, green and blue from 0 to 255")
    return tuple(lines), tuple(colours)


def check_different(file: str, words: Sequence[object], kind: str) -> None:
    """Refuses a word that a file gives twice.

    Args:
      file: the name of the file.
      words: names or colours of classes.
      kind: what the words are.

    Raises:
      UserError: naming the first of them.
    """
    if (repeated := next((word for word in words if words.count(word) > 1), None)) is not None:
        raise UserError(f"{file}: {kind} {repeated!r} is given twice; correct one of them")
