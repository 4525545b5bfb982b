"""Prepares ImageNet with worker processes; after it was killed, the same command resumes the work."""

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
"""File that lists what an incomplete source lacked when it was last refused, one item a line."""
_LOCK = ".lock"
_MOST_NAMED = 5


def prepare(
    source: pathlib.Path,
    out: pathlib.Path,
    form: Literal["arrayrecord", "folder"],
    workers: int,
    allow_incomplete: bool,
    skip_corrupt: bool,
    report_shard: Callable[[Shard, int, int], None],
    say: Callable[[str], None],
) -> tuple[Manifest, dict[str, str]]:
    """Finds the images, checks each of them, and writes the shards that don't exist yet.

    Args:
      source: see `originals.find`.
      out: the folder to write to; new, empty, or from an earlier session of the same command.
      form: arrayrecord: shards; folder: train/WNID/*.JPEG and val/WNID/*.JPEG.
      workers: number of processes.
      allow_incomplete: whether to accept a part of ImageNet.
      skip_corrupt: whether to leave out images that can't be decoded.
      report_shard: called after each shard with the shard, its number from 1, and the number of shards.
      say: called with a line before anything else that takes long.

    Returns:
      The manifest, which is complete unless there are damaged images that may not be skipped; and the images that can't
      be decoded, each with the reason.

    Raises:
      UserError: for anything else that prevents the preparation from finishing.
    """
    _check_own(out)
    with _lock(out), _pool(workers) as pool:
        before = _read_earlier(out, form)
        source_images = originals.find(source, _parallel_map(pool), say)
        lacking = [] if allow_incomplete else originals.missing(source_images)
        _write_missing(out, lacking)
        if source_images.unlabelled is not None and len(lacking) <= 1:  # its message names every list that would do
            raise source_images.unlabelled
        if lacking:
            raise UserError(_describe_missing(source, out, lacking))
        units = writing.units(source_images.parts)
        shards = _finished_shards(source, out, before, units, skip_corrupt) if before else {}
        places = {split: source_images.places[split] for split in source_images.parts}
        damaged = {name: reason for shard in shards.values() for name, reason in shard.damaged.items()}

        def manifest(complete: bool) -> Manifest:
            ordered = tuple(shards[name] for name in sorted(shards))
            return Manifest(format=form, complete=complete, source=places, shards=ordered)

        unwritten = [unit for unit in units if writing.file_name(unit, form) not in shards]
        if unwritten:
            write_manifest(str(out), manifest(False))
        _empty(out / writing.PARTIAL)
        write = functools.partial(writing.write, out, form, skip_corrupt)
        for shard, reasons in _parallel_map(pool, ordered=False)(write, unwritten):
            damaged |= reasons
            if shard is not None:
                shards[shard.name] = shard
                write_manifest(str(out), manifest(False))
                report_shard(shard, len(shards), len(units))
        shutil.rmtree(out / writing.PARTIAL, ignore_errors=True)
        result = manifest(len(shards) == len(units))
        if result.complete:
            if not allow_incomplete and (lacking := _count_missing(result, source_images)):
                _write_missing(out, lacking)
                raise UserError(_describe_missing(source, out, lacking))
            write_manifest(str(out), result)
        return result, dict(sorted(damaged.items()))


def _write_missing(out: pathlib.Path, lacking: list[str]) -> None:
    if lacking:
        write_text(out / MISSING, "".join(f"{item}\n" for item in lacking))
    else:
        (out / MISSING).unlink(missing_ok=True)


def _describe_missing(source: pathlib.Path, out: pathlib.Path, lacking: list[str]) -> str:
    cut = len(lacking) - _MOST_NAMED
    more = f" and {cut:,} more, all of them in {out / MISSING}" if cut > 0 else ""
    return (
        f"--source={source}: not the whole ImageNet; missing: {', '.join(lacking[:_MOST_NAMED])}{more}. Add it, or give"
        " --allow-incomplete"
    )


def _count_missing(manifest: Manifest, source_images: originals.Originals) -> list[str]:
    """Returns the classes and splits that lack images in archives, which can be counted only once they are read."""
    lacking = []
    for split in manifest.splits:
        counts = collections.Counter(manifest.counts(split))
        for shard in manifest.shards:
            counts.update(name.split("/")[1] for name in shard.damaged if shard.split == split)
        lacking += originals.short(split, {label_of(wnid, split): n for wnid, n in counts.items()}, source_images)
    return lacking


def _check_own(out: pathlib.Path) -> None:
    """Refuses a folder that is neither new nor from an earlier session."""
    names = set(os.listdir(out)) - {_LOCK, writing.PARTIAL, MISSING} if out.is_dir() else set()
    # A process that was killed may have left a temporary file.
    foreign = {name for name in names if not (name.startswith(".") and name.endswith(".tmp"))}
    if foreign and not is_prepared(str(out)):
        raise UserError(
            f"--out={out}: it holds {min(foreign)!r} and no {MANIFEST} of an earlier session; give an empty folder"
        )


def _read_earlier(out: pathlib.Path, form: str) -> Manifest | None:
    """Returns the manifest that an earlier session left, if any."""
    if not is_prepared(str(out)):
        return None
    before = read_manifest(str(out))
    if before.format != form:
        raise UserError(
            f"--out={out}: was begun with --format={before.format}; continue with that format, or give another --out"
        )
    return before


def _finished_shards(
    source: pathlib.Path, out: pathlib.Path, before: Manifest, units: list[writing.Unit], skip_corrupt: bool
) -> dict[str, Shard]:
    """Returns the shards that needn't be written again, by name."""
    plans = {writing.file_name(unit, before.format): unit.plan for unit in units}
    for shard in before.shards:
        if plans.get(shard.name) != shard.plan:
            raise UserError(
                f"--out={out}: {shard.name} was made from other images than those in --source={source}; give the source"
                " that the folder was begun with, or another --out"
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
        raise UserError(f"{folder}: can't be emptied ({error.strerror}); fix that and start again") from error


@contextlib.contextmanager
def _lock(out: pathlib.Path) -> Iterator[None]:
    """Creates the folder if necessary and locks it against other processes; if this one dies, the kernel unlocks it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--out={out}: can't be written to ({error.strerror}); give another folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"--out={out}: another process is preparing this folder; wait until it ends, or give another --out"
        ) from error
    finally:
        os.close(descriptor)


# --- worker processes ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Yields a pool of worker processes, and ends them however the block ends."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "a worker process was killed, usually for lack of memory; lower --workers and run the same command again,"
            " which resumes the work"
        ) from error
    finally:
        # An interruption may come while a process is being started, when multiprocessing doesn't know it yet.
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _parallel_map(pool: concurrent.futures.Executor, ordered: bool = True) -> Callable[..., Iterable[Any]]:
    """Returns a ``map`` that the workers compute; its results come in order, or as they are finished."""

    def parallel(function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
        futures = [pool.submit(function, argument) for argument in arguments]
        for future in futures if ordered else concurrent.futures.as_completed(futures):
            yield future.result()

    return parallel


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process too, which ends its workers
    threading.Thread(target=exit_with_parent, daemon=True).start()
