"""Weights of other libraries, and of runs, as one file: ``python -m mnv2_jax.convert --model=NAME WEIGHTS OUT``."""

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
    (.tflite, float or quantised); whose it is, is recognised. PyTorch's may be a checkpoint of a training, wrapped in
    any way (.pth.tar, Lightning's .ckpt): of an average (EMA) and raw weights the average is taken, as timm does
  a name of published weights, fetched once: timm/mobilenetv2_100.ra_in1k, torchvision/mobilenet_v2.v2
  the folder of a run
  a file that this command wrote, with --to=timm
OUT gets the model, how it wants its images and the names of its classes with the weights. TensorFlow's 1001 classes
become ImageNet's 1000. PyTorch's files need torch, Keras and TFLite files and timm's names the extra "convert".

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
    """Flags, weights, file."""
    parser = Parser("Converts weights into one file for this project, or back for timm.", _HELP_AFTER)
    parser.add_argument("--model", metavar="NAME", help="which network the file holds, as mobilenet_v2")
    parser.add_argument("--width", type=float, help="its width multiplier (default: 1.0)")
    parser.add_argument("--width_rule", metavar="RULE", help="how its widths round (default: the library's)")
    parser.add_argument("--depth", type=float, help="its depth multiplier (default: 1.0)")
    parser.add_argument("--activation", metavar="NAME", help="relu or relu6 (default: the file's or the library's)")
    parser.add_argument(
        "--library", choices=LIBRARIES, help="whose file it is (default: recognised); timm_tf: timm's tf_ models"
    )
    parser.add_argument("--resolution", type=int, metavar="PIXELS", help="of the images (default: the file's, or 224)")
    parser.add_argument("--mean", type=_three, metavar="R,G,B", help="of pixels from 0 to 1 (default: the library's)")
    parser.add_argument("--std", type=_three, metavar="R,G,B", help="likewise, the deviation")
    parser.add_argument("--eval_crop_fraction", type=float, metavar="F", help="of the short side (default: 0.875)")
    parser.add_argument("--interpolation", metavar="NAME", help="bilinear or bicubic (default: the library's)")
    parser.add_argument(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        help="whether all pixels count where images shrink, as in Pillow, not in TensorFlow (default: the library's)",
    )
    parser.add_argument("--labels", metavar="FILE", help="a name of a class a line, in their order")
    parser.add_argument(
        "--take",
        metavar="WHICH",
        help="of several networks in a PyTorch checkpoint: ema, raw, or a place in it (default: ema if it has one)",
    )
    parser.add_argument(
        "--to", choices=("mnv2_jax", "timm"), default="mnv2_jax", help="timm: a state dict of timm's names"
    )
    parser.add_argument(
        "--checkpoint", choices=("latest", "best"), help="of a run (default: latest; best with patience)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--list", action="store_true", help="by itself: the published weights that can be had by name")
    parser.add_argument("weights", metavar="WEIGHTS", help="a file, a name, or the folder of a run")
    parser.add_argument("out", metavar="OUT", type=pathlib.Path, help="ends in .safetensors; with --to=timm also .pth")
    if sys.argv[1:] == ["--list"]:
        _list()
        return
    args, overrides = parser.parse(sys.argv[1:])
    if overrides:
        raise UserError(f"--config.{overrides[0]}: there is no config to convert by; leave it out")
    endings = (".safetensors", ".pth") if args.to == "timm" else (".safetensors",)
    if args.out.suffix not in endings:
        raise UserError(f"{args.out}: OUT must end in {' or '.join(endings)}")
    if os.path.exists(args.out) and not args.force:
        raise UserError(f"{args.out}: is there already; give another name, or --force to replace it")

    from mnv2_jax.processes import together
    from mnv2_jax.weights.by_name import timm_options, to_timm  # JAX takes seconds; a mistyped flag doesn't wait for it
    from mnv2_jax.weights.file import describe, save_weights
    from mnv2_jax.weights.state_dicts import write_state_dict

    together.check_devices()
    weights = _open(args)
    notes = list(weights.info.notes)
    if args.to == "timm":
        write_state_dict(args.out, to_timm(weights))
        told = ", ".join(f"{key}={value!r}" for key, value in timm_options(weights).items())
        notes.append(f"for timm.create_model(NAME, {told}), NAME being timm's of the same network")
    else:
        save_weights(args.out, *weights)
    outputs.drop_errors(sys.stdout)  # the file is there
    print(f"{args.out}: {describe(weights.model)}, of {weights.info.source}")
    for note in notes:
        print(f"  {note}")
    for key, value in dataclasses.asdict(weights.info.preprocessing).items():
        print(f"  {key} {value if isinstance(value, str) else json.dumps(value)}")


def _list() -> None:
    """Prints the published weights, with their network and what is reported of it."""
    from mnv2_jax.models.published import published
    from mnv2_jax.weights.hub import DATE, list_weights, model_of

    print(f"Published weights that can be had by name, as of {DATE}; a tag of timm's may be left out or be another.\n")
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
    asked = {key: getattr(args, key) for key in fields if getattr(args, key) is not None}
    said = {"library": args.library, "preprocessing": asked or None, "take": args.take, **options}
    labels = read_labels(args.labels) if args.labels is not None else None
    source = os.path.expanduser(args.weights)
    if labels and os.path.isfile(source) and kind_of(pathlib.Path(source)) == "ours":
        return _labelled(source, load_weights(source, args.model, **said), labels)
    if os.path.isdir(source):
        from mnv2_jax.runs.weights import read_run_weights

        run = read_run_weights(pathlib.Path(source), args.checkpoint)
        if any(value is not None for value in (args.model, labels, *said.values())):
            raise UserError(f"{args.weights}: a run says itself what it holds; leave the model and its options out")
        return run
    if args.checkpoint:
        raise UserError(f"--checkpoint={args.checkpoint} is read with the folder of a run only; leave it out")
    return load_weights(args.weights, args.model, labels=labels, **said)


def _labelled(path: str, weights: Weights, labels: list[str]) -> Weights:
    """Names for the classes of a file of ours that has none."""
    if weights.info.labels:
        raise UserError(f"{path}: says itself what its classes are; leave --labels out")
    if len(labels) != weights.model.num_classes:
        raise UserError(f"{path}: {len(labels)} labels for {weights.model.num_classes} classes; give one each")
    return weights._replace(info=dataclasses.replace(weights.info, labels=tuple(labels)))


def read_labels(given: str) -> list[str]:
    """The names in a file, a line each; in UTF-8, or what Windows calls Unicode.

    Raises:
      UserError: if it can't be read, or names nothing or something twice.
    """
    path = os.path.expanduser(given)
    try:
        text = read_text(path)
    except UserError as error:
        raise UserError(f"--labels={given}: {str(error).removeprefix(f'{path}: ')}") from error
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    if not lines:
        raise UserError(f"--labels={given}: holds no name; give one a line")
    first: dict[str, int] = {}
    for number, name in lines.items():
        if name in first:
            raise UserError(
                f"--labels={given}: {name!r} stands in lines {first[name]} and {number}; name each class differently"
                " (ImageNet's 1000 classes are known without)"
            )
        first[name] = number
    return list(lines.values())


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
