"""ImageNet as `python -m mnv2_jax.data.prepare` writes it: the manifest, and the ArrayRecord shards.

    DIR/manifest.json    DIR/train-00000-of-00200.arrayrecord …    DIR/val-00000-of-00020.arrayrecord …

A shard holds the images of some consecutive classes, sorted by class and file name, so the counts in the manifest give
the labels of all records. A record is the label and the length of the file name (`_HEADER`), the name in UTF-8, and the
unchanged file. Shards aren't shuffled, since `streams` reads at random.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mnv2_jax.data import imagenet
from mnv2_jax.data.images import EncodedImage
from mnv2_jax.data.split import OpenedSplits, Rows, Split, find_split, sha256_of, sha256_of_names
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.json_files import read_json, write_json

MANIFEST = "manifest.json"
FORMATS = ("arrayrecord", "folder")
WRITER_OPTIONS = "group_size:1,uncompressed"
"""One record in a chunk, as reading a record reads its whole chunk; JPEG files can't be compressed further."""
_VERSION = 1
_HEADER = struct.Struct("<IH")
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


# --- the manifest -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """The manifest's entry for some consecutive classes of a split."""

    name: str
    """The path of the shard below the top; in the folder format, of a file of checksums as sha256sum writes them."""
    split: str
    classes: Mapping[str, int]
    """The number of images by WordNet id, in the order of the records."""
    bytes: int
    """Size of the shard; in the folder format, of all its images."""
    sha256: str
    """SHA-256 of the file `name`."""
    plan: str
    """A digest of what the source held, by which a later session recognises the same source."""
    damaged: Mapping[str, str]
    """Images that were left out, as SPLIT/WNID/NAME (* for all of a class), each with why it can't be decoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a prepared folder."""

    format: Literal["arrayrecord", "folder"]
    complete: bool
    """Whether every shard is there; until then the folder can't be used."""
    source: Mapping[str, str]
    """The path from which each split was read."""
    shards: tuple[Shard, ...]
    """The shards, sorted by name."""

    def counts(self, split: str) -> dict[str, int]:
        """Returns the number of images by WordNet id, in the order of the classes."""
        return {wnid: n for shard in self.shards if shard.split == split for wnid, n in shard.classes.items()}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are, out of train and val."""
        return tuple(sorted({shard.split for shard in self.shards}))


def is_prepared(path: str) -> bool:
    """Whether a folder has a manifest."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def read_manifest(path: str) -> Manifest:
    """Reads the manifest of a prepared folder, finished or not.

    Raises:
      UserError: if the manifest can't be read, or was written by a later version.
    """
    file = pathlib.Path(path, MANIFEST)
    tree = read_json(file)
    if tree.get("format_version") != _VERSION or tree.get("format") not in FORMATS:
        raise UserError(
            f"{file}: can't read format_version={tree.get('format_version')!r}, format={tree.get('format')!r}; prepare"
            f" the data again, as version {_VERSION} in the format {' or '.join(FORMATS)}"
        )
    try:
        shards = tuple(Shard(**row) for row in tree["shards"])
        return Manifest(format=tree["format"], complete=tree["complete"], source=tree["source"], shards=shards)
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: not a complete manifest ({error}); prepare the data again") from error


def write_manifest(path: str, manifest: Manifest) -> None:
    """Writes or replaces the manifest atomically; the same data give the same bytes."""
    counts = {split: manifest.counts(split) for split in manifest.splits}
    totals = {split: {"images": sum(classes.values()), "classes": classes} for split, classes in counts.items()}
    fields = dataclasses.asdict(manifest)
    shards = fields.pop("shards")
    write_json(
        pathlib.Path(path, MANIFEST), {"format_version": _VERSION} | fields | {"splits": totals, "shards": shards}
    )


def finished_manifest(path: str) -> Manifest:
    """Reads the manifest of a prepared folder, and refuses a preparation that isn't finished.

    Raises:
      UserError: as `read_manifest`, and if the preparation isn't finished.
    """
    manifest = read_manifest(path)
    if not manifest.complete:
        raise UserError(
            f"{path}: its preparation is not finished; run the same command of mnv2_jax.data.prepare again, which"
            " continues where it stopped"
        )
    return manifest


# --- reading ------------------------------------------------------------------------------------------------


def open_splits(path: str, eval_split: str | None, with_eval: bool = True, with_train: bool = True) -> OpenedSplits:
    """Opens the train split and the split to evaluate; reads the manifest only.

    Args:
      path: a prepared folder in the format arrayrecord.
      eval_split: the split to evaluate; None: val.
      with_eval: False where the images to evaluate will be taken out of train; the train split is then returned twice.
      with_train: False where nothing is trained; train then has no images.

    Returns:
      The class names (`class_names`) and the two splits. Where only val was prepared, train has no images.

    Raises:
      UserError: if the preparation isn't finished or the folder has no such split.
    """
    manifest = finished_manifest(path)
    names = class_names(path)
    train = _make_split(path, manifest, "train", names)
    if not with_eval:
        return OpenedSplits(names, train, train)
    held_out = find_split(path, manifest.splits, eval_split)
    if held_out is None:
        missing = eval_split or "val"
        raise UserError(
            f"{path}: {missing} was not prepared{nearest(missing, manifest.splits)}; choose with data.eval_split, hold"
            " out a share of train with data.holdout_fraction=0.1, or prepare it"
        )
    return OpenedSplits(
        names, train if with_train else train.without_images("train"), _make_split(path, manifest, held_out, names)
    )


def class_names(path: str) -> tuple[str, ...]:
    """Returns the WordNet ids of train, in the order of `imagenet.class_ids`; all 1000 where only val was prepared."""
    counts = finished_manifest(path).counts("train")
    return tuple(wnid for wnid in imagenet.class_ids() if wnid in counts) or imagenet.class_ids()


def _make_split(path: str, manifest: Manifest, name: str, class_names: tuple[str, ...]) -> Split:
    counts = manifest.counts(name)
    if unknown := sorted(counts.keys() - set(class_names)):
        raise UserError(
            f"{path}: class {unknown[0]!r} is in {name} but not in train, which has {len(class_names)} classes; prepare"
            " both with the same classes"
        )
    number = {wnid: i for i, wnid in enumerate(class_names)}
    labels = np.repeat(np.array([number[wnid] for wnid in counts], np.int32), list(counts.values()))
    shards = [shard for shard in manifest.shards if shard.split == name]
    names, hashes = tuple(shard.name for shard in shards), tuple(shard.sha256 for shard in shards)
    sizes = tuple(sum(shard.classes.values()) for shard in shards)
    return Split(name, labels, ShardReader(path, names, sizes, hashes))


class ShardReader:
    """Reads images by their number; each process opens a shard when it first needs it."""

    def __init__(self, root: str, names: tuple[str, ...], sizes: tuple[int, ...], hashes: tuple[str, ...]) -> None:
        """Takes the names of shards below ``root``, their numbers of records, and their SHA-256 from the manifest."""
        self._arguments = (root, names, sizes, hashes)
        self._ends = np.cumsum(sizes)
        self._readers: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return ShardReader, self._arguments

    def __call__(self, index: int) -> EncodedImage:
        """Reads an image from its record."""
        path, name, content = self._read(index)
        return EncodedImage(content, f"{path}: {name}")

    def path_of(self, index: int) -> str:
        """Returns the path of the shard and the name of the image's original file, which is read from the record."""
        path, name, _ = self._read(index)
        return f"{os.path.abspath(path)}: {name}"

    def _read(self, index: int) -> tuple[str, str, bytes]:
        """Reads a record; returns the path of the shard, the name of the file and its bytes."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        root, names, sizes, _ = self._arguments
        path = os.path.join(root, names[number])
        place = index - int(self._ends[number]) + sizes[number]
        try:
            _, name, content = unpack(self._reader(number, path).read([place])[0])
        except Exception as error:  # the library has one error for everything; a damaged record fails its checksum
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path}: record {place} can't be read ({reason}); find damaged files with"
                f" python -m mnv2_jax.data.prepare verify {root}"
            ) from error
        return path, name, content

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns a digest of the shards' SHA-256 and of the numbers of the records."""
        _, _, sizes, hashes = self._arguments
        records = sha256_of(np.arange(sum(sizes))[rows])
        return {"shards": sha256_of_names(text.encode() for text in (*hashes, records))}

    def _reader(self, number: int, path: str) -> Any:
        if number not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader  # only shards need it

            self._readers[number] = ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=2**16)
        return self._readers[number]


def pack(label: int, name: str, content: bytes) -> bytes:
    """Makes a record of a label in 0..999 (`imagenet.class_ids`), a file's name and its bytes."""
    encoded = os.fsencode(name)
    return _HEADER.pack(label, len(encoded)) + encoded + content


def unpack(record: bytes) -> tuple[int, str, bytes]:
    """Returns the label, the file name and the bytes of a record."""
    label, length = _HEADER.unpack_from(record)
    start = _HEADER.size + length
    return label, os.fsdecode(record[_HEADER.size : start]), record[start:]
