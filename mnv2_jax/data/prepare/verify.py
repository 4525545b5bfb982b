"""Finds damaged and missing files in a prepared folder."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib
from collections.abc import Callable, Iterator

from mnv2_jax.data.prepare.writing import sha256_of
from mnv2_jax.data.shards import Manifest, Shard, finished_manifest


def verify(folder: pathlib.Path, workers: int, report_shard: Callable[[Shard], None]) -> list[str]:
    """Compares the SHA-256 of every file with the one that was written.

    Args:
      folder: a folder that `prepare` wrote.
      workers: number of threads.
      report_shard: called after each shard.

    Returns:
      The problems, one line for each file.

    Raises:
      UserError: if there is no manifest of a finished preparation.
    """
    manifest = finished_manifest(str(folder))
    check = functools.partial(_find_problems, folder, manifest)
    problems = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for shard, lines in zip(manifest.shards, pool.map(check, manifest.shards), strict=True):
            problems += lines
            report_shard(shard)
    return problems


def _find_problems(folder: pathlib.Path, manifest: Manifest, shard: Shard) -> list[str]:
    problems = list(_check(folder / shard.name, shard.sha256))
    if problems or manifest.format == "arrayrecord":
        return problems
    listed = set()
    for line in (folder / shard.name).read_text(errors="surrogateescape").splitlines():
        digest, _, name = line.partition("  ")
        listed.add(name)
        problems += _check(folder / name, digest)
    for wnid in shard.classes:
        top = folder / shard.split / wnid
        names = os.listdir(top) if top.is_dir() else ()
        extra = {f"{shard.split}/{wnid}/{name}" for name in names} - listed
        problems += [f"{folder / name}: not in {shard.name}" for name in sorted(extra)]
    return problems


def _check(path: pathlib.Path, digest: str) -> Iterator[str]:
    try:
        if sha256_of(path) != digest:
            yield f"{path}: damaged (its SHA-256 has changed)"
    except FileNotFoundError:
        yield f"{path}: missing"
    except OSError as error:
        yield f"{path}: can't be read ({error.strerror})"
