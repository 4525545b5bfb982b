"""Profile of a step: the device's kernels by layer, the gaps between them and the copies from the host.

What `jax.profiler` records is read with JAX's own reader. On a GPU the kernels are the events on the streams; each is
traced back to the layer that it computes by the name of its HLO instruction, whose metadata hold the path in the
network. Where CUDA graphs hide the instruction, the kernel's own name is tried, which XLA makes of the instruction's;
XLA runs one kernel for all fusions that are alike, so that such a layer is the first of them.
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
"""Kernels in the table."""
TOP_GAPS = 10

Direction = Literal["forward", "backward", ""]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All runs of one kernel for one layer."""

    name: str
    layer: str
    """Its path, as ``block_3/depthwise``; empty where it isn't known or outside of the network."""
    direction: Direction
    """Empty outside of a differentiated function: in inference, in the optimiser."""
    us: float
    """Microseconds a step."""
    count: float
    """Runs a step."""


@dataclasses.dataclass(frozen=True)
class Gap:
    """A time in which no kernel ran."""

    us: float
    """Microseconds, once."""
    before: str
    """The kernel that ended, and its layer."""
    after: str


@dataclasses.dataclass(frozen=True)
class Profile:
    """Times on the first device, in microseconds a step."""

    steps: int
    reason: str | None
    """Why there is nothing to see; None where there is."""
    device: str = ""
    kernels: tuple[Kernel, ...] = ()
    """The longest first."""
    busy_us: float = 0.0
    """In which at least one kernel ran."""
    span_us: float = 0.0
    """From the beginning of the first kernel of all steps to the end of the last."""
    gaps: tuple[Gap, ...] = ()
    """The longest `TOP_GAPS`."""
    memcpy_us: float = 0.0
    """Copies between host and device, which may run beside kernels."""
    by_name_us: float = 0.0
    """Time of kernels whose layer is known by their own name only; see the module."""
    graph_us: float = 0.0
    """Time of CUDA graphs that were recorded as one kernel each: their kernels and gaps can't be seen."""

    @property
    def gaps_us(self) -> float:
        """In which no kernel ran."""
        return self.span_us - self.busy_us

    @property
    def host_share(self) -> float:
        """Share of the span in which no kernel ran: the device waited for the host, or for a copy."""
        return self.gaps_us / self.span_us if self.span_us else 0.0


def profile(run: Callable[[], None], steps: int, program: str | None = None) -> Profile:
    """Profiles one call.

    Args:
      run: runs the steps, compiled and warmed up, and returns when the device is done with them.
      steps: how many it runs.
      program: the text of the compiled step, ``compiled.as_text()``. Without it no layer is known.

    Returns:
      A profile without kernels, which says the reason, where nothing can be recorded or read. What ``run`` raises is
      raised.
    """
    with tempfile.TemporaryDirectory(prefix="mnv2_jax_profile_") as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a record of each Python call would hold up the host that is measured
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except Exception as error:
            return Profile(steps, f"the profiler doesn't start: {_one_line(error)}")
        failed: str | None = None
        try:
            run()
        finally:
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                failed = f"the profiler doesn't stop: {_one_line(error)}"
        files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        if failed or not files:
            return Profile(steps, failed or "the profiler wrote no file")
        return read(files[0].read_bytes(), steps, program)


def read(xspace: bytes, steps: int, program: str | None = None) -> Profile:
    """Reads a serialised XSpace, the content of an ``.xplane.pb``; arguments and result as of `profile`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "builtin type", DeprecationWarning)  # by the reader, on Python 3.12
            device, events = _device_events(jax.profiler.ProfileData.from_serialized_xspace(xspace))
        return _summed(device, events, steps, places(program or ""))
    except Exception as error:  # the layout is XLA's affair and changes; a measurement doesn't end for that
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
    """Between host and device."""
    is_graph: bool
    """A CUDA graph as a whole."""


def _device_events(data: Any) -> tuple[str, list[_Event]]:
    """The name of the first device that did something and what it did, in order; of the CPU where there is no GPU."""
    planes = {plane.name: plane for plane in data.planes}
    for name in sorted((name for name in planes if name.startswith("/device:GPU:")), key=_number_in):
        found = list(_gpu_events(planes[name]))
        if found:
            return name, sorted(_without_containers(found), key=lambda event: event.begin_ns)
    if "/host:CPU" in planes:
        found = list(_cpu_events(planes["/host:CPU"]))
        if found:
            return "/host:CPU", sorted(found, key=lambda event: event.begin_ns)
    seen = "; ".join(f"{name} ({', '.join(line.name for line in plane.lines)})" for name, plane in planes.items())
    raise LookupError(f"no kernels on any plane: {seen or 'there is none'}")


def _number_in(name: str) -> int:
    return int("0" + "".join(re.findall(r"\d+$", name)))


_MEMORY = {"memalloc_details", "memfree_details", "memory_residency_details"}
"""Statistics of what stands on streams, too, but isn't run."""


def _gpu_events(plane: Any) -> Iterator[_Event]:
    """Events on the streams; other lines (XLA Modules, XLA Ops, Steps) repeat them."""
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
    """Every HLO instruction that a thread ran; loops and what is in them overlap."""
    for line in plane.lines:
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats:
                yield _timed(event, str(stats["hlo_op"]), is_copy=False, is_graph=False)


def _timed(event: Any, hlo_op: str, is_copy: bool, is_graph: bool) -> _Event:
    return _Event(event.name, event.start_ns, event.start_ns + event.duration_ns, hlo_op, is_copy, is_graph)


def _without_containers(events: list[_Event]) -> list[_Event]:
    """Leaves out graphs whose kernels are recorded too."""
    inner = [event for event in events if not event.is_graph]

    def holds_any(graph: _Event) -> bool:
        return any(graph.begin_ns <= event.begin_ns and event.end_ns <= graph.end_ns for event in inner)

    return [event for event in events if not (event.is_graph and holds_any(event))]


# --- sums ---------------------------------------------------------------------------------------------------


def _summed(device: str, events: list[_Event], steps: int, places_of: Mapping[str, str]) -> Profile:
    each_us = 1e-3 / steps
    kernels = [event for event in events if not event.is_copy]
    if not kernels:
        return Profile(steps, f"{device} ran no kernel", device)
    by_kernel_name = {re.sub(r"[.\-]", "_", name): path for name, path in places_of.items()}
    sums: dict[tuple[str, str, Direction], tuple[float, int]] = {}
    by_name_us, graph_us = 0.0, 0.0
    gaps: list[Gap] = []
    busy_ns, last = 0.0, None
    for event in kernels:
        us = (event.end_ns - event.begin_ns) * each_us
        path = places_of.get(event.hlo_op)
        if path is None and event.name in by_kernel_name:
            path = by_kernel_name[event.name]
            by_name_us += us
        key = (event.name, *place(path or ""))
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
    found = [Kernel(*key, us, count / steps) for key, (us, count) in sums.items()]
    assert last is not None
    return Profile(
        steps,
        None,
        device,
        kernels=tuple(sorted(found, key=lambda kernel: -kernel.us)),
        busy_us=busy_ns * each_us,
        span_us=(last[0] - kernels[0].begin_ns) * each_us,
        gaps=tuple(sorted(gaps, key=lambda gap: -gap.us)[:TOP_GAPS]),
        memcpy_us=sum((event.end_ns - event.begin_ns) * each_us for event in events if event.is_copy),
        by_name_us=by_name_us,
        graph_us=graph_us,
    )


# --- layers -------------------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"')
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")


def places(program: str) -> dict[str, str]:
    """The path in the program, as ``jit(step)/…/block_3/depthwise/conv_general_dilated``, of each HLO instruction.

    A fusion without one has that of the root of what it fuses, or of the last that has one.
    """
    found: dict[str, str] = {}
    of_computation: dict[str, str] = {}
    rooted: set[str] = set()
    calls: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if match := _INSTRUCTION.match(line):
            is_root, name = match.groups()
            if path := _OP_NAME.search(line):
                found[name] = path[1]
                if is_root:
                    rooted.add(computation)
                if is_root or computation not in rooted:
                    of_computation[computation] = path[1]
            elif called := _CALLS.search(line):
                calls[name] = called[1]
        elif match := _COMPUTATION.match(line):
            computation = match[1]
    return {name: of_computation[called] for name, called in calls.items() if called in of_computation} | found


_FUNCTION = re.compile(r"\bp?jit\([^()]*\)")
_TRANSFORM = re.compile(r"\w+\(|\)")
_NOT_PLACES = re.compile(
    r"while|body|cond|branch_\d+_fun|closed_call|core_call|scan|checkpoint|remat\d*|rematted_computation"
    r"|custom_[jv][vj]p_call|shard_map|pjit"
)


def place(path: str) -> tuple[str, Direction]:
    """Layer and direction of an instruction's path.

    ``jit(step)/transpose(jvp(Network))/Network.endpoints/block_3/depthwise/cond/branch_0_fun/mul`` is
    ``block_3/depthwise``, backward. Left out are functions, transformations, control flow, modules named after their
    class, and the operation.
    """
    path = path.partition(";")[0]
    direction: Direction = "backward" if "transpose(" in path else "forward" if "jvp(" in path else ""
    # What ends with a function, as …/block_9/jit(relu6), names no operation.
    names = _TRANSFORM.sub("", _FUNCTION.sub("", path)).split("/")[:-1]
    names = [name for name in names if re.fullmatch(r"[a-z_][\w\-]*", name) and not _NOT_PLACES.fullmatch(name)]
    return "/".join(names), direction


# --- for people and machines --------------------------------------------------------------------------------


def summary(profile: Profile) -> dict[str, Any]:
    """Everything, as JSON takes it; ``kernel_us`` is the time of the kernels by direction."""
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
    """The longest kernels and gaps in Markdown."""
    if profile.reason is not None:
        return f"No profile: {profile.reason}."
    total = sum(kernel.us for kernel in profile.kernels)
    lines = [
        f"{profile.device}, a step of {profile.steps}: span {profile.span_us:,.0f} µs, kernels"
        f" {profile.busy_us:,.0f} µs, gaps {profile.gaps_us:,.0f} µs ({profile.host_share:.1%}), copies between host"
        f" and device {profile.memcpy_us:,.0f} µs."
    ]
    if profile.graph_us:
        lines += ["", f"{profile.graph_us:,.0f} µs are CUDA graphs that were recorded as a whole."]
    if profile.by_name_us:
        lines += ["", f"The layers of {profile.by_name_us:,.0f} µs are known by the kernels' own names only."]
    lines += ["", "| kernel | layer | pass | µs | runs | share |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for kernel in profile.kernels[:TOP]:
        lines.append(
            f"| {_cell(kernel.name)} | {kernel.layer} | {kernel.direction} | {kernel.us:,.1f} | {kernel.count:.3g}"
            f" | {kernel.us / total:.1%} |"
        )
    if rest := profile.kernels[TOP:]:
        us = sum(kernel.us for kernel in rest)
        count = sum(kernel.count for kernel in rest)
        lines.append(f"| {len(rest)} more | | | {us:,.1f} | {count:.3g} | {us / total:.1%} |")
    if profile.gaps:
        lines += ["", "| gap, once, µs | after | before |", "| ---: | --- | --- |"]
        lines += [f"| {gap.us:,.1f} | {_cell(gap.before)} | {_cell(gap.after)} |" for gap in profile.gaps]
    return "\n".join(lines)


def _cell(name: str) -> str:
    """Text cut to fit into a table: the templates of a library's kernels are longer than a page."""
    name = name.replace("|", "\\|")
    return name if len(name) <= 80 else f"{name[:60]}…{name[-19:]}"
