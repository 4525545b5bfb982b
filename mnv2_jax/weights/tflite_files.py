"""Reads the weights in TFLite (LiteRT) files with the flatbuffer bindings of the `tflite` package, without TensorFlow.

Quantised weights are converted to floats. In these files the norms are folded into the convolutions.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.weights.layers import (
    LARGEST,
    ForeignLayer,
    ForeignNetwork,
    Kind,
    as_float32,
    one_of,
    pads_of,
    reading,
    without_softmax,
)

_KINDS: dict[str, Kind] = {"CONV_2D": "conv", "DEPTHWISE_CONV_2D": "depthwise", "FULLY_CONNECTED": "dense"}
_Triple = tuple[float, float, float]
_OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "ADD": "AddOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
}
_LAYOUT = {"conv": (1, 2, 3, 0), "depthwise": (1, 2, 0, 3), "dense": (1, 0)}  # from [o, r, s, i], [1, r, s, c], [k, c]
_PADDINGS = ("same", "valid")  # by TFLite's numbers
_ACTIVATIONS = {  # as an operator of its own, or fused into one
    "RELU": "relu",
    "RELU6": "relu6",
    "RELU_N1_TO_1": "relu_n1_to_1",
    "RELU_0_TO_1": "relu_0_to_1",
    "LEAKY_RELU": "leaky_relu",
    "ELU": "elu",
    "GELU": "gelu",
    "TANH": "tanh",
    "SIGN_BIT": "sign_bit",
    "HARD_SWISH": "hard_swish",
    "LOGISTIC": "sigmoid",
    "SOFTMAX": "softmax",
}
_DTYPES = {
    "FLOAT32": "<f4",
    "FLOAT16": "<f2",
    "INT8": "i1",
    "UINT8": "u1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
}
_LOWEST = {"UINT8": 0, "INT8": -128}
_ARITHMETIC = {"MUL", "ADD", "SUB", "DIV"}  # with a vector after a layer, they are a norm that wasn't folded
_UNSUPPORTED = {
    "TRANSPOSE_CONV",
    "CONV_3D",
    "BATCH_MATMUL",
    "PRELU",
    "CUSTOM",
    "WHILE",
    "IF",
    "CALL",
    "STABLEHLO_COMPOSITE",
}
_PREPARING = {"QUANTIZE", "DEQUANTIZE", "PAD"}  # operators that don't change real values
_MOST = 10_000
"""Limit on operators and tensors: a MobileNet has some hundreds, and a damaged length may say millions."""


def read_tflite(path: pathlib.Path) -> ForeignNetwork:
    """Reads the convolutions and dense layers of the first subgraph, in the order of its operators.

    Raises:
      UserError: if the file can't be read, or holds an operator with weights that no MobileNet has.
    """
    try:
        import tflite
    except ImportError as error:
        raise UserError(f"{path}: reading TFLite files needs tflite; run pip install 'mnv2_jax[convert]'") from error
    with reading(path, "TFLite"):
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if content[4:8] != b"TFL3":
            raise UserError(
                f"isn't a TFLite file: bytes 4 to 8 are {content[4:8]!r} instead of b'TFL3'; give another file"
            )
        if len(content) > LARGEST:
            raise UserError(f"has more than {LARGEST >> 20} MiB, unlike any MobileNet; give another file")
        graph = _Graph(tflite, tflite.Model.GetRootAsModel(content, 0))
        mean, std = graph.preprocessing()
        align_corners = graph.align_corners()
        return ForeignNetwork(
            source="tflite",
            layers=graph.layers(),
            folded=True,
            epsilon=None,
            resolution=graph.resolution(),
            mean=mean,
            std=std,
            head="classifier" if align_corners is None else "deeplabv3",
            align_corners=bool(align_corners),
        )


@dataclasses.dataclass(frozen=True)
class _Op:
    code: str
    options: Any
    fused: str
    """Activation fused into the operator: NONE, RELU, ..."""
    inputs: list[int]
    """Numbers of the input tensors; -1 for an optional tensor that is left out."""
    outputs: list[int]


class _Graph:
    """The first subgraph of a model."""

    def __init__(self, tflite: Any, model: Any) -> None:
        self._model = model
        self._graph = model.Subgraphs(0)
        lengths = self._graph.OperatorsLength(), self._graph.TensorsLength(), model.OperatorCodesLength()
        if max(lengths) > _MOST:
            raise UserError(f"has more than {_MOST} operators or tensors, unlike any MobileNet; give another file")
        codes, fusions = _names(tflite.BuiltinOperator), _names(tflite.ActivationFunctionType)
        self._types = _names(tflite.TensorType)

        def op(raw: Any) -> _Op:
            name = codes[model.OperatorCodes(raw.OpcodeIndex()).BuiltinCode()]
            options, fused = None, "NONE"
            if name in _OPTIONS and (table := raw.BuiltinOptions()) is not None:
                options = getattr(tflite, _OPTIONS[name])()
                options.Init(table.Bytes, table.Pos)
                fused = fusions[options.FusedActivationFunction()] if name != "RESIZE_BILINEAR" else fused
            inputs, outputs = _vector(raw.InputsAsNumpy()).tolist(), _vector(raw.OutputsAsNumpy()).tolist()
            return _Op(name, options, fused, inputs, outputs)

        self._ops = [op(self._graph.Operators(i)) for i in range(lengths[0])]
        self._makers = {tensor: each for each in self._ops for tensor in each.outputs}
        self._users: dict[int, list[_Op]] = collections.defaultdict(list)
        for each in self._ops:
            for tensor in each.inputs:
                self._users[tensor].append(each)
        # Files in float16 convert their weights to float32 by operators.
        self._widened = {each.outputs[0]: each.inputs[0] for each in self._ops if each.code == "DEQUANTIZE"}
        self._room = LARGEST

    def layers(self) -> tuple[ForeignLayer, ...]:
        layers: list[ForeignLayer] = []
        for op in self._ops:
            if op.code in _KINDS:
                layers.append(self._layer(op))
            elif op.code in _UNSUPPORTED or (
                layers and op.code in _ARITHMETIC and any(map(self._is_vector, op.inputs))
            ):
                raise UserError(
                    f"has the operator {op.code} with weights, unlike any MobileNet with folded norms; give another"
                    " file"
                )
        if not layers:
            raise UserError("holds no convolutions or dense layers; give another file")
        return without_softmax(layers)

    def align_corners(self) -> bool | None:
        """How the outputs of the last layer are resized; None: they aren't, because the network is a classifier."""
        last = max((place for place, op in enumerate(self._ops) if op.code in _KINDS), default=0)
        resizes = [op.options for op in self._ops[last:] if op.code == "RESIZE_BILINEAR"]
        if not resizes:
            return None
        if resizes[-1] is None or not (resizes[-1].AlignCorners() or resizes[-1].HalfPixelCenters()):
            raise UserError(
                "resizes its outputs with neither align_corners nor half_pixel_centers, as no head here does; give a"
                " file that was converted with align_corners"
            )
        return bool(resizes[-1].AlignCorners())

    def resolution(self) -> int | None:
        tensor = self._tensor(self._graph.Inputs(0))
        signature = _vector(tensor.ShapeSignatureAsNumpy()).tolist() or _vector(tensor.ShapeAsNumpy()).tolist()
        match signature:
            case [_, int(height), int(width), _] if height == width > 0:
                return height
        return None

    def preprocessing(self) -> tuple[_Triple | None, _Triple | None]:
        """Mean and standard deviation of a quantised input, if no operator changes it before the first layer."""
        tensor = self._tensor(self._graph.Inputs(0))
        lowest = _LOWEST.get(self._types[tensor.Type()])
        before = itertools.takewhile(lambda op: op.code not in _KINDS, self._ops)
        scale, zero, _ = _quantisation(tensor)
        if (
            lowest is None
            or scale.shape != (1,)
            or not 0 < scale[0] < np.inf
            or {op.code for op in before} - _PREPARING
        ):
            return None, None
        mean, std = (int(zero[0]) - lowest) / 255, 1 / (255 * float(scale[0]))
        return (mean, mean, mean), (std, std, std)

    def _layer(self, op: _Op) -> ForeignLayer:
        kind = _KINDS[op.code]
        name = self._tensor(op.outputs[0]).Name().decode(errors="replace")
        if kind == "depthwise" and (multiplier := op.options.DepthMultiplier()) != 1:
            raise UserError(
                f"layer {name!r} has a depth multiplier of {multiplier}, but only 1 can be read; give another file"
            )
        if kind == "dense" and op.options.WeightsFormat():
            raise UserError(f"layer {name!r} has shuffled weights; give a file that was converted without shuffling")
        kernel = self._array(op.inputs[1], name)
        if kernel.ndim != len(_LAYOUT[kind]):
            raise UserError(
                f"layer {name!r} has a kernel of shape {list(kernel.shape)}, unlike any {kind} layer; give another file"
            )
        arrays = {"kernel": np.ascontiguousarray(kernel.transpose(_LAYOUT[kind]))}
        if len(op.inputs) > 2 and op.inputs[2] >= 0:
            arrays["bias"] = self._array(op.inputs[2], name)
        return ForeignLayer(name, kind, arrays, self._activation(op), **self._window(op, kind, name))

    def _window(self, op: _Op, kind: Kind, name: str) -> dict[str, Any]:
        """Stride, dilation and pads of a convolution."""
        options = op.options
        if kind == "dense" or options is None:
            return {}
        return {
            "stride": one_of(name, "stride", (options.StrideH(), options.StrideW())),
            "dilation": one_of(name, "dilation", (options.DilationHFactor(), options.DilationWFactor())),
            "pads": pads_of(name, _PADDINGS[options.Padding()], self._zeros(op.inputs[0], name)),
        }

    def _zeros(self, number: int, name: str) -> tuple[tuple[int, ...], ...] | None:
        """Rows before and after, and columns before and after, that an operator adds when it makes a tensor."""
        maker = self._makers.get(number)
        if maker and maker.code in ("QUANTIZE", "DEQUANTIZE"):
            maker = self._makers.get(maker.inputs[0])
        if not maker or maker.code not in ("PAD", "PADV2"):
            return None
        sizes = self._tensor(maker.inputs[1])
        added = self._bytes(sizes).view(_DTYPES[self._types[sizes.Type()]]).tolist()
        other = maker.code == "PADV2" and self._array(maker.inputs[2], name).any()
        if len(added) != 8 or any(added[:2] + added[6:]) or other:
            raise UserError(
                f"the map before layer {name!r} is padded, but not with zeros on rows and columns; give another file"
            )
        return (added[2], added[3]), (added[4], added[5])

    def _activation(self, op: _Op) -> str | None:
        """Activation of a layer: fused into the operator, implied by the range of its output, or the next operator."""
        if op.fused != "NONE":
            return _ACTIVATIONS.get(op.fused, op.fused.lower())
        output = self._tensor(op.outputs[0])
        scale, zero, _ = _quantisation(output)
        if scale.shape == (1,) and zero[0] == _LOWEST.get(self._types[output.Type()]) and abs(255 * scale[0] - 6) < 0.1:
            return "relu6"
        following = {user.code: user for user in self._users[op.outputs[0]]}
        for code, activation in _ACTIVATIONS.items():
            if code in following:
                return "swish" if code == "LOGISTIC" and "MUL" in following else activation
        shifted = following.get("ADD")  # of relu6(x + 3) / 6, perhaps multiplied by x
        if shifted and sum(map(self._is_constant, shifted.inputs)) == 1 and self._activation(shifted) == "relu6":
            return "hard_swish" if "MUL" in following else "hard_sigmoid"
        return None

    # --- tensors ------------------------------------------------------------------------------------------------

    def _tensor(self, number: int) -> Any:
        if not 0 <= number < self._graph.TensorsLength():
            raise IndexError(f"there is no tensor {number}")
        return self._graph.Tensors(number)

    def _bytes(self, tensor: Any) -> np.ndarray:
        """Content of a constant tensor, uint8 [n]; empty for other tensors."""
        if not 0 <= tensor.Buffer() < self._model.BuffersLength():
            raise IndexError(f"there is no buffer {tensor.Buffer()}")
        return _vector(self._model.Buffers(tensor.Buffer()).DataAsNumpy())

    def _is_constant(self, number: int) -> bool:
        return number >= 0 and self._bytes(self._tensor(number)).size > 0

    def _is_vector(self, number: int) -> bool:
        """Whether a tensor is a constant of several numbers and doesn't hold a shape."""
        if not self._is_constant(number):
            return False
        tensor = self._tensor(number)
        return self._types[tensor.Type()] not in ("INT32", "INT64") and _vector(tensor.ShapeAsNumpy()).prod() > 1

    def _array(self, number: int, name: str) -> np.ndarray:
        """Values of a constant tensor as floats, dequantised if necessary."""
        tensor = self._tensor(self._widened.get(number, number))
        kind = self._types[tensor.Type()]
        content = self._bytes(tensor)
        if kind not in _DTYPES or tensor.Sparsity() is not None:
            raise UserError(f"layer {name!r} has {kind} or sparse weights; give one of {', '.join(_DTYPES)}")
        if not content.size:
            raise UserError(f"the weights of layer {name!r} aren't in the file; give a file that holds them")
        values = content.view(_DTYPES[kind]).reshape(_vector(tensor.ShapeAsNumpy()).tolist())
        self._room -= 4 * values.size  # several layers may share a tensor
        if self._room < 0:
            raise UserError(f"its weights have more than {LARGEST >> 20} MiB, unlike any MobileNet; give another file")
        if values.dtype.kind == "f":
            return as_float32(values)
        scale, zero, axis = _quantisation(tensor)
        if not scale.size:
            raise UserError(f"layer {name!r} has {kind} weights without a scale; give another file")
        if scale.size > 1:  # one for each channel
            if scale.size != values.shape[axis]:
                raise ValueError(f"{scale.size} scales for {values.shape[axis]} channels")
            along = [-1 if i == axis else 1 for i in range(values.ndim)]
            scale, zero = scale.reshape(along), zero.reshape(along)
        with np.errstate(all="ignore"):
            return as_float32((values.astype(np.float64) - zero) * scale)


def _names(table: type) -> dict[int, str]:
    return {number: name for name, number in vars(table).items() if isinstance(number, int)}


def _vector(values: Any) -> np.ndarray:
    """Converts a vector from the bindings to an array; they return 0 for a vector that is left out."""
    return values if isinstance(values, np.ndarray) else np.empty(0, np.int64)


def _quantisation(tensor: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Scales and zero points [n] of a tensor, both empty for floats, and their axis if n isn't 1."""
    quantisation = tensor.Quantization()
    if quantisation is None:
        return np.empty(0), np.empty(0), 0
    scale, zero = _vector(quantisation.ScaleAsNumpy()).astype(np.float64), _vector(quantisation.ZeroPointAsNumpy())
    return scale, zero if zero.size else np.zeros(scale.shape, np.int64), quantisation.QuantizedDimension()
