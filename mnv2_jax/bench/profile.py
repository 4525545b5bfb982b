"""Profiles a step: the device's kernels by layer, the gaps between them and the copies from the host.

The records of `jax.profiler` are read with JAX's own reader. On a GPU the kernels are the events on the streams. A
kernel's layer is found by its HLO instruction, whose metadata hold the path in the network. CUDA graphs hide the
instruction; then the kernel's own name is used, which XLA derives from the instruction's. Since XLA runs one kernel for
all identical fusions, the layer found by name is the first of them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax

TOP = 25
"""Number of kernels in the table."""
TOP_GAPS = 10
"""Number of gaps in the table."""

Direction = Literal["forward", "backward", ""]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All runs of one kernel for one layer."""

    name: str
    layer: str
    """Path of the layer, e.g. ``block_3/depthwise``; empty if unknown or outside the network."""
    direction: Direction
    """Empty outside a differentiated function, e.g. in inference and in the optimiser."""
    us: float
    """Microseconds per step."""
    count: float
    """Runs per step."""


@dataclasses.dataclass(frozen=True)
class Gap:
    """A period in which no kernel ran."""

    us: float
    """Length in microseconds; not divided by the number of steps."""
    before: str
    """Kernel before the gap, with its layer."""
    after: str
    """Kernel after the gap, with its layer."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """Times on the first device, in microseconds per step."""

    steps: int
    reason: str | None
    """Why there is no profile; None if there is one."""
    device: str = ""
    kernels: tuple[Kernel, ...] = ()
    """All kernels, the longest first."""
    busy_us: float = 0.0
    """Time in which at least one kernel ran."""
    span_us: float = 0.0
    """Time from the start of the first kernel of all steps to the end of the last."""
    gaps: tuple[Gap, ...] = ()
    """The `TOP_GAPS` longest gaps."""
    memcpy_us: float = 0.0
    """Time of copies between host and device, which may overlap with kernels."""
    by_name_us: float = 0.0
    """Time of kernels whose layer was found only by the kernel's name; see the module's docstring."""
    graph_us: float = 0.0
    """Time of CUDA graphs that were recorded as one kernel each, so that their kernels and gaps are unknown."""

    @property
    def gaps_us(self) -> float:
        """Returns the time in which no kernel ran."""
        return self.span_us - self.busy_us

    @property
    def host_share(self) -> float:
        """Returns the share of the span in which no kernel ran: the device waited for the host or for a copy."""
        return self.gaps_us / self.span_us if self.span_us else 0.0


def profile(run: Callable[[], None], steps: int, program: str | None = None) -> Profile:
    """Profiles one call of ``run``; an exception from ``run`` is passed on.

    Args:
      run: runs the steps, which are compiled and warmed up, and returns when the device has finished them.
      steps: number of steps that ``run`` runs.
      program: text of the compiled step, ``compiled.as_text()``. Without it the layers are unknown.

    Returns:
      The profile. If nothing can be recorded or read, it has no kernels and a ``reason``.
    """
    with tempfile.TemporaryDirectory(prefix="mnv2_jax_profile_") as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # recording every Python call would slow down the host
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except Exception as error:
            return Profile(steps, f"the profiler did not start: {_one_line(error)}")
        reason: str | None = None
        try:
            run()
        finally:
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                reason = f"the profiler did not stop: {_one_line(error)}"
        files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        if reason or not files:
            return Profile(steps, reason or "the profiler wrote no file")
        return read(files[0].read_bytes(), steps, program)


def read(xspace: bytes, steps: int, program: str | None = None) -> Profile:
    """Reads a serialised XSpace, the content of an ``.xplane.pb``; see `profile` for arguments and result."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "builtin type", DeprecationWarning)  # the reader warns on Python 3.12
            device, events = _device_events(jax.profiler.ProfileData.from_serialized_xspace(xspace))
        return _sum_events(device, events, steps, instruction_paths(program or ""))
    except Exception as error:  # XLA may change the format at any time, and that must not end a measurement
        return Profile(steps, f"the profile can't be read: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


# --- events -------------------------------------------------------------------------------------------------


class _Event(NamedTuple):
    name: str
    begin_ns: float
    end_ns: float
    hlo_op: str
    is_copy: bool
    """Whether it is a copy between host and device."""
    is_graph: bool
    """Whether it is a CUDA graph, recorded as a whole."""


def _device_events(data: Any) -> tuple[str, list[_Event]]:
    """Returns the first GPU that ran something and its events in order of time; without a GPU those of the CPU."""
    planes = {plane.name: plane for plane in data.planes}
    for name in sorted((name for name in planes if name.startswith("/device:GPU:")), key=_number_in):
        events = list(_gpu_events(planes[name]))
        if events:
            return name, sorted(_without_containers(events), key=lambda event: event.begin_ns)
    if "/host:CPU" in planes:
        events = list(_cpu_events(planes["/host:CPU"]))
        if events:
            return "/host:CPU", sorted(events, key=lambda event: event.begin_ns)
    descriptions = "; ".join(
        f"{name} ({', '.join(line.name for line in plane.lines)})" for name, plane in planes.items()
    )
    raise LookupError(f"no kernels on any plane: {descriptions or 'there are no planes'}")


def _number_in(name: str) -> int:
    return int("0" + "".join(re.findall(r"\d+$", name)))


_MEMORY = {"memalloc_details", "memfree_details", "memory_residency_details"}
"""Statistics that mark events on a stream which are no kernels."""


def _gpu_events(plane: Any) -> Iterator[_Event]:
    """Yields the events on the streams. Other lines (XLA Modules, XLA Ops, Steps) repeat them."""
    for line in plane.lines:
        for event in line.events if line.name.startswith("Stream #") else ():
            stats = dict(event.stats)
            if _MEMORY & stats.keys():
                continue
            details = str(stats.get("memcpy_details", ""))  # kind_src:pageable kind_dst:device size:…
            is_copy = event.name in ("MemcpyH2D", "MemcpyD2H") or bool(re.search("kind_...:(pageable|pinned)", details))
            is_graph = event.name.startswith("CudaGraph") or "cuda_graph_exec_id" in stats
            yield _timed(event, str(stats.get("hlo_op", "")), is_copy, is_graph)


def _cpu_events(plane: Any) -> Iterator[_Event]:
    """Yields every HLO instruction that a thread ran; a loop overlaps with the instructions in it."""
    for line in plane.lines:
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats:
                yield _timed(event, str(stats["hlo_op"]), is_copy=False, is_graph=False)


def _timed(event: Any, hlo_op: str, is_copy: bool, is_graph: bool) -> _Event:
    return _Event(event.name, event.start_ns, event.start_ns + event.duration_ns, hlo_op, is_copy, is_graph)


def _without_containers(events: list[_Event]) -> list[_Event]:
    """Drops the graphs whose kernels are also recorded."""
    inner = [event for event in events if not event.is_graph]

    def holds_any(graph: _Event) -> bool:
        return any(graph.begin_ns <= event.begin_ns and event.end_ns <= graph.end_ns for event in inner)

    return [event for event in events if not (event.is_graph and holds_any(event))]


# --- sums ---------------------------------------------------------------------------------------------------


def _sum_events(device: str, events: list[_Event], steps: int, paths: Mapping[str, str]) -> Profile:
    us_per_ns = 1e-3 / steps  # microseconds per step
    kernels = [event for event in events if not event.is_copy]
    if not kernels:
        return Profile(steps, f"{device} ran no kernel", device)
    by_kernel_name = {re.sub(r"[.\-]", "_", name): path for name, path in paths.items()}
    sums: dict[tuple[str, str, Direction], tuple[float, int]] = {}
    by_name_us, graph_us = 0.0, 0.0
    gaps: list[Gap] = []
    busy_ns, last = 0.0, None
    for event in kernels:
        us = (event.end_ns - event.begin_ns) * us_per_ns
        path = paths.get(event.hlo_op)
        if path is None and event.name in by_kernel_name:
            path = by_kernel_name[event.name]
            by_name_us += us
        key = (event.name, *layer_and_direction(path or ""))
        before_us, count = sums.get(key, (0.0, 0))
        sums[key] = (before_us + us, count + 1)
        graph_us += us if event.is_graph else 0.0
        label = f"{event.name} ({key[1]})" if key[1] else event.name
        if last is None:
            busy_ns += event.end_ns - event.begin_ns
            last = (event.end_ns, label)
            continue
        if event.begin_ns > last[0]:
            gaps.append(Gap((event.begin_ns - last[0]) * 1e-3, last[1], label))
        if event.end_ns > last[0]:
            busy_ns += event.end_ns - max(event.begin_ns, last[0])
            last = (event.end_ns, label)
    totals = [Kernel(*key, us, count / steps) for key, (us, count) in sums.items()]
    assert last is not None
    return Profile(
        steps,
        None,
        device,
        kernels=tuple(sorted(totals, key=lambda kernel: -kernel.us)),
        busy_us=busy_ns * us_per_ns,
        span_us=(last[0] - kernels[0].begin_ns) * us_per_ns,
        gaps=tuple(sorted(gaps, key=lambda gap: -gap.us)[:TOP_GAPS]),
        memcpy_us=sum((event.end_ns - event.begin_ns) * us_per_ns for event in events if event.is_copy),
        by_name_us=by_name_us,
        graph_us=graph_us,
    )


# --- layers -------------------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"')
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")


def instruction_paths(program: str) -> dict[str, str]:
    """Returns the path of each HLO instruction, e.g. ``jit(step)/…/block_3/depthwise/conv_general_dilated``.

    A fusion without a path gets that of its computation's root, or else of the last instruction in it that has one.
    """
    paths: dict[str, str] = {}
    computation_paths: dict[str, str] = {}
    computations_with_root: set[str] = set()
    calls: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if match := _INSTRUCTION.match(line):
            is_root, name = match.groups()
            if path := _OP_NAME.search(line):
                paths[name] = path[1]
                if is_root:
                    computations_with_root.add(computation)
                if is_root or computation not in computations_with_root:
                    computation_paths[computation] = path[1]
            elif called := _CALLS.search(line):
                calls[name] = called[1]
        elif match := _COMPUTATION.match(line):
            computation = match[1]
    return {name: computation_paths[called] for name, called in calls.items() if called in computation_paths} | paths


_FUNCTION = re.compile(r"\bp?jit\([^()]*\)")
_TRANSFORM = re.compile(r"\w+\(|\)")
_NOT_MODULES = re.compile(
    r"while|body|cond|branch_\d+_fun|closed_call|core_call|scan|checkpoint|remat\d*|rematted_computation"
    r"|custom_[jv][vj]p_call|shard_map|pjit"
)


def layer_and_direction(path: str) -> tuple[str, Direction]:
    """Returns the layer and the direction of an instruction's path.

    ``jit(step)/transpose(jvp(Network))/Network.endpoints/block_3/depthwise/cond/branch_0_fun/mul`` gives
    ``block_3/depthwise``, backward. Functions, transformations, control flow, modules named after their class, and the
    operation are dropped.
    """
    path = path.partition(";")[0]
    direction: Direction = "backward" if "transpose(" in path else "forward" if "jvp(" in path else ""
    # A path that ends with a function, e.g. …/block_9/jit(relu6), names no operation.
    names = _TRANSFORM.sub("", _FUNCTION.sub("", path)).split("/")[:-1]
    names = [name for name in names if re.fullmatch(r"[a-z_][\w\-]*", name) and not _NOT_MODULES.fullmatch(name)]
    return "/".join(names), direction


# --- output -------------------------------------------------------------------------------------------------


def summary(profile: Profile) -> dict[str, Any]:
    """Returns the whole profile as JSON data; ``kernel_us`` is the time of the kernels by direction."""
    totals = {"forward": 0.0, "backward": 0.0, "neither": 0.0}
    for kernel in profile.kernels:
        totals[kernel.direction or "neither"] += kernel.us
    return dataclasses.asdict(profile) | {
        "kernels": [dataclasses.asdict(kernel) for kernel in profile.kernels],
        "gaps": [dataclasses.asdict(gap) for gap in profile.gaps],
        "gaps_us": profile.gaps_us,
        "host_share": profile.host_share,
        "kernel_us": totals,
        "kernel_count": sum(kernel.count for kernel in profile.kernels),
    }


def table(profile: Profile) -> str:
    """Formats the longest kernels and gaps as Markdown."""
    if profile.reason is not None:
        return f"No profile: {profile.reason}."
    total = sum(kernel.us for kernel in profile.kernels)
    lines = [
        f"{profile.device}, per step (mean of {profile.steps}): span {profile.span_us:,.0f} µs, kernels"
        f" {profile.busy_us:,.0f} µs, gaps {profile.gaps_us:,.0f} µs ({profile.host_share:.1%}), copies between host"
        f" and device {profile.memcpy_us:,.0f} µs."
    ]
    if profile.graph_us:
        lines += ["", f"CUDA graphs that were recorded as a whole took {profile.graph_us:,.0f} µs."]
    if profile.by_name_us:
        lines += ["", f"For {profile.by_name_us:,.0f} µs the layer was found only by the kernel's name."]
    lines += ["", "| kernel | layer | pass | µs | runs | share |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for kernel in profile.kernels[:TOP]:
        lines.append(
            f"| {_cell(kernel.name)} | {kernel.layer} | {kernel.direction} | {kernel.us:,.1f} | {kernel.count:.3g}"
            f" | {kernel.us / total:.1%} |"
        )
    if shorter_kernels := profile.kernels[TOP:]:
        us = sum(kernel.us for kernel in shorter_kernels)
        count = sum(kernel.count for kernel in shorter_kernels)
        lines.append(f"| {len(shorter_kernels)} more | | | {us:,.1f} | {count:.3g} | {us / total:.1%} |")
    if profile.gaps:
        lines += ["", "| single gap, µs | after kernel | before kernel |", "| ---: | --- | --- |"]
        lines += [f"| {gap.us:,.1f} | {_cell(gap.before)} | {_cell(gap.after)} |" for gap in profile.gaps]
    return "\n".join(lines)


def _cell(name: str) -> str:
    """Shortens a name to fit into a table: template names of library kernels can be longer than a page."""
    name = name.replace("|", "\\|")
    return name if len(name) <= 80 else f"{name[:60]}…{name[-19:]}"
