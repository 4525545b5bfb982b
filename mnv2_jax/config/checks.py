"""Refuses values that an option can't have, by itself (see `schema`) or in combination with other options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from mnv2_jax.config.options import OPTIONS, missing
from mnv2_jax.config.schema import GONE, Config, flatten
from mnv2_jax.errors import UserError


def check_read(config: Config, keys: Collection[str]) -> None:
    """Refuses options that were set on the command line but have no effect. A recipe may set such options.

    Raises:
      UserError: naming the key, and the condition under which the option is used.
    """
    for key in keys:
        if key in GONE:
            raise UserError(f"--config.{key}: this option no longer exists; leave it out")
        if conditions := missing(config, key):
            raise UserError(
                f"--config.{key} has no effect: it is used only with {' and with '.join(conditions)}; set that, or"
                " leave it out"
            )


def check(config: Config) -> None:
    """Refuses values that an option can't have, and combinations of values that are impossible.

    Raises:
      UserError: naming the key and its valid values.
    """
    for key, value in flatten(dataclasses.asdict(config)).items():
        for rule in OPTIONS[key].rules:
            if value is not None and (fault := rule.fault(value)):
                raise UserError(f"{key}={list(value) if isinstance(value, tuple) else value!r} {fault}")
    for check_together in _TOGETHER:
        check_together(config)


def _check_peak(config: Config) -> None:
    optim, batch_size = config.optim, config.data.batch_size
    if not math.isfinite(config.peak_lr):
        raise UserError(
            f"optim.reference_lr={optim.reference_lr:g} for a batch of {optim.reference_batch_size} gives an infinite"
            f" learning rate for data.batch_size={batch_size}; lower it"
        )


def _check_warmup(config: Config) -> None:
    optim, train = config.optim, config.train
    if train.steps is None and optim.warmup_steps is None and optim.warmup_epochs > train.epochs:
        raise UserError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} is longer than train.epochs={train.epochs:g};"
            f" set it to {train.epochs:g} or less"
        )


def _check_milestones(config: Config) -> None:
    if config.optim.schedule == "step" and not config.optim.milestones_epochs:
        raise UserError("optim.schedule='step' needs optim.milestones_epochs, as in (60, 120, 160)")


def _check_eval_images(config: Config) -> None:
    data = config.data
    if data.holdout_fraction and data.eval_split:
        raise UserError(
            f"data.eval_split={data.eval_split!r} and data.holdout_fraction={data.holdout_fraction:g} both select the"
            " images for evaluation; set the first to None or the second to 0"
        )


def _check_mixing(config: Config) -> None:
    if (config.augment.mixup_alpha or config.augment.cutmix_alpha) and config.norm.group_size == 1:
        raise UserError(
            "augment.mixup_alpha and augment.cutmix_alpha mix images within a norm group, which has no other image with"
            " norm.group_size=1; set norm.group_size to 2 or more"
        )


def _check_hue(config: Config) -> None:
    jitter = config.augment.color_jitter
    if jitter[3] > 0.5:
        raise UserError(
            f"augment.color_jitter={list(jitter)} is out of range; its last entry, the hue, must be at most 0.5"
        )


def _check_repeats(config: Config) -> None:
    repeats, batch_size = config.augment.repeats, config.data.batch_size
    if repeats > batch_size:
        raise UserError(
            f"augment.repeats={repeats} is more than data.batch_size={batch_size}, so a batch would repeat one image;"
            " lower it"
        )


def _check_class_weights(config: Config) -> None:
    weights = config.loss.class_weights
    if isinstance(weights, str):
        return
    if not weights:
        raise UserError("loss.class_weights={} gives no class a weight; set it as in {cat: 3, dog: 0.5}, or to none")
    for index, (name, weight) in enumerate(weights):
        if weight <= 0:
            raise UserError(f"loss.class_weights: class {name!r} has the weight {weight:g}; it must be above 0")
        if name in dict(weights[:index]):
            raise UserError(f"loss.class_weights: class {name!r} is given twice; leave one out")


def _check_stages(config: Config) -> None:
    parts, epochs = config.finetune.train_from, config.finetune.unfreeze_epochs
    if not parts:
        raise UserError(
            "finetune.train_from=[] names no part of the network; give one for each stage, such as classifier or stem"
        )
    if len(parts) != len(epochs) + 1:
        raise UserError(
            f"finetune.train_from={list(parts)} defines {len(parts)} stages, which need {len(parts) - 1} entries in"
            f" finetune.unfreeze_epochs, not {list(epochs)}"
        )


def _check_teacher(config: Config) -> None:
    distill = config.distill
    if distill.teacher and distill.logits:
        raise UserError("distill.teacher and distill.logits are both set; set one of them to None")
    if distill.logits and config.data.skip_corrupt:
        raise UserError(
            "distill.logits needs every image, but data.skip_corrupt=True skips images that can't be decoded; remove"
            " such images, or use distill.teacher"
        )
    if (distill.teacher or distill.logits) and distill.weight == 0:
        key = "distill.teacher" if distill.teacher else "distill.logits"
        raise UserError(f"distill.weight=0 ignores {key}; raise it, or set {key} to None")


_TOGETHER = (
    _check_peak,
    _check_warmup,
    _check_milestones,
    _check_eval_images,
    _check_mixing,
    _check_hue,
    _check_repeats,
    _check_class_weights,
    _check_stages,
    _check_teacher,
)
"""Checks of combinations of options. `check_devices` checks options against the devices."""


_SHARES = 8
"""Batch sizes for several resolutions are multiples of at most an eighth of `data.batch_size`. That is fine enough to
keep the number of pixels about equal (within 3 % for 128 to 320 px), and coarse enough to divide over devices."""


def batch_shapes(config: Config) -> tuple[tuple[int, int], ...]:
    """Returns the shapes of training batches, (resolution, images): one for each of `data.scales`, or a single one.

    As in CoreNet's `image_batch_pairs` (Mehta & Rastegari, arXiv:2110.02178), a batch of r px has
    batch_size * resolution² / r² images. Here that is rounded to the nearest positive multiple of a unit. The unit is a
    norm group of every microbatch, times the largest number that divides the batch and keeps the unit within an eighth
    of it. It doesn't depend on the devices, so that their number may change; `check_devices` checks that they fit.
    """
    data, group_images = config.data, config.norm.group_size * config.optim.accumulate_steps
    groups = data.batch_size // group_images
    unit = group_images * max(n for n in range(1, max(groups // _SHARES, 1) + 1) if groups % n == 0)

    def size(scale: int) -> int:
        units = data.batch_size * data.resolution**2 / (scale**2 * unit)
        return unit * max(math.ceil(units - 0.5), 1)

    return tuple((scale, size(scale)) for scale in data.scales) or ((data.resolution, data.batch_size),)


_MAX_PIXELS = 1.5
"""Largest number of pixels of a batch, as a multiple of those of `data.batch_size` images of `data.resolution`."""


def _oversized(config: Config) -> list[tuple[int, int]]:
    """Returns the `batch_shapes` with too many pixels, which happens where even one unit of images has too many."""
    max_pixels = _MAX_PIXELS * config.data.batch_size * config.data.resolution**2
    return [(scale, images) for scale, images in batch_shapes(config) if images * scale**2 > max_pixels]


def _check_pixels(config: Config, pieces: int) -> None:
    """Refuses `data.scales` for which a step takes far more memory than `data.batch_size` and `data.resolution` say."""
    if not (oversized := _oversized(config)):
        return
    data, group, accumulate = config.data, config.norm.group_size, config.optim.accumulate_steps
    step = math.lcm(group * accumulate, pieces)
    candidates = {
        "norm.group_size": [n for n in range(group - 1, 1, -1) if data.batch_size % (n * accumulate) == 0],
        # From twice `_SHARES` norm groups on, the unit grows with the batch, so a larger batch doesn't help.
        "data.batch_size": range(data.batch_size + step, 2 * _SHARES * step, step),
    }
    mends = []
    for key, values in candidates.items():
        section, leaf = key.split(".")
        for value in values:
            part = dataclasses.replace(getattr(config, section), **{leaf: value})
            changed = dataclasses.replace(config, **{section: part})
            if not _oversized(changed) and all(images % pieces == 0 for _, images in batch_shapes(changed)):
                mends.append(f"set {key}={value}, or ")
                break
    scale, images = oversized[-1]
    factor = images * scale**2 / (data.batch_size * data.resolution**2)
    raise UserError(
        f"data.scales={list(data.scales)} makes batches of very different memory: {images} images of {scale} px have"
        f" {factor:.3g} times the pixels of data.batch_size={data.batch_size} images of {data.resolution} px;"
        f" {''.join(mends)}leave {', '.join(str(scale) for scale, _ in oversized)} out"
    )


def check_devices(config: Config, num_devices: int) -> None:
    """Refuses training batches that devices, accumulation steps or norm groups don't divide, or with too many pixels.

    Evaluation has no such limits. Norm groups may span devices, see `spanning_groups`.

    Raises:
      UserError: with the nearest valid value.
    """
    batch, group, accumulate = config.data.batch_size, config.norm.group_size, config.optim.accumulate_steps
    pieces = num_devices * accumulate
    if batch % pieces:
        below, above = batch // pieces * pieces, -(-batch // pieces) * pieces
        best = above if not below or above - batch <= batch - below else below
        raise UserError(
            f"data.batch_size={batch} does not divide over {num_devices} devices"
            f" x {accumulate} accumulation steps; the nearest that does: {best}"
        )
    micro = batch // accumulate
    if micro % group:
        raise UserError(
            f"norm.group_size={group} does not divide a microbatch of {micro} images (data.batch_size={batch} over"
            f" {accumulate} accumulation steps); the nearest that does: {_nearest_divisor(micro, group)}"
        )
    _check_pixels(config, pieces)
    for scale, images in batch_shapes(config):
        if images % pieces:
            raise UserError(
                f"data.scales={list(config.data.scales)} makes a batch of {images} images of {scale} px, which does not"
                f" divide over {num_devices} devices x {accumulate} accumulation steps; set"
                f" {_fitting_option(config, pieces)}"
            )


def _nearest_divisor(number: int, target: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - target), -d))


def _fitting_option(config: Config, pieces: int) -> str:
    """Returns the smallest change of an option with which each of the `_SHARES` of a batch divides over the pieces."""
    batch, group, accumulate = config.data.batch_size, config.norm.group_size, config.optim.accumulate_steps
    share, remainder = divmod(batch, pieces * _SHARES)
    if remainder:
        step = math.lcm(pieces, group * accumulate) * _SHARES
        return f"data.batch_size={max(round(batch / step), 1) * step}"
    return f"norm.group_size={_nearest_divisor(share, group)}"


def spanning_groups(config: Config, num_devices: int) -> str:
    """Says in one line that norm groups span devices, what that costs, and which batch size avoids it.

    A step then computes the same function, with more communication: each norm exchanges an array of [groups, channels]
    forward and one backward, and where images are mixed, each device gets an image from another.

    Returns:
      The line; "" if every device holds whole groups.
    """
    data, group, accumulate = config.data, config.norm.group_size, config.optim.accumulate_steps
    pieces = num_devices * accumulate
    unit = group * pieces
    if all(images % unit == 0 for _, images in batch_shapes(config)):
        return ""

    def has_whole_groups(batch_size: int) -> bool:
        changed = dataclasses.replace(config, data=dataclasses.replace(data, batch_size=batch_size))
        return not _oversized(changed) and all(images % unit == 0 for _, images in batch_shapes(changed))

    multiples = sorted(range(unit, data.batch_size + 2 * _SHARES * unit, unit), key=lambda n: abs(n - data.batch_size))
    batch = next(filter(has_whole_groups, multiples), None)
    return (
        f"norm groups of {group} images span the {num_devices} devices: the result is the same, with two more exchanges"
        " of statistics for each norm of a step"
        + (f"; a batch of {batch} images (:batch={batch}) avoids them" if batch else "")
    )
