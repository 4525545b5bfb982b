import json
import math
import pathlib

import jax
import pytest

from mnv2_jax.models.counting import summarise
from mnv2_jax.models.registry import create_model

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "mobilenet_v2.json").read_text())


@pytest.mark.parametrize("row", GOLDEN["complexity"], ids=lambda r: f"{r['width_rule']}-{r['width']}-{r['resolution']}")
def test_counts_are_those_of_the_literature(row):
    summary = summarise(
        create_model("mobilenet_v2", 1000, width=row["width"], width_rule=row["width_rule"]), row["resolution"]
    )
    classifier = summary.layers[-1]
    assert classifier.name == "classifier"
    assert summary.params == row["trainable_1000"]
    assert summary.madds == row["madds_classes_1000"]
    assert summary.params + classifier.params // 1000 == row["trainable_1001"]
    assert summary.madds + classifier.madds // 1000 == row["madds_classes_1001"]
    norms = sum(layer.params for layer in summary.layers if layer.name.endswith("_norm"))
    assert summary.params + classifier.params // 1000 - norms == row["no_bn_1001"]
    assert norms == row["bn_running_stats"]  # a mean and a variance for each scale and bias


def test_layers_add_up_and_read_in_the_order_of_the_network():
    model = create_model("mobilenet_v2", 1001, width=0.35, padding="symmetric", dtype="bfloat16")
    summary = summarise(model, 96)
    row = next(r for r in GOLDEN["complexity"] if (r["width"], r["resolution"]) == (0.35, 96))
    assert (summary.params, summary.madds) == (row["trainable_1001"], row["madds_classes_1001"])
    assert summary.params == sum(layer.params for layer in summary.layers)
    assert summary.madds == sum(layer.madds for layer in summary.layers)
    names = [layer.name for layer in summary.layers]
    assert names[:4] == ["stem", "stem_norm", "block_1/depthwise", "block_1/depthwise_norm"]
    assert names[-3:] == ["head", "head_norm", "classifier"]
    shapes = {layer.name: layer.output_shape for layer in summary.layers}
    assert shapes["stem"] == (48, 48, 16)
    assert shapes["block_2/depthwise"] == (24, 24, 48)
    assert shapes["block_2/project"] == (24, 24, 8)
    assert shapes["classifier"] == (1001,)


def test_running_statistics_are_not_params():
    model = create_model("mobilenet_v2", 1000)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    stats = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), image)["batch_stats"])
    row = next(r for r in GOLDEN["complexity"] if (r["width"], r["resolution"]) == (1.0, 224))
    assert sum(math.prod(leaf.shape) for leaf in stats) == row["bn_running_stats"]
