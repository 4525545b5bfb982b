"""Inspects each image of a source once: its format and size, whether it can be decoded, and whether it has duplicates.

    split.Inventory ──► inspect_images: one `Finding` per image ──► tables_of ──► text, JSON, a page

A task with other targets than classes adds fields to `Finding`, and functions to `tables_of`.
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
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from mnv2_jax.config import IGNORED
from mnv2_jax.data.boxes import FAULTS, Annotations, Fault, annotations_of, has_boxes
from mnv2_jax.data.cores import num_cores
from mnv2_jax.data.images import DamagedImageError, EncodedImage
from mnv2_jax.data.masks import MaskReader, Meaning, advice
from mnv2_jax.data.split import NO_CLASS, Inventory, spread
from mnv2_jax.errors import UserError

_LOOKED_AT, _COMPARED = 64, 16
"""Sides in pixels: the smallest at which a JPEG is decoded, and the size at which images are compared."""
_PICTURE, _PICTURES, _PER_CLASS = 128, 240, 8
"""The longest side of a thumbnail in pixels, the number of thumbnails, and the number per class at most."""
_SAME_GREY = 2
"""Largest difference, out of 255, between the channels of an image that counts as grey."""
_CHUNK, _WAITING = 32, 4
"""Images that a thread inspects in a row, and how many such chunks wait for each thread."""
_TURNED = range(2, 9)
"""Values of the EXIF tag 0x0112 by which an image is rotated or mirrored."""
_ORIENTATION = 0x0112
_AREAS: Mapping[str, float] = {"small": 32**2, "medium": 96**2, "large": np.inf}
"""COCO's words for the size of a box, each with the area in pixels below which it holds."""
_HEADS = ("boxes", "class", "endings", "example", "format", "images", "kind", "meaning", "size")
"""Heads of columns beside those of splits, which may have the same names."""
_MOST_NAMED, _UNEVEN = 5, 1.5
"""Classes that a note names at most; and the ratio of the largest to the smallest class that is worth a note."""

TRAITS: Mapping[str, str] = {
    "greyscale": "the three channels are the same",
    "grey in colour": "stored in colour, but all pixels are grey",
    "transparent": "transparency is dropped",
    "turned": "their EXIF data say how to turn them, which is ignored: they are used as they are stored",
    "animated": "or of several pages; only the first is used",
    "16 bits": "scaled to 8 bits",
    "CMYK": "converted to RGB",
}
"""Traits that an image may have, each with what it means for training."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskFinding:
    """The findings on the mask of an image."""

    name: str = ""
    """Path of the file below the top."""
    problem: str = ""
    """Why it can't be read, decoded or used, "; " and what to do; "" for a mask that can be used."""
    size: tuple[int, int] = (0, 0)
    """Height and width in pixels."""
    counts: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """Number of pixels of each value, as the file has it (`masks.EncodedMask.values`)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The findings on one image."""

    split: str
    index: int
    """Index of the image in its split."""
    label: int
    """Label in the `split.Inventory`."""
    name: str = ""
    """Path of the file below the top."""
    problem: str = ""
    """Why the image can't be read or decoded; "" for one that can."""
    is_damaged: bool = False
    """Whether the problem is the image itself, rather than the machine."""
    size: tuple[int, int] = (0, 0)
    """Height and width in pixels."""
    num_bytes: int = 0
    form: str = ""
    """Pillow's name of the format."""
    traits: tuple[str, ...] = ()
    """Keys of `TRAITS`."""
    content: bytes = b""
    """A digest of the file."""
    pixels: bytes = b""
    """A digest of the size and of the pixels at 16 × 16."""
    mask: MaskFinding | None = None
    """The findings on its mask, where the source has masks."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The findings on a source."""

    inventory: Inventory
    findings: Sequence[Finding]
    """Findings on the images that were inspected, in the order of the splits."""
    pictures: Mapping[tuple[str, int], bytes]
    """Thumbnails of some images, JPEG files by split and index."""

    @property
    def sound(self) -> Iterator[Finding]:
        """The findings on the images that can be decoded."""
        return (finding for finding in self.findings if not finding.problem)

    @property
    def num_images(self) -> int:
        """The number of all images in the source, inspected or not."""
        return sum(map(len, self.inventory.splits.values()))

    def class_of(self, finding: Finding) -> str:
        """Returns the name of an image's class."""
        return "no class" if finding.label == NO_CLASS else self.inventory.class_names[finding.label]


Counts = TypeVar("Counts")
"""Numbers of images or boxes, by what is counted."""


class Table(NamedTuple):
    """A table on one subject."""

    name: str
    """Key of the table in JSON."""
    title: str
    head: tuple[str, ...]
    """One word for each column, all different; the first column is text."""
    rows: Sequence[tuple[Any, ...]]
    """Rows of texts and numbers."""
    note: str = ""


def inspect_images(inventory: Inventory, limit: int, with_pictures: bool, advance: Callable[[int], None]) -> Inspection:
    """Reads and decodes images once each, in threads.

    Args:
      inventory: the images of the source.
      limit: how many images to inspect at most, evenly spread over the splits and classes; 0: all.
      with_pictures: whether to keep thumbnails of some images of each class.
      advance: called with the number of images inspected since the last call.
    """
    chosen = _choose(inventory, limit)
    pictured = _choose_pictures(inventory, chosen) if with_pictures else frozenset[tuple[str, int]]()
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    findings: list[Finding] = []
    pictures: dict[tuple[str, int], bytes] = {}

    def inspect(chunk: Sequence[tuple[str, int]]) -> list[tuple[Finding, bytes]]:
        return [_inspect(inventory, split, index, (split, index) in pictured) for split, index in chunk]

    # All threads share the warning filters, and one would undo what another sets; so warnings are ignored here.
    with warnings.catch_warnings(action="ignore"):
        threads = 2 * num_cores()
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        try:
            for results in _in_order(pool, inspect, chunks, _WAITING * threads):
                findings += [finding for finding, _ in results]
                pictures |= {(finding.split, finding.index): picture for finding, picture in results if picture}
                advance(len(results))
        finally:
            pool.shutdown(cancel_futures=True)
    return Inspection(inventory, findings, pictures)


def _in_order(
    pool: concurrent.futures.Executor, function: Callable[[Any], Any], items: Iterable[Any], waiting: int
) -> Iterator[Any]:
    """Maps a function over items as the pool's own map does, but doesn't submit all tasks at once."""
    remaining = iter(items)
    tasks = collections.deque(pool.submit(function, item) for item in itertools.islice(remaining, waiting))
    while tasks:
        yield tasks.popleft().result()
        tasks.extend(pool.submit(function, item) for item in itertools.islice(remaining, 1))


def _choose(inventory: Inventory, limit: int) -> list[tuple[str, int]]:
    """Chooses the split and index of the images to inspect; as they are sorted by class, each gets its share."""
    total = sum(map(len, inventory.splits.values()))
    share = 1.0 if limit == 0 else min(1.0, limit / total)
    return [
        (name, place)
        for name, split in inventory.splits.items()
        for place in spread(len(split), max(1, int(share * len(split))))
    ]


def _choose_pictures(inventory: Inventory, chosen: Sequence[tuple[str, int]]) -> frozenset[tuple[str, int]]:
    """Chooses the images to show: equally many of each class, from the first split that has some of it."""
    by_class: dict[int, list[tuple[str, int]]] = {}
    for split, index in chosen:
        rows = by_class.setdefault(int(inventory.splits[split].labels[index]), [])
        if not rows or rows[0][0] == split:
            rows.append((split, index))
    count = max(1, min(_PER_CLASS, _PICTURES // len(by_class)))
    groups = list(by_class.values())[:_PICTURES]
    return frozenset(rows[place] for rows in groups for place in spread(len(rows), count))


def _inspect(inventory: Inventory, name: str, index: int, is_pictured: bool) -> tuple[Finding, bytes]:
    """Inspects one image; returns the findings and its thumbnail, b"" where none is wanted."""

    def below(path: str) -> str:
        return path.removeprefix(f"{inventory.top}: ").removeprefix(os.path.join(inventory.top, ""))

    label, picture, mask = int(inventory.splits[name].labels[index]), b"", None
    if (reader := _masks_of(inventory, name)) is not None:
        mask = _inspect_mask(reader, index, below)
    try:
        image = inventory.splits[name].read(index)
        assert isinstance(image, EncodedImage)
        height, width, _ = image.shape
        small = image.crop(0, 0, height, width, _LOOKED_AT)
        if is_pictured:
            picture = _picture(image)
    except UserError as error:
        problem = below(str(error)).rpartition("; ")[0]  # drops the advice, which is the same for all images
        is_damaged = isinstance(error, DamagedImageError)
        return Finding(split=name, index=index, label=label, problem=problem, is_damaged=is_damaged, mask=mask), b""
    pixels = small.resize((_COMPARED, _COMPARED), Image.Resampling.BOX).tobytes()
    form, traits = _header(image.content, np.asarray(small))
    finding = Finding(
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
        mask=mask,
    )
    return finding, picture


def _masks_of(inventory: Inventory, split: str) -> MaskReader | None:
    reader = inventory.splits[split].targets.get("mask")
    assert reader is None or isinstance(reader, MaskReader)
    return reader


def _inspect_mask(reader: MaskReader, index: int, below: Callable[[str], str]) -> MaskFinding:
    """Inspects one mask; ``below`` shortens a path."""
    try:
        mask = reader(index)
        values, counts = _count_values(mask.values())
    except UserError as error:
        return MaskFinding(problem=below(str(error)))
    return MaskFinding(name=below(mask.name), size=mask.shape, counts=dict(zip(values, counts, strict=True)))


def _count_values(values: np.ndarray) -> tuple[list[int], list[int]]:
    if values.dtype == np.uint8:
        counts = np.bincount(values.reshape(-1))
        found = np.flatnonzero(counts)
        return found.tolist(), counts[found].tolist()
    found, counts = np.unique(values, return_counts=True)
    return found.tolist(), counts.tolist()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=12).digest()


def _picture(image: EncodedImage) -> bytes:
    whole = image.crop(0, 0, *image.shape[:2], _PICTURE)
    whole.thumbnail((_PICTURE, _PICTURE))
    file = io.BytesIO()
    whole.save(file, "JPEG", quality=80)
    return file.getvalue()


def _header(content: bytes, small: np.ndarray) -> tuple[str, tuple[str, ...]]:
    """Returns the format and the traits of an image; ``small`` is the image decoded to uint8 [h, w, 3]."""
    image = Image.open(io.BytesIO(content))
    is_grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    spread = int(np.ptp(small.astype(np.int16), axis=-1).max())
    has_trait = {
        "greyscale": is_grey,
        "grey in colour": not is_grey and spread <= _SAME_GREY,
        "transparent": image.has_transparency_data,
        "turned": _is_turned(image),
        "animated": image.format != "MPO" and _is_animated(image),  # MPO: a camera's image followed by a preview
        "16 bits": image.mode.startswith("I"),
        "CMYK": image.mode == "CMYK",
    }
    return image.format or "unknown", tuple(trait for trait, is_present in has_trait.items() if is_present)


def _is_turned(image: Image.Image) -> bool:
    # Pillow would decode a PNG without EXIF data to its end in search of them.
    if "exif" not in image.info and image.format != "TIFF":
        return False
    try:
        return image.getexif().get(_ORIENTATION, 1) in _TURNED
    except Exception:  # damaged metadata don't make a damaged image
        return False


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # only the first image is used, so damage behind it doesn't matter
        return False


# --- tables -------------------------------------------------------------------------------------------------


def _head(split: str) -> str:
    """Returns the head of a split's column."""
    return f"split {split}" if split in _HEADS else split


def _with_whole(counts: Mapping[str, Counts], name: str, whole: Counts) -> dict[str, Counts]:
    """Returns columns of numbers by their heads: one for each of several splits, and that of all, named ``name``."""
    columns = {_head(split): count for split, count in counts.items()}
    return {**(columns if len(counts) > 1 else {}), name: whole}


def _without(count: int, total: int, noun: str) -> str:
    """Writes how many classes have nothing of a kind."""
    classes, have = "class" if total == 1 else "classes", "has" if count == 1 else "have"
    return f"{count:,} of {total:,} {classes} {have} no {noun}"


def _by_split(
    inspection: Inspection, words_of: Callable[[Finding], Iterable[str]]
) -> Mapping[str, collections.Counter[str]]:
    """Counts the words that describe images, in a column for all images and, with several splits, one for each."""
    counts = {name: collections.Counter[str]() for name in inspection.inventory.splits}
    for finding in inspection.sound:
        counts[finding.split].update(words_of(finding))
    return _with_whole(counts, "images", sum(counts.values(), collections.Counter[str]()))


def classes(inspection: Inspection) -> Table:
    """Makes the table of the images of each class in each split; it counts all images, inspected or not."""
    names = [*inspection.inventory.class_names, "no class"]
    splits = inspection.inventory.splits
    counts = {
        name: np.bincount(np.asarray(split.labels) % len(names), minlength=len(names)) for name, split in splits.items()
    }
    whole = sum(counts.values(), np.zeros(len(names), int))
    columns = _with_whole(counts, "images", whole)
    rows = [
        (name, *(int(column[label]) for column in columns.values()))
        for label, name in enumerate(names)
        if label < len(names) - 1 or whole[label]
    ]
    rows.append(("all", *(int(column.sum()) for column in columns.values())))
    per_class, notes = whole[:-1], []
    if len(per_class) and per_class.max() >= _UNEVEN * per_class.min() > 0:
        ratio = per_class.max() / per_class.min()
        notes.append(f"the largest class has {ratio:.1f} times as many images as the smallest")
    is_missing = {"": whole == 0} | {
        name: (column == 0) & (whole > 0) for name, column in counts.items() if column[:-1].any()
    }
    for split, is_absent in is_missing.items():
        if absent := [names[label] for label in np.flatnonzero(is_absent[:-1])]:
            more = f" and {len(absent) - _MOST_NAMED:,} more" if len(absent) > _MOST_NAMED else ""
            place = f" in {split}" if split else ""
            notes.append(
                f"{_without(len(absent), len(per_class), 'images')}{place}: {', '.join(absent[:_MOST_NAMED])}{more}"
            )
    return Table("classes", "Classes", ("class", *columns), rows, "; ".join(notes))


def sizes(inspection: Inspection) -> Table:
    """Makes the table of the quantiles of the images' sides and of the files' sizes."""
    findings = list(inspection.sound)
    height, width = np.array([finding.size for finding in findings], float).reshape(-1, 2).T
    kilobytes = np.array([finding.num_bytes for finding in findings]) / 1000
    quantities = {
        "width": width,
        "height": height,
        "short side": np.minimum(height, width),
        "width / height": width / height,
        "file, kB": kilobytes,
    }
    quantiles = {"least": 0, "p5": 0.05, "median": 0.5, "p95": 0.95, "most": 1}
    rows = [
        (name, *(float(f"{np.quantile(values, q):.4g}") for q in quantiles.values()))
        for name, values in quantities.items()
        if len(values)
    ]
    return Table("sizes", "Sizes in pixels", ("of", *quantiles), rows)


def formats(inspection: Inspection) -> Table:
    """Makes the table of the images' formats, with the extensions of the files."""
    counts = _by_split(inspection, lambda finding: [finding.form])
    endings: dict[str, collections.Counter[str]] = {}
    for finding in inspection.sound:
        ending = posixpath.splitext(finding.name)[1].lower() or "none"
        endings.setdefault(finding.form, collections.Counter())[ending] += 1
    rows = [
        (form, *(column[form] for column in counts.values()), ", ".join(ending for ending, _ in count.most_common()))
        for form, count in sorted(endings.items(), key=lambda item: -item[1].total())
    ]
    return Table("formats", "Formats", ("format", *counts, "endings"), rows)


def traits(inspection: Inspection) -> Table:
    """Makes the table of how many images have each of the `TRAITS`, and what that means."""
    counts = _by_split(inspection, lambda finding: finding.traits)
    rows = [(trait, *(column[trait] for column in counts.values()), note) for trait, note in TRAITS.items()]
    return Table("traits", "Special images", ("kind", *counts, "meaning"), rows)


def duplicates(inspection: Inspection) -> Table:
    """Makes the table of duplicate images: those in several splits first, then those of several classes."""
    by_content: dict[bytes, list[Finding]] = {}
    by_pixels: dict[bytes, list[Finding]] = {}
    for finding in inspection.sound:
        by_content.setdefault(finding.content, []).append(finding)
        by_pixels.setdefault(finding.pixels, []).append(finding)
    groups = [("file", group) for group in by_content.values() if len(group) > 1]
    groups += [("pixels", group) for group in by_pixels.values() if len({finding.content for finding in group}) > 1]

    rows = []
    for same, group in groups:
        splits, labels = {finding.split for finding in group}, {finding.label for finding in group} - {NO_CLASS}
        across = [word for word, values in (("splits", splits), ("classes", labels)) if len(values) > 1]
        rows.append((same, " and ".join(across) or "none", len(group), " = ".join(finding.name for finding in group)))
    rows.sort(key=lambda row: ("splits" not in row[1], "classes" not in row[1], row[0] != "file", row[3]))
    leaks = sum("splits" in across for _, across, *_ in rows)
    note = f"{len(rows):,} {'group' if len(rows) == 1 else 'groups'}, of which {leaks:,} across splits" if rows else ""
    return Table("duplicates", "Duplicates", ("same", "across", "images", "files"), rows, note)


def damaged(inspection: Inspection) -> Table:
    """Makes the table of the images that can't be decoded."""
    rows = [(finding.split, finding.problem) for finding in inspection.findings if finding.is_damaged]
    note = f"{len(rows):,} can't be decoded; a training stops at them, unless --config.data.skip_corrupt=True"
    return Table("damaged", "Damaged images", ("split", "file"), rows, note if rows else "")


def unread(inspection: Inspection) -> Table:
    """Makes the table of the files that this machine couldn't read, though their images may be sound."""
    rows = [
        (finding.split, finding.problem)
        for finding in inspection.findings
        if finding.problem and not finding.is_damaged
    ]
    return Table("unread", "Files that can't be read", ("split", "file"), rows)


# --- tables on masks ----------------------------------------------------------------------------------------


def masks(inspection: Inspection) -> Table:
    """Makes the table of the values in masks: for each split the share of all pixels, and the images that have it."""
    inventory = inspection.inventory
    pixels = {name: collections.Counter[tuple[int, str]]() for name in inventory.splits}
    images = {name: collections.Counter[tuple[int, str]]() for name in inventory.splits}
    for finding in inspection.findings:
        if finding.mask is not None:
            meaning = _meaning(inventory, finding.split)
            words = {value: (value, meaning.word_for(value)) for value in finding.mask.counts}
            pixels[finding.split].update({words[value]: count for value, count in finding.mask.counts.items()})
            images[finding.split].update(words.values())
    first = _meaning(inventory, next(iter(inventory.splits)))
    every = {(value, first.word_for(value)) for value, label in first.class_of.items() if label != IGNORED}
    rows, unused = [], list[str]()
    for value, word in sorted(every.union(*pixels.values())):
        names = {name: _class_of_value(_meaning(inventory, name), value) for name in inventory.splits}
        shares = [100 * pixels[name][value, word] / max(1, pixels[name].total()) for name in inventory.splits]
        label = " / ".join(dict.fromkeys(names.values()))
        rows.append((word, label, *shares, *(images[name][value, word] for name in inventory.splits)))
        if not any(shares):
            unused.append(label)
    head = ("value", "class", *(f"{name} %" for name in pixels), *(f"{name} images" for name in pixels))
    return Table("masks", "Values in masks", head, rows, "; ".join(_notes_on_masks(inspection, pixels, unused)))


def _notes_on_masks(
    inspection: Inspection,
    pixels: Mapping[str, collections.Counter[tuple[int, str]]],
    unused: Sequence[str],
) -> Iterator[str]:
    """Writes what a user should know of the values; ``pixels`` counts them by split."""
    meanings = {name: _meaning(inspection.inventory, name) for name in pixels}
    found = {value for counts in pixels.values() for value, _ in counts}
    shares = {
        name: sum(count for (value, _), count in counts.items() if _is_ignored(meanings[name], value))
        / max(1, counts.total())
        for name, counts in pixels.items()
    }
    yield f"ignored: {', '.join(f'{share:.2%} of the pixels of {name}' for name, share in shares.items())}"
    if found == {0, 255} and all(meaning.kind == "index" for meaning in meanings.values()):
        yield "there are only 0 and 255: data.mask_values=binary"
    if unused:
        more = f" and {len(unused) - _MOST_NAMED:,} more" if len(unused) > _MOST_NAMED else ""
        yield f"no pixel has {', '.join(unused[:_MOST_NAMED])}{more}"


def _meaning(inventory: Inventory, split: str) -> Meaning:
    reader = _masks_of(inventory, split)
    assert reader is not None
    return reader.meaning


def _is_ignored(meaning: Meaning, value: int) -> bool:
    label = meaning.class_of.get(value)
    return label == IGNORED or label in meaning.ignored


def _class_of_value(meaning: Meaning, value: int) -> str:
    """Returns the name of the class that a value means, or what else becomes of its pixels."""
    label = meaning.class_of.get(value)
    if label is None:
        return "no class"
    if label == IGNORED:
        return "ignored"
    return f"{meaning.class_names[label]}{' (ignored)' if label in meaning.ignored else ''}"


def unknown_values(inspection: Inspection) -> Table:
    """Makes the table of the masks that hold values which no class has; a training refuses them."""
    rows, found = [], dict[str, set[int]]()
    for finding in inspection.findings:
        if finding.mask is None:
            continue
        meaning = _meaning(inspection.inventory, finding.split)
        counts = {value: count for value, count in finding.mask.counts.items() if value not in meaning.class_of}
        if counts and meaning.class_names:
            words = [meaning.word_for(value) for value in counts]
            more = f" and {len(words) - _MOST_NAMED:,} more" if len(words) > _MOST_NAMED else ""
            stated = f"{', '.join(words[:_MOST_NAMED])}{more}"
            rows.append((finding.split, finding.mask.name, stated, sum(counts.values())))
            found.setdefault(finding.split, set()).update(finding.mask.counts)
    note = ""
    if rows:
        split, values = next(iter(found.items()))
        masks = "1 mask" if len(rows) == 1 else f"{len(rows):,} masks"
        note = f"{masks}, which a training refuses: {advice(_meaning(inspection.inventory, split), values)}"
    return Table("unknown_values", "Values of no class", ("split", "mask", "values", "pixels"), rows, note)


def mask_sizes(inspection: Inspection) -> Table:
    """Makes the table of the masks of another size than their image, which is then resized to the mask."""
    rows = [
        (finding.split, finding.mask.name, _size(finding.mask.size), _size(finding.size))
        for finding in inspection.sound
        if finding.mask is not None and not finding.mask.problem and finding.mask.size != finding.size
    ]
    note = f"{len(rows):,}; their images are resized to the size of the mask" if rows else ""
    return Table("mask_sizes", "Masks of another size", ("split", "mask", "size", "size of the image"), rows, note)


def _size(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width}×{height}"


def unusable_masks(inspection: Inspection) -> Table:
    """Makes the table of the masks that can't be read, decoded or used."""
    problems = [
        (finding.split, *finding.mask.problem.rpartition("; "))
        for finding in inspection.findings
        if finding.mask is not None and finding.mask.problem
    ]
    rows = [(split, problem) for split, problem, *_ in problems]
    note = f"{len(rows):,}, which a training refuses: {problems[0][-1]}" if rows else ""
    return Table("unusable_masks", "Masks that can't be used", ("split", "file"), rows, note)


# --- tables on boxes ----------------------------------------------------------------------------------------


def _annotations(inspection: Inspection) -> Mapping[str, Annotations]:
    """Returns the annotations of the splits that have boxes."""
    every = {name: annotations_of(split) for name, split in inspection.inventory.splits.items()}
    return {name: found for name, found in every.items() if found is not None}


def boxes(inspection: Inspection) -> Table:
    """Makes the table of the boxes of each class in each split; it counts those of all images, inspected or not."""
    names = inspection.inventory.class_names
    counts = {
        name: np.bincount(found.classes, minlength=len(names)) for name, found in _annotations(inspection).items()
    }
    columns = _with_whole(counts, "boxes", np.sum(list(counts.values()), 0))
    rows = [(name, *(int(column[label]) for column in columns.values())) for label, name in enumerate(names)]
    rows.append(("all", *(int(column.sum()) for column in columns.values())))
    absent = [names[label] for label in np.flatnonzero(columns["boxes"] == 0)]
    more = f" and {len(absent) - _MOST_NAMED:,} more" if len(absent) > _MOST_NAMED else ""
    note = f"{_without(len(absent), len(names), 'boxes')}: {', '.join(absent[:_MOST_NAMED])}{more}"
    return Table("boxes", "Boxes", ("class", *columns), rows, note if absent else "")


def box_sizes(inspection: Inspection) -> Table:
    """Makes the table of the boxes by their area in pixels of the image; it counts those of the inspected images."""
    every = _annotations(inspection)
    limits, counts = list(_AREAS.values())[:-1], {name: np.zeros(len(_AREAS), int) for name in every}
    for finding in inspection.sound:
        y0, x0, y1, x1 = every[finding.split].boxes(finding.index, finding.size).T
        kinds = np.searchsorted(limits, (y1 - y0) * (x1 - x0), side="right")
        counts[finding.split] += np.bincount(kinds, minlength=len(_AREAS))
    columns = _with_whole(counts, "boxes", np.sum(list(counts.values()), 0))
    rows = [(word, *(int(column[kind]) for column in columns.values())) for kind, word in enumerate(_AREAS)]
    return Table(
        "box_sizes",
        "Boxes by size",
        ("size", *columns),
        rows,
        "small: below 32² pixels; medium: below 96²; large: others",
    )


def boxes_per_image(inspection: Inspection) -> Table:
    """Makes the table of how many boxes the images of each split have, inspected or not."""
    rows = []
    for name, found in _annotations(inspection).items():
        counts = found.counts
        least, median, most = int(counts.min()), float(np.median(counts)), int(counts.max())
        rows.append((name, len(counts), int((counts == 0).sum()), least, median, most))
    head = ("split", "images", "without boxes", "least", "median", "most")
    return Table("boxes_per_image", "Boxes of an image", head, rows)


def box_faults(inspection: Inspection) -> Table:
    """Makes the table of what was left out, dropped or corrected, with a file as an example."""
    every = _annotations(inspection)
    nothing = Fault(0, "")
    rows = []
    for kind, words in FAULTS.items():
        met = [found.faults.get(kind, nothing) for found in every.values()]
        example = next((fault.example for fault in met if fault.times), "")
        rows.append((kind, *(fault.times for fault in met), words, example))
    return Table(
        "box_faults", "Boxes and files with a defect", ("kind", *map(_head, every), "meaning", "example"), rows
    )


def image_sizes(inspection: Inspection) -> Table:
    """Makes the table of the images whose size isn't the one that their annotation states."""
    every = _annotations(inspection)
    rows = []
    for finding in inspection.sound:
        stated = every[finding.split].sizes[finding.index].tolist()
        if all(stated) and tuple(stated) != finding.size:
            rows.append((finding.split, finding.name, _size(finding.size), _size((stated[0], stated[1]))))
    note = f"{len(rows):,}; their boxes are probably those of another image, or of the image turned" if rows else ""
    return Table("image_sizes", "Images of another size than stated", ("split", "image", "size", "stated"), rows, note)


TABLES: tuple[Callable[[Inspection], Table], ...] = (classes, sizes, formats, traits, duplicates, damaged, unread)
"""Functions that make the tables on images with classes, in the order in which the tables are shown."""
MASK_TABLES: tuple[Callable[[Inspection], Table], ...] = (
    *(masks, unknown_values, mask_sizes, unusable_masks),
    *(table for table in TABLES if table is not classes),
)
"""Functions that make the tables on images with masks."""
BOX_TABLES: tuple[Callable[[Inspection], Table], ...] = (
    *(boxes, box_sizes, boxes_per_image, box_faults, image_sizes),
    *(table for table in TABLES if table is not classes),
)
"""Functions that make the tables on images with boxes."""


def tables_of(inspection: Inspection) -> list[Table]:
    """Makes the tables on a source."""
    splits = inspection.inventory.splits.values()
    has_masks = any("mask" in split.targets for split in splits)
    tables = MASK_TABLES if has_masks else BOX_TABLES if any(map(has_boxes, splits)) else TABLES
    return [make(inspection) for make in tables]
