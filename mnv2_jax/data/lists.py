"""Lists of image files and their classes, and the images below a folder or inside a tar.

    id,label                    train/cat/1.jpg cat          filename;species;split
    000c1434d8d7,beagle         train\\dog\\7.png dog          IMG_1.JPG;oak;train

A list ends in .csv, .tsv or .txt; its fields are separated by tabs, commas, semicolons, or else by the last space of a
line. The first line may name the columns (`_NAMES`); without one, they are recognised by their content. A file is given
by its path below the image root, or by the end of that path where it is unique, with or without the extension. Lists
that are named like splits, as train.txt and val.txt, and lie in a folder without class folders are the splits.
"""

from __future__ import annotations

import collections
import csv
import io
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mnv2_jax.data.folder import Tree, has_splits, is_taken, open_tree
from mnv2_jax.data.images import check_readable, is_image
from mnv2_jax.data.split import NO_CLASS, Inventory, OpenedSplits, Split, find_split, note_unused, role_of, usual_order
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import read_text

ENDINGS = (".csv", ".tsv", ".txt")
_DELIMITERS = "\t,;"
_NAMES: Mapping[str, tuple[str, ...]] = {
    "file": (
        *("filepath", "imagepath", "imgpath", "path", "filename", "imagename", "imgname", "file", "image", "img"),
        *("imageid", "imgid", "id", "name"),
    ),
    "label": (
        *("labelname", "classname", "categoryname", "label", "class", "category", "target"),
        *("labelid", "classid", "categoryid", "labelindex", "classindex"),
    ),
    "split": ("split", "dataset", "subset", "set", "partition"),
}
"""Names of columns in lower case and letters only; a plural s is allowed, and an earlier name takes precedence."""
_NAME_THEM = "write a first line that names the columns file, label and, if there is one, split"
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def is_list(path: str) -> bool:
    """Whether a path is a list, or a folder of lists without class folders."""
    if os.path.isfile(path):
        return path.lower().endswith(ENDINGS)
    return os.path.isdir(path) and bool(_lists_in(path)) and not has_splits(path)


def open_splits(
    path: str, image_root: str | None, eval_split: str | None, with_eval: bool = True, with_train: bool = True
) -> OpenedSplits:
    """Opens the train split and the split to evaluate; reads lists and the names of the images.

    Args:
      path: a list, or a folder of lists.
      image_root: the folder or .tar of the images; None: the folder of the list.
      eval_split: the split to evaluate; None: val, or test where there is no val.
      with_eval: False where the images to evaluate will be taken out of train; the train split is then returned twice.
      with_train: False where nothing is trained; train then has no images and need not exist.

    Returns:
      The class names and the two splits. The classes are those of train, and also those of the other split where
      nothing is trained; they are sorted, numbers by their value. The images are sorted by class and file name. A list
      without a column of splits, or with a train split only, is unsplit.

    Raises:
      UserError: naming the list and the line that can't be read or whose image doesn't exist.
    """
    listing = _Listing(path, image_root)
    train = None
    if with_train and (train := listing.find("train")) is None:
        raise UserError(f"{path}: {listing.describe_missing('train')}; nothing can be trained on it")
    is_unsplit = train is not None and with_eval and eval_split is None and listing.splits in ([train], [""])
    held_out = train
    if not is_unsplit and (with_eval or not with_train) and (held_out := listing.find(eval_split)) is None:
        advice = "set data.eval_split to None" if listing.splits == [""] else "choose one with data.eval_split"
        raise UserError(
            f"{path}: {listing.describe_missing(eval_split)}; {advice}, or hold out a share of train with"
            " data.holdout_fraction=0.2"
        )
    assert held_out is not None
    needed = [name for name in dict.fromkeys((train, held_out)) if name is not None]
    entries = {name: listing.entries(name) for name in needed}
    names = _class_names(entry.label for name in needed if train in (None, name) for entry in entries[name])
    splits = {name: listing.split(name, entries[name], names) for name in needed}
    notes = listing.notes(entries)
    if not is_unsplit:
        notes = (*note_unused(listing.splits, train, held_out if with_eval or train is None else None), *notes)
    evaluated = splits[held_out]
    trained = evaluated.without_images("train") if train is None else splits[train]
    return OpenedSplits(names, trained, evaluated, notes, is_unsplit)


def take_inventory(path: str, image_root: str | None) -> Inventory:
    """Lists all splits of a list or of a folder of lists. Images that don't exist are left out; a note counts them.

    Raises:
      UserError: naming the list and the line that can't be read, or if none of its images exists.
    """
    listing = _Listing(path, image_root, is_lenient=True)
    entries = {name: group for name in listing.splits if (group := listing.entries(name))}
    if not entries:
        raise UserError(f"{path}: none of its images is below {listing.root}; set data.image_root=DIR to their folder")
    names = _class_names(entry.label for group in entries.values() for entry in group if entry.label)
    splits = {name or "all": listing.split(name or "all", group, names) for name, group in entries.items()}
    return Inventory(names, splits, listing.root, listing.notes(entries))


def class_names(path: str) -> tuple[str, ...]:
    """Returns the class names of the train split; looks for no image."""
    listing = _Listing(path, None)
    train = listing.find("train")
    if train is None:
        raise UserError(f"{path}: {listing.describe_missing('train')}; nothing can be trained on it")
    return _class_names(row.label for row in listing.rows(train))


class _Row(NamedTuple):
    """A line of a list."""

    place: str
    """The path of the list and the number of the line, for errors."""
    file: str
    label: str
    """The label; "" in a list without labels."""
    split: str


class _Entry(NamedTuple):
    """An image of a split."""

    path: str
    """Its path below the image root."""
    label: str
    place: str


class _Listing:
    """The lists, each read when it is first needed, and the files below the image root."""

    def __init__(self, path: str, image_root: str | None, is_lenient: bool = False) -> None:
        """Finds the names of the splits.

        Args:
          path: a list, or a folder of lists.
          image_root: as in `open_splits`.
          is_lenient: whether labels and images may be missing; such images are left out and counted.
        """
        self.path, self._is_lenient = path, is_lenient
        self.root = image_root or (path if os.path.isdir(path) else os.path.dirname(path) or ".")
        self._missing: list[_Row] = []
        self._twice = self._leaks = 0
        self._files: _Files | None = None
        self._rows: dict[str, list[_Row]] = {}
        self._lists = _lists_in(path) if os.path.isdir(path) else {}
        if not self._lists:
            for row in _read(path, is_lenient):
                self._rows.setdefault(row.split, []).append(row)
        self.splits = usual_order(self._lists or self._rows)

    def find(self, requested: str | None) -> str | None:
        """Finds a split; a list without a column of splits is its own train split, and the default to evaluate."""
        if self.splits == [""]:
            return "" if requested is None or role_of(requested) == "train" else None
        return find_split(self.path, self.splits, requested)

    def describe_missing(self, requested: str | None) -> str:
        """Says that a split doesn't exist, and which splits do."""
        if self.splits == [""]:
            return f"it has no column of splits, and so no {requested}"
        return f"no {requested or 'val nor test'} in it, only {', '.join(self.splits[:8])}"

    def rows(self, split: str) -> list[_Row]:
        """Returns the lines of a split."""
        if split not in self._rows:
            try:
                self._rows[split] = list(_read(self._lists[split], self._is_lenient))
            except UserError as error:
                train = find_split(self.path, self.splits, "train")
                if train in (None, split):
                    raise
                raise UserError(f"{error}; or give only the list to train on, {self._lists[str(train)]}") from error
        return self._rows[split]

    def entries(self, split: str) -> list[_Entry]:
        """Returns the images of a split, each once.

        Raises:
          UserError: if an image doesn't exist, is ambiguous, or has two labels.
        """
        self._files = self._files or _Files(self.root)
        entries: dict[str, _Entry] = {}
        missing = []
        for row in self.rows(split):
            if (path := self._files.find(row)) is None:
                missing.append(row)
                continue
            first = entries.setdefault(path, _Entry(path, row.label, row.place))
            if first.label != row.label:
                raise UserError(
                    f"{row.place}: {row.file!r} is {row.label!r}, and {first.label!r} in {first.place}; give each image"
                    " one class"
                )
            self._twice += first.place != row.place
        if missing and not self._is_lenient:
            more = f", nor are {len(missing) - 1:,} more of {len(self.rows(split)):,}" if len(missing) > 1 else ""
            raise UserError(
                f"{missing[0].place}: {missing[0].file!r} is not below {self.root}{more}; copy it there, or set"
                " data.image_root=DIR to the folder of the images"
            )
        self._missing += missing
        return list(entries.values())

    def split(self, name: str, entries: Sequence[_Entry], class_names: Sequence[str]) -> Split:
        """Makes a split of some images."""
        number = {name: label for label, name in enumerate(class_names)} | ({"": NO_CLASS} if self._is_lenient else {})
        for entry in entries:
            if entry.label not in number:
                raise UserError(
                    f"{entry.place}: class {entry.label!r} is in {name} but not in train, which has"
                    f" {len(class_names)} classes; add it to train, or remove it from {name}"
                )
        ordered = sorted((number[entry.label], entry.path) for entry in entries)
        labels = np.array([label for label, _ in ordered], np.int32)
        paths = [path for _, path in ordered]
        check_readable(paths)
        assert self._files is not None
        return self._files.tree.split(name or _stem(self.path), labels, paths)

    def notes(self, entries: Mapping[str, Sequence[_Entry]]) -> tuple[str, ...]:
        """Returns notes on the list, one line each."""
        notes = []
        if self._missing:
            first = self._missing[0]
            notes.append(f"listed but not below {self.root}: {_count_images(len(self._missing))}, as {first.file!r}")
        if self._twice:
            notes.append(f"listed twice in a split, and used once: {_count_images(self._twice)}")
        times = collections.Counter(entry.path for group in entries.values() for entry in group)
        if repeated := [path for path, count in times.items() if count > 1]:
            notes.append(f"listed in several splits: {_count_images(len(repeated))}, as {repeated[0]}")
        assert self._files is not None
        if len(entries) == len(self.splits) and (unlisted := self._files.images - times.keys()):
            notes.append(f"not in the list: {_count_images(len(unlisted))}, as {min(unlisted)}")
        return tuple(notes)


class _Files:
    """The images below a folder or in a tar, which can be looked up by any end of their paths."""

    def __init__(self, root: str) -> None:
        if not os.path.exists(root):
            raise UserError(f"data.image_root={root!r}: no such file or folder; correct the path")
        self._root = root
        self.tree: Tree = open_tree(root)
        self.images = {path for path in self.tree.below("") if is_taken(path)}
        self._by_name: dict[str, list[str]] = {}
        for path in self.images:
            name = posixpath.basename(path)
            for key in {name, posixpath.splitext(name)[0]}:
                self._by_name.setdefault(key, []).append(path)

    def find(self, row: _Row) -> str | None:
        """Returns the path of a line's image; None where there is no such image.

        Raises:
          UserError: if several images match.
        """
        for spelling in dict.fromkeys((row.file, row.file.replace("\\", "/"))):
            name = posixpath.normpath(spelling).removeprefix(f"{os.path.abspath(self._root)}/")
            if name in self.images:
                return name
            end = name.lstrip("/")
            namesakes = self._by_name.get(posixpath.basename(end), ())
            matches = [
                path for path in namesakes if _ends_with(path, end) or _ends_with(posixpath.splitext(path)[0], end)
            ]
            exact = [path for path in matches if end in (path, posixpath.splitext(path)[0])]
            if len(matches) > 1 and len(exact) != 1:
                one, other = sorted(matches)[:2]
                raise UserError(
                    f"{row.place}: {row.file!r} could be {one} or {other}; write more of the path, or set"
                    " data.image_root to the folder"
                )
            if matches:
                return (exact or matches)[0]
            # A path may lead out of the root, as ../more/1.jpg does, where the root is a folder.
            if os.path.isdir(self._root) and is_image(name) and os.path.isfile(os.path.join(self._root, name)):
                return os.path.abspath(os.path.join(self._root, name))
        return None


def _count_images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _ends_with(path: str, end: str) -> bool:
    return path == end or path.endswith(f"/{end}")


def _stem(path: str) -> str:
    return posixpath.splitext(os.path.basename(os.path.abspath(path)))[0]


def _lists_in(folder: str) -> dict[str, str]:
    """Returns the lists in a folder that are named like splits, by the names of the splits."""
    lists: dict[str, str] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}  # the error is raised where the folder is read
    for name in names:
        stem, ending = posixpath.splitext(name)
        if ending.lower() in ENDINGS and role_of(stem) is not None and os.path.isfile(os.path.join(folder, name)):
            if stem in lists:
                raise UserError(
                    f"{folder}: {os.path.basename(lists[stem])} and {name} could each be the list of {stem}; give one"
                )
            lists[stem] = os.path.join(folder, name)
    return lists


def _class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Returns the different labels, sorted by their value where all are numbers, else as text."""
    names = set(labels)
    return tuple(sorted(names, key=int) if all(map(str.isdecimal, names)) else sorted(names))


# --- the text -------------------------------------------------------------------------------------------------


def _read(path: str, is_lenient: bool) -> Iterable[_Row]:
    """Reads the lines of a list, each as a file, a label and a split."""
    lines = _fields(path, read_text(path), is_lenient)
    columns, is_header = _columns(path, [fields for _, fields in lines], is_lenient)
    lines = lines[is_header:]
    if not lines:
        raise UserError(f"{path}: no line with an image; write one line for each image")
    cells_by_kind = {kind: [fields[column] for _, fields in lines] for kind, column in columns.items()}
    for kind, cells in cells_by_kind.items():
        if "" in cells and not (is_lenient and kind == "label"):
            raise UserError(
                f"{path}, line {lines[cells.index('')][0]}: no {kind} in it; add the {kind}, or remove the line"
            )
    labels, splits = cells_by_kind.get("label"), cells_by_kind.get("split")
    if labels is not None:
        labels = _whole_numbers(path, [number for number, _ in lines], labels)
    for row, (number, _) in enumerate(lines):
        yield _Row(
            f"{path}, line {number}",
            cells_by_kind["file"][row],
            labels[row] if labels else "",
            splits[row] if splits else "",
        )


def _fields(path: str, text: str, is_lenient: bool) -> list[tuple[int, list[str]]]:
    """Splits each line that isn't empty into its fields; returns them with the number of the line."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    candidates: list[list[tuple[int, list[str]]]] = []
    for delimiter in filter(first.__contains__, _DELIMITERS):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: can't be read ({error}); correct it") from error
        candidates.append([(number, row) for number, row in rows if any(row)])
    spaced = [(number, line.rsplit(None, 1)) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    candidates.append(spaced)
    for lines in candidates:
        if len({len(fields) for _, fields in lines}) == 1 and (is_lenient or len(lines[0][1]) > 1):
            return lines
    lines = candidates[0]
    if not lines:
        raise UserError(f"{path}: the list is empty; write a line with a file and a label for each image")
    width = len(lines[0][1])
    odd, fields = next(((number, row) for number, row in lines if len(row) != width), lines[0])
    reason = f"{len(fields)} fields where line {lines[0][0]} has {width}" if len(fields) != width else "only one field"
    raise UserError(f"{path}, line {odd}: {reason}; write a file and a label in each line, as in photos/1.jpg,cat")


def _columns(path: str, rows: Sequence[Sequence[str]], is_lenient: bool) -> tuple[dict[str, int], bool]:
    """Finds the columns of the file, the label and the split, and returns them with whether the first line is a header.

    A first line without an image's name is a header if it has one of the `_NAMES`, or if a column holds only image
    files, or only numbers, below another word.
    """
    first, body = rows[0], rows[1:]
    columns = {kind: place for kind, names in _NAMES.items() if (place := _place(first, names)) is not None}
    differs_below = any(
        all(test(row[place]) for row in body) and not test(first[place])
        for place in range(len(first))
        for test in (is_image, lambda cell: _NUMBER.fullmatch(cell) is not None)
    )
    is_header = not any(map(is_image, first)) and bool(
        "file" in columns or "label" in columns or (body and differs_below)
    )
    if not is_header:
        columns, body = {}, rows
    unassigned = [place for place in range(len(first)) if place not in columns.values()]
    if "split" not in columns and not is_header:
        splits = (place for place in unassigned if all(role_of(row[place]) for row in body))
        if (place := next(splits, None)) is not None and len(unassigned) > 2:
            columns["split"] = place
            unassigned.remove(place)
    if "file" not in columns:
        files = [place for place in unassigned if body and all(is_image(row[place]) for row in body)]
        if files or len(unassigned) == 1 + ("label" not in columns):
            columns["file"] = (files or unassigned)[0]
            unassigned.remove(columns["file"])
    if "label" not in columns and len(unassigned) == 1:
        columns["label"] = unassigned[0]
    if "file" not in columns or ("label" not in columns and not is_lenient):
        described = f"columns {', '.join(map(repr, first))}" if is_header else f"{len(first)} columns without names"
        missing = "image file" if "file" not in columns else "label"
        raise UserError(f"{path}: none of its {described} is recognised as the {missing}; {_NAME_THEM}")
    return columns, is_header


def _place(cells: Sequence[str], names: Collection[str]) -> int | None:
    """Returns the number of the cell that holds one of the names; earlier names take precedence."""
    plain = [re.sub(r"[^a-z]", "", cell.lower()) for cell in cells]
    singulars = [{word, word.removesuffix("s"), word.removesuffix("es")} for word in plain]
    return next((place for name in names for place, words in enumerate(singulars) if name in words), None)


def _whole_numbers(path: str, numbers: Sequence[int], labels: list[str]) -> list[str]:
    """Returns labels as they are, or, where all are numbers, as whole numbers: 1.0 and 01 become 1."""
    if not all(_NUMBER.fullmatch(label) for label in set(labels) - {""}):
        return labels
    for label in filter(None, dict.fromkeys(labels)):
        if not float(label).is_integer() or float(label) < 0:
            raise UserError(
                f"{path}, line {numbers[labels.index(label)]}: {label} is not the number of a class; give the names"
                " of classes, or whole numbers from 0 up"
            )
    return [str(int(label) if label.isdecimal() else int(float(label))) if label else "" for label in labels]
