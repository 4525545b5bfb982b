"""Compares the traces of two trainings: names the first step, and the first thing in it, where they part.

A run with `log.trace` writes a trace. Within a step the order is that of cause and effect: batch, loss, gradients, new
state; tensors are in the order of the network.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from mnv2_jax.errors import UserError
from mnv2_jax.runs import trace_log

Kind = Literal["batch", "loss", "gradient", "state"]
Trace: TypeAlias = Sequence[Mapping[str, Any]]
"""Lines of trace.jsonl, in the order of the steps."""


class Bound(NamedTuple):
    """How far numbers may lie apart on two layouts of devices, which add in different orders."""

    relative: float
    """Largest difference, as a share of the larger number; see `FLOOR`."""
    steps: int | None
    """Number of steps that are compared, since a rounding grows in training; None: all."""


# Measured on 1, 2 and 4 CPU devices with 1 to 5 seeds. In float32 the first two steps of a network of four blocks
# differ by 5e-6 at most, those of MobileNetV2 0.25 at a depth of 0.3 on digits by 2e-5; in float64 eight differ by
# 2e-13. In a larger network a value may lie within a rounding of an activation's kink, and one flip there moves the
# fourth digit of a gradient: hence 1e-3. The second step of MobileNetV2 0.35 on digits of 16 px, whose gradient at the
# stem has a norm of 28, differed by 8e-3 already: hence one step.
BOUNDS: Mapping[str, Bound] = {"float64": Bound(1e-9, None), "float32": Bound(1e-3, 1)}
"""Bounds by `model.dtype`. In another type only batches are compared."""
FLOOR = 1e-3
"""A norm counts as this share, at least, of the norm of all tensors beside it: of the gradients, the parameters, the
statistics, … Some gradients are 0 but for rounding, such as those of a bias that the next norm takes away again."""


class Difference(NamedTuple):
    """The first difference between two traces."""

    step: int
    kind: Kind
    tensor: str | None
    """Name of the array, as in a checkpoint, for a gradient or a part of the state; otherwise None."""
    values: tuple[Any, Any]
    """What the two traces have there: the hash of a batch, a loss, or hash and norm of a tensor; None if it lacks."""
    sentence: str
    """All of it in words, and which comparison was made."""


def read_trace(folder: pathlib.Path) -> Trace:
    """Reads the trace of a run.

    Raises:
      UserError: if the folder has none.
    """
    lines = trace_log.read_trace(folder)
    if not lines:
        raise UserError(
            f"{folder}: no trace is there (no line in {trace_log.NAME}); train with --config.log.trace=True"
        )
    return lines


def common_steps(a: Trace, b: Trace) -> list[int]:
    """Returns the steps that both traces have; a run that was traced from its resumption on lacks the first ones."""
    return sorted({line["step"] for line in a} & {line["step"] for line in b})


def comparison(*, same_layout: bool, dtype: str) -> str:
    """Says which comparison `first_difference` makes."""
    if same_layout:
        return "same layout, compared to the bit"
    bound = BOUNDS.get(dtype)
    if bound is None:
        return f"other layout, only batches compared, in {dtype}"
    steps = "" if bound.steps is None else f" over the first {'step' if bound.steps == 1 else f'{bound.steps} steps'}"
    return f"other layout, batches compared by hash, and numbers to {bound.relative:g} of themselves in {dtype}{steps}"


def first_difference(a: Trace, b: Trace, *, same_layout: bool, dtype: str) -> Difference | None:
    """Finds where two runs of one config part.

    On the same layout of devices every hash must be equal. On two layouts sums are added in another order, so only the
    hashes of the batches must; losses and norms are compared as numbers, to the bound of `BOUNDS`.

    Args:
      a: the trace of a run.
      b: that of another run. Steps that only one of them has are left out.
      same_layout: whether both ran on devices of the same kind and number.
      dtype: `model.dtype`.

    Raises:
      UserError: if they have no step in common.
    """
    steps = common_steps(a, b)
    if not steps:
        raise UserError("the two traces have no step in common; trace both runs from their beginning")
    bound = None if same_layout else BOUNDS.get(dtype, Bound(0.0, 0))
    with_numbers = set(steps if bound is None else steps[: bound.steps])
    ours, others = ({line["step"]: line for line in trace} for trace in (a, b))
    for step in steps:
        for kind, tensor, one, other, floor in _things(ours[step], others[step]):
            if kind != "batch" and step not in with_numbers:
                break
            if bound is None or kind == "batch" or one is None or other is None:  # None: the tensor isn't there
                differ = one[0] != other[0] if isinstance(one, list) and isinstance(other, list) else one != other
            else:
                numbers = (one, other) if kind == "loss" else (one[1], other[1])
                differ = _differ(*numbers, bound.relative, floor)
            if differ:
                what = {"gradient": f"gradient of {tensor}", "state": f"{tensor} of the new state"}.get(kind, kind)
                made = comparison(same_layout=same_layout, dtype=dtype)
                sentence = f"step {step}: the {what} differs, {_words(kind, one)} and {_words(kind, other)} ({made})"
                return Difference(step, kind, tensor, (one, other), sentence)
    return None


def _things(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[Kind, str | None, Any, Any, float]]:
    """Yields what two lines say of a step, in the order of cause and effect, with the floor of a norm."""
    yield "batch", None, a["batch"], b["batch"], 0.0
    yield "loss", None, a["loss"], b["loss"], 0.0
    kinds: tuple[tuple[Kind, str], ...] = (("gradient", "gradients"), ("state", "state"))
    for kind, key in kinds:
        norms: dict[str, list[float]] = {}
        for name, (_, norm) in a[key].items():
            norms.setdefault(_field(name), []).append(norm or 0.0)
        floors = {field: FLOOR * math.hypot(*values) for field, values in norms.items()}
        for name in dict.fromkeys([*a[key], *b[key]]):
            yield kind, name, a[key].get(name), b[key].get(name), floors.get(_field(name), 0.0)


def _field(name: str) -> str:
    """Returns the field of the state that a tensor belongs to, such as params."""
    return name.partition(".")[0]


def _differ(a: float | None, b: float | None, relative: float, floor: float) -> bool:
    """Compares two numbers; None stands for one that isn't finite."""
    if a is None or b is None:
        return a != b
    return abs(a - b) > relative * max(abs(a), abs(b), floor)


def _words(kind: Kind, value: Any) -> str:
    if value is None:
        return "nothing" if kind != "loss" else "a number that isn't finite"
    if kind == "batch":
        return f"hash {value:08x}"
    return f"{value!r}" if kind == "loss" else f"hash {value[0]:08x} (norm {value[1]})"
