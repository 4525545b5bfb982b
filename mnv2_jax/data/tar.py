"""The table of contents of a tar."""

from __future__ import annotations

import tarfile


def read_members(path: str, start: int = 0) -> list[tarfile.TarInfo]:
    """All entries of an uncompressed tar.

    Args:
      path: a file.
      start: in bytes, where in it the tar begins.

    Raises:
      OSError, tarfile.TarError: if it can't be read, is damaged or cut off.
    """
    with open(path, "rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            members = archive.getmembers()
            # The library takes a damaged header, other than the first of a file, for the end of the archive.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset:,}")
            return members
