"""Image folders, on disk or inside an uncompressed tar.

    train/CLASS/**/*.jpg    val/CLASS/**/*.jpg    test/CLASS/**/*.jpg

The three may be called otherwise (`split.role_of`), and a tar may wrap all in one folder. ImageNet's val may be flat,
as it is published, with one of the lists of its labels (`prepare.labels`). A folder of class folders without splits is
one. What isn't called like an image, and what begins with a dot, is left out, and named.
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
    Opened,
    Rows,
    Split,
    find_split,
    in_use,
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
_KINDS = 6
"""Most kinds of files that a note names."""


def open_splits(path: str, eval_split: str | None, with_eval: bool = True, with_train: bool = True) -> Opened:
    """Opens the train split and the one to evaluate on.

    Args:
      path: a directory or a .tar file that exists.
      eval_split: the folder to evaluate on; None: val, or test where there is no val.
      with_eval: False where the images to evaluate on will be taken out of train: the train split is given twice.
      with_train: False where nothing is trained: train is without images and need not be there, nor any split, where
        class folders lie at the top.

    Returns:
      The class names, sorted, and the two splits, whose images are sorted by class and file name. The classes are
      those of train, with nothing to train on also those of the other. Class folders at the top are unsplit.

    Raises:
      UserError: if the layout isn't as above, naming what is missing.
    """
    tree = open_tree(path)
    if not with_train:
        return _open_to_evaluate(tree, eval_split)
    if _holds_classes(tree):
        return _open_unsplit(tree, eval_split)
    train = _find(tree, "train")
    held_out = _find(tree, eval_split) if with_eval else train
    read = {name: _read(tree, name) for name in (train, held_out)}
    names = tuple(sorted(read[train].images))
    splits = {name: _split(tree, listing, names) for name, listing in read.items()}
    used = in_use(tree.folders(""), train, held_out if with_eval else None)
    others = [file for listing in read.values() for file in listing.others]
    return Opened(names, splits[train], splits[held_out], (*used, *left_out(others)))


def _open_to_evaluate(tree: Tree, eval_split: str | None) -> Opened:
    there = tree.folders("")
    is_top = eval_split is None and _holds_classes(tree)
    listing = _read(tree, "" if is_top else _find(tree, eval_split))
    train = None if is_top else find_split(tree.path, there, "train")
    names = tuple(sorted({*(tree.folders(train) if train else ()), *listing.images}))
    held_out = _split(tree, listing, names)
    used = () if is_top else in_use(there, None, listing.name)
    return Opened(names, held_out.nothing("train"), held_out, (*used, *left_out(listing.others)))


def _open_unsplit(tree: Tree, eval_split: str | None) -> Opened:
    if eval_split is not None and role_of(eval_split) != "train":
        raise UserError(
            f"{tree.path}: class folders without splits, and so no {eval_split}; set data.eval_split to None, and a"
            " share of each class is held out"
        )
    listing = _read(tree, "")
    if len(listing.images) == 1:
        (only,) = listing.images
        raise UserError(
            f"{tree.path}: only {only}/ in it, which would be the only class; give {os.path.join(tree.path, only)} if"
            " classes or splits are in there, or a list of files and labels (.csv, .txt)"
        )
    names = tuple(sorted(listing.images))
    whole = _split(tree, listing, names)
    return Opened(names, whole, whole, left_out(listing.others), is_unsplit=eval_split is None)


def take_inventory(path: str) -> Inventory:
    """Lists all that a directory or a tar holds: every folder with images is a split, or the whole is.

    Classes may lack in some splits, and where there are no class folders images have no class. Reads no image.

    Raises:
      UserError: if it can't be read, or there is no image in it.
    """
    tree = open_tree(path)
    folders = tree.folders("")
    tops = folders if folders and not _holds_classes(tree) else [""]
    listings: dict[str, dict[str | None, list[str]]] = {}
    others, notes = ([] if tops == [""] else tree.files("")), list[str]()
    for top in usual_order(tops):
        try:
            images, rest = _list_loosely(tree, top)
        except UserError as error:  # of the labels of a flat val
            notes.append(str(error))
            images, rest = {None: [file for file in tree.files(top) if is_taken(file)]}, []
        others += rest
        if any(images.values()):
            listings[top] = images
    if not listings:
        only = f", only {_kinds(others)}" if others else ""
        raise UserError(f"{path}: no image that can be read is in it{only}; give the folder of the images")
    names = tuple(sorted({name for images in listings.values() for name in images if name is not None}))
    number: dict[str | None, int] = {name: label for label, name in enumerate(names)} | {None: NO_CLASS}
    splits = {}
    for top, images in listings.items():
        labels = [np.full(len(files), number[name], np.int32) for name, files in images.items()]
        files = [file for some in images.values() for file in some]
        check_readable(files)
        splits[top or _base(tree)] = tree.split(top or _base(tree), np.concatenate(labels), files)
    return Inventory(names, splits, path, (*notes, *left_out(others)))


def _list_loosely(tree: Tree, top: str) -> tuple[dict[str | None, list[str]], list[str]]:
    """The images in a folder by class, None where there are no class folders, and what else is there."""
    beside, images, others = tree.files(top), dict[str | None, list[str]](), list[str]()
    for folder in tree.folders(top):
        found = tree.below(posixpath.join(top, folder))
        images[folder] = [path for path in found if is_taken(path)]
        others += [path for path in found if not is_taken(path)]
    if not images and (flat := [path for path in beside if _is_flat(path)]):
        images.update(_by_label(tree, top, flat))
        beside = [path for path in beside if not _is_flat(path)]
    if not any(images.values()):
        images = {None: [path for path in beside if is_taken(path)]}
        beside = [path for path in beside if not is_taken(path)]
    return images, others + beside


def class_names(path: str) -> tuple[str, ...]:
    """The sorted class names of the train split; lists its folders and reads no image."""
    tree = open_tree(path)
    name = "" if _holds_classes(tree) else _find(tree, "train")
    return tuple(tree.folders(name)) or tuple(_read(tree, name).images)


class Tree(Protocol):
    """Files below folders, by paths with slashes relative to the top."""

    @property
    def path(self) -> str:
        """Path of the folder or file."""
        ...

    @property
    def home(self) -> pathlib.Path:
        """The folder beside whose files this lies."""
        ...

    def folders(self, parent: str) -> list[str]:
        """Names of the folders directly in a folder ("" for the top), sorted, hidden ones left out."""
        ...

    def files(self, parent: str) -> list[str]:
        """Paths of what else is directly in a folder, sorted."""
        ...

    def below(self, parent: str) -> list[str]:
        """Paths of the files anywhere below a folder, sorted; a hidden folder counts as one."""
        ...

    def split(self, name: str, labels: np.ndarray, images: list[str]) -> Split:
        """A split of these files and their labels, int32 [n]."""
        ...


def open_tree(path: str) -> Tree:
    """A directory or a tar; its table of contents is read here."""
    return _Directory(path) if os.path.isdir(path) else _Tar(path)


def has_splits(path: str) -> bool:
    """Whether a folder holds some with class folders in them that are called like splits, or ImageNet's flat val."""
    tree = open_tree(path)
    splits = filter(role_of, tree.folders(""))
    return any(tree.folders(name) or any(map(_is_flat, tree.files(name))) for name in splits) or any(
        map(_is_flat, tree.files(""))
    )


def _find(tree: Tree, wanted: str | None) -> str:
    there = tree.folders("")
    if (name := find_split(tree.path, there, wanted)) is not None:
        return name
    what = "val/ nor test/" if wanted is None else f"{wanted}/"
    found = f"only {', '.join(name + '/' for name in there[:8])}" if there else "and no folders at all"
    mend = _LAYOUT
    if wanted is None:
        mend += ", or hold some of train out by data.holdout_fraction=0.1"
    elif wanted != "train":
        mend = "choose one of them by data.eval_split"
    raise UserError(f"{tree.path}: there is no {what} in it, {found}; {mend}")


def _holds_classes(tree: Tree) -> bool:
    """Whether the top is a split itself: no folder is called like one, or they are classes, as train beside bus."""

    def holds_images(folder: str) -> bool:
        return any(is_taken(path) and not _is_flat(path) for path in tree.files(folder))

    there = tree.folders("")
    if not there:
        return any(map(_is_flat, tree.files("")))
    splits = [name for name in there if role_of(name)]
    others = (name for name in there if not role_of(name))
    return not splits or (all(map(holds_images, splits)) and any(map(holds_images, others)))


@dataclasses.dataclass(frozen=True)
class _Listing:
    """Content of a split."""

    name: str
    images: dict[str, list[str]]
    """Paths by class, sorted."""
    others: list[str]
    """Paths of what is left out."""


def _read(tree: Tree, name: str) -> _Listing:
    beside, classes = tree.files(name), tree.folders(name)
    if not classes and (flat := [path for path in beside if _is_flat(path)]):
        return _Listing(name, _by_label(tree, name, flat), [path for path in beside if not _is_flat(path)])
    if not classes:
        raise UserError(f"{tree.path}: {name}/ holds no class folders; {_LAYOUT}")
    images: dict[str, list[str]] = {}
    others = list(beside)
    for folder in classes:
        found = tree.below(posixpath.join(name, folder))
        images[folder] = [path for path in found if is_taken(path)]
        rest = [path for path in found if not is_taken(path)]
        if not images[folder]:
            only = f", only {_kinds(rest)}" if rest else ""
            raise UserError(
                f"{tree.path}: class folder {posixpath.join(name, folder)} holds no images that can be read{only}; add"
                " some, or remove the folder"
            )
        check_readable(images[folder])
        others += rest
    return _Listing(name, images, others)


def _is_flat(path: str) -> bool:
    return is_taken(path) and posixpath.basename(path).startswith(FLAT_NAME)


def _by_label(tree: Tree, name: str, images: Collection[str]) -> dict[str, list[str]]:
    """The images of a flat val by their WordNet ids."""
    labels = Labels(tree.home, tree.home / name if name else tree.home.parent)
    by_name = {posixpath.basename(path): path for path in images}
    try:
        groups = labels.group(by_name, pathlib.Path(tree.path, name))
    except NoLabelsError as error:
        raise UserError(f"{error}, or sort the images into class folders") from error
    return {imagenet.class_ids()[label]: [by_name[image] for image in names] for label, names in groups.items()}


def _split(tree: Tree, listing: _Listing, class_names: tuple[str, ...]) -> Split:
    number = {name: i for i, name in enumerate(class_names)}
    for name in listing.images:
        if name not in number:
            raise UserError(
                f"{tree.path}: class {name!r} is in {listing.name}/ but not in train, which has {len(number)} classes;"
                " add it there, or remove it here"
            )
    labels = [np.full(len(images), number[name], np.int32) for name, images in listing.images.items()]
    images = [path for some in listing.images.values() for path in some]
    return tree.split(listing.name or _base(tree), np.concatenate(labels), images)


def _base(tree: Tree) -> str:
    return os.path.basename(os.path.abspath(tree.path)).removesuffix(".tar")


# --- what is left out ---------------------------------------------------------------------------------------


def is_taken(path: str) -> bool:
    """Whether a file is called like an image, and isn't hidden."""
    return not posixpath.basename(path).startswith(".") and is_image(path)


def left_out(paths: Collection[str]) -> tuple[str, ...]:
    """A line that counts and names files that aren't looked at, or none where there are no such."""
    if not paths:
        return ()
    files = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    first = next(iter(_counted(paths)))
    example = min(path for path in paths if _kind(path) == first)
    return (f"left out: {files}: {_kinds(paths)}; as {example}",)


def _kinds(paths: Iterable[str]) -> str:
    """Kinds of files, most frequent first, such as ".heic 2, .txt 1"."""
    counts = _counted(paths)
    more = [f"{len(counts) - _KINDS} other kinds"] if len(counts) > _KINDS else []
    return ", ".join([f"{kind} {count:,}" for kind, count in list(counts.items())[:_KINDS]] + more)


def _counted(paths: Iterable[str]) -> dict[str, int]:
    counts = collections.Counter(map(_kind, paths))
    return dict(sorted(counts.items(), key=lambda item: (item[0] == _HIDDEN, -item[1], item[0])))


def _kind(path: str) -> str:
    name = posixpath.basename(path)
    if name.startswith("."):
        return _HIDDEN
    if is_image(name):
        return "images outside of class folders"
    return posixpath.splitext(name)[1].lower() or "without an ending"


def walk_files(top: str) -> Iterator[str]:
    """The files below a folder, links followed, each real folder gone through once; a hidden folder counts as one.

    Raises:
      UserError: for a folder that can't be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); mend its permissions or move it away")

    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(folder))
        yield from (os.path.join(folder, name) for name in [*files, *(name for name in folders if name[0] == ".")])
        links = {name: os.path.realpath(os.path.join(folder, name)) for name in folders if name[0] != "."}
        folders[:] = sorted(name for name, real in links.items() if real not in seen)


def find_images(top: str) -> tuple[list[str], list[str]]:
    """The image files below a folder, sorted, and what else is there; see `walk_files` and `check_readable`."""
    found = sorted(walk_files(top))
    images = [path for path in found if is_taken(path)]
    check_readable(images)
    return images, [path for path in found if not is_taken(path)]


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
        """Names, and whether each is of a folder that isn't hidden."""
        try:
            with os.scandir(os.path.join(self.path, parent)) as entries:
                return sorted((entry.name, entry.name[0] != "." and entry.is_dir()) for entry in entries)
        except OSError as error:
            raise UserError(
                f"{error.filename}: can't be read ({error.strerror}); mend its permissions or move it away"
            ) from error

    def split(self, name: str, labels: np.ndarray, images: list[str]) -> Split:
        return Split(name, labels, FileReader(self.path, _packed(images)))


@dataclasses.dataclass(frozen=True)
class FileReader:
    """Reads image files by their number."""

    root: str
    names: np.ndarray
    """bytes [n]: paths below the root."""

    def __call__(self, index: int) -> EncodedImage:
        """Reads the file."""
        path = os.path.join(self.root, os.fsdecode(self.names[index]))
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); restore the file and start again") from error
        return EncodedImage(content, path)

    def where(self, index: int) -> str:
        """The file."""
        return os.path.abspath(os.path.join(self.root, os.fsdecode(self.names[index])))

    def digest(self, rows: Rows) -> dict[str, str]:
        """Digest of the names."""
        return {"names": sha256_of_names(self.names[rows].tolist())}


def _packed(names: list[str]) -> np.ndarray:
    """Packs names into bytes: a million `str` would cost each worker process seconds and hundreds of megabytes."""
    return np.array([os.fsencode(name) for name in names])


# --- in a tar -----------------------------------------------------------------------------------------------

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}


class _Tar:
    """A tar whose table of contents has been read once; images are then read by their offsets."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._place: dict[str, tuple[int, int]] = {}  # of each image: offset and size in bytes
        self._folders: dict[str, set[str]] = {"": set()}  # of each folder: the folders in it
        members = [(_seen_name(member), member) for member in _members(path)]
        seen = [(name, member) for name, member in members if name]
        # Folders need no entries of their own, and a tar of "imagenette/train/..." has one that says nothing.
        tops = {name.split("/")[0] for name, member in seen if ("/" in name or member.isdir()) and name[0] != "."}
        wrapper = next(iter(tops)) + "/" if len(tops) == 1 and not any(map(role_of, tops)) else ""
        within = [(name.removeprefix(wrapper), member) for name, member in seen if f"{name}/" != wrapper]
        self._files = sorted({name for name, member in within if self._add(name, member)})

    def _add(self, name: str, member: tarfile.TarInfo) -> bool:
        """Takes an entry in; whether it isn't a folder, or is a hidden one."""
        parts = name.split("/")
        is_hidden = parts[-1].startswith(".")
        is_folder = member.isdir() and not is_hidden
        parents = parts if is_folder else parts[:-1]
        for depth, folder in enumerate(parents[:2]):
            self._folders.setdefault("/".join(parents[:depth]), set()).add(folder)
        if is_folder:
            return False
        if is_taken(name):
            if not member.isreg():
                raise UserError(
                    f"{self.path}: {member.name} is a link, which has no bytes of its own; write the tar again with"
                    " tar --dereference --hard-dereference"
                )
            self._place[name] = (member.offset_data, member.size)
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
        return Split(name, labels, TarReader(self.path, _packed(images), places))


def _members(path: str) -> list[tarfile.TarInfo]:
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        for magic, command in _COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(
                    f"{path}: a compressed file has no random access; write the tar uncompressed ({command} {path}),"
                    " or unpack it and give the folder"
                )
        return read_members(path)
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{path}: not a folder, and can't be read as a tar ({error}); correct --config.data.path, or copy the file"
            " again"
        ) from error


def _seen_name(member: tarfile.TarInfo) -> str:
    """The path without "./" and slashes at its ends, down to what is hidden; "" for the top."""
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
        """Reads the file."""
        offset, size = self.places[index].tolist()
        try:
            # Opened anew each time, so that there is no open file to share between processes or threads.
            with open(self.path, "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise UserError(f"{self.path}: can't be read ({error.strerror}); restore it and start again") from error
        return EncodedImage(content, f"{self.path}: {os.fsdecode(self.names[index])}")

    def where(self, index: int) -> str:
        """The tar, and the path inside."""
        return f"{os.path.abspath(self.path)}: {os.fsdecode(self.names[index])}"

    def digest(self, rows: Rows) -> dict[str, str]:
        """Digest of names and sizes; the places of files in a tar don't count."""
        return {"names": sha256_of_names(self.names[rows].tolist()), "sizes": sha256_of(self.places[rows, 1])}
