"""Converted TFLite files against the TFLite runtime, on real files."""

import io
import os
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mnv2_jax.nn.resize import resize_bilinear
from mnv2_jax.weights.load import load_weights

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not os.environ.get("MNV2_JAX_DATA"), reason="MNV2_JAX_DATA names no folder of real weights"),
]


@pytest.mark.parametrize("file", ["vww_96.h5", "vww_96_float.tflite"])
def test_outputs_are_those_of_the_runtime(file):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    weights = pathlib.Path(os.environ["MNV2_JAX_DATA"]) / "weights"
    theirs = interpreter.Interpreter(str(weights / "vww_96_float.tflite"))
    theirs.allocate_tensors()
    model, variables, _ = load_weights(weights / file, "mobilenet_v1", width=0.25)
    rng = np.random.default_rng(0)
    for _ in range(5):
        image = rng.uniform(0, 1, (1, 96, 96, 3)).astype(np.float32)
        theirs.set_tensor(theirs.get_input_details()[0]["index"], image)
        theirs.invoke()
        expected = theirs.get_tensor(theirs.get_output_details()[0]["index"])
        logits, _ = model.apply(jax.device_put(variables), jnp.asarray(image))
        np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-4)


def test_class_maps_of_an_int8_deeplab_are_near_the_runtimes():
    """Over the pixels that either calls other than background: the runtime's own two sets of kernels agree on 91 %."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    data = pathlib.Path(os.environ["MNV2_JAX_DATA"])
    file = data / "weights" / "deeplabv3_mnv2_dm05_pascal_quant.tflite"
    theirs = interpreter.Interpreter(str(file))
    theirs.allocate_tensors()
    model, variables, info = load_weights(file)
    assert (info.task, model.options.head, model.options.output_stride) == ("segmentation", "deeplabv3", 16)
    mean, std = np.float32(info.preprocessing.mean), np.float32(info.preprocessing.std)

    @jax.jit
    def classes_of(variables, image):
        outputs, _ = model.apply(variables, image)
        return resize_bilinear(outputs["logits"], (513, 513), align_corners=model.options.align_corners).argmax(-1)

    same = seen = 0
    with tarfile.open(data / "imagenet-samples" / "imagenet_samples_200.tar") as archive:
        members = [member for member in archive.getmembers() if member.name.endswith(".JPEG")]
        for member in members[::50]:
            with Image.open(io.BytesIO(archive.extractfile(member).read())) as picture:
                image = np.asarray(picture.convert("RGB").resize((513, 513), Image.Resampling.BILINEAR))[None]
            theirs.set_tensor(theirs.get_input_details()[0]["index"], image)
            theirs.invoke()
            expected = theirs.get_tensor(theirs.get_output_details()[0]["index"])
            ours = np.asarray(classes_of(variables, jnp.asarray((image / np.float32(255) - mean) / std)))
            is_seen = (ours > 0) | (expected > 0)
            same, seen = same + int((ours == expected)[is_seen].sum()), seen + int(is_seen.sum())
    assert seen > 1e5
    assert same / seen > 0.88
