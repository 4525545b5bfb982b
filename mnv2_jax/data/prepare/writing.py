"""Writes the images of some consecutive classes, each of them checked, as a shard or as folders."""

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
"""Folder for what isn't whole yet; it is emptied at each start."""
CHECKSUMS = "checksums"
_CLASSES_OF_A_SHARD = {"train": 5, "val": 50}
"""0.7 and 0.3 GB: large enough that all 220 shards can be open at once, small enough to be done again."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """Piece that one worker process writes at a time."""

    split: str
    stem: str
    """Stem of its file, train-00000-of-00200: a class is always in the shard of this number, whatever else there is."""
    parts: Mapping[int, Part]
    """Parts by label."""

    @property
    def plan(self) -> str:
        """Digest of the labels and of what is known of their images."""
        text = "\n".join(f"{label} {part.fingerprint}" for label, part in self.parts.items())
        return hashlib.sha256(text.encode()).hexdigest()


def units(splits: Mapping[str, Mapping[int, Part]]) -> list[Unit]:
    """Cuts the splits into units, in their order."""
    cut = []
    for split, parts in splits.items():
        size = _CLASSES_OF_A_SHARD[split]
        count = -(-len(imagenet.class_ids()) // size)
        for number in range(count):
            labels = [label for label in range(number * size, (number + 1) * size) if label in parts]
            if labels:
                stem = f"{split}-{number:05d}-of-{count:05d}"
                cut.append(Unit(split, stem, {label: parts[label] for label in labels}))
    return cut


def file_name(unit: Unit, form: str) -> str:
    """The `Shard.name` of a unit."""
    return f"{unit.stem}.arrayrecord" if form == "arrayrecord" else f"{CHECKSUMS}/{unit.stem}.sha256"


def write(out: pathlib.Path, form: str, skip_corrupt: bool, unit: Unit) -> tuple[Shard | None, dict[str, str]]:
    """Writes a unit under a temporary name and renames it when it is whole.

    Args:
      out: the prepared folder.
      form: one of `shards.FORMATS`.
      skip_corrupt: leave images out that can't be decoded; else a unit with such isn't written.
      unit: what is written.

    Returns:
      The shard, or None; and why which images can't be decoded (see `Shard.damaged`).

    Raises:
      UserError: if nothing can be written.
    """
    damaged: dict[str, str] = {}
    counts = {}
    try:
        writer = _ShardWriter(out, unit) if form == "arrayrecord" else _FolderWriter(out, unit)
        for label, part in unit.parts.items():
            wnid, count = imagenet.class_ids()[label], 0
            for name, content in _checked(part, f"{unit.split}/{wnid}", damaged):
                count += 1
                if skip_corrupt or not damaged:
                    writer.add(label, name, content)
            counts[wnid] = count
        if damaged and not skip_corrupt:
            return None, damaged
        size, digest = writer.finish()
    # The writer of ArrayRecord has one kind for all that may go wrong.
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).split(";")[0]
        raise UserError(
            f"{out}: {unit.stem} can't be written ({reason}); mend that and give the same command again, which goes on"
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
    """Whether what was written of a shard is there in its full size."""
    try:
        if form == "arrayrecord":
            return (out / shard.name).stat().st_size == shard.bytes
        sizes = [entry.stat().st_size for wnid in shard.classes for entry in os.scandir(out / shard.split / wnid)]
        return len(sizes) == sum(shard.classes.values()) and sum(sizes) == shard.bytes and (out / shard.name).is_file()
    except OSError:
        return False


def sha256_of(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(part: Part, where: str, damaged: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """The images that can be decoded; the others go to ``damaged``."""
    try:
        images = part.images()
    except UserError as error:  # the tar of a whole class
        damaged[f"{where}/*"] = str(error)
        return
    for name, read in images:
        try:
            content = read()
            decode(content, f"{where}/{name}")
        except UserError as error:
            damaged[f"{where}/{name}"] = str(error)
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
            os.fsync(file.fileno())  # before the rename, which may otherwise reach the disk first
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
            shutil.rmtree(split / folder.name, ignore_errors=True)  # of a session that was killed just here
            folder.rename(split / folder.name)
        write_text(checksums, "".join(self._lines))
        return self._size, sha256_of(checksums)
