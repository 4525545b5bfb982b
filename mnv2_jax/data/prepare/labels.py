"""Finds the class of each validation image, from any of the known lists of labels that lies with the images."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import pathlib
import posixpath
import tarfile
import zlib
from collections.abc import Iterable

from mnv2_jax.data import imagenet
from mnv2_jax.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12"
FLAT_NAME = "ILSVRC2012_val_"
"""The prefix of the validation images' names."""
VAL_IMAGE = FLAT_NAME + "{:08d}"
CLS_LOC = "Data/CLS-LOC"
"""The folder of train and val in Kaggle's copy, below ILSVRC."""


class NoLabelsError(UserError):
    """There is no list of the validation images' labels."""


def label_of(wnid: str, path: str) -> int:
    """Returns the label of a WordNet id that was found in ``path``.

    Raises:
      UserError: if the id is none of the 1000.
    """
    if wnid not in _labels():
        raise UserError(f"{path}: {wnid!r} is not the WordNet id of one of ImageNet's 1000 classes; move it away")
    return _labels()[wnid]


@functools.cache
def _labels() -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(imagenet.class_ids())}


class Labels:
    """The list of labels in or near some folders; it is searched for when it is needed."""

    def __init__(self, *sources: pathlib.Path) -> None:
        self._sources = sources
        self._homes: list[pathlib.Path] = []
        for source in sources:
            self._homes += [
                source,
                source / "data",
                source / "devkit" / "data",
                source / DEVKIT / "data",
                source / "val",
            ]
            real = source.resolve()
            self._homes += [real.parents[0]] if real.name == "ILSVRC" else []
            self._homes += [real.parents[2]] if real.as_posix().endswith(f"ILSVRC/{CLS_LOC}") else []

    def group(self, names: Iterable[str], path: pathlib.Path) -> dict[int, tuple[str, ...]]:
        """Groups the names of files in ``path`` by label; labels and names are sorted.

        Raises:
          UserError: for a name that isn't listed; a `NoLabelsError` if there is no list.
        """
        groups: dict[int, list[str]] = {}
        for name in sorted(names):
            stem = posixpath.splitext(name)[0]
            if stem not in self._by_name:
                raise UserError(f"{path}: {name} is not among the {len(self._by_name)} labelled images; move it away")
            groups.setdefault(self._by_name[stem], []).append(name)
        return {label: tuple(groups[label]) for label in sorted(groups)}

    def train_counts(self) -> dict[int, int]:
        """Returns the number of training images by label, from the development kit; {} if there is none."""
        return dict(self._synsets.values())

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        """Labels by file name without its extension."""
        readers = {
            "ILSVRC2012_validation_ground_truth.txt": self._of_devkit,
            "LOC_val_solution.csv": _of_kaggle,
            "imagenet_2012_validation_synset_labels.txt": _of_wnids,
            "val.txt": _of_indices,
        }
        for name, reader in readers.items():
            if file := self._read(name):
                path, content = file
                try:
                    return reader(content.decode())
                except (ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
                    raise UserError(f"{path}: {name} can't be read ({error!r}); download it again") from error
        raise NoLabelsError(
            f"{self._sources[0]}: the classes of the validation images are missing; put {DEVKIT}.tar.gz there, or one"
            f" of {', '.join(readers)}"
        )

    def _read(self, name: str) -> tuple[pathlib.Path, bytes] | None:
        """Reads a file from one of the folders or the packed development kit; returns its path and content."""
        paths = [home / name for home in self._homes]
        kits = [source / f"{DEVKIT}.tar.gz" for source in self._sources]
        path = kits[0]
        try:
            for path in filter(pathlib.Path.is_file, paths):
                return path, path.read_bytes()
            for path in filter(pathlib.Path.is_file, kits):
                whole = gzip.decompress(path.read_bytes())  # the whole file, since its checksum is at the end
                with tarfile.open(fileobj=io.BytesIO(whole), mode="r:") as archive:
                    for member in archive:
                        if posixpath.basename(member.name) == name and (file := archive.extractfile(member)):
                            return path, file.read()
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise UserError(f"{path}: {name} can't be read ({error}); download it again") from error
        return None

    @functools.cached_property
    def _synsets(self) -> dict[int, tuple[int, int]]:
        """Label and number of training images by ILSVRC2012_ID, from meta.mat; {} if there is none."""
        file = self._read("meta.mat")
        if file is None:
            return {}
        from scipy.io import loadmat  # slow to import, and only this function needs it

        path, content = file
        try:
            rows = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
            return {
                int(row["ILSVRC2012_ID"]): (_labels()[str(row["WNID"])], int(row["num_train_images"]))
                for row in rows
                if not int(row["num_children"])  # the inner nodes of WordNet follow the 1000 classes
            }
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"{path}: meta.mat can't be read ({error!r}); download it again") from error

    def _of_devkit(self, text: str) -> dict[str, int]:
        if not self._synsets:
            raise UserError(
                f"{self._sources[0]}: ILSVRC2012_validation_ground_truth.txt numbers the classes in its own order; put"
                f" meta.mat of {DEVKIT}.tar.gz beside it"
            )
        return _numbered(self._synsets[int(line)][0] for line in text.split())


def _numbered(labels: Iterable[int]) -> dict[str, int]:
    return {VAL_IMAGE.format(number): label for number, label in enumerate(labels, 1)}


def _of_kaggle(text: str) -> dict[str, int]:
    """Reads the columns ImageId and PredictionString, in which a WordNet id and the sides of a box are repeated."""
    return {row["ImageId"]: _labels()[row["PredictionString"].split()[0]] for row in csv.DictReader(io.StringIO(text))}


def _of_wnids(text: str) -> dict[str, int]:
    """Reads one WordNet id a line, the form of TensorFlow's examples."""
    return _numbered(_labels()[line] for line in text.split())


def _of_indices(text: str) -> dict[str, int]:
    """Reads a file name and an index of the sorted WordNet ids a line, the form of Caffe."""
    ids = dict(enumerate(imagenet.class_ids()))
    rows = [line.split() for line in text.splitlines()]
    return {posixpath.splitext(name)[0]: _labels()[ids[int(index)]] for name, index in rows}
