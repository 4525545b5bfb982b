"""Accuracies that others report for these networks on ImageNet, to compare one's own with.

The rows of `published.json` were copied from papers, from the READMEs of TF-slim, CoreNet, d-li14 and mmpretrain, from
the model cards of torchvision and Keras and from timm's results table; `source` says which, and at what commit.
"""

from __future__ import annotations

import functools
import json
import pathlib
import types
from collections.abc import Mapping
from typing import Any

_FILE = pathlib.Path(__file__).with_name("published.json")


def published(model: str) -> tuple[Mapping[str, Any], ...]:
    """The published results of a model; none of a model that nobody published.

    Args:
      model: a name of `registry.list_models`.

    Returns:
      Rows, read-only. In each:

        model, width: as `registry.create_model` takes them; `depth`, where it isn't 1.
        resolution: of the evaluation, in pixels.
        top1, top5: accuracies on the 50 000 validation images in percent; `top5` None where it wasn't reported.
        source: where it was.

      And where there is more to say:

        weights: the name that `weights.hub.fetch` knows them by.
        eval: how the images were resized and cropped; "crop 0.9" is the share of the short side.
        precision: int8 and such; float otherwise.
        training: the data or the method, where it isn't ImageNet-1k alone or isn't the usual one.
        note: what else differs.
        params_M, madds_M: millions of parameters and of multiply-adds as printed there. Sources count differently
          (batch norm, 1001 classes, 2**20 for a million), and some are mistaken: `models.counting` has the truth.
    """
    return tuple(row for row in _rows() if row["model"] == model)


@functools.cache
def _rows() -> tuple[Mapping[str, Any], ...]:
    return tuple(types.MappingProxyType(row) for row in json.loads(_FILE.read_text(encoding="utf-8")))
