"""The data sets that measure how robust a classifier of ImageNet is: folders of images to evaluate on, nothing more.

| name | folders | source |
| --- | --- | --- |
| imagenet_v2 | 0 to 999, class indices | Recht et al. 2019, arXiv:1902.10811 (each of its three forms) |
| imagenet_r | 200 WordNet ids | Hendrycks et al. 2020, arXiv:2006.16241 |
| imagenet_a | 200 WordNet ids | Hendrycks et al. 2019, arXiv:1907.07174 |
| imagenet_sketch | 1000 WordNet ids | Wang et al. 2019, arXiv:1905.13549 |

The 200 classes are those of the authors' ``eval.py`` (hendrycks/imagenet-r, hendrycks/natural-adv-examples), who take
the largest logit of these classes for the prediction.
"""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np

from mnv2_jax.data import imagenet
from mnv2_jax.data.folder import FileReader, find_images, left_out
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError

NAMES = ("imagenet_v2", "imagenet_r", "imagenet_a", "imagenet_sketch")
_FILE = pathlib.Path(__file__).with_name("imagenet_subsets.json")


def open_split(name: str, path: str) -> tuple[Split, tuple[str, ...]]:
    """Opens the images, sorted by label and file name; lists files and reads none.

    Args:
      name: one of `NAMES`.
      path: the folder that holds the class folders.

    Returns:
      The split, whose labels are in 0..999, in the order of `imagenet.class_ids`; and what was left out, a line each.

    Raises:
      UserError: naming a class folder that lacks, has no images, or is of no class of this data set.
    """
    if not os.path.isdir(path):
        raise UserError(f"{path}: not a folder; unpack {name}, and give the folder that holds its class folders")
    wanted = _label_of_folder(name)
    with os.scandir(path) as entries:
        there = {entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()}
    if unknown := sorted(there - wanted.keys()):
        more = f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{path}: folder {unknown[0]!r} is none of the {len(wanted)} classes of {name}{more}; give a folder that"
            " has only those"
        )
    images, labels, others = [], [], []
    for folder, label in wanted.items():
        found, rest = find_images(os.path.join(path, folder)) if folder in there else ([], [])
        if not found:
            raise UserError(
                f"{path}: class {folder!r} of {name} has no images; {len(there)} of {len(wanted)} class folders are"
                " there, so copy or unpack it again"
            )
        images += [os.fsencode(os.path.relpath(image, path)) for image in found]
        labels += [label] * len(found)
        others += [os.path.relpath(file, path) for file in rest]
    return Split("test", np.array(labels, np.int32), FileReader(path, np.array(images))), left_out(others)


def scored(name: str) -> tuple[int, ...] | None:
    """The classes among which the prediction is looked for, rising; None for all of them."""
    classes = tuple(_label_of_folder(name).values())
    return None if len(classes) == len(imagenet.class_ids()) else classes


def _label_of_folder(name: str) -> dict[str, int]:
    """Labels by the names of the class folders, rising."""
    ids = imagenet.class_ids()
    if name == "imagenet_v2":
        return {str(label): label for label in range(len(ids))}
    subset = set(json.loads(_FILE.read_text(encoding="utf-8")).get(name, ids))
    return {wnid: label for label, wnid in enumerate(ids) if wnid in subset}
