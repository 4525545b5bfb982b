"""Computes what a Core ML package says, by JAX: a stand-in for Core ML, which runs on macOS only.

It reads the file alone, and shares nothing with the writer but Apple's description of the operators.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def open_package(path: str) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    """Returns a function from images [n, h, w, 3] to the outputs that are arrays.

    Where the file says float16, every operator is computed in float32, and its outputs are rounded.

    Raises:
      NotImplementedError: naming the operator, if this module doesn't know it.
    """
    import coremltools
    from coremltools.converters.mil.frontend.milproto import load
    from coremltools.converters.mil.mil import types

    spec = coremltools.utils.load_spec(path)
    weights = pathlib.Path(path, "Data", "com.apple.CoreML", "weights")
    program = load.load(spec, spec.specificationVersion, str(weights)).functions["main"]
    (source,) = spec.description.input
    is_image = source.type.WhichOneof("Type") == "imageType"

    @jax.jit
    def compute(image: jax.Array) -> dict[str, jax.Array]:
        values: dict[str, Any] = {source.name: image}
        for op in program.operations:
            if op.op_type in ("const", "classify"):  # a variable has its constant; a classifier's texts are no arrays
                continue
            if op.op_type.startswith("constexpr_"):
                outputs = op.materialized_val_inference()
            elif op.op_type in _OPERATORS:
                outputs = _OPERATORS[op.op_type](**{name: _read(var, values) for name, var in op.inputs.items()})
            else:
                raise NotImplementedError(f"the operator {op.op_type} of {op.name} isn't known to this stand-in")
            for var, value in zip(op.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True):
                values[var.name] = value.astype(np.float16) if var.dtype == types.fp16 else value
        return {var.name: values[var.name] for var in program.outputs if var.name in values}

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        images = images.astype(np.float32).transpose(0, 3, 1, 2) if is_image else images
        each = [compute(image[None]) for image in images]
        return {name: np.concatenate([np.asarray(outputs[name]) for outputs in each]) for name in each[0]}

    return run


def _read(var: Any, values: Mapping[str, Any]) -> Any:
    """Returns a value or constant, float16 as float32, in which an operator is computed before it is rounded."""
    if isinstance(var, list | tuple):
        return [_read(each, values) for each in var]
    value = values.get(var.name, var.val)
    return value.astype(np.float32) if getattr(value, "dtype", None) == np.float16 else value


def _conv(
    x: Any, weight: Any, strides: Any, pad_type: str, pad: Any, dilations: Any, groups: int, bias: Any = None
) -> Any:
    assert pad_type in ("custom", "valid"), pad_type
    pads = [(0, 0)] * 2 if pad_type == "valid" else np.reshape(pad, (-1, 2)).tolist()
    y = lax.conv_general_dilated(
        x, jnp.asarray(weight), tuple(strides), pads, rhs_dilation=tuple(dilations), feature_group_count=int(groups)
    )
    return y if bias is None else y + jnp.asarray(bias).reshape(1, -1, 1, 1)


def _linear(x: Any, weight: Any, bias: Any = 0.0) -> Any:
    return x @ jnp.asarray(weight).T + jnp.broadcast_to(bias, (1,) * (x.ndim - 1) + weight.shape[:1])


def _matmul(x: Any, y: Any, transpose_x: bool, transpose_y: bool) -> Any:
    x, y = (jnp.swapaxes(each, -1, -2) if flag else each for each, flag in ((x, transpose_x), (y, transpose_y)))
    return jnp.matmul(x, y)


def _max_pool(x: Any, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any, ceil_mode: bool) -> Any:
    assert pad_type in ("custom", "valid"), pad_type
    assert not ceil_mode
    pads = [(0, 0)] * 2 if pad_type == "valid" else np.reshape(pad, (-1, 2)).tolist()
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, *kernel_sizes), (1, 1, *strides), [(0, 0), (0, 0), *pads])


def _broadcast(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def compute(x: Any, y: Any) -> Any:
        rank = max(np.ndim(x), np.ndim(y))
        return function(*(jnp.reshape(each, (1,) * (rank - np.ndim(each)) + np.shape(each)) for each in (x, y)))

    return compute


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, axes, keep_dims: function(x, axis=tuple(map(int, axes)), keepdims=bool(keep_dims))


def _gelu(x: Any, mode: str) -> Any:
    assert mode == "EXACT", mode
    return jax.nn.gelu(x, approximate=False)


def _top_k(x: Any, k: int, axis: int, ascending: bool, **_: Any) -> tuple[Any, Any]:
    assert axis in (-1, x.ndim - 1)
    assert not ascending
    values, places = lax.top_k(x, int(k))
    return values, places


def _shaped(x: Any, shape: Sequence[int]) -> Any:
    return jnp.reshape(x, tuple(map(int, shape)))


_DTYPES = {"fp32": jnp.float32, "fp16": jnp.float16, "int32": jnp.int32, "bool": jnp.bool_}
_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "identity": lambda x: x,
    "cast": lambda x, dtype: x.astype(_DTYPES[dtype]),
    "transpose": lambda x, perm: jnp.transpose(x, tuple(map(int, perm))),
    "reshape": _shaped,
    "expand_dims": lambda x, axes: jnp.expand_dims(x, tuple(map(int, axes))),
    "squeeze": lambda x, axes: jnp.squeeze(x, tuple(map(int, axes))),
    "tile": lambda x, reps: jnp.tile(x, tuple(map(int, reps))),
    "concat": lambda values, axis, interleave: jnp.concatenate(values, int(axis)),
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool": _max_pool,
    "topk": _top_k,
    "add": _broadcast(jnp.add),
    "sub": _broadcast(jnp.subtract),
    "mul": _broadcast(jnp.multiply),
    "real_div": _broadcast(jnp.divide),
    "maximum": _broadcast(jnp.maximum),
    "minimum": _broadcast(jnp.minimum),
    "pow": _broadcast(jnp.power),
    "exp": lambda x: jnp.exp(x),
    "log": lambda x, epsilon: jnp.log(x + epsilon),
    "sqrt": lambda x: jnp.sqrt(x),
    "rsqrt": lambda x, epsilon: lax.rsqrt(x + epsilon),
    "square": lambda x: jnp.square(x),
    "abs": lambda x: jnp.abs(x),
    "erf": lambda x: lax.erf(x),
    "tanh": lambda x: jnp.tanh(x),
    "sin": lambda x: jnp.sin(x),
    "cos": lambda x: jnp.cos(x),
    "sigmoid": lambda x: jax.nn.sigmoid(x),
    "sigmoid_hard": lambda x, alpha, beta: jnp.clip(alpha * x + beta, 0.0, 1.0),
    "relu": lambda x: jax.nn.relu(x),
    "relu6": lambda x: jax.nn.relu6(x),
    "gelu": _gelu,
    "clip": lambda x, alpha, beta: jnp.clip(x, alpha, beta),
    "softmax": lambda x, axis: jax.nn.softmax(x, int(axis)),
    "reduce_sum": _reduce(jnp.sum),
    "reduce_mean": _reduce(jnp.mean),
    "reduce_max": _reduce(jnp.max),
    "reduce_argmax": lambda x, axis, keep_dims, **_: jnp.argmax(x, int(axis), keepdims=bool(keep_dims)),
    "reduce_min": _reduce(jnp.min),
}
"""Operators of Core ML by their names, with the names of their inputs."""
