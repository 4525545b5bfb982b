"""Images with masks for semantic segmentation, on disk or inside an uncompressed tar.

    mask_folder       images/train/NAME.jpg  masks/train/NAME.png       train/images/NAME.jpg  train/masks/NAME.png
                      images/NAME.jpg        masks/NAME.png             and classes.txt
    ade20k            images/training/NAME.jpg  annotations/training/NAME.png
    voc_segmentation  JPEGImages/NAME.jpg  SegmentationClass/NAME.png  ImageSets/Segmentation/train.txt
    cityscapes        leftImg8bit/train/CITY/NAME_leftImg8bit.png  gtFine/train/CITY/NAME_gtFine_labelTrainIds.png

An image and its mask have the same path below their folders, but for the extension. An image without a mask, or a mask
without an image, is left out; a note counts them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mnv2_jax.config import IGNORED, DataConfig
from mnv2_jax.data import mask_classes
from mnv2_jax.data.class_file import CLASSES_FILE, Colour, parse_classes
from mnv2_jax.data.folder import Tree, base_name, open_tree
from mnv2_jax.data.images import DamagedImageError, check_readable
from mnv2_jax.data.masks import MOST_CLASSES, MaskReader, Meaning, meaning_of
from mnv2_jax.data.split import NO_CLASS, Inventory, OpenedSplits, Split, choose_splits, role_of, spread, usual_order
from mnv2_jax.data.trees import by_name, content_near, counted, exists, find_base, listed, others, outside, tops
from mnv2_jax.errors import UserError, nearest

_FOLDERS = {"images": "masks", "img_dir": "ann_dir"}
"""Names of the folder of images, each with that of the masks; the second pair is mmsegmentation's."""
_LAYOUT = (
    "arrange the files as images/train/NAME.jpg and masks/train/NAME.png, or train/images/NAME.jpg and"
    " train/masks/NAME.png, with val beside train; or as images/NAME.jpg and masks/NAME.png without splits"
)
_LINE = (
    "write one line for each class, in the order of the values in masks: its name, as 'traffic light'; or number and"
    " name, as '3 traffic light'; with colours, also red, green and blue, as 'traffic light 250 170 30'"
)
_SAMPLE = 32
"""Masks of two classes that are read to tell 0 and 255 from 0 and 1."""


class _Pairs(NamedTuple):
    """The files of a split."""

    images: list[str]
    """Sorted paths of the images that have a mask."""
    masks: list[str]
    """Paths of their masks."""
    unmasked: Sequence[str] = ()
    """Paths of images that have no mask."""
    unpictured: Sequence[str] = ()
    """Paths of masks that have no image."""
    values: str = ""
    """Which of the meanings of the set the masks have, where there are several."""


@dataclasses.dataclass(frozen=True)
class _Set:
    """A data set as it lies in a tree."""

    splits: Mapping[str, _Pairs]
    """The files by split; those of a set without splits have the name ""."""
    meanings: Mapping[str, Meaning]
    """What values mean, by `_Pairs.values`."""
    notes: tuple[str, ...] = ()
    layout: str = _LAYOUT
    """Advice on how to arrange the files."""

    @property
    def meaning(self) -> Meaning:
        """Any of the meanings; all have the same classes."""
        return next(iter(self.meanings.values()))


def find_name(tree: Tree) -> str | None:
    """Returns the name in `NAMES` of the data set whose folders a tree has; None if it has none of them."""
    return next((name for name, source in _SOURCES.items() if source.is_here(tree)), None)


def open_splits(data: DataConfig, path: str, with_eval: bool = True, with_train: bool = True) -> OpenedSplits:
    """Opens the train split and the split to evaluate.

    Args:
      data: `name`, `eval_split`, `mask_values` and `ignored_classes` are read.
      path: a directory or a .tar file that exists.
      with_eval: False where the images to evaluate will be taken out of train; the train split is then returned twice.
      with_train: False where nothing is trained. Train then has no images and need not exist.

    Returns:
      The names of the classes that aren't ignored, and the two splits, sorted by the names of the files. All labels are
      0, and masks are the target "mask".

    Raises:
      UserError: if the layout isn't as above, or classes.txt can't be used.
    """
    tree = open_tree(path)
    found = _SOURCES[data.name].read(tree, data, tree_classes)
    chosen = choose_splits(
        path,
        list(found.splits),
        lambda name: bool(found.splits[name].images),
        "masks",
        data.eval_split,
        found.layout,
        with_eval,
        with_train,
    )
    opened = {name: _make_split(tree, name, found) for name in chosen.used}
    _check_two_classes(found, opened[chosen.used[0]])
    missing = [note for name in opened for note in _missing(name, found.splits[name])]
    return chosen.opened(found.meaning.kept_names, opened, (*found.notes, *missing))


def take_inventory(tree: Tree, data: DataConfig) -> Inventory:
    """Lists all pairs of images and masks, whether or not a run can train on them; opens none of them.

    Args:
      tree: the files.
      data: `name`, `mask_values` and `ignored_classes` are read.

    Returns:
      The inventory. Its class names are those of all classes, ignored or not; they are empty, and values mean nothing,
      where classes.txt can't be used. A note then says why.

    Raises:
      UserError: if the files can't be read or there is no pair.
    """
    problems: list[str] = []

    def classes_or_none(tree: Tree, data: DataConfig) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
        try:
            return tree_classes(tree, data)
        except UserError as error:
            problems.append(str(error))
            return (), ()

    found = _SOURCES[data.name].read(tree, data, classes_or_none)
    splits, notes = {}, [*problems, *found.notes]
    for name in usual_order(found.splits):
        pairs = found.splits[name]
        notes += _missing(name, pairs)
        if pairs.images:
            split = _make_split(tree, name, found)
            splits[split.name] = dataclasses.replace(split, labels=np.full(len(split), NO_CLASS, np.int32))
    if not splits:
        raise UserError(f"{tree.path}: {'; '.join(notes) or 'no image and no mask is in it'}; {found.layout}")
    return Inventory(found.meaning.class_names, splits, tree.path, tuple(notes), data.name)


def class_names(data: DataConfig, path: str | None) -> tuple[str, ...]:
    """Returns the names of the classes that aren't ignored; reads no image and no mask.

    Args:
      data: `name`, `mask_values` and `ignored_classes` are read.
      path: a directory or a tar that exists; None: only a data set with known classes has names.

    Raises:
      UserError: if classes.txt can't be used, or an ignored class doesn't exist.
    """
    names = _SOURCES[data.name].class_names
    if not names and path is not None:
        names, _ = tree_classes(open_tree(path), data)
    ignored = _ignored(names, data)
    return tuple(name for label, name in enumerate(names) if label not in ignored)


# --- splits -------------------------------------------------------------------------------------------------


def _make_split(tree: Tree, name: str, found: _Set) -> Split:
    pairs = found.splits[name]
    if not pairs.images:
        missing = "; ".join(_missing(name, pairs))
        state = f"{missing}, and so no pair" if missing else f"{name or 'it'}: holds no image and no mask"
        raise UserError(f"{tree.path}: {state}; {_mend(pairs, found.layout)}")
    check_readable([*pairs.images, *pairs.masks])
    labels = np.zeros(len(pairs.images), np.int32)
    images, masks = (tree.split(name or base_name(tree), labels, files) for files in (pairs.images, pairs.masks))
    reader = MaskReader(masks.read, found.meanings[pairs.values])
    return dataclasses.replace(images, targets={"mask": reader})


def _mend(pairs: _Pairs, layout: str) -> str:
    if pairs.unmasked and pairs.unpictured:
        return "let an image and its mask have the same name but for the extension"
    return layout


def _missing(name: str, pairs: _Pairs) -> tuple[str, ...]:
    """Returns notes that count the images without a mask and the masks without an image."""
    prefix = f"{name}: " if name else ""
    counts = (("image", "mask", pairs.unmasked), ("mask", "image", pairs.unpictured))
    return tuple(
        f"{prefix}{counted(files, this)} without {'an' if other == 'image' else 'a'} {other}, as {files[0]}"
        for this, other, files in counts
        if files
    )


def _check_two_classes(found: _Set, split: Split) -> None:
    """Refuses masks of 0 and 255 that would be taken for class 0 and ignored pixels, without an error."""
    if found.meaning.kind != "index" or len(found.meaning.class_names) != 2:
        return
    values, masks = set[int](), split.targets["mask"]
    for index in spread(len(split), _SAMPLE):
        with contextlib.suppress(DamagedImageError):  # the run meets it again, and may skip it
            values |= set(np.unique(masks(index).values()).tolist())
    if values == {0, IGNORED}:
        assert isinstance(masks, MaskReader)
        raise UserError(
            f"{masks.path_of(0)}: like other masks it holds only 0 and 255, of which 255 would be ignored; set"
            " data.mask_values=binary, for 255 as the second class"
        )


# --- classes ------------------------------------------------------------------------------------------------

ClassesReader = Callable[[Tree, DataConfig], tuple[tuple[str, ...], tuple[Colour, ...]]]
"""A function that reads the names of classes and, where masks are in colour, the colours."""


def tree_classes(tree: Tree, data: DataConfig) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Reads classes.txt at the top of a tree, or beside a tar.

    Returns:
      The names of all classes, and their colours where `data.mask_values` is palette.

    Raises:
      UserError: if it doesn't exist, or naming what is wrong in it.
    """
    place, content = content_near(tree, CLASSES_FILE)
    if content is None:
        if data.mask_values == "binary":
            return ("background", "foreground"), ()
        raise UserError(
            f"{place}: does not exist, so that the classes have no names; {_LINE}. python -m mnv2_jax.inspect"
            f" {tree.path} prints the values that masks hold"
        )
    names, colours = _parse_classes(place, content)
    if data.mask_values == "palette" and len(colours) != len(names):
        raise UserError(f"{place}: gives no colours, which data.mask_values=palette needs; {_LINE}")
    if data.mask_values == "binary" and len(names) != 2:
        raise UserError(
            f"{place}: names {len(names)} classes, but data.mask_values=binary has two, for 0 and 255; correct one of"
            " them"
        )
    return names, colours if data.mask_values == "palette" else ()


def _parse_classes(file: str, content: bytes) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Parses classes.txt; colours are read where every line ends in three numbers."""
    names, colours = parse_classes(file, content, with_colours=True)
    if not 2 <= len(names) <= MOST_CLASSES:
        raise UserError(
            f"{file}: names {len(names)} classes, and there must be 2 to {MOST_CLASSES}; {_LINE}. What belongs to no"
            " class is a class of its own, such as background, or ignored (data.ignored_classes)"
        )
    return names, colours


def _ignored(names: Sequence[str], data: DataConfig) -> tuple[int, ...]:
    """Returns the numbers of the classes that `data.ignored_classes` names."""
    for name in data.ignored_classes:
        if name not in names:
            raise UserError(f"data.ignored_classes: {name!r} is not a class of {data.name}{nearest(name, names)}")
    ignored = tuple(label for label, name in enumerate(names) if name in data.ignored_classes)
    if ignored and len(names) - len(ignored) < 2:
        raise UserError(
            f"data.ignored_classes leaves {len(names) - len(ignored)} of {len(names)} classes, and a network needs two;"
            " ignore fewer"
        )
    return ignored


# --- pairs of files -----------------------------------------------------------------------------------------


def _pair(images: Mapping[str, str], masks: Mapping[str, str], values: str = "") -> _Pairs:
    """Pairs files, given by names that a mask shares with its image."""
    both = sorted(images.keys() & masks.keys())
    return _Pairs(
        [images[name] for name in both],
        [masks[name] for name in both],
        [images[name] for name in sorted(images.keys() - masks.keys())],
        [masks[name] for name in sorted(masks.keys() - images.keys())],
        values,
    )


def _paired_folders(tree: Tree, images: str, masks: str) -> tuple[dict[str, _Pairs], tuple[str, ...]]:
    """Pairs the files of two folders that hold either splits or files; returns the splits and notes."""
    tops = [folder for folder in (images, masks) if exists(tree, folder)]
    names = sorted({name for top in tops for name in tree.folders(top) if role_of(name)})
    notes = others(tree, tops)
    if not names:
        return {"": _pair(by_name(tree, images), by_name(tree, masks))}, (*notes, *outside(tree, tops))
    splits = {
        name: _pair(by_name(tree, f"{images}/{name}"), by_name(tree, f"{masks}/{name}")) for name in usual_order(names)
    }
    return splits, (*notes, *outside(tree, [f"{top}/{name}" for top in tops for name in names]))


# --- the data sets ------------------------------------------------------------------------------------------


def _meaning_of(values: str, names: tuple[str, ...], data: DataConfig, colours: tuple[Colour, ...] = ()) -> Meaning:
    ignored = _ignored(names, data) if names else ()
    if not names:  # of an inventory without classes.txt
        return Meaning(values, (), {})
    return meaning_of(values, names, ignored, colours)


def _check_mask_values(data: DataConfig, allowed: Sequence[str]) -> None:
    if data.mask_values not in allowed:
        raise UserError(
            f"data.mask_values={data.mask_values}: the masks of {data.name} have known values; leave it out, or read"
            " other masks as data.name=mask_folder"
        )


def _read_mask_folder(tree: Tree, data: DataConfig, classes: ClassesReader) -> _Set:
    names, colours = classes(tree, data)
    meanings = {"": _meaning_of(data.mask_values, names, data, colours)}
    for images, masks in _FOLDERS.items():
        if images in tree.folders("") or masks in tree.folders(""):
            splits, notes = _paired_folders(tree, images, masks)
            return _Set(splits, meanings, notes)
    splits, notes = dict[str, _Pairs](), tuple[str, ...]()
    for name, images, masks in _split_folders(tree):
        splits[name] = _pair(by_name(tree, images), by_name(tree, masks))
        notes += others(tree, filter(lambda folder: exists(tree, folder), (images, masks)))
    if not splits:
        raise UserError(f"{tree.path}: there is no images/ in it, {tops(tree)}; {_LAYOUT}")
    notes += outside(tree, [folder for _, *pair in _split_folders(tree) for folder in pair])
    return _Set({name: splits[name] for name in usual_order(splits)}, meanings, notes)


def _split_folders(tree: Tree) -> list[tuple[str, str, str]]:
    """Returns the splits that hold a folder of images: name, folder of images, folder of masks."""
    return [
        (name, f"{name}/{images}", f"{name}/{masks}")
        for name in tree.folders("")
        if role_of(name)
        for images, masks in _FOLDERS.items()
        if images in tree.folders(name)
    ]


def _is_mask_folder(tree: Tree) -> bool:
    tops = tree.folders("")
    if any(images in tops and masks in tops for images, masks in _FOLDERS.items()):
        return True
    return any(posixpath.basename(masks) in tree.folders(name) for name, _, masks in _split_folders(tree))


_ADE20K_BASES = ("", "ADEChallengeData2016")


def _read_ade20k(tree: Tree, data: DataConfig, classes: ClassesReader) -> _Set:
    del classes
    _check_mask_values(data, ("index", "one_based"))
    layout = (
        "give the folder ADEChallengeData2016 of the scene parsing challenge, with images/training,"
        " annotations/training, images/validation and annotations/validation"
    )
    base = find_base(tree, data.name, _ADE20K_BASES, "annotations", layout)
    splits, notes = _paired_folders(tree, posixpath.join(base, "images"), posixpath.join(base, "annotations"))
    meaning = dataclasses.replace(_meaning_of("one_based", mask_classes.ADE20K, data), kind="ade20k")
    return _Set(splits, {"": meaning}, notes, layout)


def _is_ade20k(tree: Tree) -> bool:
    return any(exists(tree, posixpath.join(base, "annotations", "training")) for base in _ADE20K_BASES)


_VOC_BASES = ("", "VOC2012", "VOCdevkit/VOC2012")
_VOC_LISTS = "ImageSets/Segmentation"
_AUGMENTED = "trainaug"
"""Name of the list of the images that have masks in VOC or in SBD (Hariharan et al., ICCV 2011)."""


def _read_voc(tree: Tree, data: DataConfig, classes: ClassesReader) -> _Set:
    del classes
    _check_mask_values(data, ("index",))
    layout = (
        "give the folder VOC2012, with JPEGImages, SegmentationClass and ImageSets/Segmentation/train.txt and val.txt"
    )
    base = find_base(tree, data.name, _VOC_BASES, "JPEGImages", layout)
    folders = {name: posixpath.join(base, name) for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug")}
    images, official, augmented = (by_name(tree, folder) for folder in folders.values())
    known = official.keys() | augmented.keys() | images.keys()
    lists = {
        name: listed(content, known)
        for name in ("train", "val", "trainval", "test", _AUGMENTED)
        if (content := tree.content(posixpath.join(base, _VOC_LISTS, f"{name}.txt"))) is not None
    }
    splits, notes = dict[str, _Pairs](), tuple[str, ...]()
    for name, entries in lists.items():
        # The lists say what belongs to a split, so a file that isn't listed isn't missing its other half.
        masks = augmented if name == _AUGMENTED else official
        listed_images, listed_masks = (
            {entry: files[entry] for entry in entries if entry in files} for files in (images, masks)
        )
        splits[name] = _pair(listed_images, listed_masks)
        if absent := [entry for entry in entries if entry not in images and entry not in masks]:
            notes += (f"{name}.txt lists {counted(absent, 'name')} that no file has, as {absent[0]}",)
    if _AUGMENTED in splits and augmented:
        if twice := sorted(set(lists[_AUGMENTED]) & set(lists.get("val", ()))):
            raise UserError(
                f"{tree.path}: trainaug.txt lists {counted(twice, 'image')} of val.txt, as {twice[0]}, so that training"
                " would see what is evaluated; take them out of trainaug.txt"
            )
        splits["train"] = splits[_AUGMENTED]
        count = len(splits["train"].images)
        notes += (f"training uses trainaug.txt: {count:,} images with the masks of SegmentationClassAug (VOC and SBD)",)
    splits.pop(_AUGMENTED, None)
    meaning = dataclasses.replace(_meaning_of("index", mask_classes.VOC, data), kind="voc")
    return _Set(splits, {"": meaning}, notes, layout)


def _is_voc(tree: Tree) -> bool:
    return any(exists(tree, posixpath.join(base, "SegmentationClass")) for base in _VOC_BASES)


def _read_cityscapes(tree: Tree, data: DataConfig, classes: ClassesReader) -> _Set:
    del classes
    _check_mask_values(data, ("index",))
    layout = "give the folder that holds leftImg8bit/train/CITY/*.png and gtFine/train/CITY/*_gtFine_labelTrainIds.png"
    find_base(tree, data.name, ("",), "leftImg8bit", layout)
    names, ids = tuple(mask_classes.CITYSCAPES), tuple(mask_classes.CITYSCAPES.values())
    by_train_id = {IGNORED: IGNORED} | {label: label for label in range(len(names))}
    by_label_id = {IGNORED: IGNORED} | dict.fromkeys(range(mask_classes.CITYSCAPES_IDS), IGNORED)
    by_label_id |= {number: label for label, number in enumerate(ids)}
    ignored = _ignored(names, data)
    meanings = {
        kind: Meaning(kind, names, class_of, ignored)
        for kind, class_of in (("labelTrainIds", by_train_id), ("labelIds", by_label_id))
    }
    splits = {}
    for name in usual_order(filter(role_of, tree.folders("leftImg8bit"))):
        images = by_name(tree, f"leftImg8bit/{name}", "_leftImg8bit")
        # The published masks of test hold no classes, which are kept for the benchmark.
        masks = {
            kind: {} if role_of(name) == "test" else by_name(tree, f"gtFine/{name}", f"_gtFine_{kind}")
            for kind in meanings
        }
        kind = next((kind for kind in meanings if masks[kind]), "labelIds")
        splits[name] = _pair(images, masks[kind], kind)
    kinds = {pairs.values for pairs in splits.values() if pairs.images}
    notes = ("label ids are mapped to the 19 train ids",) if "labelIds" in kinds else ()
    return _Set(splits, meanings, notes, layout)


def _is_cityscapes(tree: Tree) -> bool:
    return {"leftImg8bit", "gtFine"} <= set(tree.folders(""))


class _Source(NamedTuple):
    """How a data set is recognised and read."""

    is_here: Callable[[Tree], bool]
    read: Callable[[Tree, DataConfig, ClassesReader], _Set]
    class_names: tuple[str, ...] = ()
    """Names of all classes; none where the data give them."""


_SOURCES: Mapping[str, _Source] = {
    "cityscapes": _Source(_is_cityscapes, _read_cityscapes, tuple(mask_classes.CITYSCAPES)),
    "voc_segmentation": _Source(_is_voc, _read_voc, mask_classes.VOC),
    "ade20k": _Source(_is_ade20k, _read_ade20k, mask_classes.ADE20K),
    "mask_folder": _Source(_is_mask_folder, _read_mask_folder),
}
NAMES = tuple(_SOURCES)
"""Names of the data sets, as in `data.name`."""
