import contextlib
import sys

import numpy as np
import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.weights.keras_files import read_keras
from mnv2_jax.weights.tflite_files import read_tflite

tflite = pytest.importorskip("tflite")
flatbuffers = pytest.importorskip("flatbuffers")


# --- small files, made by hand ----------------------------------------------------------------------------------

TYPES = {"float32": "FLOAT32", "float16": "FLOAT16", "int8": "INT8", "uint8": "UINT8", "int32": "INT32"}


class Writer:
    """Tensors, buffers and operators of a file with one subgraph."""

    def __init__(self):
        self.builder = flatbuffers.Builder(1024)
        self.buffers = [self.table("Buffer")]
        self.tensors, self.ops, self.codes = [], [], []

    def table(self, name, **fields):
        getattr(tflite, f"{name}Start")(self.builder)
        for field, value in fields.items():
            if value is not None:
                getattr(tflite, f"{name}Add{field}")(self.builder, value)
        return getattr(tflite, f"{name}End")(self.builder)

    def vector(self, values, dtype):
        return None if values is None else self.builder.CreateNumpyVector(np.array(values, dtype))

    def tables(self, offsets):
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return self.builder.EndVector()

    def tensor(self, shape, dtype="float32", scale=None, zero=None, axis=0, data=None, signature=None):
        quantisation = None
        if scale is not None:
            scale, zero = self.vector(scale, np.float32), self.vector(zero, np.int64)
            quantisation = self.table("QuantizationParameters", Scale=scale, ZeroPoint=zero, QuantizedDimension=axis)
        buffer = 0
        if data is not None:
            buffer = len(self.buffers)
            content = self.builder.CreateByteVector(np.ascontiguousarray(data).tobytes())
            self.buffers.append(self.table("Buffer", Data=content))
        name = self.builder.CreateString(f"t{len(self.tensors)}")
        fields = dict(Shape=self.vector(shape, np.int32), ShapeSignature=self.vector(signature, np.int32), Name=name)
        kind = getattr(tflite.TensorType, TYPES.get(dtype, dtype))
        fields |= dict(Type=kind, Buffer=buffer, Quantization=quantisation)
        self.tensors.append(self.table("Tensor", **fields))
        return len(self.tensors) - 1

    def const(self, data, **rest):
        return self.tensor(data.shape, str(data.dtype), data=data, **rest)

    def op(self, code, inputs, output, options=None, **fields):
        number = getattr(tflite.BuiltinOperator, code)
        self.codes.append(self.table("OperatorCode", BuiltinCode=number, DeprecatedBuiltinCode=min(number, 127)))
        table = options and self.table(options, **fields)
        kind = options and getattr(tflite.BuiltinOptions, options)
        inputs, outputs = self.vector(inputs, np.int32), self.vector([output], np.int32)
        fields = dict(OpcodeIndex=len(self.codes) - 1, Inputs=inputs, Outputs=outputs)
        self.ops.append(self.table("Operator", **fields, BuiltinOptionsType=kind, BuiltinOptions=table))
        return output

    def conv(self, inputs, fused="NONE", **output):
        output = self.tensor([1, 4, 4, 5], **output)
        fused = getattr(tflite.ActivationFunctionType, fused)
        return self.op("CONV_2D", inputs, output, "Conv2DOptions", FusedActivationFunction=fused)

    def write(self, path):
        tensors, ops = self.tables(self.tensors), self.tables(self.ops)
        graph = self.table("SubGraph", Tensors=tensors, Operators=ops, Inputs=self.vector([0], np.int32))
        fields = dict(Version=3, Subgraphs=self.tables([graph]), OperatorCodes=self.tables(self.codes))
        model = self.table("Model", **fields, Buffers=self.tables(self.buffers))
        self.builder.Finish(model, b"TFL3")
        path.write_bytes(self.builder.Output())
        return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.tflite"


@pytest.fixture
def writer():
    return Writer()


KERNEL = np.random.default_rng(0).uniform(-1, 1, (5, 3, 3, 2)).astype(np.float32)  # [o, r, s, i]


def simple(writer):
    """An image of 8 pixels, one convolution."""
    image = writer.tensor([1, 8, 8, 2])
    return writer.conv([image, writer.const(KERNEL)])


# --- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        (None, ("classifier", False)),
        ({"AlignCorners": True}, ("deeplabv3", True)),
        ({"HalfPixelCenters": True}, ("deeplabv3", False)),
    ],
)
def test_outputs_that_are_resized_make_a_dense_head(resize, expected, writer, path):
    x = simple(writer)
    if resize is not None:
        resized(writer, x, **resize)
    network = read_tflite(writer.write(path))
    assert (network.head, network.align_corners) == expected


def resized(writer, x, **how):
    inputs = [x, writer.const(np.array([8, 8], np.int32))]
    writer.op("RESIZE_BILINEAR", inputs, writer.tensor([1, 8, 8, 5]), "ResizeBilinearOptions", **how)


def test_outputs_that_are_resized_from_their_upper_left(writer, path):
    resized(writer, simple(writer))
    with pytest.raises(UserError, match=r"resizes its outputs"):
        read_tflite(writer.write(path))


def test_three_kinds_in_the_order_of_operators(writer, path):
    relu = dict(FusedActivationFunction=tflite.ActivationFunctionType.RELU6)
    bias = np.arange(5, dtype=np.float32)
    mask = np.random.default_rng(1).uniform(-1, 1, (1, 3, 3, 5)).astype(np.float32)
    matrix = np.random.default_rng(2).uniform(-1, 1, (7, 5)).astype(np.float32)
    x = writer.conv([writer.tensor([1, 8, 8, 2]), writer.const(KERNEL), writer.const(bias)], "RELU")
    inputs, output = [x, writer.const(mask), writer.const(bias)], writer.tensor([1, 4, 4, 5])
    x = writer.op("DEPTHWISE_CONV_2D", inputs, output, "DepthwiseConv2DOptions", DepthMultiplier=1, **relu)
    writer.op("FULLY_CONNECTED", [x, writer.const(matrix), -1], writer.tensor([1, 7]), "FullyConnectedOptions")
    network = read_tflite(writer.write(path))
    assert [(layer.kind, layer.activation) for layer in network.layers] == [
        ("conv", "relu"),
        ("depthwise", "relu6"),
        ("dense", None),
    ]
    conv, depthwise, dense = (layer.arrays for layer in network.layers)
    np.testing.assert_array_equal(conv["kernel"], KERNEL.transpose(1, 2, 3, 0))
    np.testing.assert_array_equal(conv["bias"], bias)
    np.testing.assert_array_equal(depthwise["kernel"], mask.transpose(1, 2, 0, 3))
    np.testing.assert_array_equal(dense["kernel"], matrix.T)
    assert "bias" not in dense
    assert (network.source, network.folded, network.epsilon) == ("tflite", True, None)
    assert (network.resolution, network.mean, network.std) == (8, None, None)


def test_float16_through_an_operator_or_not(writer, path):
    image = writer.tensor([1, 8, 8, 2])
    half = writer.const(KERNEL.astype(np.float16))
    wide = writer.op("DEQUANTIZE", [half], writer.tensor(KERNEL.shape))
    writer.conv([writer.conv([image, wide]), half])
    for layer in read_tflite(writer.write(path)).layers:
        np.testing.assert_array_equal(layer.arrays["kernel"], KERNEL.astype(np.float16).transpose(1, 2, 3, 0))
        assert layer.arrays["kernel"].dtype == np.float32


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("channels", [1, 5])
def test_integers_stand_for_floats(dtype, channels, writer, path):
    rng = np.random.default_rng(0)
    low = -128 if dtype == "int8" else 0
    kernel, bias = rng.integers(low, low + 256, (5, 3, 3, 2)).astype(dtype), rng.integers(-(2**30), 2**30, 5)
    scale, zero = rng.uniform(0.01, 0.1, channels).astype(np.float32), rng.integers(low, low + 256, channels)
    weights = [writer.const(kernel, scale=scale, zero=zero), writer.const(bias.astype(np.int32), scale=scale / 8)]
    writer.conv([writer.tensor([1, 8, 8, 2]), *weights])
    (layer,) = read_tflite(writer.write(path)).layers
    wide = (kernel.transpose(1, 2, 3, 0).astype(np.float64) - zero) * scale
    np.testing.assert_allclose(layer.arrays["kernel"], wide, rtol=1e-6)
    np.testing.assert_allclose(layer.arrays["bias"], bias * (scale / 8).astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 128), ("int8", 0)])
def test_preprocessing_of_a_quantised_image(dtype, zero, writer, path):
    """The network's own scaling of a pixel equals (pixel / 255 - mean) / std."""
    image = writer.tensor([1, 8, 8, 2], dtype, scale=[0.0078125], zero=[zero])
    same = writer.op("QUANTIZE", [image], writer.tensor([1, 8, 8, 2], "int8", scale=[0.0078125], zero=[0]))
    writer.conv([same, writer.const(KERNEL)])
    network = read_tflite(writer.write(path))
    assert network.mean == pytest.approx([128 / 255] * 3)
    pixel = np.array([0, 128, 255])
    np.testing.assert_allclose((pixel / 255 - network.mean) / network.std, (pixel - 128) * 0.0078125, atol=1e-12)


def test_arithmetic_before_the_first_layer_hides_the_preprocessing(writer, path):
    image = writer.tensor([1, 8, 8, 2], "uint8", scale=[1.0], zero=[0])
    scaled = writer.op("MUL", [image, writer.const(np.ones(1, np.float32))], writer.tensor([1, 8, 8, 2]))
    writer.conv([scaled, writer.const(KERNEL)])
    assert read_tflite(writer.write(path)).mean is None


@pytest.mark.parametrize(
    ("shape", "signature"), [([1, 8, 9, 2], None), ([1, 8, 8, 2], [1, -1, -1, 2]), ([1, 64], None)]
)
def test_no_resolution(shape, signature, writer, path):
    writer.conv([writer.tensor(shape, signature=signature), writer.const(KERNEL)])
    assert read_tflite(writer.write(path)).resolution is None


@pytest.mark.parametrize(("code", "activation"), [("RELU", "relu"), ("RELU6", "relu6"), ("HARD_SWISH", "hard_swish")])
def test_an_activation_of_its_own(code, activation, writer, path):
    writer.op(code, [simple(writer)], writer.tensor([1, 4, 4, 5]))
    assert read_tflite(writer.write(path)).layers[0].activation == activation


@pytest.mark.parametrize("swish", [True, False])
def test_a_composed_activation(swish, writer, path):
    x = simple(writer)
    fused = tflite.ActivationFunctionType.RELU6
    three, sixth = (writer.const(np.array(value, np.float32)) for value in (3, 1 / 6))
    y = writer.op("ADD", [x, three], writer.tensor([1, 4, 4, 5]), "AddOptions", FusedActivationFunction=fused)
    y = writer.op("MUL", [y, sixth], writer.tensor([1, 4, 4, 5]))
    if swish:
        writer.op("MUL", [x, y], writer.tensor([1, 4, 4, 5]))
    assert read_tflite(writer.write(path)).layers[0].activation == ("hard_swish" if swish else "hard_sigmoid")


@pytest.mark.parametrize(
    ("scale", "zero", "activation"), [(6 / 255, -128, "relu6"), (6 / 255, 0, None), (0.1, -128, None)]
)
def test_a_range_that_is_a_relu6(scale, zero, activation, writer, path):
    image = writer.tensor([1, 8, 8, 2])
    writer.conv([image, writer.const(KERNEL)], dtype="int8", scale=[scale], zero=[zero])
    assert read_tflite(writer.write(path)).layers[0].activation == activation


@pytest.mark.parametrize(("code", "activation"), [("TANH", "tanh"), ("GELU", "gelu"), ("LOGISTIC", "sigmoid")])
def test_activations_keep_their_names(code, activation, writer, path):
    writer.op(code, [simple(writer)], writer.tensor([1, 4, 4, 5]))
    writer.conv([writer.tensor([1, 8, 8, 2]), writer.const(KERNEL)], "TANH")
    assert [layer.activation for layer in read_tflite(writer.write(path)).layers] == [activation, "tanh"]


def test_the_last_softmax_is_none(writer, path):
    for _ in range(2):
        writer.op("SOFTMAX", [writer.conv([writer.tensor([1, 8, 8, 2]), writer.const(KERNEL)])], writer.tensor([1]))
    assert [layer.activation for layer in read_tflite(writer.write(path)).layers] == ["softmax", None]


def window_of(writer, path, x=None, padding="VALID", **options):
    """Window of one convolution on the image x."""
    x = writer.tensor([1, 8, 8, 2]) if x is None else x
    fields = dict(Padding=getattr(tflite.Padding, padding), StrideH=2, StrideW=2) | options
    writer.op("CONV_2D", [x, writer.const(KERNEL)], writer.tensor([1, 4, 4, 5]), "Conv2DOptions", **fields)
    (layer,) = read_tflite(writer.write(path)).layers
    return layer.stride, layer.dilation, layer.pads


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_strides_dilations_and_paddings(padding, writer, path):
    dilations = dict(DilationHFactor=2, DilationWFactor=2)
    assert window_of(writer, path, padding=padding, **dilations) == (2, 2, padding.lower())


def padded(writer, sizes, value=None, quantised=False):
    sizes = writer.const(np.array(sizes, np.int32))
    value = [] if value is None else [writer.const(np.array([value], np.float32))]
    x = writer.op(
        "PADV2" if value else "PAD", [writer.tensor([1, 8, 8, 2]), sizes, *value], writer.tensor([1, 9, 9, 2])
    )
    return writer.op("QUANTIZE", [x], writer.tensor([1, 9, 9, 2])) if quantised else x


ONE = [[0, 0], [0, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize("value", [None, 0.0])
@pytest.mark.parametrize("quantised", [False, True])
def test_zeros_before_a_convolution(value, quantised, writer, path):
    assert window_of(writer, path, padded(writer, ONE, value, quantised)) == (2, 1, (0, 1))


@pytest.mark.parametrize(
    ("sizes", "value", "options", "match"),
    [
        (ONE, 1.0, {}, "is padded"),
        ([[0, 0], [0, 1], [0, 1], [0, 1]], None, {}, "is padded"),
        ([[0, 0], [0, 1], [1, 1], [0, 0]], None, {}, r"\(\(0, 1\), \(1, 1\)\)"),
        (ONE, None, {"padding": "SAME"}, "padding 'same' after zeros"),
        (ONE, None, {"StrideW": 1}, "stride for rows"),
        (ONE, None, {"DilationHFactor": 2}, "dilation for rows"),
    ],
)
def test_windows_that_no_mobilenet_has(sizes, value, options, match, writer, path):
    with pytest.raises(UserError, match=match):
        window_of(writer, path, padded(writer, sizes, value), **options)


# --- what is refused --------------------------------------------------------------------------------------------


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        read_tflite(path)
    assert str(caught.value).startswith(str(path))
    assert "; " in str(caught.value)


def test_weights_that_are_not_finite(writer, path):
    writer.conv([writer.tensor([1, 8, 8, 2]), writer.const(KERNEL * np.inf)])
    refused(writer.write(path), "NaN or infinity")


def test_weights_that_are_computed(writer, path):
    writer.conv([writer.tensor([1, 8, 8, 2]), writer.tensor(KERNEL.shape)])
    refused(writer.write(path), "aren't in the file")


def test_weights_of_another_type(writer, path):
    writer.conv([writer.tensor([1, 8, 8, 2]), writer.tensor([5, 3, 3, 2], "INT4", data=np.zeros(45, np.int8))])
    refused(writer.write(path), "INT4 or sparse weights")


def test_integers_without_a_scale(writer, path):
    writer.conv([writer.tensor([1, 8, 8, 2]), writer.const(np.ones((5, 3, 3, 2), np.int8))])
    refused(writer.write(path), "INT8 weights without a scale")


def test_a_depth_multiplier(writer, path):
    inputs, output = [writer.tensor([1, 8, 8, 2]), writer.const(KERNEL[:1])], writer.tensor([1, 8, 8, 2])
    writer.op("DEPTHWISE_CONV_2D", inputs, output, "DepthwiseConv2DOptions", DepthMultiplier=2)
    refused(writer.write(path), "depth multiplier of 2")


def test_a_norm_that_is_not_folded(writer, path):
    writer.op("MUL", [simple(writer), writer.const(np.ones(5, np.float32))], writer.tensor([1, 4, 4, 5]))
    refused(writer.write(path), "MUL with weights")


@pytest.mark.parametrize("shape", [[5, 3, 3, 3], [-1, -1, 3, 10], [5, 3, 6], [2**30, 2**30, 2**30, 2**30], None])
def test_shapes_that_do_not_fit_the_weights(shape, writer, path):
    writer.conv([writer.tensor([1, 8, 8, 2]), writer.tensor(shape, data=KERNEL)])
    refused(writer.write(path), "damaged|has a kernel")


def test_tensors_that_are_not_there(writer, path):
    writer.conv([0, 99])
    refused(writer.write(path), "there is no tensor 99|damaged")


def test_nothing_to_read(writer, path):
    writer.op("RELU", [writer.tensor([1, 8, 8, 2])], writer.tensor([1, 8, 8, 2]))
    refused(writer.write(path), "no convolutions or dense layers")


@pytest.mark.parametrize("content", [b"", b"TFL3", b"\x08\0\0\0TFL4" + bytes(100), b"PK\3\4" + bytes(100)])
def test_other_files(content, path):
    path.write_bytes(content)
    refused(path, "TFL3")


def test_no_such_file(path):
    refused(path, "there is no such file")


def test_without_tflite(monkeypatch, path):
    monkeypatch.setitem(sys.modules, "tflite", None)
    refused(path, "tflite")


def test_damaged_files_are_refused_or_read(writer, path):
    """Truncated and changed files give a network or one line, nothing else."""
    kernel = writer.const(np.ones((5, 3, 3, 2), np.uint8), scale=[0.1], zero=[3])
    x = writer.conv([writer.tensor([1, 8, 8, 2], "uint8", scale=[0.1], zero=[3]), kernel])
    writer.op("RELU", [x], writer.tensor([1, 4, 4, 5]))
    content = writer.write(path).read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(1000):
        damaged = bytearray(content)
        if trial % 5 == 0:
            del damaged[rng.integers(len(content)) :]
        for place in rng.integers(8, len(damaged), size=rng.integers(1, 8)) if len(damaged) > 8 else ():
            damaged[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert read_tflite(path).layers


# --- files by others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kinds", "resolution", "mean", "std"),
    [
        ("mobilenet_v1_0.25_128_quant", (15, 13, 0), 128, 128 / 255, 128 / 255),
        ("tf2_mobilenet_v2_1.0_224_ptq", (36, 17, 0), 224, 127 / 255, 0.5),
        ("deeplabv3_mnv2_dm05_pascal_quant", (38, 17, 0), 513, 128 / 255, 128 / 255),
        ("vww_96_float", (14, 13, 1), 96, None, None),
    ],
)
def test_published_files(name, kinds, resolution, mean, std, real_data):
    network = read_tflite(real_data / "weights" / f"{name}.tflite")
    found_kinds = [layer.kind for layer in network.layers]
    assert tuple(found_kinds.count(kind) for kind in ("conv", "depthwise", "dense")) == kinds
    assert all("bias" in layer.arrays for layer in network.layers)
    assert network.resolution == resolution
    assert (
        (network.mean, network.std) == (pytest.approx([mean] * 3), pytest.approx([std] * 3)) if mean else (None, None)
    )
    depthwise = {layer.activation for layer in network.layers if layer.kind == "depthwise"}
    assert depthwise == {"relu" if name == "vww_96_float" else "relu6"}


def test_one_network_in_two_files(real_data):
    """The TFLite file of a network holds the weights of its Keras file, with the norms folded in."""
    pytest.importorskip("h5py")
    keras = read_keras(real_data / "weights" / "vww_96.h5")
    folded = iter(read_tflite(real_data / "weights" / "vww_96_float.tflite").layers)
    norms = iter([layer.arrays for layer in keras.layers if layer.kind == "norm"])
    for layer in keras.layers:
        if layer.kind == "norm":
            continue
        ours = next(folded)
        assert (ours.kind, ours.activation) == (layer.kind, layer.activation)
        kernel, bias = layer.arrays["kernel"], layer.arrays["bias"]
        if layer.kind != "dense":
            norm = next(norms)
            factor = norm["scale"] / np.sqrt(norm["var"] + keras.epsilon)
            kernel, bias = kernel * factor, (bias - norm["mean"]) * factor + norm["bias"]
        np.testing.assert_allclose(ours.arrays["kernel"], kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ours.arrays["bias"], bias, rtol=1e-4, atol=1e-5)
