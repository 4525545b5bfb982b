"""Image folders, on disk or inside an uncompressed tar.

    train/CLASS/**/*.jpg    val/CLASS/**/*.jpg    test/CLASS/**/*.jpg

`training` may stand for train, `validation` for val (as CoreNet has it), and a tar may wrap all in one folder. Names
that begin with a dot are ignored, and so are files that aren't images.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mnv2_jax.data.images import EncodedImage
from mnv2_jax.data.split import Rows, Split, sha256_of, sha256_of_names
from mnv2_jax.data.tar import read_members
from mnv2_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
_ALIASES = {"train": ("train", "training"), "val": ("val", "validation"), "validation": ("validation", "val")}
_KNOWN_SPLITS = {"train", "training", "val", "validation", "test"}
_LAYOUT = "arrange the images as train/CLASS/*.jpg and val/CLASS/*.jpg (or test/CLASS/*.jpg)"


def open_splits(path: str, eval_split: str | None, with_eval: bool = True) -> tuple[tuple[str, ...], Split, Split]:
    """Opens the train split and the one to evaluate on.

    Args:
      path: a directory or a .tar file that exists.
      eval_split: the folder to evaluate on; None: val, or test where there is no val.
      with_eval: False where the images to evaluate on will be taken out of train: the train split is given twice.

    Returns:
      The class names, sorted, and the two splits, whose images are sorted by class and file name.

    Raises:
      UserError: if the layout isn't as above, naming what is missing.
    """
    tree = _open_tree(path)
    train_name = _find_split(tree, "train")
    class_names = _class_names(tree, train_name)
    train = _split(tree, train_name, class_names)
    if not with_eval:
        return class_names, train, train
    return class_names, train, _split(tree, _find_split(tree, eval_split), class_names)


def class_names(path: str) -> tuple[str, ...]:
    """The sorted class names of the train split; lists its folders and reads no image."""
    tree = _open_tree(path)
    return _class_names(tree, _find_split(tree, "train"))


class _Tree(Protocol):
    """Files below folders, by paths with slashes relative to the top."""

    @property
    def path(self) -> str: ...

    def folders(self, parent: str) -> list[str]:
        """Names of the folders directly in a folder ("" for the top), sorted, hidden ones left out."""
        ...

    def images(self, parent: str) -> list[str]:
        """Paths of the images anywhere below a folder, sorted, hidden ones left out."""
        ...

    def split(self, name: str, labels: np.ndarray, images: list[str]) -> Split: ...


def _open_tree(path: str) -> _Tree:
    return _Directory(path) if os.path.isdir(path) else _Tar(path)


def _find_split(tree: _Tree, wanted: str | None) -> str:
    there = tree.folders("")
    choices = (*_ALIASES["val"], "test") if wanted is None else _ALIASES.get(wanted, (wanted,))
    for name in choices:
        if name in there:
            return name
    what = "val/ nor test/" if wanted is None else f"{wanted}/"
    found = f"only {', '.join(name + '/' for name in there[:8])}" if there else "and no folders at all"
    mend = _LAYOUT
    if wanted is None:
        mend += ", or hold some of train out by data.holdout_fraction=0.1"
    elif wanted != "train":
        mend = "choose one of them by data.eval_split"
    raise UserError(f"{tree.path}: there is no {what} in it, {found}; {mend}")


def _class_names(tree: _Tree, split: str) -> tuple[str, ...]:
    names = tuple(tree.folders(split))
    if not names:
        raise UserError(f"{tree.path}: {split}/ holds no class folders; {_LAYOUT}")
    return names


def _split(tree: _Tree, split: str, class_names: tuple[str, ...]) -> Split:
    number = {name: i for i, name in enumerate(class_names)}
    labels: list[np.ndarray] = []
    images: list[str] = []
    for name in _class_names(tree, split):
        if name not in number:
            raise UserError(
                f"{tree.path}: class {name!r} is in {split}/ but not in train, which has {len(number)} classes;"
                " add it there, or remove it here"
            )
        found = tree.images(f"{split}/{name}")
        if not found:
            raise UserError(
                f"{tree.path}: class folder {split}/{name} holds no images ({', '.join(EXTENSIONS)}); add some, or"
                " remove the folder"
            )
        images += found
        labels.append(np.full(len(found), number[name], np.int32))
    return tree.split(split, np.concatenate(labels), images)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def walk_images(top: str) -> Iterator[str]:
    """The image files below a folder, hidden ones left out, links followed, each real folder gone through once.

    Raises:
      UserError: for a folder that can't be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); mend its permissions or move it away")

    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(folder))
        links = {name: os.path.realpath(os.path.join(folder, name)) for name in folders if name[0] != "."}
        folders[:] = sorted(name for name, real in links.items() if real not in seen)
        yield from (os.path.join(folder, name) for name in files if name[0] != "." and _is_image(name))


# --- on disk ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Directory:
    path: str

    def folders(self, parent: str) -> list[str]:
        with os.scandir(os.path.join(self.path, parent)) as entries:
            return sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())

    def images(self, parent: str) -> list[str]:
        return sorted(self._walk(parent))

    def _walk(self, parent: str) -> Iterator[str]:
        for path in walk_images(os.path.join(self.path, parent)):
            yield os.path.relpath(path, self.path)

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

    def digest(self, rows: Rows) -> dict[str, str]:
        """Of the names."""
        return {"names": sha256_of_names(self.names[rows].tolist())}


def _packed(names: list[str]) -> np.ndarray:
    """As one block of bytes: a million `str` would cost each worker process seconds and hundreds of megabytes."""
    return np.array([os.fsencode(name) for name in names])


# --- in a tar -----------------------------------------------------------------------------------------------

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}


class _Tar:
    """A tar whose table of contents has been read once; images are then read by their offsets."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._place: dict[str, tuple[int, int]] = {}  # of each image: offset and size in bytes
        self._folders: dict[str, set[str]] = {"": set()}  # of each folder: the folders in it
        self._images: dict[str, list[str]] = {}  # of each SPLIT/CLASS: the images anywhere below it
        members = [(name, member) for member in _members(path) if (name := _visible_name(member))]
        # Folders need no entries of their own, and a tar of "imagenette/train/..." has one that says nothing.
        tops = {name.split("/")[0] for name, member in members if "/" in name or member.isdir()}
        wrapper = next(iter(tops)) + "/" if len(tops) == 1 and not tops & _KNOWN_SPLITS else ""
        for name, member in members:
            self._add(name.removeprefix(wrapper), member)

    def _add(self, name: str, member: tarfile.TarInfo) -> None:
        parts = name.split("/")
        parents = parts if member.isdir() else parts[:-1]
        for depth, folder in enumerate(parents[:2]):
            self._folders.setdefault("/".join(parents[:depth]), set()).add(folder)
        if not member.isdir() and _is_image(name):
            if not member.isreg():
                raise UserError(
                    f"{self.path}: {member.name} is a link, which has no bytes of its own; write the tar again with"
                    " tar --dereference --hard-dereference"
                )
            self._place[name] = (member.offset_data, member.size)
            self._images.setdefault("/".join(parts[:2]), []).append(name)

    def folders(self, parent: str) -> list[str]:
        return sorted(self._folders.get(parent, ()))

    def images(self, parent: str) -> list[str]:
        return sorted(self._images.get(parent, ()))

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


def _visible_name(member: tarfile.TarInfo) -> str:
    """The path without "./" and slashes at its ends; "" for what is hidden."""
    name = posixpath.normpath(member.name).strip("/")
    return "" if any(part.startswith(".") for part in name.split("/")) else name


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

    def digest(self, rows: Rows) -> dict[str, str]:
        """Of the names and the sizes; where in a tar a file lies is its packer's business."""
        return {"names": sha256_of_names(self.names[rows].tolist()), "sizes": sha256_of(self.places[rows, 1])}
