"""Core ML packages from the graph, by a table of operators.

Every operator is written for maps [b, h, w, c]; those that Core ML has for [b, c, h, w] only get a transpose before and
after. coremltools removes the transposes that meet, so that one is left where attention or an input needs it.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import math
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from mnv2_jax import graph
from mnv2_jax.errors import UserError
from mnv2_jax.export import runtimes
from mnv2_jax.export.function import INPUT, Exportable, Storage
from mnv2_jax.export.shapes import check_convolution, no_rule
from mnv2_jax.graph import Graph, Node, Value

CLASS, PROBABILITIES = "classLabel", "probabilities"
"""Outputs of a classifier: the label of the largest logit, and what the dictionary of the labels is made of."""
_QUANTISE = "compression::linear_quantize_weights"
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def write(path: pathlib.Path, exportable: Exportable, traced: Graph, storage: Storage = "float32") -> None:
    """Writes a Core ML package, a folder, for batch 1.

    Args:
      path: the folder, which doesn't exist yet.
      exportable: what is exported.
      traced: its graph.
      storage: float16: weights and computation in half precision; dynamic: kernels in 8 bits by output channel, and
        computation in half precision.

    Raises:
      UserError: naming the operator and its layer, if there is no rule for it.
    """
    model = to_model(exportable, traced, storage)
    model.save(str(path))
    shutil.copymode(path / "Manifest.json", path / "Data" / "com.apple.CoreML" / "model.mlmodel")  # it is private


def to_model(exportable: Exportable, traced: Graph, storage: Storage = "float32") -> Any:
    """Returns the model of coremltools.

    With uint8 pixels the input is an RGB image, as phones give them. Logits with labels make a classifier, which has
    the label of the largest one and the softmax of all besides the logits.
    """
    is_image, labels = exportable.pixels == "uint8", _labels(exportable)
    with quiet():
        program = to_program(traced, is_image, softmax=bool(labels))
    model = convert(program, storage, is_image, labels)
    facts = dict(exportable.facts())
    if is_image:  # it has no layout
        read = json.loads(facts["input"])
        facts["input"] = json.dumps({key: read[key] for key in ("name", "channels", "range")})
    model.user_defined_metadata.update(facts)
    return model


def convert(program: Any, storage: Storage = "float32", is_image: bool = False, labels: Sequence[str] = ()) -> Any:
    """Returns the model of a program, which this changes."""
    import coremltools as ct

    shape = program.functions["main"].inputs[INPUT].shape
    image = ct.ImageType(name=INPUT, shape=shape, color_layout=ct.colorlayout.RGB) if is_image else None
    with _converting():
        return ct.convert(
            program,
            inputs=[image or ct.TensorType(name=INPUT, shape=shape)],
            classifier_config=ct.ClassifierConfig(list(labels), CLASS, PROBABILITIES) if labels else None,
            compute_precision=ct.precision.FLOAT32 if storage == "float32" else ct.precision.FLOAT16,
            minimum_deployment_target=ct.target.iOS16,
            pass_pipeline=_passes(storage),
            skip_model_load=True,
        )


def _passes(storage: Storage) -> Any:
    import coremltools as ct
    from coremltools.optimize import coreml as optimize

    passes = ct.PassPipeline.DEFAULT
    passes.remove_passes({"common::fuse_elementwise_to_batchnorm"})  # its epsilon, 1e-5, divides a factor by 1.000005
    if storage == "dynamic":  # as a pass, since coremltools can't load a classifier to quantise it afterwards
        config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
        passes.append_pass(_QUANTISE)
        passes.set_options(_QUANTISE, {"config": optimize.OptimizationConfig(global_config=config)})
    return passes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what coremltools and TensorFlow, which it imports if it is there, say when they are imported: which parts
    are absent off macOS, which versions of other libraries it doesn't know, and how TensorFlow computes.
    """
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with runtimes.quiet():
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _converting() -> Iterator[None]:
    """Hides coremltools' progress bars, and the folder that it leaves to the garbage collector; not its warnings."""
    logger, handler = logging.getLogger("coremltools"), logging.StreamHandler()  # to what is stderr now
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        logger.removeHandler(handler)


def _labels(exportable: Exportable) -> list[str]:
    """Returns distinct names for logits: labels, with their number where two are equal; none if it is no classifier."""
    info = exportable.weights.info
    if exportable.outputs != "raw" or info.task != "classification":
        return []
    counts = collections.Counter(info.labels)
    return [label if counts[label] == 1 else f"{label} ({i})" for i, label in enumerate(info.labels)]


def to_program(traced: Graph, is_image: bool = False, softmax: bool = False) -> Any:
    """Returns the program of coremltools for a graph whose known values are arrays.

    Args:
      traced: the graph, with one input [1, h, w, c].
      is_image: whether the program's input is an image, [1, c, h, w] of floats in 0..255.
      softmax: whether it has an output `PROBABILITIES` besides, the softmax of the only one.
    """
    import coremltools as ct
    from coremltools.converters.mil import mil
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

    (image,) = traced.inputs
    shape = tuple(image.shape[axis] for axis in _TO_NCHW) if is_image else image.shape
    source = mb.placeholder(shape=shape, dtype=types.fp32)
    program = mil.Program()
    with mil.Function({INPUT: source}, opset_version=ct.target.iOS16) as function:
        x = function.inputs[INPUT]
        made = {image: mb.transpose(x=x, perm=_TO_NHWC) if is_image else x}
        for node in traced.nodes:
            _add(node, made)
        outputs = []
        for name, operand in traced.outputs.items():
            if not isinstance(operand, Value):
                raise UserError(f"the output {name!r} doesn't depend on the image, so there is nothing to export")
            outputs.append(mb.identity(x=made[operand], name=name))
        if softmax:
            outputs.append(mb.softmax(x=made[operand], axis=-1, name=PROBABILITIES))
        function.set_outputs(outputs)
    program.add_function("main", function)
    return program


def _add(node: Node, made: dict[Value, Any]) -> None:
    """Adds the operators of a node to the program that is being built, and its outputs to those made."""
    rule = RULES.get(node.op)
    if rule is None:
        raise no_rule(node, "Core ML", f"the operator {node.op!r}")
    dtype = next(operand.dtype for operand in node.operands if isinstance(operand, Value))
    operands = [made[x] if isinstance(x, Value) else np.asarray(x, dtype) for x in node.operands]
    outputs = rule(node, *operands)
    if node.clip is not None:
        outputs = _clipped(outputs, *node.clip)
    made.update(zip(node.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


# --- rules: from a node and its operands, variables of the program or arrays, to its outputs -----------------


_Rule: TypeAlias = Callable[..., Any]


def _op(name: str, **inputs: Any) -> Any:
    """Adds an operator of Core ML; returns its outputs."""
    from coremltools.converters.mil.mil import Builder

    return getattr(Builder, name)(**inputs)


def _unary(name: str, **inputs: Any) -> _Rule:
    return lambda node, x: _op(name, x=x, **inputs)


def _binary(name: str) -> _Rule:
    return lambda node, x, y: _op(name, x=x, y=y)


def _reduce(name: str) -> _Rule:
    def rule(node: Node, x: Any) -> Any:
        axes = list(node.params["axes"])
        if len(np.shape(node.operands[0])) == 4 and axes == [1, 2]:  # rows and columns, where a map is [b, c, h, w]
            x, axes = _op("transpose", x=x, perm=_TO_NCHW), [2, 3]
        return _op(name, x=x, axes=axes, keep_dims=False)

    return rule


def _channels_first(name: str, x: Any, **inputs: Any) -> Any:
    """Adds an operator of maps [b, c, h, w] for maps [b, h, w, c]."""
    y = _op(name, x=_op("transpose", x=x, perm=_TO_NCHW), pad_type="custom", **inputs)
    return _op("transpose", x=y, perm=_TO_NHWC)


def _clipped(x: Any, low: float, high: float) -> Any:
    if low == 0 and high in (6, math.inf):
        return _op("relu6" if high == 6 else "relu", x=x)
    if math.isinf(low) or math.isinf(high):
        name, bound = ("minimum", high) if math.isinf(low) else ("maximum", low)
        return _op(name, x=x, y=np.float32(bound))
    return _op("clip", x=x, alpha=np.float32(low), beta=np.float32(high))


def _hard_swish(node: Node, x: Any) -> Any:
    return _op("mul", x=x, y=_op("sigmoid_hard", x=x, alpha=np.float32(1 / 6), beta=np.float32(1 / 2)))


def _cast(node: Node, x: Any) -> Any:
    names = {"float32": "fp32", "int32": "int32", "bool": "bool"}
    name = np.dtype(node.params["new_dtype"]).name
    if name not in names:
        raise no_rule(node, "Core ML", f"a cast to {name}")
    return _op("cast", x=x, dtype=names[name])


def _conv(node: Node, x: Any, kernel: Any, *biases: Any) -> Any:
    check_convolution(node, "Core ML")
    params = node.params
    return _channels_first(
        "conv",
        x,
        weight=kernel.transpose(3, 2, 0, 1),
        **_bias(biases),
        strides=list(params["window_strides"]),
        pad=np.ravel(params["padding"]).tolist(),
        dilations=list(params["rhs_dilation"]),
        groups=params["feature_group_count"],
    )


def _bias(biases: Sequence[Any]) -> dict[str, Any]:
    return {"bias": biases[0].reshape(-1)} if biases else {}


def _dot(node: Node, x: Any, y: Any, *biases: Any) -> Any:
    (over_x, over_y), (batch_x, batch_y) = node.params["dimension_numbers"]
    shape_x, shape_y = (np.shape(operand) for operand in node.operands[:2])
    if isinstance(y, np.ndarray) and (len(shape_x), y.ndim, over_x, over_y) == (2, 2, (1,), (0,)):
        return _op("linear", x=x, weight=y.T, **_bias(biases))
    free_x = [axis for axis in range(len(shape_x)) if axis not in (*batch_x, *over_x)]
    free_y = [axis for axis in range(len(shape_y)) if axis not in (*batch_y, *over_y)]
    x = _in_groups(x, shape_x, batch_x, free_x, over_x)
    y = _in_groups(y, shape_y, batch_y, over_y, free_y)
    product = _op("reshape", x=_op("matmul", x=x, y=y), shape=node.output.shape)
    return _op("add", x=product, y=biases[0]) if biases else product


def _in_groups(x: Any, shape: Sequence[int], batch: Sequence[int], *groups: Sequence[int]) -> Any:
    """Brings axes into this order, and joins those of each group to one."""
    joined = [shape[axis] for axis in batch] + [math.prod(shape[axis] for axis in group) for group in groups]
    perm = [*batch, *(axis for group in groups for axis in group)]
    return _op("reshape", x=_op("transpose", x=x, perm=perm), shape=joined)


def _max_pool(node: Node, x: Any) -> Any:
    params = node.params
    sizes, padding = params["window_dimensions"], params["padding"]
    if {sizes[0], sizes[3], *params["base_dilation"], *params["window_dilation"]} != {1}:
        raise no_rule(node, "Core ML", "a maximum over more than rows and columns, or with gaps")
    pad, strides = np.ravel(padding[1:3]).tolist(), list(params["window_strides"][1:3])
    return _channels_first("max_pool", x, kernel_sizes=list(sizes[1:3]), strides=strides, pad=pad)


def _expand(node: Node, x: Any) -> Any:
    sizes = zip(node.output.shape, np.shape(node.operands[0]), strict=True)
    return _op("tile", x=x, reps=[size // present for size, present in sizes])


def _reshape(node: Node, x: Any) -> Any:
    return _op("reshape", x=x, shape=node.output.shape)


RULES: Mapping[str, _Rule] = {
    **{op: _binary(op) for op in ("add", "sub", "mul", "pow")},
    **{op: _unary(op) for op in ("exp", "log", "sqrt", "rsqrt", "abs", "erf", "tanh", "sin", "cos", "square")},
    "div": _binary("real_div"),
    "neg": lambda node, x: _op("mul", x=x, y=np.float32(-1)),
    "logistic": _unary("sigmoid"),
    "max": _binary("maximum"),
    "min": _binary("minimum"),
    "clip": lambda node, x: _clipped(x, node.params["low"], node.params["high"]),
    "hard_swish": _hard_swish,
    "gelu": _unary("gelu", mode="EXACT"),
    "softmax": _unary("softmax", axis=-1),
    "mean": _reduce("reduce_mean"),
    "erfc": lambda node, x: _op("sub", x=np.float32(1), y=_op("erf", x=x)),
    "convert_element_type": _cast,
    "integer_pow": lambda node, x: _op("pow", x=x, y=np.float32(node.params["y"])),
    graph.CONV: _conv,
    graph.DOT: _dot,
    **{op: _reduce(op) for op in ("reduce_sum", "reduce_max", "reduce_min")},
    "reduce_window_max": _max_pool,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "broadcast_in_dim": _expand,
    "transpose": lambda node, x: _op("transpose", x=x, perm=list(node.params["permutation"])),
    "concatenate": lambda node, *xs: _op("concat", values=xs, axis=node.params["dimension"]),
    "argmax": lambda node, x: _op("reduce_argmax", x=x, axis=node.params["axes"][0], keep_dims=False),
    "top_k": lambda node, x: tuple(_op("topk", x=x, k=node.params["k"], axis=-1)),
}
"""Rules that write an operator of the graph as Core ML operators."""
