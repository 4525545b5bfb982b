"""Recipes of torchvision, and of others who train in the same way (mmpretrain, d-li14)."""

from __future__ import annotations

from mnv2_jax.recipes.tree import Tree, but

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
    """Returns the recipe IMAGENET1K_V2 of MobileNetV2, or of ResNet-50, which has the same options and another init.

    Source: "How to train state-of-the-art models using TorchVision's latest primitives", pytorch.org/blog;
    models/resnet.py.
    """
    del width
    is_resnet = name.startswith("resnet")
    return but(TORCHVISION_V2_V2, model=dict(init="torchvision_resnet")) if is_resnet else TORCHVISION_V2_V2


_TORCHVISION_V3_NORM = dict(decay=0.99, epsilon=1e-3)  # models/mobilenetv3.py

TORCHVISION_V3_V1: Tree = dict(
    # Pull request 3354, for V3-Small; the README has V3-Large under the same heading. torchvision averages its three
    # best checkpoints afterwards; we don't.
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

TORCHVISION_V3_LARGE_V2 = but(TORCHVISION_V2_V2, model=dict(init="torchvision_v3"), norm=_TORCHVISION_V3_NORM)

MMPRETRAIN_V2 = but(TORCHVISION_V2_V1, model=dict(dropout=0.0))  # its LinearClsHead has none

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

DLI14_V2_BEST = but(
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
    """Returns the recipe of d-li14/mobilenetv3.pytorch (README.md).

    Large has label smoothing, and Small at a width of 0.75 or less has less dropout.
    """
    is_large = name.startswith("mobilenet_v3_large")
    is_slim_small = name.startswith("mobilenet_v3_small") and width <= 0.75
    return but(
        DLI14_V2_BEST,
        model=dict(dropout=0.1 if is_slim_small else 0.2),
        norm=dict(group_size=32),
        loss=dict(label_smoothing=0.1 if is_large else 0.0),
        train=dict(epochs=150.0),
    )
