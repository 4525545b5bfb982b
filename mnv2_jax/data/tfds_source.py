"""Copies of data sets that TensorFlow Datasets (TFDS) has prepared, read without TensorFlow and without a network.

TFDS keeps a copy as ``data_dir/NAME[/CONFIG]/VERSION/``. Only its ArrayRecord form has random access. The version is
looked up here rather than by ``tfds.builder``, which may run the code of the data set or ask the network for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from mnv2_jax.data.images import EncodedImage
from mnv2_jax.data.split import Opened, Rows, Split, find_split, in_use, sha256_of, sha256_of_names
from mnv2_jax.errors import UserError, nearest

_INFO_FILE = "dataset_info.json"


def open_splits(
    name: str, data_dir: str, eval_split: str | None, with_eval: bool = True, with_train: bool = True
) -> Opened:
    """Opens the train split and the one to evaluate on.

    Args:
      name: ``NAME[/CONFIG][:VERSION]``; the newest version where none is given.
      data_dir: the folder that holds NAME.
      eval_split: None: validation, or test where there is no validation.
      with_eval: False where the images to evaluate on will be taken out of train: the train split is given twice.
      with_train: False where nothing is trained: train is without images, and need not be there.

    Raises:
      UserError: if there is no such copy, or not one that can be read at random.
    """
    builder_dir = find_copy(name, data_dir)
    builder = _builder(builder_dir)
    formats = {form.value for form in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"{builder_dir}: kept as {', '.join(sorted(formats)) or 'an unknown format'}, which has no random access;"
            " convert it, where TensorFlow is installed, by: tfds convert_format --out_file_format=array_record"
            f" --dataset_version_dir={builder_dir}"
        )
    image_key, label_key = _keys(builder)
    sizes = {split: info.num_examples for split, info in builder.info.splits.items() if info.num_examples}

    def split_of(wanted: str | None) -> Split:
        choice = find_split(builder_dir, sizes, wanted)
        if choice is None:
            mend = "" if wanted == "train" else "; choose by data.eval_split, or set data.holdout_fraction"
            known = nearest(wanted or "validation", sizes)
            raise UserError(f"{builder_dir}: no split {wanted or 'validation or test'}{known}{mend}")
        reader = TfdsReader(builder_dir, choice, image_key, label_key)
        return Split(choice, TfdsLabels(reader, sizes[choice]), reader)

    train = split_of("train") if with_train else None
    held_out = split_of(eval_split) if with_eval or train is None else train
    notes = in_use(sizes, train.name if train else None, held_out.name if with_eval else None)
    return Opened(_class_names(builder, label_key), train or held_out.without_images("train"), held_out, notes)


def class_names(name: str, data_dir: str) -> tuple[str, ...]:
    """The class names, from the description beside the data."""
    builder = _builder(find_copy(name, data_dir))
    return _class_names(builder, _keys(builder)[1])


def find_copy(name: str, data_dir: str) -> str:
    """Returns the folder of a prepared copy, ``data_dir/NAME[/CONFIG]/VERSION``.

    Raises:
      UserError: if it isn't there, naming what is.
    """
    match = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::([\w.]+))?", name)
    if not match:
        raise UserError(f"data.name='tfds:{name}' is not of the form tfds:NAME[/CONFIG][:VERSION]")
    base, config, version = match.groups()
    top = os.path.join(data_dir, base)
    if not os.path.isdir(top):
        raise UserError(
            f"{data_dir}: no prepared copy of {base!r} in it; give the data_dir of TFDS by --config.data.path, or"
            f" prepare one where TensorFlow is installed: tfds build {base} --file_format=array_record"
            f" --data_dir={data_dir}"
        )
    configs = [folder for folder in _folders(top) if _versions(os.path.join(top, folder))]
    if config is None and not _versions(top) and len(configs) == 1:
        config = configs[0]
    if config is not None and config not in configs:
        raise UserError(f"{top}: no config {config!r}{nearest(config, configs)}")
    home = os.path.join(top, config) if config else top
    versions = _versions(home)
    if not versions:
        hint = f"; choose one of its configs, as data.name=tfds:{base}/{configs[0]}" if configs else ""
        raise UserError(f"{home}: no finished version in it{hint or '; prepare it again'}")
    if version is not None and version not in versions:
        raise UserError(f"{home}: no version {version}{nearest(version, versions)}")
    return os.path.join(home, version or versions[-1])


def _folders(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _versions(path: str) -> list[str]:
    """Folders that hold a finished copy, the newest last; TFDS writes the description at the very end."""
    names = [
        name
        for name in _folders(path)
        if re.fullmatch(r"\d+\.\d+\.\d+", name) and os.path.exists(os.path.join(path, name, _INFO_FILE))
    ]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


def _builder(builder_dir: str) -> Any:
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    try:
        return tfds.builder_from_directory(builder_dir)
    except Exception as error:  # damaged or very old descriptions fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{builder_dir}: its description can't be read ({reason}); prepare the copy again") from error


def _keys(builder: Any) -> tuple[str, str]:
    """The names of the image and of the label among the features."""
    import tensorflow_datasets as tfds

    found = []
    for usual, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        keys = [key for key, feature in builder.info.features.items() if isinstance(feature, kind)]
        if usual not in keys and len(keys) != 1:
            raise UserError(
                f"{builder.data_dir}: expected one feature {usual!r} ({kind.__name__}), found"
                f" {', '.join(keys) or 'none'}; only data sets for classification can be read"
            )
        found.append(usual if usual in keys else keys[0])
    return found[0], found[1]


def _class_names(builder: Any, label_key: str) -> tuple[str, ...]:
    return tuple(builder.info.features[label_key].names)


class TfdsReader:
    """Reads records by their number; each process opens the files for itself."""

    def __init__(self, builder_dir: str, split: str, image_key: str, label_key: str) -> None:
        self._arguments = (builder_dir, split, image_key, label_key)
        self._source: Any = None
        self._last: tuple[int, dict[str, Any]] | None = None

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return TfdsReader, self._arguments

    def __call__(self, index: int) -> EncodedImage:
        """Reads the record."""
        builder_dir, split, image_key, _ = self._arguments
        return EncodedImage(self._record(index)[image_key], f"{builder_dir}: image {index} of {split}")

    def where(self, index: int) -> str:
        """The copy's folder, and the number in its split."""
        builder_dir, split, *_ = self._arguments
        return f"{os.path.abspath(builder_dir)}: image {index} of {split}"

    def digest(self, rows: Rows) -> dict[str, str]:
        """Digest of data set, version, the records and bytes of each file, and the records that are used."""
        builder_dir, split, *_ = self._arguments
        info = _builder(builder_dir).info
        part = info.splits[split]
        records = sha256_of(np.arange(part.num_examples)[rows])
        facts = (info.full_name, split, str(int(part.num_bytes)), str(part.shard_lengths), records)
        return {"copy": sha256_of_names(text.encode() for text in facts)}

    def label(self, index: int) -> int:
        """The label alone."""
        return int(self._record(index)[self._arguments[3]])

    def _record(self, index: int) -> dict[str, Any]:
        # Image and label of a record are asked for one after the other.
        last = self._last
        if last is None or last[0] != index:
            try:
                self._last = last = (index, self._open()[index])
            except Exception as error:  # whatever a damaged or missing file leads to
                builder_dir, split, *_ = self._arguments
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{builder_dir}: record {index} of {split} can't be read ({reason}); restore or prepare the copy"
                    " again"
                ) from error
        return last[1]

    def _open(self) -> Any:
        if self._source is None:
            import tensorflow_datasets as tfds

            builder_dir, split, image_key, _ = self._arguments
            self._source = _builder(builder_dir).as_data_source(
                split, decoders={image_key: tfds.decode.SkipDecoding()}, file_format="array_record"
            )
        return self._source


class TfdsLabels:
    """The labels of a split; they lie in the records, so that all of them (`np.asarray`) take a pass over the files."""

    def __init__(self, reader: TfdsReader, size: int) -> None:
        self._reader = reader
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(index)
        return self._reader.label(index)

    def __iter__(self) -> Iterator[int]:
        return (self._reader.label(i) for i in range(self._size))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # always a new array
        return np.fromiter(self, np.int32, self._size).astype(dtype or np.int32)
