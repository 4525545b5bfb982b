"""The command that prepares ImageNet for training, or verifies a prepared folder."""

from __future__ import annotations

import pathlib
import sys

import tqdm

from mnv2_jax import outputs
from mnv2_jax.data.cores import num_cores
from mnv2_jax.data.prepare.run import prepare
from mnv2_jax.data.prepare.verify import verify
from mnv2_jax.data.shards import FORMATS, MANIFEST, Manifest, Shard, is_prepared, read_manifest
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, folder_type


def main() -> None:
    """Reads the flags, then runs one of the two verbs."""
    parser = Parser(
        "Prepares ImageNet (ILSVRC-2012): checks every image by decoding it, and keeps its file byte for byte.\n\n"
        "  python -m mnv2_jax.data.prepare imagenet --source=DIR --out=DIR\n"
        "  python -m mnv2_jax.data.prepare verify DIR",
        "--source may hold ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz; or train/"
        "\nand val/ (a folder for each WordNet id, val also flat with the development kit or LOC_val_solution.csv); or"
        "\nKaggle's ILSVRC/Data/CLS-LOC; or TFDS's imagenet2012/. If it is killed, the same command resumes it.",
    )
    parser.add_argument("command", choices=("imagenet", "verify"), help="what to do")
    parser.add_argument("folder", nargs="?", type=folder_type, help="verify: the prepared folder")
    parser.add_argument("--source", type=folder_type, help="where the images are")
    parser.add_argument(
        "--out", type=folder_type, help="the folder to write; missing.txt there says what --source lacks"
    )
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"default: {FORMATS[0]}")
    parser.add_argument("--workers", type=int, default=num_cores(), help="number of processes (default: one per core)")
    parser.add_argument("--allow-incomplete", action="store_true", help="accept a part of ImageNet")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out damaged images; the manifest lists them")
    args, overrides = parser.parse(sys.argv[1:])
    outputs.drop_errors(sys.stdout)  # it only shows progress; the results are files and the exit code
    if overrides:
        raise UserError(f"--config.{overrides[0]}: this command has no config; leave the flag out")
    if args.workers < 1:
        raise UserError(f"--workers={args.workers} must be at least 1")
    if args.command == "verify":
        if args.folder is None or args.source or args.out:
            raise UserError("verify takes the prepared folder and nothing else, as in: verify DIR")
        _verify(args.folder, args.workers)
        return
    if args.folder is not None or not args.source or not args.out:
        raise UserError("imagenet takes --source=DIR and --out=DIR and no folder without a flag; give these two")
    with _Progress() as progress:
        manifest, damaged = prepare(
            args.source,
            args.out,
            args.format,
            args.workers,
            args.allow_incomplete,
            args.skip_corrupt,
            progress.shard,
            progress.say,
        )
    for reason in damaged.values():
        print(f"damaged: {reason}", file=sys.stderr)
    if not manifest.complete:
        raise UserError(
            f"{len(damaged)} damaged images in --source; restore them and run the same command again, or leave them"
            " out with --skip-corrupt"
        )
    print(f"{args.out}: {_summary(manifest)}; use it with --config=w1_0:path={args.out}")


def _verify(folder: pathlib.Path, workers: int) -> None:
    if not is_prepared(str(folder)):
        raise UserError(f"{folder}: no {MANIFEST} in it; give a folder that mnv2_jax.data.prepare wrote")
    total = len(read_manifest(str(folder)).shards)
    checked = 0

    with _Progress() as progress:

        def count_shard(shard: Shard) -> None:
            nonlocal checked
            checked += 1
            progress.shard(shard, checked, total)

        problems = verify(folder, workers, count_shard)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} files are not as they were written; remove the damaged ones and prepare the"
            " folder again, which writes only what is missing"
        )
    print(f"{folder}: {_summary(read_manifest(str(folder)))}; all files are as they were written")


def _summary(manifest: Manifest) -> str:
    counts = {split: manifest.counts(split) for split in manifest.splits}
    return ", ".join(f"{split} {sum(n.values()):,} images of {len(n)} classes" for split, n in counts.items())


class _Progress:
    """Shows a progress bar if standard error is a terminal, else a line for each shard."""

    def __enter__(self) -> _Progress:
        self._bar: tqdm.tqdm | None = tqdm.tqdm(unit="shard", dynamic_ncols=True) if sys.stderr.isatty() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        """Prints a line; if there is a bar, above it."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def shard(self, shard: Shard, number: int, total: int) -> None:
        """Shows that ``shard`` is done, the ``number``-th of ``total``."""
        if self._bar is not None:
            if self._bar.total is None:
                self._bar.total, self._bar.initial = total, number - 1  # an earlier session did the others
            self._bar.n = number
            self._bar.refresh()
            return
        images = sum(shard.classes.values())
        self.say(f"{shard.name}: {images:,} images, {shard.bytes / 1e6:,.1f} MB ({number}/{total})")


if __name__ == "__main__":
    exit_on_user_error(main)
