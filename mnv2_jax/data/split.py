"""`Split`: labelled images with random access, which of those that are there is meant, and how a share is chosen."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from mnv2_jax.data.images import Picture
from mnv2_jax.errors import UserError

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "devel", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Names that people give the three splits, in any case and perhaps with "set" at the end, such as Test_Set."""


class Labels(Protocol):
    """int32 [n], or what `np.asarray` turns into it: labels that lie beside the pixels are read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __array__(self) -> np.ndarray: ...


Example: TypeAlias = Mapping[str, Any]
"""An image of a split as "image", and what is known of it: "label", an int."""

Rows: TypeAlias = slice | np.ndarray
"""Which of a reader's images: a slice, or int [n]."""


@runtime_checkable
class Identified(Protocol):
    """A reader that knows its images without opening a file of them."""

    def digest(self, rows: Rows) -> dict[str, str]:
        """SHA-256 of what it knows of some images, in their order, by the kind of it: names, sizes, pixels, …"""
        ...


@runtime_checkable
class Located(Protocol):
    """A reader whose images may have names."""

    def where(self, index: int) -> str | None:
        """The file of an image, as an absolute path; in an archive that, ": " and the name inside. None: it has none.

        Raises:
          UserError: if the name lies beside the pixels, and can't be read.
        """
        ...


def sha256_of(array: np.ndarray) -> str:
    """SHA-256 of a numeric array's type, shape and bytes, in hexadecimal."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def sha256_of_names(names: Iterable[bytes]) -> str:
    """SHA-256 of names that hold no zero byte, in their order, in hexadecimal."""
    return hashlib.sha256(b"\0".join(names)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Split:
    """The labelled images of one split; it can be sent to worker processes."""

    name: str
    labels: Labels
    read: Callable[[int], Picture]
    """Image number i; a `UserError` naming the file where it can't be read, which may come as late as its pixels."""
    in_memory: bool = False
    """Reading costs no more than a copy, so that worker processes would gain nothing."""

    def __len__(self) -> int:
        return len(self.labels)

    def example(self, index: int) -> Example:
        """Everything that is known of an image.

        Raises:
          UserError: naming the file, if it can't be read; it may be found later that its pixels can't be decoded.
        """
        image = self.read(index)
        return {"image": image, "label": int(self.labels[index])}  # after it: a record that holds both is read once

    def digest(self) -> dict[str, str]:
        """SHA-256 of what is known of the images without opening a file, by the kind of it.

        labels: where they don't lie beside the pixels; names: of the files, below the top of the data set; sizes: of
        files in a tar; pixels: of arrays; shards, copy: of what others have written of the files. The same wherever the
        data lie.
        """
        labels = {"labels": sha256_of(self.labels)} if isinstance(self.labels, np.ndarray) else {}
        return labels | _digest(self.read, slice(len(self)))

    def where(self, index: int) -> str | None:
        """Place as in `Located.where`; None for the images of arrays."""
        return _where(self.read, index)

    @staticmethod
    def of_arrays(name: str, images: np.ndarray, labels: np.ndarray) -> Split:
        """A split of images that lie in memory.

        Args:
          name: train, val, test …
          images: uint8 [n, h, w, 3], RGB.
          labels: integers [n], from 0.

        Raises:
          UserError: if they are anything else.
        """
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(f"images of {name}: {images.dtype} {list(images.shape)}; give them as uint8 [n, h, w, 3]")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise UserError(
                f"labels of {name}: {labels.dtype} {list(labels.shape)} for {len(images)} images; give an integer each"
            )
        return Split(name, labels.astype(np.int32), MemoryReader(images), in_memory=True)

    def subset(self, keep: np.ndarray, name: str | None = None) -> Split:
        """The images where ``keep``, bool [n], is true, in their order."""
        indices = np.flatnonzero(keep)
        return dataclasses.replace(
            self, name=name or self.name, labels=np.asarray(self.labels)[indices], read=_Subset(self.read, indices)
        )

    def nothing(self, name: str) -> Split:
        """A split without images."""
        return dataclasses.replace(self, name=name, labels=np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class MemoryReader:
    """Reads from an array, uint8 [n, h, w, 3]."""

    images: np.ndarray

    def __call__(self, index: int) -> np.ndarray:
        """The image as uint8 [h, w, 3]."""
        return self.images[index]

    def digest(self, rows: Rows) -> dict[str, str]:
        """Digest of the pixels."""
        return {"pixels": sha256_of(self.images[rows])}


@dataclasses.dataclass(frozen=True)
class _Subset:
    read: Callable[[int], Picture]
    indices: np.ndarray

    def __call__(self, index: int) -> Picture:
        return self.read(int(self.indices[index]))

    def digest(self, rows: Rows) -> dict[str, str]:
        return _digest(self.read, self.indices[rows])

    def where(self, index: int) -> str | None:
        return _where(self.read, int(self.indices[index]))


def _digest(read: Callable[[int], Picture], rows: Rows) -> dict[str, str]:
    return read.digest(rows) if isinstance(read, Identified) else {}


def _where(read: Callable[[int], Picture], index: int) -> str | None:
    return read.where(index) if isinstance(read, Located) else None


class Opened(NamedTuple):
    """Content of a source."""

    class_names: tuple[str, ...]
    """In the order of the labels."""
    train: Split
    eval: Split
    notes: tuple[str, ...] = ()
    """Notes on what was left alone, a line each."""
    is_unsplit: bool = False
    """Nothing says what is to be evaluated on: both splits are all there is."""


NO_CLASS = -1
"""The label of an image in an `Inventory` that is in no class."""


class Inventory(NamedTuple):
    """Everything that a source holds, whether or not it can be trained on."""

    class_names: tuple[str, ...]
    """In the order of the labels, also of classes without images."""
    splits: Mapping[str, Split]
    """Splits by their names, in the order of `usual_order`."""
    top: str
    """The folder or file below which the images are."""
    notes: tuple[str, ...] = ()
    """Notes on what was left alone or is missing, a line each."""


# --- which is which -----------------------------------------------------------------------------------------


def role_of(name: str) -> str | None:
    """``train``, ``val`` or ``test``, whichever a split of this name is; None for any other name."""
    plain = re.sub(r"[ ._-]?set$", "", name.lower())
    return next((role for role, names in _NAMES.items() if plain in names), None)


def usual_order(names: Iterable[str]) -> list[str]:
    """Splits to train on, to choose by, to test on, and others."""
    roles = {role: place for place, role in enumerate(_NAMES)}
    return sorted(names, key=lambda name: (roles.get(role_of(name) or "", len(roles)), name))


def find_split(where: str, names: Collection[str], wanted: str | None) -> str | None:
    """Which of some splits is meant: the one of just this name, or else the one that plays the same part.

    Args:
      where: the place, for an error.
      names: of the splits that are there.
      wanted: None: val, or test where there is no val.

    Returns:
      Its name; None where it isn't there.

    Raises:
      UserError: if several could be meant.
    """
    if wanted in names:
        return wanted
    for role in ("val", "test") if wanted is None else filter(None, [role_of(wanted)]):
        found = sorted(name for name in names if role_of(name) == role)
        if len(found) > 1:
            mend = "move one of them away" if role == "train" else f"choose by --config.data.eval_split={found[0]}"
            raise UserError(f"{where}: {' and '.join(found)} could each be the {role} split; {mend}")
        if found:
            return found[0]
    return None


def in_use(names: Iterable[str], train: str | None, held_out: str | None) -> tuple[str, ...]:
    """A line that names the splits which nobody looks at, or none where there are no such.

    Args:
      names: of what is there; what isn't called like a split isn't named.
      train: what is trained on; None where nothing is trained, and nobody misses train.
      held_out: what is evaluated on; None where that is a part of train.
    """

    def is_missed(name: str) -> bool:
        roles = {role_of(word) for word in (name, *re.split(r"[^a-z]+", name.lower()))} - {None}
        return name not in (train, held_out) and bool(roles if train else roles - {"train"})

    others = sorted(filter(is_missed, names))
    if not others:
        return ()
    uses = [f"training is on {train!r}"] if train else []
    uses += [f"evaluation on {held_out!r}" if held_out else "evaluation on a part held out of it"]
    return (f"{', '.join(uses)}; not looked at: {', '.join(map(repr, others))}",)


# --- a share of one -----------------------------------------------------------------------------------------


def stratified_share(labels: np.ndarray, count_of: Callable[[int], int]) -> np.ndarray:
    """Draws a share of every class, always the same one.

    Args:
      labels: int [n].
      count_of: how many to draw of a class that has so many images.

    Returns:
      bool [n], true for the images drawn.
    """
    rng = np.random.default_rng(0)
    drawn = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn[rng.permutation(members)[: count_of(len(members))]] = True
    return drawn
