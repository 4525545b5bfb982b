"""Each recipe has every hyperparameter of the facts that are published of it, or is refused."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import config
from mnv2_jax.config import checks
from mnv2_jax.errors import UserError
from mnv2_jax.models.published import published
from mnv2_jax.nn.initializers import INITS
from mnv2_jax.recipes import RECIPES, REFUSED

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "recipes.json").read_text())["recipes"]
ENTRIES = {entry["id"]: entry for entry in GOLDEN}
V4 = ("v4_conv_s", "v4_conv_m", "v4_hybrid_m", "v4_conv_l", "v4_hybrid_l")
CONFIGS = {  # the networks that the numbers are of
    "tf_slim_v2": ("w1_0",),
    "tfmg_v2": ("w1_0",),
    "tfmg_v1": ("v1_1_0",),
    "tfmg_v3_large": ("v3_large",),
    "tfmg_v3_small": ("v3_small",),
    "corenet_v2": ("w1_0", "w0_25", "w1_4"),
    "corenet_v1": ("v1_1_0",),
    "corenet_v3_large": ("v3_large",),
    "torchvision_v2_IMAGENET1K_V1": ("w1_0",),
    "torchvision_v2_IMAGENET1K_V2": ("w1_0",),
    "torchvision_v3_V1": ("v3_large", "v3_small"),
    "torchvision_v3_large_V2": ("v3_large",),
    "timm_v3_large_ra": ("v3_large",),
    "efficientnet_jax_default": ("w1_0",),
    "dli14_v2": ("w1_0",),
    "dli14_v2_best": ("w1_0",),
    "dli14_v3": ("v3_large", "v3_small"),
    "mmpretrain_v2": ("w1_0",),
    "paper_v4": V4,
    "tfmg_v4": V4,
}


def load(stem, recipe, more=""):
    return config.load(f"{ROOT}/configs/{stem}.py:recipe={recipe}{more}")[1]


def numbers(text):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", str(text))]


def flags(command):
    """``{"--lr": "0.5", …}``."""
    _, *parts = re.split(r"(?:^|\s)(--?[a-z][\w-]*)", command)
    return {flag: value.strip() for flag, value in zip(parts[::2], parts[1::2], strict=True)}


def leaves(tree, prefix=""):
    for key, value in tree.items():
        value = flags(value) if key == "command" else value
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


REFERS = {
    "tfmg_v1": "tfmg_v2",  # same_as
    "torchvision_v3_large_V2": "torchvision_v2_IMAGENET1K_V2",  # recipe
    "tfmg_v4": "paper_v4",  # differs_from_paper
}
REPLACED = {  # facts of the entry that another refers to, where it differs
    ("tfmg_v1", "v1_1_0"): {"schedule.factor"},
    ("tfmg_v4", "v4_conv_l"): {
        "table.stochastic_depth_peak",
        "table.mixup_cutmix_prob",
        "stochastic_depth.attention",
    },
    ("tfmg_v4", "v4_conv_s"): {"table.epochs"},
}


def facts(recipe, stem):
    """(the names in `FACTS` that may compare it, path, value): of an entry and of the one that it refers to."""
    found = {}
    for source in filter(None, (REFERS.get(recipe), recipe)):
        for path, value in leaves(ENTRIES[source]):
            found[path] = (f"{recipe}:{path}", f"{source}:{path}", path), path, value
    for path in REPLACED.get((recipe, stem), ()):
        del found[path]
    return found.values()


def rmsprop(c):
    o = c.optim
    return (o.name, o.rms_init, o.epsilon_in_sqrt, o.lr_in_momentum) if o.name == "rmsprop" else (o.name,)


def schedule(c):
    o = c.optim
    return (o.schedule, o.staircase, o.update_every) if o.schedule == "exponential" else (o.schedule, o.update_every)


def warmup(text):
    """(steps, initial learning rate); epochs are TF model garden's, of 312 steps."""
    if text == "none":
        return 0, 0.0
    steps = re.search(r"(\d+) (?:steps|iterations)", text)
    epochs = re.search(r"(\d+) epochs", text)
    start = re.search(r"from ([\d.]+)", text)
    return (int(steps[1]) if steps else 312 * int(epochs[1])), float(start[1]) if start else 0.0


def evaluation(text):
    """(how, share of the short side, resolution), of "resize 256, center crop 224"."""
    resized, cropped = numbers(text)
    return "resize_crop", cropped / resized, cropped


def crops(c):
    return c.data.eval_crop, c.data.eval_crop_fraction, c.data.eval_resolution or c.data.resolution


OPTIMIZERS = {
    "sgd": ("sgd",),
    "adamw": ("adamw",),
    "rmsprop (TF1)": ("rmsprop", 1.0, True, True),
    "rmsprop": ("rmsprop", 0.0, True, True),  # Keras
    "rmsproptf": ("rmsprop", 1.0, True, True),
    "torch RMSprop": ("rmsprop", 0.0, False, False),
}
SCHEDULES = {
    "exponential staircase": ("exponential", True, "step"),
    "cosine": ("cosine", "step"),
    "cosine per epoch": ("cosine", "epoch"),
}
DECAYED = {
    "depthwise kernels (separable_conv2d regularizer None), BN, biases": "no_depthwise",
    "L2 on kernels; depthwise not regularised by default": "no_depthwise",
    "every 1-D parameter (biases and BN)": "no_norm_bias",
    "nothing (norm_weight_decay None)": "all",
    "biases are decayed": "no_norm",
}
DRAWN = {  # (distribution, standard deviation), of a kernel [k, k, i, o] with k * k = w; a dense one has w = 1
    "truncated_normal stddev 0.09": lambda w, i, o: ("truncated", 0.09 * 0.8796),  # of a normal cut at two deviations
    "kaiming_normal fan_out": lambda w, i, o: ("normal", (2 / (w * o)) ** 0.5),
    "normal std sqrt(2/(k*k*cout))": lambda w, i, o: ("normal", (2 / (w * o)) ** 0.5),
    "variance_scaling(2.0, fan_out, normal)": lambda w, i, o: ("normal", (2 / (w * o)) ** 0.5),
    "normal std sqrt(2/(k*k*cout/groups))": lambda w, i, o: ("normal", (2 / (w * (1 if i == 1 else o))) ** 0.5),
    "normal std 0.01": lambda w, i, o: ("normal", 0.01),
    "VarianceScaling: truncated normal, variance 1/fan_in": lambda w, i, o: ("truncated", (w * i) ** -0.5),
    "VarianceScaling: truncated normal, variance 1/fan_in of [k, k, channels, 1]": (
        lambda w, i, o: ("truncated", (w * o) ** -0.5)
    ),
    "random_uniform: -0.05 to 0.05": lambda w, i, o: ("uniform", 0.05 / 3**0.5),
    "uniform +-1/sqrt(fan_out)": lambda w, i, o: ("uniform", (3 * o) ** -0.5),
    "variance_scaling(1.0/3, fan_out, uniform)": lambda w, i, o: ("uniform", (3 * o) ** -0.5),
    "PyTorch's default: uniform +-1/sqrt(fan_in)": lambda w, i, o: ("uniform", (3 * w * i) ** -0.5),
    "xavier_uniform": lambda w, i, o: ("uniform", (2 / (w * (i + o))) ** 0.5),
    "glorot_uniform": lambda w, i, o: ("uniform", (2 / (w * (i + o))) ** 0.5),
    # Keras: an axis before the last two is a window.
    "glorot_uniform of [heads, key_dim, channels]": lambda w, i, o: ("uniform", (2 / (o + HEADS * i)) ** 0.5),
    "glorot_uniform of [channels, heads, value_dim]": (
        lambda w, i, o: ("uniform", (2 / (o * (HEADS + i / HEADS))) ** 0.5)
    ),
    "zeros": lambda w, i, o: ("zeros", 0.0),
}
HEADS = 4
ATTENTION = {"query": (1, 1, 48, 96), "shared": (1, 1, 48, 96), "output": (1, 1, 48, 96), "depthwise": (3, 3, 1, 512)}
KERNELS = {
    "convolutions": ("conv", (3, 3, 16, 32)),
    "depthwise": ("depthwise", (3, 3, 1, 512)),
    "squeeze_excite": ("squeeze_excite", (48, 96)),
    "hidden": ("hidden", (48, 96)),
    "classifier": ("classifier", (48, 96)),
}


@functools.cache
def drawn(name, kind):
    """(distribution, standard deviation), as `DRAWN`, of what a row of `INITS` gives, and the kernel's w, i and o."""
    inits, shape = INITS[name], (48, 4096)
    if kind.endswith("bias"):
        draw = getattr(inits, kind)(shape[0])
    elif kind in KERNELS:
        field, shape = KERNELS[kind]
        draw = getattr(inits, field)
    else:
        where, field = kind.split(".")
        shape = ATTENTION[field]
        draw = getattr(inits.of_attention(HEADS, 2 if "smaller" in where else 1), field)
    values = np.asarray(draw(jax.random.key(0), shape[1:] if kind.endswith("bias") else shape, jnp.float32))
    *window, i, o = shape
    std = values.std()
    # The largest of a uniform lies at 1.73 deviations, that of a normal cut at two (of its own) at 2.27.
    reach = np.abs(values).max() / std if std else 0.0
    kinds = {"zeros": (0, 0), "uniform": (1.65, 1.8), "truncated": (2.2, 2.31), "normal": (3, 6)}
    (distribution,) = (kind for kind, (low, high) in kinds.items() if low <= reach <= high)
    return distribution, float(std), (math.prod(window), i, o)


def initial(kind):
    def compare(v, c):
        distribution, std, sizes = drawn(c.model.init, kind)
        said, expected = DRAWN[v.partition(", whose ")[0]](*sizes)
        return (said, True), (distribution, std == pytest.approx(expected, rel=0.05))

    return compare


POLICIES = {"ta_wide": "trivialaugment", "imagenet": "autoaugment"}
IMAGENET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

FACTS = {  # path of a fact -> what it says and what the config has
    "batch": lambda v, c: (numbers(v)[0], c.data.batch_size),
    "epochs": lambda v, c: (v, c.train.epochs),
    "steps": lambda v, c: (round(v / 312, -1), c.train.epochs),
    "tf_slim_v2:steps": lambda v, c: (numbers(v)[-1], c.train.epochs),
    "optimizer": lambda v, c: (["sgd", *numbers(v)], [c.optim.name, c.peak_lr, c.optim.momentum, c.optim.weight_decay]),
    "optimizer.name": lambda v, c: (OPTIMIZERS[v], rmsprop(c)),
    "optimizer.decay": lambda v, c: (v, c.optim.rms_decay),
    "optimizer.rho": lambda v, c: (v, c.optim.rms_decay),
    "optimizer.alpha": lambda v, c: (v, c.optim.rms_decay),
    "optimizer.momentum": lambda v, c: (v, c.optim.momentum),
    "optimizer.nesterov": lambda v, c: (v, c.optim.nesterov),
    "optimizer.epsilon": lambda v, c: (v, c.optim.epsilon),
    "optimizer.eps": lambda v, c: (v, c.optim.epsilon),
    "optimizer.epsilon_inside_sqrt": lambda v, c: (v, c.optim.epsilon_in_sqrt),
    "optimizer.eps_inside_sqrt": lambda v, c: (v, c.optim.epsilon_in_sqrt),
    "optimizer.rms_slot_init": lambda v, c: ({"ones": 1.0}[v], c.optim.rms_init),
    "optimizer.lr_inside_momentum": lambda v, c: (v, c.optim.lr_in_momentum),
    "optimizer.beta1": lambda v, c: (v, c.optim.b1),
    "optimizer.beta2": lambda v, c: (v, c.optim.b2),
    "optimizer.weight_decay": lambda v, c: (v, c.optim.weight_decay),
    "optimizer.exclude": lambda v, c: ({("batch_normalization",): "no_norm"}[tuple(v)], c.optim.weight_decay_on),
    "optimizer.grad_clip": lambda v, c: (v or None, c.optim.clip_grad_norm),
    "schedule.type": lambda v, c: (SCHEDULES[v], schedule(c)),
    "schedule.initial": lambda v, c: (numbers(v)[0], c.peak_lr),
    "schedule.factor": lambda v, c: (v, c.optim.decay_factor),
    "differs.decay_rate": lambda v, c: (v, c.optim.decay_factor),
    "schedule.every_epochs": lambda v, c: (numbers(v)[0], c.optim.decay_every_epochs),
    "schedule.decay_steps": lambda v, c: (v, c.optim.decay_every_steps),
    "tfmg_v3_large:schedule.decay_steps": lambda v, c: (round(v / 312, -1), c.train.epochs),
    "schedule.warmup": lambda v, c: (warmup(v), (c.optim.warmup_steps or 0, c.optim.warmup_init_lr)),
    "schedule.max_lr": lambda v, c: (v, c.peak_lr),
    "schedule.min_lr": lambda v, c: (v, c.optim.final_lr),
    "schedule.alpha": lambda v, c: (v, c.optim.final_lr / c.peak_lr),
    "torchvision_v2_IMAGENET1K_V1:schedule": lambda v, c: (
        [*numbers(v), 1.0, 0.0, "exponential", True, "epoch"],
        [c.optim.decay_factor, c.optim.decay_every_epochs, c.optim.warmup_epochs, *schedule(c)],
    ),
    "mmpretrain_v2:schedule": lambda v, c: (
        [*numbers(v), 1.0, "exponential", True, "epoch"],
        [c.optim.decay_factor, c.optim.decay_every_epochs, *schedule(c)],
    ),
    "torchvision_v2_IMAGENET1K_V2:schedule": lambda v, c: (
        [*numbers(v), "cosine", "epoch"],
        [c.optim.warmup_epochs, c.optim.warmup_init_lr / c.peak_lr, c.optim.final_lr, *schedule(c)],
    ),
    "efficientnet_jax_default:schedule": lambda v, c: (  # the last, its least rate, isn't reached
        [*numbers(v)[:-1], numbers(v)[-1] < 0.97 ** (450 / 2.4) * 0.014],
        [c.optim.decay_factor, c.optim.decay_every_epochs, c.optim.warmup_epochs, c.optim.reference_lr, True],
    ),
    "dli14_v2:schedule": lambda v, c: (
        [*numbers(v), 0.0, "cosine", "step"],
        [c.peak_lr, c.optim.warmup_epochs, *schedule(c)],
    ),
    "dli14_v2_best:schedule": lambda v, c: (
        [*numbers(v), "cosine", "step"],
        [c.peak_lr, c.optim.warmup_init_lr, c.peak_lr, c.optim.warmup_epochs, *schedule(c)],
    ),
    "dli14_v3:schedule": lambda v, c: (
        [*numbers(v), "cosine", "step"],
        [c.peak_lr, c.optim.warmup_init_lr, c.optim.warmup_epochs, *schedule(c)],
    ),
    "weight_decay": lambda v, c: (numbers(v)[0], c.optim.weight_decay),
    "dli14_v2_best:weight_decay": lambda v, c: (
        [*numbers(v), "biases and BN"],
        [c.optim.weight_decay, {"no_norm_bias": "biases and BN"}[c.optim.weight_decay_on]],
    ),
    "weight_decay.value": lambda v, c: (v, c.optim.weight_decay),
    "weight_decay.excluded": lambda v, c: (DECAYED[v], c.optim.weight_decay_on),
    "weight_decay.note": lambda v, c: (DECAYED[v], c.optim.weight_decay_on),
    "tfmg_v2:weight_decay.form": lambda v, c: (DECAYED[v], c.optim.weight_decay_on),
    "weight_decay.norm_layers": lambda v, c: (v > 0, c.optim.weight_decay_on == "all"),
    "weight_decay_excludes": lambda v, c: ({("batch_normalization",): "no_norm"}[tuple(v)], c.optim.weight_decay_on),
    "l2": lambda v, c: (v, c.optim.l2),
    "label_smoothing": lambda v, c: (v, c.loss.label_smoothing),
    "dli14_v3:label_smoothing": lambda v, c: (
        numbers(v)[0] if "large" in c.model.name else 0.0,
        c.loss.label_smoothing,
    ),
    "dropout": lambda v, c: (v, c.model.dropout),
    "corenet_v2:dropout": lambda v, c: (min(numbers(v)[0], numbers(v)[1] * c.model.width), c.model.dropout),
    "dli14_v2:dropout": lambda v, c: ({"none": 0.0}[v], c.model.dropout),
    "dli14_v3:dropout": lambda v, c: (numbers(v)[0], c.model.dropout),
    "drop_path": lambda v, c: (v, c.model.drop_path),
    "ema": lambda v, c: (None if "none" in str(v).lower() else v, c.optim.ema_decay),
    "ema.decay": lambda v, c: (v, c.optim.ema_decay),
    "torchvision_v2_IMAGENET1K_V2:ema.decay": lambda v, c: (
        (1 - v) * c.data.batch_size * 32 / c.train.epochs,
        1 - c.optim.ema_decay,
    ),
    "ema.every_steps": lambda v, c: (v, c.optim.ema_every_steps),
    "ema.num_updates": lambda v, c: ("min(decay,(1+n)/(10+n))" in v, c.optim.ema_warmup),
    "ema.momentum": lambda v, c: (v, 1 - c.optim.ema_decay),
    "ema.meaning": lambda v, c: ("each step" in v, c.optim.ema_every_steps == 1 and not c.optim.ema_warmup),
    "bn.decay": lambda v, c: (v, c.norm.decay),
    "bn.momentum": lambda v, c: (v, c.norm.decay),
    "bn.torch_momentum": lambda v, c: (1 - v, c.norm.decay),
    "bn.eps": lambda v, c: (v, c.norm.epsilon),
    **{f"init.{kind}": initial(kind) for kind in (*KERNELS, "squeeze_excite_bias")},
    **{f"init_of_resnet50.{kind}": initial(kind) for kind in ("convolutions", "classifier", "classifier_bias")},
    **{f"init.attention.{kind}": initial(f"attention.{kind}") for kind in ATTENTION if kind != "depthwise"},
    **{f"init.attention_on_a_smaller_map.{kind}": initial(f"attention_on_a_smaller_map.{kind}") for kind in ATTENTION},
    "dtype": lambda v, c: (v, c.model.dtype),
    "amp": lambda v, c: (v, c.model.dtype == "bfloat16"),
    "random_crop.draw": lambda v, c: (v, c.data.crop_draw),
    "resizing.antialias": lambda v, c: (v, c.data.antialias),
    "augmentation.name": lambda v, c: ("fast_mode" in v, c.augment.color == "inception"),
    "augmentation.crop": lambda v, c: (
        [*numbers(v)[1:5], "tensorflow"],
        [*c.data.crop_ratio, *c.data.crop_area, c.data.crop_draw],
    ),
    "augmentation.resize": lambda v, c: (v, c.data.interpolation),
    "augmentation.flip": lambda v, c: (v, c.data.flip),
    "augmentation.color": lambda v, c: ("32/255 + saturation 0.5..1.5" in v, c.augment.color == "inception"),
    "augmentation.scale": lambda v, c: ({"[-1,1]": (0.5,) * 6}[v], c.data.mean + c.data.std),
    "augmentation.random_resized_crop.scale": lambda v, c: (v, c.data.crop_area),
    "augmentation.random_resized_crop.ratio": lambda v, c: (v, [round(x, 4) for x in c.data.crop_ratio]),
    "augmentation.random_resized_crop.interpolation": lambda v, c: (v, c.data.interpolation),
    "augmentation.multi_scale_sampler.base": lambda v, c: (v, c.data.resolution),
    "augmentation.multi_scale_sampler.min": lambda v, c: (v, c.data.scales[0]),
    "augmentation.multi_scale_sampler.max": lambda v, c: (v, c.data.scales[-1]),
    "augmentation.multi_scale_sampler.n_scales": lambda v, c: (v, len(c.data.scales)),
    "augmentation.multi_scale_sampler.divisible": lambda v, c: (0, sum(scale % v for scale in c.data.scales)),
    "augmentation.multi_scale_sampler.note": lambda v, c: (
        "grows when the crop shrinks" in v,
        checks.batch_shapes(c)[0][1] > checks.batch_shapes(c)[-1][1],
    ),
    "tfmg_v2:augmentation": lambda v, c: (
        [*numbers(v), True, "none"],
        [*c.data.crop_area, c.data.flip, c.augment.policy],
    ),
    "tfmg_v3_large:augmentation": lambda v, c: ({"AutoAugment v0": "autoaugment_tf"}[v[:14]], c.augment.policy),
    "torchvision_v2_IMAGENET1K_V1:augmentation": lambda v, c: (
        [*numbers(v), "random_resized", "bilinear", "none", "none", 0.0],
        [
            *(c.data.resolution, *c.data.crop_area, 0.5 * c.data.flip, c.data.crop, c.data.interpolation),
            *(c.augment.policy, c.augment.color, c.augment.erase_probability),
        ],
    ),
    "dli14_v2:augmentation": lambda v, c: (
        ["RandomResizedCrop, hflip, ImageNet norm", "random_resized", True, IMAGENET_NORM, "none"],
        [v, c.data.crop, c.data.flip, (c.data.mean, c.data.std), c.augment.policy],
    ),
    "paper_v4:augmentation": lambda v, c: (
        ["Inception crop, flip, RandAugment", "model_garden", True, "randaugment_tf"],
        [v, c.data.crop_draw, c.data.flip, c.augment.policy],
    ),
    "tf_slim_v2:eval": lambda v, c: (["central", *numbers(v)[:2]], crops(c)),
    "tfmg_v2:eval": lambda v, c: (["resize_crop", *numbers(v), 224], crops(c)),
    "dli14_v2:eval": lambda v, c: (["resize_crop", *numbers(v), 224], crops(c)),
    "eval": lambda v, c: (evaluation(v), crops(c)),
    "train_crop": lambda v, c: (v, c.data.resolution),
    "torchvision_v2_IMAGENET1K_V2:note": lambda v, c: (
        ["MixUp or CutMix chosen per batch", 1.0, 0.5],
        [v, c.augment.mix_probability, c.augment.cutmix_share],
    ),
    "command.--epochs": lambda v, c: (float(v), c.train.epochs),
    "command.--batch-size": lambda v, c: (8 * int(v), c.data.batch_size),
    "command.-b": lambda v, c: (numbers(v)[0] * numbers(v)[1], c.data.batch_size),
    "command.--lr": lambda v, c: (float(v), c.peak_lr),
    "command.--wd": lambda v, c: (float(v), c.optim.weight_decay),
    "command.--weight-decay": lambda v, c: (float(v), c.optim.weight_decay),
    "command.--norm-weight-decay": lambda v, c: (float(v) > 0, c.optim.weight_decay_on == "all"),
    "command.--lr-step-size": lambda v, c: (float(v), c.optim.decay_every_epochs),
    "command.--lr-gamma": lambda v, c: (float(v), c.optim.decay_factor),
    "command.--lr-scheduler": lambda v, c: ({"cosineannealinglr": ("cosine", "epoch")}[v], schedule(c)),
    "command.--sched": lambda v, c: ({"step": ("exponential", True, "epoch")}[v], schedule(c)),
    "command.--decay-epochs": lambda v, c: (float(v), c.optim.decay_every_epochs),
    "command.--decay-rate": lambda v, c: (float(v), c.optim.decay_factor),
    "command.--lr-warmup-epochs": lambda v, c: (float(v), c.optim.warmup_epochs),
    "command.--warmup-lr": lambda v, c: (float(v), c.optim.warmup_init_lr),
    "command.--lr-noise": lambda v, c: (numbers(v), c.optim.lr_noise),
    "command.--opt": lambda v, c: (OPTIMIZERS[v], rmsprop(c)),
    "torchvision_v3_V1:command.--opt": lambda v, c: (OPTIMIZERS["torch RMSprop"], rmsprop(c)),
    "command.--opt-eps": lambda v, c: (float(v), c.optim.epsilon),
    "command.--drop": lambda v, c: (float(v), c.model.dropout),
    "command.--drop-path": lambda v, c: (float(v), c.model.drop_path),
    "command.--model-ema": lambda v, c: ("", "" if c.optim.ema_decay else None),
    "command.--model-ema-decay": lambda v, c: (float(v), c.optim.ema_decay),
    "command.--auto-augment": lambda v, c: (POLICIES[v], c.augment.policy),
    "command.--aa": lambda v, c: (
        v,
        f"rand-m{c.augment.policy_magnitude:g}-mstd{c.augment.policy_magnitude_std:g}"
        + "-inc1" * c.augment.policy_increasing,
    ),
    "command.--random-erase": lambda v, c: (float(v), c.augment.erase_probability),
    "command.--reprob": lambda v, c: (float(v), c.augment.erase_probability),
    "command.--remode": lambda v, c: ({"pixel": "noise"}[v], c.augment.erase_fill),
    "command.--label-smoothing": lambda v, c: (float(v), c.loss.label_smoothing),
    "command.--mixup-alpha": lambda v, c: (float(v), c.augment.mixup_alpha),
    "command.--cutmix-alpha": lambda v, c: (float(v), c.augment.cutmix_alpha),
    "command.--train-crop-size": lambda v, c: (int(v), c.data.resolution),
    "command.--val-resize-size": lambda v, c: (int(v), 224 / c.data.eval_crop_fraction),
    "command.--ra-sampler": lambda v, c: ("", "" if c.augment.repeats > 1 else None),
    "command.--ra-reps": lambda v, c: (int(v), c.augment.repeats),
    "command.--amp": lambda v, c: ("", "" if c.model.dtype == "bfloat16" else None),
    "table.batch": lambda v, c: (v, c.data.batch_size),
    "table.peak_lr": lambda v, c: (v, c.peak_lr),
    "table.cosine_alpha": lambda v, c: ((v, "cosine", "step"), (c.optim.final_lr / c.peak_lr, *schedule(c))),
    "table.epochs": lambda v, c: (v, c.train.epochs),
    "table.warmup_epochs": lambda v, c: (v, c.optim.warmup_epochs),
    "table.adamw_weight_decay": lambda v, c: (("adamw", v), (c.optim.name, c.optim.weight_decay)),
    "table.beta1": lambda v, c: (v, c.optim.b1),
    "table.beta2": lambda v, c: (v, c.optim.b2),
    "table.eps": lambda v, c: (v, c.optim.epsilon),
    "table.ema": lambda v, c: (v, c.optim.ema_decay),
    "table.l2": lambda v, c: (v, c.optim.l2),
    "table.label_smoothing": lambda v, c: (v, c.loss.label_smoothing),
    "table.dropout": lambda v, c: (v, c.model.dropout),
    "table.stochastic_depth_peak": lambda v, c: (v, c.model.drop_path),
    "tfmg_v4:stochastic_depth.attention": lambda v, c: (
        [v.startswith("stochastic_depth_drop_rate, whatever"), True],
        [True, c.model.drop_path_rule == ("tf_model_garden" if c.model.drop_path else "linear")],
    ),
    "stochastic_depth": lambda v, c: ({"drop_path_rate * ": "timm"}[v[:17]], c.model.drop_path_rule),
    "table.randaug_prob": lambda v, c: (v, c.augment.policy_probability),
    "table.randaug_layers": lambda v, c: (v, c.augment.policy_layers),
    "table.randaug_magnitude": lambda v, c: (v, c.augment.policy_magnitude),
    "table.randaug_exclude": lambda v, c: ((v,), c.augment.policy_excluded),
    "table.mixup_cutmix_prob": lambda v, c: (v, c.augment.mix_probability),
    "table.mixup_alpha": lambda v, c: (v or 0.0, c.augment.mixup_alpha),
    "table.cutmix_alpha": lambda v, c: (v or 0.0, c.augment.cutmix_alpha),
    "table.switch_prob": lambda v, c: (v, c.augment.cutmix_share if c.augment.mixup_alpha else None),
    "differs_from_paper.conv_large": lambda v, c: (
        (*numbers(v)[:2], "flat"),
        (c.model.drop_path, c.augment.mix_probability, c.model.drop_path_rule),
    ),
    "differs_from_paper.conv_small": lambda v, c: (numbers(v)[1], c.train.epochs),
}
OTHERS = {  # leaves that say nothing of how to train
    "id": "its name",
    "init.source": "where it stands",
    "init_of_resnet50.source": "where it stands",
    "init.note": "why it isn't what the configuration says",
    "init.layer_scale": "one number of all networks; see tests/models/test_initial_weights.py",
    "stochastic_depth.others": "the rest of the rule that `stochastic_depth.attention` names",
    "stochastic_depth.source": "where it stands",
    "model": "the config file's",
    "command.--model": "the config file's",
    "source": "where it stands",
    "random_crop.where": "where it stands",
    "resizing.where": "where it stands, and where the pixels lie; see the comments of the recipes",
    "result": "what came of it",
    "result.*": "what came of it",
    "best_epoch": "what came of it",
    "differs_from_paper.hybrid_large": "what came of it",
    "schedule.note": "says of `decay_steps` what it is in epochs, and names a default that isn't used",
    "schedule_in_paper": "of `paper`; see below",
    "weight_decay.applied_to": "what isn't in `excluded`",
    "tf_slim_v2:weight_decay.form": "how L2 is written",
    "ema.over": "of weights and statistics, as ours always is",
    "ema.trainable_weights_only": "of weights and statistics, as ours always is",
    "ema.adjust": "says what `ema.decay` becomes",
    "bn.center": "ours always has",
    "bn.scale": "ours always has",
    "num_classes": "1001 with the background; ours is counted in the data",
    "other_widths": "says that there is nothing",
    "seed_note": "repeats n_scales",
    "augmentation.multi_scale_sampler.name": "the name of what the others say",
    "same_as": "followed by `facts`",
    "recipe": "followed by `facts`",
    "after": "averaging the best checkpoints, which isn't part of training",
    "large_command": "says that it wasn't read",
    "command.--lr-warmup-method": "linear, as ours always is",
    "table.columns": "the networks",
    "steps_per_epoch.*": "arithmetic",
    "one_hot": "mixed labels, as ours always are",
}


def apart(names):
    """Of the names of a fact and of the section it stands in, those that are in `OTHERS`."""
    return [name for name in (*names, f"{names[-1].partition('.')[0]}.*") if name in OTHERS]


def close(expected, actual):
    if isinstance(expected, list | tuple):
        return len(expected) == len(actual) and all(map(close, expected, actual))
    if isinstance(expected, str | bool | None):
        return expected == actual
    return actual == pytest.approx(expected, rel=1e-6)


RUNS = [(recipe, stem) for recipe, stems in CONFIGS.items() for stem in stems]


@pytest.mark.parametrize(("recipe", "stem"), RUNS)
def test_every_fact_of_a_recipe_is_in_its_config(recipe, stem):
    built = load(stem, recipe)
    for names, path, value in facts(recipe, stem):
        if apart(names) or (path in OF_ONE_NETWORK and OF_ONE_NETWORK[path] != stem):
            continue
        if path.startswith("table."):
            value = value[V4.index(stem)] if isinstance(value, list) else value
        fact = next((FACTS[name] for name in names if name in FACTS), None)
        assert fact, f"{recipe}: nothing compares {path}={value!r}; see FACTS and OTHERS"
        expected, actual = fact(value, built)
        assert close(expected, actual), f"{recipe} on {stem}: {path}={value!r} is {expected}, the config has {actual}"


OF_ONE_NETWORK = {
    "differs_from_paper.conv_small": "v4_conv_s",
    "differs_from_paper.conv_large": "v4_conv_l",
    **{f"init_of_resnet50.{kind}": "resnet50" for kind in ("convolutions", "classifier", "classifier_bias")},
}


def test_resnet_50_begins_as_torchvisions():
    built = load("resnet50", "torchvision_v2_IMAGENET1K_V2")
    for kind, said in ENTRIES["torchvision_v2_IMAGENET1K_V2"]["init_of_resnet50"].items():
        if kind != "source":
            expected, actual = FACTS[f"init_of_resnet50.{kind}"](said, built)
            assert close(expected, actual), kind


def test_no_comparison_waits_for_a_fact_that_nobody_states():
    stated = [names for recipe, stem in RUNS for names, _, _ in facts(recipe, stem)]
    used = {name for names in stated for name in (apart(names) or [n for n in names if n in FACTS][:1])}
    assert used == set(FACTS) | set(OTHERS)
    assert not set(FACTS) & set(OTHERS)


def test_columns_of_the_v4_table_are_in_the_order_of_the_configs():
    columns = ENTRIES["paper_v4"]["table"]["columns"]
    models = [load(stem, "paper_v4").model for stem in V4]
    assert [model.name for model in models] == [f"mobilenet_v4_{column}" for column in columns]
    # The paper says neither; its authors' code is TF model garden's.
    assert {model.init for model in models} == {"tf_model_garden"}
    assert [model.drop_path_rule for model in models] == ["linear"] + 4 * ["tf_model_garden"]


def test_the_papers_own_schedule_is_that_of_the_recipe_paper():
    said = ENTRIES["tf_slim_v2"]["schedule_in_paper"]
    assert said.startswith("0.045, x0.98 per epoch")
    paper, slim = load("w1_0", "paper").optim, load("w1_0", "tf_slim_v2").optim
    assert (paper.reference_lr, paper.decay_factor, paper.decay_every_epochs) == (0.045, 0.98, 1.0)
    assert slim.decay_every_epochs == 2.5


def test_every_published_recipe_runs_or_is_refused():
    assert len(ENTRIES) == 26
    assert set(ENTRIES) == set(CONFIGS) | set(REFUSED)
    assert set(CONFIGS) <= set(RECIPES)
    assert not set(REFUSED) & set(RECIPES)


@pytest.mark.parametrize("recipe", sorted(REFUSED))
def test_refused_with_the_reason_and_the_nearest_that_runs(recipe):
    with pytest.raises(UserError) as caught:
        load("w1_0", recipe)
    said = str(caught.value)
    assert f"recipe={recipe} can't be run" in said
    assert "\n" not in said
    nearest = said.partition("the nearest that runs: ")[2]
    assert set(nearest.split(" or ")) <= set(CONFIGS)


def test_what_is_missing_is_missing_in_the_facts():
    known = {recipe: " ".join(map(str, dict(leaves(ENTRIES[recipe])).values())) for recipe in REFUSED}
    assert "learning rate, batch, epochs" in known["paper_v1"]
    assert "ambiguous" in known["paper_v3"]
    assert "epochs" not in ENTRIES["paper_v3"]
    assert "exact command NOT published" in known["timm_v2_ra"]
    assert "batch" not in ENTRIES["timm_v2_050_lamb"]
    assert "gist text not available" in known["timm_ra4"]
    assert "needs JFT-300M" in known["paper_v4_distill"]


def top1(recipe, stem):
    """What is published of a recipe on a network, as printed in its docstring; None: nothing."""
    result, column = ENTRIES[recipe]["result"] or {}, stem.removeprefix("v3_")
    if stem in V4:
        place = V4.index(stem)
        column = ENTRIES["paper_v4"]["table"]["columns"][place]
        result = result["top1"] if isinstance(result["top1"], dict) else {column: result["top1"][place]}
    elif column not in result and stem == CONFIGS[recipe][0]:
        column = "top1"
    found = result.get(column)
    found = numbers(found)[0] if isinstance(found, str) else found
    return str(found[0] if isinstance(found, list) else found) if found is not None else None


PUBLISHED = {(recipe, stem): number for recipe, stem in RUNS if (number := top1(recipe, stem))}
WIDTHS = {"w0_75": 0.75, "w0_5": 0.5, "w0_35": 0.35, "w0_25": 0.25}  # of dli14_v2's table


def docstrings():
    """Of each config file, {recipe: top-1} as told: of its own and of the others."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        told = path.read_text().split('"""')[1]
        own = re.findall(r"^Expected of the recipe (\w+): (\d\d\.\d+) top-1", told, re.MULTILINE)
        others = re.findall(r"^    (\w+) +([\d.]+|none) +\d+ epochs ", told, re.MULTILINE)
        assert len(dict(own + others)) == len(own + others)
        yield path.stem, dict(own), dict(others)


def test_docstrings_tell_what_is_published_of_each_recipe_and_invent_nothing():
    assert {recipe for recipe, _ in PUBLISHED} == set(CONFIGS) - {"efficientnet_jax_default"}
    expected = PUBLISHED | {("efficientnet_jax_default", "w1_0"): "none"}
    for stem, width in WIDTHS.items():
        (row,) = (
            row
            for row in published("mobilenet_v2")
            if row["source"].startswith("d-li14/") and (row["width"], row["resolution"]) == (width, 224)
        )
        expected["dli14_v2", stem] = str(row["top1"])
    told = {stem: (own, others) for stem, own, others in docstrings()}
    for (recipe, stem), number in expected.items():
        own, others = told[stem]
        assert (own | others)[recipe] == number
    listed = {(recipe, stem) for stem, (_, others) in told.items() for recipe in others}
    assert listed <= set(expected)


def test_v4_recipes_have_a_column_for_v4_only():
    with pytest.raises(UserError, match=r"recipe=paper_v4: it has no column for mobilenet_v2; it has mobilenet_v4_c"):
        load("w1_0", "paper_v4")


def test_recipes_of_tensorflow_alone_resize_without_antialiasing():
    plain = {recipe for recipe, stem in RUNNABLE if not load(stem, recipe).data.antialias}
    assert plain == {"paper", "tf_slim_v2", *(name for name in RECIPES if name.startswith("tfmg_")), "paper_v4"}


def test_dropout_follows_the_network():
    assert load("v1_0_5", "corenet_v1").model.dropout == pytest.approx(0.05)
    assert load("v1_1_0", "corenet_v1").model.dropout == pytest.approx(0.1)
    slim = {"name": "mobilenet_v3_small", "width": 0.75}
    assert RECIPES["dli14_v3"](*slim.values())["model"]["dropout"] == 0.1
    assert RECIPES["dli14_v3"]("mobilenet_v3_large", 0.75)["model"]["dropout"] == 0.2


RUNNABLE = [(recipe, V4[0] if "v4" in recipe else "w1_0") for recipe in RECIPES]


@pytest.mark.parametrize(("recipe", "stem"), RUNNABLE)
def test_a_small_batch_keeps_the_schedule_by_images(recipe, stem):
    whole, small = load(stem, recipe), load(stem, recipe, ",batch=16")
    share = 16 / whole.data.batch_size
    assert small.peak_lr == pytest.approx(whole.peak_lr * share)
    for key in ("warmup_init_lr", "final_lr"):
        assert getattr(small.optim, key) == pytest.approx(getattr(whole.optim, key) * share)
    for key in ("warmup_steps", "decay_every_steps"):
        before, after = getattr(whole.optim, key), getattr(small.optim, key)
        assert (before is None and after is None) or after * 16 == pytest.approx(before * whole.data.batch_size)
    assert (small.train, small.norm.decay, small.optim.ema_decay) == (
        whole.train,
        whole.norm.decay,
        whole.optim.ema_decay,
    )
    checks.check_devices(small, 1)
    shapes = checks.batch_shapes(small)
    pixels = [images * scale**2 / (16 * small.data.resolution**2) for scale, images in shapes]
    assert 0.6 < min(pixels) <= max(pixels) < 2.1, shapes


@pytest.mark.parametrize(("recipe", "stem"), RUNNABLE)
def test_a_recipe_trains_on_one_device_as_it_is(recipe, stem):
    checks.check_devices(load(stem, recipe), 1)


def test_the_recipes_of_several_devices_train_on_as_many():
    for recipe, stem, devices in [("torchvision_v2_IMAGENET1K_V2", "w1_0", 8), ("corenet_v2", "w1_0", 4)]:
        checks.check_devices(load(stem, recipe), devices)


def test_a_resolution_that_is_asked_for_is_that_of_evaluation_too():
    asked = load("w1_0", "torchvision_v2_IMAGENET1K_V2", ",res=96").data
    assert (asked.resolution, asked.eval_resolution) == (96, None)
