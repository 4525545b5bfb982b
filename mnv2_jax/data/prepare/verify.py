"""Finds what is damaged or missing in a prepared folder."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib
from collections.abc import Callable, Iterator

from mnv2_jax.data.prepare.writing import sha256_of
from mnv2_jax.data.shards import Manifest, Shard, finished_manifest


def verify(folder: pathlib.Path, workers: int, done: Callable[[Shard], None]) -> list[str]:
    """Hashes every file anew.

    Args:
      folder: as `prepare` wrote it.
      workers: threads.
      done: called after each shard.

    Returns:
      What is wrong, a line for each file.

    Raises:
      UserError: if there is no manifest of a finished preparation.
    """
    manifest = finished_manifest(str(folder))
    check = functools.partial(_problems, folder, manifest)
    problems = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for shard, found in zip(manifest.shards, pool.map(check, manifest.shards), strict=True):
            problems += found
            done(shard)
    return problems


def _problems(folder: pathlib.Path, manifest: Manifest, shard: Shard) -> list[str]:
    wrong = list(_check(folder / shard.name, shard.sha256))
    if wrong or manifest.format == "arrayrecord":
        return wrong
    listed = set()
    for line in (folder / shard.name).read_text(errors="surrogateescape").splitlines():
        digest, _, name = line.partition("  ")
        listed.add(name)
        wrong += _check(folder / name, digest)
    for wnid in shard.classes:
        top = folder / shard.split / wnid
        there = os.listdir(top) if top.is_dir() else ()
        extra = {f"{shard.split}/{wnid}/{name}" for name in there} - listed
        wrong += [f"{folder / name}: not in {shard.name}" for name in sorted(extra)]
    return wrong


def _check(path: pathlib.Path, digest: str) -> Iterator[str]:
    try:
        if sha256_of(path) != digest:
            yield f"{path}: damaged (its SHA-256 has changed)"
    except FileNotFoundError:
        yield f"{path}: missing"
    except OSError as error:
        yield f"{path}: can't be read ({error.strerror})"
