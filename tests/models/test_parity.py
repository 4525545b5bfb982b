"""Compares layers with PyTorch, if `.[parity]` is installed; tests/convert compares whole networks."""

import jax
import numpy as np
import pytest

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
