"""Image folders, on disk or inside an uncompressed tar.

    train/CLASS/**/*.jpg    val/CLASS/**/*.jpg    test/CLASS/**/*.jpg

The three splits may have other usual names (`split.role_of`), and a tar may wrap everything in one folder. ImageNet's
val may be flat, as it is published, with one of the lists of its labels (`prepare.labels`). Class folders without
splits are read as one split. Files without an image's extension, and names that begin with a dot, are left out; a note
counts them.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

import numpy as np

from mnv2_jax.data import imagenet
from mnv2_jax.data.images import EncodedImage, check_readable, is_image
from mnv2_jax.data.prepare.labels import FLAT_NAME, Labels, NoLabelsError
from mnv2_jax.data.split import (
    NO_CLASS,
    Inventory,
    OpenedSplits,
    Rows,
    Split,
    find_split,
    note_unused,
    require_split,
    role_of,
    sha256_of,
    sha256_of_names,
    usual_order,
)
from mnv2_jax.data.tar import read_members
from mnv2_jax.errors import UserError

_LAYOUT = (
    "arrange the images as train/CLASS/*.jpg and val/CLASS/*.jpg (or test/CLASS/*.jpg), or give a list of files and"
    " labels (.csv, .txt)"
)
_HIDDEN = "hidden"
_MOST_KINDS = 6
"""Kinds of files that a note names at most."""


def open_splits(path: str, eval_split: str | None, with_eval: bool = True, with_train: bool = True) -> OpenedSplits:
    """Opens the train split and the split to evaluate.

    Args:
      path: a directory or a .tar file that exists.
      eval_split: the folder to evaluate; None: val, or test where there is no val.
      with_eval: False where the images to evaluate will be taken out of train; the train split is then returned twice.
      with_train: False where nothing is trained. Train then has no images and need not exist; with class folders at the
        top, there need be no splits at all.

    Returns:
      The class names, sorted, and the two splits, whose images are sorted by class and file name. The classes are those
      of train; where nothing is trained, also those of the other split. Class folders at the top are unsplit.

    Raises:
      UserError: if the layout isn't as above, naming what is missing.
    """
    tree = open_tree(path)
    if not with_train:
        return _open_to_evaluate(tree, eval_split)
    if _holds_classes(tree):
        return _open_unsplit(tree, eval_split)
    train = _find_folder(tree, "train")
    held_out = _find_folder(tree, eval_split) if with_eval else train
    listings = {name: _list_split(tree, name) for name in (train, held_out)}
    names = tuple(sorted(listings[train].images))
    splits = {name: _make_split(tree, listing, names) for name, listing in listings.items()}
    notes = note_unused(tree.folders(""), train, held_out if with_eval else None)
    ignored = [file for listing in listings.values() for file in listing.ignored]
    return OpenedSplits(names, splits[train], splits[held_out], (*notes, *left_out(ignored)))


def _open_to_evaluate(tree: Tree, eval_split: str | None) -> OpenedSplits:
    folder_names = tree.folders("")
    is_top = eval_split is None and _holds_classes(tree)
    listing = _list_split(tree, "" if is_top else _find_folder(tree, eval_split))
    train = None if is_top else find_split(tree.path, folder_names, "train")
    names = tuple(sorted({*(tree.folders(train) if train else ()), *listing.images}))
    held_out = _make_split(tree, listing, names)
    notes = () if is_top else note_unused(folder_names, None, listing.name)
    return OpenedSplits(names, held_out.without_images("train"), held_out, (*notes, *left_out(listing.ignored)))


def _open_unsplit(tree: Tree, eval_split: str | None) -> OpenedSplits:
    if eval_split is not None and role_of(eval_split) != "train":
        raise UserError(
            f"{tree.path}: has class folders but no splits, and so no {eval_split}; set data.eval_split to None, which"
            " holds out a share of each class"
        )
    listing = _list_split(tree, "")
    if len(listing.images) == 1:
        (only,) = listing.images
        raise UserError(
            f"{tree.path}: {only}/ is the only folder in it, and would be the only class; if {only}/ holds the classes"
            f" or splits, give {os.path.join(tree.path, only)}, or else a list of files and labels (.csv, .txt)"
        )
    names = tuple(sorted(listing.images))
    whole = _make_split(tree, listing, names)
    return OpenedSplits(names, whole, whole, left_out(listing.ignored), is_unsplit=eval_split is None)


def take_inventory(tree: Tree) -> Inventory:
    """Lists everything that a directory or a tar holds, as one split per folder at the top, or as a single split.

    A class may be missing from some splits, and images outside of class folders have no class. Reads no image.

    Raises:
      UserError: if a folder can't be read, or no image is in the tree.
    """
    folders = tree.folders("")
    tops = folders if folders and not _holds_classes(tree) else [""]
    listings: dict[str, dict[str | None, list[str]]] = {}
    ignored, notes = ([] if tops == [""] else tree.files("")), list[str]()
    for top in usual_order(tops):
        try:
            images, ignored_here = _list_loosely(tree, top)
        except UserError as error:  # the labels of a flat val are missing or wrong
            notes.append(str(error))
            images, ignored_here = {None: [file for file in tree.files(top) if is_taken(file)]}, []
        ignored += ignored_here
        if any(images.values()):
            listings[top] = images
    if not listings:
        only = f", only {_describe_kinds(ignored)}" if ignored else ""
        raise UserError(f"{tree.path}: no image that can be read is in it{only}; give the folder that holds the images")
    names = tuple(sorted({name for images in listings.values() for name in images if name is not None}))
    number: dict[str | None, int] = {name: label for label, name in enumerate(names)} | {None: NO_CLASS}
    splits = {}
    for top, images in listings.items():
        labels = [np.full(len(files), number[name], np.int32) for name, files in images.items()]
        files = [file for group in images.values() for file in group]
        check_readable(files)
        splits[top or base_name(tree)] = tree.split(top or base_name(tree), np.concatenate(labels), files)
    return Inventory(names, splits, tree.path, (*notes, *left_out(ignored)))


def _list_loosely(tree: Tree, top: str) -> tuple[dict[str | None, list[str]], list[str]]:
    """Returns the images in a folder by class (None where there are no class folders), and the other files in it."""
    beside, images, ignored = tree.files(top), dict[str | None, list[str]](), list[str]()
    for folder in tree.folders(top):
        paths = tree.below(posixpath.join(top, folder))
        images[folder] = [path for path in paths if is_taken(path)]
        ignored += [path for path in paths if not is_taken(path)]
    if not images and (flat := [path for path in beside if _is_flat(path)]):
        images.update(_group_by_label(tree, top, flat))
        beside = [path for path in beside if not _is_flat(path)]
    if not any(images.values()):
        images = {None: [path for path in beside if is_taken(path)]}
        beside = [path for path in beside if not is_taken(path)]
    return images, ignored + beside


def class_names(path: str) -> tuple[str, ...]:
    """Returns the sorted class names of the train split; lists its folders and reads no image."""
    tree = open_tree(path)
    name = "" if _holds_classes(tree) else _find_folder(tree, "train")
    return tuple(tree.folders(name)) or tuple(_list_split(tree, name).images)


class Tree(Protocol):
    """A tree of folders and files, on disk or in a tar; paths are relative to the top and have forward slashes."""

    @property
    def path(self) -> str:
        """The path of the directory or of the tar."""
        ...

    @property
    def home(self) -> pathlib.Path:
        """The directory itself, or the folder in which the tar lies."""
        ...

    def folders(self, parent: str) -> list[str]:
        """Returns the sorted names of the folders directly in a folder ("" for the top), without hidden ones."""
        ...

    def files(self, parent: str) -> list[str]:
        """Returns the sorted paths of everything else directly in a folder."""
        ...

    def below(self, parent: str) -> list[str]:
        """Returns the sorted paths of the files anywhere below a folder; a hidden folder counts as one file."""
        ...

    def split(self, name: str, labels: np.ndarray, images: list[str]) -> Split:
        """Returns a split of these images and their labels, int32 [n]."""
        ...

    def content(self, path: str) -> bytes | None:
        """Reads a file that is no image, such as a list; None where there is no such file."""
        ...


def open_tree(path: str) -> Tree:
    """Opens a directory or a tar; reads the table of contents of a tar."""
    return _Directory(path) if os.path.isdir(path) else _Tar(path)


def has_splits(path: str) -> bool:
    """Whether a folder holds splits (folders named like splits, with class folders in them) or ImageNet's flat val."""
    tree = open_tree(path)
    splits = filter(role_of, tree.folders(""))
    return any(tree.folders(name) or any(map(_is_flat, tree.files(name))) for name in splits) or any(
        map(_is_flat, tree.files(""))
    )


def _find_folder(tree: Tree, requested: str | None) -> str:
    return require_split(tree.path, tree.folders(""), requested, _LAYOUT)


def _holds_classes(tree: Tree) -> bool:
    """Whether the folders at the top are classes, not splits; a class may have a split's name, as train beside bus."""

    def holds_images(folder: str) -> bool:
        return any(is_taken(path) and not _is_flat(path) for path in tree.files(folder))

    names = tree.folders("")
    if not names:
        return any(map(_is_flat, tree.files("")))
    split_names = [name for name in names if role_of(name)]
    other_names = (name for name in names if not role_of(name))
    return not split_names or (all(map(holds_images, split_names)) and any(map(holds_images, other_names)))


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The files of a split."""

    name: str
    images: dict[str, list[str]]
    """Sorted paths of the images, by class."""
    ignored: list[str]
    """Paths of the files that are left out."""


_ANNOTATED = ({"images", "masks"}, {"img_dir", "ann_dir"}, {"images", "annotations"}, {"images", "labels"})
"""Names of folders that hold images and their masks or boxes, which nobody means as classes."""


def _check_no_annotations(tree: Tree, name: str, folders: Collection[str]) -> None:
    if set(folders) in _ANNOTATED:
        where = f"{name}/ " if name else ""
        raise UserError(
            f"{tree.path}: {where}holds {' and '.join(sorted(folders))}, which are images and their masks or"
            " boxes and no classes; for a class of each pixel use --config=segment_folder with this path, and"
            " data.name=box_folder for boxes"
        )


def _list_split(tree: Tree, name: str) -> _Listing:
    beside, classes = tree.files(name), tree.folders(name)
    _check_no_annotations(tree, name, classes)
    if not classes and (flat := [path for path in beside if _is_flat(path)]):
        return _Listing(name, _group_by_label(tree, name, flat), [path for path in beside if not _is_flat(path)])
    if not classes:
        raise UserError(f"{tree.path}: {name}/ holds no class folders; {_LAYOUT}")
    images: dict[str, list[str]] = {}
    ignored = list(beside)
    for folder in classes:
        paths = tree.below(posixpath.join(name, folder))
        images[folder] = [path for path in paths if is_taken(path)]
        ignored_here = [path for path in paths if not is_taken(path)]
        if not images[folder]:
            only = f", only {_describe_kinds(ignored_here)}" if ignored_here else ""
            raise UserError(
                f"{tree.path}: class folder {posixpath.join(name, folder)} holds no images that can be read{only}; add"
                " some, or remove the folder"
            )
        check_readable(images[folder])
        ignored += ignored_here
    return _Listing(name, images, ignored)


def _is_flat(path: str) -> bool:
    return is_taken(path) and posixpath.basename(path).startswith(FLAT_NAME)


def _group_by_label(tree: Tree, name: str, images: Collection[str]) -> dict[str, list[str]]:
    """Groups the images of a flat val by their WordNet ids."""
    labels = Labels(tree.home, tree.home / name if name else tree.home.parent)
    by_name = {posixpath.basename(path): path for path in images}
    try:
        groups = labels.group(by_name, pathlib.Path(tree.path, name))
    except NoLabelsError as error:
        raise UserError(f"{error}, or sort the images into class folders") from error
    return {imagenet.class_ids()[label]: [by_name[image] for image in names] for label, names in groups.items()}


def _make_split(tree: Tree, listing: _Listing, class_names: tuple[str, ...]) -> Split:
    number = {name: i for i, name in enumerate(class_names)}
    for name in listing.images:
        if name not in number:
            raise UserError(
                f"{tree.path}: class {name!r} is in {listing.name}/ but not in train, which has {len(number)} classes;"
                f" add it to train, or remove it from {listing.name}/"
            )
    labels = [np.full(len(images), number[name], np.int32) for name, images in listing.images.items()]
    images = [path for group in listing.images.values() for path in group]
    return tree.split(listing.name or base_name(tree), np.concatenate(labels), images)


def base_name(tree: Tree) -> str:
    """Returns the name of the directory or of the tar, which a split without another name has."""
    return os.path.basename(os.path.abspath(tree.path)).removesuffix(".tar")


# --- files that are left out --------------------------------------------------------------------------------


def is_taken(path: str) -> bool:
    """Whether a file has an image's extension and isn't hidden."""
    return not posixpath.basename(path).startswith(".") and is_image(path)


def left_out(paths: Collection[str]) -> tuple[str, ...]:
    """Returns a note, if any, that counts the files that were left out and gives an example."""
    if not paths:
        return ()
    files = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    first = next(iter(_count_kinds(paths)))
    example = min(path for path in paths if _kind(path) == first)
    return (f"left out: {files}: {_describe_kinds(paths)}; as {example}",)


def _describe_kinds(paths: Iterable[str]) -> str:
    """Counts the kinds of files, most frequent first, as in ".heic 2, .txt 1"."""
    counts = _count_kinds(paths)
    more = [f"{len(counts) - _MOST_KINDS} other kinds"] if len(counts) > _MOST_KINDS else []
    return ", ".join([f"{kind} {count:,}" for kind, count in list(counts.items())[:_MOST_KINDS]] + more)


def _count_kinds(paths: Iterable[str]) -> dict[str, int]:
    counts = collections.Counter(map(_kind, paths))
    return dict(sorted(counts.items(), key=lambda item: (item[0] == _HIDDEN, -item[1], item[0])))


def _kind(path: str) -> str:
    name = posixpath.basename(path)
    if name.startswith("."):
        return _HIDDEN
    if is_image(name):
        return "images outside of class folders"
    return posixpath.splitext(name)[1].lower() or "without an extension"


def walk_files(top: str) -> Iterator[str]:
    """Yields the files below a folder; a hidden folder counts as one file.

    Follows links, and goes through each real folder once.

    Raises:
      UserError: for a folder that can't be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); fix its permissions or move it away")

    visited = set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        visited.add(os.path.realpath(folder))
        yield from (os.path.join(folder, name) for name in [*files, *(name for name in folders if name[0] == ".")])
        links = {name: os.path.realpath(os.path.join(folder, name)) for name in folders if name[0] != "."}
        folders[:] = sorted(name for name, real in links.items() if real not in visited)


def find_images(top: str) -> tuple[list[str], list[str]]:
    """Returns the image files below a folder, and the other files; both sorted (`walk_files`, `check_readable`)."""
    paths = sorted(walk_files(top))
    images = [path for path in paths if is_taken(path)]
    check_readable(images)
    return images, [path for path in paths if not is_taken(path)]


# --- on disk ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Directory:
    path: str

    @property
    def home(self) -> pathlib.Path:
        return pathlib.Path(os.path.abspath(self.path))

    def folders(self, parent: str) -> list[str]:
        return [name for name, is_folder in self._entries(parent) if is_folder]

    def files(self, parent: str) -> list[str]:
        return [posixpath.join(parent, name) for name, is_folder in self._entries(parent) if not is_folder]

    def below(self, parent: str) -> list[str]:
        return sorted(os.path.relpath(path, self.path) for path in walk_files(os.path.join(self.path, parent)))

    def _entries(self, parent: str) -> list[tuple[str, bool]]:
        """Returns the names in a folder, each with whether it is a folder that isn't hidden."""
        try:
            with os.scandir(os.path.join(self.path, parent)) as entries:
                return sorted((entry.name, entry.name[0] != "." and entry.is_dir()) for entry in entries)
        except OSError as error:
            raise UserError(
                f"{error.filename}: can't be read ({error.strerror}); fix its permissions or move it away"
            ) from error

    def split(self, name: str, labels: np.ndarray, images: list[str]) -> Split:
        return Split(name, labels, FileReader(self.path, _pack_names(images)))

    def content(self, path: str) -> bytes | None:
        whole = os.path.join(self.path, path)
        try:
            return pathlib.Path(whole).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{whole}: can't be read ({error.strerror}); fix its permissions") from error


@dataclasses.dataclass(frozen=True)
class FileReader:
    """Reads image files by their number."""

    root: str
    names: np.ndarray
    """bytes [n]: paths below the root."""

    def __call__(self, index: int) -> EncodedImage:
        """Reads the file of an image."""
        path = os.path.join(self.root, os.fsdecode(self.names[index]))
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); restore the file and start again") from error
        return EncodedImage(content, path)

    def path_of(self, index: int) -> str:
        """Returns the absolute path of an image's file."""
        return os.path.abspath(os.path.join(self.root, os.fsdecode(self.names[index])))

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns the digest of the file names."""
        return {"names": sha256_of_names(self.names[rows].tolist())}


def _pack_names(names: list[str]) -> np.ndarray:
    """Packs names into one array: a million `str` would cost each worker process seconds and hundreds of megabytes."""
    return np.array([os.fsencode(name) for name in names])


# --- in a tar -----------------------------------------------------------------------------------------------

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}


class _Tar:
    """A tar whose table of contents is read once; images are then read by their offsets."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._place: dict[str, tuple[int, int]] = {}  # file -> its offset and size in bytes
        self._folders: dict[str, set[str]] = {"": set()}  # folder -> the folders directly in it
        members = [(_visible_name(member), member) for member in _read_members(path)]
        named = [(name, member) for name, member in members if name]
        # Folders need no entries of their own. A tar of "imagenette/train/..." has a top folder that means nothing.
        tops = {name.split("/")[0] for name, member in named if ("/" in name or member.isdir()) and name[0] != "."}
        wrapper = next(iter(tops)) + "/" if len(tops) == 1 and not any(map(role_of, tops)) else ""
        within = [(name.removeprefix(wrapper), member) for name, member in named if f"{name}/" != wrapper]
        self._files = sorted({name for name, member in within if self._add(name, member)})

    def _add(self, name: str, member: tarfile.TarInfo) -> bool:
        """Records an entry, and returns whether it counts as a file: it is no folder, or a hidden one."""
        parts = name.split("/")
        is_hidden = parts[-1].startswith(".")
        is_folder = member.isdir() and not is_hidden
        parents = parts if is_folder else parts[:-1]
        for depth, folder in enumerate(parents):
            self._folders.setdefault("/".join(parents[:depth]), set()).add(folder)
        if is_folder:
            return False
        if member.isreg():
            self._place[name] = (member.offset_data, member.size)
        elif is_taken(name):
            raise UserError(
                f"{self.path}: {member.name} is a link, which holds no image data; write the tar again with"
                " tar --dereference --hard-dereference"
            )
        return True

    @property
    def home(self) -> pathlib.Path:
        return pathlib.Path(os.path.abspath(self.path)).parent

    def folders(self, parent: str) -> list[str]:
        return sorted(self._folders.get(parent, ()))

    def files(self, parent: str) -> list[str]:
        return [path for path in self.below(parent) if posixpath.dirname(path) == parent]

    def below(self, parent: str) -> list[str]:
        if not parent:
            return self._files
        start, stop = (bisect.bisect_left(self._files, parent + end) for end in ("/", "0"))  # 0 comes after /
        return self._files[start:stop]

    def split(self, name: str, labels: np.ndarray, images: list[str]) -> Split:
        places = np.array([self._place[image] for image in images], np.int64)
        return Split(name, labels, TarReader(self.path, _pack_names(images), places))

    def content(self, path: str) -> bytes | None:
        if path not in self._place:
            return None
        return _read_part(self.path, *self._place[path])


def _read_members(path: str) -> list[tarfile.TarInfo]:
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        for magic, command in _COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(
                    f"{path}: is compressed, so images can't be read from it at random; decompress the tar ({command}"
                    f" {path}), or unpack it and give the folder"
                )
        return read_members(path)
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{path}: is not a folder, and can't be read as a tar ({error}); correct --config.data.path, or copy the"
            " file again"
        ) from error


def _read_part(path: str, offset: int, size: int) -> bytes:
    try:
        # The tar is opened each time, so that processes and threads share no open file.
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); restore it and start again") from error


def _visible_name(member: tarfile.TarInfo) -> str:
    """Returns an entry's path without "./" and outer slashes, cut behind its first hidden part; "" for the top."""
    name = posixpath.normpath(member.name).strip("/")
    parts = [] if name == "." else name.split("/")
    hidden = next((depth for depth, part in enumerate(parts) if part.startswith(".")), len(parts))
    return "/".join(parts[: hidden + 1])


@dataclasses.dataclass(frozen=True)
class TarReader:
    """Reads images inside a tar by their number, without unpacking it."""

    path: str
    names: np.ndarray
    """bytes [n]: paths inside the tar."""
    places: np.ndarray
    """int64 [n, 2]: offset and size in bytes."""

    def __call__(self, index: int) -> EncodedImage:
        """Reads the file of an image."""
        content = _read_part(self.path, *self.places[index].tolist())
        return EncodedImage(content, f"{self.path}: {os.fsdecode(self.names[index])}")

    def path_of(self, index: int) -> str:
        """Returns the absolute path of the tar, and the path of the image inside."""
        return f"{os.path.abspath(self.path)}: {os.fsdecode(self.names[index])}"

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns the digests of names and sizes; the offsets of the files in the tar don't matter."""
        return {"names": sha256_of_names(self.names[rows].tolist()), "sizes": sha256_of(self.places[rows, 1])}
