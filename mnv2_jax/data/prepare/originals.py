"""Finds the images of ImageNet and their classes in any of three forms.

A folder may hold the files as they are published, a tree of image files, or a copy made by TensorFlow Datasets (TFDS).
The form is recognised by the content of the folder; train and val may have different forms.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from mnv2_jax.data import imagenet, tfds_source
from mnv2_jax.data.images import is_image
from mnv2_jax.data.prepare.labels import CLS_LOC, DEVKIT, VAL_IMAGE, Labels, NoLabelsError, label_of
from mnv2_jax.data.tar import read_members
from mnv2_jax.errors import UserError

TOTALS = {"train": 1_281_167, "val": 50_000}
"""Images of the whole ImageNet."""
_TRAIN_TAR = "ILSVRC2012_img_train.tar"
_VAL_TAR = "ILSVRC2012_img_val.tar"
_INDEXED_AT_ONCE = 5_000

Images = Iterator[tuple[str, Callable[[], bytes]]]
"""Sorted file names, each with a function that reads the file and raises `UserError` if that fails."""

Map = Callable[..., Iterable[Any]]
"""A function like ``map``, which may use worker processes."""


class Part(Protocol):
    """The images of one class in a split; a part can be sent to worker processes."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """The file names, sorted; None where they are known only when the archive is opened."""

    @property
    def fingerprint(self) -> str:
        """A fingerprint of what is known without opening the images; it doesn't depend on where they lie."""

    def images(self) -> Images:
        """Returns the images, sorted by file name.

        Raises:
          UserError: if they are in an archive that can't be opened.
        """


@dataclasses.dataclass(frozen=True)
class Originals:
    """The images that a source holds."""

    places: Mapping[str, str]
    """The path of each split."""
    parts: Mapping[str, Mapping[int, Part]]
    """Parts by split and label, an index of `imagenet.class_ids`; none is empty."""
    train_counts: Mapping[int, int]
    """The number of training images by label, from the development kit; empty without it."""
    unlabelled: NoLabelsError | None = None
    """The error, if validation images are left out because there is no list of their labels."""


def find(source: pathlib.Path, parallel: Map, say: Callable[[str], None]) -> Originals:
    """Finds the images of train and val in a folder.

    Args:
      source: the folder.
      parallel: used to map functions that take long.
      say: called with a line before something takes long.

    Raises:
      UserError: if the folder holds neither split, or something other than ImageNet.
    """
    if not source.is_dir():
        raise UserError(
            f"--source={source}: not a folder; give the folder that holds {_TRAIN_TAR}, train/ or a TFDS copy"
        )
    if (source / "imagenet2012").is_dir():
        return _find_tfds(source, parallel, say)
    tops = (source / top for top in ("", f"ILSVRC/{CLS_LOC}", CLS_LOC))
    tree = next((top for top in tops if (top / "train").is_dir() or (top / "val").is_dir()), source)
    labels = Labels(source)
    candidates: tuple[tuple[str, pathlib.Path, Callable[[pathlib.Path], dict[int, Part]]], ...] = (
        ("train", source / _TRAIN_TAR, _tar_of_tars),
        ("train", tree / "train", _class_folders),
        ("val", source / _VAL_TAR, functools.partial(_val_tar, labels=labels)),
        ("val", tree / "val", functools.partial(_val_folder, labels=labels)),
    )
    parts: dict[str, Mapping[int, Part]] = {}
    places: dict[str, str] = {}
    unlabelled: NoLabelsError | None = None
    for split, place, finder in candidates:
        try:
            if split not in parts and place.exists() and (by_label := finder(place)):
                parts[split], places[split] = by_label, str(place)
        except NoLabelsError as error:  # raised later, since more may be missing
            unlabelled = error
    if not parts and unlabelled is None:
        raise UserError(
            f"--source={source}: no ImageNet in it; give a folder with {_TRAIN_TAR}, {_VAL_TAR} and {DEVKIT}.tar.gz, or"
            " with train/ and val/ that have a folder for each WordNet id, or with TFDS's imagenet2012/"
        )
    return Originals(places, parts, labels.train_counts(), None if "val" in parts else unlabelled)


def missing(originals: Originals) -> list[str]:
    """Lists what is missing from the whole ImageNet, as far as this is known without opening archives.

    Missing archives come first, then class folders, then images.
    """
    files: list[str] = []
    folders: list[str] = []
    images: list[str] = []
    for split, total in TOTALS.items():
        if split not in originals.parts:
            files.append(_missing_file(split, originals))
            continue
        parts = originals.parts[split]
        lacking = [f"{split}/{wnid}" for label, wnid in enumerate(imagenet.class_ids()) if label not in parts]
        if split == "train" or all(_is_class_folder(part, originals.places[split]) for part in parts.values()):
            folders += lacking
        if split == "val":
            stems = {posixpath.splitext(name)[0] for part in parts.values() for name in part.names or ()}
            all_names = map(VAL_IMAGE.format, range(1, total + 1))
            lacking = [f"{name}.JPEG" for name in all_names if name not in stems]
            images += lacking
        counts = {label: len(part.names) for label, part in parts.items() if part.names is not None}
        if len(counts) == len(parts) and (not lacking or (originals.train_counts and split == "train")):
            images += short(split, counts, originals)
    return files + folders + images


def _missing_file(split: str, originals: Originals) -> str:
    if split == "train":
        return f"{_TRAIN_TAR} or a folder train/"
    if originals.unlabelled is not None:
        return f"{DEVKIT}.tar.gz (the classes of the validation images)"
    kit = "" if originals.train_counts else f" (with {DEVKIT}.tar.gz)"
    return f"{_VAL_TAR}{kit} or a folder val/"


def _is_class_folder(part: Part, top: str) -> bool:
    return isinstance(part, Files) and part.folder != top


def short(split: str, counts: Mapping[int, int], originals: Originals) -> list[str]:
    """Lists the classes or splits that lack images, from the number of images by label."""
    ids = imagenet.class_ids()
    if split == "train" and originals.train_counts:
        full_counts = originals.train_counts
        return [
            f"train/{ids[label]}: {full_counts[label]} images, found {count}"
            for label, count in counts.items()
            if count != full_counts[label]
        ]
    num_images, total = sum(counts.values()), TOTALS[split]
    return [] if num_images == total else [f"{split}: {total:,} images, found {num_images:,}"]


# --- image files --------------------------------------------------------------------------------------------


def _is_image(name: str) -> bool:
    return not name.startswith(".") and is_image(name)


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()


@dataclasses.dataclass(frozen=True)
class Files:
    """A part that consists of image files in a folder."""

    folder: str
    names: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the file names."""
        return _digest(self.names)

    def images(self) -> Images:
        """Returns the images, each read from its own file."""
        return ((name, functools.partial(_read_file, os.path.join(self.folder, name))) for name in self.names)


def _read_file(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); restore the file") from error


def _list_folder(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror}); fix that and start again") from error


def _class_folders(top: pathlib.Path) -> dict[int, Part]:
    parts: dict[int, Part] = {}
    for entry in _list_folder(top):
        if entry.is_dir():
            label = label_of(entry.name, str(top))
            if names := [file.name for file in _list_folder(top / entry.name) if _is_image(file.name)]:
                parts[label] = Files(entry.path, tuple(names))
    return parts


def _val_folder(top: pathlib.Path, labels: Labels) -> dict[int, Part]:
    """Finds the parts of val in a folder for each class, or among all images side by side, as the tar unpacks."""
    names = [entry.name for entry in _list_folder(top) if _is_image(entry.name)]
    if not names:
        return _class_folders(top)
    return {label: Files(str(top), group) for label, group in labels.group(names, top).items()}


# --- tars ---------------------------------------------------------------------------------------------------


def _read_members(path: str, start: int = 0) -> dict[str, tuple[int, int]]:
    """Returns offset and size in bytes of the files in the tar that begins at ``start``, by name without folders."""
    try:
        members = [member for member in read_members(path, start) if member.isreg()]
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: can't be read as a tar ({error}); copy or download it again") from error
    return {posixpath.basename(member.name): (member.offset_data, member.size) for member in members}


def _read_place(path: str, offset: int, size: int, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise UserError(f"{path}: {name} can't be read ({error.strerror}); copy or download the file again") from error
    if len(content) < size:
        raise UserError(f"{path}: {name} is cut off; copy or download the file again")
    return content


@dataclasses.dataclass(frozen=True)
class Members:
    """A part that consists of images in a tar."""

    path: str
    names: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    """Offset and size in bytes of each image, in the order of the names."""

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the file names."""
        return _digest(self.names)

    def images(self) -> Images:
        """Yields the images, read at their offsets."""
        for name, (offset, size) in zip(self.names, self.places, strict=True):
            yield name, functools.partial(_read_place, self.path, offset, size, name)


@dataclasses.dataclass(frozen=True)
class InnerTar:
    """A part that is the tar of a class inside the tar of train."""

    path: str
    wnid: str
    offset: int
    size: int
    names: None = None

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the inner tar's name and size, the only facts about it that the outer tar holds."""
        return f"{self.wnid}.tar of {self.size}"

    def images(self) -> Images:
        """Reads the table of contents of the inner tar, and returns its images, read at their offsets."""
        places = _read_members(self.path, self.offset)
        if any(offset + size > self.offset + self.size for offset, size in places.values()):
            raise UserError(f"{self.path}: {self.wnid}.tar is damaged; copy or download the file again")
        names = tuple(sorted(filter(_is_image, places)))
        return Members(self.path, names, tuple(places[name] for name in names)).images()


def _tar_of_tars(path: pathlib.Path) -> dict[int, Part]:
    parts: dict[int, Part] = {}
    for name, (offset, size) in sorted(_read_members(str(path)).items()):
        wnid, suffix = posixpath.splitext(name)
        if suffix == ".tar":
            parts[label_of(wnid, str(path))] = InnerTar(str(path), wnid, offset, size)
    return parts


def _val_tar(path: pathlib.Path, labels: Labels) -> dict[int, Part]:
    places = _read_members(str(path))
    groups = labels.group(filter(_is_image, places), path)
    return {label: Members(str(path), names, tuple(places[n] for n in names)) for label, names in groups.items()}


# --- TFDS ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Records:
    """A part that consists of records of a copy made by TFDS."""

    builder_dir: str
    split: str
    names: tuple[str, ...]
    numbers: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the file names."""
        return _digest(self.names)

    def images(self) -> Images:
        """Yields the images, read by their record numbers."""
        for name, number in zip(self.names, self.numbers, strict=True):
            yield name, functools.partial(_image_of_record, self.builder_dir, self.split, number)


def _find_tfds(source: pathlib.Path, parallel: Map, say: Callable[[str], None]) -> Originals:
    """Finds the images of a copy made by TFDS; reads every record for its class, since TFDS shuffles them."""
    opened = tfds_source.open_splits("imagenet2012", str(source), None)
    builder_dir = tfds_source.find_copy("imagenet2012", str(source))
    labels = [label_of(wnid, builder_dir) for wnid in opened.class_names]
    parts: dict[str, Mapping[int, Part]] = {}
    for split_name, split in (("train", opened.train), ("val", opened.eval)):
        say(f"{builder_dir}: reading the labels and file names of {len(split):,} records of {split.name}")
        starts = range(0, len(split), _INDEXED_AT_ONCE)
        index = functools.partial(_index, builder_dir, split.name, len(split))
        rows = sorted((labels[k], name, number) for records in parallel(index, starts) for k, name, number in records)
        by_label: dict[int, list[tuple[str, int]]] = {}
        for label, name, number in rows:
            by_label.setdefault(label, []).append((name, number))
        parts[split_name] = {
            label: Records(builder_dir, split.name, *map(tuple, zip(*records, strict=True)))
            for label, records in by_label.items()
        }
    return Originals(dict.fromkeys(parts, builder_dir), parts, {})


def _index(builder_dir: str, split: str, size: int, start: int) -> list[tuple[int, str, int]]:
    """Returns label, file name and number of the next `_INDEXED_AT_ONCE` records from ``start`` on."""
    rows = []
    for number in range(start, min(start + _INDEXED_AT_ONCE, size)):
        record = _record(builder_dir, split, number)
        rows.append((int(record["label"]), posixpath.basename(os.fsdecode(record["file_name"])), number))
    return rows


def _image_of_record(builder_dir: str, split: str, number: int) -> bytes:
    return bytes(_record(builder_dir, split, number)["image"])


def _record(builder_dir: str, split: str, number: int) -> Any:
    try:
        return _data_source(builder_dir, split)[number]
    except Exception as error:  # damaged or missing files raise many kinds of errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{builder_dir}: record {number} of {split} can't be read ({reason}); restore it") from error


@functools.cache  # one for each process
def _data_source(builder_dir: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(builder_dir)
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record")
