"""Reads copies of data sets made by TensorFlow Datasets (TFDS), without TensorFlow and without a network.

TFDS stores a copy as ``data_dir/NAME[/CONFIG]/VERSION/``. Only its ArrayRecord format has random access. The version is
looked up here rather than by ``tfds.builder``, which may run the code of the data set or download it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from mnv2_jax.data.images import EncodedImage
from mnv2_jax.data.split import OpenedSplits, Rows, Split, find_split, note_unused, sha256_of, sha256_of_names
from mnv2_jax.errors import UserError, nearest

_INFO_FILE = "dataset_info.json"


def open_splits(
    name: str, data_dir: str, eval_split: str | None, with_eval: bool = True, with_train: bool = True
) -> OpenedSplits:
    """Opens the train split and the split to evaluate.

    Args:
      name: ``NAME[/CONFIG][:VERSION]``; without a version, the newest.
      data_dir: the folder that holds NAME.
      eval_split: the split to evaluate; None: validation, or test where there is no validation.
      with_eval: False where the images to evaluate will be taken out of train; the train split is then returned twice.
      with_train: False where nothing is trained; train then has no images and need not exist.

    Raises:
      UserError: if no prepared copy of the data set is there, or its file format has no random access.
    """
    builder_dir = find_copy(name, data_dir)
    builder = _builder(builder_dir)
    formats = {form.value for form in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"{builder_dir}: stored as {', '.join(sorted(formats)) or 'an unknown format'}, which has no random access;"
            " convert it where TensorFlow is installed, with: tfds convert_format --out_file_format=array_record"
            f" --dataset_version_dir={builder_dir}"
        )
    image_key, label_key = _keys(builder)
    sizes = {split: info.num_examples for split, info in builder.info.splits.items() if info.num_examples}

    def open_split(requested: str | None) -> Split:
        split = find_split(builder_dir, sizes, requested)
        if split is None:
            advice = "; choose with data.eval_split, or set data.holdout_fraction"
            if requested == "train":
                advice = "; it can only be evaluated, with --mode=eval"
            hint = nearest(requested or "validation", sizes)
            raise UserError(f"{builder_dir}: no split {requested or 'validation or test'}{hint}{advice}")
        reader = TfdsReader(builder_dir, split, image_key, label_key)
        return Split(split, TfdsLabels(reader, sizes[split]), reader)

    train = open_split("train") if with_train else None
    held_out = open_split(eval_split) if with_eval or train is None else train
    notes = note_unused(sizes, train.name if train else None, held_out.name if with_eval else None)
    return OpenedSplits(_class_names(builder, label_key), train or held_out.without_images("train"), held_out, notes)


def class_names(name: str, data_dir: str) -> tuple[str, ...]:
    """Returns the class names, from the JSON files that TFDS keeps beside the data."""
    builder = _builder(find_copy(name, data_dir))
    return _class_names(builder, _keys(builder)[1])


def find_copy(name: str, data_dir: str) -> str:
    """Returns the folder of a prepared copy, ``data_dir/NAME[/CONFIG]/VERSION``.

    Raises:
      UserError: if it doesn't exist, naming the versions or configs that do.
    """
    match = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::([\w.]+))?", name)
    if not match:
        raise UserError(f"data.name='tfds:{name}' is not of the form tfds:NAME[/CONFIG][:VERSION]")
    base, config, version = match.groups()
    top = os.path.join(data_dir, base)
    if not os.path.isdir(top):
        raise UserError(
            f"{data_dir}: no prepared copy of {base!r} in it; set --config.data.path to the data_dir of TFDS, or"
            f" prepare a copy where TensorFlow is installed: tfds build {base} --file_format=array_record"
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
    """Returns the folders of finished copies, the newest last; TFDS writes a copy's description at the very end."""
    names = [
        name
        for name in _folders(path)
        if re.fullmatch(r"\d+\.\d+\.\d+", name) and os.path.exists(os.path.join(path, name, _INFO_FILE))
    ]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


def _builder(builder_dir: str) -> Any:
    import tensorflow_datasets as tfds  # slow to import, and only copies made by TFDS need it

    try:
        return tfds.builder_from_directory(builder_dir)
    except Exception as error:  # damaged or very old descriptions fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{builder_dir}: its description can't be read ({reason}); prepare the copy again") from error


def _keys(builder: Any) -> tuple[str, str]:
    """Returns the names of the features that hold the image and the label."""
    import tensorflow_datasets as tfds

    names = []
    for usual, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        keys = [key for key, feature in builder.info.features.items() if isinstance(feature, kind)]
        if usual not in keys and len(keys) != 1:
            raise UserError(
                f"{builder.data_dir}: expected one feature {usual!r} ({kind.__name__}), but found"
                f" {', '.join(keys) or 'none'}; give a data set for classification"
            )
        names.append(usual if usual in keys else keys[0])
    return names[0], names[1]


def _class_names(builder: Any, label_key: str) -> tuple[str, ...]:
    return tuple(builder.info.features[label_key].names)


class TfdsReader:
    """Reads images by their number; each process opens the files for itself."""

    def __init__(self, builder_dir: str, split: str, image_key: str, label_key: str) -> None:
        self._arguments = (builder_dir, split, image_key, label_key)
        self._source: Any = None
        self._last: tuple[int, dict[str, Any]] | None = None

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return TfdsReader, self._arguments

    def __call__(self, index: int) -> EncodedImage:
        """Reads an image from its record."""
        builder_dir, split, image_key, _ = self._arguments
        return EncodedImage(self._record(index)[image_key], f"{builder_dir}: image {index} of {split}")

    def path_of(self, index: int) -> str:
        """Returns the folder of the copy and the number of the image in its split."""
        builder_dir, split, *_ = self._arguments
        return f"{os.path.abspath(builder_dir)}: image {index} of {split}"

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns a digest of the copy's full name, its split, its files' sizes and the numbers of the records."""
        builder_dir, split, *_ = self._arguments
        info = _builder(builder_dir).info
        part = info.splits[split]
        records = sha256_of(np.arange(part.num_examples)[rows])
        facts = (info.full_name, split, str(int(part.num_bytes)), str(part.shard_lengths), records)
        return {"copy": sha256_of_names(text.encode() for text in facts)}

    def label(self, index: int) -> int:
        """Returns the label of an image."""
        return int(self._record(index)[self._arguments[3]])

    def _record(self, index: int) -> dict[str, Any]:
        # The image and the label of a record are usually read one after the other.
        last = self._last
        if last is None or last[0] != index:
            try:
                self._last = last = (index, self._open()[index])
            except Exception as error:  # damaged or missing files raise many kinds of errors
                builder_dir, split, *_ = self._arguments
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{builder_dir}: record {index} of {split} can't be read ({reason}); restore the copy or prepare it"
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
    """The labels of a split. They are stored in the records, so `np.asarray` reads all files to collect them."""

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
