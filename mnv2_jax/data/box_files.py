"""Parses the files in which boxes are stored: XML of VOC, text of YOLO, JSON of COCO.

A file that can't be parsed, or a number that is none, is refused in one line that names the file: a training would take
the rest for all that is there.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from mnv2_jax.data.class_file import check_different, parse_classes
from mnv2_jax.errors import UserError, nearest

_FARTHEST = 2.0
"""Share of a side above which a number of a YOLO file is taken for one in pixels."""
_LONGEST = 10**6
"""Pixels above which a number is no side of an image."""
_CORNERS = ("ymin", "xmin", "ymax", "xmax")
_UNSET = ("", "0", "0.0", "false", "no", "none", "null", "unspecified")
"""Values of <difficult> and iscrowd that mean no, in lower case."""


class Marked(NamedTuple):
    """The objects that a file states for one image."""

    size: tuple[int, int]
    """Height and width in pixels; 0 where they aren't stated."""
    names: list[str]
    """Names of classes, or their numbers in decimals."""
    corners: list[list[float]]
    """y0, x0, y1, x1 of each, as the file has them."""
    crowd: list[bool]
    """Whether each is difficult."""
    num_outlines: int = 0
    """How many of them are given by an outline."""


def _number(file: str, text: Any, what: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{file}: {what} is {text!r:.60}, which is no number; correct or remove it")
    return value


def _side(file: str, text: Any, what: str) -> int:
    """Parses a side of an image in pixels; 0 where it isn't stated."""
    side = _number(file, text or 0, what)
    if side > _LONGEST:
        raise UserError(f"{file}: {what} is {side:.3g}, which is no side of an image; correct or remove it")
    return round(max(side, 0))


def _is_set(value: Any) -> bool:
    return str(value).strip().lower() not in _UNSET


# --- XML ----------------------------------------------------------------------------------------------------


def parse_xml(file: str, content: bytes) -> Marked:
    """Parses an annotation of VOC, as labelImg writes it; pixels count from 1, and the end is inclusive.

    Args:
      file: the name of the file in errors.
      content: the bytes of the file.

    Raises:
      UserError: if it is no such annotation, or a number is none.
    """
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(
            f"{file}: can't be parsed as XML ({error}); restore it, save it in UTF-8, or remove it with its image"
        ) from error
    if root.tag != "annotation":
        raise UserError(f"{file}: its top element is {root.tag!r}; write <annotation> with <object>s, as labelImg does")
    size = [(root.findtext(f"size/{side}") or "").strip() for side in ("height", "width")]
    height, width = (_side(file, text, "<size>") for text in size)
    marked = Marked((height, width) if height > 0 and width > 0 else (0, 0), [], [], [])
    for number, element in enumerate(root.findall("object"), 1):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{file}: object {number} has no <name>; write that of its class")
        if element.find("bndbox") is None:
            raise UserError(f"{file}: object {number} has no <bndbox>; write its box, or remove it")
        marked.names.append(name)
        texts = {key: element.findtext(f"bndbox/{key}") for key in _CORNERS}
        marked.corners.append([_number(file, text, f"<{key}> of object {number}") for key, text in texts.items()])
        marked.crowd.append(_is_set(element.findtext("difficult")))
    return marked


# --- text ---------------------------------------------------------------------------------------------------


def parse_yolo(file: str, content: bytes) -> Marked:
    """Parses a file of YOLO. Its lines are class, centre x, centre y, width, height, the last four as shares of a side.

    Of an outline (class, x, y, x, y, x, y …) it returns the box around it.

    Args:
      file: the name of the file in errors.
      content: the bytes of the file; none, where the image has no boxes.

    Returns:
      The objects; corners are shares of height and width.

    Raises:
      UserError: for a line of another form.
    """
    marked, num_outlines = Marked((0, 0), [], [], []), 0
    for place, line in enumerate(content.decode(errors="replace").lstrip("\ufeff").splitlines(), 1):
        words, where = line.split(), f"{file}, line {place}"
        if not words:
            continue
        is_outline = len(words) >= 7 and len(words) % 2 == 1
        if len(words) != 5 and not is_outline:
            raise UserError(f"{where}: has {len(words)} numbers; write five: class, centre x, centre y, width, height")
        if not words[0].isdecimal():
            raise UserError(f"{where}: the class is {words[0]!r:.60}; write its number, from 0")
        numbers = [_number(where, word, "a number") for word in words[1:]]
        if max(map(abs, numbers)) > _FARTHEST:
            raise UserError(
                f"{where}: {' '.join(words[1:5])} are no shares; divide pixels by the image's width and height"
            )
        num_outlines += is_outline
        marked.names.append(words[0].lstrip("0") or "0")
        marked.corners.append(_around(numbers) if is_outline else _centred(*numbers))
        marked.crowd.append(False)
    return marked._replace(num_outlines=num_outlines)


def _centred(x: float, y: float, width: float, height: float) -> list[float]:
    return [y - height / 2, x - width / 2, y + height / 2, x + width / 2]


def _around(outline: Sequence[float]) -> list[float]:
    x, y = outline[::2], outline[1::2]
    return [min(y), min(x), max(y), max(x)]


def parse_names(file: str, content: bytes) -> tuple[str, ...]:
    """Returns the names of the classes in a classes.txt, or in the data.yaml of Ultralytics, as they are written there.

    Args:
      file: the name of the file in errors.
      content: the bytes of the file.

    Raises:
      UserError: if there are none, or the file can't be parsed.
    """
    if file.endswith((".yaml", ".yml")):
        names = _names_in_yaml(file, content)
        check_different(file, names, "class")
    else:
        names, _ = parse_classes(file, content, with_colours=False)
    if not names:
        raise UserError(f"{file}: names no class; write one line for each class")
    return names


def _names_in_yaml(file: str, content: bytes) -> tuple[str, ...]:
    import yaml  # only this file needs it

    try:
        # Nodes keep what is written: values would make "no" False, and lose the first of two equal keys.
        node = yaml.compose(content, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: can't be parsed as YAML ({reason}); correct it, or write classes.txt") from error
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    entries = {str(key.value): value for key, value in pairs}
    names = entries.get("names")
    if "kpt_shape" in entries:
        raise UserError(f"{file}: kpt_shape means key points, which aren't read; write boxes alone, and remove it")
    if isinstance(names, yaml.MappingNode):
        keys = [str(key.value) for key, _ in names.value]
        if sorted(keys) != sorted(map(str, range(len(keys)))):
            raise UserError(f"{file}: names must have the numbers 0 to {len(keys) - 1}, each once; correct them")
        nodes = [value for _, value in sorted(names.value, key=lambda entry: int(entry[0].value))]
    elif isinstance(names, yaml.SequenceNode):
        nodes = names.value
    else:
        raise UserError(f"{file}: has no list of names; write names: [cat, dog], or a classes.txt")
    if not all(isinstance(name, yaml.ScalarNode) and name.value.strip() for name in nodes):
        raise UserError(f"{file}: one of its names is no text; write names: [cat, dog], or a classes.txt")
    count = getattr(entries.get("nc"), "value", "")
    if isinstance(count, str) and count.isdecimal() and count != str(len(nodes)):
        raise UserError(f"{file}: nc is {count:.60}, but there are {len(nodes)} names; correct one of them")
    return tuple(name.value for name in nodes)


def numbers_of(
    file: str, names: Sequence[str], numbers: Mapping[str, int], place: str, is_numbered: bool = False
) -> list[int]:
    """Returns the numbers of classes.

    Args:
      file: the file that has these names, for an error.
      names: keys of ``numbers``.
      numbers: the number of each class.
      place: where the classes are named, for an error.
      is_numbered: whether ``names`` are numbers themselves.

    Raises:
      UserError: for a class that isn't known.
    """
    found = [numbers.get(name, -1) for name in names]
    if -1 in found:
        unknown = names[found.index(-1)]
        if is_numbered:
            raise UserError(
                f"{file}: class {unknown:.60} is not in {place}, which has 0 to {len(numbers) - 1}; correct it, or name"
                " this class, too"
            )
        raise UserError(f"{file}: class {unknown!r} is not in {place}{nearest(unknown, numbers)}")
    return found


# --- JSON ---------------------------------------------------------------------------------------------------


class Coco(NamedTuple):
    """The tables of a JSON file of COCO; its m annotations belong to images that it lists."""

    class_ids: tuple[int, ...]
    """Ids of the categories, rising: their places are the numbers of classes."""
    class_names: tuple[str, ...]
    files: list[str]
    """Names of the image files, [n]."""
    image_ids: np.ndarray
    """Ids of the images, [n]."""
    sizes: np.ndarray
    """int [n, 2]: height and width; 0 where they aren't stated."""
    image: np.ndarray
    """int [m]: the image of each annotation, as a place in ``files``."""
    corners: np.ndarray
    """float64 [m, 4]: y0, x0, y1, x1 in pixels, with exclusive end."""
    classes: np.ndarray
    """int [m]: numbers of classes."""
    crowd: np.ndarray
    """bool [m]"""
    areas: np.ndarray
    """float64 [m]: areas of the outlines in pixels, or those of the boxes where none is stated."""
    strays: list[str]
    """Names of the annotations whose image isn't listed."""
    has_annotations: bool
    """Whether there are annotations at all; those of test are seldom public."""


_COCO_KEYS = (b'"images"', b'"annotations"', b'"categories"')
_ADVICE = "give a file as instances_train2017.json, with images, annotations and categories"


def is_coco(content: bytes) -> bool:
    """Whether a JSON file has the keys of COCO; doesn't parse it."""
    return all(key in content for key in _COCO_KEYS)


def parse_coco(file: str, content: bytes) -> Coco:
    """Parses a JSON file of COCO.

    Args:
      file: the name of the file in errors.
      content: the bytes of the file.

    Raises:
      UserError: if it is no such file, a number is none, or a category isn't listed.
    """

    def without_outline(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop("segmentation", None)  # nine tenths of the memory
        return entry

    try:
        tree = json.loads(content, object_hook=without_outline)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: can't be parsed as JSON ({error}); restore it") from error
    tables = [tree.get(key) if isinstance(tree, dict) else None for key in ("images", "annotations", "categories")]
    images, objects, categories = tables
    annotations = objects if isinstance(objects, list) else []
    if not isinstance(images, list) or not isinstance(categories, list):
        raise UserError(f"{file}: has no lists of images and categories; {_ADVICE}")
    ids = {_field(file, entry, "id", "category"): str(_field(file, entry, "name", "category")) for entry in categories}
    _check_ids(file, "categories", categories)
    if not ids or not all(type(number) is int for number in ids):
        raise UserError(f"{file}: its categories have no whole numbers as id; {_ADVICE}")
    class_ids = tuple(sorted(ids))
    names = tuple(ids[number] for number in class_ids)
    check_different(file, names, "class")
    number_of = {number: label for label, number in enumerate(class_ids)}
    rows = {_field(file, entry, "id", "image"): row for row, entry in enumerate(images)}
    _check_ids(file, "images", images)
    files = [str(_field(file, entry, "file_name", "image")) for entry in images]
    sizes = [
        [_side(file, entry.get(side), f"the {side} of image {entry['id']!r}") for side in ("height", "width")]
        for entry in images
    ]
    image, boxes, classes, crowd, areas, strays = [], [], [], [], [], []
    for place, entry in enumerate(annotations):
        name = f"annotation {entry['id'] if isinstance(entry, dict) and 'id' in entry else f'at place {place}'}"
        row = rows.get(_field(file, entry, "image_id", name))
        if row is None:
            strays.append(f"{file} ({name})")
            continue
        number = number_of.get(_field(file, entry, "category_id", name))
        if number is None:
            raise UserError(
                f"{file}: {name} has category_id {entry['category_id']!r}, which no category has; add it to categories,"
                " or correct it"
            )
        box = _field(file, entry, "bbox", name)
        if not isinstance(box, list) or len(box) != 4:
            raise UserError(f"{file}: {name} has the bbox {box!r:.60}; write [x, y, width, height]")
        image.append(row)
        boxes.append([_number(file, value, f"a number in the bbox of {name}") for value in box])
        classes.append(number)
        crowd.append(_is_set(entry.get("iscrowd")))
        areas.append(_area(file, entry, name))
    x, y, width, height = np.array(boxes, np.float64).reshape(-1, 4).T
    stated = np.array(areas, np.float64)
    return Coco(
        class_ids,
        names,
        files,
        np.array(list(rows)),
        np.array(sizes, np.int64).reshape(-1, 2),
        np.array(image, np.int64),
        np.stack([y, x, y + height, x + width], 1),
        np.array(classes, np.int64),
        np.array(crowd, bool),
        np.where(np.isnan(stated), abs(width * height), stated),
        strays,
        bool(annotations),
    )


def _field(file: str, entry: Any, key: str, what: str) -> Any:
    if not isinstance(entry, dict) or key not in entry or (isinstance(entry[key], dict | list) and key != "bbox"):
        raise UserError(f"{file}: {what} {entry!r:.60} has no {key}; {_ADVICE}")
    return entry[key]


def _check_ids(file: str, kind: str, entries: Sequence[Mapping[str, Any]]) -> None:
    counts = collections.Counter(entry["id"] for entry in entries)
    if repeated := [number for number, count in counts.items() if count > 1]:
        raise UserError(f"{file}: several {kind} have the id {repeated[0]!r}; give each an id of its own")


def _area(file: str, entry: Mapping[str, Any], name: str) -> float:
    return math.nan if entry.get("area") is None else _number(file, entry["area"], f"the area of {name}")
