"""Tests the config: accepted values and their result, and values that are refused with one line."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import typing

import pytest

from mnv2_jax import config, presets
from mnv2_jax.config import checks, rules
from mnv2_jax.config.options import Option
from mnv2_jax.errors import UserError
from mnv2_jax.models.published import published
from mnv2_jax.presets import native_resolution
from tests import cli

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
W1 = str(ROOT / "configs" / "w1_0.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("recipe", sorted(presets.RECIPES))
def test_every_config_builds_and_survives_json(path, recipe, tmp_path):
    if recipe in ("paper_v4", "tfmg_v4") and not path.stem.startswith("v4_"):
        with pytest.raises(UserError, match=f"recipe={recipe}: .*mobilenet_v4_conv_small"):
            config.load(f"{path}:recipe={recipe}")
        return
    loaded = config.load(f"{path}:recipe={recipe}")
    assert loaded.recipe == recipe
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(loaded.config)))
    again = config.load(str(tmp_path / "config.json"))
    assert again.config == loaded.config
    assert (again.name, again.workdir) == (tmp_path.name, str(tmp_path))


OTHER_TASKS = {
    name: facts
    for task in ("segmentation", "detection")
    for name, facts in json.loads((ROOT / "tests" / "golden" / f"{task}.json").read_text())["recipes"].items()
}
NETWORKS = [path for path in CONFIGS if path.stem not in ("finetune", "segment_folder", "detect_folder", *OTHER_TASKS)]


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_a_config_of_another_task_has_the_published_facts(name):
    built = config.load(str(ROOT / "configs" / f"{name}.py")).config
    values = config.flatten(config.to_dict(built)) | {"optim.peak_lr": built.peak_lr}
    facts = OTHER_TASKS[name]["config"]
    assert {key: values[key] for key in facts} == facts


@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: p.stem)
def test_file_names_and_docstrings_tell_the_network(path):
    built = config.load(str(path)).config
    model, data = built.model, built.data
    family, digits = re.fullmatch(r"(w|v1_)(\d_\d+)|.*", path.stem).groups()
    width = float(digits.replace("_", ".")) if digits else 1.0
    name = {"w": "mobilenet_v2", "v1_": "mobilenet_v1"}.get(family) or NAMES[path.stem]
    resolution = data.eval_resolution or data.resolution
    assert (model.name, model.width, resolution) == (name, width, native_resolution(name))
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    golden = json.loads((ROOT / "tests" / "golden" / "complexity.json").read_text())["complexity"]
    params, madds = next(
        (
            (row["params"]["trainable_1000"], row["madds"]["classes_1000"])
            for row in golden
            if (row["model"], row["resolution"]) == (name, resolution)
            and row["options"] == {"width": width, "width_rule": "standard"}
        ),
        (25_557_032, 4_089_184_256),  # ResNet-50; see models/test_info.py
    )
    assert f"at {resolution} px: {params:,} parameters, {madds / 1e6:,.1f} M MAdds." in docstring
    rows = [row for row in published(name) if row["width"] == width and "precision" not in row]
    accuracies = {row[key] for row in rows for key in ("top1", "top5")} - {None}
    for first, last in ("Published", "Not trained"), ("Expected", "Cost"):
        printed = re.findall(r"\d\d\.\d+", docstring[docstring.index(first) : docstring.index(last)])
        assert printed
        for number in printed:
            assert float(number) in {round(accuracy, len(number.partition(".")[2])) for accuracy in accuracies}
    recipe = re.search(r"Expected with recipe (\w+): ", docstring)[1]
    assert f'presets.preset(arg, data="imagenet", recipe="{recipe}", ' in path.read_text()
    assert built == config.load(f"{path}:recipe={recipe}").config
    others = re.search(
        r"^Recipes.+: (\w+) for data=(\w+), (\w+) for data=(\w+), (\w+) for data=(\w+):.+ data=(\w+):NAME\.",
        docstring,
        re.M,
    )
    its, digits, thats, cifar, both, folder, tfds = others.groups()
    assert {digits: its, cifar: thats, folder: both, tfds: both} == presets.RECIPE_OF_DATA
    epochs, amount, size = cost(built, madds, resolution)
    assert f"Cost: {epochs} epochs of 1.28 million images{size}, {amount} multiply-adds in training." in docstring
    assert f"--config=configs/{path.name}:path=IMAGENET" in docstring
    others = OTHER_RECIPE.findall(docstring)
    assert ("Other recipes (path=IMAGENET,recipe=NAME)" in docstring) == bool(others)
    for name, _, *printed, more in others:
        *expected, size = cost(config.load(f"{path}:recipe={name}").config, madds, resolution)
        assert printed == expected
        assert more.strip().startswith(size.strip())


OTHER_RECIPE = re.compile(r"^    (\w+) +([\d.]+|none) +(\d+) epochs  (\d\.\de\d+)(.*)$", re.MULTILINE)
"""A line of a docstring: name, top-1, epochs, multiply-adds, remarks."""


def cost(built, madds, resolution):
    """Returns epochs, multiply-adds and image sizes of a training, as docstrings print them.

    Args:
      built: config of the training.
      madds: multiply-adds for an image of ``resolution``.
      resolution: resolution in pixels.
    """
    shapes, epochs = checks.batch_shapes(built), built.train.epochs
    share = sum(images * (size / resolution) ** 2 for size, images in shapes) / sum(images for _, images in shapes)
    # Three passes of the network for each image: one forward, two backward.
    amount = f"{3 * madds * share * 1_281_167 * epochs:.1e}".replace("e+", "e")
    sizes = [str(size) for size, _ in shapes if len(shapes) > 1 or size != resolution]
    return f"{epochs:.0f}", amount, f" at {' to '.join(dict.fromkeys((sizes[0], sizes[-1])))} px" if sizes else ""


NAMES = {
    "v3_large": "mobilenet_v3_large",
    "v3_small": "mobilenet_v3_small",
    "v3_large_minimalistic": "mobilenet_v3_large_minimalistic",
    "v3_small_minimalistic": "mobilenet_v3_small_minimalistic",
    "v4_conv_s": "mobilenet_v4_conv_small",
    "v4_conv_m": "mobilenet_v4_conv_medium",
    "v4_conv_l": "mobilenet_v4_conv_large",
    "v4_hybrid_m": "mobilenet_v4_hybrid_medium",
    "v4_hybrid_l": "mobilenet_v4_hybrid_large",
    "resnet50": "resnet50",
}


@pytest.mark.parametrize(
    ("arg", "resolution"),
    [
        ("", 256),
        ("res=96", 96),
        ("data=imagenet", 256),
        ("data=folder:DIR", 256),
        ("data=tfds:mnist,res=64", 64),
        ("data=digits", 32),
        ("data=cifar10", 32),
        ("data=cifar10,res=64", 64),
        ("data=cifar10,recipe=paper", 256),
        ("data=folder:DIR,recipe=cifar", 32),
    ],
)
def test_resolution_is_the_arguments_else_the_recipes_else_the_networks(arg, resolution):
    built = config.load(f"{ROOT / 'configs' / 'v4_conv_m.py'}:{arg}").config
    assert built.data.resolution == resolution


def test_w1_0_alone_is_the_papers():
    paper = config.load(W1).config
    assert (paper.data.name, paper.data.resolution, paper.data.batch_size) == ("imagenet", 224, 96)
    assert (paper.optim.name, paper.peak_lr, paper.optim.decay_factor) == ("rmsprop", 0.045, 0.98)
    assert (paper.optim.weight_decay, paper.optim.weight_decay_on) == (4e-5, "no_depthwise")


@pytest.mark.parametrize(("arg", "overrides"), [(":batch=192", []), ("", ["data.batch_size=192"])])
def test_learning_rate_follows_the_batch_size(arg, overrides):
    built = config.load(W1 + arg, overrides).config
    assert built.peak_lr == pytest.approx(0.09)
    assert config.to_dict(built)["optim"]["peak_lr"] is None  # so that it follows another batch, too


def test_learning_rate_of_a_runs_json_follows_the_batch_unless_it_was_set(tmp_path):
    for override, expected in ([], 0.09), (["optim.peak_lr=0.2"], 0.2):
        run = config.load(W1, override).config
        tree = config.to_dict(run)
        for number in tree["optim"]["peak_lr"], run.peak_lr:  # 0.4.0 wrote the number even where it was unset
            tree["optim"]["peak_lr"] = number
            (tmp_path / "config.json").write_text(json.dumps(tree))
            built = config.load(str(tmp_path / "config.json"), ["data.batch_size=192"]).config
            assert built.peak_lr == pytest.approx(expected)
            assert config.differences(config.build(tree), run) == []
            assert config.differences(config.build(tree), config.load(str(tmp_path / "config.json")).config) == []
    (tmp_path / "config.json").rename(tmp_path / "mine.json")
    assert config.load(str(tmp_path / "mine.json"))[0] == "mine"


def test_a_key_that_is_gone_is_passed_over_in_files_where_nothing_was_said(tmp_path):
    (tmp_path / "w1_0.py").write_text(pathlib.Path(W1).read_text() + OLD)
    tree = config.to_dict(config.load(W1).config)
    for trust_clip in (False, True, None):
        tree["optim"]["trust_clip"] = trust_clip
        (tmp_path / "config.json").write_text(json.dumps(tree))
        for spec in (str(tmp_path / "config.json"), f"{tmp_path / 'w1_0.py'}:{trust_clip}"):
            if trust_clip is False:
                assert config.load(spec).config == config.load(W1).config
                continue
            with pytest.raises(UserError, match=rf"^optim\.trust_clip={trust_clip}: ") as caught:
                config.load(spec)
            assert "\n" not in str(caught.value)


OLD = """
def get_config(arg, new=get_config):
    config = new()
    config.optim.trust_clip = {"False": False, "True": True, "None": None}[arg]
    return config
"""


def test_a_recipe_brings_its_data_unless_others_are_asked_for():
    assert config.load(f"{W1}:recipe=cifar").config.data.name == "cifar10"
    assert config.load(f"{W1}:recipe=cifar,data=digits").config.data.name == "digits"


def test_a_data_set_brings_its_recipe_unless_another_is_asked_for():
    names = {"imagenet": "rmsprop", "cifar10": "sgd", "folder:DIR": "sgd", "tfds:mnist": "sgd"}
    assert {data: config.load(f"{W1}:data={data}").config.optim.name for data in names} == names
    assert config.load(f"{W1}:data=folder:DIR,recipe=paper").config.optim.name == "rmsprop"


def test_fine_tuning_is_the_same_whatever_the_data():
    finetune = ROOT / "configs" / "finetune.py"
    for arg in ("", "data=folder:DIR", "data=tfds:mnist", "data=cifar10"):
        built = config.load(f"{finetune}:{arg}").config
        assert (built.init.head, built.peak_lr, built.data.resolution) == ("new", 0.02, 224)
    assert config.load(f"{finetune}:data=folder:DIR,recipe=scratch").config.init.head == "load"


def test_overrides_win_in_order():
    built = config.load(W1, ["optim.peak_lr=0.3", "optim.peak_lr=0.2", "data.crop_area=(0.2, 1)", "seed=7"]).config
    assert built.peak_lr == 0.2
    assert built.data.crop_area == (0.2, 1.0)
    assert built.seed == 7


def test_none_is_a_choice_in_one_key_and_unset_in_another():
    overrides = ["augment.color=none", "optim.ema_decay=none", "train.steps=None", "data.flip=false"]
    built = config.load(W1, overrides).config
    assert (built.augment.color, built.optim.ema_decay, built.train.steps, built.data.flip) == (
        "none",
        None,
        None,
        False,
    )


def test_arguments():
    built = config.load(f"{W1}:data=folder:/some/where,res=96,classes=3,batch=20,recipe=cifar").config
    assert (built.data.name, built.data.path, built.data.resolution) == ("folder", "/some/where", 96)
    assert (built.model.num_classes, built.data.batch_size, built.norm.group_size) == (3, 20, 20)
    assert built.model.strides == (1, 1, 2, 2, 2)
    assert config.load(f"{W1}:data=digits,batch=48").config.norm.group_size == 16
    built = config.load(f"{W1}:data=tfds:mnist,path=/data").config
    assert (built.data.name, built.data.path) == ("tfds:mnist", "/data")


@pytest.mark.parametrize(
    "text", ["2024_06_01", "1.10", "1e5", "007", "-1", "(2,3)", "[1]", "{}", "true", "none", "null", "'a'", "12:30", ""]
)
def test_a_name_is_the_text_as_it_stands(text, tmp_path):
    built = config.load(W1, [f"data.path={text}", f"data.eval_split={text}", f"init.weights={text}"]).config
    assert (built.data.path, built.data.eval_split, built.init.weights) == (text, text, text)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(built)))
    assert config.load(str(tmp_path / "config.json")).config == built
    if text and "," not in text:
        assert config.load(f"{W1}:data=folder:{text}").config.data.path == text
        assert config.load(f"{W1}:path={text}").config.data.path == text
        assert config.load(W1, [f"finetune.train_from={text}"]).config.finetune.train_from == (text.strip("[]"),)


def test_only_the_word_none_unsets_a_name():
    for override, path in ([], "None"), (["data.path=None"], None), (["data.path=./None"], "./None"):
        assert config.load(f"{W1}:data=folder:None", override).config.data.path == path
    with pytest.raises(UserError, match=r"data\.path"):  # Python has made another number of it
        config.build({"data": {"path": 2024_06_01}})


@pytest.mark.parametrize("text", ["(1.10, 2_0)", "['1.10', \"2_0\"]", "(1.10,2_0,)"])
def test_several_names_are_texts_too(text):
    override = [f"finetune.train_from={text}", "finetune.unfreeze_epochs=(2,)"]
    assert config.load(W1, override).config.finetune.train_from == ("1.10", "2_0")


@pytest.mark.parametrize(
    ("arg", "recipe", "folder"),
    [
        ("", "paper", "runs/w1_0"),
        ("path=DIR,res=96,batch=32,classes=7", "paper", "runs/w1_0"),
        ("data=imagenet,recipe=paper", "paper", "runs/w1_0"),
        ("data=digits", "digits", "runs/w1_0-digits"),
        ("data=digits,batch=32", "digits", "runs/w1_0-digits"),
        ("data=synthetic,recipe=tfmg_v2", "tfmg_v2", "runs/w1_0-synthetic-tfmg_v2"),
        ("recipe=digits", "digits", "runs/w1_0-digits"),
        ("data=cifar10,path=DIR", "cifar", "runs/w1_0-cifar10"),
        ("recipe=cifar", "cifar", "runs/w1_0-cifar10"),
        ("data=folder:DIR", "scratch", "runs/w1_0-folder"),
        ("data=tfds:food101/a:1.0.0", "scratch", "runs/w1_0-tfds_food101_a_1.0.0"),
        ("data=imagenet_r", "paper", "runs/w1_0-imagenet_r"),
        ("recipe=corenet_v2", "corenet_v2", "runs/w1_0-corenet_v2"),
        ("data=imagenet,recipe=corenet_v2", "corenet_v2", "runs/w1_0-corenet_v2"),
        ("data=digits,recipe=paper", "paper", "runs/w1_0-digits-paper"),
        ("data=imagenet,recipe=digits", "digits", "runs/w1_0-imagenet-digits"),
    ],
)
def test_the_usual_folder_tells_data_and_recipe_apart(arg, recipe, folder):
    for _ in range(2):
        loaded = config.load(f"{W1}:{arg}")
        assert (loaded.recipe, loaded.workdir, loaded.name) == (recipe, folder, folder.removeprefix("runs/"))
    finetune = config.load(f"{ROOT}/configs/finetune.py:data=folder:DIR")
    assert (finetune.recipe, finetune.workdir) == ("finetune", "runs/finetune")


def test_every_value_has_an_origin(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(pathlib.Path(W1).read_text() + MINE)
    loaded = config.load(f"{file}:data=cifar10:DIR,res=64,batch=16", ["train.steps=3", "optim.ema_decay=None"])
    assert list(loaded.origins) == list(config.OPTIONS)
    assert {key for key, origin in loaded.origins.items() if origin == "file"} == {
        *("model.name", "model.width"),  # arguments of the preset,
        *("optim.momentum", "seed"),  # and set afterwards
    }
    assert loaded.explicit_keys == {
        *("data.name", "data.path", "data.resolution", "data.eval_resolution", "data.batch_size"),
        *("train.steps", "optim.ema_decay"),
    }
    recipes = {"data.crop", "model.dropout", "norm.group_size", "optim.nesterov"}
    assert {key: loaded.origins[key] for key in recipes} == dict.fromkeys(recipes, "recipe")
    assert loaded.origins["log.every_steps"] == loaded.origins["optim.peak_lr"] == "default"
    alone = config.load(str(file)).origins
    assert (alone["data.name"], alone["data.resolution"], alone["data.batch_size"]) == ("file", "recipe", "recipe")
    assert config.load(f"{file}:recipe=corenet_v2").origins["data.name"] == "recipe"
    (tmp_path / "some.json").write_text('{"data": {"batch_size": 8}, "optim": {"trust_clip": false}}')
    some = config.load(str(tmp_path / "some.json"), ["seed=3"])
    assert (
        {key for key in some.origins if some.origins[key] != "default"}
        == some.explicit_keys
        == {"data.batch_size", "seed"}
    )
    (tmp_path / "plain.py").write_text(PLAIN)
    plain = config.load(str(tmp_path / "plain.py"))
    assert (plain.recipe, plain.workdir, plain.origins["optim.name"]) == ("", "runs/plain", "file")


MINE = """
def get_config(arg, preset=get_config):
    config = preset(arg)
    config.optim.momentum = 0.8
    config.seed = 5
    return config
"""
PLAIN = """
import ml_collections

def get_config(arg):
    return ml_collections.ConfigDict({"optim": {"name": "sgd"}})
"""


@pytest.mark.parametrize(
    "text",
    ["{cat: 3, 'a, b': .5}", "{ 'cat':3,\"a, b\": 5e-1, }", "cat:3, 'a, b':0.5", [("cat", 3), ("a, b", 0.5)]],
)
def test_numbers_by_name(text, tmp_path):
    expected = (("cat", 3.0), ("a, b", 0.5))
    tree = {"loss": {"class_weights": dict(text) if isinstance(text, list) else text}}
    built = config.build(tree) if isinstance(text, list) else config.load(W1, [f"loss.class_weights={text}"])[1]
    assert built.loss.class_weights == expected
    again = config.build(json.loads(json.dumps(config.to_dict(built))))
    assert (again, config.differences(built, again)) == (built, [])
    assert config.build({"loss": {"class_weights": {0: 2, 10: 1}}}).loss.class_weights == (("0", 2.0), ("10", 1.0))


REFUSED = [
    ("", ["loss.class_weights={}"], "loss.class_weights={} "),
    ("", ["loss.class_weights={cat: 0}"], "loss.class_weights: class 'cat'"),
    ("", ["loss.class_weights={cat: -1, dog: 2}"], "loss.class_weights: class 'cat'"),
    ("", ["loss.class_weights={cat: 1, cat: 2}"], "loss.class_weights: class 'cat'"),
    ("", ["loss.class_weights={cat: many}"], "--config.loss.class_weights={cat: many}: "),
    ("", ["loss.class_weights=cat=3"], "--config.loss.class_weights=cat=3: "),
    ("", ["loss.class_weights={cat: inf}"], "loss.class_weights=inf "),
    ("", ["loss.class_weights=balancd"], "did you mean 'balanced'?"),
    ("dta=cifar10", [], "unknown argument 'dta'; did you mean 'data'?"),
    ("res=big", [], "res=big "),
    ("batch=0", [], "batch=0 "),
    ("res=", [], "'res'"),
    ("res=32,res=64", [], "'res' is given twice"),
    ("data=folder:/a,b/c", [], "belongs to 'folder:/a', set the path with --config.data.path"),
    ("data=tfds:x,path=/a,b=2/c", [], "belongs to '/a', set the path with --config.data.path"),
    ("data=folder:/a,batch", [], "as in batch=…; if that belongs to 'folder:/a', "),
    ("data=imagenet:/a,data=b/c", [], "given twice; if that belongs to 'imagenet:/a', "),
    ("recipe=papper", [], "did you mean 'paper'?"),
    ("data=folder:a,path=b", [], "both give the path"),
    ("data=digits,path=b", [], "data=digits comes with scikit-learn; leave 'b' out"),
    ("data=digits:b", [], "data=digits comes with scikit-learn; leave 'b' out"),
    ("data=synthetic,path=b", [], "data=synthetic is made on the fly; leave 'b' out"),
    ("", ["train.epochs=1e9"], "train.epochs=1000000000.0 is out of range; it must be above 0 and at most 1e+06"),
    ("", ["data.eval_crop_fraction=1e-9"], "data.eval_crop_fraction=1e-09 is out of range"),
    ("", ["data.crop_ratio=(1e-310, 1e308)"], "each must be at least 0.01 and at most 100"),
    ("", ["data.mean=[-1e300, 0, 0]"], "data.mean=[-1e+300, 0.0, 0.0] is out of range"),
    ("", ["data.std=[1e-30, 1, 1]"], "must be at least 0.001"),
    ("", ["optim.reference_lr=1e308", "optim.reference_batch_size=1"], "data.batch_size=96"),
    ("", ["seed=" + 20_000 * "-" + "1"], "expected int"),
    ("", ["optim.peek_lr=1"], "unknown config key 'optim.peek_lr'; did you mean 'optim.peak_lr'?"),
    ("", ["peak_lr=1"], "unknown config key 'peak_lr'; did you mean 'optim.peak_lr'?"),
    ("", ["optimm.peak_lr=1"], "unknown config key 'optimm'"),
    ("", ["model.width=0"], "model.width=0.0 is out of range; it must be above 0"),
    ("", ["model.width=wide"], "model.width='wide' is str; expected float"),
    ("", ["model.width=nan"], "model.width='nan' is str; expected float"),
    ("", ["model.width=1e999"], "model.width=inf is not finite"),
    ("", ["data.flip=1"], "data.flip=1 is int; expected bool"),
    ("", ["seed=True"], "seed=True is bool; expected int"),
    ("", ["seed=-1"], "seed=-1 is out of range"),
    ("", ["data.batch_size=9.5"], "data.batch_size=9.5 is float; expected int"),
    ("", ["data.mean=(0.5, 0.5)"], "data.mean=(0.5, 0.5) has 2 entries; expected 3"),
    ("", ["model.padding=symetric"], "did you mean 'symmetric'?"),
    ("", ["model.output_stride=12"], "model.output_stride=12 is not a choice"),
    ("", ["model=3"], "config key 'model' is a section"),
    ("", ["model.width.x=3"], "'model.width' is a value, not a section"),
    ("", ["optim.warmup_epochs=500"], "optim.warmup_epochs=500 is longer than train.epochs=412"),
    ("", ["optim.schedule=step"], "needs optim.milestones_epochs"),
    ("", ["data.crop_area=(0.5, 0.2)"], "data.crop_area"),
    ("", ["train.steps=99999999999999999999"], "is out of range"),
    ("", ['model={"width": 0.5}'], "'model' is a section; set one of its keys"),
    (
        "",
        ["data.holdout_fraction=0.1", "data.eval_split=test"],
        "data.eval_split='test' and data.holdout_fraction=0.1 ",
    ),
    ("batch=97", [], "batch=97 "),
    ("", ["loss.label_smoothing=1"], "loss.label_smoothing=1.0 is out of range"),
    ("", ["augment.mixup_alpha=0.2", "norm.group_size=1"], "norm.group_size=1"),
    ("", ["augment.erase_probability=1", "augment.erase_area=(0.5, 0.2)"], "augment.erase_area"),
    ("", ["augment.color=jitter", "augment.color_jitter=(0, 0, 0, 0.6)"], "augment.color_jitter"),
    ("", ["optim.lr_noise=(0.9, 0.4)"], "optim.lr_noise"),
    ("", ["optim.lr_noise=(0.4, 0.4)"], "optim.lr_noise"),
    ("", ["data.scales=(128, 128)"], "data.scales"),
    ("", ["data.scales=(128, 5000)"], "data.scales"),
    ("", ["model.strides=(2, 2, 2, 2)"], "model.strides"),
    ("", ["model.strides=(2, 2, 2, 2, 3)"], "model.strides"),
    ("", ["optim.schedule=step", "optim.milestones_epochs=(2, 1)"], "optim.milestones_epochs"),
    ("", ["finetune.train_from=(classifier, stem)", "finetune.unfreeze_epochs=(0,)"], "finetune.unfreeze_epochs"),
    ("", ["finetune.train_from=(classifier, stem)"], "finetune.unfreeze_epochs"),
    ("", ["finetune.train_from=()"], "finetune.train_from"),
    ("", ["distill.teacher=a", "distill.logits=b"], "distill.teacher and distill.logits"),
    ("", ["distill.teacher=a", "distill.weight=0"], "distill.weight=0 "),
    ("", ["distill.logits=a.npz", "distill.weight=0"], "set distill.logits to None"),
    ("recipe=paper_v3", [], "recipe=paper_v3 can't be run"),
    ("", ["optim.name=lamb"], "optim.name='lamb' is not a choice"),
    ("", ["optim.trust_clip=False"], "--config.optim.trust_clip"),
    ("", ["optim.trust_clip=True"], "optim.trust_clip=True"),
]


@pytest.mark.parametrize(("arg", "overrides", "message"), REFUSED)
def test_refused_in_one_line(arg, overrides, message):
    with pytest.raises(UserError) as caught:
        config.load(f"{W1}:{arg}" if arg else W1, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "name", "resolution"),
    [
        ("a.py:res=96", "a", 96),
        ("a.py", "a", 224),
        ("a.py:", "a", 224),
        ("a.py:path=b.py:c", "a", 224),
        ("a.py:b/c.py:res=96", "c", 96),
        ("a.py:b/c.py", "c", 224),
        ("12:30/w.py:res=96", "w", 96),
        ("12:30.py:res=96", "12:30", 96),
        ("runs/12:30/config.json", "12:30", 224),
        ("a.py:b/config.json", "a.py:b", 224),
    ],
)
def test_an_argument_stands_behind_py_and_a_colon(tmp_path, monkeypatch, spec, name, resolution):
    monkeypatch.chdir(tmp_path)
    for file in ("a.py", "a.py:b/c.py", "12:30/w.py", "12:30.py"):
        pathlib.Path(file).parent.mkdir(exist_ok=True)
        shutil.copy(W1, file)
    for folder in ("runs/12:30", "a.py:b"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        pathlib.Path(folder, "config.json").write_text(json.dumps(config.to_dict(config.load(W1).config)))
    loaded = config.load(spec)
    assert (loaded.name, loaded.config.data.resolution) == (name, resolution)
    assert ("data.resolution" in loaded.explicit_keys) == ("res=" in spec or spec.endswith(".json"))


@pytest.mark.parametrize("arg", ["", ":", ":data=digits,res=64", ":data=folder:a.py:b/c.py"])
def test_configs_by_name_from_any_folder(tmp_path, monkeypatch, arg):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("w1_0.py").write_text("no config")
    pathlib.Path("w1_0").mkdir()
    assert config.load(f"w1_0{arg}") == config.load(f"{W1}{arg}")
    with pytest.raises(UserError, match=r"w1_0\.py"):
        config.load("w1_0.py")
    assert set(config.config_files()) == {path.stem for path in CONFIGS}


def test_a_file_is_not_meant_by_its_stem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(W1, "mine.py")
    with pytest.raises(UserError, match=r"'mine\.py'"):
        config.load("mine")
    assert config.load("mine.py:res=96").workdir == "runs/mine"


OWN_RECIPES = """
from mnv2_jax import presets
from mnv2_jax.recipes import SCRATCH, but

RECIPES = {
    "short": {"data": {"name": "digits"}, "optim": {"reference_lr": 0.02}, "train": {"epochs": 3.0}},
    "gentle": lambda model, width: but(SCRATCH, optim=dict(peak_lr=0.1 * width)),
    "nowhere": {"optim": {"peak_lr": 0.02}},
}

def get_config(arg=""):
    return presets.preset(arg, data="digits", recipe="short", recipes=RECIPES, name="mobilenet_v2", width=0.35)
"""


def test_recipes_of_a_file_outside_the_repository(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN_RECIPES)
    loaded = config.load(f"{path}:res=32")
    assert (loaded.name, loaded.recipe, loaded.config.data.name) == ("mine", "short", "digits")
    assert (loaded.config.optim.reference_lr, loaded.origins["optim.reference_lr"]) == (0.02, "recipe")
    assert config.load(f"{path}:batch=16").config.data.batch_size == 16
    gentle = config.load(f"{path}:recipe=gentle,path=DIR")
    assert (gentle.name, gentle.config.data.name) == ("mine-gentle", "folder")
    assert gentle.config.optim.peak_lr == pytest.approx(0.035)
    assert config.load(f"{path}:recipe=digits").config.optim.reference_lr == 0.05
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict(loaded.config)))
    path.unlink()
    assert config.load(str(tmp_path / "run" / "config.json")).config == loaded.config


@pytest.mark.parametrize(("name", "arg"), [("gentle", "shrot"), ("gentle", "nowhere"), ("paper", "short")])
def test_recipes_that_can_not_be(tmp_path, name, arg):
    path = tmp_path / "mine.py"
    path.write_text(OWN_RECIPES.replace("gentle", name))
    with pytest.raises(UserError, match="'paper'" if name == "paper" else f"recipe={arg}"):
        config.load(f"{path}:recipe={arg}")


PRESET = "from mnv2_jax.presets import preset\ndef get_config(arg):\n"


def test_files_that_are_not_there_or_not_configs(tmp_path):
    for spec, message in [
        (str(ROOT / "configs" / "w1.py"), "no file"),
        ("nowhere/w1_0.py", "there is no folder 'nowhere'"),
        ("configs/w1_0", "--config=configs/w1_0: .*--config=w1_0:res=128"),
        ("w1_00", "'w1_0'"),
        ("w1_00:data=digits", "'w1_0'"),
        ("12", "'12'"),
        ("12:30.py", "no file '12:30.py'"),
        ("runs/12:30/config.json:res=96", "json:res=96: .*--config=w1_0:res=128"),
        ("runs/12:30/w1_0.py:res=96", "there is no folder 'runs/12:30'"),
        (f"{300 * 'x'}/w1_0.py", "there is no folder"),
    ]:
        with pytest.raises(UserError, match=message):
            config.load(spec)
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(arg):\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"ZeroDivisionError.*broken\.py:2"):
        config.load(str(broken))
    for text, message in (
        ("def get_confg(arg): ...", "'get_confg'"),
        ("def get_config(arg): ...", "returned None"),
        ("def get_config(arg): return {}", "returned {}"),
        (f"{PRESET}    preset(arg, data='digits', recipe='digits').trian.n = 1", "train"),
    ):
        broken.write_text(text)
        with pytest.raises(UserError, match=message):
            config.load(str(broken))
    torn = tmp_path / "torn.json"
    torn.write_text('{"seed": ')
    with pytest.raises(UserError, match=r"torn\.json"):
        config.load(str(torn))


def test_digits_and_cifar_train_on_up_to_four_devices_as_they_are():
    for data in ("digits", "cifar10"):
        for devices in (1, 2, 4):
            config.check_devices(config.load(f"{W1}:data={data}").config, devices)


def test_devices_must_divide_the_batch_and_groups_the_microbatch():
    built = config.load(W1).config
    for devices in (1, 3, 8):
        config.check_devices(built, devices)
    for overrides, nearest in ((["norm.group_size=36"], 32), (["optim.accumulate_steps=2"], 24)):
        with pytest.raises(UserError, match=rf"norm.group_size=\d+ .*: {nearest}$"):
            config.check_devices(config.load(W1, overrides).config, 1)
    with pytest.raises(UserError, match=r"data.batch_size=96 .* 5 devices .*: 95$"):
        config.check_devices(built, 5)


def test_what_may_differ_between_a_run_and_its_resumption():
    old = config.load(W1).config
    same = ["log.every_steps=1", "checkpoint.keep_best=3", "data.path=/elsewhere", "data.num_workers=7"]
    assert config.differences(old, config.load(W1, same).config) == []
    assert config.differences(old, config.load(W1, ["optim.peak_lr=1"]).config) == ["optim.peak_lr: 0.045 -> 1.0"]


NUMBERS = (int, float)


def kinds(option):
    """Returns the types of an option's value other than None; for a tuple, those of its entries."""
    kinds = [kind for kind in typing.get_args(option.type) or (option.type,) if kind not in (types.NoneType, ...)]
    return {inner for kind in kinds for inner in typing.get_args(kind) or (kind,)}


def unbounded(options):
    """Returns the keys of options that are numbers or tuples of numbers and have no bounds."""
    return {
        key
        for key, option in options.items()
        if kinds(option) & set(NUMBERS) and not any(isinstance(rule, rules.Within) for rule in option.rules)
    }


def test_every_number_has_bounds():
    assert unbounded(config.OPTIONS) == set()
    for kind in (int, float | None, tuple[int, ...], tuple[float, float] | None):
        assert unbounded({"new": Option(kind, None, (rules.Growing(),), ())}) == {"new"}
    assert unbounded({"new": Option(str, "", (), ()), "other": Option(bool, False, (), ())}) == set()


def test_what_is_said_beside_a_type_is_a_rule_or_a_condition_and_its_default_keeps_it():
    for key, option in config.OPTIONS.items():
        for rule in option.rules:
            assert isinstance(rule, rules.Rule), key
            assert option.default is None or not rule.fault(option.default), key


def test_conditions_name_keys_that_exist_and_values_that_these_can_have():
    conditions = [condition for option in config.OPTIONS.values() for condition in option.conditions]
    compared = [pair for condition in conditions for pair in condition.compared]
    assert len(compared) > 50
    for key, value in compared:
        kind = config.OPTIONS[key].type
        if isinstance(value, rules.Within):
            assert kinds(config.OPTIONS[key]) & set(NUMBERS), key
        elif typing.get_origin(kind) is typing.Literal:
            assert value in typing.get_args(kind), key
        elif value is None:
            assert types.NoneType in typing.get_args(kind), key
        elif not isinstance(value, rules.Ending):
            section, _, leaf = key.rpartition(".")
            config.build({section: {leaf: value}} if section else {leaf: value})  # of its type, and in its range


def test_every_option_is_read_by_somebody():
    read = set()
    for path in (ROOT / "mnv2_jax").rglob("*.py"):
        if path.parent.name == "config":  # checks a value, but makes nothing of it
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):  # optim.peak_lr, config.optim.peak_lr
                owner = node.value
                section = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", None)
                read.add(f"{section}.{node.attr}")
    unread = set()
    for key in config.OPTIONS:
        section, _, leaf = key.rpartition(".")
        if not {f"{owner}.{leaf}" for owner in SECTION_NAMES.get(section, (section,))} & read:
            unread.add(key)
    assert unread == RESOLVED_INTO_PEAK_LR


RESOLVED_INTO_PEAK_LR = {"optim.peak_lr", "optim.reference_lr", "optim.reference_batch_size"}
SECTION_NAMES = {
    "": ("config", "settings"),
    "checkpoint": ("checkpoint", "_keep"),
}


IDLE = [
    ("recipe=paper", ["optim.nesterov=True"], "optim.nesterov", "optim.name=sgd"),
    ("recipe=cifar", ["optim.momentum=0", "optim.nesterov=True"], "optim.nesterov", "optim.momentum above 0"),
    ("recipe=cifar", ["optim.name=adamw", "optim.momentum=0.8"], "optim.momentum", "sgd or rmsprop"),
    ("recipe=cifar", ["optim.decay_factor=0.5"], "optim.decay_factor", "exponential or step"),
    ("recipe=cifar", ["optim.peak_lr=1", "optim.reference_lr=0.2"], "optim.reference_lr", "optim.peak_lr=None"),
    ("data=digits", ["data.path=/somewhere"], "data.path", "other than digits"),
    ("data=digits", ["data.crop_area=(0.5, 1)"], "data.crop_area", "data.crop=random_resized"),
    ("", ["augment.policy_layers=3"], "augment.policy_layers", "augment.policy=randaugment"),
    ("", ["augment.erase_fill=noise"], "augment.erase_fill", "augment.erase_probability above 0"),
    ("", ["augment.cutmix_share=0.1", "augment.mixup_alpha=1"], "augment.cutmix_share", "augment.cutmix_alpha above 0"),
    ("", ["distill.temperature=2"], "distill.temperature", "distill.teacher set or distill.logits set"),
    ("", ["model.drop_path_rule=flat"], "model.drop_path_rule", "model.drop_path above 0"),
    ("recipe=corenet_v2", ["optim.warmup_epochs=1"], "optim.warmup_epochs", "optim.warmup_steps=None"),
    ("data=digits", ["data.skip_corrupt=True"], "data.skip_corrupt", "data.name other than digits"),
    ("data=digits", ["data.num_workers=0"], "data.num_workers", "data.name other than digits"),
    ("data=cifar10:a/cifar10.npz", ["data.skip_corrupt=True"], "data.skip_corrupt", "data.path other than ….npz"),
    ("data=cifar10:a/cifar10.npz", ["data.num_workers=2"], "data.num_workers", "data.path other than ….npz"),
    ("", ["finetune.train_from=classifier", "norm.decay=0.95"], "norm.decay", "train_from other than classifier"),
    ("", ["distill.teacher=a", "distill.weight=1", "loss.class_weights=none"], "loss.class_weights", "distill.weight"),
    ("recipe=cifar", ["optim.warmup_init_lr=0.01"], "optim.warmup_init_lr", "optim.warmup_epochs above 0"),
    ("", ["optim.warmup_steps=0", "optim.warmup_to=schedule"], "optim.warmup_to", "optim.warmup_steps above 0"),
    ("", ["optim.name=sgd", "optim.weight_decay=0", "optim.weight_decay_on=all"], "optim.weight_decay_on", "optim.l2"),
]


@pytest.mark.parametrize(("arg", "overrides", "key", "condition"), IDLE)
def test_an_override_that_changes_nothing_is_refused(arg, overrides, key, condition):
    with pytest.raises(UserError) as caught:
        config.load(f"{W1}:{arg}", overrides)
    assert f"--config.{key} has no effect" in str(caught.value)
    assert condition in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_is_accepted_with_what_reads_it():
    built = config.load(f"{W1}:recipe=paper", ["optim.name=sgd", "optim.nesterov=True", "optim.momentum=0.8"]).config
    assert built.optim.nesterov
    assert config.load(f"{W1}:recipe=paper", ["optim.reference_lr=0.09"]).config.peak_lr == 0.09
    assert config.load(f"{W1}:data=cifar10:DIR", ["data.num_workers=2"]).config.data.num_workers == 2  # maybe of images
    config.load(f"{W1}:data=digits", ["finetune.train_from=classifier"])  # whose recipe has a norm.decay


def run(*arguments, **variables):
    command = [sys.executable, "-m", "mnv2_jax.main", *arguments]
    environment = os.environ | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_config_is_shown_with_origins():
    spec, override = f"--config={W1}:data=digits,batch=32", "--config.log.every_steps=7"
    shown = run("--mode=config", spec, override, JAX_PLATFORMS="nowhere")  # JAX isn't asked
    assert (shown.returncode, shown.stderr) == (0, "")
    head, *lines = shown.stdout.splitlines()
    assert "runs/w1_0-digits" in head
    assert "recipe digits" in head
    sections = "\n".join(lines).split("\n\n")
    keys = [
        f"{title}.{line[2:].split()[0]}" if title else line[2:].split()[0]
        for title, *rows in (("", *sections[0].splitlines()[1:]), *map(str.splitlines, sections[1:]))
        for line in rows
    ]
    assert keys == list(config.OPTIONS)
    rows = {
        key: line.split() for key, line in zip(keys, (line for line in lines if line[:2] in ("* ", "  ")), strict=True)
    }
    assert rows["log.every_steps"][:4] == ["*", "every_steps", "7", "flag"]
    assert rows["data.batch_size"][:4] == ["*", "batch_size", "32", "argument"]
    assert rows["optim.clip_grad_norm"][:4] == ["*", "clip_grad_norm", "1.0", "recipe"]
    assert rows["optim.peak_lr"][:4] == ["peak_lr", "None:", "0.025", "default"]
    assert rows["optim.b1"] == ["b1", "0.9", "default", "only", "with", "optim.name=adamw"]
    assert rows["model.name"] == ["name", "mobilenet_v2", "file"]


def test_values_that_weights_will_replace_are_marked():
    assert config.load(W1).from_weights == frozenset()
    loaded = config.load(W1, ["init.weights=w.safetensors", "data.mean=(0,0,0)"])
    assert {"data.std", "norm.epsilon", "model.padding"} <= loaded.from_weights
    assert not {"data.mean", "model.width"} & loaded.from_weights
    origins = json.loads(config.as_json(loaded))["origins"]
    assert {key for key, origin in origins.items() if origin == "weights"} == loaded.from_weights
    assert config.as_text(loaded).count("init.weights") == len(loaded.from_weights)


def test_the_config_is_shown_as_json_that_can_be_given_back(tmp_path):
    spec = f"--config={W1}:data=digits"
    shown = cli.answer(cli.here("main", "--mode=config", spec, "--config.seed=3", "--json"))
    loaded = config.load(f"{W1}:data=digits", ["seed=3"])
    assert shown == {
        "workdir": "runs/w1_0-digits",
        "recipe": "digits",
        "config": config.to_dict(loaded.config),
        "origins": dict(loaded.origins),
        "peak_lr": 0.05,
    }
    (tmp_path / "config.json").write_text(json.dumps(shown["config"]))
    again = cli.answer(cli.here("main", "--mode=config", f"--workdir={tmp_path}", "--json"))
    assert again["config"] == shown["config"]
    assert (again["workdir"], again["recipe"]) == (str(tmp_path), None)
    assert set(again["origins"].values()) == {"json"}
    refused = cli.here("main", "--mode=config", f"--config={W1}", "--config.optim.nesterov=True")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "optim.nesterov" in refused.stderr


def test_command_line_refuses_with_one_line_and_code_2_before_jax():
    refused = run(f"--config={W1}", "--config.optim.peek_lr=1")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert "did you mean 'optim.peak_lr'?" in refused.stderr


def test_command_line_names_the_nearest_flag():
    refused = run(f"--config={W1}", "--work=x")  # which argparse would take for --workdir
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "did you mean '--workdir'?" in refused.stderr


def test_help_is_complete():
    shown = run("--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: python -m mnv2_jax.main ")
    for key in config.OPTIONS:
        assert key in shown.stdout
    assert "recipe" in shown.stdout
