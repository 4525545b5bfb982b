"""Decodes masks of semantic segmentation, and turns the values that files hold into classes.

    MaskReader(i) ──► EncodedMask: its size is known ──► values, as the file has them ──► classes: uint8, 255 = ignored

What a value means is a `Meaning`. A value that means nothing is refused, with the file's name: a training would learn a
wrong class, or count pixels of no class, without an error.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mnv2_jax.config import IGNORED
from mnv2_jax.data.class_file import Colour
from mnv2_jax.data.images import DamagedImageError, EncodedImage, Picture, naming_file
from mnv2_jax.data.split import Identified, Located, Rows
from mnv2_jax.errors import UserError

MOST_CLASSES = 254
"""Largest number of classes: a mask has a byte for each pixel, and 0 or 255 may be no class."""
_MOST_NAMED = 5
"""Values that an error names at most."""
_DEPTH, _COLOUR_TYPE = 24, 25
"""Offsets of two bytes in the header of a PNG: bits per sample, and the type, which is 0 for grey."""
_PNG = b"\x89PNG\r\n\x1a\n"


class Table(NamedTuple):
    """The classes of the values 0 to 255."""

    classes: np.ndarray
    """uint8 [256]: the class of each value, or 255."""
    is_known: np.ndarray
    """bool [256]: whether the value has a meaning."""


def value_table(mask_values: str, num_classes: int, ignored: Sequence[int] = ()) -> Table:
    """Returns the classes of values.

    Args:
      mask_values: index, binary or one_based, as in `data.mask_values`.
      num_classes: number of all classes.
      ignored: classes whose pixels are ignored; the other classes close the gaps.
    """
    return _table(_CLASSES_OF[mask_values](num_classes), num_classes, ignored)


_CLASSES_OF: Mapping[str, Callable[[int], dict[int, int]]] = {
    "index": lambda count: {IGNORED: IGNORED} | {label: label for label in range(count)},
    "binary": lambda count: {0: 0, 255: 1},
    "one_based": lambda count: {0: IGNORED, IGNORED: IGNORED} | {label + 1: label for label in range(count)},
}
"""For each `data.mask_values` but palette: a function from the number of classes to the class of each value."""


def _table(class_of: Mapping[int, int], num_classes: int, ignored: Sequence[int]) -> Table:
    numbers = _new_numbers(num_classes, ignored)
    table = Table(np.full(256, IGNORED, np.uint8), np.zeros(256, bool))
    for value, label in class_of.items():
        table.classes[value] = IGNORED if label == IGNORED else numbers[label]
        table.is_known[value] = True
    return table


def _new_numbers(num_classes: int, ignored: Sequence[int]) -> np.ndarray:
    """Returns the number of each class once some are ignored, uint8 [num_classes]."""
    is_kept = ~np.isin(np.arange(num_classes), ignored)
    return np.where(is_kept, np.cumsum(is_kept) - 1, IGNORED).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What the values of masks mean."""

    kind: str
    """A value of `data.mask_values`; other words for data sets whose masks have a form of their own."""
    class_names: tuple[str, ...]
    """Names of all classes, also of those that are ignored."""
    class_of: Mapping[int, int]
    """The class of each value, as its place in `class_names`; 255: ignored. A colour is the value 0xRRGGBB."""
    ignored: tuple[int, ...] = ()
    """Classes whose pixels are ignored."""

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Names of the classes that aren't ignored, in the order of the numbers that masks have after reading."""
        return tuple(name for label, name in enumerate(self.class_names) if label not in self.ignored)

    @property
    def has_colours(self) -> bool:
        """Whether values are colours."""
        return self.kind == "palette"

    def word_for(self, value: int) -> str:
        """Writes a value: a number, or a colour as "(255, 0, 0)"."""
        return str(tuple(value.to_bytes(3, "big"))) if self.has_colours else str(value)

    def classes(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps values to classes.

        Args:
          values: integers [h, w].

        Returns:
          The classes, uint8 [h, w], and bool [h, w], false for a value that means nothing.
        """
        colours, table = self._lookup
        if self.has_colours:
            places = np.minimum(np.searchsorted(colours, values), len(colours) - 1)
            return table.classes[places], colours[places] == values
        places = values.astype(np.uint8)
        is_known = table.is_known[places]
        return table.classes[places], is_known if values.dtype == np.uint8 else is_known & (values == places)

    @functools.cached_property
    def _lookup(self) -> tuple[np.ndarray, Table]:
        """The colours in rising order, int32 [n], and the classes of values, or of the places of colours."""
        colours = sorted(self.class_of) if self.has_colours else []
        class_of = {place: self.class_of[colour] for place, colour in enumerate(colours)} or self.class_of
        return np.array(colours, np.int32), _table(class_of, len(self.class_names), self.ignored)


def meaning_of(
    mask_values: str, class_names: Sequence[str], ignored: Sequence[int] = (), colours: Sequence[Colour] = ()
) -> Meaning:
    """Makes the meaning of values as an option of the config states it.

    Args:
      mask_values: as in `data.mask_values`.
      class_names: names of all classes, 254 at most; binary: two.
      ignored: classes whose pixels are ignored.
      colours: palette: the colour of each class; all are different.
    """
    if mask_values == "palette":
        class_of = {int.from_bytes(bytes(colour), "big"): label for label, colour in enumerate(colours)}
    else:
        class_of = _CLASSES_OF[mask_values](len(class_names))
    return Meaning(mask_values, tuple(class_names), class_of, tuple(ignored))


class EncodedMask:
    """The file of a mask; pixels are decoded when needed.

    `np.asarray` decodes it to classes, uint8 [h, w]; 255 is ignored. This raises a `UserError` that names the file and
    a value that means nothing, and a `DamagedImageError` for a file that can't be decoded.
    """

    def __init__(self, file: EncodedImage, meaning: Meaning) -> None:
        """Takes over a file whose header was read.

        Raises:
          UserError: for a file in a format that changes values.
        """
        self.content, self.name, self.meaning = file.content, file.name, meaning
        self.shape = file.shape[:2]
        lossy = "JPEG" if self.content[:2] == b"\xff\xd8" else "WebP" if self.content[8:16] == b"WEBPVP8 " else None
        if lossy:
            raise UserError(
                f"{self.name}: a mask in {lossy}, which changes the values of pixels; make it again as a PNG, from the"
                " annotations and not from this file"
            )

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        del copy  # always a new array
        values = self.values()
        classes, is_known = self.meaning.classes(values)
        if not is_known.all():
            raise _unknown_values(self.name, self.meaning, values, values[~is_known])
        return np.asarray(classes, dtype)

    def values(self) -> np.ndarray:
        """Decodes the mask without giving its values a meaning.

        Returns:
          Integers [h, w]: grey values or, of a PNG with a palette, indices; 0xRRGGBB where values are colours.

        Raises:
          UserError: for a file in colour where values are numbers.
          DamagedImageError: if the file is cut off or damaged.
        """
        with naming_file(self.name):
            image: Image.Image = Image.open(io.BytesIO(self.content))
            image.load()
            if image.mode == "F":
                raise DamagedImageError("a floating-point image; save the mask with 8 bits")
            values = _colours(image) if self.meaning.has_colours else self._numbers(image)
        if values is None:
            raise UserError(
                f"{self.name}: a mask in colour, where numbers of classes are expected; set data.mask_values=palette,"
                " and give each class its colour in classes.txt, as 'road 128 64 128'"
            )
        return values

    def _numbers(self, image: Image.Image) -> np.ndarray | None:
        """Returns the values of an image; None if it is in colour."""
        is_binary = self.meaning.kind == "binary"
        if image.mode == "1":
            return np.asarray(image).astype(np.uint8) * (255 if is_binary else 1)
        if image.mode == "L" and not is_binary and self.content.startswith(_PNG):
            # Pillow stretches grey values of 2 and 4 bits to 0 ... 255.
            scale = {2: 85, 4: 17}.get(self.content[_DEPTH], 1) if self.content[_COLOUR_TYPE] == 0 else 1
            return np.asarray(image) if scale == 1 else np.asarray(image) // np.uint8(scale)
        if image.mode in ("L", "P"):
            return np.asarray(image)
        if image.mode in ("LA", "La", "PA"):
            return np.asarray(image.getchannel(0))
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.int32)
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
        is_grey = bool((red == green).all() and (green == blue).all())
        return red if is_grey else None


def _colours(image: Image.Image) -> np.ndarray:
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.int32), -1, 0)
    packed: np.ndarray = (red << 16) + (green << 8) + blue
    return packed


def _unknown_values(name: str, meaning: Meaning, values: np.ndarray, unknown: np.ndarray) -> UserError:
    """Returns the error for a mask that holds values which mean nothing.

    Args:
      name: the file.
      meaning: what values should mean.
      values: all of them, [h, w].
      unknown: those that mean nothing, [n].
    """
    found, strange = np.unique(values).tolist(), np.unique(unknown).tolist()
    words = ", ".join(meaning.word_for(value) for value in strange[:_MOST_NAMED])
    more = " …" if len(strange) > _MOST_NAMED else ""
    pixels = "1 pixel has" if len(unknown) == 1 else f"{len(unknown):,} pixels have"
    noun = "colour" if meaning.has_colours else "value"
    stated = f"the {noun} {words}" if len(strange) == 1 else f"the {noun}s {words}{more}"
    count = len(meaning.class_names)
    return UserError(f"{name}: {pixels} {stated}, which none of the {count} classes has; {advice(meaning, found)}")


def advice(meaning: Meaning, found: Collection[int]) -> str:
    """Says what to do about masks that hold unknown values; ``found``: all of their values."""
    count, largest = len(meaning.class_names), max(value for value in found if value not in meaning.class_of)
    if meaning.kind == "palette":
        return "add a class with this colour to classes.txt, as 'road 128 64 128'; data.ignored_classes may ignore it"
    if meaning.kind == "binary":
        if largest < count:
            return "set data.mask_values=index"
        return (
            "masks of 0 and 255 have nothing in between unless they were smoothed or saved as JPEG; make them again, or"
            " set data.mask_values=index for numbers of classes"
        )
    if meaning.kind == "index" and largest == count:
        return (
            "if 0 is no class and the classes begin at 1, set data.mask_values=one_based; otherwise add the class to"
            " classes.txt"
        )
    if meaning.kind == "index":
        return "add the missing classes to classes.txt, or correct the mask"
    if meaning.kind == "one_based":
        return "the values of classes end at their number; add the missing classes to classes.txt, or correct the mask"
    return "restore the original mask"


@dataclasses.dataclass(frozen=True)
class MaskReader:
    """Reads masks by their number."""

    read: Callable[[int], Picture]
    """Reads a file: a `folder.FileReader` or a `folder.TarReader`."""
    meaning: Meaning

    def __call__(self, index: int) -> EncodedMask:
        """Reads the file of a mask."""
        file = self.read(index)
        assert isinstance(file, EncodedImage)
        return EncodedMask(file, self.meaning)

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns the digest of the files."""
        return self.read.digest(rows) if isinstance(self.read, Identified) else {}

    def path_of(self, index: int) -> str | None:
        """Returns the absolute path of a mask's file, as in `Located.path_of`."""
        return self.read.path_of(index) if isinstance(self.read, Located) else None
