"""Against PyTorch and timm, where `pip install .[parity]` has been done."""

import re

import jax
import numpy as np
import pytest

from mnv2_jax.config import NormConfig
from mnv2_jax.models.registry import create_model
from mnv2_jax.nn.conv import depthwise_conv
from mnv2_jax.nn.norm import GroupedBatchNorm

pytestmark = pytest.mark.parity


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(("size", "kernel_size"), [(8, 3), (9, 5)])
def test_symmetric_depthwise_is_torch_grouped_conv(stride, dilation, size, kernel_size, x64):
    torch = pytest.importorskip("torch")
    x, kernel = draw(2, size, size, 6), draw(kernel_size, kernel_size, 1, 6)
    options = dict(stride=stride, dilation=dilation)
    y, pull = jax.vjp(lambda x, k: depthwise_conv(x, k, padding="symmetric", **options), x, kernel)
    theirs = [torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(kernel.transpose(3, 2, 0, 1))]
    for tensor in theirs:
        tensor.requires_grad_()
    padding = dilation * (kernel_size - 1) // 2
    out = torch.nn.functional.conv2d(*theirs, padding=padding, groups=6, **options)
    out.sin().sum().backward()
    dx, dkernel = pull(jax.numpy.cos(y))
    np.testing.assert_allclose(y, out.detach().numpy().transpose(0, 2, 3, 1), atol=1e-12)
    np.testing.assert_allclose(dx, theirs[0].grad.numpy().transpose(0, 2, 3, 1), atol=1e-12)
    np.testing.assert_allclose(dkernel, theirs[1].grad.numpy().transpose(2, 3, 1, 0), atol=1e-12)


def test_one_group_is_torch_batch_norm(x64):
    torch = pytest.importorskip("torch")
    x = draw(6, 4, 4, 5)
    theirs = torch.nn.BatchNorm2d(5, eps=1e-3, momentum=0.1, dtype=torch.float64)
    out = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
    norm = GroupedBatchNorm(group_size=6, decay=0.9, epsilon=1e-3)
    y, state = norm.apply(norm.init(jax.random.key(0), x), x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, out.detach().numpy().transpose(0, 2, 3, 1), atol=1e-12)
    np.testing.assert_allclose(state["batch_stats"]["mean"], theirs.running_mean, atol=1e-12)
    np.testing.assert_allclose(state["batch_stats"]["var"], theirs.running_var, atol=1e-12)


def timm_name(path):
    """``('block_2', 'expand_norm', 'scale')`` as timm's ``blocks.1.0.bn1.weight``."""
    *layers, leaf = path
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}[leaf]
    outer = {
        "stem": "conv_stem", "stem_norm": "bn1", "head": "conv_head", "head_norm": "bn2", "classifier": "classifier",
    }  # fmt: skip
    if layers[0] in outer:
        return f"{outer[layers[0]]}.{leaf}"
    index = int(re.fullmatch(r"block_(\d+)", layers[0])[1])
    places = [(stage, block) for stage, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for block in range(n)]
    separable = {"depthwise": "conv_dw", "depthwise_norm": "bn1", "project": "conv_pw", "project_norm": "bn2"}
    inverted = {"expand": "conv_pw", "expand_norm": "bn1", "depthwise": "conv_dw", "depthwise_norm": "bn2"}
    inverted |= {"project": "conv_pwl", "project_norm": "bn3"}
    stage, block = places[index - 1]
    return f"blocks.{stage}.{block}.{(separable if index == 1 else inverted)[layers[1]]}.{leaf}"


@pytest.fixture
def timm():
    """timm, whose torchvision may lack its compiled operators: there is no build of it for the CPU build of torch."""
    torch = pytest.importorskip("torch")
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):  # asked for by torchvision's import, never called
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("timm")


def test_the_network_is_timm_mobilenetv2(timm):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = timm.create_model("mobilenetv2_050", pretrained=False, num_classes=10).eval()
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    for name in weights:  # timm starts from 0 and 1, which would hide a mean in the place of a bias
        if "running" in name or re.search(r"bn\d\.(weight|bias)", name):
            weights[name][:] = np.random.default_rng(len(name)).uniform(0.5, 1.0, weights[name].shape)
    model = create_model("mobilenet_v2", 10, width=0.5, padding="symmetric", norm=NormConfig(epsilon=theirs.bn1.eps))
    x = draw(2, 65, 65, 3).astype(np.float32)
    used = set()

    def convert(path, leaf):
        name = timm_name([key.key for key in path[1:]])
        used.add(name)
        value = weights[name]
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        assert value.shape == leaf.shape, name
        return value

    variables = jax.tree_util.tree_map_with_path(convert, jax.eval_shape(model.init, jax.random.key(0), x))
    assert used == {name for name in weights if not name.endswith("num_batches_tracked")}
    with torch.no_grad():
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    logits, _ = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
