"""Writes small images and the files of their boxes for tests of object detection."""

import json
import pathlib

from tests.data.masked import image, write

SIZE = (60, 80)
NAMES = ("cat", "dog")


def picture(path: pathlib.Path, size=SIZE) -> pathlib.Path:
    """Writes an image whose pixels depend on its name."""
    return write(path, image(sum(path.name.encode()), size))


def element(name, box, difficult=0):
    """Returns an object as VOC's XML has it; ``box``: xmin, ymin, xmax, ymax, from 1, with inclusive end."""
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    parts = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox>{parts}</object>"


def xml(path: pathlib.Path, *elements, size=SIZE) -> pathlib.Path:
    """Writes a file of VOC's XML; ``size``: None for one that doesn't state it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stated = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>" if size else ""
    path.write_text(f"<annotation><filename>x.jpg</filename>{stated}{''.join(elements)}</annotation>")
    return path


def lines(path: pathlib.Path, *rows) -> pathlib.Path:
    """Writes a file of YOLO."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{' '.join(map(str, row))}\n" for row in rows))
    return path


def coco(path: pathlib.Path, files, boxes, categories=((7, "dog"), (3, "cat")), size=SIZE) -> pathlib.Path:
    """Writes a JSON file of COCO.

    ``files``: file names by id; ``boxes``: (image id, category id, [x, y, width, height], more fields).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    tree = {
        "images": [{"id": key, "file_name": name, "height": height, "width": width} for key, name in files.items()],
        "annotations": [
            {
                "id": number,
                "image_id": key,
                "category_id": category,
                "bbox": box,
                "segmentation": [[1, 2, 3, 4]],
                **more,
            }
            for number, (key, category, box, more) in enumerate(boxes)
        ],
        "categories": [{"id": number, "name": name} for number, name in categories],
    }
    path.write_text(json.dumps(tree))
    return path


def voc(top: pathlib.Path, splits=(("train", "abc"), ("val", "de"))) -> pathlib.Path:
    """Writes VOC's folders; each image has a cat, and a difficult dog that reaches to the image's end."""
    (top / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in splits:
        (top / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            picture(top / "JPEGImages" / f"{name}.jpg")
            xml(
                top / "Annotations" / f"{name}.xml",
                element("cat", (1, 11, 20, 30)),
                element("dog", (41, 31, 80, 60), 1),
            )
    return top


def yolo(top: pathlib.Path, splits=(("train", "abc"), ("val", "de"))) -> pathlib.Path:
    """Writes folders of YOLO with the boxes of `voc`, but none is difficult."""
    for split, names in splits:
        for name in names:
            picture(top / "images" / split / f"{name}.jpg")
            rows = (0, 10 / 80, 20 / 60, 20 / 80, 20 / 60), (1, 60 / 80, 45 / 60, 40 / 80, 30 / 60)
            lines(top / "labels" / split / f"{name}.txt", *rows)
    (top / "classes.txt").write_text("cat\ndog\n")
    return top


def official(top: pathlib.Path) -> pathlib.Path:
    """Writes COCO's folders with the boxes of `voc`, and a category id for each class that isn't its number."""
    for split, names in (("train", "abc"), ("val", "de")):
        files = {100 - place: f"{name}.jpg" for place, name in enumerate(names)}
        for name in files.values():
            picture(top / f"{split}2017" / name)
        boxes = [
            entry
            for key in files
            for entry in ((key, 3, [0, 10, 20, 20], {}), (key, 7, [40, 30, 40, 30], {"iscrowd": 1, "area": 99.5}))
        ]
        coco(top / "annotations" / f"instances_{split}2017.json", files, boxes)
    return top
