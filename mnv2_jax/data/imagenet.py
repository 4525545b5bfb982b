"""The 1000 classes of ILSVRC-2012, in the order in which every published network numbers them.

The order is that of the sorted WordNet ids (timm's ``data/_info/imagenet_synsets.txt``). The names are torchvision's
(``models/_meta.py``), each a lemma of its synset, except where two are equal or differ only in case: the cranes, the
maillots and the cardigans have different names here. Ids and names were compared with timm's
``imagenet_synset_to_lemma.txt`` and with the file names of 200 labelled sample images.
"""

from __future__ import annotations

import functools
import json
import pathlib

_FILE = pathlib.Path(__file__).with_name("imagenet_classes.json")


def class_ids() -> tuple[str, ...]:
    """Returns the WordNet ids, as ``"n01440764"``, by class index; they are sorted, and name ImageNet's folders."""
    return tuple(row["id"] for row in _rows())


def class_names() -> tuple[str, ...]:
    """Returns the short English names, as ``"tench"``, by class index; no two are equal, even ignoring case."""
    return tuple(row["name"] for row in _rows())


@functools.cache
def _rows() -> tuple[dict[str, str], ...]:
    return tuple(json.loads(_FILE.read_text(encoding="utf-8")))
