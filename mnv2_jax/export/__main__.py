"""Exports a network for other runtimes, and checks each file: ``python -m mnv2_jax.export RUN_OR_FILE --out=DIR``."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, folder_type, modules_of

if TYPE_CHECKING:
    from mnv2_jax.export.files import Row

_HELP_AFTER = """\
Every file is loaded in its own runtime in a fresh process, and compared with the JAX model on images that calibration
didn't use. If it differs, it is renamed *.rejected, and the exit code is 1. The input is [batch, height, width, 3],
RGB. Labels, preprocessing and source are in the file, or in a .json beside StableHLO. With the word benchmark in front
of RUN_OR_FILE every format and precision is measured, and the files are kept only where --out is given.

formats (--format=A,B; default: those of the first three that have the precision): stablehlo, tflite (LiteRT), onnx,
coreml (batch 1; runs on macOS only: elsewhere its file is read again and computed by JAX), and
web (a folder with a page that computes the network in a browser)
precisions (--precision=A,B; default: float32):
  float32  as the network was trained
  float16  weights in half precision, computed in float32 (tflite, onnx, web), or in half precision too (coreml)
  dynamic  kernels in 8 bits, values in floats (tflite, coreml)
  int8     kernels and values in 8 bits; calibrated on training images of the run or of --data, or on those of a
           folder, --calibration=FOLDER (tflite, onnx, web)

examples:
  python -m mnv2_jax.export runs/w0_35-digits --out=exported
  python -m mnv2_jax.export runs/finetune --format=tflite --precision=int8 --eval --out=exported
  python -m mnv2_jax.export v2.safetensors --precision=int8 --data=folder:photos --out=exported
  python -m mnv2_jax.export timm/mobilenetv2_100.ra_in1k --format=onnx --resolution=192 --outputs=answers --out=exported
  python -m mnv2_jax.export runs/w0_35-digits --format=web --out=exported
  python -m mnv2_jax.export benchmark runs/finetune
"""
_CHECKED = 256
"""Most images on which a file is checked."""


def main() -> None:
    """Reads the flags, writes and checks the files, and prints a table."""
    argv = sys.argv[1:]
    is_benchmark = argv[:1] == ["benchmark"]
    parser = Parser("Exports a network for other runtimes, and checks each file that it writes.", _HELP_AFTER)
    _add_flags(parser, is_benchmark)
    args, overrides = parser.parse(argv[1:] if is_benchmark else argv)
    if args.eval and args.outputs == "answers":
        raise UserError("--eval needs the network's outputs; leave --outputs=answers out")

    from mnv2_jax.export import files, formats  # JAX takes seconds to import

    chosen = formats.choose(args.format, args.precision)
    is_page = any(form == "web" for form, _ in chosen)
    if args.runtime and not is_page:
        raise UserError(f"--runtime={args.runtime}: only a page needs it; add --format=web, or leave it out")
    if is_page and (args.pixels, args.outputs) != ("uint8", "raw"):
        raise UserError("--format=web: a page gives uint8 and takes raw outputs; leave out --pixels and --outputs")
    if args.out is not None:
        if not args.force:
            files.refuse_existing(args.out, _stem(args.source), chosen)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out={args.out}: can't make this folder ({error.strerror}); give another") from error
        return _print(_rows(args, overrides, chosen, args.out, is_benchmark), args)
    with tempfile.TemporaryDirectory() as folder:
        _print(_rows(args, overrides, chosen, pathlib.Path(folder), is_benchmark), args)


def _add_flags(parser: Parser, is_benchmark: bool) -> None:
    parser.add_argument("source", metavar="RUN_OR_FILE", help="a run folder, a file, or the name of published weights")
    parser.add_argument(
        "--out",
        required=not is_benchmark,
        type=folder_type,
        metavar="DIR",
        help="folder for the files (benchmark: none is kept by default)",
    )
    parser.add_argument("--format", metavar="A,B", help="formats, as listed below")
    precisions = "float32,float16,dynamic,int8" if is_benchmark else "float32"
    parser.add_argument("--precision", default=precisions, metavar="A,B", help=f"precisions (default: {precisions})")
    parser.add_checkpoint_flag()
    parser.add_argument(
        "--resolution",
        type=_size,
        metavar="PX|HxW",
        help="height and width, as in 224, or 384x512 for a segmentation (default: that of the weights)",
    )
    parser.add_argument(
        "--pixels", choices=("uint8", "float32"), default="uint8", help="type of the input: 0..255, or 0..1"
    )
    parser.add_argument(
        "--outputs",
        choices=("raw", "answers"),
        default="raw",
        help="raw: logits; answers: the most probable classes and their probabilities, or boxes (default: raw)",
    )
    parser.add_argument(
        "--data", metavar="DATA", help="data for int8 and --eval, as in folder:photos (default: those of the run)"
    )
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="an option of the data, as in --config.data.eval_split=test"
    )
    parser.add_argument(
        "--calibration",
        type=_calibration,
        default=200,
        metavar="N|FOLDER",
        help="number of training images on which int8 is calibrated, or a folder with images for it (default: 200)",
    )
    parser.add_argument(
        "--eval",
        action="store_true",
        help="evaluate every file on the evaluation split, and compare with the JAX model (benchmark: where data are)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="PATH",
        help=f"images or folders to check with, the first {_CHECKED} (default: images of the evaluation split; without"
        " data crops of scikit-learn's two photos)",
    )
    parser.add_argument(
        "--runtime",
        type=folder_type,
        metavar="DIR",
        help="with --format=web: an unpacked onnxruntime-web (default: npm fetches it)",
    )
    parser.add_modules_flag()
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_json_flag()


def _rows(
    args: argparse.Namespace,
    overrides: Sequence[str],
    chosen: Sequence[Any],
    folder: pathlib.Path,
    is_benchmark: bool,
) -> Iterator[Row]:
    """Opens the source and its data, and yields a row for each file. A benchmark leaves out what needs missing data."""
    from mnv2_jax.export import data, evaluation, files, web
    from mnv2_jax.export.formats import Source
    from mnv2_jax.export.function import Exportable, check_finite, in_float32
    from mnv2_jax.processes import runtime
    from mnv2_jax.registry import TASKS, import_modules
    from mnv2_jax.runs.weights import load_weights

    page_runtime = web.read_runtime(args.runtime) if any(form == "web" for form, _ in chosen) else None
    runtime.configure()
    import_modules(modules_of(args))
    weights = in_float32(load_weights(args.source, checkpoint=args.checkpoint))
    check_finite(weights)
    weights, size = TASKS.find(weights.info.task).at_size(weights, args.resolution)
    exportable = Exportable(weights, size, args.pixels, args.outputs)
    calibrates = isinstance(args.calibration, int) and any(precision == "int8" for _, precision in chosen)
    opened = data.open_data(args.source, weights, args.data, overrides, calibrates)
    source = Source(exportable, lambda: data.calibration_images(opened, exportable, args.calibration), page_runtime)
    images = data.check_images(opened, exportable, args.images, _CHECKED)
    evaluator = None
    if is_benchmark and opened is None and isinstance(args.calibration, int):
        print("no data: nothing is calibrated or evaluated; give --data, as in folder:photos", file=sys.stderr)
        chosen = [(form, precision) for form, precision in chosen if precision != "int8"]
    if args.eval or (is_benchmark and opened is not None):
        if opened is None:
            raise UserError("--eval needs labelled images; give --data, as in folder:photos")
        setup = evaluation.open_evaluation(opened, weights, args.source)
        evaluator = files.Evaluator(setup, evaluation.evaluate_network(setup, weights))
    yield from files.make(source, chosen, folder, _stem(args.source), images, evaluator)


def _print(rows: Iterator[Row], args: argparse.Namespace) -> None:
    from mnv2_jax.export.runtimes import STAND_INS

    if args.json:
        written: list[dict[str, Any]] = []
        try:
            written.extend(row.to_json() for row in rows)
        finally:  # files that are right are answered where another is rejected
            print(json.dumps({"files": written}))
        return
    for number, row in enumerate(rows):
        comparison, checked = row.comparison, row.checked
        if not number:
            print("difference: of the largest output; agreement: same first answer as JAX; ms: batch 1, one core / all")
            if comparison is not None:
                print(f"JAX model: {comparison.score} {comparison.network:.2%}")
        line = (
            f"{row.path.name}  {checked.size_mb:.2f} MB  difference {checked.difference:.1e}  agreement"
            f" {checked.agreement:.2%}"
        )
        if checked.ms_one_core is None:
            line += f"  {STAND_INS[row.form]}"
        else:
            line += f"  {checked.ms_one_core:.2f} / {checked.ms_all_cores:.2f} ms"
        if comparison is not None:
            line += f"  {comparison.score} {comparison.file:.2%} ({comparison.file - comparison.network:+.2%}"
            if comparison.low is not None and comparison.high is not None:
                line += f", 95 % interval {comparison.low:+.2%} to {comparison.high:+.2%}"
            line += ")"
        print(line, flush=True)


def _stem(source: str) -> str:
    """Returns the name for files: that of the run, of a file without its ending, or of published weights."""
    path = pathlib.Path(os.path.abspath(os.path.expanduser(source)))  # . and .. have no name
    return path.stem if path.is_file() else path.name


def _size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    sides = (height, width if separator else height)
    if not all(side.isdecimal() and 8 <= int(side) <= 4096 for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a whole number of pixels from 8 to 4096, or two, as in 384x512"
        )
    return int(sides[0]), int(sides[1])


def _calibration(text: str) -> int | pathlib.Path:
    if text and not text.isdecimal():
        return pathlib.Path(text).expanduser()
    if not text or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1, or a folder")
    return int(text)


if __name__ == "__main__":
    exit_on_user_error(main)
