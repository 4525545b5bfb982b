"""Looks at the images of a source once each: what they are, which can't be decoded, and which are there twice.

    split.Inventory ──► look_through: a `Look` an image ──► TABLES ──► text, JSON, a page

A task whose images have more than classes adds what it looks for to `Look`, and a function to `TABLES`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import os
import posixpath
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mnv2_jax.data.cores import num_cores
from mnv2_jax.data.images import DamagedImageError, EncodedImage
from mnv2_jax.data.split import NO_CLASS, Inventory
from mnv2_jax.errors import UserError

_LOOKED_AT, _COMPARED = 64, 16
"""Sides in pixels: a JPEG is decoded at no less than the one, and images are compared at the other."""
_PICTURE, _PICTURES, _OF_A_CLASS = 128, 240, 8
"""The longest side of a picture, how many are kept, and of how many images a class at most."""
_SAME_GREY = 2
"""Channels of an image without colour differ by no more, of 255."""
_CHUNK, _WAITING = 32, 4
"""Images that a thread looks at in a row, and how many such tasks wait for each."""
_TURNED = range(2, 9)
"""Values of the EXIF tag 0x0112 by which an image is turned or mirrored."""
_ORIENTATION = 0x0112
_NAMED, _UNEVEN = 5, 1.5
"""Classes in a note; and from how many times the smallest on the largest is worth one."""

TRAITS: Mapping[str, str] = {
    "greyscale": "the three channels are the same",
    "grey in colour": "stored in colour, but without any",
    "transparent": "transparency is dropped",
    "turned": "their EXIF data say so, which is not followed: they are seen as they are stored",
    "animated": "or of several pages, of which the first is taken",
    "16 bits": "scaled to 8",
    "CMYK": "converted to RGB",
}
"""Traits that an image may have, and what each means for training on it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """Findings on an image."""

    split: str
    index: int
    """In the split."""
    label: int
    """Label in the `split.Inventory`."""
    name: str = ""
    """Name of the file, below the top."""
    problem: str = ""
    """Why it can't be looked at."""
    is_damaged: bool = False
    """Whether it is the image that is wrong, and not the machine."""
    size: tuple[int, int] = (0, 0)
    """Height and width in pixels."""
    num_bytes: int = 0
    form: str = ""
    """Pillow's name of the format."""
    traits: tuple[str, ...] = ()
    """Its traits, keys of `TRAITS`."""
    content: bytes = b""
    """A digest of the file."""
    pixels: bytes = b""
    """A digest of the size and of the pixels at 16 × 16."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Findings on a source."""

    inventory: Inventory
    looks: Sequence[Look]
    """Findings on the images that were looked at, in the order of the splits."""
    pictures: Mapping[tuple[str, int], bytes]
    """JPEG files of some images, by split and index."""

    @property
    def sound(self) -> Iterator[Look]:
        """Those that can be decoded."""
        return (look for look in self.looks if not look.problem)

    @property
    def num_images(self) -> int:
        """All there are, looked at or not."""
        return sum(map(len, self.inventory.splits.values()))

    def class_of(self, look: Look) -> str:
        """The name of its class."""
        return "no class" if look.label == NO_CLASS else self.inventory.class_names[look.label]


class Table(NamedTuple):
    """Table on one subject."""

    name: str
    """Key of the table in JSON."""
    title: str
    head: tuple[str, ...]
    """One word a column, all different; the first column is text."""
    rows: Sequence[tuple[Any, ...]]
    """Texts and numbers."""
    note: str = ""


def look_through(inventory: Inventory, limit: int, with_pictures: bool, done: Callable[[int], None]) -> Inspection:
    """Reads images, each once, and decodes them, in threads.

    Args:
      inventory: what there is.
      limit: at most so many images, evenly spread over the splits and classes; 0: all.
      with_pictures: whether some of each class are kept.
      done: called with how many images have been looked at since.
    """
    chosen = _choose(inventory, limit)
    pictured = _pictured(inventory, chosen) if with_pictures else frozenset[tuple[str, int]]()
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    looks: list[Look] = []
    pictures: dict[tuple[str, int], bytes] = {}

    def look_at(chunk: Sequence[tuple[str, int]]) -> list[tuple[Look, bytes]]:
        return [_look(inventory, split, index, (split, index) in pictured) for split, index in chunk]

    # Filters of warnings are the process's: what a thread does to them for an image, another may undo.
    with warnings.catch_warnings(action="ignore"):
        threads = 2 * num_cores()
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        try:
            for found in _in_order(pool, look_at, chunks, _WAITING * threads):
                looks += [look for look, _ in found]
                pictures |= {(look.split, look.index): picture for look, picture in found if picture}
                done(len(found))
        finally:
            pool.shutdown(cancel_futures=True)
    return Inspection(inventory, looks, pictures)


def _in_order(
    pool: concurrent.futures.Executor, function: Callable[[Any], Any], items: Iterable[Any], waiting: int
) -> Iterator[Any]:
    """Does what the pool's own map does, but without a task for each of a million images at once."""
    rest = iter(items)
    tasks = collections.deque(pool.submit(function, item) for item in itertools.islice(rest, waiting))
    while tasks:
        yield tasks.popleft().result()
        tasks.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))


def _choose(inventory: Inventory, limit: int) -> list[tuple[str, int]]:
    """Split and index of the images to look at: sorted by class, every n-th is a fair share of each."""
    total = sum(map(len, inventory.splits.values()))
    share = 1.0 if limit == 0 else min(1.0, limit / total)
    return [
        (name, place)
        for name, split in inventory.splits.items()
        for place in _spread(len(split), max(1, int(share * len(split))))
    ]


def _spread(size: int, count: int) -> list[int]:
    """The given number of places of 0..size - 1, evenly spread."""
    places: list[int] = np.linspace(0, size - 1, min(count, size)).round().astype(int).tolist()
    return places


def _pictured(inventory: Inventory, chosen: Sequence[tuple[str, int]]) -> frozenset[tuple[str, int]]:
    """Which of them are shown: as many of each class, of the first split that has some."""
    by_class: dict[int, list[tuple[str, int]]] = {}
    for split, index in chosen:
        rows = by_class.setdefault(int(inventory.splits[split].labels[index]), [])
        if not rows or rows[0][0] == split:
            rows.append((split, index))
    count = max(1, min(_OF_A_CLASS, _PICTURES // len(by_class)))
    some = list(by_class.values())[:_PICTURES]
    return frozenset(rows[place] for rows in some for place in _spread(len(rows), count))


def _look(inventory: Inventory, name: str, index: int, is_pictured: bool) -> tuple[Look, bytes]:
    def below(path: str) -> str:
        return path.removeprefix(f"{inventory.top}: ").removeprefix(os.path.join(inventory.top, ""))

    label, picture = int(inventory.splits[name].labels[index]), b""
    try:
        image = inventory.splits[name].read(index)
        assert isinstance(image, EncodedImage)
        height, width, _ = image.shape
        small = image.crop(0, 0, height, width, _LOOKED_AT)
        if is_pictured:
            picture = _picture(image)
    except UserError as error:
        problem = below(str(error)).rpartition("; ")[0]  # what is to be done comes last, and is the same for all
        is_damaged = isinstance(error, DamagedImageError)
        return Look(split=name, index=index, label=label, problem=problem, is_damaged=is_damaged), b""
    pixels = small.resize((_COMPARED, _COMPARED), Image.Resampling.BOX).tobytes()
    form, traits = _header(image.content, np.asarray(small))
    look = Look(
        split=name,
        index=index,
        label=label,
        name=below(image.name),
        size=(height, width),
        num_bytes=len(image.content),
        form=form,
        traits=traits,
        content=_digest(image.content),
        pixels=_digest(f"{height} {width} ".encode() + pixels),
    )
    return look, picture


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=12).digest()


def _picture(image: EncodedImage) -> bytes:
    whole = image.crop(0, 0, *image.shape[:2], _PICTURE)
    whole.thumbnail((_PICTURE, _PICTURE))
    file = io.BytesIO()
    whole.save(file, "JPEG", quality=80)
    return file.getvalue()


def _header(content: bytes, small: np.ndarray) -> tuple[str, tuple[str, ...]]:
    """Format and traits of an image that can be decoded, as ``small``, uint8 [h, w, 3]."""
    image = Image.open(io.BytesIO(content))
    is_grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    spread = int(np.ptp(small.astype(np.int16), axis=-1).max())
    found = {
        "greyscale": is_grey,
        "grey in colour": not is_grey and spread <= _SAME_GREY,
        "transparent": image.has_transparency_data,
        "turned": _is_turned(image),
        "animated": image.format != "MPO" and _is_animated(image),  # a camera's, with a preview behind the image
        "16 bits": image.mode.startswith("I"),
        "CMYK": image.mode == "CMYK",
    }
    return image.format or "unknown", tuple(trait for trait, is_so in found.items() if is_so)


def _is_turned(image: Image.Image) -> bool:
    # Asked for its EXIF data, a PNG without them would be decoded to its end.
    if "exif" not in image.info and image.format != "TIFF":
        return False
    try:
        return image.getexif().get(_ORIENTATION, 1) in _TURNED
    except Exception:  # damaged metadata are no damage of the image, and say nothing
        return False


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # what comes behind the first image may be damaged, which nobody will see
        return False


# --- tables -------------------------------------------------------------------------------------------------


def _by_split(inspection: Inspection, said: Callable[[Look], Iterable[str]]) -> Mapping[str, collections.Counter[str]]:
    """How often something is said of images, by split; a column for each, where there are several, and one for all."""
    counts = {name: collections.Counter[str]() for name in inspection.inventory.splits}
    for look in inspection.sound:
        counts[look.split].update(said(look))
    whole = sum(counts.values(), collections.Counter[str]())
    return {**(counts if len(counts) > 1 else {}), "images": whole}


def classes(inspection: Inspection) -> Table:
    """The images of each class in each split; counted by their names, whether or not they were looked at."""
    names = [*inspection.inventory.class_names, "no class"]
    splits = inspection.inventory.splits
    counts = {
        name: np.bincount(np.asarray(split.labels) % len(names), minlength=len(names)) for name, split in splits.items()
    }
    whole = sum(counts.values(), np.zeros(len(names), int))
    columns = {**(counts if len(counts) > 1 else {}), "images": whole}
    rows = [
        (name, *(int(column[label]) for column in columns.values()))
        for label, name in enumerate(names)
        if label < len(names) - 1 or whole[label]
    ]
    rows.append(("all", *(int(column.sum()) for column in columns.values())))
    known, notes = whole[:-1], []
    if len(known) and known.max() >= _UNEVEN * known.min() > 0:
        notes.append(f"the largest has {known.max() / known.min():.1f} times the images of the smallest")
    lacking = {"": whole == 0} | {
        name: (column == 0) & (whole > 0) for name, column in counts.items() if column[:-1].any()
    }
    for split, is_absent in lacking.items():
        if absent := [names[label] for label in np.flatnonzero(is_absent[:-1])]:
            more = f" and {len(absent) - _NAMED:,} more" if len(absent) > _NAMED else ""
            where = f"in {split} no images" if split else "no images"
            notes.append(f"{where} of {len(absent):,} of {len(known):,}: {', '.join(absent[:_NAMED])}{more}")
    return Table("classes", "Classes", ("class", *columns), rows, "; ".join(notes))


def sizes(inspection: Inspection) -> Table:
    """Quantiles of the images' sides and files."""
    found = list(inspection.sound)
    height, width = np.array([look.size for look in found], float).reshape(-1, 2).T
    kilobytes = np.array([look.num_bytes for look in found]) / 1000
    of = {
        "width": width,
        "height": height,
        "short side": np.minimum(height, width),
        "width / height": width / height,
        "file, kB": kilobytes,
    }
    quantiles = {"least": 0, "p5": 0.05, "median": 0.5, "p95": 0.95, "most": 1}
    rows = [
        (name, *(float(f"{np.quantile(values, q):.4g}") for q in quantiles.values()))
        for name, values in of.items()
        if len(values)
    ]
    return Table("sizes", "Sizes in pixels", ("of", *quantiles), rows)


def formats(inspection: Inspection) -> Table:
    """Formats, and how files of each end."""
    counts = _by_split(inspection, lambda look: [look.form])
    endings: dict[str, collections.Counter[str]] = {}
    for look in inspection.sound:
        ending = posixpath.splitext(look.name)[1].lower() or "none"
        endings.setdefault(look.form, collections.Counter())[ending] += 1
    rows = [
        (form, *(column[form] for column in counts.values()), ", ".join(ending for ending, _ in found.most_common()))
        for form, found in sorted(endings.items(), key=lambda item: -item[1].total())
    ]
    return Table("formats", "Formats", ("format", *counts, "endings"), rows)


def traits(inspection: Inspection) -> Table:
    """How many images are special, and what that means."""
    counts = _by_split(inspection, lambda look: look.traits)
    rows = [(trait, *(column[trait] for column in counts.values()), note) for trait, note in TRAITS.items()]
    return Table("traits", "Special images", ("kind", *counts, "meaning"), rows)


def duplicates(inspection: Inspection) -> Table:
    """Images that are there more than once, those in several splits first, then those of several classes."""
    by_content: dict[bytes, list[Look]] = {}
    by_pixels: dict[bytes, list[Look]] = {}
    for look in inspection.sound:
        by_content.setdefault(look.content, []).append(look)
        by_pixels.setdefault(look.pixels, []).append(look)
    groups = [("file", group) for group in by_content.values() if len(group) > 1]
    groups += [("pixels", group) for group in by_pixels.values() if len({look.content for look in group}) > 1]

    rows = []
    for what, group in groups:
        splits, labels = {look.split for look in group}, {look.label for look in group} - {NO_CLASS}
        across = [word for word, found in (("splits", splits), ("classes", labels)) if len(found) > 1]
        rows.append((what, " and ".join(across) or "none", len(group), " = ".join(look.name for look in group)))
    rows.sort(key=lambda found: ("splits" not in found[1], "classes" not in found[1], found[0] != "file", found[3]))
    leaks = sum("splits" in across for _, across, *_ in rows)
    note = f"{len(rows):,} groups, of which {leaks:,} across splits" if rows else ""
    return Table("duplicates", "Duplicates", ("same", "across", "images", "files"), rows, note)


def damaged(inspection: Inspection) -> Table:
    """Images that can't be decoded."""
    rows = [(look.split, look.problem) for look in inspection.looks if look.is_damaged]
    return Table(
        "damaged", "Damaged images", ("split", "file"), rows, f"{len(rows):,} can't be decoded" if rows else ""
    )


def unread(inspection: Inspection) -> Table:
    """Files that this machine didn't give."""
    rows = [(look.split, look.problem) for look in inspection.looks if look.problem and not look.is_damaged]
    return Table("unread", "Files that can't be read", ("split", "file"), rows)


TABLES: tuple[Callable[[Inspection], Table], ...] = (classes, sizes, formats, traits, duplicates, damaged, unread)
"""Tables on a source, in this order."""
