"""Data sets that measure how robust an ImageNet classifier is: class folders of images that are only evaluated.

| name | folders | source |
| --- | --- | --- |
| imagenet_v2 | 0 to 999, class indices | Recht et al. 2019, arXiv:1902.10811 (each of its three forms) |
| imagenet_r | 200 WordNet ids | Hendrycks et al. 2020, arXiv:2006.16241 |
| imagenet_a | 200 WordNet ids | Hendrycks et al. 2019, arXiv:1907.07174 |
| imagenet_sketch | 1000 WordNet ids | Wang et al. 2019, arXiv:1905.13549 |

The 200 classes are those of the authors' ``eval.py`` (hendrycks/imagenet-r, hendrycks/natural-adv-examples), who take
the class with the largest of these 200 logits as the prediction.
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
      The split, whose labels are in 0..999, in the order of `imagenet.class_ids`; and a note on the files that were
      left out, if any.

    Raises:
      UserError: naming a class folder that is missing, is empty, or isn't a class of this data set.
    """
    if not os.path.isdir(path):
        raise UserError(f"{path}: not a folder; unpack {name}, and give the folder that holds its class folders")
    label_of = _label_of_folder(name)
    with os.scandir(path) as entries:
        folders = {entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()}
    if unknown := sorted(folders - label_of.keys()):
        more = f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{path}: folder {unknown[0]!r} is none of the {len(label_of)} classes of {name}{more}; give a folder that"
            " holds only these classes"
        )
    names, labels, ignored = [], [], []
    for folder, label in label_of.items():
        images, other_files = find_images(os.path.join(path, folder)) if folder in folders else ([], [])
        if not images:
            raise UserError(
                f"{path}: class {folder!r} of {name} has no images, and {len(folders)} of {len(label_of)} class folders"
                " exist; copy or unpack the data again"
            )
        names += [os.fsencode(os.path.relpath(image, path)) for image in images]
        labels += [label] * len(images)
        ignored += [os.path.relpath(file, path) for file in other_files]
    return Split("test", np.array(labels, np.int32), FileReader(path, np.array(names))), left_out(ignored)


def scored(name: str) -> tuple[int, ...] | None:
    """Returns the labels, in rising order, among which the largest logit is the prediction; None: all labels."""
    classes = tuple(_label_of_folder(name).values())
    return None if len(classes) == len(imagenet.class_ids()) else classes


def _label_of_folder(name: str) -> dict[str, int]:
    """Returns the labels by the names of the class folders, in rising order."""
    ids = imagenet.class_ids()
    if name == "imagenet_v2":
        return {str(label): label for label in range(len(ids))}
    subset = set(json.loads(_FILE.read_text(encoding="utf-8")).get(name, ids))
    return {wnid: label for label, wnid in enumerate(ids) if wnid in subset}
