"""Boxes of object detection: what annotations say is put in order once, when a split is opened, and read by number.

    Objects, as the files have them ──► in_order: corners put in order, clipped, dropped, counted ──► Annotations
    Annotations ──► readers: boxes(i) float32 [n, 4], classes(i) int32 [n], crowd(i) bool [n]; no image is decoded

A crowd of COCO and a difficult object of VOC are ignored regions: an object found there is neither right nor wrong, and
nothing is trained there. Both are marked in "crowd".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mnv2_jax.data.images import Picture
from mnv2_jax.data.split import Rows, Split, origin_of, sha256_of

FAULTS: Mapping[str, str] = {
    "no area": "boxes without area, dropped",
    "outside": "boxes wholly outside of their image, or of its stated size, dropped",
    "clipped": "boxes partly outside of their image, or of its stated size, clipped",
    "reversed": "boxes whose corners were reversed, put in order",
    "outline": "outlines, replaced by the boxes around them",
    "ignored": "crowds and difficult objects, neither trained nor scored",
    "no boxes": "images without boxes, kept",
    "no annotation": "images without annotation, left out",
    "no image": "annotations without image, left out",
}
"""What is counted in a split, each with what becomes of it."""
_ROUNDING = 2e-5
"""Share of a side by which a box may reach out of its image because numbers were rounded; it isn't counted then."""


class Fault(NamedTuple):
    """How often one of the `FAULTS` was met."""

    times: int
    example: str
    """The file in which it was met first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objects:
    """The objects in n images, as the annotations have them; m objects in all."""

    files: Sequence[str]
    """The file to name for each image, [n]."""
    sizes: np.ndarray
    """int [n, 2]: height and width as the annotations state them; 0 where they don't."""
    image: np.ndarray
    """int [m]: the image of each object."""
    corners: np.ndarray
    """float64 [m, 4]: y0, x0, y1, x1."""
    classes: np.ndarray
    """int [m]: numbers of classes."""
    crowd: np.ndarray
    """bool [m]: whether it is a crowd, or difficult."""
    areas: np.ndarray | None = None
    """float [m]: areas of the objects' outlines in pixels; None where they aren't known."""
    is_one_based: bool = False
    """Whether pixels count from 1 and the end is inclusive, as in VOC."""
    is_relative: bool = False
    """Whether corners are shares of the image's height and width, as in YOLO; `sizes` aren't read then."""
    image_ids: np.ndarray | None = None
    """[n]: the ids of the images, as `Annotations.image_ids`."""
    class_ids: tuple[int, ...] = ()
    """As `Annotations.class_ids`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotations:
    """The boxes of n images; m in all."""

    starts: np.ndarray
    """int64 [n + 1]: image i has the objects from starts[i] to starts[i + 1]."""
    corners: np.ndarray
    """float32 [m, 4]: y0, x0, y1, x1 with exclusive end; pixels, or shares of the image if `is_relative`."""
    classes: np.ndarray
    """int32 [m]: numbers of classes."""
    crowd: np.ndarray
    """bool [m]: whether it is an ignored region."""
    sizes: np.ndarray
    """int32 [n, 2]: height and width of the images as the annotations state them; 0 where they don't."""
    is_relative: bool
    areas: np.ndarray | None
    """float32 [m]: areas of the objects' outlines in pixels, by which COCO calls them small or large; None: the boxes'
    own areas count."""
    image_ids: np.ndarray | None
    """[n]: COCO's ids of the images; None for other sources."""
    class_ids: tuple[int, ...]
    """COCO's ids of the categories, in the order of the classes; empty for other sources."""
    faults: Mapping[str, Fault] = dataclasses.field(default_factory=dict)
    """What was met in the whole split, by the keys of `FAULTS`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> np.ndarray:
        """The number of objects of each image, int64 [n]."""
        return np.diff(self.starts)

    def of(self, index: int) -> slice:
        """Returns the places of an image's objects."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def boxes(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Returns the boxes of an image.

        Args:
          index: the image.
          size: its height and width in pixels, which matter if `is_relative`.

        Returns:
          float32 [n, 4]: y0, x0, y1, x1 in pixels, with exclusive end.
        """
        corners = self.corners[self.of(index)]
        return corners * np.array([*size, *size], np.float32) if self.is_relative else corners

    def rows(self, rows: np.ndarray) -> Annotations:
        """Returns the annotations of some images, given by indices, int [k], in this order."""
        counts = self.counts[rows]
        starts = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], counts)
        return dataclasses.replace(
            self,
            starts=starts,
            corners=self.corners[places],
            classes=self.classes[places],
            crowd=self.crowd[places],
            sizes=self.sizes[rows],
            areas=None if self.areas is None else self.areas[places],
            image_ids=None if self.image_ids is None else self.image_ids[rows],
        )


def in_order(objects: Objects, faults: Mapping[str, Sequence[str]] | None = None) -> Annotations:
    """Puts corners in order, clips boxes to their images, drops those that have no area then, and counts all of it.

    Args:
      objects: the objects. Where corners aren't relative and the size of an image is 0, only what lies left of it or
        above is clipped.
      faults: files that the objects can't count themselves, by the keys of `FAULTS`.
    """
    order = np.argsort(objects.image, kind="stable")
    image, corners = objects.image[order], objects.corners[order].reshape(-1, 4)
    low, high = np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])
    is_reversed, is_empty = (low != corners[:, :2]).any(1), (low == high).any(1)
    low = low - 1 if objects.is_one_based else low
    sizes = np.ones((len(objects.files), 2)) if objects.is_relative else objects.sizes
    size = np.where(sizes > 0, sizes, np.inf)[image]
    inner_low, inner_high = (np.clip(corner, 0, size).astype(np.float32) for corner in (low, high))
    is_outside = ~is_empty & ((high <= 0) | (low >= size)).any(1)
    is_empty |= ~is_outside & (inner_low >= inner_high).any(1)  # too small for float32
    is_kept = ~is_empty & ~is_outside
    reach = np.maximum(-low, high - size).max(1, initial=0)
    is_clipped = is_kept & (reach > _ROUNDING * size.max(1, initial=0))
    crowd = objects.crowd[order]
    counts = np.bincount(image[is_kept], minlength=len(objects.files))
    met = {
        "no area": image[is_empty],
        "outside": image[is_outside],
        "clipped": image[is_clipped],
        "reversed": image[is_kept & is_reversed],
        "ignored": image[is_kept & crowd],
        "no boxes": np.flatnonzero(counts == 0),
    }
    counted = {kind: Fault(len(rows), objects.files[rows[0]]) for kind, rows in met.items() if len(rows)}
    counted |= faults_of(faults or {})
    return Annotations(
        starts=np.concatenate([[0], np.cumsum(counts)]),
        corners=np.concatenate([inner_low, inner_high], 1)[is_kept],
        classes=objects.classes[order][is_kept].astype(np.int32),
        crowd=crowd[is_kept],
        sizes=np.zeros_like(sizes, np.int32) if objects.is_relative else sizes.astype(np.int32),
        is_relative=objects.is_relative,
        areas=None if objects.areas is None else objects.areas[order][is_kept].astype(np.float32),
        image_ids=objects.image_ids,
        class_ids=objects.class_ids,
        faults={kind: counted[kind] for kind in FAULTS if kind in counted},
    )


def faults_of(files: Mapping[str, Sequence[str]]) -> dict[str, Fault]:
    """Counts files that were left out, by the keys of `FAULTS`."""
    return {kind: Fault(len(paths), paths[0]) for kind, paths in files.items() if paths}


def note_of(name: str, faults: Mapping[str, Fault]) -> tuple[str, ...]:
    """Returns a note, if any, that counts what was met in a split, with an example of each; ``name``: the split."""
    parts = [f"{FAULTS[kind]}: {fault.times:,}, as in {fault.example}" for kind, fault in faults.items()]
    return (f"{name}: {'; '.join(parts)}",) if parts else ()


# --- readers ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BoxReader:
    """Reads the boxes of images by their number."""

    annotations: Annotations
    read: Callable[[int], Picture]
    """Reads the file of an image, whose size is needed where boxes are relative; only its header is decoded."""

    def __call__(self, index: int) -> np.ndarray:
        """Returns boxes, float32 [n, 4]: y0, x0, y1, x1 in pixels, with exclusive end.

        Raises:
          UserError: if boxes are relative, and the file of the image can't be read.
        """
        is_relative = self.annotations.is_relative
        height, width = self.read(index).shape[:2] if is_relative else self.annotations.sizes[index].tolist()
        return self.annotations.boxes(index, (height, width))

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns the digest of the boxes."""
        chosen = self.annotations.rows(_indices(self.annotations, rows))
        return {"corners": sha256_of(chosen.corners), "counts": sha256_of(chosen.counts)}


@dataclasses.dataclass(frozen=True)
class FieldReader:
    """Reads what else is known of the objects of images, by the images' number."""

    annotations: Annotations
    field: str
    """A field of `Annotations` with a value for each object: classes or crowd."""

    def __call__(self, index: int) -> np.ndarray:
        """Returns the values of an image's objects, [n]."""
        values: np.ndarray = getattr(self.annotations, self.field)[self.annotations.of(index)]
        return values

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns the digest of the values."""
        chosen = self.annotations.rows(_indices(self.annotations, rows))
        return {"values": sha256_of(getattr(chosen, self.field))}


@dataclasses.dataclass(frozen=True)
class Renumbered:
    """Reads the classes of images with other numbers."""

    read: Callable[[int], np.ndarray]
    numbers: np.ndarray
    """int32 [k]: the new number of each class."""

    def __call__(self, index: int) -> np.ndarray:
        """Returns the new numbers of an image's classes, int32 [n]."""
        renumbered: np.ndarray = self.numbers[self.read(index)]
        return renumbered


def _indices(annotations: Annotations, rows: Rows) -> np.ndarray:
    return np.arange(len(annotations))[rows]


def readers(annotations: Annotations, read: Callable[[int], Picture]) -> dict[str, Callable[[int], np.ndarray]]:
    """Returns the readers of boxes, classes and crowd, as `Split.targets`.

    Args:
      annotations: those of all images of the split.
      read: the reader of its images.
    """
    fields = {name: FieldReader(annotations, name) for name in ("classes", "crowd")}
    return {"boxes": BoxReader(annotations, read), **fields}


def has_boxes(split: Split) -> bool:
    """Whether a split has boxes."""
    return "boxes" in split.targets


def annotations_of(split: Split) -> Annotations | None:
    """Returns the annotations of all images of a split, in their order; None if they don't come from a file.

    An evaluation finds here COCO's ids and areas, which are no targets.
    """
    if not has_boxes(split):
        return None
    reader, rows = origin_of(split.targets["boxes"], np.arange(len(split)))
    return reader.annotations.rows(rows) if isinstance(reader, BoxReader) else None
