"""The PyTorch rival is the same network and computes the same step."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from mnv2_jax import config
from mnv2_jax.bench import torch_rival
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.registry import from_config, variable_shapes
from mnv2_jax.training.optim import decay_mask

torch = pytest.importorskip("torch", reason="pip install .[parity]")
if importlib.util.find_spec("timm") is None:
    pytest.skip("pip install .[parity]", allow_module_level=True)
pytestmark = pytest.mark.parity

SMALL = dict(name="mobilenet_v2", width=0.1, num_classes=10, dropout=0.0)
CPU = torch.device("cpu")
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "complexity.json").read_text())["complexity"]


@pytest.fixture(scope="module", autouse=True)
def timm():
    """Imports timm as the rival does, even if torchvision lacks its operators; one thread suffices for these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch_rival.import_timm()
    torch.set_num_threads(threads)


def settings(model=SMALL, optim=None, **data):
    tree = dict(
        model=dict(model),
        norm=dict(group_size=4, decay=0.97, epsilon=1e-4),
        data=dict(batch_size=4, resolution=16) | data,
        optim=dict(optim or {}),
    )
    return config.build(tree)


@functools.cache
def params_of(its):
    return count_layers(from_config(its.model, its.norm), 32).params


def build_network(its):
    return torch_rival.build_network(its.model, its.norm, params_of(its))


def without_memory(name, strides=(2, 2, 2, 2, 2), **options):
    """Builds timm's network for 1000 classes on the meta device; checks the number of parameters, if golden or ours."""
    options = {"width": 1.0, "width_rule": "standard", **options}
    its = settings(dict(SMALL, name=name, num_classes=1000, strides=strides, **options))
    golden = [
        row["params"].get("trainable_1000") for row in GOLDEN if (row["model"], row["options"]) == (name, options)
    ]
    params = 25_557_032 if name == "resnet50" else golden[0] if golden else params_of(its)
    with torch.device("meta"):
        return torch_rival.build_network(its.model, its.norm, params), its


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mobilenet_v1", {}),
        ("mobilenet_v2", {}),
        ("mobilenet_v2", {"width": 0.35}),
        ("mobilenet_v2", {"width": 1.1, "depth": 1.2, "width_rule": "fixed_stem_head"}),
        ("mobilenet_v3_small", {"width": 0.5, "width_rule": "fixed_stem_head"}),
        ("mobilenet_v3_small", {}),
        ("mobilenet_v3_large", {}),
        ("mobilenet_v3_large_minimalistic", {}),
        ("mobilenet_v4_conv_small", {}),
        ("mobilenet_v4_conv_small", {"width": 0.5}),
        ("mobilenet_v4_conv_medium", {}),
        ("mobilenet_v4_conv_large", {}),
        ("mobilenet_v4_hybrid_medium", {}),
        ("mobilenet_v4_hybrid_large", {}),
        ("resnet50", {}),
    ],
)
def test_the_rival_is_the_same_network(name, options):
    network, its = without_memory(name, **options)  # refuses another number of parameters
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(round(norm.momentum, 9), norm.eps) for norm in norms} == {(0.03, 1e-4)}
    drops = {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)} | {network.drop_rate}
    assert its.model.dropout in drops


def test_another_rounding_is_an_error_with_both_numbers():
    its = settings(dict(SMALL, name="mobilenet_v1", width=0.3))
    both_numbers = rf"mobilenetv1_030 has [\d,]+ .*mobilenet_v1 has {params_of(its):,}"
    with pytest.raises(torch_rival.Unavailable, match=both_numbers):
        build_network(its)


def heights(network):
    """Returns the height of every block's output for an image of 32 px."""
    sizes = []
    layers = ("layer1", "layer2", "layer3", "layer4")
    stages = network.blocks if hasattr(network, "blocks") else [getattr(network, name) for name in layers]
    for block in (block for stage in stages for block in stage):
        block.register_forward_hook(lambda module, x, y: sizes.append(y.shape[-1]))
    network.eval()(torch.zeros(1, 3, 32, 32, device="meta"))
    return sizes


@pytest.mark.parametrize(
    ("name", "width", "strides"),
    [
        ("mobilenet_v1", 0.25, (1, 1, 2, 2, 2)),
        ("mobilenet_v2", 0.35, (1, 1, 2, 2, 2)),
        ("mobilenet_v2", 0.35, (2, 2, 2, 1, 2)),
        ("mobilenet_v3_small", 1.0, (1, 1, 2, 2, 2)),
        ("mobilenet_v3_small", 1.0, (2, 1, 1, 1, 1)),
        ("mobilenet_v4_conv_small", 0.35, (2, 1, 2, 1, 2)),
        ("mobilenet_v4_hybrid_medium", 1.0, (2, 2, 2, 1, 2)),  # attention halves keys and values, not the map
        ("resnet50", 1.0, (1, 1, 2, 2, 2)),
    ],
)
def test_strides_are_ours(name, width, strides):
    network, its = without_memory(name, strides, width=width)
    points = from_config(its.model, its.norm).endpoint_strides
    our_heights = [32 // ratio for point, ratio in points.items() if point.startswith("block_")]
    timm_heights = heights(network)
    assert timm_heights[: len(our_heights)] == our_heights
    assert timm_heights[len(our_heights) :] in ([], [our_heights[-1]])  # timm has V3's head among the blocks


def test_a_block_that_keeps_its_map_adds_its_input():
    both_strides = (2, 2, 2, 2, 2), (2, 1, 1, 1, 1)
    networks = [without_memory("mobilenet_v3_small", strides)[0] for strides in both_strides]
    before, after = ([block.has_skip for stage in network.blocks for block in stage] for network in networks)
    assert (before[0], after) == (False, [True, *before[1:]])  # 16 channels to 16; the other blocks add channels


@pytest.mark.parametrize(
    "optim",
    [
        dict(name="sgd", nesterov=True, weight_decay=1e-4, clip_grad_norm=20.0, ema_decay=0.99),
        dict(name="rmsprop", weight_decay=1e-5, weight_decay_on="all", accumulate_steps=2),
        dict(name="rmsprop", rms_init=0.0, epsilon_in_sqrt=False, lr_in_momentum=False, ema_decay=0.9),
        dict(name="adamw", weight_decay=0.01, weight_decay_on="no_depthwise", clip_grad_norm=1.0),
        dict(name="adamw", l2=1e-4),
    ],
    ids=str,
)
def test_the_rival_learns_its_batch(optim):
    torch.manual_seed(0)
    its = settings(optim=dict(optim, peak_lr=1.0 if optim["name"] == "sgd" else 0.3), resolution=32)
    model = build_network(its)
    before = [p.detach().clone() for p in model.parameters()]
    step, facts = torch_rival.train_step(its, model, CPU, compiled=False)
    losses = [float(step()) for _ in range(10)]
    assert min(losses) < 0.9 * losses[0]
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert facts["fused"] == (optim["name"] in ("sgd", "adamw"))
    assert facts["left_out"] == ["flip"]


def test_the_same_weights_decay():
    network, its = without_memory("mobilenet_v4_hybrid_medium")  # has LayerScale
    params = variable_shapes(from_config(its.model, its.norm))["params"]
    for rule in ("all", "no_norm", "no_norm_bias", "no_depthwise"):
        mask = decay_mask(params, rule)
        size = sum(leaf.size for leaf, decays in zip(*map(jax.tree.leaves, (params, mask)), strict=True) if decays)
        assert sum(p.numel() for p in torch_rival.decayed_parameters(network, rule)) == size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inference_gives_logits(dtype):
    its = settings(dict(SMALL, dtype=dtype))
    model = build_network(its)
    step = torch_rival.infer_step(its, model, CPU, compiled=False)
    logits = step()
    assert logits.shape == (4, 10)
    assert torch.equal(logits, step())


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_turn_takes_time(mode):
    its = settings(dict(SMALL, dtype="bfloat16" if mode == "train" else "float32"))
    rival = torch_rival.build(its, mode=mode, compiled=False, params=params_of(its))
    one, many = rival.turn(1), rival.turn(8)
    assert 0 < one < many
    assert rival.facts["model"] == "mobilenetv2_010"
    assert rival.facts["compile_seconds"] is None
    if not torch.cuda.is_available():
        assert rival.peak_bytes() is None


@pytest.mark.parametrize(
    ("section", "change", "option"),
    [
        ("optim", dict(name="lion"), "lion"),
        ("optim", dict(name="rmsprop", l2=0.1), "l2"),
        ("optim", dict(name="rmsprop", epsilon_in_sqrt=False), "lr_in_momentum"),
        ("model", dict(name="alexnet"), "alexnet"),
        ("model", dict(num_classes=None), "num_classes"),
        ("model", dict(dtype="float64"), "float64"),
        ("model", dict(output_stride=16), "output_stride"),
        ("data", dict(scales=(32, 64)), "scales"),
        ("finetune", dict(train_from=("classifier",)), "train_from"),
    ],
)
def test_an_option_that_the_rival_lacks_is_one_line(section, change, option):
    its = settings()
    params = params_of(its)
    its = dataclasses.replace(its, **{section: dataclasses.replace(getattr(its, section), **change)})
    with pytest.raises(torch_rival.Unavailable, match=option) as error:
        torch_rival.build(its, mode="train", compiled=False, params=params)
    assert "\n" not in str(error.value)


def test_a_failed_compilation_is_one_line(monkeypatch):
    def fails(model):
        raise RuntimeError("no C++ compiler\nis here")

    monkeypatch.setattr(torch, "compile", fails)
    its = settings()
    with pytest.raises(torch_rival.Unavailable, match=r"torch\.compile.*: no C\+\+ compiler$"):
        torch_rival.build(its, mode="infer", compiled=True, params=params_of(its))


def test_the_rival_loads_no_jax_and_prints_nothing():
    its = settings(SMALL)
    code = f"""
import sys
from mnv2_jax import config
from mnv2_jax.bench import torch_rival
assert "torch" not in sys.modules
its = config.build({config.to_dict(its)!r})
torch_rival.build(its, mode="train", compiled=False, params={params_of(its)}).turn(1)
assert not {{"jax", "jaxlib", "flax"}} & set(sys.modules)
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
