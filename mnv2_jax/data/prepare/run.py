"""Prepares ImageNet with worker processes; whenever it is killed, the same command goes on."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import psutil

from mnv2_jax.data.prepare import originals, writing
from mnv2_jax.data.prepare.labels import label_of
from mnv2_jax.data.shards import MANIFEST, Manifest, Shard, is_prepared, read_manifest, write_manifest
from mnv2_jax.data.workers import exit_with_parent
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import write_text

MISSING = "missing.txt"
"""File with what the source lacked when it was last refused for that, a line each."""
_LOCK = ".lock"
_MOST_NAMED = 5


def prepare(
    source: pathlib.Path,
    out: pathlib.Path,
    form: Literal["arrayrecord", "folder"],
    workers: int,
    allow_incomplete: bool,
    skip_corrupt: bool,
    done: Callable[[Shard, int, int], None],
    say: Callable[[str], None],
) -> tuple[Manifest, dict[str, str]]:
    """Finds the images, checks each of them, and writes what isn't there yet.

    Args:
      source: see `originals.find`.
      out: the folder to write to; new, empty, or of a session of the same command.
      form: arrayrecord: shards; folder: train/WNID/*.JPEG and val/WNID/*.JPEG.
      workers: processes.
      allow_incomplete: take any part of ImageNet.
      skip_corrupt: leave out images that can't be decoded.
      done: called after each shard with it, its number from 1, and how many there are.
      say: called with a line before anything else that takes long.

    Returns:
      The manifest, which is complete unless there are damaged images that mayn't be skipped; and why which
      images can't be decoded.

    Raises:
      UserError: for anything else that keeps it from being brought to its end.
    """
    _check_own(out)
    with _lock(out), _pool(workers) as pool:
        before = _before(out, form)
        found = originals.find(source, _mapped(pool), say)
        lacking = [] if allow_incomplete else originals.missing(found)
        _write_missing(out, lacking)
        if found.unlabelled is not None and len(lacking) <= 1:  # it says what would do instead
            raise found.unlabelled
        if lacking:
            raise UserError(_lacks(source, out, lacking))
        units = writing.units(found.parts)
        shards = _kept(source, out, before, units, skip_corrupt) if before else {}
        places = {split: found.places[split] for split in found.parts}
        damaged = {name: reason for shard in shards.values() for name, reason in shard.damaged.items()}

        def manifest(complete: bool) -> Manifest:
            ordered = tuple(shards[name] for name in sorted(shards))
            return Manifest(format=form, complete=complete, source=places, shards=ordered)

        todo = [unit for unit in units if writing.file_name(unit, form) not in shards]
        if todo:
            write_manifest(str(out), manifest(False))
        _empty(out / writing.PARTIAL)
        write = functools.partial(writing.write, out, form, skip_corrupt)
        for shard, reasons in _mapped(pool, ordered=False)(write, todo):
            damaged |= reasons
            if shard is not None:
                shards[shard.name] = shard
                write_manifest(str(out), manifest(False))
                done(shard, len(shards), len(units))
        shutil.rmtree(out / writing.PARTIAL, ignore_errors=True)
        result = manifest(len(shards) == len(units))
        if result.complete:
            if not allow_incomplete and (lacking := _short(result, found)):
                _write_missing(out, lacking)
                raise UserError(_lacks(source, out, lacking))
            write_manifest(str(out), result)
        return result, dict(sorted(damaged.items()))


def _write_missing(out: pathlib.Path, lacking: list[str]) -> None:
    if lacking:
        write_text(out / MISSING, "".join(f"{item}\n" for item in lacking))
    else:
        (out / MISSING).unlink(missing_ok=True)


def _lacks(source: pathlib.Path, out: pathlib.Path, lacking: list[str]) -> str:
    cut = len(lacking) - _MOST_NAMED
    more = f" and {cut:,} more, all of them in {out / MISSING}" if cut > 0 else ""
    return (
        f"--source={source}: not the whole ImageNet; missing: {', '.join(lacking[:_MOST_NAMED])}{more}. Add it, or give"
        " --allow-incomplete"
    )


def _short(manifest: Manifest, found: originals.Originals) -> list[str]:
    """Images that archives lack, which can only be counted when they are read."""
    lacking = []
    for split in manifest.splits:
        counts = collections.Counter(manifest.counts(split))
        for shard in manifest.shards:
            counts.update(name.split("/")[1] for name in shard.damaged if shard.split == split)
        lacking += originals.short(split, {label_of(wnid, split): n for wnid, n in counts.items()}, found)
    return lacking


def _check_own(out: pathlib.Path) -> None:
    """Refuses a folder that is neither new nor of an earlier session."""
    there = set(os.listdir(out)) - {_LOCK, writing.PARTIAL, MISSING} if out.is_dir() else set()
    others = {name for name in there if not (name.startswith(".") and name.endswith(".tmp"))}  # of a kill
    if others and not is_prepared(str(out)):
        raise UserError(
            f"--out={out}: it holds {min(others)!r} and no {MANIFEST} of an earlier session; give a folder of its own"
        )


def _before(out: pathlib.Path, form: str) -> Manifest | None:
    """State that an earlier session left."""
    if not is_prepared(str(out)):
        return None
    before = read_manifest(str(out))
    if before.format != form:
        raise UserError(f"--out={out}: begun with --format={before.format}; go on with that, or give another --out")
    return before


def _kept(
    source: pathlib.Path, out: pathlib.Path, before: Manifest, units: list[writing.Unit], skip_corrupt: bool
) -> dict[str, Shard]:
    """The shards that needn't be written again, by name."""
    plans = {writing.file_name(unit, before.format): unit.plan for unit in units}
    for shard in before.shards:
        if plans.get(shard.name) != shard.plan:
            raise UserError(
                f"--out={out}: {shard.name} was made of other images than those of --source={source}; give the source"
                " that it was begun with, or another --out"
            )
    return {
        shard.name: shard
        for shard in before.shards
        if (skip_corrupt or not shard.damaged) and writing.is_whole(out, before.format, shard)
    }


def _empty(folder: pathlib.Path) -> None:
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{folder}: can't be made anew ({error.strerror}); mend that and start again") from error


@contextlib.contextmanager
def _lock(out: pathlib.Path) -> Iterator[None]:
    """Makes the folder if need be and holds it against other processes; the kernel lets go when we die."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--out={out}: can't be written to ({error.strerror}); give another folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"--out={out}: another process is preparing it; wait for it, or give another --out") from error
    finally:
        os.close(descriptor)


# --- worker processes ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Worker processes that are gone at the end, whatever ends it."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "a worker process was killed, mostly for want of memory; lower --workers and give the same command again,"
            " which goes on"
        ) from error
    finally:
        # An interruption may come while one is being started, when multiprocessing doesn't count it yet.
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _mapped(pool: concurrent.futures.Executor, ordered: bool = True) -> Callable[..., Iterable[Any]]:
    """``map`` by the workers, in order or as they finish."""

    def parallel(function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
        futures = [pool.submit(function, argument) for argument in arguments]
        for future in futures if ordered else concurrent.futures.as_completed(futures):
            yield future.result()

    return parallel


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process too, which ends us
    threading.Thread(target=exit_with_parent, daemon=True).start()
