"""A norm with a written-out gradient agrees with the norm that JAX differentiates."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mnv2_jax.nn
from mnv2_jax.models.registry import create_model
from mnv2_jax.nn import norm_triton, normalise
from mnv2_jax.nn.activations import ACTIVATIONS
from mnv2_jax.nn.forms import AUTO, NVIDIA, Forms, fastest
from mnv2_jax.nn.norm import GroupedBatchNorm
from mnv2_jax.training.mesh import make_mesh, sharded
from tests.gpus import h100


def draw(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 1.5, shape), dtype)


@pytest.mark.parametrize("act", [*ACTIVATIONS, None])
@pytest.mark.parametrize("shape", [(8, 5, 4, 6), (8, 6)])
def test_written_is_derived_with_gradients(act, shape, x64):
    x, weights = draw(shape, jnp.float64), draw(shape, jnp.float64, 1)
    params = {"scale": jnp.linspace(0.5, 2, 6), "bias": jnp.linspace(-1, 1, 6)}
    stats = {"mean": jnp.zeros(6), "var": jnp.ones(6)}

    def run(form):
        norm = GroupedBatchNorm(group_size=4, form=form)

        def loss(params, x):
            both = {"params": params, "batch_stats": stats}
            y, new = norm.apply(both, x, True, act, mutable=["batch_stats"])
            # The statistics have a cotangent too.
            return (jnp.sin(y) * weights).sum() + sum((leaf**3).sum() for leaf in jax.tree.leaves(new)), (y, new)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * float(np.abs(b).max())),
        run("written"),
        run("derived"),
    )


@pytest.mark.parametrize(
    ("shape", "groups", "act", "dtype"),
    [
        ((2, 7, 7, 64), 1, "relu6", jnp.float32),
        ((4, 5, 6, 24), 2, "hard_swish", jnp.float32),
        ((2, 9, 8, 17), 2, "gelu", jnp.bfloat16),
        ((2, 30, 29, 48), 1, None, jnp.bfloat16),  # several chunks of rows
    ],
)
def test_kernels_sum_as_xla_does(shape, groups, act, dtype):
    x, dy = draw(shape, dtype), draw(shape, dtype, 1)
    factor, offset = draw((groups, shape[-1]), jnp.float32, 2), draw((groups, shape[-1]), jnp.float32, 3)
    actual = (*norm_triton.moments(x, True), *norm_triton.gradient_sums(x, dy, factor, offset, act, True))
    xla = normalise.SUMS["written"]
    expected = (*xla.moments(x), *xla.of_gradient(x, dy, factor, offset, act))
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, atol=2e-6 * float(np.abs(b).max()) * shape[1])


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_every_activation_is_lowered_for_an_nvidia_gpu(act):
    x, of_group = jax.ShapeDtypeStruct((2, 7, 7, 16), jnp.bfloat16), jax.ShapeDtypeStruct((1, 16), jnp.float32)
    with h100():
        traced = jax.jit(lambda *arrays: normalise.SUMS["triton"].of_gradient(*arrays, act)).trace(
            x, x, *2 * (of_group,)
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("triton" in text) == (act in norm_triton.ACTIVATIONS)


def test_devices_sum_their_own_images():
    mesh = make_mesh()
    shape, groups = (2 * mesh.size, 3, 4, 8), mesh.size
    x, dy = draw(shape, jnp.float32), draw(shape, jnp.float32, 1)
    factor, offset = draw((groups, 8), jnp.float32, 2), draw((groups, 8), jnp.float32, 3)

    def sums(x, dy, factor, offset):
        return norm_triton.moments(x, True), norm_triton.gradient_sums(x, dy, factor, offset, "relu6", True)

    arrays = jax.device_put((x, dy, factor, offset), sharded(mesh))
    program = jax.jit(sums).lower(*arrays).compile()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), program(*arrays), sums(x, dy, factor, offset)
    )
    assert mesh.size > 1
    assert not any(name in program.as_text() for name in ("all-gather", "all-reduce", "all-to-all"))


@pytest.mark.slow  # the tests above compare each of its layers
def test_a_network_is_the_same_function_in_all_forms(x64):
    model = create_model("mobilenet_v2", 3, depth=0.3, width=0.35, dtype="float64", dropout=0.0)
    x = draw((32, 16, 16, 3), jnp.float64)
    variables = model.init(jax.random.key(0), x)
    other_forms = {"depthwise": "shifted", "pointwise": "lax", "image": "lax", "norm": "written"}

    def run(forms):
        def loss(params):
            logits, state = model.with_forms(forms).apply({**variables, "params": params}, x, train=True)
            return jnp.sin(logits).sum(), (logits, state)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10 * max(float(np.abs(b).max()), 1e-3)),
        run(Forms(**other_forms)),
        run(AUTO),
    )


def test_kernels_of_our_own_are_for_newer_nvidia_gpus():
    assert fastest(None, "float32") == fastest(7.5, "bfloat16") == fastest(9.0, "float64") == AUTO
    assert fastest(9.0, "bfloat16") == fastest(8.0, "float32") == NVIDIA


def test_without_triton_the_forms_are_those_of_xla(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)  # a later JAX may lack it
    for name in ("depthwise_triton", "norm_triton"):
        monkeypatch.delitem(sys.modules, f"mnv2_jax.nn.{name}", raising=False)
        monkeypatch.delattr(mnv2_jax.nn, name, raising=False)
    monkeypatch.delattr(jax.experimental.pallas, "triton", raising=False)
    assert fastest(9.0, "bfloat16") == AUTO
