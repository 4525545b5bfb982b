"""A checkpoint is exactly what was saved, or it is refused."""

import errno
import itertools
import logging
import os
import pathlib
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mnv2_jax.config import CheckpointConfig
from mnv2_jax.errors import UserError
from mnv2_jax.runs.checkpoint import Checkpoints, digest, from_leaves, restore_variables, to_leaves

# Orbax leaves reads of damaged files behind, which then find its event loop closed; pytest blames a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # which reports them too, at the end; as runtime.configure

KEEP = CheckpointConfig(keep_latest=2, keep_best=1)


def state(seed):
    rng = np.random.default_rng(seed)
    return {
        "step": jnp.int32(seed),
        "params": {"stem": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 8)), jnp.float32)}},
        "model_state": {"batch_stats": {"mean": jnp.asarray(rng.normal(size=8), jnp.bfloat16)}},
        "opt_state": ({}, (jnp.asarray(rng.normal(size=8), jnp.float32),)),
        "ema": None,
    }


def same(a, b):
    return digest(to_leaves(a)) == digest(to_leaves(b))


def save(checkpoints, steps_and_metrics):
    for step, metric in steps_and_metrics:
        checkpoints.save(step, state(step), metric)
        checkpoints.wait()


def test_round_trip_in_structure_type_and_bits(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.restore() is None
        save(checkpoints, [(3, 0.5)])
        restored = checkpoints.restore()
    assert (restored.step, restored.meta["metric"]) == (3, 0.5)
    assert same(from_leaves(restored.leaves, jax.eval_shape(lambda: state(0))), state(3))


def test_leaves_are_copies():
    leaf = jnp.arange(4.0)
    leaves = to_leaves({"x": leaf})
    jax.jit(lambda x: x + 1, donate_argnums=0)(leaf).block_until_ready()
    np.testing.assert_array_equal(leaves["x"], [0, 1, 2, 3])


def test_newest_survives_a_metric_that_only_falls_and_the_best_is_kept(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        save(checkpoints, [(1, 0.9), (2, 0.9), (3, None), (4, 0.7), (5, 0.6)])  # the first of equal metrics
        assert checkpoints.steps() == [1, 4, 5]
        assert checkpoints.restore().step == 5
        assert checkpoints.restore("best").step == 1
    with Checkpoints(tmp_path / "none", CheckpointConfig(keep_latest=1, keep_best=0)) as checkpoints:
        save(checkpoints, [(1, 0.9), (2, 0.8)])
        assert checkpoints.steps() == [2]


def test_the_best_is_remembered_over_a_restart(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        save(checkpoints, [(1, 0.9), (2, 0.8)])
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        save(checkpoints, [(3, 0.7), (4, 0.6), (5, None)])
        assert checkpoints.steps() == [1, 4, 5]
        assert checkpoints.restore("best").step == 1
        save(checkpoints, [(6, 0.95)])
        assert checkpoints.steps() == [5, 6]
        assert checkpoints.restore("best").step == 6


def test_a_metric_that_came_after_the_save_is_read_from_the_log(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        save(checkpoints, [(1, 0.5), (2, None)])
        checkpoints.note_metric(2, 0.9)
        assert checkpoints.restore("best").step == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "split": "eval", "top1": 0.9}\n')
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.restore("best").step == 2
        save(checkpoints, [(3, 0.1), (4, 0.2), (5, 0.3)])
        assert checkpoints.steps() == [2, 4, 5]


def test_saving_a_step_twice_changes_nothing(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        save(checkpoints, [(1, 0.5)])
        checkpoints.save(1, state(9), None)
        checkpoints.wait()
        assert same(from_leaves(checkpoints.restore().leaves, state(0)), state(1))


def files(folder: pathlib.Path):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def contents(folder: pathlib.Path):
    return {p.relative_to(folder): p.read_bytes() for p in files(folder)}


# --- corruptions: what may happen to the checkpoint ``bad``, which has ``good`` before it ------------------------


def any_file(rng, folder):
    """Draws a file; either all files or all bytes are equally likely."""
    sizes = {path: path.stat().st_size for path in files(folder)}
    return rng.choices(list(sizes), rng.choice((None, list(sizes.values()))))[0]


def some_bytes(rng, content):
    begin = rng.randrange(len(content))
    return slice(begin, begin + rng.choice((1, 16, 512)))


def flip_a_bit(rng, bad, good):
    path = any_file(rng, bad)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(rng, bad, good):
    path = any_file(rng, bad)
    path.write_bytes(path.read_bytes()[: rng.choice((0, rng.randrange(path.stat().st_size)))])


def zero_a_block(rng, bad, good):
    path = any_file(rng, bad)
    content = bytearray(path.read_bytes())
    block = some_bytes(rng, content)
    content[block] = bytes(len(content[block]))
    path.write_bytes(content)


def fill_a_block(rng, bad, good):
    path = any_file(rng, bad)
    content = bytearray(path.read_bytes())
    block = some_bytes(rng, content)
    content[block] = rng.randbytes(len(content[block]))
    path.write_bytes(content)


def append_bytes(rng, bad, good):
    path = any_file(rng, bad)
    path.write_bytes(path.read_bytes() + rng.choice((bytes, rng.randbytes))(rng.choice((1, 64, 4096))))


def delete_a_file(rng, bad, good):
    any_file(rng, bad).unlink()


def delete_a_folder(rng, bad, good):
    shutil.rmtree(rng.choice(sorted(p for p in bad.rglob("*") if p.is_dir())))


def exchange_two_files(rng, bad, good):
    one, other = rng.sample(files(bad), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def take_a_file_of_the_one_before(rng, bad, good):
    path = any_file(rng, bad)
    path.write_bytes(rng.choice(files(good / path.parent.relative_to(bad))).read_bytes())


def take_a_folder_of_the_one_before(rng, bad, good):
    path = rng.choice([bad, *sorted(p for p in bad.rglob("*") if p.is_dir())])
    shutil.rmtree(path)
    shutil.copytree(good / path.relative_to(bad), path)


CORRUPTIONS = (
    flip_a_bit,
    truncate,
    zero_a_block,
    fill_a_block,
    append_bytes,
    delete_a_file,
    delete_a_folder,
    exchange_two_files,
    take_a_file_of_the_one_before,
    take_a_folder_of_the_one_before,
)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder, KEEP) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, stored(step), step / 4)
    return folder


def stored(seed):
    """Makes a state with a large array besides the small ones, which Orbax stores in the nodes of its tree."""
    kernel = np.random.default_rng(seed).normal(size=(3, 3, 16, 64)).astype(np.float32)
    return {**state(seed), "params": {"large": kernel, **state(seed)["params"]}}


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_twenty_corruptions_of_a_kind_never_a_wrong_restore(two_checkpoints, tmp_path, capsys, corrupt):
    restored_counts = {1: 0, 2: 0}
    for seed in range(20):
        run = shutil.copytree(two_checkpoints, tmp_path / str(seed))
        folder, rng = run / "checkpoints", random.Random(seed)
        corrupt(rng, folder / "2", folder / "1")
        before = contents(run)
        with Checkpoints(run) as checkpoints:
            restored = checkpoints.restore()
        # Not every byte matters (time stamps don't); a checkpoint that is read is right in any case.
        assert same(from_leaves(restored.leaves, stored(0)), stored(restored.step)), seed
        assert restored.meta == {"step": restored.step, "metric": restored.step / 4}, seed
        assert ("warning: checkpoint 2 is damaged" in capsys.readouterr().err) == (restored.step == 1), seed
        assert contents(run) == before, seed
        restored_counts[restored.step] += 1
        if seed % 10 == 0:
            goes_on(run, restored.step)
            capsys.readouterr()
    assert restored_counts[1] >= 2  # some of the changes did damage


def goes_on(run, step):
    """A damaged checkpoint is moved aside, and its number can be used again; the checkpoint before stays unchanged."""
    folder, aside = run / "checkpoints", run / "checkpoints.damaged"
    good, bad = contents(folder / "1"), contents(folder / "2")
    with Checkpoints(run, KEEP) as checkpoints:
        assert checkpoints.restore().step == step
        assert contents(folder / "1") == good
        assert (contents(aside / "2") == bad) if step == 1 else not aside.exists()
        save(checkpoints, [(2, 0.5)])
        assert checkpoints.restore().step == 2
        assert contents(folder / "1") == good


# --- what is no damage ------------------------------------------------------------------------------------------


def largest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


def in_its_place(path, target):
    path.unlink()
    path.symlink_to(target)


UNREADABLE = [
    # Reads of /proc/self/mem at 0 fail as those of a bad block do; its size is 0, which tensorstore takes for the end.
    (lambda bad: in_its_place(largest(bad), "/proc/self/mem"), errno.EIO),
    (lambda bad: in_its_place(bad / "digest" / "metadata", "/proc/self/mem"), errno.EIO),
    (lambda bad: in_its_place(bad / "state" / "_METADATA", "_METADATA"), errno.ELOOP),
]


def of_system(number, *path):
    return OSError(number, os.strerror(number), *path)


def wrapped(error):
    """Wraps an error in another that is raised while it is handled, and that in a third."""
    inner, outer = KeyError("state"), ValueError("Error reading the checkpoint")
    inner.__context__, outer.__cause__ = error, inner
    return outer


DATABASE = 'FAILED_PRECONDITION: Error reading "w" in OCDBT database at local file "/run/state/": '
RAISED = [
    (of_system(errno.EACCES, "x"), errno.EACCES),
    (of_system(errno.ETIMEDOUT), errno.ETIMEDOUT),
    (of_system(errno.EMFILE), errno.EMFILE),
    (wrapped(of_system(errno.ESTALE)), errno.ESTALE),
    (ValueError(f'{DATABASE}Failed to open: "/run/state/d/1": {os.strerror(errno.ENOTCONN)}'), errno.ENOTCONN),
    (ValueError("UNAVAILABLE: try again"), "UNAVAILABLE"),
    (MemoryError(), "memory"),
    (RuntimeError("no such backend"), "RuntimeError: no such backend"),
]


def assert_no_damage(run, cause, capsys):
    """Asserts that neither the latest nor the best counts as damaged, reading or writing, and that nothing is moved."""
    before = sorted(run.rglob("*"))
    cause = re.escape(cause if isinstance(cause, str) else os.strerror(cause))
    for keep, checkpoint in itertools.product((None, KEEP), ("latest", "best")):
        with (
            Checkpoints(run, keep) as checkpoints,
            pytest.raises(UserError, match=f"checkpoints/2: .*{cause}") as error,
        ):
            checkpoints.restore(checkpoint)
        assert "damaged" not in str(error.value) + capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(("harm", "cause"), UNREADABLE)
def test_a_file_that_cannot_be_read_is_no_damage(two_checkpoints, tmp_path, capsys, harm, cause):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    harm(run / "checkpoints" / "2")
    assert_no_damage(run, cause, capsys)


@pytest.mark.parametrize(("error", "cause"), RAISED)
def test_an_error_of_the_machine_is_no_damage(two_checkpoints, monkeypatch, capsys, error, cause):
    def restore(*args, **kwargs):
        raise error

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    assert_no_damage(two_checkpoints, cause, capsys)


def test_devices_that_are_not_there_are_named(two_checkpoints, monkeypatch, capsys):
    def none(*args, **kwargs):
        raise AssertionError  # as JAX does if the platform's plugin isn't installed

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", none)
    monkeypatch.setattr(jax, "devices", none)
    assert_no_damage(two_checkpoints, "JAX_PLATFORMS=cpu", capsys)


def test_how_good_a_checkpoint_is_must_be_readable_where_it_matters(two_checkpoints, tmp_path):
    """Otherwise another checkpoint would be the best, and this one would be deleted."""
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    in_its_place(run / "checkpoints" / "1" / "meta" / "metadata", "/proc/self/mem")
    assert Checkpoints(run).restore().step == 2
    with pytest.raises(UserError, match=os.strerror(errno.EIO)):
        Checkpoints(run).restore("best")
    with pytest.raises(UserError, match=os.strerror(errno.EIO)):
        Checkpoints(run, KEEP)


def test_all_damaged_is_an_error_and_nothing_is_lost(tmp_path, capsys):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        save(checkpoints, [(1, None)])
    arrays = max(files(tmp_path / "checkpoints" / "1" / "state"), key=lambda p: p.stat().st_size)
    arrays.write_bytes(b"")
    for _ in range(2):  # a second try doesn't begin anew
        with Checkpoints(tmp_path, KEEP) as checkpoints, pytest.raises(UserError, match="all 1 checkpoints"):
            checkpoints.restore()
    assert files(tmp_path / "checkpoints" / "1")
    assert "damaged" in capsys.readouterr().err


def test_another_models_checkpoint_is_refused_by_name():
    leaves = to_leaves(state(0))
    with pytest.raises(UserError, match=r"'params\.stem\.kernel'.*\[3, 3, 3, 8\].*\[3, 3, 3, 16\]"):
        from_leaves(leaves, {**state(0), "params": {"stem": {"kernel": jnp.zeros((3, 3, 3, 16))}}})
    with pytest.raises(UserError, match=r"'params\.head\.kernel'"):
        from_leaves(leaves, {**state(0), "params": {**state(0)["params"], "head": {"kernel": jnp.zeros(2)}}})


def test_variables_for_evaluation_are_the_moving_average_where_there_is_one(tmp_path):
    plain, averaged = state(1), {**state(2), "ema": {"params": {"w": jnp.ones(2)}, "batch_stats": {"m": jnp.ones(1)}}}
    for name, tree in (("plain", plain), ("averaged", averaged)):
        with Checkpoints(tmp_path / name, KEEP) as checkpoints:
            checkpoints.save(4, tree, None)
    step, variables = restore_variables(tmp_path / "plain")
    assert step == 4
    assert same(variables, {"params": plain["params"], **plain["model_state"]})
    _, variables = restore_variables(tmp_path / "averaged")
    assert same(variables, averaged["ema"])
    with pytest.raises(UserError, match=r"nowhere: .* no checkpoint"):
        restore_variables(tmp_path / "nowhere")
