"""Tests that each recipe has all hyperparameters that its authors published, or is refused."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import config
from mnv2_jax.config import checks
from mnv2_jax.errors import UserError
from mnv2_jax.models.published import published
from mnv2_jax.nn.initializers import INITS
from mnv2_jax.recipes import RECIPES, REFUSED

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "recipes.json").read_text())["recipes"]
ENTRIES = {entry["id"]: entry for entry in GOLDEN}
V4 = {
    "v4_conv_s": "conv_small",
    "v4_conv_m": "conv_medium",
    "v4_hybrid_m": "hybrid_medium",
    "v4_conv_l": "conv_large",
    "v4_hybrid_l": "hybrid_large",
}
"""Networks of MobileNetV4 by config file, with the names that the paper and TF model garden use."""
CONFIGS = {  # recipes, each with the configs of the networks that its numbers are for
    "tf_slim_v2": ("w1_0",),
    "tfmg_v2": ("w1_0",),
    "tfmg_v1": ("v1_1_0",),
    "tfmg_v3_large": ("v3_large",),
    "tfmg_v3_small": ("v3_small",),
    "corenet_v2": ("w1_0", "w0_25", "w1_4"),
    "corenet_v1": ("v1_1_0",),
    "corenet_v3_large": ("v3_large",),
    "torchvision_v2_IMAGENET1K_V1": ("w1_0",),
    "torchvision_v2_IMAGENET1K_V2": ("w1_0",),
    "torchvision_v3_V1": ("v3_large", "v3_small"),
    "torchvision_v3_large_V2": ("v3_large",),
    "timm_v3_large_ra": ("v3_large",),
    "efficientnet_jax_default": ("w1_0",),
    "dli14_v2": ("w1_0",),
    "dli14_v2_best": ("w1_0",),
    "dli14_v3": ("v3_large", "v3_small"),
    "mmpretrain_v2": ("w1_0",),
    "paper_v4": tuple(V4),
    "tfmg_v4": tuple(V4),
}


def load(stem, recipe, more=""):
    return config.load(f"{ROOT}/configs/{stem}.py:recipe={recipe}{more}")[1]


def close(expected, actual):
    if isinstance(expected, list):
        return len(expected) == len(actual) and all(map(close, expected, actual))
    if isinstance(expected, str | bool | None):
        return expected == actual
    return actual == pytest.approx(expected, rel=1e-6)


def sources(recipe):
    """Returns the entry of a recipe, preceded by the entry that completes it, if there is one."""
    entry = ENTRIES[recipe]
    return [ENTRIES[entry["otherwise_as"]], entry] if "otherwise_as" in entry else [entry]


def assert_has(built, facts, stem):
    keys = config.flatten(config.to_dict(built)) | {"optim.peak_lr": built.peak_lr}
    for key, fact in facts.items():
        value = fact["value"] if "value" in fact else fact["values"][stem]
        assert close(value, keys[key]), f"{key} is {keys[key]!r}, of {fact}"


FANS = {  # of a kernel [k, k, i, o] with k * k = w; a dense one has w = 1
    "fan_in": lambda w, i, o: w * i,
    "fan_out": lambda w, i, o: w * o,
    "fan_out_of_a_group": lambda w, i, o: w * (1 if i == 1 else o),
    "fan_average": lambda w, i, o: w * (i + o) / 2,
    # Keras: an axis before the last two is a window.
    "fan_average_of_heads_first": lambda w, i, o: (o + HEADS * i) / 2,
    "fan_average_of_heads_in_the_middle": lambda w, i, o: o * (HEADS + i / HEADS) / 2,
}
HEADS = 4
ATTENTION = {"query": (1, 1, 48, 96), "shared": (1, 1, 48, 96), "output": (1, 1, 48, 96), "depthwise": (3, 3, 1, 512)}
KERNELS = {
    "convolutions": ("conv", (3, 3, 16, 32)),
    "depthwise": ("depthwise", (3, 3, 1, 512)),
    "squeeze_excite": ("squeeze_excite", (48, 96)),
    "hidden": ("hidden", (48, 96)),
    "classifier": ("classifier", (48, 96)),
}


@functools.cache
def drawn(name, kind):
    """Returns distribution and standard deviation of what a row of `INITS` draws, and the kernel's w, i and o."""
    inits, shape = INITS[name], (48, 4096)
    if kind.endswith("bias"):
        draw = getattr(inits, kind)(shape[0])
    elif kind in KERNELS:
        field, shape = KERNELS[kind]
        draw = getattr(inits, field)
    else:
        where, field = kind.split(".")
        shape = ATTENTION[field]
        draw = getattr(inits.of_attention(HEADS, 2 if "smaller" in where else 1), field)
    values = np.asarray(draw(jax.random.key(0), shape[1:] if kind.endswith("bias") else shape, jnp.float32))
    *window, i, o = shape
    std = values.std()
    # The largest of a uniform lies at 1.73 deviations, that of a normal cut at two (of its own) at 2.27.
    reach = np.abs(values).max() / std if std else 0.0
    kinds = {"zeros": (0, 0), "uniform": (1.65, 1.8), "truncated": (2.2, 2.31), "normal": (3, 6)}
    (distribution,) = (kind for kind, (low, high) in kinds.items() if low <= reach <= high)
    return distribution, float(std), (math.prod(window), i, o)


def assert_begins_as(built, kinds):
    for kind, fact in kinds.items():
        distribution, std, sizes = drawn(built.model.init, kind)
        expected = fact["std"] if "std" in fact else (fact["variance"] / FANS[fact["over"]](*sizes)) ** 0.5
        assert distribution == fact["distribution"], f"{kind}: {fact}"
        assert std == pytest.approx(expected, rel=0.05), f"{kind}: {fact}"


RUNS = [(recipe, stem) for recipe, stems in CONFIGS.items() for stem in stems]


@pytest.mark.parametrize(("recipe", "stem"), RUNS)
def test_every_fact_of_a_recipe_is_in_its_config(recipe, stem):
    built = load(stem, recipe)
    facts, kinds = {}, {}
    for entry in sources(recipe):
        facts |= {key: fact for key, fact in entry["config"].items() if stem in fact.get("values", [stem])}
        kinds |= entry.get("init", {})
    assert_has(built, facts, stem)
    assert_begins_as(built, kinds)


def test_every_value_is_of_a_network_that_is_compared():
    for recipe, stems in CONFIGS.items():
        for key, fact in ENTRIES[recipe]["config"].items():
            assert ("value" in fact) != ("values" in fact), (recipe, key)
            assert fact["said"], (recipe, key)
            assert set(fact.get("values", stems)) <= set(stems), (recipe, key)


def test_resnet_50_begins_as_torchvisions():
    recipe = "torchvision_v2_IMAGENET1K_V2"
    assert_begins_as(load("resnet50", recipe), ENTRIES[recipe]["init_of_resnet50"])


@pytest.mark.parametrize(("recipe", "stem"), [(recipe, stem) for recipe, stem in RUNS if recipe.startswith("corenet_")])
def test_a_batch_of_corenet_grows_when_the_crop_shrinks(recipe, stem):
    assert "grows when the crop shrinks" in ENTRIES[recipe]["notes"]["augmentation.multi_scale_sampler.note"]
    (_, of_the_smallest), *_, (_, of_the_largest) = checks.batch_shapes(load(stem, recipe))
    assert of_the_smallest > of_the_largest


def test_the_networks_of_v4_are_those_of_the_configs():
    models = [load(stem, "paper_v4").model for stem in V4]
    assert [model.name for model in models] == [f"mobilenet_v4_{name}" for name in V4.values()]
    # The paper gives neither; the code of its authors, TF model garden, does.
    assert {model.init for model in models} == {"tf_model_garden"}
    assert [model.drop_path_rule for model in models] == ["linear"] + 4 * ["tf_model_garden"]


def test_the_papers_own_schedule_is_that_of_the_recipe_paper():
    assert_has(load("w1_0", "paper"), ENTRIES["tf_slim_v2"]["config_of_the_paper"], "w1_0")


def test_every_published_recipe_runs_or_is_refused():
    assert len(ENTRIES) == 26
    assert set(ENTRIES) == set(CONFIGS) | set(REFUSED)
    assert set(CONFIGS) <= set(RECIPES)
    assert not set(REFUSED) & set(RECIPES)


@pytest.mark.parametrize("recipe", sorted(REFUSED))
def test_refused_with_the_reason_and_the_nearest_that_runs(recipe):
    with pytest.raises(UserError) as caught:
        load("w1_0", recipe)
    message = str(caught.value)
    assert f"recipe={recipe} can't be run" in message
    assert "\n" not in message
    nearest = message.partition("the nearest that runs: ")[2]
    assert set(nearest.split(" or ")) <= set(CONFIGS)


def test_what_is_missing_is_missing_in_the_facts():
    facts = {recipe: " ".join(map(str, ENTRIES[recipe].values())) for recipe in REFUSED}
    assert "learning rate, batch, epochs" in facts["paper_v1"]
    assert "ambiguous" in facts["paper_v3"]
    assert "epochs" not in ENTRIES["paper_v3"]
    assert "exact command NOT published" in facts["timm_v2_ra"]
    assert "batch" not in ENTRIES["timm_v2_050_lamb"]
    assert "gist text not available" in facts["timm_ra4"]
    assert "needs JFT-300M" in facts["paper_v4_distill"]


def top1(recipe, stem):
    """Returns the published top-1 of a recipe on a network, as docstrings print it; None if there is none."""
    result, column = ENTRIES[recipe]["result"] or {}, stem.removeprefix("v3_")
    if stem in V4:
        result, column = result["top1"], V4[stem]
    elif column not in result and stem == CONFIGS[recipe][0]:
        column = "top1"
    number = result.get(column)
    if isinstance(number, list):  # and top-5
        number = number[0]
    return None if number is None else re.search(r"[\d.]+", str(number))[0]


PUBLISHED = {(recipe, stem): number for recipe, stem in RUNS if (number := top1(recipe, stem))}
WIDTHS = {"w0_75": 0.75, "w0_5": 0.5, "w0_35": 0.35, "w0_25": 0.25}  # of dli14_v2's table


def docstrings():
    """Yields each config file, with {recipe: top-1} from its docstring: for its own recipe, and for other recipes."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        docstring = path.read_text().split('"""')[1]
        own = re.findall(r"^Expected with recipe (\w+): (\d\d\.\d+) top-1", docstring, re.MULTILINE)
        others = re.findall(r"^    (\w+) +([\d.]+|none) +\d+ epochs ", docstring, re.MULTILINE)
        assert len(dict(own + others)) == len(own + others)
        yield path.stem, dict(own), dict(others)


def test_docstrings_tell_what_is_published_of_each_recipe_and_invent_nothing():
    assert {recipe for recipe, _ in PUBLISHED} == set(CONFIGS) - {"efficientnet_jax_default"}
    expected = PUBLISHED | {("efficientnet_jax_default", "w1_0"): "none"}
    for stem, width in WIDTHS.items():
        (row,) = (
            row
            for row in published("mobilenet_v2")
            if row["source"].startswith("d-li14/") and (row["width"], row["resolution"]) == (width, 224)
        )
        expected["dli14_v2", stem] = str(row["top1"])
    docstring_top1 = {stem: (own, others) for stem, own, others in docstrings()}
    for (recipe, stem), number in expected.items():
        own, others = docstring_top1[stem]
        assert (own | others)[recipe] == number
    listed = {(recipe, stem) for stem, (_, others) in docstring_top1.items() for recipe in others}
    assert listed <= set(expected)


def test_v4_recipes_have_a_column_for_v4_only():
    with pytest.raises(UserError, match=r"recipe=paper_v4: .* mobilenet_v2; .* mobilenet_v4_c"):
        load("w1_0", "paper_v4")


def test_recipes_of_tensorflow_and_of_detection_alone_resize_without_antialiasing():
    plain = {recipe for recipe, stem in RUNNABLE if not load(stem, recipe).data.antialias}
    detection = {"tf_ssdlite_v2", "torchvision_ssdlite_v3"}
    garden = {name for name in RECIPES if name.startswith("tfmg_")}
    assert plain == {"paper", "tf_slim_v2", "paper_v4", *garden, *detection}


def test_dropout_follows_the_network():
    assert load("v1_0_5", "corenet_v1").model.dropout == pytest.approx(0.05)
    assert load("v1_1_0", "corenet_v1").model.dropout == pytest.approx(0.1)
    slim = {"name": "mobilenet_v3_small", "width": 0.75}
    assert RECIPES["dli14_v3"](*slim.values())["model"]["dropout"] == 0.1
    assert RECIPES["dli14_v3"]("mobilenet_v3_large", 0.75)["model"]["dropout"] == 0.2


RUNNABLE = [(recipe, next(iter(V4)) if "v4" in recipe else "w1_0") for recipe in RECIPES]


@pytest.mark.parametrize(("recipe", "stem"), RUNNABLE)
def test_a_small_batch_keeps_the_schedule_by_images(recipe, stem):
    whole, small = load(stem, recipe), load(stem, recipe, ",batch=16")
    share = 16 / whole.data.batch_size
    assert small.peak_lr == pytest.approx(whole.peak_lr * share)
    for key in ("warmup_init_lr", "final_lr"):
        assert getattr(small.optim, key) == pytest.approx(getattr(whole.optim, key) * share)
    for key in ("warmup_steps", "decay_every_steps"):
        before, after = getattr(whole.optim, key), getattr(small.optim, key)
        assert (before is None and after is None) or after * 16 == pytest.approx(before * whole.data.batch_size)
    assert (small.train, small.norm.decay, small.optim.ema_decay) == (
        whole.train,
        whole.norm.decay,
        whole.optim.ema_decay,
    )
    checks.check_devices(small, 1)
    shapes = checks.batch_shapes(small)
    pixels = [images * scale**2 / (16 * small.data.resolution**2) for scale, images in shapes]
    assert 0.6 < min(pixels) <= max(pixels) < 2.1, shapes


@pytest.mark.parametrize(("recipe", "stem"), RUNNABLE)
def test_a_recipe_trains_on_one_device_as_it_is(recipe, stem):
    checks.check_devices(load(stem, recipe), 1)


def test_the_recipes_of_several_devices_train_on_as_many():
    for recipe, stem, devices in [("torchvision_v2_IMAGENET1K_V2", "w1_0", 8), ("corenet_v2", "w1_0", 4)]:
        checks.check_devices(load(stem, recipe), devices)


def test_a_resolution_that_is_asked_for_is_that_of_evaluation_too():
    data = load("w1_0", "torchvision_v2_IMAGENET1K_V2", ",res=96").data
    assert (data.resolution, data.eval_resolution) == (96, None)
