"""The run folder on disk: its lock, its records, its log.

    config.json      the config as it was when the run began          written by `prepare`
    dataset.json     what was found in the data: classes, counts       "
    provenance.json  code, versions, devices and command, per session  "
    metrics.jsonl    one JSON object a line                            `MetricsLog`
    tensorboard/     the same numbers                                  "

A process may die between any two instructions, so a JSON file is replaced whole or not at all, and the log is
read as far as it is sound.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from mnv2_jax import config as config_lib
from mnv2_jax.errors import UserError

LOCK, CONFIG, DATASET, PROVENANCE, METRICS = ".lock", "config.json", "dataset.json", "provenance.json", "metrics.jsonl"
TENSORBOARD = "tensorboard"

_PACKAGES = ("mnv2_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_DATASET_MAY_DIFFER = ("name",)
"""`data.name` is compared as part of the config."""


# --- lock --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder if need be and holds it against every other process; the kernel lets go when we die.

    Raises:
      UserError: if another process holds it (named by its id), or no folder can be made and locked there.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Opened without truncation: the file still says who holds it. It is never deleted either, since a
        # process could then lock the deleted file while another locks a new one of the same name.
        descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: no run folder can be made there ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            # Empty in the instant between its lock and its writing.
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise UserError(
                f"--workdir={workdir}: process {holder} is training there; wait for it, stop it,"
                " or give another --workdir"
            ) from error
        except OSError as error:
            raise UserError(
                f"--workdir={workdir}: its file system can't lock files ({error.strerror}); give a local folder"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


# --- JSON files --------------------------------------------------------------------------------------------


def write_json(path: pathlib.Path, tree: Any) -> None:
    """Replaces a JSON file atomically: whoever reads it, and whenever we die, it is the old one or the new one.

    Args:
      path: in a folder that exists.
      tree: nested mappings and sequences of what JSON has; arrays become lists, NaN and infinities null.

    Raises:
      UserError: if it can't be written.
    """
    write_text(path, json.dumps(jsonable(tree), indent=2, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a text file as `write_json` does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode(errors="backslashreplace"))  # a file name need not be Unicode
            file.flush()
            os.fsync(file.fileno())  # before the rename, which may otherwise reach the disk first
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written ({error.strerror}); mend that and start again") from error


def jsonable(value: Any) -> Any:
    """What JSON can hold: it has no arrays, and no NaN though Python would write one."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- config, data, provenance ------------------------------------------------------------------------------


def prepare(
    workdir: pathlib.Path, config: config_lib.Config, dataset: Mapping[str, Any], devices: Mapping[str, Any]
) -> bool:
    """Begins a run in a new folder, or makes sure that an old one is of the same run; notes who, what and when.

    Call it under `lock`. config.json is written last: a folder that has it has the other two.

    Args:
      workdir: a folder that exists.
      config: of this session. An old config.json is kept as it was first written.
      dataset: what the data turned out to be: name, class_names, num_train, num_eval, eval_split, steps.
      devices: platform, kind and count, for the provenance.

    Returns:
      Whether the folder held the run already.

    Raises:
      UserError: if the folder is not a run folder, or is of a run with another config or other data.
    """
    dataset = jsonable(dataset)
    resumed = (workdir / CONFIG).exists()
    sessions = []
    if resumed:
        _check_same_run(workdir, config, dataset)
        if (workdir / PROVENANCE).exists():
            sessions = config_lib.read_json(workdir / PROVENANCE).get("sessions", [])
    else:
        _check_unused(workdir)
        write_json(workdir / DATASET, dataset)
    write_json(workdir / PROVENANCE, {"sessions": [*sessions, provenance(devices)]})
    if not resumed:
        write_json(workdir / CONFIG, config_lib.to_dict(config))
    return resumed


def read_run(workdir: pathlib.Path) -> tuple[config_lib.Config, list[str]]:
    """The config of a run and the names of its classes.

    Raises:
      UserError: if there is no run, or its files don't hold what they should.
    """
    if not (workdir / CONFIG).is_file():
        raise UserError(f"--workdir={workdir}: no run is there (no {CONFIG}); give the folder of a trained run")
    try:
        config = config_lib.build(config_lib.read_json(workdir / CONFIG))
    except UserError as error:
        raise UserError(f"--workdir={workdir}: its {CONFIG} can't be used: {error}") from error
    names = config_lib.read_json(workdir / DATASET).get("class_names")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UserError(f"{workdir / DATASET}: class_names is not a list of names; restore the file")
    return config, names


def refuse_foreign(workdir: pathlib.Path) -> None:
    """Refuses a folder that holds something else than a run, before anything is written to it.

    Raises:
      UserError: naming what it holds.
    """
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


def _check_same_run(workdir: pathlib.Path, config: config_lib.Config, dataset: Mapping[str, Any]) -> None:
    old_config, _ = read_run(workdir)
    changed = config_lib.differences(old_config, config)
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"--workdir={workdir} is of a run with another config: {', '.join(changed[:3])}{more};"
            " restore the value or give another --workdir"
        )
    old = config_lib.read_json(workdir / DATASET)
    for key in sorted({*old, *dataset} - {*_DATASET_MAY_DIFFER}):
        if old.get(key) != dataset.get(key):
            raise UserError(
                f"--workdir={workdir} is of a run on other data: {_difference(key, old.get(key), dataset.get(key))};"
                " restore the data or give another --workdir"
            )


def _difference(key: str, old: Any, new: Any) -> str:
    """``key: old -> new`` on one short line, even for a thousand class names."""
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{key}: {len(old)} -> {len(new)}"
        place = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return f"{key}[{place}]: {old[place]!r} -> {new[place]!r}"
    return f"{key}: {old!r} -> {new!r}"


def provenance(devices: Mapping[str, Any]) -> dict[str, Any]:
    """What produced this session's numbers: start (UTC), command, git, versions, devices. No host, no user."""
    started = datetime.datetime.fromtimestamp(psutil.Process().create_time(), datetime.UTC)
    return {
        "started": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "git": _git(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": dict(devices),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and dirtiness of the tree that this file belongs to; None if that isn't a checkout."""
    source = pathlib.Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), "--no-optional-locks", *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=5, text=True).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout.
        git("ls-files", "--error-unmatch", source.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


# --- metrics -----------------------------------------------------------------------------------------------


def process_seconds() -> float:
    """Wall time since the operating system started this process: imports and compilation are part of a run."""
    return max(0.0, time.time() - psutil.Process().create_time())


class MetricsLog:
    """Appends to metrics.jsonl, and to TensorBoard's files where they are wanted."""

    seconds_before: float
    """What earlier sessions took, their lost steps included: the largest `seconds` that the log had."""

    def __init__(self, workdir: pathlib.Path, resume_step: int, *, tensorboard: bool = False):
        """Cuts the log back to what belongs to the restored state, and opens it.

        Args:
          workdir: of a run that this process has locked.
          resume_step: number of steps the restored state has taken; 0 for a new run. Lines of later steps are
            dropped, and everything from the first line on that doesn't parse.
          tensorboard: whether to write event files; what they hold of dropped steps is purged.
        """
        path = workdir / METRICS
        old = path.read_bytes() if path.exists() else b""
        lines = list(_parse(old))
        self.seconds_before = max((float(line.get("seconds") or 0) for line in lines), default=0.0)
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= resume_step)
        if kept.encode() != old:
            write_text(path, kept)
        self._file = path.open("a", buffering=1)  # a line is written as soon as it ends
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # 0.1 s that a run without it saves

            folder = workdir / TENSORBOARD
            # Event files are named by the second; the suffix keeps two quick sessions apart.
            self._events = SummaryWriter(
                str(folder),
                purge_step=resume_step + 1 if folder.exists() else None,
                flush_secs=10,
                filename_suffix=f".{os.getpid()}.{resume_step}",
            )

    @property
    def seconds(self) -> float:
        """Wall time of the run up to now, over all its sessions."""
        return self.seconds_before + process_seconds()

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes one line: step, split, `seconds`, then the values (scalars; those that aren't finite as null)."""
        line = jsonable({"step": step, "split": split, "seconds": round(self.seconds, 3), **values})
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._events is not None:
            for key, value in line.items():
                if isinstance(value, int | float) and key != "step":
                    self._events.add_scalar(f"{split}/{key}", value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, up to the first that is torn; none where there is no file."""
    return list(_parse(path.read_bytes())) if path.exists() else []


def _parse(content: bytes) -> Iterator[dict[str, Any]]:
    """The sound lines at the start of a log. What was cut short can't parse: an object's last byte is its brace."""
    for line in content.split(b"\n"):
        try:
            parsed = json.loads(line.decode(), parse_constant=lambda _: None)  # as `write` has NaN
        except ValueError:  # bad JSON, bad UTF-8, or the empty end
            return
        if not isinstance(parsed, dict) or type(parsed.get("step")) is not int:
            return
        yield parsed
