"""PyTorch as a rival: the same network, the same step."""

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
    """Imported as the rival does, wherever torchvision lacks its operators; one thread, as so little work needs."""
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


def network(its):
    return torch_rival.network(its.model, its.norm, params_of(its))


def on_paper(name, strides=(2, 2, 2, 2, 2), **options):
    """timm's network without memory, for 1000 classes, held against the golden number of parameters or else ours."""
    options = {"width": 1.0, "width_rule": "standard", **options}
    its = settings(dict(SMALL, name=name, num_classes=1000, strides=strides, **options))
    golden = [
        row["params"].get("trainable_1000") for row in GOLDEN if (row["model"], row["options"]) == (name, options)
    ]
    params = 25_557_032 if name == "resnet50" else golden[0] if golden else params_of(its)
    with torch.device("meta"):
        return torch_rival.network(its.model, its.norm, params), its


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
def test_it_is_the_same_network(name, options):
    made, its = on_paper(name, **options)  # refuses another number of parameters
    norms = [module for module in made.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(round(norm.momentum, 9), norm.eps) for norm in norms} == {(0.03, 1e-4)}
    drops = {module.p for module in made.modules() if isinstance(module, torch.nn.Dropout)} | {made.drop_rate}
    assert its.model.dropout in drops


def test_another_rounding_is_said_with_both_numbers():
    its = settings(dict(SMALL, name="mobilenet_v1", width=0.3))
    both = rf"^mobilenetv1_030 has [\d,]+ parameters and our mobilenet_v1 {params_of(its):,}: not the same"
    with pytest.raises(torch_rival.Unavailable, match=both):
        network(its)


def heights(made):
    """Of the output of every block, for 32 px."""
    sizes = []
    stages = made.blocks if hasattr(made, "blocks") else [made.layer1, made.layer2, made.layer3, made.layer4]
    for block in (block for stage in stages for block in stage):
        block.register_forward_hook(lambda module, x, y: sizes.append(y.shape[-1]))
    made.eval()(torch.zeros(1, 3, 32, 32, device="meta"))
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
    made, its = on_paper(name, strides, width=width)
    points = from_config(its.model, its.norm).endpoint_strides
    ours = [32 // ratio for point, ratio in points.items() if point.startswith("block_")]
    theirs = heights(made)
    assert theirs[: len(ours)] == ours
    assert theirs[len(ours) :] in ([], [ours[-1]])  # timm has V3's head among the blocks


def test_a_block_that_keeps_its_map_adds_its_input():
    of = [on_paper("mobilenet_v3_small", strides)[0] for strides in ((2, 2, 2, 2, 2), (2, 1, 1, 1, 1))]
    before, after = ([block.has_skip for stage in made.blocks for block in stage] for made in of)
    assert (before[0], after) == (False, [True, *before[1:]])  # 16 channels to 16; the others widen


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
def test_it_learns_its_batch(optim):
    torch.manual_seed(0)
    its = settings(optim=dict(optim, peak_lr=1.0 if optim["name"] == "sgd" else 0.3), resolution=32)
    model = network(its)
    before = [p.detach().clone() for p in model.parameters()]
    step, facts = torch_rival.train_step(its, model, CPU, compiled=False)
    losses = [float(step()) for _ in range(10)]
    assert min(losses) < 0.9 * losses[0]
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert facts["fused"] == (optim["name"] in ("sgd", "adamw"))
    assert facts["left_out"] == ["flip"]


def test_the_same_weights_decay():
    made, its = on_paper("mobilenet_v4_hybrid_medium")  # has LayerScale
    params = variable_shapes(from_config(its.model, its.norm))["params"]
    for rule in ("all", "no_norm", "no_norm_bias", "no_depthwise"):
        mask = decay_mask(params, rule)
        ours = sum(leaf.size for leaf, chosen in zip(*map(jax.tree.leaves, (params, mask)), strict=True) if chosen)
        assert sum(p.numel() for p in torch_rival.decayed_parameters(made, rule)) == ours


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inference_gives_logits(dtype):
    its = settings(dict(SMALL, dtype=dtype))
    model = network(its)
    step = torch_rival.infer_step(its, model, CPU, compiled=False)
    logits = step()
    assert logits.shape == (4, 10)
    assert torch.equal(logits, step())


@pytest.mark.parametrize("what", ["train", "infer"])
def test_a_turn_takes_time(what):
    its = settings(dict(SMALL, dtype="bfloat16" if what == "train" else "float32"))
    rival = torch_rival.build(its, what=what, compiled=False, params=params_of(its))
    one, many = rival.turn(1), rival.turn(8)
    assert 0 < one < many
    assert rival.facts["model"] == "mobilenetv2_010"
    assert rival.facts["compile_seconds"] is None
    if not torch.cuda.is_available():
        assert rival.peak_bytes() is None


@pytest.mark.parametrize(
    ("section", "change", "said"),
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
def test_what_it_cannot_do_is_one_line(section, change, said):
    its = settings()
    params = params_of(its)
    its = dataclasses.replace(its, **{section: dataclasses.replace(getattr(its, section), **change)})
    with pytest.raises(torch_rival.Unavailable, match=said) as error:
        torch_rival.build(its, what="train", compiled=False, params=params)
    assert "\n" not in str(error.value)


def test_a_failed_compilation_is_one_line(monkeypatch):
    def fails(model):
        raise RuntimeError("no C++ compiler\nis here")

    monkeypatch.setattr(torch, "compile", fails)
    its = settings()
    with pytest.raises(torch_rival.Unavailable, match=r"^torch\.compile failed: RuntimeError: no C\+\+ compiler$"):
        torch_rival.build(its, what="infer", compiled=True, params=params_of(its))


def test_its_process_has_no_jax_and_prints_nothing():
    its = settings(SMALL)
    code = f"""
import sys
from mnv2_jax import config
from mnv2_jax.bench import torch_rival
assert "torch" not in sys.modules
its = config.build({config.to_dict(its)!r})
torch_rival.build(its, what="train", compiled=False, params={params_of(its)}).turn(1)
assert not {{"jax", "jaxlib", "flax"}} & set(sys.modules)
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
