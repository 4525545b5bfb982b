"""Compares initial weights with those of new networks of torchvision and timm, and with Keras' initialisers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.models.network import DROP_PATH_RULES
from mnv2_jax.models.registry import create_model, from_config
from mnv2_jax.nn.initializers import INITS
from mnv2_jax.weights.load import load_weights

pytestmark = pytest.mark.parity


def spread(values):
    """Returns standard deviation and kurtosis (uniform 1.8, normal 3, normal cut at two deviations 2.4)."""
    values = np.asarray(values, np.float64)
    return values.std(), (values**4).mean() / max(values.std(), 1e-30) ** 4


def same(name, our_weights, their_weights):
    """Asserts that two samples agree within the variation of samples of that size."""
    (std, peaked), (other_std, other_peaked) = spread(our_weights), spread(their_weights)
    if other_std == 0:
        np.testing.assert_array_equal(our_weights, their_weights, err_msg=name)
        return
    assert abs(std / other_std - 1) < 5 / our_weights.size**0.5, (name, std, other_std)
    if our_weights.size > 3000:
        assert abs(peaked - other_peaked) < 0.05 + 25 / our_weights.size**0.5, (name, peaked, other_peaked)


def compare(init, model, library, name, tmp_path, **options):
    """Compares all parameters of one of their networks, read through its file, with those of ours."""
    torch = pytest.importorskip("torch")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    weights = load_weights(tmp_path / "model.pth", name, library=library, **options)
    our_model = from_config(dataclasses.replace(weights.model.options, init=init), weights.model.norm)
    drawn = our_model.init(jax.random.key(0, impl="unsafe_rbg"), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    paths = jax.tree_util.tree_flatten_with_path(drawn)[0]
    for (path, our_weights), their_weights in zip(paths, jax.tree.leaves(weights.variables), strict=True):
        same(jax.tree_util.keystr(path, simple=True, separator="/"), our_weights, their_weights)


@pytest.mark.parametrize(
    ("name", "init"), [("mobilenet_v3_small", "torchvision_v3"), ("resnet50", "torchvision_resnet")]
)
def test_torchvision(name, init, operators, tmp_path):
    torchvision = pytest.importorskip("torchvision", reason="pip install .[parity]")
    compare(init, getattr(torchvision.models, name)(), "torchvision", name, tmp_path)


@pytest.mark.parametrize(
    ("their_name", "our_name", "options"),
    [
        ("mobilenetv2_035", "mobilenet_v2", {"width": 0.35}),
        ("mobilenetv3_small_050", "mobilenet_v3_small", {"width": 0.5, "width_rule": "fixed_stem_head"}),
        ("mobilenetv4_hybrid_medium", "mobilenet_v4_hybrid_medium", {}),
    ],
)
def test_timm(their_name, our_name, options, operators, tmp_path):
    timm = pytest.importorskip("timm", reason="pip install .[parity]")
    compare("timm", timm.create_model(their_name), "timm", our_name, tmp_path, **options)


@pytest.mark.parametrize(
    ("their_name", "our_name"), [("mobilenetv2_100", "mobilenet_v2"), ("mobilenetv3_large_100", "mobilenet_v3_large")]
)
def test_timm_drops_paths_at_the_same_rates(their_name, our_name, operators):
    timm = pytest.importorskip("timm", reason="pip install .[parity]")
    blocks = [block for stage in timm.create_model(their_name, drop_path_rate=0.2).blocks for block in stage]
    plan = create_model(our_name, 2).plan
    for index, block in zip(range(1, len(plan.blocks) + 1), blocks, strict=False):
        rate = getattr(block.drop_path, "drop_prob", 0.0)
        assert rate == pytest.approx(0.2 * DROP_PATH_RULES["timm"](plan, index)), index


def test_the_garden_is_keras():
    keras = pytest.importorskip("keras", reason="pip install .[parity]")
    garden, heads, key = INITS["tf_model_garden"], 4, jax.random.key(0)
    attention, smaller = garden.of_attention(heads, 1), garden.of_attention(heads, 2)
    scaling, glorot = keras.initializers.VarianceScaling, keras.initializers.get("glorot_uniform").__class__
    rows = {  # ours and its shape, Keras' and its shape
        "conv": (garden.conv, (3, 3, 16, 64), scaling, (3, 3, 16, 64)),
        "depthwise": (garden.depthwise, (5, 5, 1, 512), scaling, (5, 5, 512, 1)),
        "squeeze_excite": (garden.squeeze_excite, (96, 48), scaling, (1, 1, 96, 48)),
        "hidden": (garden.hidden, (96, 128), scaling, (1, 1, 96, 128)),
        "classifier": (
            garden.classifier,
            (96, 100),
            keras.initializers.get("random_uniform").__class__,
            (96, 100),
        ),
        "query": (attention.query, (1, 1, 96, heads * 32), glorot, (heads, 32, 96)),
        "shared": (attention.shared, (1, 1, 96, 32), glorot, (96, 32)),
        "output": (attention.output, (1, 1, heads * 32, 96), glorot, (96, heads, 32)),
        "query of a smaller map": (smaller.query, (1, 1, 96, heads * 32), glorot, (1, 1, 96, heads * 32)),
        "output of a smaller map": (smaller.output, (1, 1, heads * 32, 96), glorot, (1, 1, heads * 32, 96)),
        "depthwise of a smaller map": (smaller.depthwise, (3, 3, 1, 512), glorot, (3, 3, 512, 1)),
    }
    for name, (our_init, shape, their_init, their_shape) in rows.items():
        same(name, np.asarray(our_init(key, shape, jnp.float32)), np.asarray(their_init(seed=0)(their_shape)))
