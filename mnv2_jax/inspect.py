"""Reports what a folder of images holds: ``python -m mnv2_jax.inspect DIR``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import typing
from collections.abc import Sequence
from typing import Any

import tqdm

from mnv2_jax.config import DataConfig
from mnv2_jax.data import box_folder, mask_folder
from mnv2_jax.data.inspection import Inspection, Table, inspect_images, tables_of
from mnv2_jax.data.sources import check_trainable, open_dataset, take_inventory
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser
from mnv2_jax.json_files import jsonable

LIMIT = 50_000
"""Largest number of images that are opened, unless ``--limit`` gives another."""
_MAX_ROWS, _MAX_CELL = 20, 160
"""Largest number of rows of a table on a terminal, and of characters of a cell."""

_HELP_AFTER = """\
DIR is one of
  a folder or an uncompressed .tar with train/CLASS, val/CLASS, … or with class folders alone, as data=folder takes it
  a list of files and labels (.csv, .tsv, .txt)
  a folder of images without classes
  a folder or .tar of images with masks: images/train and masks/train, train/images and train/masks, images and masks
  with a classes.txt; ADEChallengeData2016, VOC2012 or Cityscapes
  a folder or .tar of images with boxes: XML of VOC or labelImg, text files of YOLO, or JSON files of COCO
Every image is read once and decoded. Duplicates are images with the same bytes, or the same pixels at a small size: a
copy with other metadata is found, a copy that was compressed again is not. Of masks, values, sizes and each class'
share of the pixels are printed; of boxes, their numbers by class and size, and what was dropped or corrected. Nothing
is written but --report.

examples:
  python -m mnv2_jax.inspect photos/
  python -m mnv2_jax.inspect train.csv --image_root=images --report=photos.html
  python -m mnv2_jax.inspect imagenet/ --limit=0 --json
  python -m mnv2_jax.inspect streets/ --ignored_classes=unlabelled
"""


def main() -> None:
    """Reads the flags, goes through the images once, and prints the tables."""
    parser = Parser("Reports what a folder of images holds: classes, sizes, damaged files and duplicates.", _HELP_AFTER)
    parser.add_argument("path", metavar="DIR", type=os.path.expanduser, help="a folder, a .tar, or a list of files")
    parser.add_argument(
        "--image_root",
        metavar="DIR",
        type=os.path.expanduser,
        help="the folder or .tar that holds the files of a list (default: the folder of the list)",
    )
    parser.add_argument(
        "--limit",
        type=_limit,
        default=LIMIT,
        metavar="N",
        help=f"open at most N images, evenly spread over the data (default: {LIMIT:,}; 0: all)",
    )
    parser.add_argument(
        "--name",
        choices=(*mask_folder.NAMES, *box_folder.NAMES),
        default="folder",
        help="what the folder holds, as data.name (default: its folders tell; VOC2012, with both, is taken for masks)",
    )
    parser.add_argument(
        "--mask_values",
        choices=typing.get_args(typing.get_type_hints(DataConfig)["mask_values"]),
        default=DataConfig.mask_values,
        help="what the values of masks mean, as data.mask_values (default: index)",
    )
    parser.add_argument(
        "--ignored_classes",
        metavar="NAME,NAME",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="classes whose pixels are ignored, as data.ignored_classes",
    )
    parser.add_argument(
        "--report", metavar="FILE.html", type=_page, help="also write a page with some pictures of each class"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object to standard output, and nothing else there"
    )
    args, overrides = parser.parse(sys.argv[1:])
    if overrides:
        raise UserError(f"--config.{overrides[0]}: inspect uses no config; leave it out")
    if not os.path.exists(args.path):
        raise UserError(f"{args.path}: no such file or folder; correct the path")
    data = DataConfig(
        name=args.name,
        path=args.path,
        image_root=args.image_root,
        mask_values=args.mask_values,
        ignored_classes=args.ignored_classes,
    )
    inventory = take_inventory(data)
    total = sum(map(len, inventory.splits.values()))
    with tqdm.tqdm(total=min(total, args.limit or total), unit="image", disable=None, file=sys.stderr) as bar:
        inspection = inspect_images(inventory, args.limit, args.report is not None, bar.update)
    tables, lead = tables_of(inspection), _lead(inspection, args.limit)
    training, training_line = _training_use(dataclasses.replace(data, name=inventory.source))
    if args.report is not None:
        from mnv2_jax.report.inspection import write_inspection  # imports matplotlib, which takes a second

        introduction = f"{lead}. {training_line[0].upper()}{training_line[1:]}"
        write_inspection(args.report, args.path, introduction, inspection, tables)
    if args.json:
        print(json.dumps(jsonable(_tree(args.path, inspection, tables) | {"training": training}), allow_nan=False))
        return
    print(f"{args.path}: {lead}", *inventory.notes, training_line, sep="\n")
    for table in tables:
        print("", *_table_lines(table), sep="\n")
    if args.report is not None:
        print(f"\n{args.report}: the same with pictures")


def _lead(inspection: Inspection, limit: int) -> str:
    """Writes the sentence on the whole folder."""
    names, splits = inspection.inventory.class_names, inspection.inventory.splits
    total, opened = inspection.num_images, len(inspection.findings)
    classes = f" of {_count(len(names), 'class', 'classes')}" if names else " without classes"
    sentence = f"{_count(total, 'image')}{classes} in {_count(len(splits), 'split')} ({', '.join(splits)})"
    if opened < total:
        sentence += f"; {opened:,} of them were opened, evenly spread (--limit={limit}; 0: all)"
    return sentence


def _training_use(data: DataConfig) -> tuple[dict[str, Any], str]:
    """Says which images training and evaluation would use, or why training is impossible: as a tree and as a line."""
    try:
        dataset = open_dataset(data)
        check_trainable(dataset)
    except UserError as error:
        return {"problem": str(error)}, f"can't be used for training as it is: {error}"
    num_train, num_eval = len(dataset.train), len(dataset.eval)
    tree = {"train": num_train, "eval": num_eval, "eval_split": dataset.eval.name}
    notes = "".join(f"; {note}" for note in dataset.notes if note.startswith("no splits"))
    line = f"training uses {_count(num_train, 'image')}, and evaluation {num_eval:,} of {dataset.eval.name}{notes}"
    return tree, line


def _count(count: int, singular: str, plural: str = "") -> str:
    """Writes a number with its noun, as in "1 class" and "2 classes"."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def _tree(path: str, inspection: Inspection, tables: Sequence[Table]) -> dict[str, Any]:
    return {
        "path": path,
        "images": inspection.num_images,
        "looked_at": len(inspection.findings),
        "class_names": inspection.inventory.class_names,
        "splits": {name: len(split) for name, split in inspection.inventory.splits.items()},
        "notes": inspection.inventory.notes,
        "tables": {table.name: [dict(zip(table.head, row, strict=True)) for row in table.rows] for table in tables},
    }


def _table_lines(table: Table) -> list[str]:
    """Formats a table for a terminal: columns of text are aligned to the left, numbers to the right."""
    note = f": {table.note}" if table.note else "" if table.rows else ": none"
    if not table.rows:
        return [f"{table.title}{note}"]
    rows = [table.head, *([_cell(cell) for cell in row] for row in table.rows)]
    num_omitted = len(rows) - 1 - _MAX_ROWS
    if num_omitted > 1:
        rows = [*rows[: _MAX_ROWS + 1]]
    is_text = [isinstance(cell, str) for cell in table.rows[0]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    lines = [
        "  "
        + "  ".join(
            f"{cell:<{width}}" if is_left else f"{cell:>{width}}"
            for cell, width, is_left in zip(row, widths, is_text, strict=True)
        )
        for row in rows
    ]
    more = [f"  … and {num_omitted:,} more, which --json prints"] if num_omitted > 1 else []
    return [f"{table.title}{note}", *(line.rstrip() for line in lines), *more]


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value if len(value) <= _MAX_CELL else f"{value[:_MAX_CELL]}…"
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
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist; make it first")
    return path


if __name__ == "__main__":
    exit_on_user_error(main)
