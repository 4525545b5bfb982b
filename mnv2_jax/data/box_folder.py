"""Images with boxes for object detection, on disk or inside an uncompressed tar.

    coco           annotations/instances_train2017.json  train2017/NAME.jpg       or one JSON file for each split
    voc_detection  Annotations/NAME.xml  JPEGImages/NAME.jpg  ImageSets/Main/train.txt
    box_folder     images/train/NAME.jpg  labels/train/NAME.txt                   and classes.txt or data.yaml (YOLO)
                   images/train/NAME.jpg  annotations/train/NAME.xml              (labelImg)
                   also train/images and train/labels; images and labels without splits; all files in one folder

An image and the file of its boxes have the same path below their folders, but for the extension. An image without such
a file is left out, except that YOLO has none for an image without boxes. What is left out, dropped or corrected is
counted in a note (`boxes.FAULTS`). A run refuses what would train or score wrong boxes: splits without a box, shares
where pixels are meant, and images of another size than stated, of which it opens a few.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mnv2_jax.config import DataConfig
from mnv2_jax.data import mask_classes
from mnv2_jax.data.box_files import (
    Coco,
    Marked,
    is_coco,
    numbers_of,
    parse_coco,
    parse_names,
    parse_xml,
    parse_yolo,
)
from mnv2_jax.data.boxes import Annotations, Objects, annotations_of, faults_of, in_order, note_of, readers
from mnv2_jax.data.class_file import CLASSES_FILE
from mnv2_jax.data.folder import Tree, base_name, is_taken, left_out, open_tree
from mnv2_jax.data.images import DamagedImageError, check_readable
from mnv2_jax.data.split import NO_CLASS, Inventory, OpenedSplits, Split, choose_splits, role_of, spread, usual_order
from mnv2_jax.data.trees import (
    by_name,
    content_near,
    content_of,
    counted,
    exists,
    listed,
    normal,
    not_used,
    others,
    outside,
    place_of,
    tops,
)
from mnv2_jax.errors import UserError

_LAYOUT = (
    "arrange the files as images/train/NAME.jpg and labels/train/NAME.txt (YOLO), or annotations/train/NAME.xml"
    " (labelImg), with val beside train; or without splits as images/NAME.jpg and labels/NAME.txt"
)
_FOLDERS = (("images", "labels"), ("images", "annotations"), ("images", "Annotations"), ("JPEGImages", "Annotations"))
"""Names of the folder of images and of that of their boxes."""
_CLASS_FILES = (CLASSES_FILE, "_darknet.labels", "data.yaml", "data.yml")
"""Files that name the classes; the second is Roboflow's, and the last two are Ultralytics'."""
_NOT_BOXES = (CLASSES_FILE, "train.txt", "val.txt", "test.txt")
"""Text files that may lie beside files of boxes; they hold the boxes of an image if one has their name."""
_OPENED = 64
"""Images of a split whose headers are read to compare their sizes with those that annotations state."""
VOC = mask_classes.VOC[1:]
"""Names of the 20 classes of PASCAL VOC."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """The images of a split that have annotations, and what these say."""

    class_names: tuple[str, ...]
    images: list[str]
    """Sorted paths of the images."""
    objects: Objects
    faults: Mapping[str, Sequence[str]]
    """Files that were left out, by the keys of `boxes.FAULTS`."""
    place: str
    """Where the classes are named."""
    unlisted: frozenset[str] = frozenset()
    """Images of a folder that splits share which aren't of this split."""


@dataclasses.dataclass(frozen=True)
class _Set:
    """A data set as it lies in a tree."""

    names: tuple[str, ...]
    """Names of the splits; only "" where there are no splits."""
    read: Callable[[str], _Part]
    """Reads the annotations of a split, once."""
    notes: tuple[str, ...] = ()
    layout: str = _LAYOUT
    """Advice on how to arrange the files."""

    def class_names(self, names: Iterable[str]) -> tuple[str, ...]:
        """Returns the names of the classes, which must be the same in all of some splits that have annotations."""
        first, *rest = (part for part in map(self.read, names) if part.images)
        for other in rest:
            if other.class_names != first.class_names:
                strange = sorted({*first.class_names} ^ {*other.class_names}) or ["the order of the ids"]
                raise UserError(
                    f"{other.place}: its categories are not those of {first.place}, as {strange[0]!r}; let both have"
                    " the same"
                )
        return first.class_names


def find_name(tree: Tree) -> str | None:
    """Returns the name in `NAMES` of the data set whose files a tree has; None if it has none of them."""
    return next((name for name, source in _SOURCES.items() if source.is_here(tree)), None)


def open_splits(data: DataConfig, path: str, with_eval: bool = True, with_train: bool = True) -> OpenedSplits:
    """Opens the train split and the split to evaluate; reads the annotations of both.

    Args:
      data: `name`, `train_split` and `eval_split` are read.
      path: a directory or a .tar file that exists.
      with_eval: False where the images to evaluate will be taken out of train; the train split is then returned twice.
      with_train: False where nothing is trained. Train then has no images and need not exist.

    Returns:
      The names of the classes, and the two splits, sorted by the names of the files. All labels are 0, and the targets
      are those of `boxes.readers`.

    Raises:
      UserError: if the layout isn't as above, or a file of annotations can't be used.
    """
    tree = open_tree(path)
    found = _SOURCES[data.name].read(tree, data.name)
    chosen = choose_splits(
        path,
        found.names,
        lambda name: bool(found.read(name).images),
        "boxes",
        data.eval_split,
        found.layout,
        with_eval,
        with_train,
        data.train_split,
    )
    opened = {name: _make_split(tree, name, found) for name in chosen.used}
    names = found.class_names(chosen.used)
    _check_apart(tree, chosen.used, found)
    for name, split in opened.items():
        _check_pixels(tree, split, found.read(name).objects)
        _check_sizes(tree, split)
        _check_filled(tree, split)
    notes = [note for split in opened.values() for note in _note(split)]
    return chosen.opened(names, opened, (*found.notes, *notes))


def take_inventory(tree: Tree, name: str) -> Inventory:
    """Lists all images with annotations, whether or not a run can train on them; opens no image.

    Args:
      tree: the files.
      name: a name in `NAMES`.

    Raises:
      UserError: if the files can't be read, a file of annotations can't be used, or no image has one.
    """
    found = _SOURCES[name].read(tree, name)
    names = [split for split in usual_order(found.names) if split != _UNION or not {"train", "val"} & {*found.names}]
    unlisted = [found.read(split).unlisted for split in names]
    in_none = sorted(frozenset.intersection(*unlisted)) if unlisted else []
    splits, notes = {}, [*found.notes, *not_used(in_none, "image", "in no JSON file")]
    for split_name in names:
        part = found.read(split_name)
        if part.images:
            split = _make_split(tree, split_name, found)
            notes += _note(split)
            splits[split.name] = dataclasses.replace(split, labels=np.full(len(split), NO_CLASS, np.int32))
        else:
            notes += note_of(split_name or base_name(tree), faults_of(part.faults))
    if not splits:
        raise UserError(f"{tree.path}: {'; '.join(notes) or 'no image and no boxes are in it'}; {found.layout}")
    return Inventory(found.class_names(names), splits, tree.path, tuple(notes), name)


def class_names(name: str, path: str) -> tuple[str, ...]:
    """Returns the names of the classes; reads no image.

    Args:
      name: a name in `NAMES`.
      path: a directory or a tar that exists.

    Raises:
      UserError: if the layout isn't as above, or a file of annotations can't be used.
    """
    tree = open_tree(path)
    found = _SOURCES[name].read(tree, name)
    order = sorted(found.names, key=lambda split: role_of(split) == "train")  # train takes longest
    if (split := next((split for split in order if found.read(split).images), None)) is None:
        raise UserError(f"{tree.path}: no image has boxes; {found.layout}")
    return found.read(split).class_names


# --- splits -------------------------------------------------------------------------------------------------


def _make_split(tree: Tree, name: str, found: _Set) -> Split:
    part = found.read(name)
    if not part.images:
        missing = "; ".join(note_of(name or base_name(tree), faults_of(part.faults)))
        state = missing or f"{name or 'it'}: holds no image and no boxes"
        raise UserError(f"{tree.path}: {state}; {found.layout}")
    check_readable(part.images)
    split = tree.split(name or base_name(tree), np.zeros(len(part.images), np.int32), part.images)
    objects = part.objects
    if not objects.is_relative:
        sizes = objects.sizes.copy()
        for index in np.flatnonzero((sizes <= 0).any(1)).tolist():
            sizes[index] = _size_or_none(split, index) or (0, 0)
        objects = dataclasses.replace(objects, sizes=sizes)
    return dataclasses.replace(split, targets=readers(in_order(objects, part.faults), split.read))


def _size_or_none(split: Split, index: int) -> tuple[int, int] | None:
    """Returns the height and width of an image; None if it is damaged, which a run meets again and may skip."""
    try:
        height, width, _ = split.read(index).shape
    except DamagedImageError:
        return None
    return height, width


def _check_sizes(tree: Tree, split: Split) -> None:
    """Refuses an image of another size than stated: its boxes are those of another image, or of the image turned."""
    sizes = _annotations(split).sizes
    stated = np.flatnonzero((sizes > 0).all(1))
    for index in stated[spread(len(stated), _OPENED)].tolist():
        size, (height, width) = _size_or_none(split, index), sizes[index].tolist()
        if size not in (None, (height, width)):
            raise UserError(
                f"{split.path_of(index)}: has {size[1]}×{size[0]} pixels, but its annotation states {width}×{height};"
                " give the size and the boxes of the image as it is stored, without the turn that EXIF may ask for"
                f" (python -m mnv2_jax.inspect {tree.path} --limit=0 lists all such images)"
            )


def _check_pixels(tree: Tree, split: Split, objects: Objects) -> None:
    """Refuses shares where pixels are meant."""
    corners = objects.corners
    if objects.is_relative or not (corners % 1).any() or corners.min() < 0 or corners.max() > 1:
        return
    raise UserError(
        f"{tree.path}: all boxes of {split.name} lie between 0 and 1, as in {objects.files[objects.image[0]]}, and so"
        " aren't pixels; multiply x by the width of the image and y by its height"
    )


def _check_filled(tree: Tree, split: Split) -> None:
    """Refuses a split in which nothing can be learnt or found."""
    if (~_annotations(split).crowd).any():
        return
    raise UserError(
        f"{tree.path}: no box of {split.name} can be used ({'; '.join(_note(split))}); let each annotation belong to an"
        " image, by the same path but for the extension, or in COCO by the same id"
    )


def _check_apart(tree: Tree, names: Sequence[str], found: _Set) -> None:
    """Refuses two splits that share images: training would see what is evaluated."""
    if len(names) < 2:
        return
    first, second = (found.read(name).images for name in names)
    if shared := sorted(set(first) & set(second)):
        raise UserError(
            f"{tree.path}: {counted(shared, 'image')} of {names[1]} {'is' if len(shared) == 1 else 'are'} also in"
            f" {names[0]}, as {shared[0]}, so that training would see what is evaluated; set another"
            " data.train_split or data.eval_split, or take them out of one split"
        )


def _annotations(split: Split) -> Annotations:
    annotations = annotations_of(split)
    assert annotations is not None
    return annotations


def _note(split: Split) -> tuple[str, ...]:
    return note_of(split.name, _annotations(split).faults)


# --- a file of boxes for each image -------------------------------------------------------------------------


class _Files(NamedTuple):
    """The files of a split, by names that an image and the file of its boxes share."""

    images: Mapping[str, str]
    annotations: Mapping[str, str]
    is_annotated: bool = True
    """Whether the split has a folder of annotations."""


class _Kind(NamedTuple):
    """A format with a file for each image."""

    parse: Callable[[str, bytes], Marked]
    is_relative: bool
    needs_file: bool
    """Whether an image without boxes has a file, too."""


_KINDS = {".xml": _Kind(parse_xml, is_relative=False, needs_file=True), ".txt": _Kind(parse_yolo, True, False)}
"""Formats by the extension of their files."""
_NOTHING = Marked((0, 0), [], [], [])


def _read_part(
    tree: Tree,
    files: _Files,
    ending: str,
    parse: Callable[[str], Marked],
    find_classes: Callable[[], tuple[str, tuple[str, ...]]],
) -> _Part:
    """Reads the annotations of a split.

    Args:
      tree: the files.
      files: those of the split.
      ending: a key of `_KINDS`.
      parse: a function from the path of a file of boxes to what it states.
      find_classes: a function that returns where the classes are named, and their names.
    """
    kind = _KINDS[ending]
    may_lack = files.is_annotated and not kind.needs_file
    used = sorted(name for name in files.images if name in files.annotations or may_lack)
    faults = {
        "no annotation": [files.images[name] for name in sorted(files.images.keys() - set(used))],
        "no image": [files.annotations[name] for name in sorted(files.annotations.keys() - files.images.keys())],
    }
    place, class_names = find_classes() if used else ("", ())
    numbers = {str(label) if kind.is_relative else name: label for label, name in enumerate(class_names)}
    stated = [parse(files.annotations[name]) if name in files.annotations else _NOTHING for name in used]
    classes = [
        numbers_of(place_of(tree, files.annotations[name]), marked.names, numbers, place, kind.is_relative)
        for name, marked in zip(used, stated, strict=True)
        if marked.names
    ]
    counts = np.array([len(marked.names) for marked in stated], np.int64)
    faults["outline"] = [
        files.annotations[name] for name, marked in zip(used, stated, strict=True) for _ in range(marked.num_outlines)
    ]
    objects = Objects(
        files=[files.annotations.get(name, files.images[name]) for name in used],
        sizes=np.array([marked.size for marked in stated], np.int64).reshape(-1, 2),
        image=np.repeat(np.arange(len(used)), counts),
        corners=np.array([box for marked in stated for box in marked.corners], np.float64).reshape(-1, 4),
        classes=np.array([label for labels in classes for label in labels], np.int64),
        crowd=np.array([is_crowd for marked in stated for is_crowd in marked.crowd], bool),
        is_one_based=ending == ".xml",
        is_relative=kind.is_relative,
    )
    return _Part(class_names, [files.images[name] for name in used], objects, faults, place)


def _set_of_files(
    tree: Tree, splits: Mapping[str, _Files], ending: str, folders: Iterable[str], layout: str, notes: Sequence[str]
) -> _Set:
    """Returns the set of some splits; ``folders``: where class files may lie besides the top."""

    @functools.cache
    def parse(path: str) -> Marked:
        return _KINDS[ending].parse(place_of(tree, path), content_of(tree, path))

    @functools.cache
    def find_classes() -> tuple[str, tuple[str, ...]]:
        boxes = {path for files in splits.values() for path in files.annotations.values()}
        return _stated_classes(tree, folders, boxes) or _found_classes(tree, splits.values(), ending, parse)

    @functools.cache
    def read(name: str) -> _Part:
        return _read_part(tree, splits[name], ending, parse, find_classes)

    return _Set(tuple(splits), read, tuple(notes), layout)


def _stated_classes(tree: Tree, folders: Iterable[str], boxes: Collection[str]) -> tuple[str, tuple[str, ...]] | None:
    """Reads the files that name the classes; several must agree.

    Args:
      tree: the files.
      folders: where they may lie besides the top.
      boxes: files of boxes, some of which may be called as they are.

    Returns:
      Where the classes are named, and their names; None if there is no such file.
    """
    contents = [content_near(tree, name) for name in _CLASS_FILES if name not in boxes]
    for folder in filter(None, dict.fromkeys(folders)):
        paths = [posixpath.join(folder, name) for name in _CLASS_FILES[:2]]
        contents += [(place_of(tree, path), tree.content(path)) for path in paths if path not in boxes]
    stated = [(place, parse_names(place, content)) for place, content in contents if content is not None]
    for place, names in stated:
        if names != stated[0][1]:
            raise UserError(f"{place}: names other classes than {stated[0][0]}; remove one of them")
    return stated[0] if stated else None


def _found_classes(
    tree: Tree, splits: Iterable[_Files], ending: str, parse: Callable[[str], Marked]
) -> tuple[str, tuple[str, ...]]:
    """Returns the classes that the annotations name: in VOC's order if they are VOC's, and otherwise sorted."""
    if ending != ".xml":
        raise UserError(
            f"{tree.home / CLASSES_FILE}: does not exist, so that the classes have no names; write one line for each"
            " class in the order of their numbers, or give the data.yaml"
        )
    paths = {path for files in splits for name, path in files.annotations.items() if name in files.images}
    found = {name for path in sorted(paths) for name in parse(path).names}
    if not found:
        raise UserError(
            f"{tree.path}: no annotation has a box, so that there is no class; write them to {CLASSES_FILE}"
        )
    return "the annotations", VOC if found == set(VOC) else tuple(sorted(found))


# --- folders of one's own -----------------------------------------------------------------------------------


def _read_box_folder(tree: Tree, name: str) -> _Set:
    del name
    places = _folders(tree)
    images = {split: by_name(tree, folder) for split, folder, _ in places}
    boxes = {
        ending: {split: _boxes_in(tree, folder, ending, images[split]) for split, _, folder in places}
        for ending in _KINDS
    }
    present = [
        ending for ending in _KINDS if any(boxes[ending][split].keys() & images[split].keys() for split in images)
    ]
    if len(present) > 1:
        raise UserError(f"{tree.path}: images have boxes both in .xml and in .txt files; move one kind away")
    if not any(images.values()):
        raise UserError(f"{tree.path}: no image of this layout is in it, {tops(tree)}; {_LAYOUT}")
    ending = present[0] if present else next((ending for ending in _KINDS if any(boxes[ending].values())), ".xml")
    splits = {
        split: _Files(images[split], boxes[ending][split], exists(tree, folder) and bool(boxes[ending][split]))
        for split, _, folder in places
    }
    folders = list(dict.fromkeys(folder for _, *pair in places for folder in pair if exists(tree, folder)))
    inner = [folder for folder in folders if not any(folder != other and _is_below(folder, other) for other in folders)]

    def is_used(path: str) -> bool:
        return is_taken(path) or _has_ending(path, ending) or posixpath.basename(path) in (*_NOT_BOXES, *_CLASS_FILES)

    image_names = {posixpath.basename(name) for names in images.values() for name in names}

    def is_stray(path: str) -> bool:
        name, ending = posixpath.splitext(posixpath.basename(path))
        return normal(name) in image_names and ending.lower() in _KINDS

    upper = [posixpath.dirname(folder) for _, _, folder in places]
    notes = others(tree, inner, is_used) + outside(tree, folders, {"image": is_taken, "annotation": is_stray})
    return _set_of_files(tree, splits, ending, [*folders, *upper], _LAYOUT, notes)


def _is_below(folder: str, other: str) -> bool:
    return not other or folder.startswith(f"{other}/")


def _boxes_in(tree: Tree, folder: str, ending: str, images: Collection[str]) -> dict[str, str]:
    files = by_name(tree, folder, is_wanted=lambda path: _has_ending(path, ending))
    return {name: path for name, path in files.items() if name in images or _is_box_file(path, ending)}


def _has_ending(path: str, ending: str) -> bool:
    name = posixpath.basename(path)
    return name.lower().endswith(ending) and name[0] != "."


def _is_box_file(path: str, ending: str) -> bool:
    return _has_ending(path, ending) and posixpath.basename(path) not in _NOT_BOXES


def _folders(tree: Tree) -> list[tuple[str, str, str]]:
    """Returns the splits of a folder: name, folder of images, folder of boxes; the name is "" where there are none."""
    if (pair := _pair_in(tree, "")) is not None:
        images, boxes = pair
        splits = _splits_in(tree, images) | _splits_in(tree, boxes)
        places = [(name, f"{images}/{folder}", f"{boxes}/{folder}") for name, folder in splits.items()]
        return _ordered(places) or [("", images, boxes)]
    splits = _splits_in(tree, "")
    pairs = {name: _pair_in(tree, folder) for name, folder in splits.items()}
    if any(pairs.values()):
        images, boxes = _FOLDERS[0]  # of a split that has images alone
        return _ordered(
            [(name, *(pairs[name] or (f"{top}/{images}", f"{top}/{boxes}"))) for name, top in splits.items()]
        )
    if not splits and "images" in tree.folders(""):
        splits = {name: f"images/{folder}" for name, folder in _splits_in(tree, "images").items()} or {"": "images"}
    return _ordered([(name, folder, folder) for name, folder in splits.items()]) or [("", "", "")]


def _pair_in(tree: Tree, parent: str) -> tuple[str, str] | None:
    """Returns the folder of images and that of their boxes in a folder; None if it doesn't have both."""
    names = tree.folders(parent)
    found = ((images, boxes) for images, boxes in _FOLDERS if images in names and boxes in names)
    pair = next(found, None)
    return None if pair is None else (posixpath.join(parent, pair[0]), posixpath.join(parent, pair[1]))


def _splits_in(tree: Tree, parent: str) -> dict[str, str]:
    """Returns the folders named like splits in a folder, by the names of the splits: train also for train2017."""
    splits: dict[str, str] = {}
    for folder in tree.folders(parent):
        name = re.sub(r"[ ._-]?\d+$", "", folder)
        if role_of(name) is None:
            continue
        if name in splits:
            raise UserError(
                f"{tree.path}: {posixpath.join(parent, splits[name])} and {posixpath.join(parent, folder)} could each"
                f" be the split {name}; move one of them away"
            )
        splits[name] = folder
    return splits


def _ordered(places: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    by_split = {place[0]: place for place in places}
    return [by_split[name] for name in usual_order(by_split)]


def _is_box_folder(tree: Tree) -> bool:
    """Whether files of boxes lie in the folders in which they are expected.

    Text beside an image may be about something else, unless a file names classes, too.
    """
    for _, images, boxes in _folders(tree):
        if not exists(tree, boxes):
            continue
        if images != boxes and any(_is_box_file(path, ending) for path in tree.below(boxes) for ending in _KINDS):
            return True
        beside = tree.files(boxes) if images == boxes else []
        stems = {posixpath.splitext(path)[0] for path in beside if is_taken(path)}
        named = {posixpath.basename(path) for path in (*beside, *tree.files(""))} & {*_CLASS_FILES}
        endings = [ending for ending, kind in _KINDS.items() if named or kind.needs_file]
        if any(
            posixpath.splitext(path)[0] in stems and _is_box_file(path, ending) for path in beside for ending in endings
        ):
            return True
    return False


# --- PASCAL VOC ---------------------------------------------------------------------------------------------

_VOC_BASES = ("", *(f"{kit}VOC{year}" for kit in ("", "VOCdevkit/") for year in (2012, 2007)))
_VOC_LISTS = "ImageSets/Main"
_UNION = "trainval"
"""Name of the list that holds train and val."""
_VOC_SPLITS = ("train", "val", _UNION, "test")
_VOC_LAYOUT = (
    "give the folder VOC2012, with JPEGImages, Annotations and ImageSets/Main/train.txt and val.txt (or set"
    " data.train_split=trainval); or read folders without such lists as data.name=box_folder"
)


def _voc_bases(tree: Tree) -> list[str]:
    return [
        base
        for base in _VOC_BASES
        if all(exists(tree, posixpath.join(base, name)) for name in ("JPEGImages", "Annotations", _VOC_LISTS))
    ]


def _is_voc(tree: Tree) -> bool:
    lists = {f"{split}.txt" for split in _VOC_SPLITS}
    found = (tree.files(posixpath.join(base, _VOC_LISTS)) for base in _voc_bases(tree))
    return any(posixpath.basename(path) in lists for paths in found for path in paths)


def _read_voc(tree: Tree, name: str) -> _Set:
    bases = _voc_bases(tree)
    if not bases:
        raise UserError(f"{tree.path}: the folders of {name} are not in it, {tops(tree)}; {_VOC_LAYOUT}")
    if len(bases) > 1:
        raise UserError(f"{tree.path}: holds {' and '.join(bases)}; give the path of one of them")
    base = bases[0]
    images = by_name(tree, posixpath.join(base, "JPEGImages"))
    boxes = _boxes_in(tree, posixpath.join(base, "Annotations"), ".xml", images)
    known, splits, notes = images.keys() | boxes.keys(), dict[str, _Files](), list[str]()
    for split in _VOC_SPLITS:
        content = tree.content(posixpath.join(base, _VOC_LISTS, f"{split}.txt"))
        if content is None:
            continue
        entries = listed(content, known)
        listed_images, listed_boxes = (
            {entry: files[entry] for entry in entries if entry in files} for files in (images, boxes)
        )
        splits[split] = _Files(listed_images, listed_boxes)
        if absent := [entry for entry in entries if entry not in known]:
            notes.append(f"{split}.txt lists {counted(absent, 'name')} that no file has, as {absent[0]}")
    found = {path for files in splits.values() for path in files.images.values()}
    notes += not_used(sorted({*images.values()} - found), "image", "in no list")
    return _set_of_files(tree, splits, ".xml", [base], _VOC_LAYOUT, notes)


# --- COCO ---------------------------------------------------------------------------------------------------

_COCO_LAYOUT = (
    "give the folder that holds annotations/instances_train2017.json, annotations/instances_val2017.json, train2017 and"
    " val2017; or train.json, val.json and images; or train and val, each with its JSON file and images"
)
_OFFICIAL = "instances_"
"""How the names of COCO's files of boxes begin; others beside them are about key points or captions."""
_MOST_JSON = 64
"""JSON files that are opened in search of COCO's; more of them are those of another format, with one for each image."""


def _split_named(name: str) -> str | None:
    """Returns the first word of a name that means a split, as train of instances_train2017."""
    return next((word for word in re.split(r"[^a-z]+", name.lower()) if role_of(word)), None)


def _json_files(tree: Tree) -> list[str]:
    """Returns the JSON files in the folders in which COCO's may lie."""
    top = tree.folders("")
    folders = ["", *(folder for folder in ("annotations",) if folder in top), *filter(_split_named, top)]
    return [path for folder in folders for path in tree.files(folder) if _has_ending(path, ".json")]


def _coco_files(tree: Tree) -> list[tuple[str, str]]:
    """Returns the JSON files that may be COCO's, each with the name of its split, "" where its name says none."""
    paths = _json_files(tree)
    official = [path for path in paths if posixpath.basename(path).startswith(_OFFICIAL)]

    def split_of(path: str) -> str:
        folder, file = posixpath.split(path)
        return _split_named(posixpath.splitext(file)[0]) or _split_named(folder) or ""

    files = [(split_of(path), path) for path in official or paths]
    return [(name, path) for name, path in files if name] or files


def _is_coco(tree: Tree) -> bool:
    files = _coco_files(tree)
    return len(files) <= _MOST_JSON and any(_holds_coco(tree, path) for _, path in files)


def _holds_coco(tree: Tree, path: str) -> bool:
    return is_coco(tree.content(path) or b"")


def _read_coco(tree: Tree, name: str) -> _Set:
    candidates: dict[str, list[str]] = {}
    for split, path in _coco_files(tree):
        candidates.setdefault(split, []).append(path)
    files: dict[str, str] = {}
    for split, paths in candidates.items():
        # A single file is taken as it is, so that an error can say what it lacks.
        fitting = paths if len(paths) == 1 else [path for path in paths if _holds_coco(tree, path)] or paths
        if len(fitting) > 1:
            meant = f"the split {split}" if split else "the file of all boxes"
            raise UserError(f"{tree.path}: {fitting[0]} and {fitting[1]} could each be {meant}; move one of them away")
        files[split] = fitting[0]
    if not files:
        raise UserError(f"{tree.path}: there is no JSON file of {name} in it, {tops(tree)}; {_COCO_LAYOUT}")

    @functools.cache
    def read(split: str) -> _Part:
        content = content_of(tree, files[split])
        return _coco_part(tree, parse_coco(place_of(tree, files[split]), content), files[split], split)

    notes = left_out(sorted({*_json_files(tree)} - {*files.values()}))
    return _Set(tuple(usual_order(files)), read, notes, _COCO_LAYOUT)


def _coco_part(tree: Tree, coco: Coco, json_file: str, split: str) -> _Part:
    place = place_of(tree, json_file)
    folder, is_own = _image_folder(tree, coco.files, json_file, split, place)
    present = {normal(path): path for path in tree.below(folder) if is_taken(path)}
    names = [_path_of(folder, file) for file in coco.files]
    times = collections.Counter(names)
    if repeated := [name for name, count in times.items() if count > 1]:
        raise UserError(f"{place}: several images have the file {repeated[0]}; list it once, with all its boxes")
    paths = [present.get(name, name) for name in names]
    order = sorted((row for row, name in enumerate(names) if name in present), key=paths.__getitem__)
    unlisted = {path for name, path in present.items() if name not in times}
    faults = {"no image": [file for file, name in zip(coco.files, names, strict=True) if name not in present]}
    faults["no image"] += coco.strays
    lacking = unlisted if is_own else set()
    if not coco.has_annotations:
        lacking, order = {*lacking, *(paths[row] for row in order)}, []
    faults["no annotation"] = sorted(lacking)
    new_row = np.full(len(paths), -1)
    new_row[order] = np.arange(len(order))
    is_kept = new_row[coco.image] >= 0
    objects = Objects(
        files=[paths[row] for row in order],
        sizes=coco.sizes[order],
        image=new_row[coco.image][is_kept],
        corners=coco.corners[is_kept],
        classes=coco.classes[is_kept],
        crowd=coco.crowd[is_kept],
        areas=coco.areas[is_kept],
        image_ids=coco.image_ids[order],
        class_ids=coco.class_ids,
    )
    shared = frozenset() if is_own else frozenset(unlisted)
    return _Part(coco.class_names, [paths[row] for row in order], objects, faults, place, shared)


def _path_of(folder: str, file: str) -> str:
    """Returns the `normal` path of an image that a JSON file lists."""
    return normal(posixpath.normpath(posixpath.join(folder, file)))


def _image_folder(tree: Tree, names: Sequence[str], json_file: str, split: str, place: str) -> tuple[str, bool]:
    """Finds the folder below which the images of a JSON file lie.

    Returns:
      The folder, and whether it is this split's own: other images in it have no annotation.
    """
    top, inner = tree.folders(""), tree.folders("images") if "images" in tree.folders("") else []
    own = [folder for folder in top if split and _split_named(folder) == split]
    own += [f"images/{folder}" for folder in inner if split and _split_named(folder) == split]
    own += [f"{folder}/images" for folder in own if exists(tree, f"{folder}/images")]
    shared = [posixpath.dirname(json_file), *(folder for folder in ("images", "data") if folder in top), ""]
    shared += [f"images/{folder}" for folder in inner if _split_named(folder) is None]  # as default, of CVAT
    for folder in dict.fromkeys([*own, *shared]):
        files = set(map(normal, tree.below(folder)))
        if any(_path_of(folder, name) in files for name in names):
            return folder, folder in own or not split
    looked = ", ".join(f"{folder}/" if folder else "the top" for folder in dict.fromkeys([*own, *shared]))
    example = f", as {names[0]}" if names else ""
    raise UserError(f"{place}: none of its {len(names):,} images is found in {looked}{example}; {_COCO_LAYOUT}")


# --- the data sets ------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """How a data set is recognised and read."""

    is_here: Callable[[Tree], bool]
    read: Callable[[Tree, str], _Set]


_SOURCES: Mapping[str, _Source] = {
    "voc_detection": _Source(_is_voc, _read_voc),
    "coco": _Source(_is_coco, _read_coco),
    "box_folder": _Source(_is_box_folder, _read_box_folder),
}
NAMES = tuple(_SOURCES)
"""Names of the data sets, as in `data.name`."""
