"""ONNX from the graph, by a table of operators.

Maps are kept in ONNX's layout [b, c, h, w] where convolutions make and read them; a transpose is written only where an
operator needs [b, h, w, c]. The batch is symbolic: no operator names its size.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mnv2_jax import graph
from mnv2_jax.errors import UserError
from mnv2_jax.export.function import INPUT, Exportable
from mnv2_jax.graph import Graph, Node, Operand, Value
from mnv2_jax.json_files import write_bytes

OPSET = 17
BATCH = "batch"
"""Name of the symbolic size of the batch."""
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def write(exportable: Exportable, path: pathlib.Path) -> None:
    """Writes an ONNX file; see `to_bytes`."""
    write_bytes(path, to_bytes(exportable))


def to_bytes(exportable: Exportable) -> bytes:
    """Returns the content of an ONNX file.

    Raises:
      UserError: naming the operator and its layer, if there is no rule for it.
    """
    import onnx

    model = to_model(exportable.graph(), exportable.facts())
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def to_model(traced: Graph, facts: Mapping[str, str]) -> Any:
    """Returns the ONNX model of a graph whose known values are arrays, with facts among its properties."""
    from onnx import helper

    writer = _Writer()
    (image,) = traced.inputs
    writer.names[image, "NHWC"] = INPUT
    for node in traced.nodes:
        writer.add(node)
    outputs = {}
    for name, operand in traced.outputs.items():
        if not isinstance(operand, Value):
            raise UserError(f"the output {name!r} doesn't depend on the image, so there is nothing to export")
        writer.emit("Identity", [writer.name(operand)], name)
        outputs[name] = helper.make_tensor_value_info(name, _type(operand.dtype), [BATCH, *operand.shape[1:]])
    source = helper.make_tensor_value_info(INPUT, _type(image.dtype), [BATCH, *image.shape[1:]])
    nodes = _read_by(outputs, writer.nodes)
    read = {name for node in nodes for name in node.input}
    constants = [constant for constant in writer.initializers if constant.name in read]
    made = helper.make_graph(nodes, "mnv2_jax", [source], list(outputs.values()), constants)
    model = helper.make_model(made, producer_name="mnv2_jax", opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8  # of opset 17: older runtimes refuse a newer one
    helper.set_model_props(model, dict(facts))
    return model


def _read_by(names: Iterable[str], nodes: Sequence[Any]) -> list[Any]:
    """Returns the nodes on which the outputs of these names depend."""
    wanted, kept = set(names), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _type(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class _Writer:
    """Collects the nodes and constants of an ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.names: dict[tuple[Value, str], str] = {}
        """Names of a value by its layout; NHWC is also that of arrays without four axes."""
        self.relu_inputs: dict[Value, Value] = {}
        """Operands of the maxima with 0, by their outputs."""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, node: Node) -> None:
        """Writes a node by the rule for its operator."""
        rule = RULES.get(node.op)
        if rule is None:
            raise UserError(f"{'/'.join(node.scope)}: ONNX has no rule for the operator {node.op!r} here")
        rule(self, node)

    def emit(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Adds an ONNX node; returns the name of its output."""
        from onnx import helper

        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"n{len(self.nodes)}", **attributes))
        return output

    def constant(self, value: Any) -> str:
        """Adds a constant, or finds an equal one; returns its name."""
        from onnx import numpy_helper

        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), self._constants[key]))
        return self._constants[key]

    def name(self, operand: Operand, layout: str = "NHWC", like: Any = None) -> str:
        """Returns the name of an operand in a layout. Known values get the type of ``like``, a dtype, if given."""
        if not isinstance(operand, Value):
            array = np.asarray(operand) if like is None else np.asarray(operand, like)
            return self.constant(array.transpose(_TO_NCHW) if layout == "NCHW" and array.ndim == 4 else array)
        if (operand, layout) not in self.names:
            other = self.names[operand, "NCHW" if layout == "NHWC" else "NHWC"]
            perm = _TO_NCHW if layout == "NCHW" else _TO_NHWC
            self.names[operand, layout] = self.emit("Transpose", [other], perm=perm)
        return self.names[operand, layout]

    def layout_of(self, operands: Sequence[Operand]) -> str:
        """Returns the layout in which an operator without axes is written: that which most operands have already."""
        values = [operand for operand in operands if isinstance(operand, Value)]
        is_map = all(len(value.shape) == 4 for value in values)
        return "NCHW" if is_map and any((value, "NCHW") in self.names for value in values) else "NHWC"


# --- rules --------------------------------------------------------------------------------------------------


def _elementwise(op: str) -> Callable[[_Writer, Node], None]:
    def rule(writer: _Writer, node: Node) -> None:
        layout = writer.layout_of(node.operands)
        like = next(operand.dtype for operand in node.operands if isinstance(operand, Value))
        inputs = [writer.name(operand, layout, like) for operand in node.operands]
        writer.names[node.output, layout] = writer.emit(op, inputs)

    return rule


def _derived(*ops: str) -> Callable[[_Writer, Node], None]:
    """Makes the rule of an operator of one operand that is several of ONNX, one after the other."""

    def rule(writer: _Writer, node: Node) -> None:
        layout = writer.layout_of(node.operands)
        name = writer.name(node.operands[0], layout)
        for op in ops:
            name = writer.emit(op, [name])
        writer.names[node.output, layout] = name

    return rule


def _max(writer: _Writer, node: Node) -> None:
    value, bound = _bounded(node)
    if bound == 0 and value is not None:
        writer.relu_inputs[node.output] = value
        layout = writer.layout_of([value])
        writer.names[node.output, layout] = writer.emit("Relu", [writer.name(value, layout)])
    else:
        _elementwise("Max")(writer, node)


def _min(writer: _Writer, node: Node) -> None:
    value, bound = _bounded(node)
    if bound is not None and value in writer.relu_inputs:  # relu6; the Relu is dropped if nothing else reads it
        x = writer.relu_inputs[value]
        layout = writer.layout_of([x])
        bounds = [writer.constant(np.asarray(number, node.output.dtype)) for number in (0, bound)]
        writer.names[node.output, layout] = writer.emit("Clip", [writer.name(x, layout), *bounds])
    else:
        _elementwise("Min")(writer, node)


def _bounded(node: Node) -> tuple[Value | None, float | None]:
    """Returns the value of a maximum or minimum with a known number, and that number."""
    values = [operand for operand in node.operands if isinstance(operand, Value)]
    knowns = [operand for operand in node.operands if not isinstance(operand, Value)]
    if len(values) != 1 or np.size(knowns[0]) != 1:
        return None, None
    return values[0], float(np.asarray(knowns[0]).reshape(()))


def _erfc(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    erf = writer.emit("Erf", [writer.name(node.operands[0], layout)])
    writer.names[node.output, layout] = writer.emit("Sub", [writer.constant(np.float32(1)), erf])


def _cast(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    writer.names[node.output, layout] = writer.emit(
        "Cast", [writer.name(node.operands[0], layout)], to=_type(node.params["new_dtype"])
    )


def _integer_pow(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    exponent = writer.constant(np.asarray(node.params["y"], node.output.dtype))
    writer.names[node.output, layout] = writer.emit("Pow", [writer.name(node.operands[0], layout), exponent])


def _square(writer: _Writer, node: Node) -> None:
    layout = writer.layout_of(node.operands)
    name = writer.name(node.operands[0], layout)
    writer.names[node.output, layout] = writer.emit("Mul", [name, name])


def _conv(writer: _Writer, node: Node) -> None:
    params, (x, kernel, *biases) = node.params, node.operands
    usual = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    if tuple(map(tuple, params["dimension_numbers"])) != usual or set(params["lhs_dilation"]) != {1}:
        raise UserError(f"{'/'.join(node.scope)}: ONNX has no rule for a convolution of this layout or dilated input")
    if isinstance(kernel, Value):
        raise UserError(f"{'/'.join(node.scope)}: ONNX has no rule for a kernel that depends on the image")
    (top, bottom), (left, right) = params["padding"]
    inputs = [writer.name(x, "NCHW"), writer.constant(np.asarray(kernel).transpose(3, 2, 0, 1))]
    inputs += [writer.constant(np.asarray(bias).reshape(-1)) for bias in biases]
    writer.names[node.output, "NCHW"] = writer.emit(
        "Conv",
        inputs,
        group=params["feature_group_count"],
        strides=params["window_strides"],
        dilations=params["rhs_dilation"],
        pads=[top, left, bottom, right],
    )


def _dot(writer: _Writer, node: Node) -> None:
    x, y, *biases = node.operands
    (contracted_x, contracted_y), (batch_x, batch_y) = node.params["dimension_numbers"]
    ranks = len(np.shape(x)), len(np.shape(y))
    if ranks == (2, 2) and (tuple(contracted_x), tuple(contracted_y)) == ((1,), (0,)):
        added = [writer.constant(np.asarray(bias).reshape(-1)) for bias in biases]
        name = writer.emit("Gemm", [writer.name(x), writer.name(y), *added])
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
        name = writer.emit("Einsum", [writer.name(x), writer.name(y)], equation=equation)
        if biases:
            name = writer.emit("Add", [name, writer.name(biases[0])])
    writer.names[node.output, "NHWC"] = name


def _reduce(op: str, axes_are_input: bool = False) -> Callable[[_Writer, Node], None]:
    def rule(writer: _Writer, node: Node) -> None:
        (x,) = node.operands
        layout = writer.layout_of(node.operands)
        axes = [_TO_NHWC[axis] if layout == "NCHW" else axis for axis in node.params["axes"]]
        if layout == "NCHW" and set(node.params["axes"]) != {1, 2}:
            layout, axes = "NHWC", list(node.params["axes"])  # what is left would not be in order
        name = writer.name(x, layout)
        if axes_are_input:
            name = writer.emit(op, [name, writer.constant(np.array(axes, np.int64))], keepdims=0)
        else:
            name = writer.emit(op, [name], axes=axes, keepdims=0)
        writer.names[node.output, "NHWC"] = name

    return rule


def _max_pool(writer: _Writer, node: Node) -> None:
    params, (x,) = node.params, node.operands
    if (
        params["window_dimensions"][0] != 1
        or params["window_dimensions"][3] != 1
        or set(params["base_dilation"]) != {1}
    ):
        raise UserError(f"{'/'.join(node.scope)}: ONNX has no rule for a maximum over more than rows and columns")
    _, (top, bottom), (left, right), _ = params["padding"]
    writer.names[node.output, "NCHW"] = writer.emit(
        "MaxPool",
        [writer.name(x, "NCHW")],
        kernel_shape=params["window_dimensions"][1:3],
        strides=params["window_strides"][1:3],
        dilations=params["window_dilation"][1:3],
        pads=[top, left, bottom, right],
    )


def _batched(node: Node, shape: Sequence[int]) -> list[int]:
    """Returns a shape in which the axis of the batch, first and of size 1 at batch 1, keeps whatever size it has."""
    if not (shape and shape[0] == 1 and np.shape(node.operands[0])[:1] == (1,)):
        raise UserError(f"{'/'.join(node.scope)}: {node.op} moves the axis of the batch, which can't be exported")
    return [0, *shape[1:]]


def _reshape(writer: _Writer, node: Node) -> None:
    shape = writer.constant(np.array(_batched(node, node.output.shape), np.int64))
    writer.names[node.output, "NHWC"] = writer.emit("Reshape", [writer.name(node.operands[0]), shape])


def _expand(writer: _Writer, node: Node) -> None:
    shape = writer.constant(np.array([1, *node.output.shape[1:]], np.int64))
    writer.names[node.output, "NHWC"] = writer.emit("Expand", [writer.name(node.operands[0]), shape])


def _transpose(writer: _Writer, node: Node) -> None:
    perm = list(node.params["permutation"])
    writer.names[node.output, "NHWC"] = writer.emit("Transpose", [writer.name(node.operands[0])], perm=perm)


def _concatenate(writer: _Writer, node: Node) -> None:
    inputs = [writer.name(operand) for operand in node.operands]
    writer.names[node.output, "NHWC"] = writer.emit("Concat", inputs, axis=node.params["dimension"])


def _top_k(writer: _Writer, node: Node) -> None:
    from onnx import helper

    values, indices = node.outputs
    names = [f"v{len(writer.nodes)}", f"v{len(writer.nodes)}_places"]
    inputs = [writer.name(node.operands[0]), writer.constant(np.array([node.params["k"]], np.int64))]
    writer.nodes.append(helper.make_node("TopK", inputs, names, name=f"n{len(writer.nodes)}", axis=-1))
    writer.names[values, "NHWC"] = names[0]
    writer.names[indices, "NHWC"] = writer.emit("Cast", [names[1]], to=_type(indices.dtype))


RULES: Mapping[str, Callable[[_Writer, Node], None]] = {
    **{op: _elementwise(op.capitalize()) for op in ("add", "sub", "mul", "div", "pow")},
    **{op: _derived(op.capitalize()) for op in ("neg", "exp", "log", "sqrt", "abs", "erf", "tanh", "sin", "cos")},
    "rsqrt": _derived("Sqrt", "Reciprocal"),
    "logistic": _derived("Sigmoid"),
    "max": _max,
    "min": _min,
    "erfc": _erfc,
    "convert_element_type": _cast,
    "integer_pow": _integer_pow,
    "square": _square,
    graph.CONV: _conv,
    graph.DOT: _dot,
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
}
"""Rules that write an operator of the graph as ONNX operators."""
