"""Costs of a step on TPU slices: counts of the compiled program, the model of its time, and errors.

Tests that compile for TPUs are marked ``pods`` and need libtpu (`make test-pods`).
"""

import importlib.util
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from mnv2_jax import config as configs
from mnv2_jax.bench import __main__ as door
from mnv2_jax.bench import pod, pod_compile, synthetic
from mnv2_jax.bench.pod_compile import collectives
from mnv2_jax.bench.pod_model import CHIPS, IMAGENET_IMAGES, Cost, parse_topology, step_time
from mnv2_jax.errors import UserError
from mnv2_jax.training import mesh as meshes
from tests import cli

W0_35, W1_0 = (str(cli.ROOT / "configs" / name) for name in ("w0_35.py", "w1_0.py"))
PROGRAM = """\
%wrapped (p: f32[2,4]) -> f32[8,4] {
  ROOT %all-gather.9 = f32[8,4]{1,0:T(8,128)} all-gather(%p), channel_id=1, dimensions={0}
}
ENTRY %main (a: f32[3,3,1,32], b: bf16[64]) -> f32[] {
  %all-reduce.2 = (f32[3,3,1,32]{3,2,1,0:T(1,128)S(1)}, /*index=1*/f32[]{:T(128)}) all-reduce(%a, %c), to_apply=%add
  %get-tuple-element.1 = f32[]{:T(128)} get-tuple-element(%all-reduce.2), index=1
  %all-reduce-start.1 = bf16[64]{0} all-reduce-start(%b), channel_id=3, to_apply=%add
  %all-reduce-done.1 = bf16[64]{0} all-reduce-done(%all-reduce-start.1)
  %async = ((f32[2,4]), f32[8,4]) async-start(%p), calls=%wrapped
  %gathered = f32[8,4] async-done(%async)
  %flags = pred[5]{0} all-reduce(%d), to_apply=%or
  ROOT %moved = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%e), source_target_pairs={{0,1}}
}
"""


# --- counts -------------------------------------------------------------------------------------------------


def test_each_collective_is_counted_once():
    counts, reduced = collectives(PROGRAM)
    assert counts == {"all-reduce": 3, "all-gather": 1, "collective-permute": 1}
    assert reduced == 4 * (3 * 3 * 32 + 1) + 2 * 64 + 5


def test_the_count_of_a_real_program():
    mesh = meshes.make_mesh(jax.devices())

    def step(state, frozen, batch):
        return state + frozen + batch.sum(0), {"largest": batch.max()}

    compiled = (
        meshes.compile_train_step(mesh, step).lower(jnp.zeros((3, 5)), jnp.zeros(()), jnp.zeros((8, 3, 5))).compile()
    )
    counts, reduced = collectives(compiled.as_text())
    assert set(counts) == {"all-reduce"}
    assert reduced == 4 * (3 * 5 + 1)


@pytest.mark.slow
def test_the_step_is_compiled_without_data(monkeypatch):
    """Uses four CPU devices in place of a slice."""
    description = types.SimpleNamespace(devices=jax.devices()[:4])
    monkeypatch.setattr(pod_compile.topologies, "get_topology_desc", lambda **options: description)
    overrides = ["model.depth=0.2", "norm.group_size=8", "data.path=/nowhere"]
    settings = pod.load(f"{W0_35}:res=16,classes=10", overrides, parse_topology("v5e:2x2"), 8)
    assert settings.data.batch_size == 32
    results = pod_compile.compile_step(configs.build(configs.to_dict(settings)), "v5e:2x2")
    assert 1 <= results["all_reduces"] <= 2
    assert results["other_collectives"] == {}
    assert min(results["flops"], results["bytes_accessed"], results["peak_bytes"]) > 0
    # The gradient, the running statistics, and a few means are each reduced once.
    experiment = synthetic.without_data(settings, description.devices)
    state = jax.eval_shape(experiment.init_state)
    values = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((state.params, state.model_state)))
    assert 0 <= results["all_reduce_bytes"] - 4 * values <= 4 * 8


def test_a_config_survives_json():
    settings = configs.load(W1_0, ["model.dtype=bfloat16", "norm.group_size=16"]).config
    assert configs.build(json.loads(json.dumps(configs.to_dict(settings)))) == settings


# --- model of the time --------------------------------------------------------------------------------------

NOTHING = Cost(flops=0, bytes_accessed=0, all_reduces=0, all_reduce_bytes=0)


@pytest.mark.parametrize(
    ("name", "petabytes"),
    [("v4", 1.1), ("v5e", 51.2e-3), ("v6e", 102.4e-3)],  # all-reduce bandwidth of a pod, docs.cloud.google.com/tpu
)
def test_links_add_up_to_the_published_bandwidth_of_a_pod(name, petabytes):
    chip = CHIPS[name]
    assert chip.ici * chip.pod == pytest.approx(petabytes * 1e15, rel=0.01)


def test_the_slowest_limit_decides():
    topology = parse_topology("v5e:16x16")
    time = step_time(topology, NOTHING._replace(flops=197e9, bytes_accessed=819e6))
    assert (time.compute, time.memory, time.network, time.step) == pytest.approx((1e-3, 1e-3, 0, 1e-3))
    slower = step_time(topology, NOTHING._replace(flops=197e9, bytes_accessed=3 * 819e6, all_reduce_bytes=1e6))
    assert slower.step == pytest.approx(3e-3 + slower.network)


@pytest.mark.parametrize(
    ("name", "bandwidth", "hops"),
    [
        ("v5e:2x2", 100e9, 2),  # two links a chip
        ("v5e:8x8", 100e9, 14),  # a mesh: one ring, there and back, along each dimension
        ("v5e:8x16", 150e9, 7 + 8),
        ("v5e:16x16", 200e9, 8 + 8),  # a torus: all four links
        ("v4:2x2x1", 90e9, 2),
        ("v4:2x2x4", 135e9, 1 + 1 + 3),
        ("v4:4x4x8", 270e9, 2 + 2 + 4),
        ("v5p:4x4x4", 600e9, 6),
    ],
)
def test_all_reduces_by_the_rings_of_a_torus(name, bandwidth, hops):
    topology = parse_topology(name)
    chips = topology.num_chips
    bulk = step_time(topology, NOTHING._replace(all_reduce_bytes=1e9))
    assert bulk.network == pytest.approx(2 * (chips - 1) / chips * 1e9 / bandwidth)
    assert step_time(topology, NOTHING._replace(all_reduces=3)).network == pytest.approx(3 * 2 * hops * 1e-6)


def test_one_chip_reduces_nothing():
    assert step_time(parse_topology("v5e:1x1"), Cost(1, 1, 2, 1e9)).network == 0


# --- errors -------------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    """Runs the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    door.main()


SMALL = f"--config={W0_35}:res=32,batch=128,classes=10"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pod", "--topology=v5e:2x2"], "--config"),
        (["pod", SMALL], "--topology=CHIP:AxB"),
        (["pod", SMALL, "--topology=v5e"], "--topology='v5e'"),
        (["pod", SMALL, "--topology=v5e:2x2,"], "--topology=''"),
        (["pod", SMALL, "--topology=v5f:2x2"], "v5f.*'v5p'"),
        (["pod", SMALL, "--topology=v5e:2x2x1"], "v5e:2x2x1.* 2 dimensions"),
        (["pod", SMALL, "--topology=v5e:16x32"], "512 chips.* 256"),
        (["pod", SMALL, "--topology=v5e:2x2,v5e:16x16"], "v5e:16x16: data.batch_size=128 .* 256"),
        (
            ["pod", SMALL, "--topology=v5e:2x2", "--config.norm.group_size=24"],
            "norm.group_size=24 .* 32",
        ),
        (["pod", SMALL, "--topology=v5e:2x2", "--batch_per_chip=0"], "--batch_per_chip=0"),
        (["pod", SMALL, "--topology=v5e:2x2", "--timeout_s=nan"], "--timeout_s=nan"),
        (["pod", SMALL, "--topology=v5e:2x2", "--repeats=2"], "pod takes no --repeats"),
        (["pod", SMALL, "--topology=v5e:2x2", "--config.model.dtype=float64"], "float32 or bfloat16"),
        (["pod", SMALL, "--topology=v5e:2x2", "--config.optim.accumulate_steps=4"], "accumulate_steps=4"),
        (["step", SMALL, "--topology=v5e:2x2"], "step takes no --topology"),
        (["input", "--data=folder:x", "--batch_per_chip=2"], "input takes no --batch_per_chip"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *arguments)


def test_missing_libtpu_is_an_error_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[pods\]'"):
        run(monkeypatch, "pod", SMALL, "--topology=v5e:2x2")


def compiler(monkeypatch, tmp_path, script):
    """Replaces the process that compiles by a shell script."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(pod, "check_libtpu", lambda: None)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -SEGV $$", r"^--topology=v5e:2x2: .*\(SIGSEGV\)"),
        ("echo ValueError: no >&2; exit 1", r"\(exit code 1: ValueError: no\)"),
        ("echo noise >&2; echo 'error: out of memory' >&2; exit 2", "^out of memory$"),
        ("sleep 60", r"0\.2 s.*--timeout_s"),
    ],
)
def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path, script, message):
    compiler(monkeypatch, tmp_path, f"exec {script}" if script.startswith("sleep") else script)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "pod", SMALL, "--topology=v5e:2x2", "--timeout_s=0.2")


ANSWER = {
    "flops": 197e9,
    "bytes_accessed": 8.19e9,
    "peak_bytes": 5e8,
    "all_reduces": 2,
    "all_reduce_bytes": 14e6,
    "other_collectives": {},
    "compile_seconds": 100.0,
}


def test_compiled_slices_are_reported_despite_a_crash(monkeypatch, tmp_path, capsys):
    script = f"grep -q 16x16 && kill -ABRT $$\necho '{json.dumps(ANSWER)}'"
    compiler(monkeypatch, tmp_path, script)
    arguments = ("pod", SMALL, "--batch_per_chip=32", "--topology=v5e:16x16,v5e:4x4")
    with pytest.raises(UserError, match=r"16x16: .*\(SIGABRT\)"):
        run(monkeypatch, *arguments, "--json")
    (results,) = json.loads(capsys.readouterr().out)["slices"]
    assert (results["topology"], results["chips"], results["batch_size"]) == ("v5e:4x4", 16, 512)
    model = results["model"]
    assert model["step_seconds"] == pytest.approx(10e-3 + 2 * 2 * 6e-6 + 2 * 15 / 16 * 14e6 / 100e9)
    assert model["images_per_second"] * model["step_seconds"] == pytest.approx(512)
    assert model["imagenet_epoch_seconds"] == pytest.approx(IMAGENET_IMAGES * model["step_seconds"] / 512)
    with pytest.raises(UserError, match="SIGABRT"):
        run(monkeypatch, *arguments)
    table = capsys.readouterr().out.splitlines()
    assert table[2].split()[:9] == ["v5e:4x4", "512", "500", "2.9%", "197.0", "8.19", "2", "14.0", "|"]
    assert "model" in table[3]


# --- compiled for TPUs --------------------------------------------------------------------------------------

has_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install .[pods]")


def compiled(spec, name, *overrides, batch_per_chip, timeout_s=600):
    topology = parse_topology(name)
    return pod.measure(pod.load(spec, overrides, topology, batch_per_chip), topology, timeout_s)


@pytest.mark.pods
@has_libtpu
@pytest.mark.parametrize("name", ["v5e:2x2", "v5e:16x16", "v4:2x2x1", "v4:4x4x4", "v5p:2x2x1", "v5p:4x4x4", "v6e:2x2"])
def test_a_slice_needs_at_most_two_all_reduces(name):
    results = compiled(f"{W0_35}:res=32,classes=10", name, "norm.group_size=8", batch_per_chip=8)
    assert results["chips"] == parse_topology(name).num_chips
    chip = results["per_chip"]
    assert 1 <= chip["all_reduces"] <= 2
    assert chip["other_collectives"] == {}
    assert 0 < chip["peak_bytes"] < chip["hbm_bytes"]


@pytest.mark.pods
@has_libtpu
def test_a_batch_that_is_too_large_is_one_line():
    with pytest.raises(UserError, match=r"v5e:2x2: .*RESOURCE_EXHAUSTED"):
        compiled(f"{W0_35}:classes=10", "v5e:2x2", "norm.group_size=32", batch_per_chip=4096)


@pytest.mark.pods
@has_libtpu
@pytest.mark.timeout(4000)
def test_the_full_network_on_a_pod():
    """MobileNetV2 1.0 at 224 px with 4096 images on 256 chips: 2 all-reduces with groups of 16, 105 over the batch."""
    grouped, global_norm = (
        compiled(
            W1_0, "v5e:16x16", "model.dtype=bfloat16", f"norm.group_size={group}", batch_per_chip=16, timeout_s=1800
        )
        for group in (16, 4096)
    )
    assert grouped["per_chip"]["all_reduces"] == 2
    assert global_norm["per_chip"]["all_reduces"] == 105
    assert grouped["model"]["all_reduce_seconds"] < global_norm["model"]["all_reduce_seconds"] / 10
    for results in (grouped, global_norm):
        # Gradients of kernels are reduced in bfloat16, everything else in float32.
        assert 9e6 < results["per_chip"]["all_reduce_bytes"] < 11e6
        # 3 passes of 300.8 M multiply-adds for each of 16 images, and the elementwise work.
        assert 1 < results["per_chip"]["flops"] / (2 * 3 * 300.8e6 * 16) < 1.5
        assert results["per_chip"]["peak_bytes"] < 0.7e9
