"""Predicts what is in images: ``python -m mnv2_jax.predict --weights=v2.safetensors IMAGE_OR_FOLDER...``.

With ``--store-logits`` it stores a teacher's logits for all training images of a config, for a student to learn from.
"""

from __future__ import annotations

import argparse
import codecs
import csv
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from mnv2_jax import config, outputs
from mnv2_jax.data import folder
from mnv2_jax.data.cores import num_cores
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, folder_type, modules_of, run_folder_type

if TYPE_CHECKING:
    from mnv2_jax.tasks.base import Answers
    from mnv2_jax.weights.file import Weights

_HELP_AFTER = """\
Images are preprocessed as in evaluation: resized, cropped and normalised as the run's config or the weights file says.
Rows are printed as they come. A file that can't be read or decoded is a row with its error; the command goes on, and
exits with code 2 at the end. With --workdir, standard error names the checkpoint that was used.

--json prints one list to standard output, an element a line:
  [{"path": "a.jpg", "top": [{"index": 3, "label": "cat", "probability": 0.98}, ...]}, {"path": ..., "error": ...}]
or "boxes", of which each has x0, y0, x1 and y1 in pixels, too.
--csv prints a line for each class or box of an image: path, error, (x0, y0, x1, y1,) index, label, probability.

--store-logits writes the logits of every training image of --config to a file for --config.distill.logits. The images
are preprocessed as in evaluation, and only the data section of the config is used.

examples:
  python -m mnv2_jax.predict --workdir=runs/w0_35 a.jpg b.png
  python -m mnv2_jax.predict --workdir=runs/w0_35 --checkpoint=best --top=1 --json photos/
  python -m mnv2_jax.predict --weights=v2.safetensors photos/
  python -m mnv2_jax.predict --weights=timm/mobilenetv2_100.ra_in1k photos/
  python -m mnv2_jax.predict --workdir=runs/detect_folder --min-confidence=0.3 --out=drawn photos/
  python -m mnv2_jax.predict --workdir=runs/w1_0 --config=w0_35:data=folder:DIR --store-logits=w1_0.npz
"""


def _parser() -> Parser:
    parser = Parser(
        "Prints the classes of images, or the boxes of objects in them, by a trained run or by a weights file.",
        _HELP_AFTER,
    )
    parser.add_argument("--workdir", type=run_folder_type, help="the folder of the run that predicts")
    parser.add_argument("--weights", help="a file that mnv2_jax.convert wrote, or the name of published weights")
    parser.add_modules_flag()
    parser.add_checkpoint_flag()
    parser.add_argument(
        "--top",
        type=_at_least_one,
        metavar="K",
        help="most classes or boxes to print for each image (default: 5 classes; data.eval_max_boxes boxes)",
    )
    parser.add_argument(
        "--min-confidence",
        type=_share,
        metavar="P",
        help="leave out classes or boxes less probable than P, from 0 to 1 (default: 0; of boxes 0.5)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list to standard output, and nothing else there"
    )
    parser.add_argument("--csv", action="store_true", help="print CSV to standard output, and nothing else there")
    parser.add_argument(
        "--from-list", metavar="FILE", help="read the paths of the images from a file, one a line; -: standard input"
    )
    parser.add_argument(
        "--workers",
        type=_whole,
        metavar="N",
        help=f"processes that decode images (default: 0 for up to {_FEW_IMAGES} images, the number of cores for more)",
    )
    parser.add_argument(
        "--out",
        type=folder_type,
        metavar="DIR",
        help="also write pictures into this folder: of a segmentation the classes of each pixel (NAME.png, a number"
        " each) and an overlay with its legend (NAME-overlay.png), of a detection the boxes (NAME-boxes.png)",
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
    return parser


def main() -> None:
    """Reads the flags and the images, and prints the predictions."""
    args, overrides = _parser().parse(sys.argv[1:])
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
    if args.json and args.csv:
        raise UserError("--json and --csv both describe standard output; give one of them")
    if bool(args.images) == (args.from_list is not None):
        raise UserError("give either images and folders after the flags, or a list of paths with --from-list")
    if args.from_list is not None:
        paths, other_files = list_images(args.from_list), list[str]()
    else:
        paths, other_files = find_images(args.images)
    for line in folder.left_out(other_files):
        print(line, file=sys.stderr)
    weights = _open(args)

    from mnv2_jax.tasks.base import HasUsualConfidence
    from mnv2_jax.tasks.predictor import Predictor

    predictor = Predictor(weights, top=args.top)
    usual = predictor.answers.usual_confidence if isinstance(predictor.answers, HasUsualConfidence) else 0.0
    least = usual if args.min_confidence is None else args.min_confidence
    if args.workdir is not None:
        print(*weights.info.notes, sep="\n", file=sys.stderr)  # which checkpoint was used
    failed: list[str] = []
    files = _Files(args.out, paths, predictor.answers) if args.out is not None else None

    def rows() -> Iterator[tuple[str, dict[str, Any] | UserError]]:
        for path, answer in predictor.stream_arrays(paths, _num_workers(args.workers, len(paths))):
            if isinstance(answer, UserError):
                failed.append(path)
                yield path, answer
                continue
            entries = predictor.answers.to_json(answer)
            _check_confidence(entries, least)
            if files is not None:
                files.write(path, answer, least)
            yield path, entries

    print_rows = _print_json if args.json else _print_csv if args.csv else _print_text
    print_rows(rows(), predictor.answers, least)
    if failed:
        raise UserError(
            f"{len(failed):,} of {len(paths):,} images can't be read (the first: {failed[0]}); their rows say why"
        )


class _Files:
    """Writes the files of answers (`tasks.base.HasFiles`) into a folder, named like the images."""

    def __init__(self, folder: pathlib.Path, paths: Sequence[str], answers: Answers) -> None:
        from mnv2_jax.tasks.base import HasFiles

        if not isinstance(answers, HasFiles):
            raise UserError(f"--out={folder}: the answers of these weights are no files; leave --out out")
        self._folder, self._answers = folder, answers
        common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        self._names = {path: os.path.splitext(os.path.relpath(os.path.abspath(path), common))[0] for path in paths}
        images = {os.path.realpath(path) for path in paths}
        owners: dict[str, str] = {}
        for path, name in self._names.items():
            for file in (f"{name}{ending}" for ending in answers.endings):
                if file in owners:
                    raise UserError(f"--out={folder}: {owners[file]} and {path} would be written to the same {file}")
                if os.path.realpath(folder / file) in images:
                    raise UserError(f"--out={folder}: {file} would replace an image to predict; give another folder")
                owners[file] = path

    def write(self, path: str, answer: Any, min_confidence: float) -> None:
        """Writes the files of one image, without what is less probable.

        Raises:
          UserError: if they can't be written.
        """
        from mnv2_jax.json_files import write_bytes, writing
        from mnv2_jax.tasks.predictor import pixels_of

        for ending, content in self._answers.files(pixels_of(path), answer, min_confidence).items():
            file = self._folder / f"{self._names[path]}{ending}"
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, content)


_FEW_IMAGES = 200
"""Number of images up to which starting processes takes longer than it saves."""


def _num_workers(requested: int | None, num_images: int) -> int:
    return requested if requested is not None else num_cores() if num_images > _FEW_IMAGES else 0


def _open(args: argparse.Namespace) -> Weights:
    # JAX takes seconds to import; a mistyped flag or path should fail before that.
    from mnv2_jax.processes import runtime

    runtime.configure()  # before JAX is used, or the error for missing devices would blame the weights
    if args.workdir is not None:
        from mnv2_jax.runs.weights import read_run_weights

        return read_run_weights(args.workdir, args.checkpoint)
    from mnv2_jax.registry import import_modules
    from mnv2_jax.weights.load import load_weights

    import_modules(modules_of(args))
    return load_weights(args.weights)


def _store_logits(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    unused = [
        ("--top", args.top),
        ("--json", args.json),
        ("--csv", args.csv),
        ("--from-list", args.from_list),
        ("--min-confidence", args.min_confidence is not None),
        ("--workers", args.workers is not None),
        ("--out", args.out is not None),
        (str(args.images[0]) if args.images else "", args.images),
    ]
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


def list_images(file: str) -> list[str]:
    """Reads paths of images, one a line; ``-`` stands for standard input.

    Raises:
      UserError: if the file can't be read, or lists nothing.
    """
    name = "standard input" if file == "-" else file
    try:
        text = sys.stdin.buffer.read() if file == "-" else pathlib.Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"--from-list={file}: can't be read ({error.strerror}); correct the path") from error
    lines = text.removeprefix(codecs.BOM_UTF8).split(b"\n")
    paths = [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]
    if not paths:
        raise UserError(f"--from-list={file}: {name} lists no path; give one a line")
    return paths


Rows: TypeAlias = Iterable[tuple[str, "dict[str, Any] | UserError"]]
"""Paths, each with the entries of `tasks.base.Answers.to_json`, or with the error if the file can't be read."""


def _check_confidence(entries: dict[str, Any], least: float) -> None:
    """Refuses --min-confidence for answers that have no probability, such as the classes of a segmentation."""
    if least and any("probability" not in row for row in _rows_of(entries)):
        raise UserError(
            f"--min-confidence={least:g}: the answers of these weights have no probability; leave the flag out"
        )


def _confident(entries: dict[str, Any], least: float) -> dict[str, Any]:
    """Leaves out the answers whose probability is below ``least``."""

    def kept(value: Any) -> Any:
        return [row for row in value if row.get("probability", 1) >= least] if _is_rows(value) else value

    return {key: kept(value) for key, value in entries.items()}


def _rows_of(entries: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what an image can have several of."""
    return [row for value in entries.values() if _is_rows(value) for row in value]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _print_text(rows: Rows, answers: Answers, least: float) -> None:
    for path, answer in rows:
        if isinstance(answer, UserError):
            lines = [f"error: {str(answer).removeprefix(f'{path}: ')}"]
        else:
            lines = answers.to_text(_confident(answer, least)) or [f"no answer of probability {least:g} or more"]
        print(path, *(f"  {line}" for line in lines), sep="\n", flush=True)


def _print_json(rows: Rows, answers: Answers, least: float) -> None:
    """Prints a list with an element a line, so that a reader of lines gets each as soon as it is there."""
    del answers
    start = "["
    for path, answer in rows:
        entries = {"error": str(answer)} if isinstance(answer, UserError) else _confident(answer, least)
        print(start, json.dumps({"path": path, **entries}), sep="\n", end="", flush=True)
        start = ","
    print("\n]")


def _print_csv(rows: Rows, answers: Answers, least: float) -> None:
    """Prints a line for each answer of an image, and one for an image without an answer."""
    del answers
    writer, head = csv.writer(sys.stdout, lineterminator="\n"), list[str]()
    waiting: list[tuple[str, str]] = []  # rows before the first answer, whose keys become the head
    for path, answer in rows:
        entries = {} if isinstance(answer, UserError) else answer
        single = {key: value for key, value in entries.items() if not _is_rows(value)}
        values = [{**single, **row} for row in _rows_of(entries)] or ([single] if single else [])
        if values and not head:
            head = list(values[0])
            writer.writerow(["path", "error", *head])
        values = [row for row in values if row.get("probability", 1) >= least]
        if not values:
            waiting.append((path, str(answer) if isinstance(answer, UserError) else ""))
        if head:
            writer.writerows([*row, *([""] * len(head))] for row in waiting)
            waiting = []
        writer.writerows([path, "", *(row.get(key, "") for key in head)] for row in values)
        sys.stdout.flush()
    if not head:
        writer.writerows([("path", "error"), *waiting])


def _at_least_one(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 1")
    return value


if __name__ == "__main__":
    exit_on_user_error(main)
