"""Says what is on images: ``python -m mnv2_jax.predict --weights=v2.safetensors IMAGE_OR_FOLDER...``.

Or stores what a teacher says of all training images of a config, for a student to learn from: ``--store-logits``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mnv2_jax import config, outputs
from mnv2_jax.data import folder
from mnv2_jax.data.images import DamagedImageError, damaged_images, decode, evaluation_view
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, run_folder_type, workdir_type

if TYPE_CHECKING:
    from mnv2_jax.tasks.base import Answers
    from mnv2_jax.weights.file import Weights

BATCH = 32
"""Images that are looked at together, at most."""

_HELP_AFTER = """\
An image is seen as evaluation sees it: resized, cropped and normalised as the run's config or the weights say. Nothing
is printed before every image has been read; one that is missing or damaged is named on standard error, with exit code
2. Of a run, standard error says which checkpoint answers.

--json prints one list on standard output:
  [{"path": "a.jpg", "top": [{"index": 3, "label": "cat", "probability": 0.98}, ...]}, ...]

--store-logits writes the logits of every training image of --config, as evaluation sees it, to a file that
--config.distill.logits takes; of the config only data is read.

examples:
  python -m mnv2_jax.predict --workdir=runs/w0_35 a.jpg b.png
  python -m mnv2_jax.predict --workdir=runs/w0_35 --checkpoint=best --top=1 --json photos/
  python -m mnv2_jax.predict --weights=v2.safetensors photos/
  python -m mnv2_jax.predict --weights=timm/mobilenetv2_100.ra_in1k photos/
  python -m mnv2_jax.predict --workdir=runs/w1_0 --config=w0_35:data=folder:DIR --store-logits=w1_0.npz
"""


def main() -> None:
    """Flags, images, answer."""
    parser = Parser("Prints the most probable classes of images, by a trained run or by weights.", _HELP_AFTER)
    parser.add_argument("--workdir", type=run_folder_type, help="the run's folder")
    parser.add_argument("--weights", help="a file that mnv2_jax.convert wrote, or a name of published weights")
    parser.add_argument("--modules", default="", metavar="A,B", help="modules that register what --weights are of")
    parser.add_argument(
        "--checkpoint", choices=("latest", "best"), help="of the run (default: latest; best with patience)"
    )
    parser.add_argument(
        "--top", type=_at_least_one, metavar="K", help="answers an image, as classes (default: 5, at most all)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON list on standard output, nothing else there")
    parser.add_argument(
        "--store-logits",
        type=workdir_type,
        metavar="FILE.npz",
        help="instead: logits of the training images of --config",
    )
    parser.add_argument(
        "--config",
        metavar="NAME[:ARG]",
        help="as for mnv2_jax.main: whose data --store-logits goes through",
    )
    parser.add_argument("--config.KEY", metavar="VALUE", help="sets a key of it, as --config.data.holdout_fraction=0.1")
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE_OR_FOLDER", help="a folder: every image in it and below, in sorted order"
    )
    args, overrides = parser.parse(sys.argv[1:])
    if (args.workdir is None) == (args.weights is None):
        raise UserError("give either --workdir, the folder of a trained run, as runs/w0_35, or --weights, a file")
    if args.modules and not args.weights:
        raise UserError(f"--modules={args.modules} is read with --weights only, a run knows its own; leave it out")
    if args.weights and args.checkpoint:
        raise UserError(f"--checkpoint={args.checkpoint} is read with --workdir only; leave it out")
    if args.store_logits is not None:
        _store_logits(args, overrides)
        return
    if overrides or args.config:
        given = f".{overrides[0]}" if overrides else f"={args.config}"
        raise UserError(f"--config{given} is read with --store-logits only, weights say how they predict; leave it out")
    if not args.images:
        raise UserError("no image is given; name image files or folders after the flags")
    paths, others = find_images(args.images)
    for line in folder.left_out(others):
        print(line, file=sys.stderr)
    weights = _open(args)
    means, answers = answers_for(weights, paths, args.top)
    if args.workdir is not None:
        print(*weights.info.notes, sep="\n", file=sys.stderr)  # which checkpoint it is
    if args.json:
        print(json.dumps(_as_json(means, paths, answers)))
        return
    for path, answer in zip(paths, answers, strict=True):
        print(path, *(f"  {line}" for line in means.to_text(answer)), sep="\n")


def _open(args: argparse.Namespace) -> Weights:
    # JAX takes seconds to import; a mistyped flag or path doesn't wait for it.
    from mnv2_jax.processes import runtime

    runtime.configure()  # before JAX is used: without devices it would be the weights that can't be read
    if args.workdir is not None:
        from mnv2_jax.runs.weights import read_run_weights

        return read_run_weights(args.workdir, args.checkpoint)
    from mnv2_jax.registry import import_modules
    from mnv2_jax.weights.load import load_weights

    import_modules(filter(None, args.modules.split(",")))
    return load_weights(args.weights)


def _store_logits(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    idle = [("--top", args.top), ("--json", args.json), (str(args.images[0]) if args.images else "", args.images)]
    if given := [flag for flag, value in idle if value]:
        raise UserError(f"--store-logits goes through the training images of --config; leave {given[0]} out")
    if args.config is None:
        raise UserError("--store-logits needs --config, whose training images it goes through; as w0_35")
    settings = config.load(args.config, overrides).config

    from mnv2_jax.training.storing import store_logits

    outputs.drop_errors(sys.stdout)  # the answer is the file
    count = store_logits(args.store_logits, _open(args), settings)
    print(f"{args.store_logits}: logits of {count} images; learn from them by --config.distill.logits")


def find_images(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files as they were given, and for a folder the images below it, sorted; and what was left out there.

    Raises:
      UserError: for what isn't there, and for a folder without images.
    """
    images: list[str] = []
    others: list[str] = []
    for given in inputs:
        if os.path.isfile(given):
            images.append(given)
        elif os.path.isdir(given):
            found, rest = folder.find_images(given)
            if not found:
                raise UserError(
                    "; ".join((f"{given}: no image that can be read in this folder", *folder.left_out(rest)))
                )
            images += found
            others += rest
        else:
            raise UserError(f"{given}: no such image or folder; correct the path")
    return images, others


def predict(weights: Weights, paths: Sequence[str], top: int | None = None) -> list[dict[str, Any]]:
    """Looks at image files; see `answers_for`.

    Returns:
      For each image its "path" and what `Answers.to_json` gives: of a classification ``"top": [{"index", "label",
      "probability"}]``, the most probable class first.
    """
    means, answers = answers_for(weights, paths, top)
    return _as_json(means, paths, answers)


def _as_json(means: Answers, paths: Sequence[str], answers: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"path": path, **means.to_json(answer)} for path, answer in zip(paths, answers, strict=True)]


def answers_for(weights: Weights, paths: Sequence[str], top: int | None = None) -> tuple[Answers, list[Any]]:
    """Looks at image files.

    Args:
      weights: a model, its variables, and how it wants images.
      paths: of image files, at least one.
      top: how many answers an image at most, where its task has several; None: what is usual.

    Returns:
      What answers mean, and the answer for each image.

    Raises:
      UserError: if an image can't be read, naming all that can't be decoded, or if weights give no numbers.
    """
    import jax  # takes seconds; a mistyped flag or path doesn't wait for it
    import jax.numpy as jnp

    from mnv2_jax.ops.augment import normalise
    from mnv2_jax.processes import runtime
    from mnv2_jax.registry import TASKS

    runtime.configure()
    model, variables, info = weights
    data = config.build({"data": dataclasses.asdict(info.preprocessing)}).data
    means: Answers = TASKS.find(info.task).answers(weights, top)
    variables = jax.device_put(variables)

    @jax.jit
    def answer(variables: Any, images: Any) -> Any:
        outputs, _ = model.apply(variables, normalise(images, data.mean, data.std))
        finite = [jnp.isfinite(leaf.reshape(len(images), -1)).all(axis=1) for leaf in jax.tree.leaves(outputs)]
        return means.decode(outputs), jnp.stack(finite).all(axis=0)

    answers: list[Any] = []
    damaged: list[str] = []
    # Every batch has the same size, and few sizes are possible: one compilation, which the cache often has.
    size = min(BATCH, 1 << (len(paths) - 1).bit_length())
    for start in range(0, len(paths), size):
        chunk = paths[start : start + size]
        images = np.zeros((size, data.resolution, data.resolution, 3), np.uint8)
        for row, path in enumerate(chunk):
            try:
                images[row] = _read(path, data)
            except DamagedImageError as error:
                damaged.append(str(error))
        if damaged:  # there will be no answer; the rest is only looked through
            continue
        found, is_number = jax.device_get(answer(variables, images))
        for row, path in enumerate(chunk):
            if not is_number[row]:
                raise UserError(f"{path}: the network's outputs are not numbers; its weights are no good, give others")
            answers.append(jax.tree.map(lambda leaf, row=row: leaf[row], found))
    if damaged:
        raise damaged_images(damaged, f"{len(paths):,} images")
    return means, answers


def _read(path: str, data: config.DataConfig) -> np.ndarray:
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); restore it or leave it out") from error
    return evaluation_view(decode(content, path), data)


def _at_least_one(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


if __name__ == "__main__":
    exit_on_user_error(main)
