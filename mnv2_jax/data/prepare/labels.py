"""Which class each validation image is of, from whichever list of them lies with the images."""

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
"""With what the names of the validation images begin."""
VAL_IMAGE = FLAT_NAME + "{:08d}"
CLS_LOC = "Data/CLS-LOC"
"""Folder of train and val in Kaggle's copy, below ILSVRC."""


class NoLabelsError(UserError):
    """No list of labels is there."""


def label_of(wnid: str, where: str) -> int:
    """The index of a WordNet id found in ``where``; a `UserError` if it is none of the 1000."""
    if wnid not in _labels():
        raise UserError(f"{where}: {wnid!r} is not the WordNet id of one of ImageNet's 1000 classes; move it away")
    return _labels()[wnid]


@functools.cache
def _labels() -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(imagenet.class_ids())}


class Labels:
    """The list of labels below some folder; looked for when it is needed."""

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

    def group(self, names: Iterable[str], where: pathlib.Path) -> dict[int, tuple[str, ...]]:
        """File names by label, both sorted.

        Raises:
          UserError: for a name in ``where`` that isn't listed; `NoLabelsError` if there is no list.
        """
        groups: dict[int, list[str]] = {}
        for name in sorted(names):
            stem = posixpath.splitext(name)[0]
            if stem not in self._by_name:
                raise UserError(f"{where}: {name} is not among the {len(self._by_name)} labels; move it away")
            groups.setdefault(self._by_name[stem], []).append(name)
        return {label: tuple(groups[label]) for label in sorted(groups)}

    def train_counts(self) -> dict[int, int]:
        """The number of training images by label, as the development kit says; empty without one."""
        return dict(self._synsets.values())

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        """Labels by file name without its suffix."""
        readers = {
            "ILSVRC2012_validation_ground_truth.txt": self._of_devkit,
            "LOC_val_solution.csv": _of_kaggle,
            "imagenet_2012_validation_synset_labels.txt": _of_wnids,
            "val.txt": _of_indices,
        }
        for name, reader in readers.items():
            if found := self._read(name):
                where, content = found
                try:
                    return reader(content.decode())
                except (ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
                    raise UserError(f"{where}: {name} can't be read ({error!r}); download it again") from error
        raise NoLabelsError(
            f"{self._sources[0]}: the classes of the validation images are missing; put {DEVKIT}.tar.gz there, or one"
            f" of {', '.join(readers)}"
        )

    def _read(self, name: str) -> tuple[pathlib.Path, bytes] | None:
        """A file that lies there or in the packed development kit, with where it was."""
        places = [home / name for home in self._homes]
        kits = [source / f"{DEVKIT}.tar.gz" for source in self._sources]
        where = kits[0]
        try:
            for where in filter(pathlib.Path.is_file, places):
                return where, where.read_bytes()
            for where in filter(pathlib.Path.is_file, kits):
                whole = gzip.decompress(where.read_bytes())  # all of it: the checksum stands at its end
                with tarfile.open(fileobj=io.BytesIO(whole), mode="r:") as archive:
                    for member in archive:
                        if posixpath.basename(member.name) == name and (file := archive.extractfile(member)):
                            return where, file.read()
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise UserError(f"{where}: {name} can't be read ({error}); download it again") from error
        return None

    @functools.cached_property
    def _synsets(self) -> dict[int, tuple[int, int]]:
        """Label and number of training images by ILSVRC2012_ID, from meta.mat; empty without one."""
        found = self._read("meta.mat")
        if found is None:
            return {}
        from scipy.io import loadmat  # slow to import, and only needed here

        where, content = found
        try:
            rows = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
            return {
                int(row["ILSVRC2012_ID"]): (_labels()[str(row["WNID"])], int(row["num_train_images"]))
                for row in rows
                if not int(row["num_children"])  # the inner nodes of WordNet follow the 1000 classes
            }
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"{where}: meta.mat can't be read ({error!r}); download it again") from error

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
    """ImageId,PredictionString: a WordNet id and the four sides of a box, repeated."""
    return {row["ImageId"]: _labels()[row["PredictionString"].split()[0]] for row in csv.DictReader(io.StringIO(text))}


def _of_wnids(text: str) -> dict[str, int]:
    """A WordNet id a line, as TensorFlow's examples have it."""
    return _numbered(_labels()[line] for line in text.split())


def _of_indices(text: str) -> dict[str, int]:
    """A file name and an index of the sorted WordNet ids a line, as Caffe has it."""
    ids = dict(enumerate(imagenet.class_ids()))
    rows = [line.split() for line in text.splitlines()]
    return {posixpath.splitext(name)[0]: _labels()[ids[int(index)]] for name, index in rows}
