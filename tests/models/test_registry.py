import pytest

from mnv2_jax.config import ModelConfig, NormConfig
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import create_model, from_config, list_models


def test_lists_by_pattern():
    assert "mobilenet_v2" in list_models()
    assert list_models("*_v2") == ["mobilenet_v2"]
    assert list_models("mobilenet_v4_hybrid*") == ["mobilenet_v4_hybrid_large", "mobilenet_v4_hybrid_medium"]
    assert list_models("efficientnet*") == []


def test_equal_options_give_equal_models():
    model = create_model("mobilenet_v2", 10, width=0.35, norm=NormConfig(group_size=8))
    config = ModelConfig(name="mobilenet_v2", num_classes=10, width=0.35)
    assert model == from_config(config, NormConfig(group_size=8))
    assert hash(model) == hash(from_config(config, NormConfig(group_size=8)))
    assert model != from_config(config, NormConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="mobilnet_v2"), "'mobilnet_v2'.*'mobilenet_v2'"),
        (dict(widht=0.5), "'widht'.*'width'"),
        (dict(width=0), "model.width=0.0 "),
        (dict(width=-0.5), "model.width=-0.5 "),
        (dict(width=float("nan")), "model.width=nan is not finite"),
        (dict(num_classes=1), "model.num_classes=1 "),
        (dict(strides=()), r"model\.strides=.* expected 5"),
        (dict(strides=(3, 2, 2, 2, 2)), r"model\.strides=\[3, 2, 2, 2, 2\] is out of range"),
        (dict(padding="valid"), "model.padding='valid' is not a choice"),
        (dict(activation="tanh"), "model.activation='tanh' is not a choice"),
        (dict(depth=-1), "model.depth=-1.0 is out of range"),
        (dict(norm=NormConfig(epsilon=2.0)), "norm.epsilon=2.0 is out of range"),
        (dict(name="resnet50", width=0.5), r"model.width=0.5: resnet50 .* mobilenet_v1, mob"),
        (dict(name="resnet50", depth=2.0), r"model.depth=2.0: resnet50 .* mobilenet_v2"),
        (dict(name="mobilenet_v3_small", activation="relu"), r"model.activation='relu': .* mobilenet_v1, mobilenet_v2"),
        (dict(reduced_tail="torchvision"), r"reduced_tail='torchvision': mobilenet_v2 .* mobilenet_v3_large"),
        (dict(name="mobilenet_v1", reduced_tail="paper"), r"reduced_tail='paper': mobilenet_v1 .* mobilenet_v2"),
        (dict(width_rule="torchvision"), r"width_rule='torchvision': mobilenet_v2 .* standard"),
    ],
)
def test_refuses_what_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        create_model(**({"name": "mobilenet_v2", "num_classes": 10} | arguments))
