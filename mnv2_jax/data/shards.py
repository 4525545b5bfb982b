"""ImageNet as `python -m mnv2_jax.data.prepare` writes it: the manifest, and the ArrayRecord shards.

    DIR/manifest.json    DIR/train-00000-of-00200.arrayrecord …    DIR/val-00000-of-00020.arrayrecord …

A shard holds the images of some consecutive classes, sorted by class and file name, so that the manifest's counts are
the labels of all records. A record is the label and the length of the file name (`_HEADER`), the name in UTF-8, and
the file as it came. Shuffling is the business of `streams`, which reads at random.
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
from mnv2_jax.data.split import Opened, Rows, Split, find_split, sha256_of, sha256_of_names
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.json_files import read_json, write_json

MANIFEST = "manifest.json"
FORMATS = ("arrayrecord", "folder")
WRITER_OPTIONS = "group_size:1,uncompressed"
"""A record a chunk, without which reading one record reads its whole group; JPEG files can't be compressed further."""
_VERSION = 1
_HEADER = struct.Struct("<IH")
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


# --- the manifest -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of some consecutive classes of a split."""

    name: str
    """The file below the top: the shard; in the folder format the checksums of its images, as sha256sum writes them."""
    split: str
    classes: Mapping[str, int]
    """The number of images by WordNet id, in the order of the records."""
    bytes: int
    """Size of the shard; in the folder format of all its images."""
    sha256: str
    """SHA-256 of the file `name`."""
    plan: str
    """Digest of what the source held, by which a later session knows that it is still the same."""
    damaged: Mapping[str, str]
    """Images that were left out, as SPLIT/WNID/NAME (* for all of them), and why they can't be decoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of a prepared folder."""

    format: Literal["arrayrecord", "folder"]
    complete: bool
    """Every shard is there; until then the folder can't be read."""
    source: Mapping[str, str]
    """Origin of each split."""
    shards: tuple[Shard, ...]
    """Sorted by name."""

    def counts(self, split: str) -> dict[str, int]:
        """The number of images by WordNet id, in the order of the classes."""
        return {wnid: n for shard in self.shards if shard.split == split for wnid, n in shard.classes.items()}

    @property
    def splits(self) -> tuple[str, ...]:
        """train, val, or what there is of them."""
        return tuple(sorted({shard.split for shard in self.shards}))


def is_prepared(path: str) -> bool:
    """Whether a manifest lies there."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def read_manifest(path: str) -> Manifest:
    """Reads the manifest of a prepared folder, finished or not.

    Raises:
      UserError: if it can't be read, or a later version wrote it.
    """
    file = pathlib.Path(path, MANIFEST)
    tree = read_json(file)
    if tree.get("format_version") != _VERSION or tree.get("format") not in FORMATS:
        raise UserError(
            f"{file}: format_version={tree.get('format_version')!r}, format={tree.get('format')!r} can't be read;"
            f" version {_VERSION} of {' or '.join(FORMATS)} can. Prepare the data again"
        )
    try:
        shards = tuple(Shard(**row) for row in tree["shards"])
        return Manifest(format=tree["format"], complete=tree["complete"], source=tree["source"], shards=shards)
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: not a whole manifest ({error}); prepare the data again") from error


def write_manifest(path: str, manifest: Manifest) -> None:
    """Replaces the manifest atomically; the same data give the same bytes."""
    counts = {split: manifest.counts(split) for split in manifest.splits}
    totals = {split: {"images": sum(some.values()), "classes": some} for split, some in counts.items()}
    fields = dataclasses.asdict(manifest)
    shards = fields.pop("shards")
    write_json(
        pathlib.Path(path, MANIFEST), {"format_version": _VERSION} | fields | {"splits": totals, "shards": shards}
    )


def finished_manifest(path: str) -> Manifest:
    """Does what `read_manifest` does, and refuses a preparation that isn't finished.

    Raises:
      UserError: also if the preparation wasn't brought to its end.
    """
    manifest = read_manifest(path)
    if not manifest.complete:
        raise UserError(
            f"{path}: its preparation was not brought to an end; give the same command of mnv2_jax.data.prepare"
            " again, which goes on where it stopped"
        )
    return manifest


# --- reading ------------------------------------------------------------------------------------------------


def open_splits(path: str, eval_split: str | None, with_eval: bool = True, with_train: bool = True) -> Opened:
    """Opens the train split and the one to evaluate on; reads the manifest only.

    Args:
      path: a prepared folder in the format arrayrecord.
      eval_split: None: val.
      with_eval: False where the images to evaluate on will be taken out of train: the train split is given twice.
      with_train: False where nothing is trained: train is without images.

    Returns:
      The class names (`class_names`) and the two splits; train has no images where only val was prepared, either.

    Raises:
      UserError: if the folder isn't finished, or has no such split.
    """
    manifest = finished_manifest(path)
    names = class_names(path)
    train = _split(path, manifest, "train", names)
    if not with_eval:
        return Opened(names, train, train)
    wanted = find_split(path, manifest.splits, eval_split)
    if wanted is None:
        lacking = eval_split or "val"
        raise UserError(
            f"{path}: {lacking} was not prepared{nearest(lacking, manifest.splits)}; choose by data.eval_split, hold"
            " some of train out by data.holdout_fraction=0.1, or prepare it"
        )
    return Opened(names, train if with_train else train.without_images("train"), _split(path, manifest, wanted, names))


def class_names(path: str) -> tuple[str, ...]:
    """The WordNet ids of train, in the order of `imagenet.class_ids`; all 1000 where only val was prepared."""
    there = finished_manifest(path).counts("train")
    return tuple(wnid for wnid in imagenet.class_ids() if wnid in there) or imagenet.class_ids()


def _split(path: str, manifest: Manifest, name: str, class_names: tuple[str, ...]) -> Split:
    counts = manifest.counts(name)
    if unknown := sorted(counts.keys() - set(class_names)):
        raise UserError(
            f"{path}: class {unknown[0]!r} is in {name} but not in train, which has {len(class_names)} classes; prepare"
            " both of the same classes"
        )
    number = {wnid: i for i, wnid in enumerate(class_names)}
    labels = np.repeat(np.array([number[wnid] for wnid in counts], np.int32), list(counts.values()))
    shards = [shard for shard in manifest.shards if shard.split == name]
    names, hashes = tuple(shard.name for shard in shards), tuple(shard.sha256 for shard in shards)
    sizes = tuple(sum(shard.classes.values()) for shard in shards)
    return Split(name, labels, ShardReader(path, names, sizes, hashes))


class ShardReader:
    """Reads images by their number; each process opens the shards for itself, each when it is first asked for."""

    def __init__(self, root: str, names: tuple[str, ...], sizes: tuple[int, ...], hashes: tuple[str, ...]) -> None:
        """Takes files below ``root``, their numbers of records and their SHA-256 in the manifest."""
        self._arguments = (root, names, sizes, hashes)
        self._ends = np.cumsum(sizes)
        self._readers: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return ShardReader, self._arguments

    def __call__(self, index: int) -> EncodedImage:
        """Reads the record."""
        path, name, content = self._read(index)
        return EncodedImage(content, f"{path}: {name}")

    def where(self, index: int) -> str:
        """The shard, and the name of the file that came into it; the record has it, and is read."""
        path, name, _ = self._read(index)
        return f"{os.path.abspath(path)}: {name}"

    def _read(self, index: int) -> tuple[str, str, bytes]:
        """The shard's path, the file's name and its bytes."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        root, names, sizes, _ = self._arguments
        path = os.path.join(root, names[number])
        place = index - int(self._ends[number]) + sizes[number]
        try:
            _, name, content = unpack(self._reader(number, path).read([place])[0])
        except Exception as error:  # the library has one kind for all; a damaged record fails its checksum
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path}: record {place} can't be read ({reason}); find what is damaged by"
                f" python -m mnv2_jax.data.prepare verify {root}"
            ) from error
        return path, name, content

    def digest(self, rows: Rows) -> dict[str, str]:
        """Digest of the shards' own digests, and of the records that are used."""
        _, _, sizes, hashes = self._arguments
        records = sha256_of(np.arange(sum(sizes))[rows])
        return {"shards": sha256_of_names(text.encode() for text in (*hashes, records))}

    def _reader(self, number: int, path: str) -> Any:
        if number not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader  # only needed here

            self._readers[number] = ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=2**16)
        return self._readers[number]


def pack(label: int, name: str, content: bytes) -> bytes:
    """A record: ``label`` in 0..999 (`imagenet.class_ids`), the file's name and its bytes."""
    encoded = os.fsencode(name)
    return _HEADER.pack(label, len(encoded)) + encoded + content


def unpack(record: bytes) -> tuple[int, str, bytes]:
    """Label, file name and bytes of a record."""
    label, length = _HEADER.unpack_from(record)
    start = _HEADER.size + length
    return label, os.fsdecode(record[_HEADER.size : start]), record[start:]
