"""Lists of image files and their classes, and the images below a folder or inside a tar.

    id,label                    train/cat/1.jpg cat          filename;species;split
    000c1434d8d7,beagle         train\\dog\\7.png dog          IMG_1.JPG;oak;train

A list ends in .csv, .tsv or .txt; its fields are separated by tabs, commas, semicolons, or else by the last space of a
line. Columns are known by the names in a first line (`_NAMES`), or without one by the first file. A file is called by
its path below the image root, or by as much of its end as is its own, with or without its extension. Where lists called
like splits, as train.txt and val.txt, lie in a folder without class folders, each is a split.
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
from mnv2_jax.data.split import NO_CLASS, Inventory, Opened, Split, find_split, in_use, role_of, usual_order
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
"""Names of columns, small and without what isn't a letter, perhaps with an s; the first that is there counts."""
_NAME_THEM = "write a first line that calls them file, label and, where there is one, split"
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def is_list(path: str) -> bool:
    """Whether it is a list, or a folder of lists without class folders."""
    if os.path.isfile(path):
        return path.lower().endswith(ENDINGS)
    return os.path.isdir(path) and bool(_lists_in(path)) and not has_splits(path)


def open_splits(
    path: str, image_root: str | None, eval_split: str | None, with_eval: bool = True, with_train: bool = True
) -> Opened:
    """Opens the train split and the one to evaluate on; reads lists and the names of the images.

    Args:
      path: a list, or a folder of them.
      image_root: the folder or .tar of the images; None: the folder of the list.
      eval_split: of the list's splits; None: val, or test where there is no val.
      with_eval: False where the images to evaluate on will be taken out of train: the train split is given twice.
      with_train: False where nothing is trained: train is without images, and need not be there.

    Returns:
      The class names, those of train, with nothing to train on also those of the other: sorted, numbers by their value.
      The images are sorted by class and file name. A list that says no split, or train alone, is unsplit.

    Raises:
      UserError: naming the list and the line that can't be read, or whose image isn't there.
    """
    listing = _Listing(path, image_root)
    train = None
    if with_train and (train := listing.find("train")) is None:
        raise UserError(f"{path}: {listing.lacks('train')}; nothing can be trained on it")
    is_unsplit = train is not None and with_eval and eval_split is None and listing.splits in ([train], [""])
    held_out = train
    if not is_unsplit and (with_eval or not with_train) and (held_out := listing.find(eval_split)) is None:
        mend = "set data.eval_split to None" if listing.splits == [""] else "choose one by data.eval_split"
        raise UserError(
            f"{path}: {listing.lacks(eval_split)}; {mend}, or hold some of train out by data.holdout_fraction=0.2"
        )
    assert held_out is not None
    needed = [name for name in dict.fromkeys((train, held_out)) if name is not None]
    entries = {name: listing.entries(name) for name in needed}
    names = _class_names(entry.label for name in needed if train in (None, name) for entry in entries[name])
    splits = {name: listing.split(name, entries[name], names) for name in needed}
    notes = listing.notes(entries)
    if not is_unsplit:
        notes = (*in_use(listing.splits, train, held_out if with_eval or train is None else None), *notes)
    evaluated = splits[held_out]
    trained = evaluated.nothing("train") if train is None else splits[train]
    return Opened(names, trained, evaluated, notes, is_unsplit)


def take_inventory(path: str, image_root: str | None) -> Inventory:
    """All splits of a list or a folder of them, without the images that aren't there, which are counted in a note.

    Raises:
      UserError: naming the list and the line that can't be read, or if none of its images is there.
    """
    listing = _Listing(path, image_root, loosely=True)
    entries = {name: found for name in listing.splits if (found := listing.entries(name))}
    if not entries:
        raise UserError(
            f"{path}: none of its images is below {listing.root}; say where they are by data.image_root=DIR"
        )
    names = _class_names(entry.label for found in entries.values() for entry in found if entry.label)
    splits = {name or "all": listing.split(name or "all", found, names) for name, found in entries.items()}
    return Inventory(names, splits, listing.root, listing.notes(entries))


def class_names(path: str) -> tuple[str, ...]:
    """The class names of the train split; looks at no image."""
    listing = _Listing(path, None)
    train = listing.find("train")
    if train is None:
        raise UserError(f"{path}: {listing.lacks('train')}; nothing can be trained on it")
    return _class_names(row.label for row in listing.rows(train))


class _Row(NamedTuple):
    """A line of a list."""

    place: str
    """The list and the number of the line, for errors."""
    file: str
    label: str
    """"" in a list without labels."""
    split: str


class _Entry(NamedTuple):
    """An image of a split."""

    path: str
    """Below the image root."""
    label: str
    place: str


class _Listing:
    """Lists, read when they are asked for, and the files below the image root."""

    def __init__(self, path: str, image_root: str | None, loosely: bool = False) -> None:
        """Names the splits.

        Args:
          path: a list, or a folder of them.
          image_root: as in `open_splits`.
          loosely: whether labels and images may lack; the images are left out and counted.
        """
        self.path, self._loosely = path, loosely
        self.root = image_root or (path if os.path.isdir(path) else os.path.dirname(path) or ".")
        self._missing: list[_Row] = []
        self._twice = self._leaks = 0
        self._files: _Files | None = None
        self._rows: dict[str, list[_Row]] = {}
        self._lists = _lists_in(path) if os.path.isdir(path) else {}
        if not self._lists:
            for row in _read(path, loosely):
                self._rows.setdefault(row.split, []).append(row)
        self.splits = usual_order(self._lists or self._rows)

    def find(self, wanted: str | None) -> str | None:
        """The split that is meant; a list that says none is whatever is asked for of it, but for a name."""
        if self.splits == [""]:
            return "" if wanted is None or role_of(wanted) == "train" else None
        return find_split(self.path, self.splits, wanted)

    def lacks(self, wanted: str | None) -> str:
        """Says that a split isn't there, and which are."""
        if self.splits == [""]:
            return f"it has no column of splits, and so no {wanted}"
        return f"no {wanted or 'val nor test'} in it, only {', '.join(self.splits[:8])}"

    def rows(self, split: str) -> list[_Row]:
        """The lines of a split."""
        if split not in self._rows:
            try:
                self._rows[split] = list(_read(self._lists[split], self._loosely))
            except UserError as error:
                train = find_split(self.path, self.splits, "train")
                if train in (None, split):
                    raise
                raise UserError(f"{error}; or give the list to train on alone, {self._lists[str(train)]}") from error
        return self._rows[split]

    def entries(self, split: str) -> list[_Entry]:
        """The images of a split, each once.

        Raises:
          UserError: if one isn't there or could be several, or has two labels.
        """
        self._files = self._files or _Files(self.root)
        found: dict[str, _Entry] = {}
        missing = []
        for row in self.rows(split):
            if (path := self._files.find(row)) is None:
                missing.append(row)
                continue
            before = found.setdefault(path, _Entry(path, row.label, row.place))
            if before.label != row.label:
                raise UserError(
                    f"{row.place}: {row.file!r} is {row.label!r}, and {before.label!r} in {before.place}; give each"
                    " image one class"
                )
            self._twice += before.place != row.place
        if missing and not self._loosely:
            more = f", nor are {len(missing) - 1:,} more of {len(self.rows(split)):,}" if len(missing) > 1 else ""
            raise UserError(
                f"{missing[0].place}: {missing[0].file!r} is not below {self.root}{more}; copy it there, or say where"
                " the images are by data.image_root=DIR"
            )
        self._missing += missing
        return list(found.values())

    def split(self, name: str, entries: Sequence[_Entry], class_names: Sequence[str]) -> Split:
        """A split of some images."""
        number = {name: label for label, name in enumerate(class_names)} | ({"": NO_CLASS} if self._loosely else {})
        for entry in entries:
            if entry.label not in number:
                raise UserError(
                    f"{entry.place}: class {entry.label!r} is in {name} but not in train, which has"
                    f" {len(class_names)} classes; add it there, or remove it here"
                )
        ordered = sorted((number[entry.label], entry.path) for entry in entries)
        labels = np.array([label for label, _ in ordered], np.int32)
        paths = [path for _, path in ordered]
        check_readable(paths)
        assert self._files is not None
        return self._files.tree.split(name or _stem(self.path), labels, paths)

    def notes(self, entries: Mapping[str, Sequence[_Entry]]) -> tuple[str, ...]:
        """Notes on the list, a line each."""
        notes = []
        if self._missing:
            first = self._missing[0]
            notes.append(f"listed but not below {self.root}: {_images(len(self._missing))}, as {first.file!r}")
        if self._twice:
            notes.append(f"listed twice in a split, and taken once: {_images(self._twice)}")
        times = collections.Counter(entry.path for some in entries.values() for entry in some)
        if several := [path for path, count in times.items() if count > 1]:
            notes.append(f"listed in several splits: {_images(len(several))}, as {several[0]}")
        assert self._files is not None
        if len(entries) == len(self.splits) and (rest := self._files.taken - times.keys()):
            notes.append(f"not in the list: {_images(len(rest))}, as {min(rest)}")
        return tuple(notes)


class _Files:
    """The images below a folder or in a tar, by every end of their paths that is asked for."""

    def __init__(self, root: str) -> None:
        if not os.path.exists(root):
            raise UserError(f"data.image_root={root!r}: no such file or folder; correct it")
        self._root = root
        self.tree: Tree = open_tree(root)
        self.taken = {path for path in self.tree.below("") if is_taken(path)}
        self._by_name: dict[str, list[str]] = {}
        for path in self.taken:
            name = posixpath.basename(path)
            for key in {name, posixpath.splitext(name)[0]}:
                self._by_name.setdefault(key, []).append(path)

    def find(self, row: _Row) -> str | None:
        """The path of a line's image; None where there is no such image.

        Raises:
          UserError: if there are several.
        """
        for given in dict.fromkeys((row.file, row.file.replace("\\", "/"))):
            name = posixpath.normpath(given).removeprefix(f"{os.path.abspath(self._root)}/")
            if name in self.taken:
                return name
            end = name.lstrip("/")
            same = self._by_name.get(posixpath.basename(end), ())
            ends = [path for path in same if _ends_with(path, end) or _ends_with(posixpath.splitext(path)[0], end)]
            exact = [path for path in ends if end in (path, posixpath.splitext(path)[0])]
            if len(ends) > 1 and len(exact) != 1:
                one, other = sorted(ends)[:2]
                raise UserError(
                    f"{row.place}: {row.file!r} could be {one} or {other}; write more of the path, or give the folder"
                    " by data.image_root"
                )
            if ends:
                return (exact or ends)[0]
            if os.path.isdir(self._root) and is_image(name) and os.path.isfile(os.path.join(self._root, name)):
                return os.path.abspath(os.path.join(self._root, name))  # of a folder it may also lie elsewhere
        return None


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _ends_with(path: str, end: str) -> bool:
    return path == end or path.endswith(f"/{end}")


def _stem(path: str) -> str:
    return posixpath.splitext(os.path.basename(os.path.abspath(path)))[0]


def _lists_in(folder: str) -> dict[str, str]:
    """The lists in a folder that are called like splits, by the names of these."""
    found: dict[str, str] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}  # who reads it says so
    for name in names:
        stem, ending = posixpath.splitext(name)
        if ending.lower() in ENDINGS and role_of(stem) is not None and os.path.isfile(os.path.join(folder, name)):
            if stem in found:
                raise UserError(
                    f"{folder}: {os.path.basename(found[stem])} and {name} could each be the list; give one"
                )
            found[stem] = os.path.join(folder, name)
    return found


def _class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Sorted: numbers by their value, others as text."""
    names = set(labels)
    return tuple(sorted(names, key=int) if all(map(str.isdecimal, names)) else sorted(names))


# --- the text -------------------------------------------------------------------------------------------------


def _read(path: str, loosely: bool) -> Iterable[_Row]:
    """The lines of a list with their columns."""
    lines = _fields(path, read_text(path), loosely)
    columns, is_header = _columns(path, [fields for _, fields in lines], loosely)
    lines = lines[is_header:]
    if not lines:
        raise UserError(f"{path}: no line with an image; write one for each")
    said = {kind: [fields[column] for _, fields in lines] for kind, column in columns.items()}
    for kind, cells in said.items():
        if "" in cells and not (loosely and kind == "label"):
            raise UserError(f"{path}, line {lines[cells.index('')][0]}: no {kind} in it; give it one, or remove it")
    labels, splits = said.get("label"), said.get("split")
    if labels is not None:
        labels = _whole_numbers(path, [number for number, _ in lines], labels)
    for row, (number, _) in enumerate(lines):
        yield _Row(
            f"{path}, line {number}", said["file"][row], labels[row] if labels else "", splits[row] if splits else ""
        )


def _fields(path: str, text: str, loosely: bool) -> list[tuple[int, list[str]]]:
    """The fields of each line that isn't empty, with its number."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    candidates: list[list[tuple[int, list[str]]]] = []
    for delimiter in filter(first.__contains__, _DELIMITERS):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: can't be read ({error}); mend it") from error
        candidates.append([(number, row) for number, row in rows if any(row)])
    spaced = [(number, line.rsplit(None, 1)) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    candidates.append(spaced)
    for lines in candidates:
        if len({len(fields) for _, fields in lines}) == 1 and (loosely or len(lines[0][1]) > 1):
            return lines
    lines = candidates[0]
    if not lines:
        raise UserError(f"{path}: the list is empty; write a line with file and label for each image")
    width = len(lines[0][1])
    odd, fields = next(((number, row) for number, row in lines if len(row) != width), lines[0])
    reason = f"{len(fields)} fields where line {lines[0][0]} has {width}" if len(fields) != width else "one field"
    raise UserError(f"{path}, line {odd}: {reason}; write a file and a label a line, as in photos/1.jpg,cat")


def _columns(path: str, rows: Sequence[Sequence[str]], loosely: bool) -> tuple[dict[str, int], bool]:
    """Which column is the file, the label and the split, and whether the first line says so."""
    first, rest = rows[0], rows[1:]
    found = {kind: place for kind, names in _NAMES.items() if (place := _place(first, names)) is not None}
    # Of a first line that is none of an image: where files and numbers follow, it names the columns, by whatever words.
    followed = any(
        all(test(row[place]) for row in rest) and not test(first[place])
        for place in range(len(first))
        for test in (is_image, lambda cell: _NUMBER.fullmatch(cell) is not None)
    )
    is_header = not any(map(is_image, first)) and bool("file" in found or "label" in found or (rest and followed))
    if not is_header:
        found = {}
    body = rest if is_header else rows
    others = [place for place in range(len(first)) if place not in found.values()]
    if "split" not in found and not is_header:
        splits = (place for place in others if all(role_of(row[place]) for row in body))
        if (place := next(splits, None)) is not None and len(others) > 2:
            found["split"] = place
            others.remove(place)
    if "file" not in found:
        files = [place for place in others if body and all(is_image(row[place]) for row in body)]
        if files or len(others) == 1 + ("label" not in found):
            found["file"] = (files or others)[0]
            others.remove(found["file"])
    if "label" not in found and len(others) == 1:
        found["label"] = others[0]
    if "file" not in found or ("label" not in found and not loosely):
        named = f"columns {', '.join(map(repr, first))}" if is_header else f"{len(first)} columns without names"
        lacking = "image file" if "file" not in found else "label"
        raise UserError(f"{path}: of its {named} none is known for the {lacking}; {_NAME_THEM}")
    return found, is_header


def _place(cells: Sequence[str], names: Collection[str]) -> int | None:
    """Which cell is one of some names, the earlier the better."""
    plain = [re.sub(r"[^a-z]", "", cell.lower()) for cell in cells]
    called = [{word, word.removesuffix("s"), word.removesuffix("es")} for word in plain]
    return next((place for name in names for place, words in enumerate(called) if name in words), None)


def _whole_numbers(path: str, numbers: Sequence[int], labels: list[str]) -> list[str]:
    """Labels as they stand; where all are numbers, as whole ones without zeros in front, and 1.0 as 1."""
    if not all(_NUMBER.fullmatch(label) for label in set(labels) - {""}):
        return labels
    for label in filter(None, dict.fromkeys(labels)):
        if not float(label).is_integer() or float(label) < 0:
            raise UserError(
                f"{path}, line {numbers[labels.index(label)]}: {label} is not the number of a class; give names, or"
                " whole numbers from 0 up"
            )
    return [str(int(label) if label.isdecimal() else int(float(label))) if label else "" for label in labels]
