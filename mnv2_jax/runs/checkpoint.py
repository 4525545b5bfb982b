"""Checkpoints: Orbax writes them in the background, a digest proves them, and `meta` records their scores.

A state is saved as a flat dict of host arrays, `params.stem.kernel: ...`, so it can be read back on any number of
devices, with or without the code that made it. Orbax does not notice a flipped bit in array data, but the SHA-256 of
each leaf does. `Checkpoints.restore` then warns and takes the checkpoint before.

Every process has the whole state, and only the first process writes it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from mnv2_jax.config import CheckpointConfig
from mnv2_jax.errors import UserError, machine_fault
from mnv2_jax.json_files import reading, writing
from mnv2_jax.runs.metrics_log import read_scores
from mnv2_jax.types import PyTree, Variables

Leaves = dict[str, np.ndarray]

_UNKNOWN = float("-inf")
"""Metric of a checkpoint that was not evaluated."""

_CHUNK = 2**24
"""Number of bytes read at a time."""
_OF_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, OSError, RecursionError)
"""Errors that Orbax, tensorstore, parsers and our digests raise if a file differs from what was written."""


class Restored(NamedTuple):
    """A checkpoint that was read and agrees with its digest."""

    step: int
    leaves: Leaves
    meta: dict[str, Any]


def to_leaves(tree: PyTree) -> Leaves:
    """Copies a pytree to the host as a flat dict, whose keys are paths joined by dots; waits for the device."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    # Copies: on a CPU the host array may be the device buffer itself, which the next step overwrites.
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.array(leaf) for path, leaf in paths}


def from_leaves(leaves: Leaves, like: PyTree) -> PyTree:
    """Inverts `to_leaves`: returns a pytree with the structure of ``like``.

    Raises:
      UserError: if names, shapes or types differ; it names the first leaf that differs.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    expected = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    if unmatched := sorted(expected.keys() ^ leaves.keys()):
        owner = "the config" if unmatched[0] in expected else "the checkpoint"
        raise UserError(f"the checkpoint's arrays don't fit this config: only {owner} has {unmatched[0]!r}")
    for name, leaf in expected.items():
        if (leaf.shape, leaf.dtype) != (leaves[name].shape, leaves[name].dtype):
            raise UserError(
                f"the checkpoint's arrays don't fit this config: {name!r} is"
                f" {leaves[name].dtype}{list(leaves[name].shape)} in the checkpoint, but"
                f" {leaf.dtype}{list(leaf.shape)} in the config's model"
            )
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in expected])


def digest(leaves: Leaves) -> dict[str, str]:
    """Returns the SHA-256 of each leaf's type, shape and bytes."""
    return {
        name: hashlib.sha256(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes()).hexdigest()
        for name, leaf in leaves.items()
    }


def fingerprint(state: PyTree) -> str:
    """Returns the SHA-256 of the `digest` of a state's leaves."""
    return _digest_of_json(digest(to_leaves(state)))


class _KeepLatestAndBest(policies.PreservationPolicy):
    """Keeps the latest and the best checkpoints, by metrics that we read ourselves.

    Orbax's `BestN` forgets every metric at a restart (0.12.8), and so deletes the best checkpoint.
    """

    def __init__(self, keep: CheckpointConfig, metrics: Mapping[int, float]):
        self._keep, self._metrics = keep, metrics

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        evaluated = [step for step in steps if self._metrics.get(step, _UNKNOWN) > _UNKNOWN]
        # Of equal metrics the first step is the best, as in the log.
        ranked = sorted(evaluated, key=lambda step: (self._metrics[step], -step))
        preserved = {*steps[-self._keep.keep_latest :], *ranked[len(ranked) - self._keep.keep_best :]}
        return [step in preserved for step in steps]


class Checkpoints:
    """The `checkpoints/` folder of a run. Use it as a context manager: leaving it waits until all is written."""

    def __init__(self, workdir: pathlib.Path, keep: CheckpointConfig | None = None):
        """Opens the folder, read-only without ``keep``. Only the first of several processes may open it to write."""
        self.folder = workdir.resolve() / "checkpoints"
        self._manager: ocp.CheckpointManager | None = None
        self._workdir = workdir
        if keep is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"{self.folder}: can't be made ({error.strerror}); fix that, or move away what is there"
                ) from error
            # Remove what a killed process had begun to write. Orbax would do so too, but in a thread that outlives an
            # early exit.
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_KeepLatestAndBest(keep, self._metrics),
                    save_decision_policy=policies.FixedIntervalPolicy(1),
                    # By default Orbax would make every process take part in its barriers, and use the folder.
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        primary_host=0, active_processes={0}, barrier_sync_key_prefix="process_0"
                    ),
                    create=False,
                ),
            )

    @functools.cached_property
    def _metrics(self) -> dict[int, float]:
        """Metric of each checkpoint, by step."""
        logged = read_scores(self._workdir)
        return {step: self._read_metric(step, logged.get(step)) for step in self.steps()}

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._manager is None:
            return
        if exception[0] is None:
            self.wait()
        with contextlib.suppress(Exception):  # `wait` has raised an error of writing, or another error is on its way
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, oldest first.

        Raises:
          UserError: if the folder can't be read.
        """
        with reading(self.folder):
            if not self.folder.is_dir():
                return []
            return sorted(int(p.name) for p in self.folder.iterdir() if p.is_dir() and p.name.isdigit())

    def save(self, step: int, state: PyTree, metric: float | None) -> None:
        """Copies the state and writes it in the background; first waits for the previous write.

        Does nothing if that step is already the newest checkpoint.

        Args:
          step: steps done.
          state: any pytree of arrays.
          metric: the value that ranks checkpoints (higher is better); None if the state wasn't evaluated.

        Raises:
          UserError: if the previous checkpoint could not be written.
        """
        assert self._manager is not None
        if self._manager.latest_step() == step:
            return
        leaves = to_leaves(state)
        meta = {"step": step, "metric": metric}
        self._metrics[step] = _UNKNOWN if metric is None else metric
        with self._errors_of_writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(leaves),
                    digest=ocp.args.JsonSave({"state": digest(leaves), "meta": _digest_of_json(meta)}),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          UserError: if a checkpoint could not be written.
        """
        assert self._manager is not None
        with self._errors_of_writing():
            self._manager.wait_until_finished()

    def note_metric(self, step: int, metric: float) -> None:
        """Sets the metric of a checkpoint that was saved before its evaluation. Only the log keeps it on disk."""
        self._metrics[step] = metric

    @contextlib.contextmanager
    def _errors_of_writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk raises OSError, or tensorstore's ValueError, whose text ends with it
            reason = " ".join(str(error).split())[-160:].rpartition(": ")[2] or type(error).__name__
            raise UserError(
                f"{self.folder}: a checkpoint can't be written ({reason}); the older checkpoints are intact; make"
                " room and start again"
            ) from error

    def restore(self, checkpoint: Literal["latest", "best"] = "latest") -> Restored | None:
        """Reads the newest or the best checkpoint; returns None if there is no checkpoint yet.

        If a checkpoint is damaged, this warns on stderr and reads the next in rank. Once it has read one, it moves the
        damaged ones to `checkpoints.damaged/`, if the folder was opened to write.

        Raises:
          UserError: if there are checkpoints and all are damaged, or if the machine doesn't let one be read. Nothing is
            moved then.
        """
        damaged: list[int] = []
        for step in self._ranked(checkpoint):
            folder = self.folder / str(step)
            try:
                restored = self._read(step)
            except Exception as error:
                if (fault := _fault(error, folder)) is not None:
                    raise UserError(f"{folder}: can't be read ({fault}); fix that and start again") from error
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                print(f"warning: checkpoint {step} is damaged ({reason}); trying another checkpoint", file=sys.stderr)
                damaged.append(step)
            else:
                for bad in damaged if self._manager is not None else []:
                    self._put_aside(bad)
                return restored
        if damaged:
            raise UserError(
                f"{self.folder}: all {len(damaged)} checkpoints are damaged; restore one from a backup, or start a new"
                " run with another --workdir"
            )
        return None

    def step_of(self, checkpoint: Literal["latest", "best"]) -> int | None:
        """Returns the step of the checkpoint that `restore` reads if it isn't damaged; None if there is none."""
        return next(iter(self._ranked(checkpoint)), None)

    def _ranked(self, checkpoint: Literal["latest", "best"]) -> list[int]:
        if checkpoint == "latest":
            return self.steps()[::-1]
        return sorted(self.steps(), key=lambda step: self._metrics.get(step, _UNKNOWN), reverse=True)

    def _read_metric(self, step: int, logged: float | None) -> float:
        """Reads a checkpoint's metric from its `meta`, or takes the log's if it was evaluated after it was saved."""
        try:
            with reading(self.folder / str(step)):
                metric = _read_json(self.folder / str(step) / "meta")["metric"]
            metric = logged if metric is None else metric
            return _UNKNOWN if metric is None else float(metric)
        except _OF_DAMAGE:
            return _UNKNOWN  # `restore` will find the damage and report it

    def _read(self, step: int) -> Restored:
        folder = self.folder / str(step)
        reader = ocp.PyTreeCheckpointHandler()
        names = reader.metadata(folder / "state").tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        leaves = dict(reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy)))
        proof, meta = _read_json(folder / "digest"), _read_json(folder / "meta")
        expected, actual = proof["state"], digest(leaves)
        if actual != expected:
            wrong = sorted(n for n in actual.keys() | expected.keys() if actual.get(n) != expected.get(n))
            raise ValueError(f"{len(wrong)} arrays differ from their digest, the first: {wrong[0]}")
        if _digest_of_json(meta) != proof["meta"] or meta["step"] != step:
            raise ValueError("meta differs from its digest")
        return Restored(step, leaves, meta)

    def _put_aside(self, step: int) -> None:
        aside = self.folder.with_name("checkpoints.damaged")
        with writing(aside):
            aside.mkdir(exist_ok=True)
            target = aside / str(step)
            if target.exists():
                shutil.rmtree(target)
            (self.folder / str(step)).rename(target)
        assert self._manager is not None
        self._manager.reload()


def restore_variables(workdir: pathlib.Path, checkpoint: Literal["latest", "best"] = "latest") -> tuple[int, Variables]:
    """Reads the variables that a run evaluates with (its moving average, if it has one), as NumPy arrays.

    Raises:
      UserError: if the run has no checkpoint.
    """
    with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(checkpoint)
    if restored is None:
        raise UserError(f"{workdir}: the run has no checkpoint yet; train it first, or give another run folder")
    nested: dict[str, Any] = {}
    for name, leaf in restored.leaves.items():
        *keys, last = name.split(".")
        node = nested
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = leaf
    return restored.step, nested.get("ema") or {"params": nested["params"], **nested.get("model_state", {})}


def _fault(error: Exception, folder: pathlib.Path) -> str | None:
    """Returns the reason outside a checkpoint's files why it couldn't be read; None if the checkpoint is damaged."""
    try:
        jax.devices()
    except Exception as jax_error:  # an assertion without text, if the platform's plugin isn't installed
        reason = " ".join(str(jax_error).split())[:160] or "this machine has no such devices"
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}"
    if (fault := machine_fault(error)) is not None:
        return fault
    if not isinstance(error, _OF_DAMAGE):
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    try:
        # tensorstore treats an unreadable file as empty, and Orbax treats an unreadable folder as missing.
        for path, _, names in os.walk(folder, onerror=_raise):
            for name in names:
                with open(os.path.join(path, name), "rb") as file:
                    while file.read(_CHUNK):
                        pass
    except (OSError, MemoryError) as file_error:
        return machine_fault(file_error)
    return None


def _raise(error: OSError) -> None:
    raise error


def _digest_of_json(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _read_json(folder: pathlib.Path) -> dict[str, Any]:
    """Reads a file that `JsonSave` wrote."""
    tree = json.loads((folder / "metadata").read_text())
    if not isinstance(tree, dict):
        raise ValueError(f"{folder.name} is not a JSON object")
    return tree
