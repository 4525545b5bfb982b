"""Reads the table of contents of a tar."""

from __future__ import annotations

import tarfile


def read_members(path: str, start: int = 0) -> list[tarfile.TarInfo]:
    """Returns all entries of an uncompressed tar.

    Args:
      path: the file that holds the tar.
      start: the offset in bytes at which the tar begins.

    Raises:
      OSError, tarfile.TarError: if the tar can't be read, is damaged or is cut off.
    """
    with open(path, "rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            members = archive.getmembers()
            # The library takes a damaged header, unless it is the first, for the end of the archive.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset:,}")
            return members
