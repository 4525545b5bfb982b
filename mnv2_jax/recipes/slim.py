"""Recipes of TF-slim and of the paper of MobileNetV2."""

from __future__ import annotations

from mnv2_jax.recipes.tree import Tree, but

PAPER: Tree = dict(
    # The paper gives a batch of 96, a learning rate of 0.045 and a decay of ×0.98 per epoch (section 6.1). The rest
    # comes from TF-slim (mobilenet README, train_image_classifier.py, inception_preprocessing.py), whose 5.5 M steps of
    # 96 images are 412 epochs. TF-slim resizes with TF1's resize_bilinear, which samples pixel i of the result at
    # i * scale. Our resize, like TF2's, samples at (i + 1/2) * scale - 1/2, which is less than half a pixel of the
    # result further on, in training and evaluation alike.
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

TF_SLIM_V2 = but(PAPER, norm=dict(group_size=96), optim=dict(decay_every_epochs=2.5))
