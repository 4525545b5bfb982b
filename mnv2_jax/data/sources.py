"""The data sets: each becomes two `Split`s of labelled images with random access.

    DataConfig ──► open_dataset ──► Dataset(class_names, train: Split, eval: Split)

A split reads one image by its number, from any process and in any order; what order that is, `streams` decides.
"""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mnv2_jax.config import DataConfig
from mnv2_jax.data import folder, imagenet, imagenet_subsets, lists, shards, synthetic, tfds_source
from mnv2_jax.data.split import Inventory, Opened, Split, stratified_share
from mnv2_jax.errors import UserError, machine_fault, nearest
from mnv2_jax.registry import DATASETS, module_of

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMES = ("digits", "cifar10", "imagenet", *imagenet_subsets.NAMES, "folder", "tfds:NAME", "synthetic")
UNSPLIT_HOLDOUT = 0.2
"""`data.holdout_fraction` of images that come without splits, where it is left at 0."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Data that a run learns from and is measured on."""

    name: str
    class_names: tuple[str, ...]
    """In the order of the labels."""
    train: Split
    """Without images where there are only some to evaluate on (`check_trainable`)."""
    eval: Split
    scored: tuple[int, ...] | None = None
    """The labels among which an evaluation looks for the predictions, rising; None: among all."""
    notes: tuple[str, ...] = ()
    """Notes on what is left alone on disk, a line each."""
    holdout_fraction: float = 0.0
    """Above 0: what is evaluated is this share of each class, taken out of train."""


class Source(NamedTuple):
    """A data set outside the package."""

    open: Callable[[DataConfig, bool], Dataset]
    num_classes: int | None


def register_dataset(
    name: str, open_it: Callable[[DataConfig, bool], Dataset], *, num_classes: int | None = None
) -> None:
    """Makes a data set known by a name, for `data.name`.

    The module in which ``open_it`` is defined is imported again by whoever opens a run on it.

    Args:
      name: without a colon.
      open_it: from a config's `data` to the data set; the second argument says whether nothing is trained, so that
        images to train on may be missing. `data.holdout_fraction` is followed afterwards, of its train split.
        What it raises for data that aren't there should be a `UserError`.
      num_classes: where that is known without the data.

    Raises:
      UserError: if the name is taken, or can't be one.
    """
    if name in NAMES or ":" in name or not name:
        raise UserError(f"data.name={name!r} is the package's own or has a colon; give another name")
    DATASETS.add(name, Source(open_it, num_classes), module_of(open_it))


def check_trainable(dataset: Dataset) -> None:
    """Refuses data that hold images for evaluation only.

    Raises:
      UserError: saying so.
    """
    if not len(dataset.train):
        raise UserError(
            f"data.name={dataset.name!r}: there are no images to train on, only some to evaluate on; give --mode=eval,"
            " or another data.name or data.path"
        )


def check_path(data: DataConfig) -> None:
    """Refuses a `data.path` that leads nowhere, before anything that takes longer is read.

    Raises:
      UserError: naming the path.
    """
    if data.path is not None:
        _path(_at_home(data))


def open_dataset(data: DataConfig, evaluates: bool = False) -> Dataset:
    """Opens the data set that the config names; reads file names and labels, but no image files.

    Args:
      data: `name`, `path`, `image_root`, `eval_split` and `holdout_fraction` are read. Without splits, and with
        nothing said of what is held out, it is `UNSPLIT_HOLDOUT`.
      evaluates: whether nothing is trained: images to evaluate on are enough, and train may be without any.

    Raises:
      UserError: if it isn't there, or isn't laid out as it should be; the line says how it should be.
    """
    data = _at_home(data)
    if data.image_root is not None and not (data.path and lists.is_list(data.path)):
        raise UserError(
            f"data.image_root={data.image_root!r}: read with a list of files only, as data.path=train.csv; leave it out"
        )
    opened = _opener(data)(data, evaluates and data.holdout_fraction == 0)
    fraction = opened.holdout_fraction or data.holdout_fraction
    if fraction == 0:
        return opened
    check_trainable(opened)
    # The share is the same whatever the seed of the run, so that runs over several seeds are measured on the same
    # images and differ by their training alone.
    labels = np.asarray(opened.train.labels)
    held = stratified_share(labels, lambda count: max(1, round(fraction * count)))
    if lost := sorted(set(labels.tolist()) - set(labels[~held].tolist())):
        name = opened.class_names[lost[0]]
        raise UserError(
            f"data.holdout_fraction={fraction:g} leaves class {name!r} no image to train on; lower it, or"
            " add images of that class"
        )
    train, holdout = opened.train.subset(~held), opened.train.subset(held, name="holdout")
    return dataclasses.replace(opened, train=train, eval=holdout, holdout_fraction=fraction)


def known_num_classes(data: DataConfig) -> int:
    """The number of classes, without opening a single image: for a summary of the model.

    Raises:
      UserError: if only the data can tell and they aren't here.
    """
    _opener(data)  # refuses a name that is none
    data = _at_home(data)
    if data.path is not None and os.path.exists(data.path):
        if (name := _tfds_name(data)) is not None:
            return len(tfds_source.class_names(name, data.path))
        if data.name in ("folder", "imagenet"):
            return len(_class_names(data, data.path))
    known = {"digits": 10, "cifar10": 10, "synthetic": data.synthetic_classes}
    known |= dict.fromkeys(("imagenet", *imagenet_subsets.NAMES), 1000)
    sources = {name: DATASETS.find(name) for name in DATASETS.names()}
    known |= {name: source.num_classes for name, source in sources.items() if source.num_classes is not None}
    if data.name not in known:
        where = "data.path is not set" if data.path is None else f"there is nothing at data.path={data.path!r}"
        raise UserError(
            f"data.name={data.name!r}: the number of classes is not known without the data, and {where}; give it in"
            " the argument of the config, as in w1_0:classes=10, or correct the path"
        )
    return known[data.name]


def take_inventory(path: str, image_root: str | None = None) -> Inventory:
    """All that a folder, a tar or a list of files holds, whether or not it can be trained on; reads no image.

    Args:
      path: as `data.path`.
      image_root: as `data.image_root`.

    Raises:
      UserError: if it can't be read, or there is no image in it.
    """
    if lists.is_list(path):
        return lists.take_inventory(path, image_root)
    if image_root is not None:
        raise UserError(f"{path}: not a list of files, for which an image root is read; leave it out")
    if _kept_in(path) is shards:
        raise UserError(
            f"{path}: shards, whose images were looked at when they were written; python -m mnv2_jax.data.prepare"
            f" verify {path} finds what has been damaged since"
        )
    return folder.take_inventory(path)


def _at_home(data: DataConfig) -> DataConfig:
    """With ~ in paths for the home directory, which a shell doesn't see behind a comma or a colon."""
    path, root = (given and os.path.expanduser(given) for given in (data.path, data.image_root))
    return dataclasses.replace(data, path=path, image_root=root)


def _opener(data: DataConfig) -> Callable[[DataConfig, bool], Dataset]:
    """Function that opens it, given also whether only to evaluate on."""
    if data.name.startswith("tfds:"):
        return _open_tfds
    openers = {"digits": _open_digits, "cifar10": _open_cifar10, "imagenet": _open_folder, "folder": _open_folder}
    openers |= dict.fromkeys(imagenet_subsets.NAMES, _open_subset) | {"synthetic": _open_synthetic}
    if data.name in DATASETS.names():
        return _open_registered
    if data.name not in openers:
        raise UserError(f"data.name={data.name!r} is not a data set{nearest(data.name, [*NAMES, *DATASETS.names()])}")
    return openers[data.name]


def _path(data: DataConfig) -> str:
    """`data.path`, which must be there."""
    if data.path is None:
        raise UserError(f"data.name={data.name!r} needs its place on disk; give --config.data.path=PATH")
    if not os.path.exists(data.path):
        raise UserError(f"data.path={data.path!r}: no such file or folder; correct --config.data.path")
    return data.path


def _open_registered(data: DataConfig, evaluates: bool) -> Dataset:
    """A data set outside the package, whose labels are looked at: a wrong one would be learnt in silence."""
    source: Source = DATASETS.find(data.name)
    dataset = source.open(data, evaluates)
    if not isinstance(dataset, Dataset):
        raise UserError(f"data.name={data.name!r}: {source.open.__name__} gives no Dataset but {dataset!r:.80}")
    count = len(dataset.class_names)
    for split in (dataset.train, dataset.eval):
        labels = split.labels
        if isinstance(labels, np.ndarray) and len(labels) and not (labels.min() >= 0 and labels.max() < count):
            raise UserError(
                f"data.name={data.name!r}: labels of {split.name} run from {labels.min()} to {labels.max()}; of {count}"
                f" classes they are 0 to {count - 1}"
            )
    return dataset


def _open_digits(data: DataConfig, evaluates: bool) -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels (Alpaydin and Kaynak 1998), 36 a class held out."""
    del evaluates
    from sklearn.datasets import load_digits  # a second to import, and only needed here

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # given as 0..16
    whole = Split.of_arrays("train", np.repeat(grey[..., None], 3, axis=-1), digits.target)
    held = stratified_share(np.asarray(whole.labels), lambda count: 36)
    names = tuple(str(name) for name in digits.target_names)
    _check_only(data, "test")
    return Dataset("digits", names, whole.subset(~held), whole.subset(held, name="test"))


def _open_synthetic(data: DataConfig, evaluates: bool) -> Dataset:
    """Images of `synthetic`, unless otherwise said as many as ImageNet has."""
    del evaluates
    _check_only(data, "val")
    notes = ("data: synthetic images, to measure how fast a machine is; accuracies mean nothing",)
    class_names = imagenet.class_ids()[: data.synthetic_classes]
    return Dataset("synthetic", class_names, *synthetic.open_splits(data), notes=notes)


def _open_cifar10(data: DataConfig, evaluates: bool) -> Dataset:
    """CIFAR-10 as a folder of images, as one `cifar10.npz`, or as a copy of TFDS."""
    path = _path(data)
    archive = os.path.join(path, "cifar10.npz") if os.path.isdir(path) else path
    if archive.endswith(".npz") and os.path.exists(archive):
        _check_only(data, "test")
        train, test = _read_npz(archive)
        return Dataset("cifar10", CIFAR10_CLASSES, train, test)
    return _open_folder(data, evaluates)


def _open_folder(data: DataConfig, evaluates: bool) -> Dataset:
    """Class folders in a directory or a tar, lists of files, shards of `data.prepare`, or the copy that TFDS made of
    the same data.
    """
    path = _path(data)
    if _tfds_name(data) is not None:
        return _open_tfds(data, evaluates)
    asked = data.eval_split, data.holdout_fraction == 0, not evaluates
    if lists.is_list(path):
        return _dataset(data, lists.open_splits(path, data.image_root, *asked))
    return _dataset(data, _kept_in(path).open_splits(path, *asked))


def _dataset(data: DataConfig, opened: Opened) -> Dataset:
    share, notes = data.holdout_fraction, opened.notes
    if opened.is_unsplit and not share:
        share = UNSPLIT_HOLDOUT
        said = "no splits: {:.0%} of each class are held out to evaluate on; data.holdout_fraction sets another share"
        notes = (said.format(share), *notes)
    return Dataset(data.name, opened.class_names, opened.train, opened.eval, notes=notes, holdout_fraction=share)


def _class_names(data: DataConfig, path: str) -> tuple[str, ...]:
    """Names of the classes of a folder, a tar or a list."""
    if lists.is_list(path):
        return lists.class_names(path)
    names: tuple[str, ...] = _kept_in(path).class_names(path)
    return names


def _kept_in(path: str) -> types.ModuleType:
    """Reader of a folder or a tar."""
    is_sharded = shards.is_prepared(path) and shards.finished_manifest(path).format == "arrayrecord"
    return shards if is_sharded else folder


def _open_subset(data: DataConfig, evaluates: bool) -> Dataset:
    """A data set of `imagenet_subsets`."""
    del evaluates
    if data.eval_split is not None:
        raise UserError(f"data.eval_split={data.eval_split!r}: {data.name} is not split; set it to None")
    if data.holdout_fraction:
        raise UserError(
            f"data.holdout_fraction={data.holdout_fraction:g}: {data.name} is evaluated as a whole; set it to 0"
        )
    held_out, notes = imagenet_subsets.open_split(data.name, _path(data))
    scored = imagenet_subsets.scored(data.name)
    return Dataset(data.name, imagenet.class_ids(), held_out.nothing("train"), held_out, scored, notes)


def _open_tfds(data: DataConfig, evaluates: bool) -> Dataset:
    name = _tfds_name(data)
    assert name is not None
    with_eval = data.holdout_fraction == 0
    return _dataset(data, tfds_source.open_splits(name, _path(data), data.eval_split, with_eval, not evaluates))


def _tfds_name(data: DataConfig) -> str | None:
    """TFDS's name of the data set, or None where `data.path` holds no copy by TFDS."""
    if data.name.startswith("tfds:"):
        return data.name.removeprefix("tfds:")
    name = {"cifar10": "cifar10", "imagenet": "imagenet2012"}.get(data.name)
    return name if name and data.path and os.path.isdir(os.path.join(data.path, name)) else None


def _check_only(data: DataConfig, held_out: str) -> None:
    if data.eval_split not in (None, held_out):
        raise UserError(
            f"data.eval_split={data.eval_split!r}: {data.name} has train and {held_out}; use {held_out}, or"
            " data.holdout_fraction"
        )


def _read_npz(path: str) -> tuple[Split, Split]:
    """Reads {x,y}_{train,test} (images uint8 [n, 32, 32, 3], labels [n] or [n, 1]), the keys that Keras uses."""
    try:
        # Opened here, because np.load leaves the file open where it fails.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except ValueError as error:  # NumPy's own message advises to unpickle it
        raise UserError(f"{path}: not an archive of plain NumPy arrays; make or copy it again") from error
    except Exception as error:  # a damaged zip fails in many ways
        if (fault := machine_fault(error)) is not None:
            raise UserError(f"{path}: can't be read ({fault}); mend that and start again") from error
        raise UserError(f"{path}: can't be read as a NumPy archive ({error}); make or copy it again") from error
    if missing := sorted({"x_train", "y_train", "x_test", "y_test"} - set(arrays)):
        raise UserError(
            f"{path}: the arrays are called {', '.join(sorted(arrays)) or 'nothing'}; {', '.join(missing)} not found."
            " Save images as x_train, x_test (uint8 [n, 32, 32, 3]) and labels as y_train, y_test"
        )
    return _checked(path, "train", arrays), _checked(path, "test", arrays)


def _checked(path: str, name: str, arrays: dict[str, np.ndarray]) -> Split:
    images, labels = arrays[f"x_{name}"], arrays[f"y_{name}"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise UserError(
            f"{path}: x_{name} is {images.dtype} {list(images.shape)}; save it as uint8 [n, 32, 32, 3]"
            " (rows, columns, RGB)"
        )
    if labels.size != len(images) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: y_{name} is {labels.dtype} {list(labels.shape)}; save one integer for each of the {len(images)}"
            f" images of x_{name}"
        )
    if labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise UserError(f"{path}: y_{name} runs from {labels.min()} to {labels.max()}; labels must be 0 to 9")
    return Split.of_arrays(name, images, labels.reshape(-1))
