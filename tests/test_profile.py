"""A profile finds kernels, layers and gaps, in a real record of the CPU and in records written like those of a GPU."""

import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import pytest

from mnv2_jax.bench.profile import instruction_paths, layer_and_direction, profile, read, summary, table

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    to_xspace = jax.profiler.ProfileData.text_proto_to_serialized_xspace

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0.2: bf16[2,4]) -> bf16[2,4] {
  %param_0.2 = bf16[2,4]{1,0} parameter(0)
  ROOT %maximum.3 = bf16[2,4]{1,0} maximum(%param_0.2, %param_0.2), metadata={op_name="jit(step)/jvp(Network)/stem/max"}
}

%command_buffer (p: bf16[2,4]) -> bf16[2,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  %custom-call.7 = bf16[2,4]{1,0} custom-call(%p), custom_call_target="__cudnn$convForward", \
metadata={op_type="conv" op_name="jit(step)/jvp(Network)/Network.endpoints/block_3/depthwise/cond/branch_1_fun/\
conv_general_dilated" stack_frame_id=3}, backend_config={"a":{"b":"c"}}
  ROOT %loop_add_fusion.12 = bf16[2,4]{1,0} fusion(%custom-call.7), kind=kLoop, calls=%fused_computation.2, \
metadata={op_name="jit(step)/transpose(jvp(Network))/Network.endpoints/block_3/project_norm/add_any"}
}

ENTRY %main.9 (x: bf16[2,4]) -> bf16[2,4] {
  %x = bf16[2,4]{1,0} parameter(0), metadata={op_name="state[\\'params\\']"}
  %fusion.1 = bf16[2,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_computation.1
  ROOT %call = bf16[2,4]{1,0} call(%fusion.1), to_apply=%command_buffer
}
"""


def test_layers_of_paths():
    network = "Network.endpoints/block_3"
    for path, expected in {
        f"jit(step)/jvp(Network)/{network}/depthwise/conv_general_dilated": ("block_3/depthwise", "forward"),
        f"jit(step)/transpose(jvp(Network))/{network}/depthwise/cond/branch_0_fun/transpose(jvp())/while/body/"
        "closed_call/mul": ("block_3/depthwise", "backward"),
        f"jit(step)/jvp(Network)/{network}/squeeze_excite/jit(hard_sigmoid)/jit(relu6)/max": (
            "block_3/squeeze_excite",
            "forward",
        ),
        f"jit(step)/jvp(Network)/{network}/jit(hard_silu)": ("block_3", "forward"),
        f"jit(step)/jvp(Network)/{network}/attention/bqhd,bkd->bhqk/dot_general": ("block_3/attention", "forward"),
        f"jit(f)/Network/{network}/add": ("block_3", ""),
        "jit(step)/mul": ("", ""),
        "state[\\'params\\'][\\'stem\\']": ("", ""),
        "": ("", ""),
    }.items():
        assert layer_and_direction(path) == expected, path


def test_paths_come_from_the_metadata_or_from_the_fused_instructions():
    paths = instruction_paths(PROGRAM)
    assert layer_and_direction(paths["fusion.1"]) == ("stem", "forward")
    assert layer_and_direction(paths["custom-call.7"]) == ("block_3/depthwise", "forward")
    assert layer_and_direction(paths["loop_add_fusion.12"]) == ("block_3/project_norm", "backward")
    assert "call" not in paths
    assert instruction_paths("no HLO") == {}


class Plane:
    """Builds a plane of an XSpace as text."""

    def __init__(self, name):
        self.name = name
        self.lines, self.events, self.stats = [], {}, {}

    def stat(self, name, value):
        key = self.stats.setdefault(name, len(self.stats) + 1)
        if isinstance(value, int):
            return f"stats {{ metadata_id: {key} uint64_value: {value} }}"
        return f"stats {{ metadata_id: {key} ref_value: {self.stats.setdefault(value, len(self.stats) + 1)} }}"

    def line(self, name, *events):
        """Adds a line of events, each a tuple of name, start and length in microseconds, and statistics."""
        text = []
        for event, begin, length, stats in events:
            key = self.events.setdefault(event, len(self.events) + 1)
            stat_text = " ".join(itertools.starmap(self.stat, stats.items()))
            text.append(
                f"events {{ metadata_id: {key} offset_ps: {begin * 10**6} duration_ps: {length * 10**6} {stat_text} }}"
            )
        self.lines.append(f'lines {{ id: {len(self.lines)} name: "{name}" timestamp_ns: 5000 {" ".join(text)} }}')
        return self

    def __str__(self):
        metadata = [
            f'{kind}_metadata {{ key: {key} value {{ id: {key} name: "{name}" }} }}'
            for kind, names in (("event", self.events), ("stat", self.stats))
            for name, key in names.items()
        ]
        return f'planes {{ name: "{self.name}" {" ".join(self.lines)} {" ".join(metadata)} }}'


def xspace(*planes):
    return to_xspace("\n".join(map(str, planes)))


def hlo(name, **more):
    return {"hlo_op": name, "hlo_module": "jit_step", "kernel_details": "regs:32", **more}


def gpu_plane():
    """Two steps, a copy that overlaps with them, and a line that repeats them."""
    plane = Plane("/device:GPU:0")
    compute = []
    for begin in (0, 100):
        compute += [
            ("fusion_1", begin, 10, hlo("fusion.1")),
            ("void cudnn::conv<float, 3>(int)", begin + 10, 20, hlo("custom-call.7")),
            # A kernel in a CUDA graph has the statistics of the graph's launch.
            ("loop_add_fusion_12", begin + 40, 20, hlo("call", cuda_graph_id=3, cuda_graph_node_id=8)),
            ("CudaGraphExec:3", begin + 38, 30, {"cuda_graph_exec_id": 3}),
            ("Memset", begin + 60, 2, {"memset_details": "kind:device"}),
            ("MemoryAlloc", begin + 70, 9, {"memalloc_details": "kind:device"}),
        ]
    copies = [("MemcpyH2D", 30, 6, {"memcpy_details": "kind_src:pageable kind_dst:device size:64 dest:0 async:1"})]
    copies += [("MemcpyD2D", 55, 9, {"memcpy_details": "kind_src:device kind_dst:device size:64 dest:0 async:1"})]
    plane.line("Stream #13(MemcpyH2D,MemcpyD2D)", *copies)
    plane.line("Stream #7(Kernel,Memset)", *compute)
    plane.line("XLA Modules", ("jit_step", 0, 1000, {}))
    return plane


def test_a_gpu():
    host = Plane("/host:CPU").line("python", ("step", 0, 1000, {}), ("dot.1", 0, 400, {"hlo_op": "dot.1"}))
    other = Plane("/device:GPU:1").line("Stream #9", ("fusion_1", 0, 1, hlo("fusion.1")))
    measured = read(xspace(host, other, gpu_plane()), 2, PROGRAM)
    assert (measured.reason, measured.device) == (None, "/device:GPU:0")
    assert [(kernel.layer, kernel.direction, kernel.us, kernel.count) for kernel in measured.kernels] == [
        ("block_3/depthwise", "forward", 20, 1),
        ("block_3/project_norm", "backward", 20, 1),
        ("stem", "forward", 10, 1),
        ("", "", 4.5, 0.5),  # the copy on the device itself
        ("", "", 2, 1),
    ]
    assert measured.span_us == pytest.approx(162 / 2)
    assert measured.busy_us == pytest.approx((30 + 24 + 30 + 22) / 2)
    assert measured.gaps_us == pytest.approx((10 + 36 + 10) / 2)
    assert measured.host_share == pytest.approx(56 / 162)
    assert measured.memcpy_us == pytest.approx(6 / 2)
    assert (measured.by_name_us, measured.graph_us) == (20, 0)
    largest = measured.gaps[0]
    assert (largest.us, largest.before, largest.after) == (36, "MemcpyD2D", "fusion_1 (stem)")
    printed = json.loads(json.dumps(summary(measured)))
    assert printed["kernel_us"] == {"forward": 30, "backward": 20, "neither": 6.5}
    assert printed["host_share"] == measured.host_share
    text = table(measured)
    assert "| void cudnn::conv<float, 3>(int) | block_3/depthwise | forward | 20.0 | 1 | 35.4% |" in text
    assert "For 20 µs" in text


def test_a_graph_recorded_as_a_whole_is_a_kernel():
    plane = Plane("/device:GPU:0").line("Stream #7(CudaGraph)", ("CudaGraphExec:3", 0, 30, {"cuda_graph_exec_id": 3}))
    measured = read(xspace(plane), 1, PROGRAM)
    assert (measured.busy_us, measured.graph_us, measured.gaps) == (30, 30, ())
    assert "CUDA graphs" in table(measured)


def test_an_unreadable_profile_has_a_reason():
    strange = Plane("/device:GPU:0").line("Tasks", ("fusion_1", 0, 10, {}))
    copies = Plane("/device:GPU:0").line("Stream #1", ("MemcpyD2H", 0, 10, {}))
    for data, reason in (
        (b"", "no planes"),
        (b"\x0b not a proto", "can't be read"),
        (xspace(strange), "/device:GPU:0 (Tasks)"),
        (xspace(copies), "ran no kernel"),
    ):
        measured = read(data, 3, PROGRAM)
        assert (measured.kernels, measured.span_us, measured.host_share) == ((), 0, 0)
        assert reason in measured.reason
        assert reason in table(measured)
        json.dumps(summary(measured))


def test_the_cpu():
    def loss(w, x):
        with jax.named_scope("block_3"):
            return jnp.tanh(x @ w).sum()

    w, x = jnp.ones((64, 64)), jnp.ones((8, 64))
    step = jax.jit(jax.grad(loss)).lower(w, x).compile()
    step(w, x).block_until_ready()

    def run():
        for _ in range(3):
            step(w, x).block_until_ready()

    measured = profile(run, 3, step.as_text())
    assert (measured.reason, measured.device) == (None, "/host:CPU")
    assert {kernel.layer for kernel in measured.kernels} >= {"block_3"}
    assert {kernel.direction for kernel in measured.kernels} >= {"forward", "backward"}
    assert all(kernel.us > 0 and kernel.count == 1 for kernel in measured.kernels)
    assert 0 < measured.busy_us < measured.span_us

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        profile(fails, 1)
    assert profile(lambda: None, 1).reason is not None  # the profiler works again, and recorded nothing
