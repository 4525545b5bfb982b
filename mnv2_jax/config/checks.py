"""Refuses values that an option can't have, alone (see `schema`) or together with others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from mnv2_jax.config.options import OPTIONS, missing
from mnv2_jax.config.schema import GONE, Config, flatten
from mnv2_jax.errors import UserError


def check_read(config: Config, keys: Collection[str]) -> None:
    """Refuses an option that was asked for and that nothing would read; a recipe may leave some idle.

    Raises:
      UserError: naming the key and with what it is read.
    """
    for key in keys:
        if key in GONE:
            raise UserError(f"--config.{key}: there is no such option any more; leave it out")
        if wanted := missing(config, key):
            raise UserError(
                f"--config.{key} changes nothing here: it is read with {' and with '.join(wanted)}; set that, or leave"
                " it out"
            )


def check(config: Config) -> None:
    """Refuses a value that its option can't have, and values that can't stand together.

    Raises:
      UserError: naming the key and what it can be.
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
            f"optim.reference_lr={optim.reference_lr:g} for a batch of {optim.reference_batch_size} is infinite for"
            f" data.batch_size={batch_size}; lower it"
        )


def _check_warmup(config: Config) -> None:
    optim, train = config.optim, config.train
    if train.steps is None and optim.warmup_steps is None and optim.warmup_epochs > train.epochs:
        raise UserError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} is longer than train.epochs={train.epochs:g};"
            f" the most it can be: {train.epochs:g}"
        )


def _check_milestones(config: Config) -> None:
    if config.optim.schedule == "step" and not config.optim.milestones_epochs:
        raise UserError("optim.schedule='step' needs optim.milestones_epochs, as in (60, 120, 160)")


def _check_evaluated(config: Config) -> None:
    data = config.data
    if data.holdout_fraction and data.eval_split:
        raise UserError(
            f"data.eval_split={data.eval_split!r} and data.holdout_fraction={data.holdout_fraction:g} both say what is"
            " evaluated; set one of them to None or 0"
        )


def _check_mixing(config: Config) -> None:
    if (config.augment.mixup_alpha or config.augment.cutmix_alpha) and config.norm.group_size == 1:
        raise UserError(
            "augment.mixup_alpha and augment.cutmix_alpha mix images within a norm group, and norm.group_size=1 leaves"
            " none to mix; take 2 or more"
        )


def _check_hue(config: Config) -> None:
    jitter = config.augment.color_jitter
    if jitter[3] > 0.5:
        raise UserError(f"augment.color_jitter={list(jitter)} is out of range; its last, the hue, must be at most 0.5")


def _check_repeats(config: Config) -> None:
    repeats, batch_size = config.augment.repeats, config.data.batch_size
    if repeats > batch_size:
        raise UserError(
            f"augment.repeats={repeats} is more than data.batch_size={batch_size}, so that a batch had one image;"
            " lower it"
        )


def _check_class_weights(config: Config) -> None:
    weights = config.loss.class_weights
    if isinstance(weights, str):
        return
    if not weights:
        raise UserError("loss.class_weights={} weighs no class; give some, as {cat: 3, dog: 0.5}, or none")
    for place, (name, weight) in enumerate(weights):
        if weight <= 0:
            raise UserError(f"loss.class_weights: class {name!r} weighs {weight:g}; a weight must be above 0")
        if name in dict(weights[:place]):
            raise UserError(f"loss.class_weights: class {name!r} is given twice; leave one out")


def _check_stages(config: Config) -> None:
    parts, epochs = config.finetune.train_from, config.finetune.unfreeze_epochs
    if not parts:
        raise UserError("finetune.train_from=[] names no part; give one for each stage, as classifier or stem")
    if len(parts) != len(epochs) + 1:
        raise UserError(
            f"finetune.train_from={list(parts)} are {len(parts)} stages, which need {len(parts) - 1}"
            f" finetune.unfreeze_epochs, not {list(epochs)}"
        )


def _check_teacher(config: Config) -> None:
    distill = config.distill
    if distill.teacher and distill.logits:
        raise UserError("distill.teacher and distill.logits both say what to learn from; set one of them to None")
    if distill.logits and config.data.skip_corrupt:
        raise UserError(
            "distill.logits has a row for every image, and data.skip_corrupt=True expects that some can't be decoded;"
            " remove those, or take distill.teacher"
        )
    if (distill.teacher or distill.logits) and distill.weight == 0:
        key = "distill.teacher" if distill.teacher else "distill.logits"
        raise UserError(f"distill.weight=0 leaves nothing to learn from {key}; raise it, or set {key} to None")


_TOGETHER = (
    _check_peak,
    _check_warmup,
    _check_milestones,
    _check_evaluated,
    _check_mixing,
    _check_hue,
    _check_repeats,
    _check_class_weights,
    _check_stages,
    _check_teacher,
)
"""Checks of options against each other; `check_devices` checks them against the devices."""


_SHARES = 8
"""Batches of several resolutions grow and shrink by an eighth of `data.batch_size` at most: fine enough to keep the
pixels level (within 3 % for 128 to 320 px), coarse enough to divide over several devices."""


def batch_shapes(config: Config) -> tuple[tuple[int, int], ...]:
    """The shapes of training batches, (resolution, images): one for each of `data.scales`, or the only one.

    As CoreNet's `image_batch_pairs` (Mehta & Rastegari, arXiv:2110.02178), a batch of r px has
    batch_size * resolution² / r² images, here rounded to the nearest multiple, but 0, of a unit: the norm groups of all
    microbatches, as often as they divide the batch and stay within an eighth of it. The unit doesn't know of devices,
    so that these may change; `check_devices` says whether they go with it.
    """
    data, whole = config.data, config.norm.group_size * config.optim.accumulate_steps
    groups = data.batch_size // whole
    unit = whole * max(n for n in range(1, max(groups // _SHARES, 1) + 1) if groups % n == 0)

    def size(scale: int) -> int:
        units = data.batch_size * data.resolution**2 / (scale**2 * unit)
        return unit * max(math.ceil(units - 0.5), 1)

    return tuple((scale, size(scale)) for scale in data.scales) or ((data.resolution, data.batch_size),)


_MOST_PIXELS = 1.5
"""A batch may have so many times the pixels of `data.batch_size` images of `data.resolution`."""


def _uneven(config: Config) -> list[tuple[int, int]]:
    """The `batch_shapes` that have more: there even one unit of images is too many."""
    most = _MOST_PIXELS * config.data.batch_size * config.data.resolution**2
    return [(scale, images) for scale, images in batch_shapes(config) if images * scale**2 > most]


def _check_level(config: Config, pieces: int) -> None:
    """Refuses `data.scales` with which a step would take far more memory than its `data.batch_size` says."""
    if not (uneven := _uneven(config)):
        return
    data, group, accumulate = config.data, config.norm.group_size, config.optim.accumulate_steps
    step = math.lcm(group * accumulate, pieces)
    candidates = {
        "norm.group_size": [n for n in range(group - 1, 1, -1) if data.batch_size % (n * accumulate) == 0],
        # From twice `_SHARES` norm groups on the unit grows with the batch, so that a larger one is no remedy.
        "data.batch_size": range(data.batch_size + step, 2 * _SHARES * step, step),
    }
    mends = []
    for key, values in candidates.items():
        section, leaf = key.split(".")
        for value in values:
            part = dataclasses.replace(getattr(config, section), **{leaf: value})
            changed = dataclasses.replace(config, **{section: part})
            if not _uneven(changed) and all(images % pieces == 0 for _, images in batch_shapes(changed)):
                mends.append(f"take {key}={value}, or ")
                break
    scale, images = uneven[-1]
    factor = images * scale**2 / (data.batch_size * data.resolution**2)
    raise UserError(
        f"data.scales={list(data.scales)} don't keep the pixels level: {images} images of {scale} px have {factor:.3g}"
        f" times those of data.batch_size={data.batch_size} of {data.resolution} px;"
        f" {''.join(mends)}leave {', '.join(str(scale) for scale, _ in uneven)} out"
    )


def check_devices(config: Config, num_devices: int) -> None:
    """Refuses batches that the devices, the accumulation or the norm groups don't divide, or aren't level in pixels.

    Only training needs them to be: an evaluation may have any resolution. Norm groups may span devices, see
    `spanning_groups`.

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
            f"norm.group_size={group} does not divide the {micro} images of data.batch_size={batch} that are taken at"
            f" once; the nearest that does: {_nearest_divisor(micro, group)}"
        )
    _check_level(config, pieces)
    for scale, images in batch_shapes(config):
        if images % pieces:
            raise UserError(
                f"data.scales={list(config.data.scales)} make a batch of {images} images of {scale} px, which does not"
                f" divide over {num_devices} devices x {accumulate} accumulation steps; take {_fitting(config, pieces)}"
            )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), -d))


def _fitting(config: Config, pieces: int) -> str:
    """The option that is nearest to what it is and makes each of the `_SHARES` of a batch divide over the pieces."""
    batch, group, accumulate = config.data.batch_size, config.norm.group_size, config.optim.accumulate_steps
    share, rest = divmod(batch, pieces * _SHARES)
    if rest:
        step = math.lcm(pieces, group * accumulate) * _SHARES
        return f"data.batch_size={max(round(batch / step), 1) * step}"
    return f"norm.group_size={_nearest_divisor(share, group)}"


def spanning_groups(config: Config, num_devices: int) -> str:
    """Says in one line which norm groups lie on several devices, what that costs, and the batch that avoids it.

    Such a step is the same function; each norm exchanges an array of [groups, channels] forward and one backward,
    and where images are mixed, each device asks another for an image.

    Returns:
      "" where every device holds whole groups.
    """
    data, group, accumulate = config.data, config.norm.group_size, config.optim.accumulate_steps
    pieces = num_devices * accumulate
    whole = group * pieces
    if all(images % whole == 0 for _, images in batch_shapes(config)):
        return ""

    def is_free(batch_size: int) -> bool:
        changed = dataclasses.replace(config, data=dataclasses.replace(data, batch_size=batch_size))
        return not _uneven(changed) and all(images % whole == 0 for _, images in batch_shapes(changed))

    multiples = range(whole, data.batch_size + 2 * _SHARES * whole, whole)
    free = next(filter(is_free, sorted(multiples, key=lambda multiple: abs(multiple - data.batch_size))), None)
    return (
        f"norm groups of {group} images span the {num_devices} devices: the same function, with two more exchanges of"
        " statistics for each norm of a step" + (f"; a batch of {free} (:batch={free}) has none" if free else "")
    )
