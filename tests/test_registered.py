"""Tests models and data sets that users register."""

import dataclasses
import functools
import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import (
    Classification,
    Dataset,
    Split,
    config,
    create_model,
    open_data,
    register_classification,
    register_dataset,
    register_model,
)
from mnv2_jax.data.sources import known_num_classes
from mnv2_jax.errors import UserError
from mnv2_jax.models import mobilenet_v2
from mnv2_jax.nn.forms import LIBRARY
from mnv2_jax.ops.mixing import Targets
from mnv2_jax.registry import DATASETS, MODELS, TASKS, import_modules
from mnv2_jax.tasks import builtin
from mnv2_jax.tasks.classification import make_task
from mnv2_jax.testing import check_model
from tests import docs

SMALL = dict(width=0.1, depth=0.1)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Registers the network and the data set of the documentation."""
    folder = tmp_path_factory.mktemp("own")
    docs.write_files(docs.LIBRARY, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name, registry in (("my_data", DATASETS), ("my_network", MODELS)):
            patch.setattr(registry, "_registered", {})
            patch.delitem(sys.modules, name, raising=False)
            importlib.import_module(name)
        yield


def test_a_model_of_ones_own_holds_what_the_package_s_do():
    check_model("squeezed_v2", **SMALL)


def test_what_does_not_hold_is_said():
    def too_long(model):
        whole = mobilenet_v2.plan(model, mobilenet_v2.TABLE_2)
        return dataclasses.replace(whole, blocks=(*whole.blocks, dataclasses.replace(whole.blocks[-1], stride=2)))

    def numb(model):
        return mobilenet_v2.plan(dataclasses.replace(model, width=0.1), mobilenet_v2.TABLE_2)

    register_model("too_long", too_long)
    with pytest.raises(UserError, match=r"'too_long'.*6 times.*model\.strides"):
        check_model("too_long", width=0.1)
    register_model("numb", numb)
    with pytest.raises(AssertionError, match="width"):
        check_model("numb", width=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: None, "None"),
        (lambda plan: dataclasses.replace(plan, act="hard_swich"), "'hard_swish'"),
        (lambda plan: dataclasses.replace(plan, head=12.5), r"head=12\.5"),
        (lambda plan: with_option(plan, features=0), "block 1: features=0"),
        (lambda plan: with_option(plan, squezed=8), "'squeezed'"),
    ],
)
def test_a_plan_that_is_none_is_one_line(monkeypatch, change, message):
    monkeypatch.setattr(MODELS, "_registered", {})
    register_model("mine", lambda model: change(mobilenet_v2.plan(model, mobilenet_v2.TABLE_2)))
    with pytest.raises(UserError, match=f"'mine'.*{message}"):
        create_model("mine", 3)


def with_option(plan, **options):
    first, *others = plan.blocks
    return dataclasses.replace(plan, blocks=(dataclasses.replace(first, options=first.options.copy(options)), *others))


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: register_model("mobilenet_v2", mobilenet_v2.plan), "'mobilenet_v2' is the package's own"),
        (lambda: register_model("My Net", mobilenet_v2.plan), "lower-case letters"),
        (lambda: register_model("squeezed_v2", mobilenet_v2.plan), "my_network"),
        (lambda: register_dataset("digits", print), "'digits'"),
        (lambda: register_dataset("a:b", print), "colon"),
        (lambda: register_dataset("a", eval("lambda: 0", {"__name__": "__main__"})), "file of its own"),
        (lambda: register_model("a", mobilenet_v2.plan, options=("widht",)), "width, depth, activation"),
        (lambda: register_classification("a", type("Mine", (Classification,), {"label_los": 1})), "'label_loss'"),
        (lambda: register_model("a", eval("lambda: 0", {"__name__": "_config_own"})), "file of its own"),
    ],
)
def test_names_that_are_taken_or_cannot_be(register, message):
    with pytest.raises(UserError, match=message):
        register()


def test_classes_are_counted_without_the_data():
    assert known_num_classes(config.build({"data": {"name": "parity"}}).data) == 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Classification):
    factor: float = 1.0


def test_a_variant_of_classification_may_have_fields_and_a_teacher(monkeypatch):
    monkeypatch.setattr(TASKS, "_registered", {})
    monkeypatch.setattr(builtin, "open_teacher", lambda config, dataset: None)
    register_classification("scaled", functools.partial(Scaled, factor=3.0))
    split = Split.of_arrays("train", np.zeros((2, 8, 8, 3), np.uint8), np.arange(2))
    dataset, kind = Dataset("mine", ("a", "b"), split, split), TASKS.find("scaled")
    task = kind.make(config.Config(), dataset, False)
    taught = kind.make(config.Config(distill=config.DistillConfig(teacher="x")), dataset, False)
    for made in (task, task.training_from("classifier").with_forms(LIBRARY), taught.student):
        assert (type(made), made.factor) == (Scaled, 3.0)
    parent = type("Parent", (Classification,), {"label_loss": lambda self, logits, labels: labels})
    register_classification("again", type("Again", (parent,), {"extra": 1}))  # its parent overrides something
    with pytest.raises(UserError, match="task='classification'"):
        register_classification("classification", Scaled)


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (lambda split: Dataset("mine", ("a", "b"), split, split), "labels of train run from 0 to 2"),
        (lambda split: split, "'mine'.*Dataset"),
        (lambda split: Dataset("mine", tuple("abcd"), split, split), "4 names.*num_classes=3"),
    ],
)
def test_a_data_set_that_is_none_is_refused(monkeypatch, opened, message):
    monkeypatch.setattr(DATASETS, "_registered", {})
    split = Split.of_arrays("train", np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))
    register_dataset("mine", lambda data, evaluates: opened(split), num_classes=3)
    with pytest.raises(UserError, match=message):
        open_data("mine")


def test_arrays_that_are_no_images_and_labels_that_are_none_are_refused():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    for wrong, labels in ((images[..., 0], np.arange(3)), (images / 255, np.arange(3)), (images, np.arange(2))):
        with pytest.raises(UserError, match="of train are"):
            Split.of_arrays("train", wrong, labels)
    with pytest.raises(UserError, match="float64"):
        Split.of_arrays("train", images, np.zeros(3))


def test_images_that_are_read_one_by_one_are_checked_when_they_are_read():
    for wrong in (np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3))):
        with pytest.raises(UserError, match="image 1 of train is"):
            Split("train", np.arange(2), lambda index, wrong=wrong: wrong).example(1)
    with pytest.raises(UserError, match="labels of train are float64"):
        Split("train", np.zeros(2), np.zeros)


@pytest.mark.parametrize("reduced", [lambda losses: losses.mean(), lambda losses: losses[:, None]])
def test_a_loss_that_is_not_one_value_an_image_is_refused(reduced):
    class Reduced(Classification):
        def label_loss(self, logits, labels):
            return reduced(super().label_loss(logits, labels))

    task = make_task(config.Config(), ("a", "b"))
    variant = Reduced(**{field.name: getattr(task, field.name) for field in dataclasses.fields(task)})
    with pytest.raises(UserError, match=r"Reduced\.label_loss.*\[4\]"):
        variant.label_losses(jnp.zeros((4, 2)), Targets(jnp.zeros(4, jnp.int32)))


def test_a_module_that_breaks_is_told_by_its_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("zero", "\n1 / 0\n"), ("torn", "def (\n"), ("lacking", "import nothing_of_this_name\n")):
        (tmp_path / f"{name}_module.py").write_text(text)
        with pytest.raises(UserError, match=rf"{name}_module\.py:[12]\)$"):
            import_modules([f"{name}_module"])
    with pytest.raises(UserError, match="PYTHONPATH"):
        import_modules(["not_there"])
    with pytest.raises(UserError, match=r"--config\.modules=zero_module$"):
        import_modules(["zero_module.py"])


def test_an_option_that_it_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"model\.activation='relu'.*squeezed_v2"):
        create_model("squeezed_v2", 2, activation="relu")
