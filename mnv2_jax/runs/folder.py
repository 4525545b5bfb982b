"""The run folder on disk: its lock, and the records that say which run it is.

config.json      the config as it was when the run began, but for its length
dataset.json     what was found in the data: classes, counts, digests
provenance.json  code, versions, devices, settings and command, per session
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mnv2_jax.config import Config, build, differences, to_dict
from mnv2_jax.errors import FaultError, UserError
from mnv2_jax.json_files import jsonable, read_json, reading, write_json, writing
from mnv2_jax.processes.settings import changes
from mnv2_jax.runs.provenance import provenance

LOCK, CONFIG, DATASET, PROVENANCE = ".lock", "config.json", "dataset.json", "provenance.json"
SUMMARY, EVALUATION, SKIPPED = "summary.json", "evaluation.json", "skipped.txt"

_STEPS, _TEACHER, _DIGEST, _SETTINGS = "steps", "teacher", "digest", "settings"
_DATASET_MAY_DIFFER = ("name", _STEPS, _TEACHER, _DIGEST)
"""`data.name` and what makes the steps are compared as part of the config, the others by themselves."""
_LENGTH = ("train.epochs:", "train.steps:")


# --- lock --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(workdir: pathlib.Path, patience_s: float = 0.0) -> Iterator[None]:
    """Makes the folder if need be and holds it against every other process; the kernel lets go when we die.

    Args:
      workdir: the folder.
      patience_s: how long to wait for a process that holds it.

    Raises:
      UserError: if another process holds it (named by its id), or no folder can be made and locked there.
      FaultError: if it still does after some patience.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Opened without truncation: the file still says who holds it. It is never deleted either, since a
        # process could then lock the deleted file while another locks a new one of the same name.
        descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: no run folder can be made there ({error.strerror}); give another"
        ) from error
    try:
        deadline = time.monotonic() + patience_s
        while not _try_to_lock(descriptor, workdir):
            if time.monotonic() < deadline:
                time.sleep(1)
                continue
            # Empty in the instant between its lock and its writing.
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            if patience_s:
                raise FaultError(
                    f"--workdir={workdir}: process {holder} has held it for {patience_s:g} s; stop it, or, if its"
                    f" machine is gone (NFSv3 keeps a lock for ever), delete {workdir / LOCK}"
                )
            raise UserError(
                f"--workdir={workdir}: process {holder} is training there; wait for it, stop it,"
                " or give another --workdir"
            )
        with writing(workdir / LOCK):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int, workdir: pathlib.Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: its file system can't lock files ({error.strerror}); give a folder on another, or"
            " mount it with locks (Lustre: -o flock)"
        ) from error
    return True


# --- records ------------------------------------------------------------------------------


def prepare(
    workdir: pathlib.Path,
    config: Config,
    dataset: Mapping[str, Any],
    devices: Mapping[str, Any],
    why_not: Callable[[Config], str | None] = lambda old: "give another --workdir",
) -> bool:
    """Begins a run in a new folder, or makes sure that an old one is of the same run; notes who, what and when.

    Call it under `lock`. config.json is written last: a folder that has it has the other two.

    Args:
      workdir: a folder that exists.
      config: of this session. An old config.json is kept as it was first written, but for its length.
      dataset: what the data turned out to be: name, class_names, num_train, num_eval, eval_split, steps, digest.
      devices: platform, kind and count, for the provenance.
      why_not: says of an old config that differs by its length alone why its run can't go on as this one, and what can
        be done; None if it can.

    Returns:
      Whether the folder held the run already.

    Raises:
      UserError: if the folder is not a run folder, or is of a run with another config, other data, or settings of JAX
        by which it would draw other random numbers.
    """
    dataset = jsonable(dataset)
    session = jsonable(provenance(devices))
    resumed = (workdir / CONFIG).exists()
    sessions: list[Any] = []
    if resumed:
        sessions, old = _sessions(workdir), read_json(workdir / DATASET)
        changed = _check_same_run(workdir, config, old, dataset, why_not)
        before, now = (_mapping(facts.get(_DIGEST)) for facts in (old, dataset))
        says = {
            "its images": _check_images(workdir, before, now),
            "its settings of JAX": _check_settings(workdir, sessions, session),
        }
        if unsaid := [what for what, is_said in says.items() if not is_said]:
            print(
                f"note: {workdir} doesn't say what {' and '.join(unsaid)} were, so these aren't compared; it does from"
                " now on",
                file=sys.stderr,
            )
            old |= {_DIGEST: before | now}
            write_json(workdir / DATASET, old)
        if changed:
            print(f"note: {workdir} goes on to another length: {', '.join(changed)}", file=sys.stderr)
        _set_length(workdir, config, old, dataset)
    else:
        _check_unused(workdir)
        write_json(workdir / DATASET, dataset)
    write_json(workdir / PROVENANCE, {"sessions": [*sessions, session]})
    if not resumed:
        write_json(workdir / CONFIG, to_dict(config))
    return resumed


def _set_length(workdir: pathlib.Path, config: Config, old: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    """Writes down how long the run is now; killed in between, the next session does it again."""
    was, _ = read_run(workdir)
    if old.get(_STEPS) != dataset.get(_STEPS):
        (workdir / SUMMARY).unlink(missing_ok=True)  # the run isn't finished any more
    if was.train != config.train:
        write_json(workdir / CONFIG, to_dict(dataclasses.replace(was, train=config.train)))
    if old.get(_STEPS) != dataset.get(_STEPS):
        write_json(workdir / DATASET, {**old, _STEPS: dataset.get(_STEPS)})


def note_memory(workdir: pathlib.Path, memory: Mapping[str, int]) -> None:
    """Adds what the session has needed to its entry of the provenance, the last; call it under `lock`.

    Raises:
      UserError: if the file can't be read or written.
    """
    sessions = _sessions(workdir)
    if sessions:  # none, where somebody has removed the file meanwhile
        write_json(workdir / PROVENANCE, {"sessions": [*sessions[:-1], {**sessions[-1], "memory": memory}]})


def read_run(workdir: pathlib.Path) -> tuple[Config, list[str]]:
    """The config of a run and the names of its classes.

    Raises:
      UserError: if there is no run, or its files don't hold what they should.
    """
    with reading(workdir):
        if not (workdir / CONFIG).is_file():
            raise UserError(f"{workdir}: no run is there (no {CONFIG}); give the folder of a trained run")
    try:
        config = build(read_json(workdir / CONFIG))
    except UserError as error:
        raise UserError(f"{workdir}: its {CONFIG} can't be used: {error}") from error
    names = read_json(workdir / DATASET).get("class_names")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UserError(f"{workdir / DATASET}: class_names is not a list of names; restore the file")
    return config, names


def refuse_foreign(workdir: pathlib.Path) -> None:
    """Refuses a folder that holds something else than a run, before anything is written to it.

    Raises:
      UserError: naming what it holds.
    """
    with reading(workdir):
        if workdir.is_dir() and not (workdir / CONFIG).exists():
            _check_unused(workdir)


def _check_unused(workdir: pathlib.Path) -> None:
    """Allows what `lock` and a `prepare` that was killed may have left, and nothing else."""
    ours = (LOCK, DATASET, PROVENANCE)
    names = sorted(entry.name for entry in workdir.iterdir())
    foreign = [name for name in names if name not in ours and not (name.startswith(".") and name.endswith(".tmp"))]
    if foreign:
        raise UserError(
            f"--workdir={workdir}: it holds {foreign[0]!r} but no {CONFIG}, so it is not a run folder;"
            " give a new or an empty one"
        )


def _sessions(workdir: pathlib.Path) -> list[Any]:
    if not (workdir / PROVENANCE).exists():
        return []
    sessions = read_json(workdir / PROVENANCE).get("sessions")
    if not isinstance(sessions, list):
        raise UserError(f"{workdir / PROVENANCE}: sessions is not a list; restore the file, or remove it")
    return sessions


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _check_images(workdir: pathlib.Path, old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Compares what is known of the images with what was at the start; says whether it could."""
    both = sorted(old.keys() & new.keys())
    for key in both:
        if old[key] != new[key]:
            split, _, kind = key.partition(".")
            raise UserError(
                f"--workdir={workdir} is of a run on other data: the {kind} of {split} are others (SHA-256"
                f" {str(old[key])[:8]}… -> {new[key][:8]}…); restore the data or give another --workdir"
            )
    return bool(both)


def _check_settings(workdir: pathlib.Path, sessions: list[Any], session: Mapping[str, Any]) -> bool:
    """Compares the settings with those of the last session; says whether it could."""
    before = _mapping(_mapping(sessions[-1] if sessions else None).get(_SETTINGS))
    draws, rounding = changes(before, session[_SETTINGS])
    if draws:
        raise UserError(
            f"--workdir={workdir} is of a run that draws other random numbers: {', '.join(draws)}; set that as it was,"
            " or give another --workdir"
        )
    if rounding:
        print(
            f"warning: {workdir} goes on with other settings, by which numbers may be rounded otherwise:"
            f" {', '.join(rounding)}",
            file=sys.stderr,
        )
    return bool(before)


def _check_same_run(
    workdir: pathlib.Path,
    config: Config,
    old: Mapping[str, Any],
    dataset: Mapping[str, Any],
    why_not: Callable[[Config], str | None],
) -> list[str]:
    """Gives what differs and may: the length."""
    old_config, _ = read_run(workdir)
    changed = differences(old_config, config)
    if changed and all(change.startswith(_LENGTH) for change in changed):
        if (reason := why_not(old_config)) is not None:
            raise UserError(f"--workdir={workdir} is of a run of another length: {', '.join(changed)}; {reason}")
    elif changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"--workdir={workdir} is of a run with another config: {', '.join(changed[:3])}{more};"
            " restore the value or give another --workdir"
        )
    for key in sorted({*old, *dataset} - {*_DATASET_MAY_DIFFER}):
        if old.get(key) != dataset.get(key):
            raise UserError(
                f"--workdir={workdir} is of a run on other data: {_difference(key, old.get(key), dataset.get(key))};"
                " restore the data or give another --workdir"
            )
    if old.get(_TEACHER) != dataset.get(_TEACHER):
        distill = config.distill
        what = f"distill.logits={distill.logits!r}" if distill.logits else f"distill.teacher={distill.teacher!r}"
        before, now = (str(facts.get(_TEACHER))[:8] for facts in (old, dataset))
        raise UserError(
            f"--workdir={workdir} is of a run with another teacher: {what} has changed since (SHA-256 {before}… ->"
            f" {now}…); restore it or give another --workdir"
        )
    return changed


def _difference(key: str, old: Any, new: Any) -> str:
    """``key: old -> new`` on one short line, even for a thousand class names."""
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{key}: {len(old)} -> {len(new)}"
        place = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return f"{key}[{place}]: {old[place]!r} -> {new[place]!r}"
    return f"{key}: {old!r} -> {new!r}"


# --- skipped images -----------------------------------------------------------------------------------------


def read_skipped(workdir: pathlib.Path) -> list[str]:
    """The images that a run has skipped, a line each, as they were met; a line that was cut off counts for nothing."""
    path = workdir / SKIPPED
    return path.read_bytes().decode(errors="replace").split("\n")[:-1] if path.exists() else []
