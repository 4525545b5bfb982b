"""Converts weights of a run or of another library to one file: ``python -m mnv2_jax.convert --model=NAME IN OUT``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING, get_args

from mnv2_jax import outputs
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser
from mnv2_jax.json_files import read_text
from mnv2_jax.weights.conventions import Source

if TYPE_CHECKING:
    from mnv2_jax.weights.file import Weights

_HELP_AFTER = """\
WEIGHTS is one of
  a file of torchvision or timm (.pth, .safetensors), CoreNet (.pt), Keras (.h5, .weights.h5, .keras) or TFLite
    (.tflite, float or quantised), or a network of torchvision, CoreNet, transformers or TFLite that gives a class
    to each pixel (DeepLabv3, LR-ASPP). The command recognises the library. A PyTorch file may be a training checkpoint,
    however it is wrapped (.pth.tar, Lightning's .ckpt). If it holds both averaged (EMA) and raw weights, the average
    is taken, as timm does
  the name of published weights, which are downloaded once: timm/mobilenetv2_100.ra_in1k, torchvision/mobilenet_v2.v2
  the folder of a run
  with --to=timm, a file that this command wrote
OUT holds the weights, the model, its preprocessing and the names of its classes. TensorFlow's 1001 classes become
ImageNet's 1000. PyTorch files need torch; Keras and TFLite files and names of timm need the extra "convert".

examples:
  python -m mnv2_jax.convert --model=mobilenet_v2 mobilenet_v2_1.0_224.tflite v2.safetensors
  python -m mnv2_jax.convert --model=mobilenet_v1 --width=0.25 mobilenet_2_5_128_tf.h5 v1.safetensors
  python -m mnv2_jax.convert timm/mobilenetv3_large_100.ra_in1k v3.safetensors
  python -m mnv2_jax.convert model_best.pth.tar best.safetensors
  python -m mnv2_jax.convert runs/w0_35 mine.safetensors
  python -m mnv2_jax.convert --to=timm mine.safetensors for_timm.safetensors
"""
LIBRARIES = get_args(Source)


def main() -> None:
    """Reads the flags and the weights, and writes the file."""
    parser = Parser("Converts weights to one file for this project, or exports them for timm.", _HELP_AFTER)
    parser.add_argument("--model", metavar="NAME", help="the network that the file holds, as in mobilenet_v2")
    parser.add_argument("--width", type=float, help="width multiplier of the network (default: 1.0)")
    parser.add_argument(
        "--width_rule", metavar="RULE", help="how the network rounds its widths (default: as the library does)"
    )
    parser.add_argument("--depth", type=float, help="depth multiplier of the network (default: 1.0)")
    parser.add_argument(
        "--activation", metavar="NAME", help="relu or relu6 (default: what the file says or the library uses)"
    )
    parser.add_argument(
        "--library",
        choices=LIBRARIES,
        help="the library that wrote the file (default: recognised from the file); timm_tf: timm's models named tf_…",
    )
    parser.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="resolution of the images (default: the file's, or 224)"
    )
    parser.add_argument(
        "--mean", type=_three, metavar="R,G,B", help="mean of pixels that run from 0 to 1 (default: the library's)"
    )
    parser.add_argument(
        "--std", type=_three, metavar="R,G,B", help="standard deviation of these pixels (default: the library's)"
    )
    parser.add_argument(
        "--eval_crop_fraction",
        type=float,
        metavar="F",
        help="share of the short side that the centre crop keeps (default: 0.875)",
    )
    parser.add_argument("--interpolation", metavar="NAME", help="bilinear or bicubic (default: the library's)")
    parser.add_argument(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        help="shrink images with antialiasing, as Pillow does and TensorFlow does not (default: as the library does)",
    )
    parser.add_argument("--labels", metavar="FILE", help="a text file with the names of the classes, one a line")
    parser.add_argument(
        "--take",
        metavar="WHICH",
        help="which network of a PyTorch checkpoint that holds several: ema, raw, or its key in the file"
        " (default: ema if there is one)",
    )
    parser.add_argument(
        "--to",
        choices=("mnv2_jax", "timm"),
        default="mnv2_jax",
        help="format of OUT; timm: a state dict with timm's names (default: mnv2_jax)",
    )
    parser.add_checkpoint_flag()
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--list", action="store_true", help="list the published weights that have a name; takes no other argument"
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="a file, the name of published weights, or a run folder")
    parser.add_argument(
        "out", metavar="OUT", type=pathlib.Path, help="file to write, *.safetensors; with --to=timm also *.pth"
    )
    if sys.argv[1:] == ["--list"]:
        _list()
        return
    args, overrides = parser.parse(sys.argv[1:])
    if overrides:
        raise UserError(f"--config.{overrides[0]}: convert uses no config; leave it out")
    endings = (".safetensors", ".pth") if args.to == "timm" else (".safetensors",)
    if args.out.suffix not in endings:
        raise UserError(f"{args.out}: OUT must end in {' or '.join(endings)}")
    if os.path.exists(args.out) and not args.force:
        raise UserError(f"{args.out}: already exists; give another name, or --force to replace it")

    from mnv2_jax.processes import together
    from mnv2_jax.weights.by_name import timm_options, to_timm  # imports JAX, which takes seconds: after the checks
    from mnv2_jax.weights.file import describe, save_weights
    from mnv2_jax.weights.state_dicts import write_state_dict

    together.check_devices()
    weights = _open(args)
    notes = list(weights.info.notes)
    if args.to == "timm":
        write_state_dict(args.out, to_timm(weights))
        options = ", ".join(f"{key}={value!r}" for key, value in timm_options(weights).items())
        notes.append(f"for timm.create_model(NAME, {options}), where NAME is timm's name of this network")
    else:
        save_weights(args.out, *weights)
    outputs.drop_errors(sys.stdout)  # the file is written, so a broken standard output is no error
    print(f"{args.out}: {describe(weights.model)}, of {weights.info.source}")
    for note in notes:
        print(f"  {note}")
    for key, value in dataclasses.asdict(weights.info.preprocessing).items():
        print(f"  {key} {value if isinstance(value, str) else json.dumps(value)}")


def _list() -> None:
    """Prints the published weights, each with its network and its published accuracy."""
    from mnv2_jax.models.published import published
    from mnv2_jax.weights.hub import DATE, list_weights, model_of

    print(f"Published weights by name, as of {DATE}. Names of timm also work without their tag, or with another tag.\n")
    rows = []
    for name in list_weights():
        model = dict(model_of(name))
        reported = (row for row in published(model["name"]) if row.get("weights") == name)
        top1 = next((f"{row['top1']:.2f} % top-1 at {row['resolution']} px" for row in reported), "")
        rows.append((name, " ".join([model.pop("name"), *(f"{key}={value}" for key, value in model.items())]), top1))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, network, top1 in rows:
        print(f"{name:<{widths[0]}}  {network:<{widths[1]}}  {top1}".rstrip())


def _open(args: argparse.Namespace) -> Weights:
    from mnv2_jax.weights.load import kind_of, load_weights

    options = {key: getattr(args, key) for key in ("width", "width_rule", "depth", "activation")}
    options = {key: value for key, value in options.items() if value is not None}
    fields = ("resolution", "mean", "std", "eval_crop_fraction", "interpolation", "antialias")
    preprocessing = {key: getattr(args, key) for key in fields if getattr(args, key) is not None}
    flags = {"library": args.library, "preprocessing": preprocessing or None, "take": args.take, **options}
    labels = read_labels(args.labels) if args.labels is not None else None
    source = os.path.expanduser(args.weights)
    if labels and os.path.isfile(source) and kind_of(pathlib.Path(source)) == "ours":
        return _add_labels(source, load_weights(source, args.model, **flags), labels)
    if os.path.isdir(source):
        from mnv2_jax.runs.weights import read_run_weights

        run = read_run_weights(pathlib.Path(source), args.checkpoint)
        if any(value is not None for value in (args.model, labels, *flags.values())):
            raise UserError(f"{args.weights}: a run records its own model; leave --model and its options out")
        return run
    if args.checkpoint:
        raise UserError(f"--checkpoint={args.checkpoint} is used with a run folder only; leave it out")
    return load_weights(args.weights, args.model, labels=labels, **flags)


def _add_labels(path: str, weights: Weights, labels: list[str]) -> Weights:
    """Adds class names to the weights of one of our own files, which has none."""
    if weights.info.labels:
        raise UserError(f"{path}: has class names already; leave --labels out")
    if len(labels) != weights.model.num_classes:
        raise UserError(f"{path}: {len(labels)} labels for {weights.model.num_classes} classes; give one for each")
    return weights._replace(info=dataclasses.replace(weights.info, labels=tuple(labels)))


def read_labels(file: str) -> list[str]:
    """Reads a file with one class name a line, in UTF-8 or UTF-16 with a byte-order mark.

    Raises:
      UserError: if the file can't be read, has no name, or has a name twice.
    """
    path = os.path.expanduser(file)
    try:
        text = read_text(path)
    except UserError as error:
        raise UserError(f"--labels={file}: {str(error).removeprefix(f'{path}: ')}") from error
    names = {number: line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    if not names:
        raise UserError(f"--labels={file}: holds no name; give one a line")
    first_line: dict[str, int] = {}
    for number, name in names.items():
        if name in first_line:
            raise UserError(
                f"--labels={file}: {name!r} stands in lines {first_line[name]} and {number}; name each class"
                " differently (ImageNet's 1000 classes need no file)"
            )
        first_line[name] = number
    return list(names.values())


def _three(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers, as in 0.5,0.5,0.5")
    return values


if __name__ == "__main__":
    exit_on_user_error(main)
