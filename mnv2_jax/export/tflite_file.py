"""LiteRT (TFLite) from the graph, by a table of operators, in floats or as `export.quantise` quantised it.

Maps keep their layout [b, h, w, c]. The batch is free: a runtime may resize the input, and no operator names its size.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.export import tflite_metadata
from mnv2_jax.export.function import INPUT, Storage
from mnv2_jax.export.quantise import CAST, Grid, Quantised, in_floats, kernel_grid
from mnv2_jax.export.runtimes import CONSTANT, INTEGERS
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
from mnv2_jax.nn.window import Window

Form: TypeAlias = Literal["float", "int8"]
"""How a value is stored: in the type that it has in the graph, or as the integers of its grid."""


def write(
    path: pathlib.Path, traced: Graph | Quantised, facts: Mapping[str, str], storage: Storage = "float32"
) -> None:
    """Writes a LiteRT file.

    Args:
      path: the file.
      traced: a graph whose known values are arrays, or what `export.quantise.quantise` made of it.
      facts: texts that are stored in the file, those of `export.function.Exportable.facts`, or none.
      storage: how the weights of a graph in floats are stored.

    Raises:
      UserError: naming the operator and its layer, if there is no rule for it.
    """
    write_bytes(path, to_bytes(traced, facts, storage))


def to_bytes(traced: Graph | Quantised, facts: Mapping[str, str], storage: Storage = "float32") -> bytes:
    """Returns the content of the file that `write` writes."""
    import flatbuffers

    quantised = traced if isinstance(traced, Quantised) else in_floats(traced)
    writer = _Writer(quantised, storage)
    for node in quantised.graph.nodes:
        writer.add(node)
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(writer.model(facts).Pack(builder), b"TFL3")
    return tflite_metadata.with_labels(bytes(builder.Output()), json.loads(facts["labels"]) if facts else ())


class _Op(NamedTuple):
    """An operator of the format: the version that its float and its int8 form have, and the table of its options."""

    float_version: int
    int8_version: int
    options: str = ""


_OPS = {
    "ABS": _Op(1, 1, "AbsOptions"),
    "ADD": _Op(1, 2, "AddOptions"),
    "ARG_MAX": _Op(1, 1, "ArgMaxOptions"),
    "BATCH_MATMUL": _Op(1, 2, "BatchMatMulOptions"),
    "CAST": _Op(1, 1, "CastOptions"),
    "CONCATENATION": _Op(1, 2, "ConcatenationOptions"),
    "CONV_2D": _Op(1, 3, "Conv2DOptions"),
    "COS": _Op(1, 1, "CosOptions"),
    "DEPTHWISE_CONV_2D": _Op(2, 3, "DepthwiseConv2DOptions"),
    "DEQUANTIZE": _Op(3, 2, "DequantizeOptions"),  # 3: of half precision
    "DIV": _Op(1, 1, "DivOptions"),
    "EQUAL": _Op(1, 2, "EqualOptions"),
    "EXP": _Op(1, 1, "ExpOptions"),
    "FULLY_CONNECTED": _Op(5, 5, "FullyConnectedOptions"),  # 5: of more than two axes
    "GATHER": _Op(5, 5, "GatherOptions"),  # 5: of each example
    "GELU": _Op(1, 2, "GeluOptions"),
    "GREATER": _Op(1, 2, "GreaterOptions"),
    "GREATER_EQUAL": _Op(1, 2, "GreaterEqualOptions"),
    "HARD_SWISH": _Op(1, 1, "HardSwishOptions"),
    "LESS": _Op(1, 2, "LessOptions"),
    "LESS_EQUAL": _Op(1, 2, "LessEqualOptions"),
    "LOG": _Op(1, 1),
    "LOGICAL_AND": _Op(1, 1, "LogicalAndOptions"),
    "LOGICAL_NOT": _Op(1, 1, "LogicalNotOptions"),
    "LOGICAL_OR": _Op(1, 1, "LogicalOrOptions"),
    "LOGISTIC": _Op(1, 2),
    "MAXIMUM": _Op(1, 2, "MaximumMinimumOptions"),
    "MAX_POOL_2D": _Op(1, 2, "Pool2DOptions"),
    "MEAN": _Op(1, 2, "ReducerOptions"),
    "MINIMUM": _Op(1, 2, "MaximumMinimumOptions"),
    "MUL": _Op(1, 2, "MulOptions"),
    "NEG": _Op(1, 1, "NegOptions"),
    "PAD": _Op(1, 2, "PadOptions"),
    "PADV2": _Op(1, 2, "PadV2Options"),
    "POW": _Op(1, 1, "PowOptions"),
    "QUANTIZE": _Op(1, 2, "QuantizeOptions"),
    "REDUCE_MAX": _Op(1, 2, "ReducerOptions"),
    "REDUCE_MIN": _Op(1, 2, "ReducerOptions"),
    "RELU": _Op(1, 2),
    "RELU6": _Op(1, 2),
    "RELU_N1_TO_1": _Op(1, 1),
    "RESHAPE": _Op(1, 1, "ReshapeOptions"),
    "RSQRT": _Op(1, 2),
    "SELECT_V2": _Op(1, 1, "SelectV2Options"),
    "SIN": _Op(1, 1),
    "SLICE": _Op(1, 2, "SliceOptions"),
    "SOFTMAX": _Op(1, 2, "SoftmaxOptions"),
    "SQRT": _Op(1, 1),
    "SUB": _Op(1, 2, "SubOptions"),
    "SUM": _Op(1, 2, "ReducerOptions"),
    "TANH": _Op(1, 2),
    "TOPK_V2": _Op(1, 2, "TopKV2Options"),
    "TRANSPOSE": _Op(1, 2, "TransposeOptions"),
}
_RELU_OPS = {(0.0, math.inf): "RELU", (0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1"}
_FUSED = {"RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}  # numbers of schema.fbs
_SAME, _VALID = 0, 1


class _Writer:
    """Collects tensors, buffers and operators of a file."""

    def __init__(self, quantised: Quantised, storage: Storage):
        from ai_edge_litert import schema_py_generated as schema

        self.schema: Any = schema
        self.quantised, self.storage = quantised, storage
        self.buffers: list[Any] = [schema.BufferT()]  # the first is empty, for tensors that are computed
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: dict[tuple[str, int], int] = {}
        self.places: dict[tuple[Value, Form], int] = {}
        """Tensors of the values, by value and form."""
        self.makers = {value: node for node in quantised.graph.nodes for value in node.outputs}
        self._constants: dict[Any, int] = {}
        self._value_names = names_of(quantised.graph)
        self._name = INPUT
        (image,) = quantised.graph.inputs
        grid = Grid(np.float32(1)) if quantised.nodes and image.dtype == np.uint8 else None
        self.places[image, "float"] = self.tensor(image.shape, image.dtype, grid)
        self.tensors[0].name = INPUT

    def add(self, node: Node) -> None:
        """Writes a node by the rule for its operator."""
        rule = RULES.get(node.op)
        if rule is None:
            raise no_rule(node, "LiteRT", f"the operator {node.op!r}")
        self._name = self._value_names[node.outputs[0]]
        rule(self, node)

    # --- tensors ---

    def tensor(self, shape: Sequence[int], dtype: Any, grid: Grid | None, buffer: int = 0, axis: int = 0) -> int:
        """Adds a tensor; returns its number. Its name has that of the node which is written, and what it is."""
        tensor = self.schema.TensorT()
        tensor.name = f"{self._name}:{len(self.tensors)}{CONSTANT if buffer else ''}"
        tensor.shape, tensor.buffer = [int(size) for size in shape], buffer
        tensor.type = getattr(self.schema.TensorType, np.dtype(dtype).name.upper())
        if not buffer and shape:
            tensor.shapeSignature = [-1, *tensor.shape[1:]]
        if grid is not None:
            scales = np.atleast_1d(np.asarray(grid.scale, np.float32))
            params = self.schema.QuantizationParametersT()
            params.scale, params.zeroPoint = scales.tolist(), [grid.zero_point] * len(scales)
            params.quantizedDimension = axis if len(scales) > 1 else 0
            tensor.quantization = params
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, array: Any, grid: Grid | None = None, axis: int = 0) -> int:
        """Adds a constant, or finds an equal one; returns its number."""
        array = np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, array.tobytes(), axis, grid and (grid.scale.tobytes(), grid.zero_point))
        if key not in self._constants:
            buffer = self.schema.BufferT()
            buffer.data = array.reshape(-1).view(np.uint8)
            self.buffers.append(buffer)
            self._constants[key] = self.tensor(array.shape, array.dtype, grid, len(self.buffers) - 1, axis)
        return self._constants[key]

    def weights(self, array: Any) -> int:
        """Adds known floats; in half precision they are followed by the operator that widens them."""
        array = np.asarray(array)
        if self.storage != "float16" or array.dtype != np.float32 or array.size == 1:
            return self.constant(array)
        half = self.constant(in_half(array))
        key = ("widened", half)
        if key not in self._constants:
            self._constants[key] = self.emit("DEQUANTIZE", [half], array.shape, np.float32)
        return self._constants[key]

    def is_int8(self, node: Node) -> bool:
        """Whether a node is computed in integers."""
        return node in self.quantised.nodes

    def read(self, node: Node, place: int) -> int:
        """Returns the tensor of an operand in the form in which its node is computed."""
        operand, is_int8 = node.operands[place], self.is_int8(node)
        if isinstance(operand, Value):
            return self.value(operand, "int8" if is_int8 else "float")
        if is_int8:
            array, grid = self.quantised.arrays[node, place]
            return self.constant(array, grid, array.ndim - 1)
        return self.weights(known_of(node, place))

    def value(self, value: Value, form: Form) -> int:
        """Returns the tensor of a value in a form; if it has the other form only, the operator that converts it."""
        if (value, form) not in self.places:
            other = self.places[value, "float" if form == "int8" else "int8"]
            if form == "int8":
                made = self.emit("QUANTIZE", [other], value.shape, np.int8, self.quantised.grids[value])
                self.tensors[made].name = f"{self._value_names[value]}{INTEGERS}"
            else:
                made = self.emit("DEQUANTIZE", [other], value.shape, value.dtype)
            self.places[value, form] = made
        return self.places[value, form]

    # --- operators ---

    def emit(
        self, op: str, inputs: Sequence[int], shape: Sequence[int], dtype: Any, grid: Grid | None = None, **options: Any
    ) -> int:
        """Adds an operator with one output; returns the tensor of that."""
        output = self.tensor(shape, dtype, grid)
        self.operator(op, inputs, [output], **options)
        return output

    def operator(self, op: str, inputs: Sequence[int], outputs: Sequence[int], **options: Any) -> None:
        """Adds an operator."""
        entry, made = _OPS[op], self.schema.OperatorT()
        kinds = {self.tensors[number].type for number in (*inputs, *outputs) if number >= 0}
        version = entry.int8_version if self.schema.TensorType.INT8 in kinds else entry.float_version
        made.opcodeIndex = self.codes.setdefault((op, version), len(self.codes))
        made.inputs, made.outputs = list(inputs), list(outputs)
        if entry.options:
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, entry.options)
            made.builtinOptions = getattr(self.schema, f"{entry.options}T")()
            for key, value in options.items():
                assert hasattr(made.builtinOptions, key), (op, key)
                setattr(made.builtinOptions, key, value)
        self.operators.append(made)

    def like(self, node: Node, op: str, inputs: Sequence[int], shape: Sequence[int], **options: Any) -> int:
        """Adds an operator on the way to a node's output, with its type and grid."""
        is_int8 = self.is_int8(node)
        grid = self.quantised.grids[node.output] if is_int8 else None
        return self.emit(op, inputs, shape, np.int8 if is_int8 else node.output.dtype, grid, **options)

    def write(self, node: Node, op: str, inputs: Sequence[int], can_fuse: bool = False, **options: Any) -> None:
        """Adds the operator that makes a node's output, and the bounds of the node."""
        bounds = _RELU_OPS.get(node.clip) if node.clip else None
        if can_fuse:
            options["fusedActivationFunction"] = _FUSED.get(bounds or "", 0)
        made = self.like(node, op, inputs, node.output.shape, **options)
        if node.clip and not self.is_int8(node) and not (can_fuse and bounds in _FUSED):
            made = self.clip(node, made, node.clip)
        self.tensors[made].name = self._value_names[node.output]
        self.places[node.output, "int8" if self.is_int8(node) else "float"] = made

    def clip(self, node: Node, made: int, clip: tuple[float, float]) -> int:
        """Adds the bounds of a float tensor. Integers need none: a grid ends where its values do."""
        if clip in _RELU_OPS:
            return self.like(node, _RELU_OPS[clip], [made], node.output.shape)
        for op, bound in zip(("MAXIMUM", "MINIMUM"), clip, strict=True):
            if math.isfinite(bound):
                constant = self.constant(np.asarray(bound, node.output.dtype))
                made = self.like(node, op, [made, constant], node.output.shape)
        return made

    # --- the file ---

    def model(self, facts: Mapping[str, str]) -> Any:
        """Returns the model with its outputs, its signature and its facts."""
        schema = self.schema
        model, subgraph, signature = schema.ModelT(), schema.SubGraphT(), schema.SignatureDefT()
        outputs = {}
        for name, operand in self.quantised.graph.outputs.items():
            if not isinstance(operand, Value):
                raise UserError(f"the output {name!r} doesn't depend on the image, so there is nothing to export")
            outputs[name] = self.value(operand, "float")
            self.tensors[outputs[name]].name = name
        (image,) = self.quantised.graph.inputs
        inputs = {INPUT: self.places[image, "float"]}
        subgraph.name, subgraph.tensors, subgraph.operators = "main", self.tensors, self.operators
        subgraph.inputs, subgraph.outputs = list(inputs.values()), list(outputs.values())
        model.version, model.description, model.subgraphs = 3, "mnv2_jax", [subgraph]
        model.operatorCodes = [self._code(op, version) for op, version in self.codes]
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = self._entries(inputs), self._entries(outputs)
        model.signatureDefs = [signature]
        model.metadata = [self._metadata(name, text.encode()) for name, text in facts.items()]
        if facts:
            _, height, width, _ = image.shape
            shapes = {name: operand.shape for name, operand in self.quantised.graph.outputs.items()}
            content = tflite_metadata.to_bytes(facts, (height, width), INPUT, shapes)
            model.metadata.append(self._metadata(tflite_metadata.NAME, content))
        model.buffers = self.buffers
        return model

    def _code(self, op: str, version: int) -> Any:
        code = self.schema.OperatorCodeT()
        code.builtinCode = getattr(self.schema.BuiltinOperator, op)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
        return code

    def _entries(self, tensors: Mapping[str, int]) -> list[Any]:
        names = []
        for name, number in tensors.items():
            entry = self.schema.TensorMapT()
            entry.name, entry.tensorIndex = name, number
            names.append(entry)
        return names

    def _metadata(self, name: str, content: bytes) -> Any:
        buffer, entry = self.schema.BufferT(), self.schema.MetadataT()
        buffer.data = np.frombuffer(content, np.uint8)
        self.buffers.append(buffer)
        entry.name, entry.buffer = name, len(self.buffers) - 1
        return entry


# --- rules --------------------------------------------------------------------------------------------------


def _plain(op: str, can_fuse: bool = False, **options: Any) -> Callable[[_Writer, Node], None]:
    """Makes the rule of an operator that takes the operands as they are."""

    def rule(writer: _Writer, node: Node) -> None:
        inputs = [writer.read(node, place) for place in range(len(node.operands))]
        writer.write(node, op, inputs, can_fuse, **options)

    return rule


def _logical(op: str) -> Callable[[_Writer, Node], None]:
    def rule(writer: _Writer, node: Node) -> None:
        check_bool(node, "LiteRT")
        _plain(op)(writer, node)

    return rule


def _choice(writer: _Writer, node: Node) -> None:
    check_bool(node, "LiteRT")
    writer.write(node, "SELECT_V2", [writer.read(node, place) for place in (0, 2, 1)])  # a condition, what it chooses


def _cast(writer: _Writer, node: Node) -> None:
    if writer.is_int8(node):  # from uint8 pixels to the same numbers in int8
        (image,) = writer.quantised.graph.inputs
        writer.write(node, "QUANTIZE", [writer.places[image, "float"]])
    else:
        types = [
            getattr(writer.schema.TensorType, np.dtype(x.dtype).name.upper()) for x in (*node.operands, node.output)
        ]
        writer.write(node, "CAST", [writer.read(node, 0)], inDataType=types[0], outDataType=types[1])


def _clip(writer: _Writer, node: Node) -> None:
    x = writer.read(node, 0)
    if writer.is_int8(node):
        writer.write(node, "QUANTIZE", [x])  # to a grid that ends at the bounds
    else:
        clip = (node.params["low"], node.params["high"])
        writer.places[node.output, "float"] = writer.clip(node, x, clip)


def _conv(writer: _Writer, node: Node) -> None:
    check_convolution(node, "LiteRT")
    params, kernel = node.params, node.operands[1]
    channels, groups = _value(node.operands[0]).shape[-1], params["feature_group_count"]
    is_depthwise = groups == channels and np.shape(kernel)[2] == 1
    perm = (2, 0, 1, 3) if is_depthwise else (3, 0, 1, 2)  # [1, h, w, c], or [o, h, w, i]
    image, padding = _padded(writer, node, np.shape(kernel)[:2], params["window_strides"], params["rhs_dilation"])
    inputs = [image, _kernel(writer, node, perm), _bias(writer, node)]
    (stride_h, stride_w), (dilation_h, dilation_w) = params["window_strides"], params["rhs_dilation"]
    options = {"padding": padding, "strideH": stride_h, "strideW": stride_w}
    options |= {"dilationHFactor": dilation_h, "dilationWFactor": dilation_w}
    if is_depthwise:
        options["depthMultiplier"] = np.shape(kernel)[3] // channels
    writer.write(node, "DEPTHWISE_CONV_2D" if is_depthwise else "CONV_2D", inputs, True, **options)


def _kernel(writer: _Writer, node: Node, perm: Sequence[int]) -> int:
    """Returns the tensor of a kernel, whose last axis is that of output channels, in another order of its axes."""
    axis = list(perm).index(len(perm) - 1)
    if writer.is_int8(node):
        array, grid = writer.quantised.arrays[node, 1]
        return writer.constant(array.transpose(perm), grid, axis)
    kernel = np.asarray(node.operands[1])
    if writer.storage == "dynamic":
        grid = kernel_grid(kernel)
        return writer.constant(grid.integers(kernel).transpose(perm), grid, axis)
    return writer.weights(kernel.transpose(perm))


def _bias(writer: _Writer, node: Node) -> int:
    """Returns the tensor [c] of a bias, zeros if there is none: some runtimes want one."""
    if writer.is_int8(node) and len(node.operands) > 2:
        array, grid = writer.quantised.arrays[node, 2]
        return writer.constant(array, grid)
    channels = node.output.shape[-1]
    if writer.is_int8(node):
        x, kernel = writer.quantised.grids[_value(node.operands[0])], writer.quantised.arrays[node, 1][1]
        return writer.constant(np.zeros(channels, np.int32), Grid((x.scale * kernel.scale).astype(np.float32)))
    bias = node.operands[2] if len(node.operands) > 2 else np.zeros(channels, np.float32)
    return writer.weights(np.asarray(bias, np.float32).reshape(-1))


def _padded(
    writer: _Writer, node: Node, window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[int, int]:
    """Returns the tensor on which a window moves, padded if the format has no name for the padding, and that name."""
    x, pads = _value(node.operands[0]), [tuple(pad) for pad in node.params["padding"]]
    pads = pads if node.op == CONV else pads[1:3]
    image = writer.read(node, 0)
    same = [
        Window(stride, dilation).pad(size, kernel)
        for size, kernel, stride, dilation in zip(x.shape[1:3], window, strides, dilations, strict=True)
    ]
    if pads == [(0, 0), (0, 0)]:
        return image, _VALID
    if pads == same:
        return image, _SAME
    shape = [x.shape[0], *(size + sum(pad) for size, pad in zip(x.shape[1:3], pads, strict=True)), x.shape[3]]
    amounts = writer.constant(np.array([(0, 0), *pads, (0, 0)], np.int32))
    form: Form = "int8" if writer.is_int8(node) else "float"
    grid = writer.quantised.grids.get(x) if form == "int8" else None
    dtype, maker = np.int8 if form == "int8" else x.dtype, writer.makers.get(x)
    if node.op == CONV or (maker is not None and maker.clip is not None and maker.clip[0] >= 0):
        return writer.emit("PAD", [image, amounts], shape, dtype, grid), _VALID
    least = np.array([-128], np.int8) if form == "int8" else np.array([np.finfo(np.float32).min], np.float32)
    return writer.emit("PADV2", [image, amounts, writer.constant(least, grid)], shape, dtype, grid), _VALID


def _max_pool(writer: _Writer, node: Node) -> None:
    params = node.params
    one_or_two = {params["window_dimensions"][0], params["window_dimensions"][3], *params["base_dilation"]}
    if one_or_two != {1} or set(params["window_dilation"]) != {1}:
        raise no_rule(node, "LiteRT", "a maximum over more than rows and columns")
    (height, width), (stride_h, stride_w) = params["window_dimensions"][1:3], params["window_strides"][1:3]
    image, padding = _padded(writer, node, (height, width), (stride_h, stride_w), (1, 1))
    options = {"padding": padding, "strideH": stride_h, "strideW": stride_w}
    writer.write(node, "MAX_POOL_2D", [image], True, filterHeight=height, filterWidth=width, **options)


def _dot(writer: _Writer, node: Node) -> None:
    x, y = node.operands[:2]
    (contracted_x, contracted_y), (batch_x, batch_y) = node.params["dimension_numbers"]
    rank = len(np.shape(x))
    is_dense = tuple(contracted_x) == (rank - 1,) and tuple(contracted_y) == (0,) and len(np.shape(y)) == 2
    if isinstance(x, Value) and not isinstance(y, Value) and is_dense:
        inputs = [writer.read(node, 0), _kernel(writer, node, (1, 0)), _bias(writer, node)]
        writer.write(node, "FULLY_CONNECTED", inputs, True, keepNumDims=rank > 2)
        return
    if len(node.operands) > 2:
        raise no_rule(node, "LiteRT", "a product of maps with a bias")
    first, adj_x = _matrix(writer, node, 0, tuple(batch_x), tuple(contracted_x))
    second, is_transposed = _matrix(writer, node, 1, tuple(batch_y), tuple(contracted_y))
    shapes = [writer.tensors[number].shape for number in (first, second)]
    rows, columns = shapes[0][-1 if adj_x else -2], shapes[1][-2 if is_transposed else -1]
    product = (*shapes[0][:-2], rows, columns)
    options = {"adjX": adj_x, "adjY": is_transposed}
    if product == node.output.shape:
        writer.write(node, "BATCH_MATMUL", [first, second], **options)
        return
    made = writer.like(node, "BATCH_MATMUL", [first, second], product, **options)
    shape = writer.constant(np.array(with_free_batch(node, node.output.shape), np.int32))
    writer.write(node, "RESHAPE", [made, shape])


def _matrix(
    writer: _Writer, node: Node, place: int, batch: tuple[int, ...], contracted: tuple[int, ...]
) -> tuple[int, bool]:
    """Returns an operand as matrices [*batch, m, n], and whether they must be transposed for the product.

    The first operand is to be [*batch, free, contracted], the second [*batch, contracted, free].
    """
    shape = np.shape(node.operands[place])
    free = tuple(axis for axis in range(len(shape)) if axis not in (*batch, *contracted))
    wanted, transposed = (free, contracted), (contracted, free)
    if place == 1:
        wanted, transposed = transposed, wanted
    tensor = writer.read(node, place)
    in_order = tuple(range(len(shape)))
    is_transposed = (*batch, *transposed[0], *transposed[1]) == in_order
    order = in_order if is_transposed else (*batch, *wanted[0], *wanted[1])
    groups = transposed if is_transposed else wanted
    dtype = np.int8 if writer.is_int8(node) else node.output.dtype
    operand = node.operands[place]
    grid = writer.quantised.grids[operand] if writer.is_int8(node) and isinstance(operand, Value) else None
    if order != in_order:
        perm = writer.constant(np.array(order, np.int32))
        tensor = writer.emit("TRANSPOSE", [tensor, perm], [shape[axis] for axis in order], dtype, grid)
    sizes = [*(shape[axis] for axis in batch), *(math.prod(shape[axis] for axis in axes) for axes in groups)]
    if tuple(sizes) == tuple(shape[axis] for axis in order):
        return tensor, is_transposed
    target = writer.constant(np.array([-1, *sizes[1:]], np.int32))
    return writer.emit("RESHAPE", [tensor, target], sizes, dtype, grid), is_transposed


def _reshape(writer: _Writer, node: Node) -> None:
    shape = writer.constant(np.array(with_free_batch(node, node.output.shape), np.int32))
    writer.write(node, "RESHAPE", [writer.read(node, 0), shape])


def _transpose(writer: _Writer, node: Node) -> None:
    perm = writer.constant(np.array(node.params["permutation"], np.int32))
    writer.write(node, "TRANSPOSE", [writer.read(node, 0), perm])


def _expand(writer: _Writer, node: Node) -> None:
    if node.output.shape[:1] != (1,):
        raise no_rule(node, "LiteRT", "a broadcast of the batch")
    zeros = writer.constant(np.zeros((1, *node.output.shape[1:]), node.output.dtype))
    writer.write(node, "ADD", [writer.read(node, 0), zeros])


def _concatenate(writer: _Writer, node: Node) -> None:
    if not all(isinstance(operand, Value) for operand in node.operands):  # known values have no free batch
        raise no_rule(node, "LiteRT", "a concatenation with what doesn't depend on the image")
    inputs = [writer.read(node, place) for place in range(len(node.operands))]
    writer.write(node, "CONCATENATION", inputs, True, axis=node.params["dimension"])


def _reduce(op: str) -> Callable[[_Writer, Node], None]:
    def rule(writer: _Writer, node: Node) -> None:
        axes = writer.constant(np.array(node.params["axes"], np.int32))
        writer.write(node, op, [writer.read(node, 0), axes], keepDims=False)

    return rule


def _slice(writer: _Writer, node: Node) -> None:
    shape, ends = np.shape(node.operands[0]), slice_of(node, "LiteRT")
    sizes = [-1 if cut == (0, size) else cut[1] - cut[0] for cut, size in zip(ends, shape, strict=True)]
    numbers = [writer.constant(np.array(each, np.int32)) for each in ([start for start, _ in ends], sizes)]
    writer.write(node, "SLICE", [writer.read(node, 0), *numbers])


def _pad(writer: _Writer, node: Node) -> None:
    amounts = writer.constant(np.array(pads_of(node, "LiteRT"), np.int32))
    writer.write(node, "PADV2", [writer.read(node, 0), amounts, writer.read(node, 1)])


def _rows(writer: _Writer, node: Node) -> None:
    check_rows(node, "LiteRT")
    numbers = _value(node.operands[1])
    shape = writer.constant(np.array([-1, *numbers.shape[1:-1]], np.int32))
    flat = writer.emit("RESHAPE", [writer.read(node, 1), shape], numbers.shape[:-1], numbers.dtype)
    writer.write(node, "GATHER", [writer.read(node, 0), flat], axis=1, batchDims=1)


def _top_k(writer: _Writer, node: Node) -> None:
    values, indices = node.outputs
    k = writer.constant(np.array(node.params["k"], np.int32))
    numbers = [writer.tensor(output.shape, output.dtype, None) for output in node.outputs]
    writer.operator("TOPK_V2", [writer.value(_value(node.operands[0]), "float"), k], numbers)
    writer.places[values, "float"], writer.places[indices, "float"] = numbers


def _argmax(writer: _Writer, node: Node) -> None:
    (axis,) = node.params["axes"]
    inputs = [writer.read(node, 0), writer.constant(np.array(axis, np.int32))]
    writer.write(node, "ARG_MAX", inputs, outputType=writer.schema.TensorType.INT32)


def _square(writer: _Writer, node: Node) -> None:
    x = writer.read(node, 0)
    writer.write(node, "MUL", [x, x], True)


def _integer_pow(writer: _Writer, node: Node) -> None:
    exponent = writer.constant(np.asarray(node.params["y"], node.output.dtype))
    writer.write(node, "POW", [writer.read(node, 0), exponent])


def _value(operand: Operand) -> Value:
    assert isinstance(operand, Value)
    return operand


RULES: Mapping[str, Callable[[_Writer, Node], None]] = {
    **{op: _plain(op.upper(), can_fuse=True) for op in ("add", "sub", "mul", "div")},
    **{op: _plain(op.upper()) for op in ("abs", "cos", "exp", "log", "neg", "pow", "rsqrt", "sin", "sqrt", "tanh")},
    **{op: _plain(op.upper()) for op in ("gelu", "hard_swish", "logistic")},
    "eq": _plain("EQUAL"),
    "ge": _plain("GREATER_EQUAL"),
    "gt": _plain("GREATER"),
    "le": _plain("LESS_EQUAL"),
    "lt": _plain("LESS"),
    **{op: _logical(f"LOGICAL_{op.upper()}") for op in ("and", "or", "not")},
    "select_n": _choice,
    "slice": _slice,
    "pad": _pad,
    "gather": _rows,
    "max": _plain("MAXIMUM"),
    "min": _plain("MINIMUM"),
    "softmax": _plain("SOFTMAX", beta=1.0),
    "clip": _clip,
    CAST: _cast,
    "integer_pow": _integer_pow,
    "square": _square,
    CONV: _conv,
    DOT: _dot,
    "mean": _reduce("MEAN"),
    "reduce_sum": _reduce("SUM"),
    "reduce_max": _reduce("REDUCE_MAX"),
    "reduce_min": _reduce("REDUCE_MIN"),
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
"""Rules that write an operator of the graph as LiteRT operators."""
