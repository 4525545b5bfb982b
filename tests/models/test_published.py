"""The table of published results."""

import json
import pathlib

import pytest

from mnv2_jax import models
from mnv2_jax.models.published import published
from mnv2_jax.models.registry import list_models

MODELS = {
    *("mobilenet_v1", "mobilenet_v2", "resnet50"),
    *(f"mobilenet_v3_{size}{variant}" for size in ("large", "small") for variant in ("", "_minimalistic")),
    *(f"mobilenet_v4_conv_{size}" for size in ("small", "medium", "large")),
    *(f"mobilenet_v4_hybrid_{size}" for size in ("medium", "large")),
}
ROWS = json.loads((pathlib.Path(models.__path__[0]) / "published.json").read_text())
REQUIRED = {"model", "width", "resolution", "top1", "top5", "source"}
OPTIONAL = {"depth", "weights", "eval", "precision", "training", "note", "params_M", "madds_M"}


def test_every_model_has_rows_and_every_row_a_model():
    assert {row["model"] for row in ROWS} == MODELS
    assert sum(len(published(model)) for model in MODELS) == len(ROWS)
    assert set(list_models()) >= MODELS
    assert published("alexnet") == ()


def test_rows_are_well_formed():
    for row in ROWS:
        assert set(row) >= REQUIRED, row
        assert set(row) <= REQUIRED | OPTIONAL, row
        assert 0.1 <= row["width"] <= 1.4, row
        assert row["resolution"] % 32 == 0, row
        assert 30 < row["top1"] < 90, row
        assert row["top5"] is None or row["top1"] < row["top5"] < 100, row
        assert "/" in row["source"] or "arXiv" in row["source"] or "keras.io" in row["source"], row


def test_no_row_twice():
    # paper v4 has rows that differ in `training` only
    keys = [tuple(str(row.get(key)) for key in sorted(REQUIRED | OPTIONAL)) for row in ROWS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("model", "width", "resolution", "source", "top1", "top5"),
    [
        ("mobilenet_v1", 1.0, 224, "mobilenet_v1.md", 70.9, 89.9),
        ("mobilenet_v2", 1.0, 224, "slim/nets/mobilenet/README", 71.8, 91.0),
        ("mobilenet_v2", 1.4, 224, "arXiv:1801.04381", 74.7, None),
        ("mobilenet_v3_large", 1.0, 224, "arXiv:1905.02244", 75.2, None),
        ("mobilenet_v4_conv_medium", 1.0, 256, "mobilenetv4_conv_medium_tpu.yaml", 79.9, None),
    ],
)
def test_golden_rows(model, width, resolution, source, top1, top5):
    accuracies = [
        (row["top1"], row["top5"])
        for row in published(model)
        if (row["width"], row["resolution"]) == (width, resolution)
        and source in row["source"]
        and not row.get("precision")
    ]
    assert accuracies == [(top1, top5)]


@pytest.mark.parametrize(
    ("model", "weights", "resolution", "expected"),
    [
        ("mobilenet_v2", "timm/mobilenetv2_140.ra_in1k", 224, {"width": 1.4, "top1": 76.528, "top5": 93.008}),
        ("mobilenet_v2", "timm/mobilenetv2_120d.ra_in1k", 224, {"width": 1.2, "depth": 1.4, "top1": 77.3}),
        ("mobilenet_v4_conv_small", "timm/mobilenetv4_conv_small.e3600_r256_in1k", 320, {"top1": 75.616}),
        ("mobilenet_v2", "torchvision/mobilenet_v2.v2", 224, {"top1": 72.154, "top5": 90.822}),
        ("mobilenet_v3_large", "torchvision/mobilenet_v3_large.v1", 224, {"top1": 74.042, "top5": 91.34}),
        ("resnet50", "torchvision/resnet50.v1", 224, {"top1": 76.13, "top5": 92.862}),
        ("resnet50", "torchvision/resnet50.v2", 224, {"top1": 80.858, "top5": 95.434}),
    ],
)
def test_results_of_weights_that_can_be_fetched(model, weights, resolution, expected):
    (row,) = [row for row in published(model) if row.get("weights") == weights and row["resolution"] == resolution]
    assert row.items() >= expected.items()


def test_rows_cannot_be_changed():
    with pytest.raises(TypeError):
        published("resnet50")[0]["top1"] = 100.0
