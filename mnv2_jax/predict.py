"""Predicts the classes of images: ``python -m mnv2_jax.predict --weights=v2.safetensors IMAGE_OR_FOLDER...``.

With ``--store-logits`` it stores a teacher's logits for all training images of a config, for a student to learn from.
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
from mnv2_jax.flags import Parser, folder_type, run_folder_type

if TYPE_CHECKING:
    from mnv2_jax.tasks.base import Answers
    from mnv2_jax.weights.file import Weights

BATCH = 32
"""Largest number of images in a batch."""

_HELP_AFTER = """\
Images are preprocessed as in evaluation: resized, cropped and normalised as the run's config or the weights file says.
Nothing is printed until every image has been read. If one is missing or damaged, the command names it on standard
error, prints no predictions and exits with code 2. With --workdir, standard error names the checkpoint that was used.

--json prints one list to standard output:
  [{"path": "a.jpg", "top": [{"index": 3, "label": "cat", "probability": 0.98}, ...]}, ...]

--store-logits writes the logits of every training image of --config to a file for --config.distill.logits. The images
are preprocessed as in evaluation, and only the data section of the config is used.

examples:
  python -m mnv2_jax.predict --workdir=runs/w0_35 a.jpg b.png
  python -m mnv2_jax.predict --workdir=runs/w0_35 --checkpoint=best --top=1 --json photos/
  python -m mnv2_jax.predict --weights=v2.safetensors photos/
  python -m mnv2_jax.predict --weights=timm/mobilenetv2_100.ra_in1k photos/
  python -m mnv2_jax.predict --workdir=runs/w1_0 --config=w0_35:data=folder:DIR --store-logits=w1_0.npz
"""


def main() -> None:
    """Reads the flags and the images, and prints the predictions."""
    parser = Parser("Prints the most probable classes of images, by a trained run or by a weights file.", _HELP_AFTER)
    parser.add_argument("--workdir", type=run_folder_type, help="the folder of the run that predicts")
    parser.add_argument("--weights", help="a file that mnv2_jax.convert wrote, or the name of published weights")
    parser.add_argument(
        "--modules", default="", metavar="A,B", help="modules that register the task or model of --weights"
    )
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        help="checkpoint of the run (default: latest; best if the config sets train.patience)",
    )
    parser.add_argument(
        "--top", type=_at_least_one, metavar="K", help="classes to print for each image (default: 5; at most all)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list to standard output, and nothing else there"
    )
    parser.add_argument(
        "--store-logits",
        type=folder_type,
        metavar="FILE.npz",
        help="instead of predicting, store the logits of the training images of --config in this file",
    )
    parser.add_argument(
        "--config",
        metavar="NAME[:ARG]",
        help="with --store-logits: the config that names the data, as for mnv2_jax.main",
    )
    parser.add_argument(
        "--config.KEY",
        metavar="VALUE",
        help="with --store-logits: set one key of the config, as in --config.data.holdout_fraction=0.1",
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE_OR_FOLDER",
        help="image files, or folders whose images are all taken, with those of subfolders, in sorted order",
    )
    args, overrides = parser.parse(sys.argv[1:])
    if (args.workdir is None) == (args.weights is None):
        raise UserError("give either --workdir, the folder of a trained run, as in runs/w0_35, or --weights, a file")
    if args.modules and not args.weights:
        raise UserError(
            f"--modules={args.modules} is used with --weights only, as a run remembers its modules; leave it out"
        )
    if args.weights and args.checkpoint:
        raise UserError(f"--checkpoint={args.checkpoint} is used with --workdir only; leave it out")
    if args.store_logits is not None:
        _store_logits(args, overrides)
        return
    if overrides or args.config:
        setting = f".{overrides[0]}" if overrides else f"={args.config}"
        raise UserError(
            f"--config{setting} is used with --store-logits only, as the weights define how they predict; leave it out"
        )
    if not args.images:
        raise UserError("no image is given; name image files or folders after the flags")
    paths, other_files = find_images(args.images)
    for line in folder.left_out(other_files):
        print(line, file=sys.stderr)
    weights = _open(args)
    decoder, answers = answers_for(weights, paths, args.top)
    if args.workdir is not None:
        print(*weights.info.notes, sep="\n", file=sys.stderr)  # which checkpoint was used
    if args.json:
        print(json.dumps(_as_json(decoder, paths, answers)))
        return
    for path, answer in zip(paths, answers, strict=True):
        print(path, *(f"  {line}" for line in decoder.to_text(answer)), sep="\n")


def _open(args: argparse.Namespace) -> Weights:
    # JAX takes seconds to import; a mistyped flag or path should fail before that.
    from mnv2_jax.processes import runtime

    runtime.configure()  # before JAX is used, or the error for missing devices would blame the weights
    if args.workdir is not None:
        from mnv2_jax.runs.weights import read_run_weights

        return read_run_weights(args.workdir, args.checkpoint)
    from mnv2_jax.registry import import_modules
    from mnv2_jax.weights.load import load_weights

    import_modules(filter(None, args.modules.split(",")))
    return load_weights(args.weights)


def _store_logits(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    unused = [("--top", args.top), ("--json", args.json), (str(args.images[0]) if args.images else "", args.images)]
    if unused_flags := [flag for flag, value in unused if value]:
        raise UserError(f"--store-logits uses the training images of --config; leave {unused_flags[0]} out")
    if args.config is None:
        raise UserError(
            "--store-logits needs --config, the config that names the training images; as in --config=w0_35"
        )
    settings = config.load(args.config, overrides).config

    from mnv2_jax.training.storing import store_logits

    outputs.drop_errors(sys.stdout)  # the answer is the file
    count = store_logits(args.store_logits, _open(args), settings)
    print(f"{args.store_logits}: logits of {count} images; train on them with --config.distill.logits")


def find_images(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Expands folders into the images below them, sorted; a path of a file is taken whatever its name.

    Returns:
      The images, and the other files of the folders, which were left out.

    Raises:
      UserError: if a path doesn't exist, or a folder has no image.
    """
    images: list[str] = []
    other_files: list[str] = []
    for path in inputs:
        if os.path.isfile(path):
            images.append(path)
        elif os.path.isdir(path):
            folder_images, folder_others = folder.find_images(path)
            if not folder_images:
                raise UserError(
                    "; ".join((f"{path}: no image that can be read in this folder", *folder.left_out(folder_others)))
                )
            images += folder_images
            other_files += folder_others
        else:
            raise UserError(f"{path}: no such image or folder; correct the path")
    return images, other_files


def predict(weights: Weights, paths: Sequence[str], top: int | None = None) -> list[dict[str, Any]]:
    """Predicts the classes of image files; see `answers_for` for arguments and errors.

    Returns:
      A dict for each image: its "path", and the entries of `Answers.to_json`. For classification these are ``"top":
      [{"index", "label", "probability"}]``, the most probable class first.
    """
    decoder, answers = answers_for(weights, paths, top)
    return _as_json(decoder, paths, answers)


def _as_json(decoder: Answers, paths: Sequence[str], answers: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"path": path, **decoder.to_json(answer)} for path, answer in zip(paths, answers, strict=True)]


def answers_for(weights: Weights, paths: Sequence[str], top: int | None = None) -> tuple[Answers, list[Any]]:
    """Runs the network on image files and decodes its outputs.

    Args:
      weights: the model, its variables, and how it wants images preprocessed.
      paths: paths of image files, at least one.
      top: largest number of answers for each image, for tasks that give several; None: the default of the task.

    Returns:
      The decoder, which turns answers into JSON and text, and the answer for each image.

    Raises:
      UserError: if images can't be read (it names all that can't be decoded), or if outputs are NaN or infinite.
    """
    import jax  # takes seconds; a mistyped flag or path should fail before that
    import jax.numpy as jnp

    from mnv2_jax.ops.augment import normalise
    from mnv2_jax.processes import runtime
    from mnv2_jax.registry import TASKS

    runtime.configure()
    model, variables, info = weights
    data = config.build({"data": dataclasses.asdict(info.preprocessing)}).data
    decoder: Answers = TASKS.find(info.task).answers(weights, top)
    variables = jax.device_put(variables)

    @jax.jit
    def answer(variables: Any, images: Any) -> Any:
        outputs, _ = model.apply(variables, normalise(images, data.mean, data.std))
        finite = [jnp.isfinite(leaf.reshape(len(images), -1)).all(axis=1) for leaf in jax.tree.leaves(outputs)]
        return decoder.decode(outputs), jnp.stack(finite).all(axis=0)

    answers: list[Any] = []
    damaged: list[str] = []
    # All batches have one size, a power of two, so that one program is compiled and is often in the cache already.
    size = min(BATCH, 1 << (len(paths) - 1).bit_length())
    for start in range(0, len(paths), size):
        chunk = paths[start : start + size]
        images = np.zeros((size, data.resolution, data.resolution, 3), np.uint8)
        for row, path in enumerate(chunk):
            try:
                images[row] = _read(path, data)
            except DamagedImageError as error:
                damaged.append(str(error))
        if damaged:  # there will be no answer; read the other images only to name all that are damaged
            continue
        decoded, is_finite = jax.device_get(answer(variables, images))
        for row, path in enumerate(chunk):
            if not is_finite[row]:
                raise UserError(f"{path}: the network's outputs are NaN or infinite; its weights are bad, give others")
            answers.append(jax.tree.map(lambda leaf, row=row: leaf[row], decoded))
    if damaged:
        raise damaged_images(damaged, f"{len(paths):,} images")
    return decoder, answers


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
