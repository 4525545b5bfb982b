import collections
import json
import math
import pathlib

import jax
import pytest

from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.registry import create_model
from mnv2_jax.weights.file import shapes_of

ROWS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "complexity.json").read_text())["complexity"]

NOT_REPRODUCED = {
    "mobilenet_v2 1.4 paper_v2": "table 4's 6.9 M parameters and 585 M MAdds are 6.1 M and 582 M by its own table 2",
    "mobilenet_v2 1.0 dli14_v2": "0.01 to 0.02 M MAdds more than its layers have, unexplained",
    "mobilenet_v1 0.75 slim_v1_md": "its 317, 233, 162 and 104 M MAdds leave the stem out (paper: 325 M)",
    "mobilenet_v1 0.25 slim_v1_md": "34 M MAdds at 192 px; counted 30.2 M, between its own 41 at 224 and 21 at 160",
    "mobilenet_v3_large 1.25 paper_v3": "7.5 M parameters if the dense layer stays at 1280, 8.26 M at 1600",
    "mobilenet_v3_small 1.0 slim_v2_readme": "66 M and 2.9 M of the first arXiv version; the graph has 57 M and 2.54 M",
    "mobilenet_v3_small 0.75 slim_v2_readme": "2.4 M parameters of the first arXiv version; the graph has 2.04 M",
    "mobilenet_v3_small_minimalistic 1.0 slim_v2_readme": "65 M MAdds; 52.3 M by the released code",
}
"""Reasons why a number that a source prints can't be reproduced by counting, by model, width and source."""


def model_of(row, classes=1000):
    return create_model(row["model"], classes, **row["options"])


def name_of(row):
    return "-".join(map(str, [row["model"], *row["options"].values(), row["resolution"]]))


def two_of_each(rows):
    """Marks all rows but two widths of each network as slow: other rows count the same layers."""
    widths_of = collections.defaultdict(set)
    for row in rows:
        widths = widths_of[f"{row['model']} {row['options'] | {'width': None}}"]
        width = row["options"].get("width")
        later = width in widths or len(widths) >= 2
        yield pytest.param(row, id=name_of(row), marks=[pytest.mark.slow] if later else [])
        widths.add(width)


@pytest.mark.parametrize("row", list(two_of_each(ROWS)))
def test_counts_are_those_of_the_literature(row):
    params = row["params"]
    classes = next(n for n in (1000, 100, 10) if f"trainable_{n}" in params)
    model = model_of(row, classes)
    summary = count_layers(model, row["resolution"])
    paths = {path.rpartition("/")[0].removeprefix("params/") for path in shapes_of(model) if path.startswith("params/")}
    assert {layer.name for layer in summary.layers if layer.name.rpartition("/")[2] != "attention"} == paths
    assert summary.params == params[f"trainable_{classes}"]
    assert summary.madds == row["madds"][f"classes_{classes}"]
    classifier = summary.layers[-1]
    assert classifier.name == "classifier"
    norms = sum(layer.params for layer in summary.layers if layer.name.endswith("_norm"))
    assert norms == params.get("bn_running_stats", norms)  # a mean and a variance for each scale and bias
    if "trainable_1001" in params:
        one_more = classifier.params // classes
        assert summary.params + one_more == params["trainable_1001"]
        assert summary.madds + one_more - 1 == row["madds"]["classes_1001"]
        assert summary.params + one_more - norms == params["no_bn_1001"]


def agrees(printed, counts):
    """Whether one of the counts, rounded up or down to the printed digits, is the number in millions."""
    unit = 10.0 ** -len(str(float(printed)).rstrip("0").partition(".")[2])
    return any(abs(count / 1e6 - printed) < 1.001 * unit for count in counts)


def test_what_papers_print_is_what_counting_gives_or_is_known_not_to_be():
    unused = set(NOT_REPRODUCED)
    for row in ROWS:
        params, madds = list(row["params"].values()), list(row["madds"].values())
        if row["model"].startswith("mobilenet_v4"):  # the paper's M are 2**20, its G 2**30, and norms aren't counted
            norms = row["params"]["bn_running_stats"]
            params += [(row["params"]["trainable_1000"] - norms) * 1e6 / 2**20]
            madds += [round(row["madds"]["classes_1000"] / 2**30, 1) * 1e9]
        if "no_bn_1001" in row["params"]:  # slim's V1: three vectors a norm
            params += [row["params"]["no_bn_1001"] + 3 * row["params"]["bn_running_stats"] // 2]
        for source_row in row["published"]:
            label = f"{row['model']} {row['options']['width']} {source_row['source']}"
            wrong = [
                key
                for key, counts in (("params_M", params), ("madds_M", madds))
                if key in source_row and not agrees(source_row[key], counts)
            ]
            if label in NOT_REPRODUCED:
                unused -= {label} if wrong else set()
            else:
                assert not wrong, (label, row["resolution"], source_row)
    assert not unused, "these do reproduce"


def test_layers_add_up_and_read_in_the_order_of_the_network():
    model = create_model("mobilenet_v2", 1001, width=0.35, padding="symmetric", dtype="bfloat16")
    summary = count_layers(model, 96)
    row = next(r for r in ROWS if name_of(r) == "mobilenet_v2-0.35-standard-96")
    assert (summary.params, summary.madds) == (row["params"]["trainable_1001"], row["madds"]["classes_1001"])
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


def test_layers_without_a_product_stand_with_their_block():
    names = [layer.name for layer in count_layers(create_model("mobilenet_v4_hybrid_medium", 10), 64).layers]
    block = [name for name in names if name.startswith("block_8/")]
    assert block == names[names.index(block[0]) : names.index(block[0]) + len(block)]
    assert {"block_8/input_norm", "block_8/layer_scale"} <= set(block)


def test_running_statistics_are_not_params():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    row = next(r for r in ROWS if name_of(r) == "mobilenet_v2-1.0-standard-224")
    stats = jax.tree.leaves(jax.eval_shape(model_of(row).init, jax.random.key(0), image)["batch_stats"])
    assert sum(math.prod(leaf.shape) for leaf in stats) == row["params"]["bn_running_stats"]
