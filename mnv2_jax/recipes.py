"""Recipes: tables of deltas from the defaults in `config`.

What the authors published stands here number for number; `tests/test_recipes.py` compares each with a file of facts.
Where their paper or README is silent, the number is that of their code, named beside it. What holds for all of them:

* `optim.reference_lr` and `data.batch_size` are those of the source, over all its devices.
* `norm.group_size` is what one device of the source had, but at most 128, so that eight devices get whole groups,
  and 32 where it isn't known or batches have several sizes. From 16 images on it hardly matters (Wu & He,
  arXiv:1803.08494, figure 1).
* PyTorch's `amp` computed in float16; bfloat16 here, which needs no loss scaling.
* `model.init` draws every kind of layer as the source's code does, and `model.drop_path_rule` drops paths so.
* `model.padding` and `model.width_rule` are the config file's: they belong to the network.

What to expect is the published top-1 ± 0.3, as the docstrings of `configs/` say. Nobody has published how far seeds
spread; but MobileNetV2 came out within 0.2 where four groups trained it by the paper's schedule, with RMSProp or SGD
(paper 72.0, TF-slim 71.8, torchvision 71.878, mmpretrain 71.86), and MobileNetV4's authors print 83.4 and 83.7 for the
same Hybrid-L.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mnv2_jax.errors import UserError

Tree: TypeAlias = dict[str, Any]
Recipe: TypeAlias = Tree | Callable[[str, float], Tree]
"""A tree of config keys, or what makes one of a model's name and width."""


def _but(recipe: Tree, **sections: Tree) -> Tree:
    """``recipe`` with other values of some keys."""
    return recipe | {name: recipe.get(name, {}) | section for name, section in sections.items()}


# ----------------------------------------------------------------------------------------------------------------------
# TF-slim and the paper of MobileNetV2

PAPER: Tree = dict(
    # The paper gives batch 96, 0.045 and ×0.98 per epoch (section 6.1); the rest is TF-slim's (mobilenet README,
    # train_image_classifier.py, inception_preprocessing.py). 412 epochs are its 5.5 M steps of 96. It resizes by TF1's
    # resize_bilinear, which samples pixel i of the result at i * scale, where ours, as TF2, samples at
    # (i + 1/2) * scale - 1/2: in training and evaluation alike less than half a pixel of the result further on.
    model=dict(dropout=0.2, init="truncated_normal"),
    norm=dict(decay=0.997, epsilon=1e-3),
    data=dict(
        name="imagenet",
        batch_size=96,
        crop="random_resized",
        crop_area=(0.05, 1.0),
        crop_ratio=(0.75, 1.33),
        crop_draw="tensorflow",
        eval_crop="central",
        eval_crop_fraction=0.875,
        antialias=False,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    augment=dict(color="inception"),
    loss=dict(label_smoothing=0.1),
    optim=dict(
        name="rmsprop",
        reference_lr=0.045,
        reference_batch_size=96,
        momentum=0.9,
        rms_decay=0.9,
        epsilon=1.0,
        weight_decay=4e-5,
        weight_decay_on="no_depthwise",
        schedule="exponential",
        decay_factor=0.98,
        decay_every_epochs=1.0,
        ema_decay=0.9999,
    ),
    train=dict(epochs=412.0),
    checkpoint=dict(every_steps=5000),
)

TF_SLIM_V2 = _but(PAPER, norm=dict(group_size=96), optim=dict(decay_every_epochs=2.5))

# ----------------------------------------------------------------------------------------------------------------------
# TensorFlow model garden (official/vision) and the paper of MobileNetV4, by the same authors
#
# Its files count epochs of 312 steps, the whole batches of 4096; ours have 312.8.

_TFMG: Tree = dict(
    # configs/image_classification.py (mobilenet_imagenet): norm, crops, normalisation, the classifier's kernel;
    # modeling/backbones/mobilenet.py, modeling/layers/nn_blocks.py: the other kernels.
    # dataloaders/classification_input.py: TF2's tf.image.resize, as ours; but evaluation, too, crops first and then
    # resizes, which shifts pixels by less than one.
    model=dict(dropout=0.2, init="tf_model_garden", dtype="bfloat16"),
    norm=dict(decay=0.997, epsilon=1e-3),
    data=dict(
        name="imagenet",
        batch_size=4096,
        crop_area=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        crop_draw="model_garden",
        antialias=False,
    ),
    loss=dict(label_smoothing=0.1),
)

TFMG_V2 = _TFMG | dict(
    optim=dict(
        name="rmsprop",
        reference_lr=0.256,
        reference_batch_size=4096,
        momentum=0.9,
        rms_decay=0.9,
        rms_init=0.0,  # as Keras
        epsilon=0.002,
        weight_decay=1e-5,  # tasks/image_classification.py halves it, since Keras' regulariser doesn't
        weight_decay_on="no_depthwise",
        schedule="exponential",
        decay_factor=0.96,
        decay_every_steps=780,
        warmup_steps=1560,
        warmup_to="schedule",
    ),
    train=dict(epochs=500.0),
)

TFMG_V1 = _but(TFMG_V2, optim=dict(decay_factor=0.94))

TFMG_V3_LARGE = _TFMG | dict(
    augment=dict(policy="autoaugment_tf"),
    optim=dict(
        name="adamw",
        reference_lr=0.004,
        reference_batch_size=4096,
        b1=0.9,
        b2=0.999,
        epsilon=1e-7,
        weight_decay=0.1,
        weight_decay_on="no_norm",
        schedule="cosine",
        cosine_from="start",
        warmup_steps=1560,
        warmup_to="schedule",
    ),
    train=dict(epochs=700.0),
)

TFMG_V3_SMALL = _but(
    TFMG_V2,
    optim=dict(
        reference_lr=0.01,
        decay_factor=0.99,
        decay_every_steps=936,
        warmup_init_lr=0.001,
        ema_decay=0.9999,
    ),
    train=dict(epochs=1000.0),
)

V4_MODELS = tuple(
    f"mobilenet_v4_{name}" for name in ("conv_small", "conv_medium", "hybrid_medium", "conv_large", "hybrid_large")
)
"""The columns of `PAPER_V4`."""

PAPER_V4: Mapping[str, tuple[Any, ...]] = {
    # Qin et al., arXiv:2404.10518, table 10.
    "data.batch_size": (4096, 4096, 16384, 16384, 16384),
    "optim.reference_batch_size": (4096, 4096, 16384, 16384, 16384),
    "optim.reference_lr": (0.002, 0.004, 0.016, 0.004, 0.01),
    "optim.final_lr": (0.0, 0.0, 0.0, 0.0, 1e-5),  # the cosine's alpha, 0.001 of the peak
    "optim.warmup_epochs": (5.0, 5.0, 20.0, 20.0, 20.0),
    "train.epochs": (9600.0, 500.0, 500.0, 500.0, 500.0),
    "optim.weight_decay": (0.01, 0.1, 0.1, 0.2, 0.2),
    "optim.l2": (1e-5, 0.0, 0.0, 0.0, 0.0),
    "optim.b1": (0.6, 0.9, 0.9, 0.9, 0.9),
    "optim.b2": (0.999, 0.999, 0.999, 0.999, 0.999),
    "optim.epsilon": (1e-6, 1e-7, 1e-7, 1e-7, 1e-7),
    "optim.ema_decay": (0.9999, None, None, None, None),
    "loss.label_smoothing": (0.1, 0.1, 0.1, 0.1, 0.1),
    "model.dropout": (0.3, 0.2, 0.2, 0.2, 0.2),
    "model.drop_path": (0.0, 0.075, 0.075, 0.35, 0.35),
    "augment.policy_probability": (0.5, 0.7, 0.7, 1.0, 1.0),
    "augment.policy_layers": (2, 2, 2, 2, 2),
    "augment.policy_magnitude": (9.0, 15.0, 15.0, 15.0, 15.0),
    "augment.mix_probability": (0.0, 0.0, 0.0, 0.3, 0.3),
    "augment.mixup_alpha": (0.0, 0.0, 0.0, 0.8, 0.8),
    "augment.cutmix_alpha": (0.0, 0.0, 0.0, 1.0, 1.0),
    "augment.cutmix_share": (0.5, 0.5, 0.5, 0.5, 0.5),
    # Not in the table; from the files of tfmg_v4.
    "model.drop_path_rule": ("linear", "tf_model_garden", "tf_model_garden", "tf_model_garden", "tf_model_garden"),
    "model.dtype": ("float32", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    "norm.decay": (0.95, 0.997, 0.997, 0.997, 0.997),
    "norm.epsilon": (1e-6, 1e-3, 1e-3, 1e-3, 1e-3),
}

TFMG_V4: Mapping[str, tuple[Any, ...]] = {
    **PAPER_V4,
    # imagenet_mobilenetv4_*_tpu.yaml, where they differ; 9623 epochs are 3,002,368 steps.
    "train.epochs": (9623.0, 500.0, 500.0, 500.0, 500.0),
    "model.drop_path": (0.0, 0.075, 0.075, 0.2, 0.35),
    "model.drop_path_rule": ("linear", "tf_model_garden", "tf_model_garden", "flat", "tf_model_garden"),
    "augment.mix_probability": (0.0, 0.0, 0.0, 0.2, 0.3),
}

_V4 = _but(
    _TFMG,
    augment=dict(policy="randaugment_tf", policy_excluded=("Cutout",)),
    # The L2 of Conv-S lies on kernels that aren't depthwise; here on what its AdamW decays. Its average is of a fixed
    # decay from step 1560 on (dynamic_decay: false), here from the first. Its RandAugment shifts twice as far
    # (translate_const: 20).
    optim=dict(
        name="adamw",
        weight_decay_on="no_norm",
        schedule="cosine",
        cosine_from="start",
        warmup_to="schedule",
        ema_warmup=False,
    ),
)


def _v4(table: Mapping[str, tuple[Any, ...]]) -> Recipe:
    def recipe(name: str, width: float) -> Tree:
        del width
        if name not in V4_MODELS:
            raise UserError(f"it has no column for {name}; it has {', '.join(V4_MODELS)}")
        tree = _V4
        for key, row in table.items():
            section, _, leaf = key.partition(".")
            tree = _but(tree, **{section: {leaf: row[V4_MODELS.index(name)]}})
        return tree

    return recipe


# ----------------------------------------------------------------------------------------------------------------------
# CoreNet


def _corenet(dropout: float, **sections: Tree) -> Recipe:
    """projects/mobilenet_v*/classification/*.yaml; dropout shrinks with the width (modeling/models/classification).

    Its V1 has no activation after depthwise convolutions and its V1 and V2 keep some widths: model.width_rule=corenet.
    """
    base: Tree = dict(
        model=dict(init="kaiming_fan_out", dtype="bfloat16"),
        norm=dict(decay=0.9, epsilon=1e-5),
        data=dict(
            name="imagenet",
            crop_area=(0.08, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            scales=(128, 192, 224, 288, 320),  # sampler/utils.py: five from 128 to 320, rounded to multiples of 32
            mean=(0.0, 0.0, 0.0),  # pixels from 0 to 1
            std=(1.0, 1.0, 1.0),
        ),
        loss=dict(label_smoothing=0.1),
        optim=dict(
            name="sgd",
            momentum=0.9,
            nesterov=True,
            weight_decay=4e-5,
            weight_decay_on="no_norm_bias",
            schedule="cosine",
            cosine_from="start",  # optims/scheduler/cosine.py
            update_every="epoch",
            ema_decay=0.9995,
            ema_warmup=False,
        ),
        train=dict(epochs=300.0),
    )
    tree = _but(base, **sections)

    def recipe(name: str, width: float) -> Tree:
        del name
        return _but(tree, model=dict(dropout=min(dropout, round(dropout * width, 3))))

    return recipe


_CORENET_OPTIM = dict(reference_lr=0.4, final_lr=2e-4, warmup_steps=7500, warmup_init_lr=0.05)

CORENET_V2 = _corenet(0.2, data=dict(batch_size=1024), optim=_CORENET_OPTIM | dict(reference_batch_size=1024))

CORENET_V1 = _corenet(0.1, data=dict(batch_size=512), optim=_CORENET_OPTIM | dict(reference_batch_size=512))

CORENET_V3_LARGE = _corenet(
    0.2,
    model=dict(init="corenet_v3"),
    data=dict(batch_size=2048),
    optim=dict(reference_lr=0.8, reference_batch_size=2048, final_lr=4e-4, warmup_steps=3000, warmup_init_lr=0.1),
)

# ----------------------------------------------------------------------------------------------------------------------
# torchvision, and others who train as it does

TORCHVISION_V2_V1: Tree = dict(
    # references/classification (README.md, train.py) and models/mobilenetv2.py.
    model=dict(dropout=0.2, init="kaiming_fan_out"),
    norm=dict(group_size=32, decay=0.9, epsilon=1e-5),
    data=dict(name="imagenet", batch_size=256, crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3)),
    optim=dict(
        name="sgd",
        reference_lr=0.045,
        reference_batch_size=256,
        momentum=0.9,
        weight_decay=4e-5,
        weight_decay_on="all",
        schedule="exponential",
        decay_factor=0.98,
        decay_every_epochs=1.0,
        update_every="epoch",
    ),
    train=dict(epochs=300.0),
)

TORCHVISION_V2_V2: Tree = dict(
    # Pull request 5560, train.py.
    model=dict(dropout=0.2, init="kaiming_fan_out"),
    norm=dict(group_size=128, decay=0.9, epsilon=1e-5),
    data=dict(
        name="imagenet",
        resolution=176,
        eval_resolution=224,
        eval_crop_fraction=224 / 232,
        batch_size=1024,
        crop_area=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
    ),
    augment=dict(
        policy="trivialaugment",
        erase_probability=0.1,
        erase_area=(0.02, 0.33),
        mixup_alpha=0.2,
        cutmix_alpha=1.0,  # one of the two, drawn for each batch
        repeats=4,
    ),
    loss=dict(label_smoothing=0.1),
    optim=dict(
        name="sgd",
        reference_lr=0.5,
        reference_batch_size=1024,
        momentum=0.9,
        weight_decay=2e-5,
        weight_decay_on="no_norm",
        schedule="cosine",
        warmup_epochs=5.0,
        warmup_init_lr=0.01 * 0.5,
        update_every="epoch",
        ema_decay=1 - (1 - 0.99998) * 1024 * 32 / 600,  # train.py: 1 - decay, times batch * model_ema_steps / epochs
        ema_every_steps=32,
        ema_warmup=False,
    ),
    train=dict(epochs=600.0),
)


def torchvision_v2_v2(name: str, width: float) -> Tree:
    """ResNet-50's IMAGENET1K_V2 was trained with the same options, too: "How to train state-of-the-art models using
    TorchVision's latest primitives", pytorch.org/blog; models/resnet.py."""
    del width
    is_resnet = name.startswith("resnet")
    return _but(TORCHVISION_V2_V2, model=dict(init="torchvision_resnet")) if is_resnet else TORCHVISION_V2_V2


_TORCHVISION_V3_NORM = dict(decay=0.99, epsilon=1e-3)  # models/mobilenetv3.py

TORCHVISION_V3_V1: Tree = dict(
    # Pull request 3354, for V3-Small; the README has V3-Large under the same heading. It averages its three best
    # checkpoints afterwards, which isn't done here.
    model=dict(dropout=0.2, init="torchvision_v3"),
    norm=dict(group_size=128) | _TORCHVISION_V3_NORM,
    data=dict(name="imagenet", batch_size=1024, crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3)),
    augment=dict(policy="autoaugment", erase_probability=0.2, erase_area=(0.02, 0.33)),
    optim=dict(
        name="rmsprop",
        reference_lr=0.064,
        reference_batch_size=1024,
        momentum=0.9,
        rms_decay=0.9,
        rms_init=0.0,
        epsilon=0.0316,
        epsilon_in_sqrt=False,
        lr_in_momentum=False,
        weight_decay=1e-5,
        weight_decay_on="all",
        schedule="exponential",
        decay_factor=0.973,
        decay_every_epochs=2.0,
        update_every="epoch",
    ),
    train=dict(epochs=600.0),
)

TORCHVISION_V3_LARGE_V2 = _but(TORCHVISION_V2_V2, model=dict(init="torchvision_v3"), norm=_TORCHVISION_V3_NORM)

MMPRETRAIN_V2 = _but(TORCHVISION_V2_V1, model=dict(dropout=0.0))  # its LinearClsHead has none

DLI14_V2: Tree = dict(
    # d-li14/mobilenetv2.pytorch: README.md, imagenet.py, models/imagenet/mobilenetv2.py.
    model=dict(dropout=0.0, init="kaiming_fan_out"),
    norm=dict(decay=0.9, epsilon=1e-5),
    data=dict(name="imagenet", batch_size=256, crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3)),
    optim=dict(
        name="sgd",
        reference_lr=0.05,
        reference_batch_size=256,
        momentum=0.9,
        weight_decay=4e-5,
        weight_decay_on="all",
        schedule="cosine",
    ),
    train=dict(epochs=150.0),
)

DLI14_V2_BEST = _but(
    DLI14_V2,
    model=dict(dropout=0.2),
    norm=dict(group_size=128),
    data=dict(batch_size=1024),
    optim=dict(
        reference_lr=0.4,
        reference_batch_size=1024,
        weight_decay_on="no_norm_bias",
        warmup_epochs=5.0,
        warmup_init_lr=0.1,
    ),
    train=dict(epochs=250.0),
)


def dli14_v3(name: str, width: float) -> Tree:
    """d-li14/mobilenetv3.pytorch: README.md. Large has label smoothing, Small at 0.75 less dropout."""
    is_large = name.startswith("mobilenet_v3_large")
    is_slim_small = name.startswith("mobilenet_v3_small") and width <= 0.75
    return _but(
        DLI14_V2_BEST,
        model=dict(dropout=0.1 if is_slim_small else 0.2),
        norm=dict(group_size=32),
        loss=dict(label_smoothing=0.1 if is_large else 0.0),
        train=dict(epochs=150.0),
    )


# ----------------------------------------------------------------------------------------------------------------------
# timm, and efficientnet-jax by the same author

TIMM_V3_LARGE_RA: Tree = dict(
    # hfdocs/source/training_script.mdx; what its command doesn't say is train.py's default: three epochs of warm-up,
    # label smoothing of 0.1, crops resized by bilinear or bicubic filter at random (here bicubic, as in evaluation).
    model=dict(dropout=0.2, drop_path=0.2, drop_path_rule="timm", init="timm", dtype="bfloat16"),
    norm=dict(group_size=128, decay=0.9, epsilon=1e-5),
    data=dict(
        name="imagenet",
        batch_size=1024,
        crop_area=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        eval_crop_fraction=0.875,
        interpolation="bicubic",
    ),
    augment=dict(
        policy="randaugment_timm",
        policy_layers=2,
        policy_magnitude=9.0,
        policy_magnitude_std=0.5,
        policy_probability=0.5,
        erase_probability=0.2,
        erase_area=(0.02, 1 / 3),
        erase_fill="noise",
    ),
    loss=dict(label_smoothing=0.1),
    optim=dict(
        name="rmsprop",
        reference_lr=0.064,
        reference_batch_size=1024,
        momentum=0.9,
        rms_decay=0.9,
        epsilon=1e-3,
        weight_decay=1e-5,
        weight_decay_on="no_norm_bias",
        schedule="exponential",
        decay_factor=0.973,
        decay_every_epochs=2.4,
        update_every="epoch",
        warmup_epochs=3.0,
        warmup_init_lr=1e-6,
        lr_noise=(0.42, 0.9),
        ema_decay=0.9999,
        ema_warmup=False,
    ),
    train=dict(epochs=600.0),
)

EFFICIENTNET_JAX: Tree = dict(
    # rwightman/efficientnet-jax: train_configs/default.py, tf_linen_train.py, jeffnet/. Its learning rate is for 256
    # images. Its decays count from the end of the warm-up, ours from the start; its least rate, 1e-6, isn't reached.
    model=dict(dropout=0.2, drop_path=0.2, drop_path_rule="timm", init="efficientnet_jax", dtype="bfloat16"),
    norm=dict(decay=0.99, epsilon=1e-3),
    data=dict(
        name="imagenet",
        batch_size=224,
        crop_area=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        crop_draw="tensorflow",
        interpolation="bicubic",
    ),
    loss=dict(label_smoothing=0.1),
    optim=dict(
        name="rmsprop",
        reference_lr=0.016,
        reference_batch_size=256,
        momentum=0.9,
        rms_decay=0.9,
        epsilon=1e-3,
        weight_decay=1e-5,
        weight_decay_on="no_norm_bias",
        schedule="exponential",
        decay_factor=0.97,
        decay_every_epochs=2.4,
        warmup_epochs=5.0,
        ema_decay=0.99997,
        ema_warmup=False,
    ),
    train=dict(epochs=450.0),
)

# ----------------------------------------------------------------------------------------------------------------------
# Other data than ImageNet

SMALL_IMAGE_STRIDES = (1, 1, 2, 2, 2)
"""For 32 px: a 4×4 last feature map, as chenyaofo/pytorch-cifar-models."""

CIFAR = dict(
    # chenyaofo's cifar10.conf (SGD with Nesterov momentum, 0.1, 5e-4, cosine over 200 epochs, padded crop and
    # flip, dropout 0.2) at kuangliu's batch of 128.
    model=dict(dropout=0.2, strides=SMALL_IMAGE_STRIDES),
    norm=dict(decay=0.9, epsilon=1e-3),
    data=dict(
        name="cifar10",
        resolution=32,
        batch_size=128,
        crop="shift",
        pad_pixels=4,
        eval_crop_fraction=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    optim=dict(
        name="sgd",
        reference_lr=0.1,
        reference_batch_size=128,
        nesterov=True,
        weight_decay=5e-4,
        weight_decay_on="no_norm_bias",
    ),
    train=dict(epochs=200.0),
    checkpoint=dict(every_steps=2000),
)

CLIPPED_SGD = dict(name="sgd", reference_batch_size=64, nesterov=True, weight_decay=5e-4, clip_grad_norm=1.0)
"""For small sets; what clipping is for stands in `DIGITS`."""

DIGITS = dict(
    # 1,437 training images of 8×8, shown at 32×32: small enough that a laptop's CPU learns them in a minute or
    # two. Everything was chosen on training images (data.holdout_fraction of 0.2, 0.3 and 0.5). On so small images
    # the gradient's norm begins at 20 (50 to 80 with the paper's strides, in PyTorch too), and without clipping
    # the network errs twice as often or diverges.
    model=dict(dropout=0.3, init="kaiming_fan_out", strides=(2, 2, 2, 1, 2)),
    # On 861 held-out images of three seeds 4 errors with groups of 16, 9 with 64, 8 with 8; 16 are whole on 4 devices.
    # The decay changes what is evaluated, not the training: on 287 held-out images of three seeds after 6, 21 and 60
    # epochs 60.2, 97.6 and 99.5 % with 0.9; 73.8, 97.7 and 99.5 with 0.8; 10.0, 9.9 and 99.5 with 0.99.
    norm=dict(group_size=16, decay=0.8, epsilon=1e-3),
    data=dict(
        name="digits",
        resolution=32,
        batch_size=64,
        crop="shift",
        pad_pixels=3,
        flip=False,
        eval_crop_fraction=1.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    loss=dict(label_smoothing=0.1),
    optim=dict(CLIPPED_SGD, reference_lr=0.05),
    train=dict(epochs=60.0, eval_every_epochs=20.0),
    log=dict(every_steps=20),
    checkpoint=dict(every_steps=1000),
)

FINETUNE: Tree = dict(
    # From trained weights, some hundred to some ten thousand images.
    model=dict(dropout=0.2, init="kaiming_fan_out"),
    init=dict(head="new"),
    # On 229 held-out images of three seeds: after an epoch 66.8 % with 0.9, 64.8 with 0.95, 56.0 with 0.99;
    # at the end all are equal (80.6 to 82.0). Statistics measured anew before the evaluation: 70.6 after an epoch, and
    # equal from the third on.
    norm=dict(decay=0.9, epsilon=1e-3),
    data=dict(name="folder", batch_size=32),
    loss=dict(label_smoothing=0.1),
    optim=dict(CLIPPED_SGD, reference_lr=0.02, reference_batch_size=32),
    train=dict(epochs=10.0),
)

SCRATCH = dict(
    # Random weights and some thousand images: the paper's RMSProp, made for millions, learns next to nothing in so few
    # steps. SGD and cosine as in `CIFAR`, the crops of torchvision's ImageNet training, clipped as in `DIGITS`.
    model=dict(dropout=0.2, init="kaiming_fan_out"),
    norm=dict(decay=0.9, epsilon=1e-3),
    data=dict(name="folder", batch_size=64),
    loss=dict(label_smoothing=0.1),
    optim=dict(CLIPPED_SGD, reference_lr=0.1),
    train=dict(epochs=60.0),
)

RECIPES: Mapping[str, Recipe] = {
    "paper": PAPER,
    "tf_slim_v2": TF_SLIM_V2,
    "tfmg_v1": TFMG_V1,
    "tfmg_v2": TFMG_V2,
    "tfmg_v3_large": TFMG_V3_LARGE,
    "tfmg_v3_small": TFMG_V3_SMALL,
    "paper_v4": _v4(PAPER_V4),
    "tfmg_v4": _v4(TFMG_V4),
    "corenet_v1": CORENET_V1,
    "corenet_v2": CORENET_V2,
    "corenet_v3_large": CORENET_V3_LARGE,
    "torchvision_v2_IMAGENET1K_V1": TORCHVISION_V2_V1,
    "torchvision_v2_IMAGENET1K_V2": torchvision_v2_v2,
    "torchvision_v3_V1": TORCHVISION_V3_V1,
    "torchvision_v3_large_V2": TORCHVISION_V3_LARGE_V2,
    "mmpretrain_v2": MMPRETRAIN_V2,
    "dli14_v2": DLI14_V2,
    "dli14_v2_best": DLI14_V2_BEST,
    "dli14_v3": dli14_v3,
    "timm_v3_large_ra": TIMM_V3_LARGE_RA,
    "efficientnet_jax_default": EFFICIENTNET_JAX,
    "cifar": CIFAR,
    "digits": DIGITS,
    "scratch": SCRATCH,
    "finetune": FINETUNE,
}
"""By the names of the file of facts; `paper` is MobileNetV2's."""

REFUSED: Mapping[str, str] = {
    "paper_v1": "the paper gives no learning rate, batch size or epochs; the nearest that runs: tfmg_v1",
    "paper_v3": "the paper gives no epochs and a decay that reads in two ways; the nearest that runs: tfmg_v3_large or"
    " tfmg_v3_small",
    "timm_v2_ra": "its author never published the command; the nearest that runs: timm_v3_large_ra",
    "timm_v2_050_lamb": "its batch size and warm-up stand only in a file attached to issue 1021 of"
    " pytorch-image-models, which we don't have; the nearest that runs: timm_v3_large_ra",
    "timm_ra4": "its hyperparameters stand only in a gist that we don't have; the nearest that runs: paper_v4",
    "paper_v4_distill": "it needs JFT-300M, which isn't public; the nearest that runs: paper_v4",
}
"""Recipes with a hyperparameter that we can't know, and which it is."""


def resolve(name: str, model: str, width: float) -> Tree:
    """What a recipe says for a network.

    Args:
      name: a key of `RECIPES`.
      model: a name of `models.registry`.
      width: its width multiplier.

    Raises:
      UserError: where it says nothing of that network.
    """
    recipe = RECIPES[name]
    try:
        return recipe(model, width) if callable(recipe) else recipe
    except UserError as error:
        raise UserError(f"recipe={name}: {error}") from error
