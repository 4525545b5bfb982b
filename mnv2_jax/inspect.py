"""Says what lies in a folder of images: ``python -m mnv2_jax.inspect DIR``."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tqdm

from mnv2_jax.config import DataConfig
from mnv2_jax.data.inspection import TABLES, Inspection, Table, look_through
from mnv2_jax.data.sources import check_trainable, open_dataset, take_inventory
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser
from mnv2_jax.json_files import jsonable

LIMIT = 50_000
"""Images that are opened where nothing else is asked for."""
_ROWS, _WIDEST = 20, 160
"""Lines of a table on a terminal, and characters of a cell."""

_HELP_AFTER = """\
DIR is a folder or an uncompressed .tar of train/CLASS, val/CLASS, … or of class folders alone, as data=folder takes it,
a list of files and labels (.csv, .tsv, .txt), or a folder of images without classes. Every image is read once and
decoded. Compared are the bytes of the files, and the pixels at a small size: a copy with other metadata is found, one
that was compressed again isn't. Nothing is written but --report.

examples:
  python -m mnv2_jax.inspect photos/
  python -m mnv2_jax.inspect train.csv --image_root=images --report=photos.html
  python -m mnv2_jax.inspect imagenet/ --limit=0 --json
"""


def main() -> None:
    """Flags, one pass over the images, tables."""
    parser = Parser("Says what lies in a folder of images: classes, sizes, damaged files, duplicates.", _HELP_AFTER)
    parser.add_argument("path", metavar="DIR", type=os.path.expanduser, help="a folder, a .tar, or a list of files")
    parser.add_argument("--image_root", metavar="DIR", type=os.path.expanduser, help="where the files of a list are")
    parser.add_argument(
        "--limit", type=_limit, default=LIMIT, metavar="N", help=f"images to open (default: {LIMIT:,}; 0: all)"
    )
    parser.add_argument(
        "--report", metavar="FILE.html", type=_page, help="a page of it, with some pictures of each class"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else there")
    args, overrides = parser.parse(sys.argv[1:])
    if overrides:
        raise UserError(f"--config.{overrides[0]} is not read here; leave it out")
    if not os.path.exists(args.path):
        raise UserError(f"{args.path}: no such file or folder; correct the path")
    inventory = take_inventory(args.path, args.image_root)
    total = sum(map(len, inventory.splits.values()))
    with tqdm.tqdm(total=min(total, args.limit or total), unit="image", disable=None, file=sys.stderr) as bar:
        found = look_through(inventory, args.limit, args.report is not None, bar.update)
    tables, lead = [make(found) for make in TABLES], _lead(found, args.limit)
    use, said = _as_training_data(args.path, args.image_root)
    if args.report is not None:
        from mnv2_jax.report.inspection import write_inspection  # matplotlib takes a second

        write_inspection(args.report, args.path, f"{lead}. {said[0].upper()}{said[1:]}", found, tables)
    if args.json:
        print(json.dumps(jsonable(_tree(args.path, found, tables) | {"training": use}), allow_nan=False))
        return
    print(f"{args.path}: {lead}", *inventory.notes, said, sep="\n")
    for table in tables:
        print("", *_lines(table), sep="\n")
    if args.report is not None:
        print(f"\n{args.report}: the same with pictures")


def _lead(found: Inspection, limit: int) -> str:
    """Sentence on the whole folder."""
    names, splits = found.inventory.class_names, found.inventory.splits
    whole, seen = found.num_images, len(found.looks)
    classes = f" of {_counted(len(names), 'class', 'classes')}" if names else " without classes"
    said = f"{_counted(whole, 'image')}{classes} in {_counted(len(splits), 'split')} ({', '.join(splits)})"
    if seen < whole:
        said += f"; {seen:,} of them were looked at, evenly spread (--limit={limit}; 0: all)"
    return said


def _as_training_data(path: str, image_root: str | None) -> tuple[dict[str, Any], str]:
    """What a training would take of it, or why it can't be trained on: as a tree, and as a line."""
    try:
        dataset = open_dataset(DataConfig(name="folder", path=path, image_root=image_root))
        check_trainable(dataset)
    except UserError as error:
        return {"problem": str(error)}, f"can't be trained on as it lies: {error}"
    train, held = len(dataset.train), len(dataset.eval)
    tree = {"train": train, "eval": held, "eval_split": dataset.eval.name}
    notes = "".join(f"; {note}" for note in dataset.notes if note.startswith("no splits"))
    return tree, f"a training takes {train:,} images and is evaluated on {held:,} of {dataset.eval.name}{notes}"


def _counted(count: int, one: str, several: str = "") -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def _tree(path: str, found: Inspection, tables: Sequence[Table]) -> dict[str, Any]:
    return {
        "path": path,
        "images": found.num_images,
        "looked_at": len(found.looks),
        "class_names": found.inventory.class_names,
        "splits": {name: len(split) for name, split in found.inventory.splits.items()},
        "notes": found.inventory.notes,
        "tables": {table.name: [dict(zip(table.head, row, strict=True)) for row in table.rows] for table in tables},
    }


def _lines(table: Table) -> list[str]:
    """A table as people read it on a terminal, its first column to the left."""
    note = f": {table.note}" if table.note else "" if table.rows else ": none"
    if not table.rows:
        return [f"{table.title}{note}"]
    rows = [table.head, *([_cell(cell) for cell in row] for row in table.rows)]
    left_out = len(rows) - 1 - _ROWS
    if left_out > 1:
        rows = [*rows[: _ROWS + 1]]
    is_text = [isinstance(cell, str) for cell in table.rows[0]]
    widths = [max(len(row[place]) for row in rows) for place in range(len(table.head))]
    lines = [
        "  "
        + "  ".join(
            f"{cell:<{w}}" if left else f"{cell:>{w}}" for cell, w, left in zip(row, widths, is_text, strict=True)
        )
        for row in rows
    ]
    more = [f"  … and {left_out:,} more, which --json has"] if left_out > 1 else []
    return [f"{table.title}{note}", *(line.rstrip() for line in lines), *more]


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value if len(value) <= _WIDEST else f"{value[:_WIDEST]}…"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _limit(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 for all images")
    return int(text)


def _page(text: str) -> pathlib.Path:
    path = pathlib.Path(os.path.expanduser(text))
    if path.suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .html")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is in no folder that is there; make that first")
    return path


if __name__ == "__main__":
    exit_on_user_error(main)
