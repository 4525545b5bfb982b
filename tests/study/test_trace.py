"""A difference that is planted in a training is found, and named with its step and its tensor.

The task is the small one of tests/tasks/mean_colour.py, whose step is compiled in a second.
"""

import functools
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnv2_jax import config as configs
from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import count_layers
from mnv2_jax.runs.trace_log import TraceLog
from mnv2_jax.study import check
from mnv2_jax.study.trace import BOUNDS, first_difference, read_trace
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import open_experiment
from mnv2_jax.training.feeds import train_batches
from mnv2_jax.training.step import make_train_step
from mnv2_jax.training.tracing import TraceLines
from tests import cli

STEPS = 8
SMALL = (
    "modules=('tests.short', 'tests.tasks.mean_colour')",
    "task=mean_colour",
    "data.name=noise",
    "train.steps=12",
    "log.trace=True",
    "log.tensorboard=False",
    "optim.ema_decay=0.9",
)
ARGUMENTS = (cli.SHORT[0], *(f"--config.{override}" for override in SMALL))


def same(batch, step):
    return batch


def table(ordinary, at):
    """A value for each step from 1 on. The last is never reached, but keeps XLA from folding equal values."""
    values = np.full(STEPS + 2, ordinary, np.float32)
    values[-1] = ordinary + 1
    for step, value in at.items():
        values[step] = value
    return jnp.asarray(values)


def planted(optimizer, factors, ulps):
    """The optimiser with its updates times the factors, by step, and one weight by an ulp too large where told.

    Without a plant it is the same program, with other tables: another one would round otherwise.
    """
    factors, ulps = table(1, factors), table(0, ulps)

    def update(grads, state, params):
        (count,) = (leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32)
        updates, state = optimizer.tx.update(grads, state, params)
        updates = jax.tree.map(lambda update: update * factors[count + 1].astype(update.dtype), updates)
        weight, change = params["colours"]["kernel"][2, 1], updates["colours"]["kernel"][2, 1]
        wrong = jnp.nextafter(weight + change, jnp.asarray(np.inf, weight.dtype)) - weight
        change = jnp.where(ulps[count + 1] > 0, wrong, change)
        return {**updates, "colours": {"kernel": updates["colours"]["kernel"].at[2, 1].set(change)}}, state

    return optimizer._replace(tx=optax.GradientTransformation(optimizer.tx.init, update))


def trained(*overrides, devices=1, change=same, factors=types.MappingProxyType({}), ulps=types.MappingProxyType({})):
    """Takes steps, and returns the trace.

    Args:
      overrides: changes of the config.
      devices: number of devices.
      change: gets each batch and its step, and returns the batch that is trained on.
      factors: of the learning rate, by step.
      ulps: see `planted`.
    """
    loaded = configs.load(cli.SHORT[0].removeprefix("--config="), [*SMALL, *overrides])
    opened = open_experiment(loaded.config, jax.devices()[:devices])
    optimizer = planted(opened.optimizers[0], factors, ulps)
    step = meshes.compile_train_step(opened.mesh, make_train_step(opened.task, optimizer, opened.config))
    state = meshes.compile_init(opened.mesh, opened.init_state)()
    lines = TraceLines(jax.eval_shape(opened.init_state), ["stem", "colours"])
    trace = []
    for at, batch in zip(range(1, STEPS + 1), train_batches(opened), strict=False):
        state, metrics = step(state, {}, change(batch, at))
        metrics = jax.device_get(metrics)
        trace.append(json.loads(json.dumps(lines.line(at, float(metrics["loss"]), metrics["trace"]))))
    return trace


@functools.cache
def whole():
    return trained()


def found(trace, same_layout=True, dtype="float32"):
    """Returns step, kind and tensor of the first difference from the whole run, whose sentence must name them."""
    difference = first_difference(whole(), trace, same_layout=same_layout, dtype=dtype)
    if difference is None:
        return None
    assert difference.values[0] != difference.values[1]
    assert difference.sentence.startswith(f"step {difference.step}: the ")
    assert (difference.tensor or difference.kind) in difference.sentence
    return difference[:3]


def test_the_same_again_is_equal():
    assert [line["step"] for line in whole()] == list(range(1, STEPS + 1))
    assert list(whole()[0]["gradients"]) == ["params.stem.kernel", "params.colours.kernel"]
    assert found(trained()) is None
    assert len({line["batch"] for line in whole()}) == len({line["loss"] for line in whole()}) == STEPS


def test_a_pixel_of_a_batch():
    def brighter(batch, step):
        image = batch["image"]
        return batch if step != 5 else {**batch, "image": image.at[3, 2, 1, 0].set(image[3, 2, 1, 0] ^ 1)}

    assert found(trained(change=brighter)) == (5, "batch", None)


def test_another_order_of_a_batch():
    """As if two workers had come in the other order: the images are the same."""

    def reversed_halves(batch, step):
        return batch if step != 4 else jax.tree.map(lambda rows: jnp.roll(rows, len(rows) // 2, 0), batch)

    assert found(trained(change=reversed_halves)) == (4, "batch", None)


def test_another_seed():
    assert found(trained("seed=1")) == (1, "batch", None)


def test_a_weight_by_one_ulp():
    """As if the machine had added wrongly at step 3: the state of that step says so, and which array it is."""
    trace = trained(ulps={3: 1})
    assert found(trace) == (3, "state", "params.colours.kernel")
    one, other = (line[2]["state"]["params.colours.kernel"][1] for line in (whole(), trace))
    assert other == pytest.approx(one, rel=1e-6)


def test_another_learning_rate_from_step_7_on():
    """Its gradient is the same; what it made of the weights isn't."""
    assert found(trained(factors={7: 1.01, 8: 1.01})) == (7, "state", "params.stem.kernel")


@pytest.mark.parametrize("devices", [2, 4])
def test_another_layout_in_float32(devices):
    trace = trained(devices=devices)
    assert found(trace, same_layout=False) is None
    assert found(trace)[0] <= 2  # to the bit it isn't the same
    later = trained("seed=1", devices=devices)
    assert found([*trace[:4], *later[4:]], same_layout=False) == (5, "batch", None)  # numbers end before, batches don't
    other = json.loads(json.dumps(trace))
    other[0]["gradients"]["params.colours.kernel"][1] *= 1.01
    assert found(other, same_layout=False) == (1, "gradient", "params.colours.kernel")


def test_another_layout_in_float64(x64):
    one, other = (trained("model.dtype=float64", devices=devices) for devices in (1, 4))
    assert first_difference(one, other, same_layout=False, dtype="float64") is None
    other[-1]["loss"] *= 1 + 1e-8
    difference = first_difference(one, other, same_layout=False, dtype="float64")
    assert difference[:3] == (STEPS, "loss", None)
    assert "1e-09" in difference.sentence
    assert BOUNDS["float64"].steps is None


def test_tensors_are_in_the_order_of_the_network():
    opened = open_experiment(
        configs.load(
            cli.SHORT[0].removeprefix("--config="), ["modules=tests.short", "model.name=short", "data.name=noise"]
        ).config
    )
    layers = [layer.name for layer in count_layers(opened.task.model, 16).layers]
    state = jax.eval_shape(opened.init_state)
    sizes = {"gradients": len(jax.tree.leaves(state.params)), "state": len(jax.tree.leaves(state))}
    described = {kind: (np.arange(n, dtype=np.uint32), np.zeros(n)) for kind, n in sizes.items()}
    line = TraceLines(state, layers).line(1, 0.0, {"batch": np.uint32(7), **described})
    names = [name.split(".")[1:-1] for name in line["gradients"]]
    parts = list(dict.fromkeys(name[0] for name in names))
    assert parts == ["stem", "stem_norm", "block_1", "block_2", "block_3", "block_4", "head", "head_norm", "classifier"]
    convolutions = [layer for part, *layer in names if part == "block_4" and "norm" not in layer[0]]
    assert convolutions == [["expand"], ["depthwise"], ["project"]]
    fields = list(dict.fromkeys(name.partition(".")[0] for name in line["state"]))
    assert fields == ["step", "seed", "first_bad_step", "params", "model_state", "opt_state"]
    assert {value[0] for value in line["state"].values()} == set(range(sizes["state"]))
    assert line["state"]["step"][0] == 0


def line_of(step, loss=0.5):
    return {"step": step, "batch": step, "loss": loss, "gradients": {}, "state": {}}


def test_lines_of_steps_that_are_repeated_are_not_doubled(tmp_path):
    for start, end in ((0, 5), (3, 6)):
        log = TraceLog(tmp_path, start)
        for step in range(start + 1, end + 1):
            log.write(line_of(step, loss=float("nan") if step == 6 else 10.0 * start + step))
        log.close()
        with (tmp_path / "trace.jsonl").open("a") as file:
            file.write('{"step": 99, "batch": 1, "lo')
    trace = read_trace(tmp_path)
    assert [(line["step"], line["loss"]) for line in trace] == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, None)]


def test_what_cannot_be_compared_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no trace is there .*log\.trace=True"):
        read_trace(tmp_path)
    with pytest.raises(UserError, match="no step in common"):
        first_difference([line_of(1)], [line_of(2)], same_layout=True, dtype="float32")
    for argv in (["x"], ["x", "y", "--config=w0_35"], ["x", "y", "--steps=5"], ["--config=w0_35", "--steps=2"]):
        with pytest.raises(UserError):
            check.main(argv)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose log has a line for every 50 steps, and its trace one for each."""
    workdir = tmp_path_factory.mktemp("trace") / "finished"
    result = cli.here("main", *ARGUMENTS, f"--workdir={workdir}", devices=1)
    assert result.returncode == 0, result.stderr
    return workdir


def checked(capsys, *argv):
    """Returns what the command prints, and its exit code."""
    code = 0
    try:
        check.main([str(argument) for argument in argv])
    except SystemExit as end:
        code = end.code
    return capsys.readouterr().out, code


def test_a_run_is_traced_and_its_resumption_too(finished, tmp_path, capsys):
    assert [line["step"] for line in read_trace(finished)] == list(range(1, 13))
    assert [line["step"] for line in cli.metrics(finished, "train")] == [12]
    # As a kill leaves it: a checkpoint of step 12 that isn't there, and lines of steps that no checkpoint has.
    run = tmp_path / "run"
    flags = (*ARGUMENTS, "--config.checkpoint.every_steps=5", f"--workdir={run}")
    assert cli.here("main", *flags, devices=1).returncode == 0
    for gone in (run / "checkpoints" / "12", run / "summary.json"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert "going on at step 10 of 12" in cli.here("main", *flags, devices=1).stdout
    assert read_trace(run) == read_trace(finished)
    assert checked(capsys, finished, run) == ("equal over 12 steps (same layout, compared to the bit)\n", 0)
    # Without the trace the training is the same.
    other = tmp_path / "other"
    flags = (*ARGUMENTS, "--config.log.trace=False", f"--workdir={other}")
    assert cli.here("main", *flags, devices=1).returncode == 0
    assert not (other / "trace.jsonl").exists()
    assert cli.digests(other) == cli.digests(finished)


def test_two_runs_that_differ(finished, tmp_path, capsys):
    run = tmp_path / "run"
    cli.here("main", *ARGUMENTS, "--config.optim.momentum=0.8", f"--workdir={run}", devices=1)
    text, code = checked(capsys, finished, run)
    assert code == 1
    assert re.match(r"step 1: the (params|opt_state)\.\S+ of the new state differs, hash ", text)


@pytest.mark.slow
def test_the_check_of_a_config(tmp_path, capsys, monkeypatch):
    for name, value in cli.environment().items():
        monkeypatch.setenv(name, value)
    text, code = checked(capsys, *ARGUMENTS, "--config.train.steps=2000", f"--out={tmp_path / 'out'}")
    assert code == 0, text
    lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    assert list(lines) == [
        "the same again",
        "on 2 devices",
        "on 4 devices",
        "killed and resumed",
        "in another working directory",
        "with data.num_workers=1",
    ]
    assert all(line.startswith("equal over 8 steps") for line in lines.values()), text
    assert "going on at step" in (tmp_path / "out" / "killed.log").read_text()
