"""Accuracies on ImageNet that others report for these networks, to compare your own results with.

The rows of `published.json` were copied from papers, from the READMEs of TF-slim, CoreNet, d-li14 and mmpretrain, from
the model cards of torchvision and Keras, and from timm's results table. `source` names the origin and its commit.
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
    """Returns the published results of a model; none if there are no published results.

    Args:
      model: a name of `registry.list_models`.

    Returns:
      Rows, read-only. In each:

        model, width: as `registry.create_model` takes them; `depth`, where it isn't 1.
        resolution: resolution of the evaluation, in pixels.
        top1, top5: accuracies on the 50 000 validation images in percent; `top5` is None if it wasn't reported.
        source: where the result was reported.

      Some rows also have:

        weights: the name under which `weights.hub.fetch` finds the weights.
        eval: how the images were resized and cropped; "crop 0.9" is the share of the short side.
        precision: int8 and such; float otherwise.
        training: the data, if it isn't ImageNet-1k alone, or the method, if it is unusual.
        note: other differences.
        params_M, madds_M: millions of parameters and of multiply-adds, as the source prints them. Sources count
          differently (batch norm, 1001 classes, 2**20 for a million), and some are wrong; `models.counting` has the
          correct numbers.
    """
    return tuple(row for row in _rows() if row["model"] == model)


@functools.cache
def _rows() -> tuple[Mapping[str, Any], ...]:
    return tuple(types.MappingProxyType(row) for row in json.loads(_FILE.read_text(encoding="utf-8")))
