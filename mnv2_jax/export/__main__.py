"""Exports a network for other runtimes, and checks each file: ``python -m mnv2_jax.export RUN_OR_FILE --out=DIR``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, folder_type

if TYPE_CHECKING:
    from mnv2_jax.export.function import Exportable


class _Format(NamedTuple):
    ending: str
    packages: tuple[str, ...]
    """Packages of the extra `export` that writing and checking need."""
    writer: Callable[[], Callable[..., None]]
    is_default: bool = True
    """Whether it is written where no format is named."""


def _stablehlo() -> Callable[[Exportable, pathlib.Path], None]:
    from mnv2_jax.export import stablehlo

    return stablehlo.write


def _onnx() -> Callable[[Exportable, pathlib.Path], None]:
    from mnv2_jax.export import onnx_file

    return onnx_file.write


def _web() -> Callable[..., None]:
    from mnv2_jax.export import web

    return web.write


_FORMATS: Mapping[str, _Format] = {
    "stablehlo": _Format(".stablehlo", (), _stablehlo),
    "onnx": _Format(".onnx", ("onnx", "onnxruntime"), _onnx),
    "web": _Format("-web", ("onnx", "onnxruntime"), _web, is_default=False),
}
_DEFAULT = ",".join(name for name, form in _FORMATS.items() if form.is_default)

_HELP_AFTER = """\
Every file is loaded in its own runtime in a fresh process, and compared with the JAX model on real images. If it
differs, it is renamed *.rejected, and the exit code is 1. The input is [batch, height, width, 3], RGB; the size of the
batch is free. Labels, preprocessing and source are in the ONNX file's properties, and in a .json beside StableHLO.

examples:
  python -m mnv2_jax.export runs/w0_35-digits --out=exported
  python -m mnv2_jax.export v2.safetensors --format=onnx --outputs=answers --images=photos --out=exported
  python -m mnv2_jax.export runs/w0_35-digits --format=web --out=exported
  python -m mnv2_jax.export timm/mobilenetv2_100.ra_in1k --resolution=192 --pixels=float32 --out=exported
"""
_CHECKED = 256
"""Most images on which a file is checked."""


def main() -> None:
    """Reads the flags, writes and checks the files, and prints a table."""
    parser = Parser("Exports a network for other runtimes, and checks each file that it writes.", _HELP_AFTER)
    parser.add_argument("source", metavar="RUN_OR_FILE", help="a run folder, a file, or the name of published weights")
    parser.add_argument("--out", required=True, type=folder_type, metavar="DIR", help="folder for the files")
    parser.add_argument(
        "--format",
        default=_DEFAULT,
        metavar="A,B",
        help=f"some of {', '.join(_FORMATS)} (default: {_DEFAULT}); web is a folder with a page for browsers",
    )
    parser.add_argument(
        "--checkpoint", choices=("latest", "best"), help="checkpoint of a run (default: as the other commands)"
    )
    parser.add_argument(
        "--resolution", type=_size, metavar="PX", help="height and width (default: that of the weights)"
    )
    parser.add_argument(
        "--pixels", choices=("uint8", "float32"), default="uint8", help="type of the input: 0..255, or 0..1"
    )
    parser.add_argument(
        "--outputs",
        choices=("raw", "answers"),
        default="raw",
        help="raw: logits; answers: the most probable classes and their probabilities (default: raw)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="PATH",
        help=f"images or folders to check with, the first {_CHECKED} (default: crops of scikit-learn's two photos)",
    )
    parser.add_argument(
        "--runtime",
        type=folder_type,
        metavar="DIR",
        help="with --format=web: an unpacked onnxruntime-web (default: npm fetches it)",
    )
    parser.add_argument(
        "--modules", default="", metavar="A,B", help="modules that register the task or model of a file"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_json_flag()
    args, overrides = parser.parse(sys.argv[1:])
    if overrides:
        raise UserError(f"--config.{overrides[0]}: export uses no config; leave it out")
    formats = _chosen(args.format)
    if "web" not in formats and args.runtime:
        raise UserError(f"--runtime={args.runtime}: only a page needs it; add --format=web, or leave it out")
    if "web" in formats and (args.pixels, args.outputs) != ("uint8", "raw"):
        raise UserError("--format=web: a page gives uint8 and takes raw outputs; leave out --pixels and --outputs")
    paths = {form: args.out / f"{_stem(args.source)}{_FORMATS[form].ending}" for form in formats}
    for path in paths.values():
        if path.exists() and not args.force:
            raise UserError(f"{path}: already exists; give another --out, or --force to replace it")

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={args.out}: can't make this folder ({error.strerror}); give another") from error

    more: dict[str, dict[str, Any]] = {}
    if "web" in formats:
        from mnv2_jax.export import web

        more["web"] = {"runtime": web.read_runtime(args.runtime)}

    from mnv2_jax.export import check
    from mnv2_jax.export.function import Exportable, in_float32
    from mnv2_jax.tasks.predictor import Predictor

    predictor = Predictor(args.source, checkpoint=args.checkpoint, modules=filter(None, args.modules.split(",")))
    weights = in_float32(predictor.weights)
    exportable = Exportable(weights, args.resolution or predictor.resolution, args.pixels, args.outputs)
    images = check.to_input(_images(predictor, args.images, exportable.resolution), args.pixels)
    expected = check.expected_outputs(exportable, images)
    rows: dict[str, dict[str, Any]] = {}
    for form, path in paths.items():
        _FORMATS[form].writer()(exportable, path, **more.get(form, {}))
        rows[form] = {"path": str(path), **_checked(path, form, images, expected)}
    if args.json:
        print(json.dumps({"images": len(images), "files": rows}))
        return
    print(
        f"checked on {len(images)} images against JAX: difference as a share of the largest output, same first answers"
    )
    for row in rows.values():
        print(
            f"{row['path']}  {row['size_mb']:.2f} MB  difference {row['difference']:.1e}  agreement"
            f" {row['agreement']:.2%}  {row['ms_one_core']:.2f} ms on one core, {row['ms_all_cores']:.2f} ms on all"
        )


def _checked(path: pathlib.Path, form: str, images: Any, expected: Mapping[str, Any]) -> dict[str, Any]:
    from mnv2_jax.export import check

    rejected = path.with_name(f"{path.name}.rejected")
    try:
        checked = check.check(path, form, images, expected)
        if not check.is_right(checked):
            raise check.RejectedError(
                f"{path}: differs from the model by {checked.difference:.2g} of the largest output (at most"
                f" {check.BOUND:g} is right), with the same first answer for {checked.agreement:.2%} of {len(images)}"
                f" images; it is kept as {rejected.name}"
            )
    except check.RejectedError:
        if path.is_dir():  # which replaces only an empty folder
            shutil.rmtree(rejected, ignore_errors=True)
        path.replace(rejected)
        raise
    return checked._asdict()


def _chosen(text: str) -> list[str]:
    formats = list(dict.fromkeys(text.split(",")))
    for form in formats:
        if form not in _FORMATS:
            raise UserError(f"--format={text}: there is no format {form!r}; give some of {', '.join(_FORMATS)}")
        missing = [name for name in _FORMATS[form].packages if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"--format={form} needs {' and '.join(missing)}: pip install 'mnv2_jax[export]'")
    return formats


def _stem(source: str) -> str:
    path = pathlib.PurePath(source)
    return path.stem if path.suffix in (".safetensors", ".pth", ".h5", ".keras", ".tflite") else path.name or "model"


def _images(predictor: Any, paths: list[str], resolution: int) -> Any:
    """Returns uint8 [n, resolution, resolution, 3]: the images that are given, else crops of two photos."""
    import numpy as np

    from mnv2_jax.data.folder import find_images

    if not paths:
        from sklearn.datasets import load_sample_images

        rng = np.random.default_rng(0)
        crops = []
        for photo in load_sample_images().images:
            for _ in range(_CHECKED // 4):
                side = int(rng.integers(100, min(photo.shape[:2])))
                top, left = (int(rng.integers(size - side + 1)) for size in photo.shape[:2])
                crops.append(photo[top : top + side, left : left + side])
        images: list[Any] = crops
    else:
        images = []
        for path in paths:
            images += find_images(path)[0] if pathlib.Path(path).is_dir() else [path]
        if not images:
            raise UserError(f"--images={paths[0]}: no image that can be read in this folder")
    return np.stack([predictor.preprocess(image, resolution) for image in images[:_CHECKED]])


def _size(text: str) -> int:
    if not text.isdecimal() or not 8 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of pixels from 8 to 4096")
    return int(text)


if __name__ == "__main__":
    exit_on_user_error(main)
