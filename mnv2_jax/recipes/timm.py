"""Recipes of timm, and of efficientnet-jax by the same author."""

from __future__ import annotations

from mnv2_jax.recipes.tree import Tree

TIMM_V3_LARGE_RA: Tree = dict(
    # hfdocs/source/training_script.mdx. Other values are train.py's defaults: three epochs of warm-up, label smoothing
    # of 0.1, crops resized by a bilinear or bicubic filter at random (here always bicubic, as in evaluation).
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
    # images. Its decays count from the end of the warm-up, ours from the start. Its lowest rate, 1e-6, isn't reached.
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
