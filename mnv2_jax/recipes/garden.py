"""Recipes of TensorFlow model garden (official/vision), and of the paper of MobileNetV4, which has the same authors.

Model garden's files count 312 steps to an epoch, the whole batches of 4096 images; our epochs have 312.8 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mnv2_jax.errors import UserError
from mnv2_jax.recipes.tree import Recipe, Tree, but

_TFMG: Tree = dict(
    # configs/image_classification.py (mobilenet_imagenet): norm, crops, normalisation, the classifier's kernel;
    # modeling/backbones/mobilenet.py, modeling/layers/nn_blocks.py: the other kernels.
    # dataloaders/classification_input.py resizes with TF2's tf.image.resize, as we do. But in evaluation, too, it crops
    # before it resizes, which shifts pixels by less than one.
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

TFMG_V1 = but(TFMG_V2, optim=dict(decay_factor=0.94))

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

TFMG_V3_SMALL = but(
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
"""Networks of the columns of `PAPER_V4`."""

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
    # These are not in the table, but in the files of tfmg_v4.
    "model.drop_path_rule": ("linear", "tf_model_garden", "tf_model_garden", "tf_model_garden", "tf_model_garden"),
    "model.dtype": ("float32", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    "norm.decay": (0.95, 0.997, 0.997, 0.997, 0.997),
    "norm.epsilon": (1e-6, 1e-3, 1e-3, 1e-3, 1e-3),
}

TFMG_V4: Mapping[str, tuple[Any, ...]] = {
    **PAPER_V4,
    # Values of imagenet_mobilenetv4_*_tpu.yaml that differ from the paper; 9623 epochs are 3,002,368 steps.
    "train.epochs": (9623.0, 500.0, 500.0, 500.0, 500.0),
    "model.drop_path": (0.0, 0.075, 0.075, 0.2, 0.35),
    "model.drop_path_rule": ("linear", "tf_model_garden", "tf_model_garden", "flat", "tf_model_garden"),
    "augment.mix_probability": (0.0, 0.0, 0.0, 0.2, 0.3),
}

_V4 = but(
    _TFMG,
    augment=dict(policy="randaugment_tf", policy_excluded=("Cutout",)),
    # Three differences remain. Conv-S applies its L2 penalty to kernels that aren't depthwise; here it applies to all
    # parameters that AdamW decays. Its average has a fixed decay from step 1560 on (dynamic_decay: false); here from
    # the first step. Its RandAugment shifts twice as far (translate_const: 20).
    optim=dict(
        name="adamw",
        weight_decay_on="no_norm",
        schedule="cosine",
        cosine_from="start",
        warmup_to="schedule",
        ema_warmup=False,
    ),
)


def by_column(table: Mapping[str, tuple[Any, ...]]) -> Recipe:
    """Makes a recipe of a table of MobileNetV4, which has a column for each network."""

    def recipe(name: str, width: float) -> Tree:
        del width
        if name not in V4_MODELS:
            raise UserError(f"the recipe has no column for {name}; it has {', '.join(V4_MODELS)}")
        tree = _V4
        for key, row in table.items():
            section, _, leaf = key.partition(".")
            tree = but(tree, **{section: {leaf: row[V4_MODELS.index(name)]}})
        return tree

    return recipe
