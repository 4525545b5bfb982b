"""torchvision, timm and CoreNet: their networks with random weights, through their files, endpoint by endpoint."""

import argparse
import itertools
import types

import jax
import numpy as np
import pytest

from mnv2_jax.weights import hub
from mnv2_jax.weights.by_name import to_timm
from mnv2_jax.weights.load import load_weights
from mnv2_jax.weights.state_dicts import read_state_dict, write_state_dict
from tests.weights import parity
from tests.weights.torch_networks import endpoints, numbered, timm_modules, torchvision_modules, torchvision_v3

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="pip install .[parity]")


@pytest.fixture
def torchvision(operators):
    return pytest.importorskip("torchvision", reason="pip install .[parity]")


@pytest.fixture
def timm(operators):
    return pytest.importorskip("timm", reason="pip install .[parity]")


def randomised(model, forward=None):
    """Draws weights, and measures the norms' statistics; ``forward``: how the model is called, by default on images."""
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            shape = [*tensor.shape[1:], tensor.shape[0]]
            tensor.copy_(torch.from_numpy(np.moveaxis(parity.values(rng, shape), -1, 0).copy()))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        forward() if forward else endpoints(model, parity.CALIBRATION, {})
    for norm in norms:
        norm.num_batches_tracked.zero_()
    return model.eval()


def saved(model, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


def check(library, name, model, modules, weights):
    for size in parity.SIZES:
        x = parity.images(size)
        parity.compare(library, name, weights, x, endpoints(model, x, modules))


# --- torchvision --------------------------------------------------------------------------------------------


TORCHVISION = {
    "mobilenet_v2": (lambda models: models.mobilenet_v2(), "mobilenet_v2", {}),
    "mobilenet_v2 0.5": (lambda models: models.mobilenet_v2(width_mult=0.5), "mobilenet_v2", {"width": 0.5}),
    "mobilenet_v3_large": (lambda models: models.mobilenet_v3_large(), "mobilenet_v3_large", {}),
    "mobilenet_v3_small": (lambda models: models.mobilenet_v3_small(), "mobilenet_v3_small", {}),
    "mobilenet_v3_large 0.75": (
        lambda models: torchvision_v3(models, "large", 0.75),
        "mobilenet_v3_large",
        {"width": 0.75},
    ),
    "resnet50": (lambda models: models.resnet50(), "resnet50", {}),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, torchvision, tmp_path):
    make, ours, options = TORCHVISION[name]
    model = randomised(make(torchvision.models))
    weights = load_weights(saved(model, tmp_path / "model.pth"), ours, library="torchvision", **options)
    check("torchvision", name, model, torchvision_modules(model, ours), weights)


# --- timm ---------------------------------------------------------------------------------------------------

TIMM = [
    *("mobilenetv1_100", "mobilenetv1_125"),
    *("mobilenetv2_035", "mobilenetv2_050", "mobilenetv2_075", "mobilenetv2_100", "mobilenetv2_140"),
    *("mobilenetv2_110d", "mobilenetv2_120d"),
    *("mobilenetv3_large_100", "mobilenetv3_large_075", "mobilenetv3_small_100", "mobilenetv3_small_075"),
    "mobilenetv3_small_050",
    *("tf_mobilenetv3_large_100", "tf_mobilenetv3_large_075", "tf_mobilenetv3_large_minimal_100"),
    *("tf_mobilenetv3_small_100", "tf_mobilenetv3_small_075", "tf_mobilenetv3_small_minimal_100"),
    *("mobilenetv4_conv_small", "mobilenetv4_conv_small_050", "mobilenetv4_conv_small_035"),
    *("mobilenetv4_conv_medium", "mobilenetv4_conv_large", "mobilenetv4_hybrid_medium", "mobilenetv4_hybrid_large"),
    "resnet50",
]
AS_PTH = ("mobilenetv1_125", "mobilenetv2_100", "tf_mobilenetv3_small_100", "mobilenetv4_conv_small", "resnet50")


@pytest.mark.parametrize("name", TIMM)
def test_timm(name, timm, tmp_path):
    model = randomised(timm.create_model(name, pretrained=False))
    path = saved(model, tmp_path / f"{name}.{'pth' if name in AS_PTH else 'safetensors'}")
    options = dict(hub.TIMM[name].model)
    family = options.pop("name")
    library = "timm_tf" if name.startswith("tf_") else "timm"
    weights = load_weights(path, family, library=library, **options)
    check(library, name, model, timm_modules(model, family), weights)

    write_state_dict(path, to_timm(weights))
    back = pytest.importorskip("safetensors.torch").load_file(path) if name not in AS_PTH else torch.load(path)
    given = model.state_dict()
    assert sorted(back) == sorted(given)
    assert all(back[key].dtype == tensor.dtype and torch.equal(back[key], tensor) for key, tensor in given.items())
    timm.create_model(name, pretrained=False).load_state_dict(back, strict=True)


def test_whose_file_it_is_matters(timm, tmp_path):
    model = randomised(timm.create_model("tf_mobilenetv3_small_100", pretrained=False))
    path = saved(model, tmp_path / "model.safetensors")
    checkpoint = tmp_path / "model_best.pth.tar"
    torch.save({"args": argparse.Namespace(model="tf_mobilenetv3_small_100"), "model": model.state_dict()}, checkpoint)
    x = parity.images(parity.SIZES[0])
    theirs = endpoints(model, x, {})["logits"]
    for library, is_right in (("timm_tf", True), ("timm", False)):
        weights = load_weights(path, "mobilenet_v3_small", library=library)
        logits, _ = jax.jit(weights.model.apply)(weights.variables, x)
        assert (parity.difference(logits, theirs) < 1e-3) == is_right
    said, given = load_weights(checkpoint), load_weights(path, "mobilenet_v3_small", library="timm_tf")
    assert said.model == given.model
    jax.tree.map(np.testing.assert_array_equal, said.variables, given.variables)


def test_of_its_own_checkpoints_timm_takes_the_same(timm, tmp_path):
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=3)
    optimizer = types.SimpleNamespace(state_dict=lambda: {"state": {0: {"momentum_buffer": torch.ones(3)}}})
    average = ModelEmaV3(model)
    average.module.bn1.weight.data.fill_(0.5)
    args = argparse.Namespace(model="mobilenetv3_small_050", lr=0.1)
    saver = CheckpointSaver(
        model, optimizer, args, average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), max_history=1
    )
    saver.save_checkpoint(3, metric=0.5)
    for take, use_ema in ((None, True), ("raw", False)):
        theirs = timm.models.load_state_dict(str(tmp_path / "last.pth.tar"), use_ema)
        ours = read_state_dict(tmp_path / "last.pth.tar", take)
        assert set(ours.tensors) == {name for name in theirs if not name.endswith("num_batches_tracked")}
        assert all(np.array_equal(array, theirs[name].numpy()) for name, array in ours.tensors.items())
    assert ours.architectures[0] == "mobilenetv3_small_050"


# --- CoreNet ------------------------------------------------------------------------------------------------


def sequential(**modules):
    model = torch.nn.Sequential()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def corenet_conv(before, after, size, stride=1, groups=1, act=None):
    conv = torch.nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
    block = sequential(conv=conv, norm=torch.nn.BatchNorm2d(after), **({"act": act} if act else {}))
    return sequential(block=block)


class Residual(torch.nn.Module):
    def __init__(self, before, after, stride, ratio):
        super().__init__()
        act, hidden = torch.nn.ReLU6(), before * ratio
        expand = {"exp_1x1": corenet_conv(before, hidden, 1, act=act)} if ratio > 1 else {}
        depthwise = corenet_conv(hidden, hidden, 3, stride, hidden, act)
        self.block = sequential(**expand, conv_3x3=depthwise, red_1x1=corenet_conv(hidden, after, 1))
        self.is_residual = stride == 1 and before == after

    def forward(self, x):
        return x + self.block(x) if self.is_residual else self.block(x)


def corenet_v1():
    """corenet/modeling/models/classification/mobilenetv1.py: its `SeparableConv2d` filters without an activation."""
    act, before, layers = torch.nn.ReLU(), 32, {}
    for layer, (channels, repeats) in enumerate(((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2)), 1):
        blocks = torch.nn.Sequential()
        for place in range(repeats):
            stride = 2 if layer > 1 and place == 0 else 1
            depthwise = corenet_conv(before, before, 3, stride, before)
            blocks.append(sequential(dw_conv=depthwise, pw_conv=corenet_conv(before, channels, 1, act=act)))
            before = channels
        layers[f"layer_{layer}"] = blocks
    return corenet(corenet_conv(3, 32, 3, 2, act=act), layers, torch.nn.Identity(), before)


def corenet_v2():
    """corenet/modeling/models/classification/mobilenetv2.py."""
    table = [[(16, 1)], [(24, 2)], [(32, 3)], [(64, 4), (96, 3)], [(160, 3), (320, 1)]]
    act, before, layers = torch.nn.ReLU6(), 32, {}
    for layer, rows in enumerate(table, 1):
        blocks = torch.nn.Sequential()
        for place, channels in enumerate(itertools.chain(*([channels] * repeats for channels, repeats in rows))):
            stride = 2 if layer > 1 and place == 0 else 1
            blocks.add_module(f"mv2_block_{place}", Residual(before, channels, stride, 6 if layer > 1 else 1))
            before = channels
        layers[f"layer_{layer}"] = blocks
    return corenet(corenet_conv(3, 32, 3, 2, act=act), layers, corenet_conv(before, 1280, 1, act=act), 1280)


def corenet(stem, layers, head, channels):
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    classifier = sequential(global_pool=pool, classifier_fc=torch.nn.Linear(channels, 1000))
    return sequential(conv_1=stem, **layers, conv_1x1_exp=head, classifier=classifier)


@pytest.mark.parametrize("make", [corenet_v1, corenet_v2])
def test_corenet(make, tmp_path):
    model = randomised(make())
    layers = [getattr(model, f"layer_{i}") for i in range(1, 6)]
    modules = {"stem": model.conv_1, **numbered(itertools.chain(*layers)), "pooled": model.classifier.global_pool}
    if make is corenet_v2:
        modules["head"] = model.conv_1x1_exp
    weights = load_weights(saved(model, tmp_path / "model.pt"), make.__name__.replace("corenet", "mobilenet"))
    assert weights.info.source == "corenet"
    check("corenet", make.__name__, model, modules, weights)
