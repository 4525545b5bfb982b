"""Process of one contender: builds a network, then takes a turn for each request until standard input ends.

    {"who": …, "what": …, "config": …, "forms": …, "answers": …, "params": n}
                     ->  {"ready": facts} or {"unavailable": reason}
    {"repeat": n}    ->  {"seconds": of n steps or batches in a row}
    {"peak": true}   ->  {"bytes": most device memory in use so far, or null}

If a turn fails, the process answers {"unavailable": reason} and ends.

Requests come on standard input and answers go to standard output, one line each. ``what`` is "train" or "infer".
``who`` is one of `OURS` (with the layers in ``forms``; in inference up to the answers if ``answers`` is true), `TORCH`
and `TORCH_COMPILE`. Each contender has its own
process, since two frameworks share neither a GPU's memory nor a thread pool well.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mnv2_jax.bench.torch_rival import Unavailable
from mnv2_jax.config import Config, build
from mnv2_jax.errors import UserError, exit_on_user_error

OURS, TORCH, TORCH_COMPILE = "ours", "torch", "torch.compile"


class Runner(NamedTuple):
    """A compiled train step or inference, ready to be timed."""

    turn: Callable[[int], float]
    """Runs this many steps in a row, waits for the last one, and returns the seconds that all of them took."""
    peak_bytes: Callable[[], int | None]
    """Returns the peak device memory in bytes; None if the device doesn't report it."""
    facts: dict[str, Any]


def build_ours(settings: Config, mode: str, forms: dict[str, Any] | None, answers: bool) -> Runner:
    """Compiles the train step, or the inference without or with answers, for one batch that stays on the devices."""
    import jax

    from mnv2_jax.bench.synthetic import decoder, normalised, random_batch, without_data
    from mnv2_jax.config import check_devices
    from mnv2_jax.nn.forms import Forms
    from mnv2_jax.processes import runtime
    from mnv2_jax.training import mesh as meshes

    runtime.configure()
    check_devices(settings, len(jax.devices()))
    experiment = without_data(settings, forms=None if forms is None else Forms(**forms))
    model = experiment.task.model
    state = meshes.compile_init(experiment.mesh, experiment.init_state)()
    batch: Any = random_batch(experiment)
    arguments: tuple[Any, ...]
    if mode == "train":
        function: Any = meshes.compile_train_step(experiment.mesh, experiment.train_step(-1))
        arguments = state, {}, batch
    else:
        images = jax.jit(lambda batch: normalised(experiment, batch))(batch)
        decode = decoder(experiment) if answers else lambda outputs: outputs
        function = jax.jit(lambda variables, images: decode(model.apply(variables, images)[0]))
        arguments = jax.tree.map(lambda x: x.copy(), state.variables), images
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    facts = {
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "jax": jax.__version__,
        "trace_seconds": traced - start,
        "compile_seconds": time.perf_counter() - traced,
        "memory_limit_bytes": (jax.devices()[0].memory_stats() or {}).get("bytes_limit"),
        "program_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    }

    def train(repeat: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(repeat):
            state, metrics = compiled(state, {}, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    def infer(repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            logits = compiled(*arguments)
        jax.block_until_ready(logits)
        return time.perf_counter() - start

    def peak_bytes() -> int | None:
        stats = jax.devices()[0].memory_stats()
        return stats.get("peak_bytes_in_use") if stats else None

    turn = train if mode == "train" else infer
    turn(2)
    return Runner(turn, peak_bytes, facts)


def build_torch(settings: Config, mode: str, compiled: bool, params: int) -> Runner:
    """Builds the same network in PyTorch, which must have ``params`` parameters.

    Raises:
      torch_rival.Unavailable: if PyTorch or timm has no such network.
    """
    from mnv2_jax.bench import torch_rival

    rival = torch_rival.build(settings, mode="train" if mode == "train" else "infer", compiled=compiled, params=params)
    return Runner(rival.turn, rival.peak_bytes, rival.facts)


def main() -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard error, not between the answers

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    job = json.loads(sys.stdin.readline())
    settings = build(job["config"])
    try:
        if job["who"] == OURS:
            runner = build_ours(settings, job["what"], job["forms"], job["answers"])
        else:
            runner = build_torch(settings, job["what"], job["who"] == TORCH_COMPILE, job["params"])
    except UserError:
        raise
    except Exception as error:  # a rival that can't run, or lacks memory, becomes a row with the reason
        answer(unavailable=_reason(error))
        return
    answer(ready=runner.facts)
    for line in sys.stdin:
        request = json.loads(line)
        result: dict[str, Any]
        try:
            if "repeat" in request:
                result = {"seconds": runner.turn(request["repeat"])}
            else:
                result = {"bytes": runner.peak_bytes()}
        except Exception as error:
            answer(unavailable=_reason(error))
            return  # frees the memory for the other contenders
        answer(**result)


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return (text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}")[:300]


if __name__ == "__main__":
    exit_on_user_error(main)
