"""`Split`: images with random access and their targets. Also how a split is found by its name, and a share is drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from mnv2_jax.data.images import Picture
from mnv2_jax.errors import UserError, nearest

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "devel", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Usual names of the three splits, in any case and optionally with "set" at the end, such as Test_Set."""


class Labels(Protocol):
    """int32 [n], or an object that `np.asarray` turns into it; labels stored beside the pixels are read on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __array__(self) -> np.ndarray: ...


Example: TypeAlias = Mapping[str, Any]
"""One image of a split and its targets: "image", a `Picture`; "label", an int; and what `Split.targets` reads."""

Rows: TypeAlias = slice | np.ndarray
"""A selection of a reader's images: a slice, or indices int [n]."""


@runtime_checkable
class Identified(Protocol):
    """A reader that can tell one data set from another without opening an image file."""

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns the SHA-256 of what is known of some images, in their order, by kind: names, sizes, pixels, …"""
        ...


@runtime_checkable
class Located(Protocol):
    """A reader that can say in which file an image lies."""

    def path_of(self, index: int) -> str | None:
        """Returns the absolute path of an image's file; in an archive, the archive's path, ": " and the name inside.

        Returns None for an image that has no file.

        Raises:
          UserError: if the name is stored beside the pixels and can't be read.
        """
        ...


def sha256_of(array: np.ndarray) -> str:
    """Returns the SHA-256 of a numeric array's type, shape and bytes, in hexadecimal."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def sha256_of_names(names: Iterable[bytes]) -> str:
    """Returns the SHA-256 of names in their order, in hexadecimal; the names hold no zero byte."""
    return hashlib.sha256(b"\0".join(names)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split and their targets; it can be sent to worker processes."""

    name: str
    labels: Labels
    """The class of each image; where images have no class of their own, 0 for all. Shares are drawn by class."""
    read: Callable[[int], Picture]
    """Reads image number i. Raises a `UserError` that names a file which can't be read, now or when it is decoded."""
    in_memory: bool = False
    """Whether reading an image is only a copy in memory, so that worker processes would gain nothing."""
    targets: Mapping[str, Callable[[int], Any]] = dataclasses.field(default_factory=dict)
    """Functions that read further targets of image number i, by their names in an `Example`: "mask"; or "boxes",
    float32 [n, 4] as (y0, x0, y1, x1) in pixels with exclusive end, "classes", int32 [n], and "crowd", bool [n]."""

    def __post_init__(self) -> None:
        """Raises a `UserError` for labels in an array that aren't integers."""
        if isinstance(self.labels, np.ndarray) and self.labels.dtype.kind not in "iu":
            raise UserError(f"labels of {self.name} are {self.labels.dtype}; give integers from 0")

    def __len__(self) -> int:
        return len(self.labels)

    def example(self, index: int) -> Example:
        """Reads an image and its targets.

        Raises:
          UserError: naming the file, if it can't be read. Damaged pixels may raise only later, when they are decoded.
        """
        image = self.read(index)  # before the label, so that a record which holds both is read once
        if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
            raise UserError(
                f"image {index} of {self.name} is {image.dtype} {list(image.shape)}; let read(i) return uint8 [h, w, 3]"
            )
        targets = {name: read_target(index) for name, read_target in self.targets.items()}
        return {"image": image, "label": int(self.labels[index]), **targets}

    def digest(self) -> dict[str, str]:
        """Returns the SHA-256 of everything that is known of the images without opening an image file, by kind.

        The kinds: labels, unless they are stored beside the pixels; names of the files, relative to the top of the data
        set; sizes of the files in a tar; pixels of arrays; shards and copy, from the metadata of prepared shards and
        TFDS. The digests don't depend on where the data lie.
        """
        labels = {"labels": sha256_of(self.labels)} if isinstance(self.labels, np.ndarray) else {}
        whole = slice(len(self))
        targets = {
            f"{name}.{kind}": sha
            for name, read_target in self.targets.items()
            for kind, sha in _digest(read_target, whole).items()
        }
        return labels | targets | _digest(self.read, whole)

    def path_of(self, index: int) -> str | None:
        """Returns the file of an image, as in `Located.path_of`; None for the images of arrays."""
        return _where(self.read, index)

    @staticmethod
    def of_arrays(name: str, images: np.ndarray, labels: np.ndarray) -> Split:
        """Makes a split of images that lie in memory.

        Args:
          name: train, val, test …
          images: uint8 [n, h, w, 3], RGB.
          labels: integers [n], from 0.

        Raises:
          UserError: if the arrays have another type or shape.
        """
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(f"images of {name} are {images.dtype} {list(images.shape)}; give uint8 [n, h, w, 3]")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise UserError(
                f"labels of {name} are {labels.dtype} {list(labels.shape)} for {len(images)} images; give one integer"
                " for each image"
            )
        return Split(name, labels.astype(np.int32), MemoryReader(images), in_memory=True)

    def subset(self, keep: np.ndarray, name: str | None = None) -> Split:
        """Returns the images where ``keep``, bool [n], is true, in their order."""
        indices = np.flatnonzero(keep)
        return dataclasses.replace(
            self,
            name=name or self.name,
            labels=np.asarray(self.labels)[indices],
            read=_Subset(self.read, indices),
            targets={target: _Subset(read, indices) for target, read in self.targets.items()},
        )

    def without_images(self, name: str) -> Split:
        """Returns an empty split."""
        return dataclasses.replace(self, name=name, labels=np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class MemoryReader:
    """Reads images from an array, uint8 [n, h, w, 3]."""

    images: np.ndarray

    def __call__(self, index: int) -> np.ndarray:
        """Returns an image as uint8 [h, w, 3]."""
        return self.images[index]

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns the digest of the pixels."""
        return {"pixels": sha256_of(self.images[rows])}


@dataclasses.dataclass(frozen=True)
class _Subset:
    read: Callable[[int], Any]
    indices: np.ndarray

    def __call__(self, index: int) -> Any:
        return self.read(int(self.indices[index]))

    def digest(self, rows: Rows) -> dict[str, str]:
        return _digest(self.read, self.indices[rows])

    def path_of(self, index: int) -> str | None:
        return _where(self.read, int(self.indices[index]))


def origin_of(read: Callable[[int], Any], rows: np.ndarray) -> tuple[Callable[[int], Any], np.ndarray]:
    """Returns the reader of which a subset was taken, and the numbers that images have there.

    Args:
      read: a reader of `Split.read` or `Split.targets`, perhaps of a subset.
      rows: numbers of images, int [n].
    """
    origin: Any = read
    while isinstance(origin, _Subset):
        origin, rows = origin.read, origin.indices[rows]
    return origin, rows


def _digest(read: Callable[[int], Any], rows: Rows) -> dict[str, str]:
    return read.digest(rows) if isinstance(read, Identified) else {}


def _where(read: Callable[[int], Picture], index: int) -> str | None:
    return read.path_of(index) if isinstance(read, Located) else None


class OpenedSplits(NamedTuple):
    """The class names and the two splits that a source holds."""

    class_names: tuple[str, ...]
    """Names of the classes, in the order of their labels."""
    train: Split
    eval: Split
    notes: tuple[str, ...] = ()
    """Remarks on what was left out, one line each."""
    is_unsplit: bool = False
    """Whether the source has no split for evaluation, so that both splits are all of its images."""


NO_CLASS = -1
"""The label of an image in an `Inventory` that belongs to no class."""


class Inventory(NamedTuple):
    """Everything that a source holds, whether or not a run can train on it."""

    class_names: tuple[str, ...]
    """Names of all classes, also those without images, in the order of their labels."""
    splits: Mapping[str, Split]
    """Splits by their names, in the order of `usual_order`."""
    top: str
    """The folder or file below which the images lie."""
    notes: tuple[str, ...] = ()
    """Remarks on what was left out or is missing, one line each."""
    source: str = "folder"
    """The `data.name` under which a run trains on it."""


# --- splits by their names ----------------------------------------------------------------------------------


def role_of(name: str) -> str | None:
    """Returns what a split of this name is for, ``train``, ``val`` or ``test``; None for any other name."""
    plain = re.sub(r"[ ._-]?set$", "", name.lower())
    return next((role for role, names in _NAMES.items() if plain in names), None)


def usual_order(names: Iterable[str]) -> list[str]:
    """Sorts the names of splits: those for training first, then validation, test, and others."""
    roles = {role: place for place, role in enumerate(_NAMES)}
    return sorted(names, key=lambda name: (roles.get(role_of(name) or "", len(roles)), name))


def find_split(path: str, names: Collection[str], requested: str | None) -> str | None:
    """Finds a split by its exact name, or else by its role: "val" also finds "validation".

    Args:
      path: where the splits lie, for an error.
      names: the names of the splits.
      requested: the name asked for; None: val, or test where there is no val.

    Returns:
      The name of the split that was found; None where there is none.

    Raises:
      UserError: if several splits have the role.
    """
    if requested in names:
        return requested
    for role in ("val", "test") if requested is None else filter(None, [role_of(requested)]):
        matches = sorted(name for name in names if role_of(name) == role)
        if len(matches) > 1:
            advice = (
                "move one of them away" if role == "train" else f"choose with --config.data.eval_split={matches[0]}"
            )
            raise UserError(f"{path}: {' and '.join(matches)} could each be the {role} split; {advice}")
        if matches:
            return matches[0]
    return None


def require_split(path: str, names: Sequence[str], requested: str | None, layout: str) -> str:
    """Finds a split as `find_split` does.

    Args:
      path: where the splits lie, for an error.
      names: the names of the splits.
      requested: the name asked for; None: val, or test where there is no val.
      layout: advice how to arrange the data, for an error.

    Raises:
      UserError: if there is no such split, or several.
    """
    if (name := find_split(path, names, requested)) is not None:
        return name
    missing = "val/ nor test/" if requested is None else f"{requested}/"
    existing = f"only {', '.join(name + '/' for name in names[:8])}" if names else "and no folders at all"
    advice = layout
    if requested is None:
        advice += ", or hold out a share of train with data.holdout_fraction=0.1"
    elif requested != "train" and names:
        advice = "choose one of them with data.eval_split"
    raise UserError(f"{path}: there is no {missing} in it, {existing}; {advice}")


def note_unused(names: Iterable[str], train: str | None, held_out: str | None) -> tuple[str, ...]:
    """Returns a note, if any, that names the splits which neither training nor evaluation uses.

    Args:
      names: names of the folders or splits; those that aren't named like a split are not mentioned.
      train: the split that is trained on; None where nothing is trained, and a train split is not mentioned.
      held_out: the split that is evaluated; None where it is a part of train.
    """

    def is_unused(name: str) -> bool:
        roles = {role_of(word) for word in (name, *re.split(r"[^a-z]+", name.lower()))} - {None}
        return name not in (train, held_out) and bool(roles if train else roles - {"train"})

    unused = sorted(filter(is_unused, names))
    if not unused:
        return ()
    uses = [f"training uses {train!r}"] if train else []
    uses += [f"evaluation uses {held_out!r}" if held_out else "evaluation uses a share held out of it"]
    return (f"{', '.join(uses)}; not used: {', '.join(map(repr, unused))}",)


class Chosen(NamedTuple):
    """The splits that a run uses, by their names; the split of a source without splits is called ""."""

    train: str | None
    """None where nothing is trained."""
    eval: str
    notes: tuple[str, ...]
    """A note, if any, on the splits that aren't used."""
    holds_out: bool
    """Whether both are all of the images, of which a share will be held out."""

    @property
    def used(self) -> tuple[str, ...]:
        """The names of the splits to open, train first, each once."""
        return tuple(dict.fromkeys(name for name in (self.train, self.eval) if name is not None))

    def opened(self, class_names: tuple[str, ...], splits: Mapping[str, Split], notes: Iterable[str]) -> OpenedSplits:
        """Returns the splits once they are open.

        Args:
          class_names: the names of the classes.
          splits: the splits of `used`.
          notes: further notes.
        """
        held_out = splits[self.eval]
        train = held_out.without_images("train") if self.train is None else splits[self.train]
        return OpenedSplits(class_names, train, held_out, (*self.notes, *notes), self.holds_out)


def choose_splits(
    path: str,
    names: Sequence[str],
    is_annotated: Callable[[str], bool],
    noun: str,
    eval_split: str | None,
    layout: str,
    with_eval: bool,
    with_train: bool,
    train_split: str = "train",
) -> Chosen:
    """Chooses among the splits of images that have a mask or boxes.

    Args:
      path: where the splits lie, for an error.
      names: the names of the splits; only "" where there are no splits.
      is_annotated: whether a split has what is to be learnt; the others can't be evaluated. It may take long, and isn't
        called for the split to train on.
      noun: what that is, as "masks".
      eval_split: as `data.eval_split`.
      layout: advice on how to arrange the files, for an error.
      with_eval: False where the images to evaluate will be taken out of train, which is then chosen for both.
      with_train: False where nothing is trained.
      train_split: the split to train on.

    Raises:
      UserError: if there is no such split, several are meant, or the split to evaluate isn't annotated.
    """
    is_unsplit = list(names) == [""]
    if with_train and is_unsplit and role_of(train_split) != "train":
        raise UserError(f"{path}: has no splits, and so no {train_split}; leave data.train_split out")
    if with_train and not is_unsplit and train_split != "train" and find_split(path, names, train_split) is None:
        raise UserError(f"{path}: data.train_split={train_split!r} is no split{nearest(train_split, names)}")
    if is_unsplit:
        if eval_split is not None and not (with_train and role_of(eval_split) == "train"):
            raise UserError(
                f"{path}: has no splits, and so no {eval_split}; set data.eval_split to None, which holds out a share"
                " of the images"
            )
        return Chosen("" if with_train else None, "", (), with_train and eval_split is None)
    train = require_split(path, names, train_split, layout) if with_train else None
    if train is not None and not with_eval:
        return Chosen(train, train, note_unused(names, train, None), False)
    if eval_split is None:
        candidates = [name for name in names if role_of(name) in ("val", "test") and is_annotated(name)]
        held_out = find_split(path, candidates, None) or require_split(path, names, None, layout)
    else:
        held_out = require_split(path, names, eval_split, layout)
    if held_out != train and not is_annotated(held_out):
        others = [f"data.eval_split={name}" for name in names if role_of(name) != "train" and is_annotated(name)]
        advice = f"set {others[0]}" if others else "hold out a share of train with data.holdout_fraction=0.1"
        raise UserError(f"{path}: no image of {held_out} has {noun}, so that it can't be evaluated; {advice}")
    return Chosen(train, held_out, note_unused(names, train, held_out), False)


# --- a share of a split -------------------------------------------------------------------------------------


def spread(size: int, count: int) -> list[int]:
    """Returns ``count`` of the numbers 0..size - 1, or all where they are fewer, evenly spread."""
    places: list[int] = np.linspace(0, size - 1, min(count, size)).round().astype(int).tolist()
    return places


def stratified_share(labels: np.ndarray, count_of: Callable[[int], int]) -> np.ndarray:
    """Draws a share of every class; the draw is always the same.

    Args:
      labels: int [n].
      count_of: a function from the number of a class's images to how many of them to draw.

    Returns:
      bool [n], true for the images drawn.
    """
    rng = np.random.default_rng(0)
    drawn = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn[rng.permutation(members)[: count_of(len(members))]] = True
    return drawn
