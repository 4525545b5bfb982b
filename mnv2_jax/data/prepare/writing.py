"""Checks the images of some consecutive classes and writes them as a shard or as folders."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

from mnv2_jax.data import imagenet
from mnv2_jax.data.images import decode
from mnv2_jax.data.prepare.originals import Part
from mnv2_jax.data.shards import WRITER_OPTIONS, Shard, pack
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import write_text

PARTIAL = ".partial"
"""Folder for unfinished files; it is emptied at each start."""
CHECKSUMS = "checksums"
_CLASSES_PER_SHARD = {"train": 5, "val": 50}
"""Classes in a shard of 0.7 or 0.3 GB: few enough shards (220) to have all open at once, and small enough to redo."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """The classes that one worker process writes at a time."""

    split: str
    stem: str
    """Stem of the file, as train-00000-of-00200; a class is always in the same shard, whichever classes there are."""
    parts: Mapping[int, Part]
    """Parts by label."""

    @property
    def plan(self) -> str:
        """A digest of the labels and of the fingerprints of their images."""
        text = "\n".join(f"{label} {part.fingerprint}" for label, part in self.parts.items())
        return hashlib.sha256(text.encode()).hexdigest()


def units(splits: Mapping[str, Mapping[int, Part]]) -> list[Unit]:
    """Divides the splits into units, in their order."""
    result = []
    for split, parts in splits.items():
        size = _CLASSES_PER_SHARD[split]
        count = -(-len(imagenet.class_ids()) // size)
        for number in range(count):
            labels = [label for label in range(number * size, (number + 1) * size) if label in parts]
            if labels:
                stem = f"{split}-{number:05d}-of-{count:05d}"
                result.append(Unit(split, stem, {label: parts[label] for label in labels}))
    return result


def file_name(unit: Unit, form: str) -> str:
    """Returns the `Shard.name` of a unit."""
    return f"{unit.stem}.arrayrecord" if form == "arrayrecord" else f"{CHECKSUMS}/{unit.stem}.sha256"


def write(out: pathlib.Path, form: str, skip_corrupt: bool, unit: Unit) -> tuple[Shard | None, dict[str, str]]:
    """Writes a unit under a temporary name, and renames it when it is complete.

    Args:
      out: the prepared folder.
      form: one of `shards.FORMATS`.
      skip_corrupt: whether to leave out images that can't be decoded; otherwise a unit with such images isn't written.
      unit: the unit to write.

    Returns:
      The shard, or None where it isn't written; and the images that can't be decoded, each with the reason (see
      `Shard.damaged`).

    Raises:
      UserError: if the files can't be written.
    """
    damaged: dict[str, str] = {}
    counts = {}
    try:
        writer = _ShardWriter(out, unit) if form == "arrayrecord" else _FolderWriter(out, unit)
        for label, part in unit.parts.items():
            wnid, count = imagenet.class_ids()[label], 0
            for name, content in _decodable(part, f"{unit.split}/{wnid}", damaged):
                count += 1
                if skip_corrupt or not damaged:
                    writer.add(label, name, content)
            counts[wnid] = count
        if damaged and not skip_corrupt:
            return None, damaged
        size, digest = writer.finish()
    # ArrayRecord's writer raises RuntimeError for all its failures.
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).split(";")[0]
        raise UserError(
            f"{out}: {unit.stem} can't be written ({reason}); fix that and run the same command again, which resumes"
        ) from error
    shard = Shard(
        name=file_name(unit, form),
        split=unit.split,
        classes={wnid: count for wnid, count in counts.items() if count},
        bytes=size,
        sha256=digest,
        plan=unit.plan,
        damaged=damaged,
    )
    return shard, damaged


def is_whole(out: pathlib.Path, form: str, shard: Shard) -> bool:
    """Whether the files of a shard exist with their full size."""
    try:
        if form == "arrayrecord":
            return (out / shard.name).stat().st_size == shard.bytes
        sizes = [entry.stat().st_size for wnid in shard.classes for entry in os.scandir(out / shard.split / wnid)]
        return len(sizes) == sum(shard.classes.values()) and sum(sizes) == shard.bytes and (out / shard.name).is_file()
    except OSError:
        return False


def sha256_of(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decodable(part: Part, folder: str, damaged: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """Yields the images that can be decoded, and adds the others to ``damaged``."""
    try:
        images = part.images()
    except UserError as error:  # the tar of the whole class is damaged
        damaged[f"{folder}/*"] = str(error)
        return
    for name, read in images:
        try:
            content = read()
            decode(content, f"{folder}/{name}")
        except UserError as error:
            damaged[f"{folder}/{name}"] = str(error)
        else:
            yield name, content


class _ShardWriter:
    def __init__(self, out: pathlib.Path, unit: Unit) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._final = out / file_name(unit, "arrayrecord")
        self._temporary = out / PARTIAL / self._final.name
        self._writer = ArrayRecordWriter(str(self._temporary), WRITER_OPTIONS)

    def add(self, label: int, name: str, content: bytes) -> None:
        self._writer.write(pack(label, name, content))

    def finish(self) -> tuple[int, str]:
        self._writer.close()
        digest = sha256_of(self._temporary)
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())  # else the rename may reach the disk before the content does
        self._temporary.rename(self._final)
        return self._final.stat().st_size, digest


class _FolderWriter:
    def __init__(self, out: pathlib.Path, unit: Unit) -> None:
        self._out, self._unit = out, unit
        self._temporary = out / PARTIAL / unit.stem
        self._temporary.mkdir()
        self._lines: list[str] = []
        self._size = 0

    def add(self, label: int, name: str, content: bytes) -> None:
        wnid = imagenet.class_ids()[label]
        folder = self._temporary / wnid
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        self._lines.append(f"{hashlib.sha256(content).hexdigest()}  {self._unit.split}/{wnid}/{name}\n")
        self._size += len(content)

    def finish(self) -> tuple[int, str]:
        split, checksums = self._out / self._unit.split, self._out / file_name(self._unit, "folder")
        split.mkdir(exist_ok=True)
        checksums.parent.mkdir(exist_ok=True)
        for folder in sorted(self._temporary.iterdir()):
            shutil.rmtree(split / folder.name, ignore_errors=True)  # left by a session that was killed just here
            folder.rename(split / folder.name)
        write_text(checksums, "".join(self._lines))
        return self._size, sha256_of(checksums)
