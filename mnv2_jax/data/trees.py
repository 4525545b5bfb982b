"""Finds the files of images and of what belongs to them in a `folder.Tree`, by their names.

images/train/more/NAME.jpg  ──►  "more/NAME": an image and its mask, or its boxes, share this name
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from mnv2_jax.data.folder import Tree, is_taken, left_out
from mnv2_jax.errors import UserError

_IMAGES: Mapping[str, Callable[[str], bool]] = {"image": is_taken}


def exists(tree: Tree, folder: str) -> bool:
    """Whether a folder is in a tree; "" is the top."""
    parent, name = posixpath.split(folder)
    return not folder or ((not parent or exists(tree, parent)) and name in tree.folders(parent))


def find_base(tree: Tree, name: str, bases: Sequence[str], folder: str, layout: str) -> str:
    """Returns the first of some folders that has a certain folder in it.

    Args:
      tree: the files.
      name: the data set, for an error.
      bases: the folders to look in; "" is the top.
      folder: the name of the folder to find.
      layout: advice on how to arrange the files, for an error.

    Raises:
      UserError: if none has it.
    """
    for base in bases:
        if exists(tree, posixpath.join(base, folder)):
            return base
    raise UserError(f"{tree.path}: there is no {folder}/ of {name} in it, {tops(tree)}; {layout}")


def tops(tree: Tree) -> str:
    """Writes which folders are at the top instead of those that are missing."""
    names = ", ".join(f"{name}/" for name in tree.folders("")[:8])
    return f"only {names}" if names else "and no folders at all"


def normal(name: str) -> str:
    """Returns a name in Unicode's form NFC: macOS writes ä as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def by_name(tree: Tree, folder: str, ending: str = "", is_wanted: Callable[[str], bool] = is_taken) -> dict[str, str]:
    """Returns the files anywhere below a folder by their paths in it, without extension and a further ending.

    The names are `normal`.

    Args:
      tree: the files.
      folder: a folder; one that doesn't exist holds no files.
      ending: what the name of a file must end with, before its extension.
      is_wanted: whether a path is that of a file to return; by default the images.

    Raises:
      UserError: if two files have the same name.
    """
    files: dict[str, str] = {}
    for path in tree.below(folder) if exists(tree, folder) else ():
        name = normal(posixpath.splitext(path.removeprefix(f"{folder}/"))[0])
        if not is_wanted(path) or not name.endswith(ending):
            continue
        name = name.removesuffix(ending)
        if name in files:
            raise UserError(
                f"{tree.path}: {files[name]} and {path} have the same name without their extensions, so that they can't"
                " be told apart; remove or rename one of them"
            )
        files[name] = path
    return files


def others(tree: Tree, folders: Iterable[str], is_used: Callable[[str], bool] = is_taken) -> tuple[str, ...]:
    """Returns a note, if any, on the files below some folders that aren't used, by default those that are no images."""
    return left_out([path for folder in folders for path in tree.below(folder) if not is_used(path)])


def outside(
    tree: Tree, folders: Collection[str], kinds: Mapping[str, Callable[[str], bool]] = _IMAGES
) -> tuple[str, ...]:
    """Returns notes on the files in none of some folders, which a user may think are used.

    Args:
      tree: the files.
      folders: folders whose files are counted elsewhere.
      kinds: whether a path is that of a file to count, by the noun for such a file.
    """
    paths = _around(tree, folders, "")
    notes = (
        not_used(list(filter(is_wanted, paths)), noun, "outside of the folders that are read")
        for noun, is_wanted in kinds.items()
    )
    return tuple(note for found in notes for note in found)


def _around(tree: Tree, folders: Collection[str], parent: str) -> list[str]:
    """Returns the files below ``parent`` that lie in none of some folders."""
    if parent in folders:
        return []
    with contextlib.suppress(UserError):  # a folder that nobody uses may be unreadable, as lost+found is
        if not any(folder.startswith(f"{parent}/" if parent else "") for folder in folders):
            return tree.below(parent)
        inner = [posixpath.join(parent, name) for name in tree.folders(parent)]
        return tree.files(parent) + [path for folder in inner for path in _around(tree, folders, folder)]
    return []


def not_used(paths: Sequence[str], noun: str, where: str) -> tuple[str, ...]:
    """Returns a note, if any, that counts files which were left out, as in "2 images outside of the splits"."""
    return (f"left out: {counted(paths, noun)} {where}, as {paths[0]}",) if paths else ()


def listed(content: bytes, known: Collection[str]) -> list[str]:
    """Returns the names in a list.

    Args:
      content: lines that hold a name, or the paths of an image and its mask.
      known: `normal` names of files, without extension. A line with blanks or dots is one of them as a whole, if it can
        be.
    """
    lines = [line.strip() for line in normal(content.decode("utf-8-sig", "replace")).splitlines()]
    return [_name_in(line, known) for line in lines if line]


def _name_in(line: str, known: Collection[str]) -> str:
    first = posixpath.basename(line.split()[0])
    stem = posixpath.splitext(first)[0]
    return next((name for name in (line, posixpath.splitext(line)[0], first) if name in known), stem)


def place_of(tree: Tree, path: str) -> str:
    """Returns the name of a file in errors."""
    return os.path.join(tree.path, path) if os.path.isdir(tree.path) else f"{tree.path}: {path}"


def content_of(tree: Tree, path: str) -> bytes:
    """Reads a small file that a tree lists.

    Raises:
      UserError: if it can't be read, or is a link to nothing.
    """
    if (content := tree.content(path)) is None:
        raise UserError(
            f"{place_of(tree, path)}: is a link, and no file is behind it (in a tar, none can be); restore the file, or"
            " remove the link"
        )
    return content


def content_near(tree: Tree, name: str) -> tuple[str, bytes | None]:
    """Reads a small file at the top of a tree, or beside a tar.

    Returns:
      The place of the file for errors, and its content; None where it doesn't exist.
    """
    beside, content = tree.home / name, tree.content(name)
    place = str(beside) if content is None else place_of(tree, name)
    if content is None and beside.is_file():
        content = beside.read_bytes()
    return place, content


def counted(things: Sequence[str], noun: str) -> str:
    """Writes how many things there are, as in "2 images"."""
    return f"{len(things):,} {noun}{'' if len(things) == 1 else 's'}"
