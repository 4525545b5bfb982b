"""Compiles the train step of a config for a TPU topology on a machine without TPUs, and reports its costs per chip.

It runs as a separate process, since libtpu's compiler can crash. It reads ``{"topology": ..., "config": ...}`` from
standard input and prints one JSON object.
"""

from __future__ import annotations

import collections
import json
import math
import re
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies

from mnv2_jax import config
from mnv2_jax.bench.synthetic import abstract_batch, with_classes, without_data
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.training import mesh as meshes

_CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}
"""Options per chip. They make the two cores of a v4 chip one device, as on real hardware; other chips need none."""

_COLLECTIVE = re.compile(
    r" = (.+?) (all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-broadcast|collective-permute"
    r"|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collectives(program: str) -> tuple[dict[str, int], int]:
    """Counts the collective operations in the text of an optimised program, and the bytes that its all-reduces reduce.

    An asynchronous operation, which starts with ``-start`` or in a separate computation and ends with ``-done``, is
    counted once, like a synchronous one.
    """
    counts: collections.Counter[str] = collections.Counter()
    reduced = 0
    for result, kind in _COLLECTIVE.findall(program):
        counts[kind] += 1
        if kind == "all-reduce":
            reduced += _num_bytes(result)
    return dict(counts), reduced


def _num_bytes(result: str) -> int:
    """Returns the bytes of a result from its type, an array such as ``f32[3,3]{1,0}`` or a tuple of arrays."""
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * int(bits or 8) // 8
        for _, bits, shape in _ARRAY.findall(result)
    )


def compile_step(settings: config.Config, topology: str) -> dict[str, Any]:
    """Lowers and compiles the step; when finetuning, that of the last stage, which trains the most parameters.

    Returns:
      Per chip: flops, bytes_accessed, peak_bytes (arguments, results, temporaries and the program), all_reduces,
      all_reduce_bytes and other_collectives (by name). And compile_seconds.

    Raises:
      UserError: if the topology doesn't exist, or if the compiler refuses the program, e.g. because it doesn't fit
        into the memory.
    """
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **_CHIP_CONFIG.get(topology.partition(":")[0], {})
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {_first_line(error)}") from error
    experiment = without_data(with_classes(settings), description.devices)
    step: Any = meshes.compile_train_step(experiment.mesh, experiment.train_step(-1))
    lowered = step.lower(jax.eval_shape(experiment.init_state), {}, abstract_batch(experiment))
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: the compiler refused the program: {_first_line(error)}") from error
    seconds = time.perf_counter() - start
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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def main() -> None:
    """Reads the request, compiles the step and prints the results."""
    request = json.load(sys.stdin)
    print(json.dumps(compile_step(config.build(request["config"]), request["topology"])))


if __name__ == "__main__":
    exit_on_user_error(main)
