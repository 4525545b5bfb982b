"""Runs an exported file in its own runtime: ``python -m mnv2_jax.export.runtimes FORMAT FILE IMAGES OUT WHAT``.

The check starts this in a fresh process, which imports the runtime and none of the package's models. WHAT is ``one``
or ``all``, the cores on which the outputs are computed and timed, or ``integers``, for those of a quantised file.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

Run: TypeAlias = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Computes the outputs of a batch."""

_BUDGET_S, _MOST_RUNS = 1.0, 50
"""Seconds and runs after which timing ends."""
_BATCH = 8
"""Most images that are computed at once."""
INTEGERS, CONSTANT, NCHW = ":int8", ":constant", ":NCHW"
"""Ends of names: of a tensor that holds the integers of a value; of LiteRT's constants; of ONNX's maps [b, c, h, w]."""


def _open_onnx(path: str | bytes, cores: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    return _session(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def _open_web(path: str, cores: int) -> Run:
    """Opens the ONNX file within the page's script; the page itself is tested in a browser."""
    return _open_onnx(_network_of(path), cores)


def _network_of(path: str) -> bytes:
    _, content, _ = pathlib.Path(path, "network.js").read_text().rsplit('"', 2)
    return gzip.decompress(base64.b64decode(content))


def _session(session: Any) -> Run:
    names, image = [output.name for output in session.get_outputs()], session.get_inputs()[0].name
    return lambda images: dict(zip(names, session.run(None, {image: images}), strict=True))


def _open_tflite(path: str, cores: int) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        interpreter = Interpreter(path, num_threads=cores)
        interpreter.allocate_tensors()
    (image,) = interpreter.get_input_details()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        if interpreter.get_input_details()[0]["shape"][0] != len(images):
            interpreter.resize_tensor_input(image["index"], images.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(image["index"], images)
        interpreter.invoke()
        return {output["name"]: interpreter.get_tensor(output["index"]) for output in interpreter.get_output_details()}

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what libraries write to standard error past `sys.stderr`, as LiteRT does the name of its delegate."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _open_stablehlo(path: str, cores: int) -> Run:
    import jax

    call = jax.jit(read_stablehlo(pathlib.Path(path)).call)
    return lambda images: {name: np.asarray(value) for name, value in call(images).items()}


def _open_coreml(path: str, cores: int) -> Run:
    if "coreml" in STAND_INS:
        from mnv2_jax.export import mil

        return mil.open_package(path)
    import coremltools
    from PIL import Image

    model = coremltools.models.MLModel(path, compute_units=coremltools.ComputeUnit.CPU_ONLY)  # it computes in float32
    description = model.get_spec().description
    (source,) = description.input
    is_image = source.type.WhichOneof("Type") == "imageType"
    names = [output.name for output in description.output if output.type.WhichOneof("Type") == "multiArrayType"]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        inputs = [Image.fromarray(image) if is_image else image[None] for image in images]
        each = [model.predict({source.name: image}) for image in inputs]
        return {name: np.concatenate([outputs[name] for outputs in each]) for name in names}

    return run


def read_stablehlo(path: pathlib.Path) -> Any:
    """Returns a file as `jax.export` reads it."""
    from jax import export

    return export.deserialize(bytearray(path.read_bytes()))


STAND_INS: Mapping[str, str] = {} if sys.platform == "darwin" else {"coreml": "not run in Core ML, but by JAX"}
"""Formats whose runtime this platform doesn't have, with what was done instead."""
RUNTIMES: Mapping[str, Callable[[str, int], Run]] = {
    "coreml": _open_coreml,
    "onnx": _open_onnx,
    "stablehlo": _open_stablehlo,
    "tflite": _open_tflite,
    "web": _open_web,
}
"""Functions that open a file in the runtime of its format, or its stand-in, for a number of cores."""


# --- integers -----------------------------------------------------------------------------------------------


def _integers_of_onnx(path: str) -> Run:
    return _integers(pathlib.Path(path).read_bytes())


def _integers_of_web(path: str) -> Run:
    return _integers(_network_of(path))


def _integers(content: bytes) -> Run:
    """Opens an ONNX file so that it gives the output of every QuantizeLinear."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(content)
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    if not names:
        return lambda images: {}
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    run = _session(session)

    def integers(images: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for name, array in run(images).items():
            plain = name.removesuffix(NCHW)
            found[plain.removesuffix(INTEGERS)] = (array.transpose(0, 2, 3, 1) if name != plain else array).astype(
                np.int16
            ) - 128
        return found

    return integers


def _integers_of_tflite(path: str) -> Run:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    # Without delegates: they keep no values between operators
    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(path, experimental_op_resolver_type=kernels, experimental_preserve_all_tensors=True)
    (image,) = interpreter.get_input_details()
    interpreter.allocate_tensors()
    details = interpreter.get_tensor_details()
    tensors = [each for each in details if each["dtype"] is np.int8 and not each["name"].endswith(CONSTANT)]

    def integers(images: np.ndarray) -> dict[str, np.ndarray]:
        rows = []
        for single in images:
            interpreter.set_tensor(image["index"], single[None])
            interpreter.invoke()
            rows.append({tensor["name"]: interpreter.get_tensor(tensor["index"]) for tensor in tensors})
        return {name.removesuffix(INTEGERS): np.concatenate([row[name] for row in rows]) for name in rows[0]}

    return integers


INTEGERS_OF: Mapping[str, Callable[[str], Run]] = {
    "onnx": _integers_of_onnx,
    "tflite": _integers_of_tflite,
    "web": _integers_of_web,
}
"""Functions that open a quantised file so that it gives the integers of all its values, by name, as int8 counts them;
the values are [b, h, w, c] or as the graph has them."""


def main() -> None:
    """Writes the outputs for the images and the milliseconds at batch 1 on one core or all, or all integers."""
    form, path, images_path, out, what = sys.argv[1:]
    images = np.load(images_path)
    if what == "integers":
        arrays: dict[str, Any] = {f"output_{name}": value for name, value in INTEGERS_OF[form](path)(images).items()}
        np.savez(out, **arrays)
        return
    if what == "one" and hasattr(os, "sched_setaffinity"):  # Linux; before the runtime starts its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    run = RUNTIMES[form](path, 1 if what == "one" else os.cpu_count() or 1)
    parts = [run(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
    outputs: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    single = images[:1]
    run(single)
    times: list[float] = []
    start = time.monotonic()
    while len(times) < _MOST_RUNS and (time.monotonic() - start < _BUDGET_S or len(times) < 3):
        begin = time.perf_counter()
        run(single)
        times.append(1000 * (time.perf_counter() - begin))
    assert "flax" not in sys.modules
    np.savez(out, **{f"output_{name}": value for name, value in outputs.items()}, ms=statistics.median(times))


if __name__ == "__main__":
    main()
