"""Compiles the train step of a config for a TPU topology on a machine without TPUs, and says what it needs of a chip.

A program of its own, since libtpu's compiler can crash: it reads ``{"topology": ..., "config": ...}`` from standard
input and answers with one JSON object.
"""

from __future__ import annotations

import collections
import json
import math
import re
import sys
import time
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from mnv2_jax import config
from mnv2_jax.bench.pod_model import IMAGENET_IMAGES
from mnv2_jax.data.sources import Dataset, known_num_classes
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.tasks.classification import make_task
from mnv2_jax.tasks.distillation import TEACHER_LOGITS, Distillation, with_teacher
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment

_CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}
"""The two cores of a v4 chip are one device, as on a real one; the others' are by default."""

_COLLECTIVE = re.compile(
    r" = (.+?) (all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-broadcast|collective-permute"
    r"|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collectives(program: str) -> tuple[dict[str, int], int]:
    """Collective operations in the text of an optimised program, and the bytes that its all-reduces reduce.

    Each is counted once, whether it is synchronous or begins with ``-start`` or in a computation of its own and ends
    with ``-done``.
    """
    counts: collections.Counter[str] = collections.Counter()
    reduced = 0
    for result, kind in _COLLECTIVE.findall(program):
        counts[kind] += 1
        if kind == "all-reduce":
            reduced += _num_bytes(result)
    return dict(counts), reduced


def _num_bytes(result: str) -> int:
    """Of a result's type: an array, as ``f32[3,3]{1,0}``, or a tuple of them."""
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * int(bits or 8) // 8
        for _, bits, shape in _ARRAY.findall(result)
    )


def compile_step(settings: config.Config, topology: str) -> dict[str, Any]:
    """Lowers and compiles the step, of a finetuning that of the last stage, which trains the most.

    Returns:
      Of each chip flops, bytes_accessed, peak_bytes (arguments, results, what lies between, and the program),
      all_reduces, all_reduce_bytes, other_collectives (by name); and compile_seconds.

    Raises:
      UserError: if there is no such topology, or the compiler refuses the program, as one that the memory can't hold.
    """
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **_CHIP_CONFIG.get(topology.partition(":")[0], {})
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {_first_line(error)}") from error
    experiment = _unopened(settings, described.devices)
    step: Any = meshes.compile_train_step(experiment.mesh, experiment.train_step(-1))
    lowered = step.lower(jax.eval_shape(experiment.init_state), _abstract_batch(experiment))
    begun = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: the compiler says: {_first_line(error)}") from error
    seconds = time.perf_counter() - begun
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    counts, reduced = collectives(compiled.as_text())
    return {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        "all_reduces": counts.pop("all-reduce", 0),
        "all_reduce_bytes": reduced,
        "other_collectives": counts,
        "compile_seconds": seconds,
    }


def _unopened(settings: config.Config, devices: Any) -> Experiment:
    """The experiment of a config on as many images as ImageNet has, of which none is there."""

    def read(index: int) -> NoReturn:
        raise AssertionError(index)

    classes = settings.model.num_classes or known_num_classes(settings.data)
    names = tuple(map(str, range(classes)))
    split = Split("train", np.zeros(IMAGENET_IMAGES, np.int32), read)
    task = with_teacher(make_task(settings, names, [1] * classes), settings.distill)
    dataset = Dataset(settings.data.name, names, train=split, eval=split)
    return Experiment(config=settings, dataset=dataset, task=task, mesh=meshes.make_mesh(devices))


def _abstract_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """See `types.Batch`; of `data.scales`, whose batches are as many pixels, the one of `data.resolution`."""
    data, task = experiment.config.data, experiment.task
    shape = (data.batch_size, data.resolution, data.resolution, 3)
    batch = {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}
    batch |= {name: jax.ShapeDtypeStruct(shape[:1], jnp.int32) for name in ("label", "index", "epoch")}
    if isinstance(task, Distillation):
        batch[TEACHER_LOGITS] = jax.ShapeDtypeStruct((data.batch_size, task.model.num_classes), jnp.float32)
    return batch


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def main() -> None:
    """Standard input, a compilation, standard output."""
    asked = json.load(sys.stdin)
    print(json.dumps(compile_step(config.build(asked["config"]), asked["topology"])))


if __name__ == "__main__":
    exit_on_user_error(main)
