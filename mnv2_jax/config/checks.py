"""What values an option can have, alone and together with others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

from mnv2_jax.config.schema import GONE, Config, flatten
from mnv2_jax.errors import UserError

_INF = math.inf
RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("seed", 0, 2**31 - 1, True),
    ("model.width", 0, 16, False),
    ("model.num_classes", 2, _INF, True),
    ("model.depth", 0, 8, False),
    ("model.dropout", 0, 0.999, True),
    ("model.drop_path", 0, 0.999, True),
    ("norm.group_size", 1, _INF, True),
    ("norm.decay", 0, 0.99999, True),
    ("norm.epsilon", 0, 1, False),
    ("data.resolution", 8, 4096, True),
    ("data.eval_resolution", 8, 4096, True),
    ("data.batch_size", 1, _INF, True),
    ("data.eval_batch_size", 1, _INF, True),
    ("data.holdout_fraction", 0, 0.9, True),
    ("data.pad_pixels", 0, 1024, True),
    ("data.eval_crop_fraction", 0.01, 1, True),
    ("data.num_workers", 0, 1024, True),
    ("augment.policy_layers", 1, 100, True),
    ("augment.policy_magnitude", 0, 30, True),
    ("augment.policy_magnitude_std", 0, 1000, True),
    ("augment.policy_probability", 0, 1, True),
    ("augment.rotation_degrees", 0, 180, True),
    ("augment.shift_fraction", 0, 0.5, True),
    ("augment.erase_probability", 0, 1, True),
    ("augment.mixup_alpha", 0, 100, True),
    ("augment.cutmix_alpha", 0, 100, True),
    ("augment.mix_probability", 0, 1, True),
    ("augment.cutmix_share", 0, 1, True),
    ("augment.repeats", 1, 64, True),
    ("loss.label_smoothing", 0, 0.999, True),
    ("distill.temperature", 0, 1000, False),
    ("distill.weight", 0, 1, True),
    ("finetune.backbone_lr_factor", 0, 100, True),
    ("optim.peak_lr", 0, _INF, False),
    ("optim.reference_lr", 0, _INF, False),
    ("optim.reference_batch_size", 1, _INF, True),
    ("optim.momentum", 0, 0.99999, True),
    ("optim.rms_decay", 0, 0.99999, True),
    ("optim.rms_init", 0, 1, True),
    ("optim.b1", 0, 0.99999, True),
    ("optim.b2", 0, 0.999999, True),
    ("optim.epsilon", 0, 10, False),
    ("optim.weight_decay", 0, 10, True),
    ("optim.l2", 0, 10, True),
    ("optim.warmup_epochs", 0, 1e6, True),
    ("optim.warmup_steps", 0, _INF, True),
    ("optim.warmup_init_lr", 0, _INF, True),
    ("optim.final_lr", 0, _INF, True),
    ("optim.decay_factor", 0, 1, False),
    ("optim.decay_every_epochs", 0, _INF, False),
    ("optim.decay_every_steps", 1, _INF, True),
    ("optim.clip_grad_norm", 0, _INF, False),
    ("optim.accumulate_steps", 1, _INF, True),
    ("optim.ema_decay", 0, 0.9999999, True),
    ("optim.ema_every_steps", 1, _INF, True),
    ("train.epochs", 0, 1e6, False),
    ("train.steps", 1, _INF, True),
    ("train.eval_every_epochs", 0, 1e6, True),
    ("train.patience", 1, _INF, True),
    ("log.every_steps", 1, _INF, True),
    ("checkpoint.every_steps", 1, _INF, True),
    ("checkpoint.keep_latest", 1, _INF, True),
    ("checkpoint.keep_best", 0, _INF, True),
    ("faults.start_timeout_s", 1, 1e6, True),
    ("faults.heartbeat_timeout_s", 2, 3600, True),
    ("faults.step_timeout_s", 1, 1e6, True),
    ("faults.compile_timeout_s", 1, 1e6, True),
)
"""(key, lowest, highest, whether the lowest itself is allowed)."""


def _randaugment(config: Config) -> bool:
    return config.augment.policy.startswith("randaugment")


def _mixes(config: Config) -> bool:
    return config.augment.mixup_alpha > 0 or config.augment.cutmix_alpha > 0


def _is_adamw(config: Config) -> bool:
    return config.optim.name == "adamw"


def _warms_up(config: Config) -> bool:
    return bool(config.optim.warmup_epochs if config.optim.warmup_steps is None else config.optim.warmup_steps)


def _distils(config: Config) -> bool:
    return bool(config.distill.teacher or config.distill.logits)


def _trains_backbone(config: Config) -> bool:
    return config.finetune.train_from != ("classifier",)


def _holds_arrays(config: Config) -> bool:
    """Whether that is certain by the names: a folder of CIFAR-10 can hold images or an .npz file."""
    data = config.data
    return data.name == "digits" or (data.name == "cifar10" and (data.path or "").endswith(".npz"))


READ_WHEN: Mapping[str, tuple[str, Callable[[Config], bool]]] = {
    "init.head": ("init.weights set", lambda c: c.init.weights is not None),
    "data.path": ("data.name other than digits, which come with scikit-learn", lambda c: c.data.name != "digits"),
    "data.num_workers": ("images to decode, and digits and .npz files are arrays", lambda c: not _holds_arrays(c)),
    "data.skip_corrupt": ("images to decode, and digits and .npz files are arrays", lambda c: not _holds_arrays(c)),
    "data.crop_area": ("data.crop=random_resized", lambda c: c.data.crop == "random_resized"),
    "data.crop_ratio": ("data.crop=random_resized", lambda c: c.data.crop == "random_resized"),
    "data.crop_draw": ("data.crop=random_resized", lambda c: c.data.crop == "random_resized"),
    "data.pad_pixels": ("data.crop=shift", lambda c: c.data.crop == "shift"),
    "model.drop_path": ("networks with residual blocks", lambda c: c.model.name != "mobilenet_v1"),
    "model.drop_path_rule": ("model.drop_path above 0", lambda c: c.model.drop_path > 0),
    "augment.policy_layers": ("augment.policy=randaugment…", _randaugment),
    "augment.policy_magnitude": ("augment.policy=randaugment…", _randaugment),
    "augment.policy_magnitude_std": (
        "augment.policy=randaugment_timm",
        lambda c: c.augment.policy == "randaugment_timm",
    ),
    "augment.policy_increasing": (
        "augment.policy=randaugment_timm",
        lambda c: c.augment.policy == "randaugment_timm",
    ),
    "augment.policy_probability": (
        "augment.policy=randaugment_timm or randaugment_tf",
        lambda c: c.augment.policy in ("randaugment_timm", "randaugment_tf"),
    ),
    "augment.policy_excluded": ("augment.policy=randaugment…", _randaugment),
    "augment.color_jitter": ("augment.color=jitter", lambda c: c.augment.color == "jitter"),
    "augment.erase_area": ("augment.erase_probability above 0", lambda c: c.augment.erase_probability > 0),
    "augment.erase_fill": ("augment.erase_probability above 0", lambda c: c.augment.erase_probability > 0),
    "augment.mix_probability": ("augment.mixup_alpha or augment.cutmix_alpha above 0", _mixes),
    "augment.cutmix_share": (
        "augment.mixup_alpha and augment.cutmix_alpha above 0",
        lambda c: c.augment.mixup_alpha > 0 and c.augment.cutmix_alpha > 0,
    ),
    "loss.label_smoothing": ("distill.weight below 1", lambda c: not _distils(c) or c.distill.weight < 1),
    "loss.class_weights": ("distill.weight below 1", lambda c: not _distils(c) or c.distill.weight < 1),
    "train.patience": ("train.eval_every_epochs above 0", lambda c: c.train.eval_every_epochs > 0),
    "norm.decay": ("finetune.train_from other than classifier alone", _trains_backbone),
    "finetune.backbone_lr_factor": ("finetune.train_from other than classifier alone", _trains_backbone),
    "distill.teacher_model": ("distill.teacher set", lambda c: c.distill.teacher is not None),
    "distill.temperature": ("distill.teacher or distill.logits set", _distils),
    "distill.weight": ("distill.teacher or distill.logits set", _distils),
    "optim.reference_lr": ("optim.peak_lr=None", lambda c: c.peak_lr == c.linear_lr),
    "optim.reference_batch_size": ("optim.peak_lr=None", lambda c: c.peak_lr == c.linear_lr),
    "optim.momentum": ("optim.name=sgd or rmsprop", lambda c: c.optim.name in ("sgd", "rmsprop")),
    "optim.nesterov": (
        "optim.name=sgd and optim.momentum above 0",
        lambda c: c.optim.name == "sgd" and c.optim.momentum > 0,
    ),
    "optim.rms_decay": ("optim.name=rmsprop", lambda c: c.optim.name == "rmsprop"),
    "optim.rms_init": ("optim.name=rmsprop", lambda c: c.optim.name == "rmsprop"),
    "optim.epsilon_in_sqrt": ("optim.name=rmsprop", lambda c: c.optim.name == "rmsprop"),
    "optim.lr_in_momentum": (
        "optim.name=rmsprop and optim.momentum above 0",
        lambda c: c.optim.name == "rmsprop" and c.optim.momentum > 0,
    ),
    "optim.b1": ("optim.name=adamw", _is_adamw),
    "optim.b2": ("optim.name=adamw", _is_adamw),
    "optim.l2": ("optim.name=adamw", _is_adamw),
    "optim.epsilon": ("optim.name=rmsprop or adamw", lambda c: c.optim.name != "sgd"),
    "optim.weight_decay_on": (
        "optim.weight_decay or optim.l2 above 0",
        lambda c: c.optim.weight_decay > 0 or c.optim.l2 > 0,
    ),
    "optim.warmup_epochs": ("optim.warmup_steps=None", lambda c: c.optim.warmup_steps is None),
    "optim.warmup_init_lr": (
        "optim.warmup_epochs or optim.warmup_steps above 0",
        _warms_up,
    ),
    "optim.warmup_to": ("optim.warmup_epochs or optim.warmup_steps above 0", _warms_up),
    "optim.cosine_from": (
        "optim.schedule=cosine and optim.warmup_epochs or optim.warmup_steps above 0",
        lambda c: c.optim.schedule == "cosine" and _warms_up(c),
    ),
    "optim.final_lr": ("optim.schedule=cosine", lambda c: c.optim.schedule == "cosine"),
    "optim.decay_factor": (
        "optim.schedule=exponential or step",
        lambda c: c.optim.schedule in ("exponential", "step"),
    ),
    "optim.decay_every_epochs": (
        "optim.schedule=exponential and optim.decay_every_steps=None",
        lambda c: c.optim.schedule == "exponential" and c.optim.decay_every_steps is None,
    ),
    "optim.decay_every_steps": ("optim.schedule=exponential", lambda c: c.optim.schedule == "exponential"),
    "optim.staircase": ("optim.schedule=exponential", lambda c: c.optim.schedule == "exponential"),
    "optim.milestones_epochs": ("optim.schedule=step", lambda c: c.optim.schedule == "step"),
    "optim.ema_every_steps": ("optim.ema_decay set", lambda c: c.optim.ema_decay is not None),
    "optim.ema_warmup": ("optim.ema_decay set", lambda c: c.optim.ema_decay is not None),
}
"""Options that something else in the config can make idle: with what they are read, in words and as a test."""


def check_read(config: Config, keys: Collection[str]) -> None:
    """Refuses an option that was asked for and that nothing would read; a recipe may leave some idle.

    Raises:
      UserError: naming the key and with what it is read.
    """
    for key in keys:
        if key in GONE:
            raise UserError(f"--config.{key}: there is no such option any more; leave it out")
        wanted, is_read = READ_WHEN.get(key, ("", lambda _: True))
        if not is_read(config):
            raise UserError(f"--config.{key} changes nothing here: it is read with {wanted}; set that, or leave it out")


def check(config: Config) -> None:
    """Refuses a value out of its range, and values that can't stand together.

    Raises:
      UserError: naming the key and what it can be.
    """
    flat = flatten(dataclasses.asdict(config))
    for key, low, high, closed in RANGES:
        value = flat[key]
        if value is None:
            continue
        high = min(high, 2**31 - 1) if isinstance(value, int) else high
        if value < low or value > high or (value == low and not closed):
            bound = f"at least {low:g}" if closed else f"greater than {low:g}"
            upper = "" if high == _INF else f" and at most {high:g}"
            raise UserError(f"{key}={value!r} is out of range; it must be {bound}{upper}")
    data, optim, train = config.data, config.optim, config.train
    for key, (low, high) in (("data.crop_area", data.crop_area), ("data.crop_ratio", data.crop_ratio)):
        if not 0 < low <= high:
            raise UserError(f"{key}={[low, high]} must be two growing numbers above 0")
    if data.crop_ratio[0] < 0.01 or data.crop_ratio[1] > 100:
        raise UserError(f"data.crop_ratio={list(data.crop_ratio)} must lie between 0.01 and 100")
    if data.crop_area[1] > 1:
        raise UserError(f"data.crop_area={list(data.crop_area)} must not exceed the whole image, 1.0")
    if max(map(abs, data.mean)) > 255:
        raise UserError(f"data.mean={list(data.mean)} is out of range; images run from 0 to 1")
    if min(data.std) < 1e-3 or max(data.std) > 255:
        raise UserError(f"data.std={list(data.std)} must be at least 0.001 and at most 255; images run from 0 to 1")
    if optim.peak_lr is None and not math.isfinite(config.linear_lr):
        raise UserError(
            f"optim.reference_lr={optim.reference_lr:g} for a batch of {optim.reference_batch_size} is infinite for"
            f" data.batch_size={data.batch_size}; lower it"
        )
    if len(config.model.strides) != 5 or set(config.model.strides) - {1, 2}:
        raise UserError(f"model.strides={list(config.model.strides)} must be five of 1 and 2")
    if train.steps is None and optim.warmup_steps is None and optim.warmup_epochs > train.epochs:
        raise UserError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} is longer than train.epochs={train.epochs:g};"
            f" the most it can be: {train.epochs:g}"
        )
    if data.holdout_fraction and data.eval_split:
        raise UserError(
            f"data.eval_split={data.eval_split!r} and data.holdout_fraction={data.holdout_fraction:g} both say what is"
            " evaluated; set one of them to None or 0"
        )
    if optim.lr_noise is not None and not 0 <= optim.lr_noise[0] < optim.lr_noise[1] <= 1:
        raise UserError(f"optim.lr_noise={list(optim.lr_noise)} must be two growing shares of the training, 0 to 1")
    if any(not 8 <= scale <= 4096 for scale in data.scales) or list(data.scales) != sorted(set(data.scales)):
        raise UserError(f"data.scales={list(data.scales)} must be growing resolutions of 8 to 4096 px")
    if optim.schedule == "step" and not optim.milestones_epochs:
        raise UserError("optim.schedule='step' needs optim.milestones_epochs, as in (60, 120, 160)")
    if list(optim.milestones_epochs) != sorted(set(optim.milestones_epochs)):
        raise UserError(f"optim.milestones_epochs={list(optim.milestones_epochs)} must grow")
    _check_augment(config)
    _check_learning(config)


def _check_augment(config: Config) -> None:
    """What is done to training images."""
    augment = config.augment
    if _mixes(config) and config.norm.group_size == 1:
        raise UserError(
            "augment.mixup_alpha and augment.cutmix_alpha mix images within a norm group, and norm.group_size=1 leaves"
            " none to mix; take 2 or more"
        )
    if not 0 < augment.erase_area[0] <= augment.erase_area[1] <= 1:
        raise UserError(f"augment.erase_area={list(augment.erase_area)} must be two growing shares above 0, up to 1")
    if min(augment.color_jitter) < 0 or augment.color_jitter[3] > 0.5:
        raise UserError(
            f"augment.color_jitter={list(augment.color_jitter)} must be at least 0, and its last, the hue, at most 0.5"
        )
    if augment.repeats > config.data.batch_size:
        raise UserError(
            f"augment.repeats={augment.repeats} is more than data.batch_size={config.data.batch_size}, so that a"
            " batch had one image; lower it"
        )


def _check_learning(config: Config) -> None:
    """What is trained, and from whom."""
    finetune = config.finetune
    if not finetune.train_from:
        raise UserError("finetune.train_from=[] names no part; give one for each stage, as classifier or stem")
    if list(finetune.unfreeze_epochs) != sorted(set(finetune.unfreeze_epochs)):
        raise UserError(f"finetune.unfreeze_epochs={list(finetune.unfreeze_epochs)} must grow")
    if len(finetune.train_from) != len(finetune.unfreeze_epochs) + 1:
        raise UserError(
            f"finetune.train_from={list(finetune.train_from)} are {len(finetune.train_from)} stages, which need"
            f" {len(finetune.train_from) - 1} finetune.unfreeze_epochs, not {list(finetune.unfreeze_epochs)}"
        )
    if min(finetune.unfreeze_epochs, default=1) <= 0:
        raise UserError(f"finetune.unfreeze_epochs={list(finetune.unfreeze_epochs)} must be above 0")
    if config.distill.logits and config.data.skip_corrupt:
        raise UserError(
            "distill.logits has a row for every image, and data.skip_corrupt=True expects that some can't be decoded;"
            " remove those, or take distill.teacher"
        )
    if config.distill.teacher and config.distill.logits:
        raise UserError("distill.teacher and distill.logits both say what to learn from; set one of them to None")
    if _distils(config) and config.distill.weight == 0:
        key = "distill.teacher" if config.distill.teacher else "distill.logits"
        raise UserError(f"distill.weight=0 leaves nothing to learn from {key}; raise it, or set {key} to None")


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
