"""The run folder on disk: its lock, and the records that identify the run.

config.json      the config with which the run began; only its length may be changed later
dataset.json     facts about the data: classes, counts, digests
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

HELD = "is training there"
"""Words of the error of `lock` by which a study knows it."""
_STEPS, _TEACHER, _DIGEST, _SETTINGS = "steps", "teacher", "digest", "settings"
_DATASET_MAY_DIFFER = ("name", _STEPS, _TEACHER, _DIGEST)
"""Keys of dataset.json that `_check_same_run` doesn't compare with the rest.

`data.name` and the options that decide the steps are compared as part of the config; teacher and digest have checks of
their own.
"""
_LENGTH = ("train.epochs:", "train.steps:")


# --- lock --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(workdir: pathlib.Path, patience_s: float = 0.0) -> Iterator[None]:
    """Makes the folder if it doesn't exist, and locks it against other processes; the kernel unlocks it if we die.

    Args:
      workdir: the run folder.
      patience_s: seconds to wait for another process that holds the lock.

    Raises:
      UserError: if another process holds the lock (it names its id), or if no folder can be made and locked there.
      FaultError: if another process still holds the lock after ``patience_s`` above 0.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Opened without truncation, because the file names the process that holds the lock. The file is never deleted:
        # a process could then lock the deleted file while another locks a new file of the same name.
        descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: no run folder can be made there ({error.strerror}); give another --workdir"
        ) from error
    try:
        deadline = time.monotonic() + patience_s
        while not _try_to_lock(descriptor, workdir):
            if time.monotonic() < deadline:
                time.sleep(1)
                continue
            # The file is empty in the instant after the other process has locked it and before it has written its id.
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            if patience_s:
                raise FaultError(
                    f"--workdir={workdir}: process {holder} has held the folder for {patience_s:g} s; stop that"
                    f" process, or, if its machine is gone (NFSv3 keeps a lock forever), delete {workdir / LOCK}"
                )
            raise UserError(
                f"--workdir={workdir}: process {holder} {HELD}; wait for it, stop it, or give another --workdir"
            )
        with writing(workdir / LOCK):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def is_locked(workdir: pathlib.Path) -> bool:
    """Whether another process holds the folder.

    Where a process was killed, this holds the lock for an instant, in which a process that wants it is refused.
    """
    try:
        descriptor = os.open(workdir / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{workdir}: its lock can't be read ({error.strerror}); restore its permissions") from error
    try:
        return bool(os.pread(descriptor, 1, 0)) and not _try_to_lock(descriptor, workdir)
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int, workdir: pathlib.Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: its file system can't lock files ({error.strerror}); give a folder on another file"
            " system, or mount this one with locks (Lustre: -o flock)"
        ) from error
    return True


# --- records ------------------------------------------------------------------------------


def begin_session(
    workdir: pathlib.Path,
    config: Config,
    dataset: Mapping[str, Any],
    devices: Mapping[str, Any],
    why_not: Callable[[Config], str | None] = lambda old: "give another --workdir",
) -> bool:
    """Begins a session of a run: writes the records of a new folder, or checks that an old folder holds the same run.

    Either way it adds the session to the provenance. Call it under `lock`. config.json is written last, so a folder
    that has it has the other two files as well.

    Args:
      workdir: a folder that exists.
      config: the config of this session. In an old config.json only the length is changed.
      dataset: facts about the data: name, class_names, num_train, num_eval, eval_split, steps, digest.
      devices: platform, kind and count, for the provenance.
      why_not: called with an old config that differs in its length only. It says why the run can't be resumed with this
        session's length and what the user can do, or returns None if it can.

    Returns:
      Whether the folder already held the run.

    Raises:
      UserError: if the folder is not a run folder, or if its run has another config, other data, or settings of JAX
        that draw other random numbers.
    """
    dataset = jsonable(dataset)
    session = jsonable(provenance(devices))
    resumed = (workdir / CONFIG).exists()
    sessions: list[Any] = []
    if resumed:
        sessions, old = _sessions(workdir), read_json(workdir / DATASET)
        changed = _check_same_run(workdir, config, old, dataset, why_not)
        before, now = (_mapping(facts.get(_DIGEST)) for facts in (old, dataset))
        compared = {
            "its images": _check_images(workdir, before, now),
            "its settings of JAX": _check_settings(workdir, sessions, session),
        }
        if missing := [name for name, was_compared in compared.items() if not was_compared]:
            print(
                f"note: {workdir} has no record of {' and '.join(missing)}, so these can't be compared; it is recorded"
                " from now on",
                file=sys.stderr,
            )
            old |= {_DIGEST: before | now}
            write_json(workdir / DATASET, old)
        if changed:
            print(f"note: {workdir} is resumed with another length: {', '.join(changed)}", file=sys.stderr)
        _set_length(workdir, config, old, dataset)
    else:
        _check_unused(workdir)
        write_json(workdir / DATASET, dataset)
    write_json(workdir / PROVENANCE, {"sessions": [*sessions, session]})
    if not resumed:
        write_json(workdir / CONFIG, to_dict(config))
    return resumed


def _set_length(workdir: pathlib.Path, config: Config, old: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    """Writes the new length to the records. If a kill interrupts it, the next session repeats it."""
    old_config, _ = read_run(workdir)
    if old.get(_STEPS) != dataset.get(_STEPS):
        (workdir / SUMMARY).unlink(missing_ok=True)  # the run isn't finished any more
    if old_config.train != config.train:
        write_json(workdir / CONFIG, to_dict(dataclasses.replace(old_config, train=config.train)))
    if old.get(_STEPS) != dataset.get(_STEPS):
        write_json(workdir / DATASET, {**old, _STEPS: dataset.get(_STEPS)})


def note_memory(workdir: pathlib.Path, memory: Mapping[str, int]) -> None:
    """Adds the memory that the session has used to its entry of the provenance, the last; call it under `lock`.

    Raises:
      UserError: if the file can't be read or written.
    """
    sessions = _sessions(workdir)
    if sessions:  # empty if somebody has removed the file in the meantime
        write_json(workdir / PROVENANCE, {"sessions": [*sessions[:-1], {**sessions[-1], "memory": memory}]})


def origin(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the commit and the devices of the run's last session; the provenance has those of all sessions.

    The commit ends with ``-dirty`` where files of the checkout were changed, as in ``git describe``, and is None where
    the code belonged to no checkout.
    """
    session = _mapping(next(reversed(_sessions(workdir)), None))  # none if somebody has removed the file
    git = _mapping(session.get("git"))
    commit = git.get("commit") and f"{git['commit']}{'-dirty' if git.get('dirty') else ''}"
    return {"commit": commit, "devices": _mapping(session.get("devices"))}


def read_run(workdir: pathlib.Path) -> tuple[Config, list[str]]:
    """Reads the config of a run and the names of its classes.

    Raises:
      UserError: if there is no run, or if its files don't have the right content.
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
    """Refuses a folder that holds something other than a run, before anything is written to it.

    Raises:
      UserError: naming the first foreign file.
    """
    with reading(workdir):
        if workdir.is_dir() and not (workdir / CONFIG).exists():
            _check_unused(workdir)


def _check_unused(workdir: pathlib.Path) -> None:
    """Refuses all files but those that `lock` and a killed `begin_session` may have left."""
    our_files = (LOCK, DATASET, PROVENANCE)
    names = sorted(entry.name for entry in workdir.iterdir())
    foreign = [name for name in names if name not in our_files and not (name.startswith(".") and name.endswith(".tmp"))]
    if foreign:
        raise UserError(
            f"--workdir={workdir}: it holds {foreign[0]!r} but no {CONFIG}, so it is not a run folder;"
            " give a new or an empty folder"
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
    """Compares the digests of the images with those of the first session; returns whether any could be compared."""
    shared_keys = sorted(old.keys() & new.keys())
    for key in shared_keys:
        if old[key] != new[key]:
            split, _, kind = key.partition(".")
            raise UserError(
                f"--workdir={workdir} holds a run on other data: the {kind} of {split} have changed (SHA-256"
                f" {str(old[key])[:8]}… -> {new[key][:8]}…); restore the data or give another --workdir"
            )
    return bool(shared_keys)


def _check_settings(workdir: pathlib.Path, sessions: list[Any], session: Mapping[str, Any]) -> bool:
    """Compares the settings of JAX with those of the last session; returns whether that recorded any."""
    before = _mapping(_mapping(sessions[-1] if sessions else None).get(_SETTINGS))
    draws, rounding = changes(before, session[_SETTINGS])
    if draws:
        raise UserError(
            f"--workdir={workdir} holds a run that draws other random numbers: {', '.join(draws)}; restore that"
            " setting, or give another --workdir"
        )
    if rounding:
        print(
            f"warning: {workdir} is resumed with other settings, which may change the rounding of numbers:"
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
    """Refuses another run than that of the folder; returns the differences that are allowed, those of the length."""
    old_config, _ = read_run(workdir)
    changed = differences(old_config, config)
    if changed and all(change.startswith(_LENGTH) for change in changed):
        if (reason := why_not(old_config)) is not None:
            raise UserError(f"--workdir={workdir} holds a run of another length: {', '.join(changed)}; {reason}")
    elif changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"--workdir={workdir} holds a run with another config: {', '.join(changed[:3])}{more};"
            " restore the value or give another --workdir"
        )
    for key in sorted({*old, *dataset} - {*_DATASET_MAY_DIFFER}):
        if old.get(key) != dataset.get(key):
            raise UserError(
                f"--workdir={workdir} holds a run on other data: {_difference(key, old.get(key), dataset.get(key))};"
                " restore the data or give another --workdir"
            )
    if old.get(_TEACHER) != dataset.get(_TEACHER):
        distill = config.distill
        option = f"distill.logits={distill.logits!r}" if distill.logits else f"distill.teacher={distill.teacher!r}"
        before, now = (str(facts.get(_TEACHER))[:8] for facts in (old, dataset))
        raise UserError(
            f"--workdir={workdir} holds a run with another teacher: {option} has changed since (SHA-256 {before}… ->"
            f" {now}…); restore the teacher or give another --workdir"
        )
    return changed


def _difference(key: str, old: Any, new: Any) -> str:
    """Formats ``key: old -> new`` as one short line, even for a thousand class names."""
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{key}: {len(old)} -> {len(new)}"
        place = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return f"{key}[{place}]: {old[place]!r} -> {new[place]!r}"
    return f"{key}: {old!r} -> {new!r}"


# --- skipped images -----------------------------------------------------------------------------------------


def read_skipped(workdir: pathlib.Path) -> list[str]:
    """Reads the images that a run has skipped, one line each, in the order of the file; drops a cut-off line."""
    path = workdir / SKIPPED
    return path.read_bytes().decode(errors="replace").split("\n")[:-1] if path.exists() else []
