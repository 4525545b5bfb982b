"""The data sets: each becomes two `Split`s of images with random access, which have labels, masks or boxes.

    DataConfig ──► open_dataset ──► Dataset(class_names, train: Split, eval: Split)

A split reads one image by its number, from any process and in any order; `streams` decides that order.
"""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mnv2_jax.config import DataConfig
from mnv2_jax.data import (
    box_folder,
    folder,
    imagenet,
    imagenet_subsets,
    lists,
    mask_folder,
    shards,
    synthetic,
    tfds_source,
)
from mnv2_jax.data.split import Inventory, OpenedSplits, Split, stratified_share
from mnv2_jax.errors import UserError, machine_fault, nearest
from mnv2_jax.registry import DATASETS, OR_MODULE, module_of

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMES = (
    *("digits", "cifar10", "imagenet", *imagenet_subsets.NAMES, "folder", "tfds:NAME", "synthetic"),
    *(*mask_folder.NAMES, *box_folder.NAMES),
)
UNSPLIT_HOLDOUT = 0.2
"""Share of each class that is held out where the data have no splits and `data.holdout_fraction` is 0."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The images that a run trains on and those that it evaluates."""

    name: str
    class_names: tuple[str, ...]
    """Names of the classes, in the order of their labels."""
    train: Split
    """Images to train on; none where a source has images for evaluation only (`check_trainable`)."""
    eval: Split
    scored: tuple[int, ...] | None = None
    """Labels, in rising order, among which an evaluation takes the largest logit; None: all labels."""
    notes: tuple[str, ...] = ()
    """Remarks on how the data were read, such as files that were left out; one line each."""
    holdout_fraction: float = 0.0
    """Above 0: `eval` is this share of each class, taken out of the train split."""


class Source(NamedTuple):
    """A registered data set, which is defined outside the package."""

    open: Callable[[DataConfig, bool], Dataset]
    num_classes: int | None


def register_dataset(
    name: str, open_it: Callable[[DataConfig, bool], Dataset], *, num_classes: int | None = None
) -> None:
    """Registers a data set under a name, to be used as `data.name`.

    Opening a run on this data set imports the module that defines ``open_it`` again.

    Args:
      name: a name without a colon.
      open_it: a function from a config's `data` to the data set. Its second argument is true where nothing is trained,
        so that images to train on may be missing. `data.holdout_fraction` is applied afterwards, to the train split.
        The function should raise a `UserError` for data that don't exist.
      num_classes: the number of classes, where it is known without the data.

    Raises:
      UserError: if the name is taken or isn't allowed.
    """
    if name in NAMES or ":" in name or not name:
        fault = "belongs to the package" if name in NAMES else "has a colon" if name else "is empty"
        raise UserError(f"data.name={name!r} {fault}; choose another name")
    DATASETS.add(name, Source(open_it, num_classes), module_of(open_it))


def check_trainable(dataset: Dataset) -> None:
    """Refuses a data set that has images for evaluation only.

    Raises:
      UserError: if there are no images to train on.
    """
    if not len(dataset.train):
        raise UserError(
            f"data.name={dataset.name!r}: there are no images to train on, only images to evaluate; use --mode=eval, or"
            " set another data.name or data.path"
        )


def check_path(data: DataConfig) -> None:
    """Refuses a `data.path` that doesn't exist, before anything that takes longer is read.

    Raises:
      UserError: if it doesn't exist, naming the path.
    """
    if data.path is not None:
        _existing_path(_expand_home(data))


def open_dataset(data: DataConfig, evaluates: bool = False) -> Dataset:
    """Opens the data set that the config names; reads names, labels and boxes, but no image files, and of masks a few.

    Args:
      data: `name`, `path`, `image_root`, `eval_split` and `holdout_fraction` are read, and `mask_values` and
        `ignored_classes` for images with masks. Where the data have no splits and `holdout_fraction` is 0,
        `UNSPLIT_HOLDOUT` of each class is held out, or of the images if they have masks or boxes.
      evaluates: true where nothing is trained: images to evaluate are enough then, and train may have none.

    Raises:
      UserError: if the data don't exist or have another layout than expected; the message describes that layout.
    """
    data = _expand_home(data)
    if data.image_root is not None and not (data.path and lists.is_list(data.path)):
        raise UserError(
            f"data.image_root={data.image_root!r} is used only with a list of files, such as data.path=train.csv; leave"
            " it out"
        )
    opened = _find_opener(data)(data, evaluates and data.holdout_fraction == 0)
    fraction = opened.holdout_fraction or data.holdout_fraction
    if fraction == 0:
        return opened
    check_trainable(opened)
    # The share is the same whatever the seed of the run, so that runs over several seeds are measured on the same
    # images and differ by their training alone.
    labels = np.asarray(opened.train.labels)
    is_held_out = stratified_share(labels, lambda count: max(1, round(fraction * count)))
    if emptied := sorted(set(labels.tolist()) - set(labels[~is_held_out].tolist())):
        name = "" if opened.train.targets else f" class {opened.class_names[emptied[0]]!r}"
        raise UserError(
            f"data.holdout_fraction={fraction:g} leaves{name} no image to train on; lower it, or add images"
            f"{' of that class' if name else ''}"
        )
    train, holdout = opened.train.subset(~is_held_out), opened.train.subset(is_held_out, name="holdout")
    return dataclasses.replace(opened, train=train, eval=holdout, holdout_fraction=fraction)


def known_num_classes(data: DataConfig) -> int:
    """Returns the number of classes without reading an image, as a summary of the model needs it.

    Raises:
      UserError: if only the data tell the number, and they don't exist.
    """
    _find_opener(data)  # refuses an unknown name
    data = _expand_home(data)
    if data.path is not None and os.path.exists(data.path):
        if (name := _tfds_name(data)) is not None:
            return len(tfds_source.class_names(name, data.path))
        if data.name in ("folder", "imagenet"):
            return len(_class_names(data, data.path))
        if data.name in box_folder.NAMES:
            return len(box_folder.class_names(data.name, data.path))
    if data.name in mask_folder.NAMES:
        path = data.path if data.path is not None and os.path.exists(data.path) else None
        if names := mask_folder.class_names(data, path):
            return len(names)
    known_counts = {"digits": 10, "cifar10": 10, "synthetic": data.synthetic_classes}
    known_counts |= dict.fromkeys(("imagenet", *imagenet_subsets.NAMES), 1000)
    sources = {name: DATASETS.find(name) for name in DATASETS.names()}
    known_counts |= {name: source.num_classes for name, source in sources.items() if source.num_classes is not None}
    if data.name not in known_counts:
        reason = "data.path is not set" if data.path is None else f"data.path={data.path!r} does not exist"
        raise UserError(
            f"data.name={data.name!r}: the number of classes is not known without the data, and {reason}; give it in"
            " the argument of the config, as in w1_0:classes=10, or correct the path"
        )
    return known_counts[data.name]


def take_inventory(data: DataConfig) -> Inventory:
    """Lists everything that a folder, a tar or a list of files holds, whether or not a run can train on it.

    Images with masks or boxes are recognised by the names of their folders and files. Reads no image.

    Args:
      data: `path` and `image_root` are read, and `mask_values` and `ignored_classes` for images with masks. A `name` of
        images with masks or boxes says what the path holds; any other leaves that to its folders.

    Raises:
      UserError: if the path can't be read or holds no image.
    """
    path, image_root = data.path, data.image_root
    assert path is not None
    is_list = lists.is_list(path)
    if not is_list and image_root is not None:
        raise UserError(f"{path}: not a list of files, and only a list has an image root; leave image_root out")
    if os.path.isfile(path) and is_list:
        return lists.take_inventory(path, image_root)
    if _reader_of(path) is shards:
        raise UserError(
            f"{path}: holds shards, whose images were checked when they were written; to find files that were damaged"
            f" since then, run python -m mnv2_jax.data.prepare verify {path}"
        )
    tree = folder.open_tree(path)
    name = data.name
    if name not in (*mask_folder.NAMES, *box_folder.NAMES) and image_root is None:
        name = mask_folder.find_name(tree) or box_folder.find_name(tree) or name
    if name in mask_folder.NAMES:
        return mask_folder.take_inventory(tree, dataclasses.replace(data, name=name))
    for key, is_set in (("mask_values", data.mask_values != "index"), ("ignored_classes", data.ignored_classes)):
        if is_set:
            raise UserError(f"{path}: no folders of images and masks are in it, so {key} has no use; leave it out")
    if name in box_folder.NAMES:
        return box_folder.take_inventory(tree, name)
    return lists.take_inventory(path, image_root) if is_list else folder.take_inventory(tree)


def _expand_home(data: DataConfig) -> DataConfig:
    """Expands ~ in the paths, since a shell leaves one that follows a comma or a colon."""
    path, root = (text and os.path.expanduser(text) for text in (data.path, data.image_root))
    return dataclasses.replace(data, path=path, image_root=root)


def _find_opener(data: DataConfig) -> Callable[[DataConfig, bool], Dataset]:
    """Returns the function that opens the data set; its second argument says whether nothing is trained."""
    if data.name.startswith("tfds:"):
        return _open_tfds
    openers = {"digits": _open_digits, "cifar10": _open_cifar10, "imagenet": _open_folder, "folder": _open_folder}
    openers |= dict.fromkeys(imagenet_subsets.NAMES, _open_subset) | {"synthetic": _open_synthetic}
    openers |= dict.fromkeys(mask_folder.NAMES, _open_masked) | dict.fromkeys(box_folder.NAMES, _open_boxed)
    if data.name in DATASETS.names():
        return _open_registered
    if data.name not in openers:
        is_folder = os.path.isdir(data.name)
        mend = (
            f"; for that folder: data=folder:{data.name}"
            if is_folder
            else f"{nearest(data.name, [*NAMES, *DATASETS.names()])}{OR_MODULE}"
        )
        raise UserError(f"data.name={data.name!r} is not a data set{mend}")
    return openers[data.name]


def _existing_path(data: DataConfig) -> str:
    """Returns `data.path`, which must exist."""
    if data.path is None:
        raise UserError(f"data.name={data.name!r} is read from disk; set --config.data.path=PATH")
    if not os.path.exists(data.path):
        raise UserError(f"data.path={data.path!r}: no such file or folder; correct --config.data.path")
    return data.path


def _open_registered(data: DataConfig, evaluates: bool) -> Dataset:
    """Opens a registered data set and checks the range of its labels: a wrong one would be learnt without an error."""
    source: Source = DATASETS.find(data.name)
    dataset = source.open(data, evaluates)
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"data.name={data.name!r}: {source.open.__name__} returned {dataset!r:.80}; let it return a Dataset"
        )
    count = len(dataset.class_names)
    for split in (dataset.train, dataset.eval):
        labels = split.labels
        if isinstance(labels, np.ndarray) and len(labels) and not (labels.min() >= 0 and labels.max() < count):
            raise UserError(
                f"data.name={data.name!r}: labels of {split.name} run from {labels.min()} to {labels.max()}; for"
                f" {count} classes they must be 0 to {count - 1}; correct them, or name all classes in the Dataset"
            )
    if source.num_classes not in (None, count):
        raise UserError(
            f"data.name={data.name!r}: its Dataset has {count} names of classes, but it is registered with"
            f" num_classes={source.num_classes}; correct one of them"
        )
    return dataset


def _open_digits(data: DataConfig, evaluates: bool) -> Dataset:
    """Opens scikit-learn's 1,797 digits of 8×8 pixels (Alpaydin and Kaynak 1998), with 36 of each class held out."""
    del evaluates
    from sklearn.datasets import load_digits  # takes a second to import, and only digits need it

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # scikit-learn's values are 0 to 16
    whole = Split.of_arrays("train", np.repeat(grey[..., None], 3, axis=-1), digits.target)
    is_held_out = stratified_share(np.asarray(whole.labels), lambda count: 36)
    names = tuple(str(name) for name in digits.target_names)
    _check_eval_split(data, "test")
    return Dataset("digits", names, whole.subset(~is_held_out), whole.subset(is_held_out, name="test"))


def _open_synthetic(data: DataConfig, evaluates: bool) -> Dataset:
    """Opens the images of `synthetic`; their default number is that of ImageNet's."""
    del evaluates
    _check_eval_split(data, "val")
    notes = ("data: synthetic images, to measure how fast a machine is; accuracies mean nothing",)
    class_names = imagenet.class_ids()[: data.synthetic_classes]
    return Dataset("synthetic", class_names, *synthetic.open_splits(data), notes=notes)


def _open_cifar10(data: DataConfig, evaluates: bool) -> Dataset:
    """Opens CIFAR-10, which may be a folder of images, a file `cifar10.npz`, or a copy made by TFDS."""
    path = _existing_path(data)
    archive = os.path.join(path, "cifar10.npz") if os.path.isdir(path) else path
    if archive.endswith(".npz") and os.path.exists(archive):
        _check_eval_split(data, "test")
        train, test = _read_npz(archive)
        return Dataset("cifar10", CIFAR10_CLASSES, train, test)
    return _open_folder(data, evaluates)


def _open_folder(data: DataConfig, evaluates: bool) -> Dataset:
    """Opens class folders in a directory or a tar, lists of files, shards written by `data.prepare`, or a copy of the
    same data made by TFDS.
    """
    path = _existing_path(data)
    if _tfds_name(data) is not None:
        return _open_tfds(data, evaluates)
    options = data.eval_split, data.holdout_fraction == 0, not evaluates
    if lists.is_list(path):
        return _dataset(data, lists.open_splits(path, data.image_root, *options))
    return _dataset(data, _reader_of(path).open_splits(path, *options))


def _open_masked(data: DataConfig, evaluates: bool) -> Dataset:
    """Opens a data set of `mask_folder`."""
    with_eval = data.holdout_fraction == 0
    return _dataset(data, mask_folder.open_splits(data, _existing_path(data), with_eval, not evaluates))


def _open_boxed(data: DataConfig, evaluates: bool) -> Dataset:
    """Opens a data set of `box_folder`."""
    with_eval = data.holdout_fraction == 0
    return _dataset(data, box_folder.open_splits(data, _existing_path(data), with_eval, not evaluates))


def _dataset(data: DataConfig, opened: OpenedSplits) -> Dataset:
    share, notes = data.holdout_fraction, opened.notes
    if opened.is_unsplit and not share:
        share = UNSPLIT_HOLDOUT
        whole = "the images" if opened.train.targets else "each class"
        note = f"no splits: {share:.0%} of {whole} is held out for evaluation; data.holdout_fraction sets another share"
        notes = (note, *notes)
    return Dataset(data.name, opened.class_names, opened.train, opened.eval, notes=notes, holdout_fraction=share)


def _class_names(data: DataConfig, path: str) -> tuple[str, ...]:
    """Returns the class names of a folder, a tar or a list."""
    if lists.is_list(path):
        return lists.class_names(path)
    names: tuple[str, ...] = _reader_of(path).class_names(path)
    return names


def _reader_of(path: str) -> types.ModuleType:
    """Returns the module that reads a path: `shards` for prepared shards, else `folder`."""
    is_sharded = shards.is_prepared(path) and shards.finished_manifest(path).format == "arrayrecord"
    return shards if is_sharded else folder


def _open_subset(data: DataConfig, evaluates: bool) -> Dataset:
    """Opens a data set of `imagenet_subsets`."""
    del evaluates
    if data.eval_split is not None:
        raise UserError(f"data.eval_split={data.eval_split!r}: {data.name} has no splits; set it to None")
    if data.holdout_fraction:
        raise UserError(
            f"data.holdout_fraction={data.holdout_fraction:g}: {data.name} is evaluated as a whole; set it to 0"
        )
    held_out, notes = imagenet_subsets.open_split(data.name, _existing_path(data))
    scored = imagenet_subsets.scored(data.name)
    return Dataset(data.name, imagenet.class_ids(), held_out.without_images("train"), held_out, scored, notes)


def _open_tfds(data: DataConfig, evaluates: bool) -> Dataset:
    name = _tfds_name(data)
    assert name is not None
    options = data.eval_split, data.holdout_fraction == 0, not evaluates
    return _dataset(data, tfds_source.open_splits(name, _existing_path(data), *options))


def _tfds_name(data: DataConfig) -> str | None:
    """Returns TFDS's name of the data set; None where `data.path` holds no copy made by TFDS."""
    if data.name.startswith("tfds:"):
        return data.name.removeprefix("tfds:")
    name = {"cifar10": "cifar10", "imagenet": "imagenet2012"}.get(data.name)
    return name if name and data.path and os.path.isdir(os.path.join(data.path, name)) else None


def _check_eval_split(data: DataConfig, held_out: str) -> None:
    if data.eval_split not in (None, held_out):
        raise UserError(
            f"data.eval_split={data.eval_split!r}: {data.name} has train and {held_out}; use {held_out}, or"
            " data.holdout_fraction"
        )


def _read_npz(path: str) -> tuple[Split, Split]:
    """Reads {x,y}_{train,test} (images uint8 [n, 32, 32, 3], labels [n] or [n, 1]), the keys that Keras gives them."""
    try:
        # The file is opened here because np.load leaves it open when it fails.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except ValueError as error:  # NumPy's own message advises to unpickle it
        raise UserError(f"{path}: not an archive of plain NumPy arrays; make or copy it again") from error
    except Exception as error:  # a damaged zip fails in many ways
        if (fault := machine_fault(error)) is not None:
            raise UserError(f"{path}: can't be read ({fault}); fix that and start again") from error
        raise UserError(f"{path}: can't be read as a NumPy archive ({error}); make or copy it again") from error
    if missing := sorted({"x_train", "y_train", "x_test", "y_test"} - set(arrays)):
        raise UserError(
            f"{path}: the arrays are called {', '.join(sorted(arrays)) or 'nothing'}; {', '.join(missing)} not found."
            " Save images as x_train, x_test (uint8 [n, 32, 32, 3]) and labels as y_train, y_test"
        )
    return _check_arrays(path, "train", arrays), _check_arrays(path, "test", arrays)


def _check_arrays(path: str, name: str, arrays: dict[str, np.ndarray]) -> Split:
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
