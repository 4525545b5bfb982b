"""Parts of `bench.gpu`. Each runs as a process that reads a request from standard input and prints one row per line.

    {"part": …, "out": …, "cifar": …, "runs": …, "allow_cpu": …, "limit_s": …}   ->  rows

A row with a ``key`` replaces an earlier row of the same key. ``{"refused": reason}`` means that this device can't be
measured.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import pkgutil
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mnv2_jax
from mnv2_jax.errors import UserError, exit_on_user_error

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements."""

    form_batch: int = 128
    checked: tuple[int, int] = (5, 4)
    """How many layers of MobileNetV2 and how many of `_SMALL` the forms are checked on."""
    digits: tuple[str, ...] = ()
    """Overrides of the config of `make quickstart`."""
    batch: int = 256
    resolution: int = 224
    width: float = 1.0
    depth: float = 1.0
    other_batches: tuple[int, ...] = (128, 512, 1024)
    profiled_steps: int = 5
    dilated: tuple[int, ...] = (30, 60)
    families: tuple[str, ...] = (
        "mobilenet_v1",
        "mobilenet_v3_large",
        "mobilenet_v3_small",
        "mobilenet_v4_conv_small",
        "mobilenet_v4_conv_medium",
    )


ON_A_GPU = Sizes()
ON_A_CPU = Sizes(
    form_batch=2,
    checked=(1, 2),
    digits=("model.width=0.1", "model.depth=0.3", "data.batch_size=16"),
    batch=8,
    resolution=32,
    width=0.35,
    depth=0.3,
    other_batches=(16,),
    profiled_steps=2,
    dilated=(8,),
    families=("mobilenet_v3_small",),
)
"""Small sizes to try the script without a GPU; their numbers mean nothing."""

TOLERANCES = {"float32": 2e-3, "bfloat16": 2e-2}
"""Largest norm of the difference divided by the norm. float32 may be multiplied in TF32, which keeps 10 bits."""


def _settings(sizes: Sizes, batch: int | None = None) -> Any:
    """Returns the config of MobileNetV2 on ImageNet with torchvision's recipe (SGD), in bfloat16."""
    from mnv2_jax import presets
    from mnv2_jax.bench.synthetic import with_classes
    from mnv2_jax.config import build

    argument = f"recipe=torchvision_v2_IMAGENET1K_V1,batch={batch or sizes.batch},res={sizes.resolution}"
    tree = presets.preset(argument, data="imagenet", recipe="paper", name="mobilenet_v2", width=sizes.width)
    tree.model.depth, tree.model.dtype = sizes.depth, "bfloat16"
    return with_classes(build(tree.to_dict()))


# --- checks -------------------------------------------------------------------------------------------------


def checks(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Reports versions; checks that every module imports and that all forms of a convolution agree on the device."""
    import jax

    from mnv2_jax.bench import forms, roofline

    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "torch", "timm")
    versions = {name: _version(name) for name in names}
    yield {"what": "device", "kind": device.device_kind, "platform": device.platform, "python": sys.version.split()[0]}
    yield {"what": "versions", **versions}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv,noheader"]
        yield {"what": "nvidia-smi", "said": subprocess.run(query, capture_output=True, text=True).stdout.strip()}
    failed = {}
    for module in pkgutil.walk_packages(mnv2_jax.__path__, "mnv2_jax."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:
            failed[module.name] = f"{type(error).__name__}: {error}"[:200]
    yield {"what": "imports", "passed": not failed, "failed": failed}
    yield {
        "what": "ceilings",
        "bandwidth": roofline.measured_bandwidth(),
        "rate": roofline.measured_rate("bfloat16"),
        "rate_float32": roofline.measured_rate("float32"),
    }
    if device.platform == "gpu":
        yield from _checked_norms()
    for kind, dtype, shapes in _checked_shapes(sizes):
        cases = [forms.Case(kind=kind, shape=shape, batch_size=4, dtype=dtype, padding="symmetric") for shape in shapes]
        for row in forms.check_forms(cases, forms.forms_here(kind)):
            passed = "errors" in row and all(error <= TOLERANCES[dtype] for error in row["errors"].values())
            yield {"what": "form", "passed": passed, **row}


def _checked_norms() -> Iterator[Row]:
    """Checks the sums of batch norm that our Triton kernels compute against XLA's."""
    import jax
    import jax.numpy as jnp

    from mnv2_jax.nn import normalise

    cases: tuple[tuple[tuple[int, ...], int, Any], ...] = (
        ((4, 56, 56, 144), 2, "relu6"),
        ((8, 7, 7, 960), 2, "relu6"),
        ((4, 15, 9, 24), 1, "gelu"),
    )
    for shape, groups, act in cases:
        x, dy = (jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in (0, 1))
        factor, offset = (jax.random.normal(jax.random.key(seed), (groups, shape[-1])) for seed in (2, 3))
        row: Row = {"what": "form", "kind": "norm", "form": "triton", "shape": str(shape), "dtype": "bfloat16"}
        try:
            triton, xla = (
                (*sums.moments(x), *sums.of_gradient(x, dy, factor, offset, act))
                for sums in (normalise.SUMS["triton"], normalise.SUMS["written"])
            )
            names = ("sum", "squares", "gradient", "gradient_x")
            pairs = zip(names, triton, xla, strict=True)
            errors = {name: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for name, a, b in pairs}
            yield row | {"errors": errors, "passed": max(errors.values()) <= 1e-4}
        except Exception as error:
            yield row | {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:300], "passed": False}


_SMALL = ((15, 40, 3, 2, 1), (30, 17, 3, 1, 2), (14, 72, 5, 2, 1), (14, 24, 3, 1, 1))
"""Height, channels, kernel, stride, dilation: odd and even sizes, few and many channels."""


def _checked_shapes(sizes: Sizes) -> Iterator[tuple[str, str, list[Any]]]:
    """Yields kind, dtype and shapes to check: small shapes in both dtypes, MobileNetV2's in bfloat16."""
    from mnv2_jax.bench.forms import Shape

    num_layers, num_small = sizes.checked
    odd = [Shape(n, n + 1, c, c, k, stride, d) for n, c, k, stride, d in _SMALL[:num_small]]
    for dtype, shapes in (
        ("float32", odd),
        ("bfloat16", _shapes(_model("mobilenet_v2", sizes.width), sizes)["depthwise"][:num_layers] + odd),
    ):
        yield "depthwise", dtype, shapes
        yield "pointwise", dtype, [Shape(14, 14, 24, 144, 1, 1, 1)]
        yield "image", dtype, [Shape(32, 32, 3, 32, 3, 2, 1)]


def digits(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Runs 80 steps of `make quickstart` twice, and reports the first step after which the states differ in any bit.

    The reported losses are means over the first and the last ten steps. The loss starts to fall at about step 40.
    """
    import jax
    import numpy as np

    from mnv2_jax import config
    from mnv2_jax.processes import runtime
    from mnv2_jax.training import mesh as meshes
    from mnv2_jax.training.experiment import open_experiment
    from mnv2_jax.training.feeds import train_batches

    runtime.configure()
    experiment = open_experiment(config.load("w0_35:data=digits", sizes.digits).config)
    step = meshes.compile_train_step(experiment.mesh, experiment.train_step(0))
    init = meshes.compile_init(experiment.mesh, experiment.init_state)
    batches = train_batches(experiment)
    one, other = init(), init()
    differs = None
    losses = []
    for number, batch in zip(range(1, 81), batches, strict=False):
        one, metrics = step(one, {}, batch)
        other, _ = step(other, {}, batch)
        losses.append(float(metrics["loss"]))
        pairs = zip(*(jax.tree.leaves(jax.device_get(state)) for state in (one, other)), strict=True)
        if differs is None and not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
            differs = number
    first, last = (float(np.mean(some)) for some in (losses[:10], losses[-10:]))
    yield {
        "what": "digits",
        "first_loss": first,
        "last_loss": last,
        "passed": last < first,
        "differs_from_step": differs,
    }


# --- forms of the convolutions ------------------------------------------------------------------------------


def depthwise(request: Mapping[str, Any], sizes: Sizes, dtype: str = "bfloat16") -> Iterator[Row]:
    """Times the forms of MobileNetV2's depthwise convolutions."""
    model = _model("mobilenet_v2", sizes.width)
    yield from _forms("depthwise", _shapes(model, sizes)["depthwise"], sizes, dtype)


def float32(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Times the forms of MobileNetV2's depthwise convolutions in float32."""
    yield from depthwise(request, sizes, "float32")


def pointwise(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Times the forms of MobileNetV2's stem and 1×1 convolutions."""
    shapes = _shapes(_model("mobilenet_v2", sizes.width), sizes)
    yield from _forms("image", shapes["image"], sizes, "bfloat16")
    for chunk in _chunks(shapes["pointwise"], 7):
        yield from _forms("pointwise", chunk, sizes, "bfloat16")


def dilated(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Times the forms of the dilated depthwise convolutions that dense prediction has after an output stride of 16."""
    from mnv2_jax.bench.forms import Shape

    small = dataclasses.replace(sizes, form_batch=max(sizes.form_batch // 8, 1))
    shapes = [Shape(n, n, c, c, k, 1, 2) for n in sizes.dilated for c, k in ((576, 3), (960, 3), (960, 5))]
    yield from _forms("depthwise", shapes, small, "bfloat16")


def families(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Times the forms of the depthwise convolutions whose shapes MobileNetV2 doesn't have, each shape once."""
    timed_shapes = set(_shapes(_model("mobilenet_v2", sizes.width), sizes)["depthwise"])
    for name in sizes.families:
        new = [shape for shape in _shapes(_model(name), sizes)["depthwise"] if shape not in timed_shapes]
        timed_shapes |= set(new)
        for chunk in _chunks(new, 8):
            for row in _forms("depthwise", chunk, sizes, "bfloat16"):
                yield row | {"model": name}


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _model(name: str, width: float = 1.0) -> Any:
    from mnv2_jax.models.registry import create_model

    return create_model(name, 1000, width=width)


def _shapes(model: Any, sizes: Sizes) -> dict[str, Any]:
    from mnv2_jax.bench.forms import shapes_of

    return shapes_of(model, sizes.resolution)


def _forms(kind: str, shapes: Any, sizes: Sizes, dtype: str) -> Iterator[Row]:
    from mnv2_jax.bench.forms import Case, forms_here, time_forms

    cases = [Case(kind=kind, shape=shape, batch_size=sizes.form_batch, dtype=dtype) for shape in shapes]
    for row in time_forms(cases, forms_here(kind)):
        yield row | {"dtype": dtype}


# --- train step and inference -------------------------------------------------------------------------------


def train(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Times the train step: ours, timm's, and ours with XLA's own convolutions."""
    from mnv2_jax.bench.contest import OUR_ENTRY, RIVALS

    entries = [OUR_ENTRY, *RIVALS["torch"], *RIVALS["xla"]]
    yield from _contest("train", entries, _settings(sizes), request["limit_s"])


def layers(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Times the train step with one kind of layer at a time in another form than training uses."""
    from mnv2_jax.bench.contest import OUR_ENTRY, Entry
    from mnv2_jax.training.mesh import fastest_forms, make_mesh

    fastest = fastest_forms(make_mesh(), "bfloat16")
    entries = [
        Entry(f"{kind} {form}", forms=dataclasses.replace(fastest, **{kind: form})) for kind, form in _OTHER_FORMS
    ]
    yield from _contest("train", [OUR_ENTRY, *entries], _settings(sizes), request["limit_s"])


_OTHER_FORMS: tuple[tuple[str, Any], ...] = (
    ("norm", "derived"),
    ("norm", "written"),
    ("depthwise", "lax"),
    ("pointwise", "lax"),
    ("image", "lax"),
)


def infer(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Times inference: our network, timm's, and ours with XLA's own convolutions."""
    from mnv2_jax.bench.contest import OUR_ENTRY, RIVALS

    entries = [OUR_ENTRY, *RIVALS["torch"], *RIVALS["xla"]]
    yield from _contest("infer", entries, _settings(sizes), request["limit_s"])


def batches(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Times our train step and timm's compiled one at other batch sizes."""
    from mnv2_jax.bench.contest import OUR_ENTRY, RIVALS

    for batch in sizes.other_batches:
        yield from _contest("train", [OUR_ENTRY, RIVALS["torch"][1]], _settings(sizes, batch), request["limit_s"])


def _contest(mode: str, entries: Any, settings: Any, limit_s: float) -> Iterator[Row]:
    """Times the entries and yields their rows after every turn; each row replaces the entry's earlier one."""
    from mnv2_jax.bench import contest, roofline
    from mnv2_jax.models.registry import from_config

    needs = roofline.needs(from_config(settings.model, settings.norm), settings.data.resolution, settings.model.dtype)
    common = {
        "what": mode,
        "batch": settings.data.batch_size,
        "needs_bytes_an_image": needs.train_bytes if mode == "train" else needs.infer_bytes,
    }
    for rows in contest.turns(entries, mode, settings, 4, ready_s=0.75 * limit_s):
        for row in rows:
            yield common | row | {"key": [mode, settings.data.batch_size, row["name"]]}


# --- profile ------------------------------------------------------------------------------------------------


def profile(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Profiles the kernels of our train step."""
    import jax

    from mnv2_jax.bench import profile as profiles
    from mnv2_jax.bench.synthetic import random_batch, without_data
    from mnv2_jax.processes import runtime
    from mnv2_jax.training import mesh as meshes

    runtime.configure()
    experiment = without_data(_settings(sizes))
    state: Any = meshes.compile_init(experiment.mesh, experiment.init_state)()
    batch = random_batch(experiment)
    step: Any = meshes.compile_train_step(experiment.mesh, experiment.train_step(-1))
    compiled = step.lower(state, {}, batch).compile()

    def steps() -> None:
        nonlocal state
        for _ in range(sizes.profiled_steps):
            state, metrics = compiled(state, {}, batch)
        jax.block_until_ready((state, metrics))

    steps()
    program = compiled.as_text()
    measured = profiles.profile(steps, sizes.profiled_steps, program=program)
    yield {"what": "profile", "table": profiles.table(measured), **profiles.summary(measured)}
    (pathlib.Path(request["out"]) / "program.txt").write_text(program[: 12 * 2**20])


# --- CIFAR-10 -----------------------------------------------------------------------------------------------


def cifar(request: Mapping[str, Any], sizes: Sizes) -> Iterator[Row]:
    """Trains CIFAR-10 with the recipe ``cifar`` until it is done or the time is over; the same call resumes the run."""
    workdir = pathlib.Path(request["runs"]) / "cifar10"
    argument = f"data=cifar10,path={request['cifar']},recipe=cifar"
    command = [
        *(sys.executable, "-m", "mnv2_jax.main", f"--config=w1_0:{argument}"),
        *("--config.model.dtype=bfloat16", "--config.train.eval_every_epochs=20", f"--workdir={workdir}"),
    ]
    if sizes is ON_A_CPU:
        command += ["--config.train.steps=2", "--config.model.width=0.35"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=subprocess.STDOUT)
    deadline = start + request["limit_s"] - 15

    def row(**more: Any) -> Row:
        return {"what": "cifar", "key": ["cifar"], "seconds": time.monotonic() - start, **_last_lines(workdir), **more}

    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(1.0)
        yield row()
    if process.poll() is None:
        process.terminate()  # the run saves a checkpoint, from which the next call resumes
        process.wait(timeout=14)
    if process.returncode:
        raise UserError(f"the CIFAR-10 run in {workdir} ended with exit code {process.returncode}")
    summary = workdir / "summary.json"
    yield row(summary=json.loads(summary.read_text())) if summary.exists() else row()


def _last_lines(workdir: pathlib.Path) -> Row:
    """Returns the newest complete line of each split, train and eval, in a run's log."""
    log = workdir / "metrics.jsonl"
    lines = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []
    return {line["split"]: line for line in map(json.loads, lines) if line["split"] in ("train", "eval")}


# --- the process --------------------------------------------------------------------------------------------

PARTS: Mapping[str, Callable[[Mapping[str, Any], Sizes], Iterator[Row]]] = {
    function.__name__: function
    for function in (
        *(checks, depthwise, train, profile, layers, digits, infer),
        *(pointwise, batches, dilated, families, float32, cifar),
    )
}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _end_with_the_caller() -> None:
    """Waits until the caller closes standard input or dies, then ends this process so that the GPU is free again."""
    os.read(0, 1)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Runs the part that the request names."""
    rows_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard error, not between the rows
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the device
    import jax

    def write(**row: Any) -> None:
        print(json.dumps(row), file=rows_out, flush=True)

    platform = jax.devices()[0].platform
    if platform != "gpu" and not request["allow_cpu"]:
        write(refused=f"the device is a {platform}, not a GPU; give --allow-cpu to try the script in a small form")
        return
    for row in PARTS[request["part"]](request, ON_A_GPU if platform == "gpu" else ON_A_CPU):
        write(**row)


if __name__ == "__main__":
    exit_on_user_error(main)
