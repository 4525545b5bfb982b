"""ONNX from the graph, by a table of operators.

Maps are kept in ONNX's layout [b, c, h, w] where convolutions make and read them; a transpose is written only where an
operator needs [b, h, w, c]. The batch is symbolic: no operator names its size.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.export.function import INPUT, Storage
from mnv2_jax.export.quantise import CAST, UNSIGNED, Quantised, in_floats
from mnv2_jax.export.runtimes import INTEGERS, NCHW
from mnv2_jax.export.shapes import (
    check_bool,
    check_convolution,
    check_rows,
    in_half,
    known_of,
    names_of,
    no_rule,
    pads_of,
    slice_of,
    with_free_batch,
)
from mnv2_jax.graph import CONV, DOT, Graph, Node, Operand, Value
from mnv2_jax.json_files import write_bytes

OPSET = 17
BATCH = "batch"
"""Name of the symbolic size of the batch."""
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def write(
    path: pathlib.Path, traced: Graph | Quantised, facts: Mapping[str, str], storage: Storage = "float32"
) -> None:
    """Writes an ONNX file.

    Args:
      path: the file.
      traced: a graph whose known values are arrays, or what `export.quantise.quantise` made of it.
      facts: texts that are stored among the file's properties.
      storage: how the weights of a graph in floats are stored: as they are, or in half precision.

    Raises:
      UserError: naming the operator and its layer, if there is no rule for it.
    """
    write_bytes(path, to_bytes(traced, facts, storage))


def to_bytes(traced: Graph | Quantised, facts: Mapping[str, str], storage: Storage = "float32") -> bytes:
    """Returns the content of the file that `write` writes."""
    import onnx

    model = to_model(traced, facts, storage)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def to_model(traced: Graph | Quantised, facts: Mapping[str, str], storage: Storage = "float32") -> Any:
    """Returns the ONNX model that `write` writes.

    A quantised operator stands between DequantizeLinear and QuantizeLinear, as runtimes want it. Values are uint8,
    kernels int8 and biases int32.
    """
    from onnx import helper

    quantised = traced if isinstance(traced, Quantised) else in_floats(traced)
    writer, graph = _Writer(quantised, storage), quantised.graph
    for node in graph.nodes:
        writer.add(node)
    outputs = {}
    for name, operand in graph.outputs.items():
        if not isinstance(operand, Value):
            raise UserError(f"the output {name!r} doesn't depend on the image, so there is nothing to export")
        writer.emit("Identity", [writer.name(operand)], name)
        outputs[name] = helper.make_tensor_value_info(name, _type(operand.dtype), [BATCH, *operand.shape[1:]])
    (image,) = graph.inputs
    source = helper.make_tensor_value_info(INPUT, _type(image.dtype), [BATCH, *image.shape[1:]])
    made = helper.make_graph(writer.nodes, "mnv2_jax", [source], list(outputs.values()), writer.initializers)
    model = helper.make_model(made, producer_name="mnv2_jax", opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8  # of opset 17: older runtimes refuse a newer one
    helper.set_model_props(model, dict(facts))
    return model


def _type(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class _Writer:
    """Collects the nodes and constants of an ONNX graph."""

    def __init__(self, quantised: Quantised, storage: Storage):
        (image,) = quantised.graph.inputs
        self.quantised, self.storage = quantised, storage
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.names: dict[tuple[Value, str], str] = {(image, "NHWC"): INPUT}
        """Names of a value by its layout; NHWC is also that of arrays without four axes."""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._rounded: set[Value] = set()
        self._value_names = names_of(quantised.graph)

    def add(self, node: Node) -> None:
        """Writes a node by the rule for its operator."""
        rule = RULES.get(node.op)
        if rule is None:
            raise no_rule(node, "ONNX", f"the operator {node.op!r}")
        if node not in self.quantised.nodes:
            rule(self, node)
            if node.clip is not None:
                layout = self._layouts(node.output)[0]
                made = self.clip(self.names[node.output, layout], *node.clip, node.output.dtype)
                self.names[node.output, layout] = made
            return
        if node.op == CAST:  # the pixels are integers already
            grid = [self.constant(np.float32(1)), self.constant(np.uint8(0))]
            self.names[node.output, "NHWC"] = self.emit("DequantizeLinear", [INPUT, *grid])
            return
        for operand in node.operands:  # those that were computed in floats
            if isinstance(operand, Value) and operand not in self._rounded:
                self._round(operand)
        rule(self, node)
        self._round(node.output)  # to a grid that ends at the bounds of the node

    def _layouts(self, value: Value) -> list[str]:
        return [layout for layout in ("NHWC", "NCHW") if (value, layout) in self.names]

    def _round(self, value: Value) -> None:
        """Rounds a value to its grid: its name is that of the rounded one from now on."""
        layout, grid = self._layouts(value)[0], self.quantised.grids[value]
        numbers = [self.constant(np.float32(grid.scale)), self.constant(np.uint8(grid.zero_point + UNSIGNED))]
        name = f"{self._value_names[value]}{INTEGERS}{NCHW if layout == 'NCHW' else ''}"
        integers = self.emit("QuantizeLinear", [self.names.pop((value, layout)), *numbers], name)
        for other in self._layouts(value):
            del self.names[value, other]
        self.names[value, layout] = self.emit("DequantizeLinear", [integers, *numbers])
        self._rounded.add(value)

    def known(self, node: Node, place: int, perm: Sequence[int] | None = None) -> str:
        """Returns the name of a known operand as it is stored, in another order of its axes; a bias as [c].

        An order of more axes than it has is that of axes of size 1 and these.
        """
        stored = self.quantised.arrays.get((node, place))
        array = known_of(node, place) if stored is None else stored[0]
        is_kernel, is_bias = node.op in (CONV, DOT) and place == 1, node.op in (CONV, DOT) and place == 2
        if is_bias:
            array = array.reshape(-1)
        elif perm is not None:
            array = array.reshape((1,) * (len(perm) - array.ndim) + array.shape).transpose(perm)
        if stored is None:
            if self.storage == "float16" and array.dtype == np.float32 and array.size > 1:
                return self.emit("Cast", [self.constant(in_half(array))], to=_type(np.float32))
            return self.constant(array)
        grid = stored[1]
        if is_kernel:
            axis = list(perm or range(array.ndim)).index(array.ndim - 1)
            zeros = np.zeros(np.shape(grid.scale), np.int8)
            return self.emit(
                "DequantizeLinear", [self.constant(array), self.constant(grid.scale), self.constant(zeros)], axis=axis
            )
        if is_bias:
            return self.emit("DequantizeLinear", [self.constant(array), self.constant(grid.scale)], axis=0)
        unsigned = (array.astype(np.int16) + UNSIGNED).astype(np.uint8)  # as the other operand is
        numbers = [self.constant(np.float32(grid.scale)), self.constant(np.uint8(grid.zero_point + UNSIGNED))]
        return self.emit("DequantizeLinear", [self.constant(unsigned), *numbers])

    def emit(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Adds an ONNX node; returns the name of its output."""
        from onnx import helper

        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"n{len(self.nodes)}", **attributes))
        return output

    def clip(self, name: str, low: float, high: float, dtype: Any) -> str:
        """Adds the bounds of a value; returns its name."""
        if (low, high) == (0, math.inf):
            return self.emit("Relu", [name])
        bounds = [self.constant(np.asarray(bound, dtype)) if math.isfinite(bound) else "" for bound in (low, high)]
        return self.emit("Clip", [name, *bounds])

    def constant(self, value: Any) -> str:
        """Adds a constant, or finds an equal one; returns its name."""
        from onnx import numpy_helper

        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), self._constants[key]))
        return self._constants[key]

    def read(self, node: Node, place: int, layout: str = "NHWC") -> str:
        """Returns the name of an operand in a layout."""
        operand = node.operands[place]
        if isinstance(operand, Value):
            return self.name(operand, layout)
        return self.known(node, place, _TO_NCHW if layout == "NCHW" and len(np.shape(operand)) == 4 else None)

    def name(self, value: Value, layout: str = "NHWC") -> str:
        """Returns the name of a value in a layout."""
        if (value, layout) not in self.names:
            other = self.names[value, "NCHW" if layout == "NHWC" else "NHWC"]
            perm = _TO_NCHW if layout == "NCHW" else _TO_NHWC
            self.names[value, layout] = self.emit("Transpose", [other], perm=perm)
        return self.names[value, layout]

    def layout_of(self, operands: Sequence[Operand]) -> str:
        """Returns the layout in which an operator without axes is written: that which most operands have already."""
        values = [operand for operand in operands if isinstance(operand, Value)]
        is_map = all(len(value.shape) == 4 for value in values)
        return "NCHW" if is_map and any((value, "NCHW") in self.names for value in values) else "NHWC"


# --- rules --------------------------------------------------------------------------------------------------


def _elementwise(op: str) -> Callable[[_Writer, Node], None]:
    def rule(writer: _Writer, node: Node) -> None:
        layout = writer.layout_of(node.operands)
        inputs = [writer.read(node, place, layout) for place in range(len(node.operands))]
        writer.names[node.output, layout] = writer.emit(op, inputs)

    return rule


def _derived(*ops: str) -> Callable[[_Writer, Node], None]:
    """Makes the rule of an operator of one operand that is several of ONNX, one after the other."""

    def rule(writer: _Writer, node: Node) -> None:
        layout = writer.layout_of(node.operands)
        name = writer.read(node, 0, layout)
        for op in ops:
            name = writer.emit(op, [name])
        writer.names[node.output, layout] = name

    return rule


def _clip(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    x = writer.read(node, 0, layout)
    writer.names[node.output, layout] = writer.clip(x, node.params["low"], node.params["high"], node.output.dtype)


def _gelu(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    half, one, root = (writer.constant(np.asarray(x, node.output.dtype)) for x in (0.5, 1.0, math.sqrt(0.5)))
    x = writer.read(node, 0, layout)
    erf = writer.emit("Erf", [writer.emit("Mul", [x, root])])
    halved = writer.emit("Mul", [x, half])
    writer.names[node.output, layout] = writer.emit("Mul", [halved, writer.emit("Add", [erf, one])])


def _softmax(writer: _Writer, node: Node) -> None:
    writer.names[node.output, "NHWC"] = writer.emit("Softmax", [writer.read(node, 0)], axis=-1)


def _erfc(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    erf = writer.emit("Erf", [writer.read(node, 0, layout)])
    writer.names[node.output, layout] = writer.emit("Sub", [writer.constant(np.float32(1)), erf])


def _cast(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    writer.names[node.output, layout] = writer.emit(
        "Cast", [writer.read(node, 0, layout)], to=_type(node.params["new_dtype"])
    )


def _integer_pow(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    exponent = writer.constant(np.asarray(node.params["y"], node.output.dtype))
    writer.names[node.output, layout] = writer.emit("Pow", [writer.read(node, 0, layout), exponent])


def _square(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    name = writer.read(node, 0, layout)
    writer.names[node.output, layout] = writer.emit("Mul", [name, name])


def _logical(op: str) -> Callable[[_Writer, Node], None]:
    def rule(writer: _Writer, node: Node) -> None:
        check_bool(node, "ONNX")
        _elementwise(op)(writer, node)

    return rule


def _choice(writer: _Writer, node: Node) -> None:
    check_bool(node, "ONNX")
    layout = writer.layout_of(node.operands)
    inputs = [writer.read(node, place, layout) for place in (0, 2, 1)]  # a condition, then what it chooses
    writer.names[node.output, layout] = writer.emit("Where", inputs)


def _conv(writer: _Writer, node: Node) -> None:
    check_convolution(node, "ONNX")
    params = node.params
    (top, bottom), (left, right) = params["padding"]
    inputs = [writer.read(node, 0, "NCHW"), writer.known(node, 1, (3, 2, 0, 1))]
    inputs += [writer.known(node, place) for place in range(2, len(node.operands))]
    writer.names[node.output, "NCHW"] = writer.emit(
        "Conv",
        inputs,
        group=params["feature_group_count"],
        strides=params["window_strides"],
        dilations=params["rhs_dilation"],
        pads=[top, left, bottom, right],
    )


def _dot(writer: _Writer, node: Node) -> None:
    x, y = node.operands[:2]
    (contracted_x, contracted_y), (batch_x, batch_y) = node.params["dimension_numbers"]
    ranks = len(np.shape(x)), len(np.shape(y))
    added = [writer.known(node, place) for place in range(2, len(node.operands))]
    is_dense = ranks[1] == 2 and (tuple(contracted_x), tuple(contracted_y)) == ((ranks[0] - 1,), (0,))
    batch = tuple(range(len(batch_x)))
    axes = ((len(batch) + 1,), (len(batch),)), (batch, batch)  # of matrices [*batch, m, n] and [*batch, n, p]
    are_matrices = ranks == (len(batch) + 2,) * 2 and axes == tuple(
        (tuple(first), tuple(second)) for first, second in node.params["dimension_numbers"]
    )
    if is_dense and ranks[0] == 2:
        name = writer.emit("Gemm", [writer.read(node, 0), writer.read(node, 1), *added])
    elif is_dense and not isinstance(y, Value) and writer.layout_of([x]) == "NCHW":  # at each position of a map
        kernel = writer.known(node, 1, (3, 2, 0, 1))
        writer.names[node.output, "NCHW"] = writer.emit("Conv", [writer.read(node, 0, "NCHW"), kernel, *added])
        return
    else:
        letters = iter("abcdefghijklmnop")
        axes_x = [next(letters) for _ in range(ranks[0])]
        axes_y = [next(letters) for _ in range(ranks[1])]
        for i, j in zip((*contracted_x, *batch_x), (*contracted_y, *batch_y), strict=True):
            axes_y[j] = axes_x[i]
        free_x = [axes_x[i] for i in range(ranks[0]) if i not in (*contracted_x, *batch_x)]
        free_y = [axes_y[j] for j in range(ranks[1]) if j not in (*contracted_y, *batch_y)]
        result = "".join([*(axes_x[i] for i in batch_x), *free_x, *free_y])
        equation = f"{''.join(axes_x)},{''.join(axes_y)}->{result}"
        inputs = [writer.read(node, 0), writer.read(node, 1)]
        is_matmul = is_dense or are_matrices
        name = writer.emit("MatMul", inputs) if is_matmul else writer.emit("Einsum", inputs, equation=equation)
        if added:
            name = writer.emit("Add", [name, *added])
    writer.names[node.output, "NHWC"] = name


def _reduce(op: str, axes_are_input: bool = False) -> Callable[[_Writer, Node], None]:
    def rule(writer: _Writer, node: Node) -> None:
        layout = writer.layout_of(node.operands)
        axes = [_TO_NHWC[axis] if layout == "NCHW" else axis for axis in node.params["axes"]]
        if layout == "NCHW" and set(node.params["axes"]) != {1, 2}:
            layout, axes = "NHWC", list(node.params["axes"])  # what is left would not be in order
        name = writer.read(node, 0, layout)
        if axes_are_input:
            name = writer.emit(op, [name, writer.constant(np.array(axes, np.int64))], keepdims=0)
        else:
            name = writer.emit(op, [name], axes=axes, keepdims=0)
        writer.names[node.output, "NHWC"] = name

    return rule


def _max_pool(writer: _Writer, node: Node) -> None:
    params = node.params
    if (
        params["window_dimensions"][0] != 1
        or params["window_dimensions"][3] != 1
        or set(params["base_dilation"]) != {1}
    ):
        raise no_rule(node, "ONNX", "a maximum over more than rows and columns")
    _, (top, bottom), (left, right), _ = params["padding"]
    writer.names[node.output, "NCHW"] = writer.emit(
        "MaxPool",
        [writer.read(node, 0, "NCHW")],
        kernel_shape=params["window_dimensions"][1:3],
        strides=params["window_strides"][1:3],
        dilations=params["window_dilation"][1:3],
        pads=[top, left, bottom, right],
    )


def _reshape(writer: _Writer, node: Node) -> None:
    shape = writer.constant(np.array(with_free_batch(node, node.output.shape), np.int64))
    writer.names[node.output, "NHWC"] = writer.emit("Reshape", [writer.read(node, 0), shape])


def _expand(writer: _Writer, node: Node) -> None:
    shape = writer.constant(np.array([1, *node.output.shape[1:]], np.int64))
    writer.names[node.output, "NHWC"] = writer.emit("Expand", [writer.read(node, 0), shape])


def _transpose(writer: _Writer, node: Node) -> None:
    perm = list(node.params["permutation"])
    writer.names[node.output, "NHWC"] = writer.emit("Transpose", [writer.read(node, 0)], perm=perm)


def _concatenate(writer: _Writer, node: Node) -> None:
    if not all(isinstance(operand, Value) for operand in node.operands):  # known values have no free batch
        raise no_rule(node, "ONNX", "a concatenation with what doesn't depend on the image")
    inputs = [writer.read(node, place) for place in range(len(node.operands))]
    writer.names[node.output, "NHWC"] = writer.emit("Concat", inputs, axis=node.params["dimension"])


def _slice(writer: _Writer, node: Node) -> None:
    cut = np.array(slice_of(node, "ONNX")[1:], np.int64).reshape(-1, 2)
    numbers = [writer.constant(each) for each in (cut[:, 0], cut[:, 1], np.arange(1, len(cut) + 1))]
    writer.names[node.output, "NHWC"] = writer.emit("Slice", [writer.read(node, 0), *numbers])


def _pad(writer: _Writer, node: Node) -> None:
    amounts = writer.constant(np.array(pads_of(node, "ONNX"), np.int64).T.reshape(-1))
    writer.names[node.output, "NHWC"] = writer.emit("Pad", [writer.read(node, 0), amounts, writer.known(node, 1)])


def _rows(writer: _Writer, node: Node) -> None:
    check_rows(node, "ONNX")
    numbers = writer.emit("Cast", [writer.read(node, 1)], to=_type(np.int64))
    writer.names[node.output, "NHWC"] = writer.emit("GatherND", [writer.read(node, 0), numbers], batch_dims=1)


def _top_k(writer: _Writer, node: Node) -> None:
    from onnx import helper

    values, indices = node.outputs
    names = [f"v{len(writer.nodes)}", f"v{len(writer.nodes)}_places"]
    inputs = [writer.read(node, 0), writer.constant(np.array([node.params["k"]], np.int64))]
    writer.nodes.append(helper.make_node("TopK", inputs, names, name=f"n{len(writer.nodes)}", axis=-1))
    writer.names[values, "NHWC"] = names[0]
    writer.names[indices, "NHWC"] = writer.emit("Cast", [names[1]], to=_type(indices.dtype))


def _argmax(writer: _Writer, node: Node) -> None:
    (axis,) = node.params["axes"]
    place = writer.emit("ArgMax", [writer.read(node, 0)], axis=axis, keepdims=0)
    writer.names[node.output, "NHWC"] = writer.emit("Cast", [place], to=_type(node.output.dtype))


RULES: Mapping[str, Callable[[_Writer, Node], None]] = {
    **{op: _elementwise(op.capitalize()) for op in ("add", "sub", "mul", "div", "pow")},
    **{op: _derived(op.capitalize()) for op in ("neg", "exp", "log", "sqrt", "abs", "erf", "tanh", "sin", "cos")},
    "rsqrt": _derived("Sqrt", "Reciprocal"),
    "logistic": _derived("Sigmoid"),
    "eq": _elementwise("Equal"),
    "ge": _elementwise("GreaterOrEqual"),
    "gt": _elementwise("Greater"),
    "le": _elementwise("LessOrEqual"),
    "lt": _elementwise("Less"),
    **{op: _logical(op.capitalize()) for op in ("and", "or", "not")},
    "select_n": _choice,
    "slice": _slice,
    "pad": _pad,
    "gather": _rows,
    "max": _elementwise("Max"),
    "min": _elementwise("Min"),
    "clip": _clip,
    "hard_swish": _derived("HardSwish"),
    "gelu": _gelu,
    "softmax": _softmax,
    "mean": _reduce("ReduceMean"),
    "erfc": _erfc,
    CAST: _cast,
    "integer_pow": _integer_pow,
    "square": _square,
    CONV: _conv,
    DOT: _dot,
    "reduce_sum": _reduce("ReduceSum", axes_are_input=True),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_window_max": _max_pool,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _expand,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "top_k": _top_k,
    "argmax": _argmax,
}
"""Rules that write an operator of the graph as ONNX operators."""
