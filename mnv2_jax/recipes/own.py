"""Our own recipes, for other data than ImageNet."""

from __future__ import annotations

from mnv2_jax.recipes.tree import Tree

SMALL_IMAGE_STRIDES = (1, 1, 2, 2, 2)
"""Strides for images of 32 px, which give a last feature map of 4×4, as in chenyaofo/pytorch-cifar-models."""

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
"""Optimiser for small data sets. `DIGITS` says why the gradient is clipped."""

DIGITS = dict(
    # There are 1,437 training images of 8×8 pixels, resized to 32×32, so that a laptop's CPU trains on them in a minute
    # or two. All values were chosen on training images (data.holdout_fraction of 0.2, 0.3 and 0.5). On such small
    # images the norm of the gradient begins at 20 (50 to 80 with the paper's strides, also in PyTorch). Without
    # clipping the network makes twice as many errors, or diverges.
    model=dict(dropout=0.3, init="kaiming_fan_out", strides=(2, 2, 2, 1, 2)),
    # Groups of 16 images gave 4 errors on 861 held-out images of three seeds, groups of 64 gave 9, and groups of 8 gave
    # 8; groups of 16 also stay whole on 4 devices. The decay changes the evaluation but not the training. On 287
    # held-out images of three seeds, after 6, 21 and 60 epochs, a decay of 0.9 gave 60.2, 97.6 and 99.5 %; 0.8 gave
    # 73.8, 97.7 and 99.5; 0.99 gave 10.0, 9.9 and 99.5.
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
    # For training from given weights, on some hundred to some ten thousand images.
    model=dict(dropout=0.2, init="kaiming_fan_out"),
    init=dict(head="new"),
    # On 229 held-out images of three seeds, after one epoch, a decay of 0.9 gave 66.8 %, 0.95 gave 64.8, and 0.99 gave
    # 56.0; at the end all are equal (80.6 to 82.0). Measuring the statistics anew before the evaluation gave 70.6 after
    # one epoch, and no difference from the third on.
    norm=dict(decay=0.9, epsilon=1e-3),
    data=dict(name="folder", batch_size=32),
    loss=dict(label_smoothing=0.1),
    optim=dict(CLIPPED_SGD, reference_lr=0.02, reference_batch_size=32),
    train=dict(epochs=10.0),
)

SCRATCH = dict(
    # For training from random weights on some thousand images. The paper's RMSProp was made for millions of images, and
    # learns next to nothing in so few steps. SGD and cosine are those of `CIFAR`, the crops those of torchvision's
    # ImageNet training, and the clipping that of `DIGITS`.
    model=dict(dropout=0.2, init="kaiming_fan_out"),
    norm=dict(decay=0.9, epsilon=1e-3),
    data=dict(name="folder", batch_size=64),
    loss=dict(label_smoothing=0.1),
    optim=dict(CLIPPED_SGD, reference_lr=0.1),
    train=dict(epochs=60.0),
)

SEGMENT: Tree = dict(
    # A class for each pixel, on some hundred images and more: the small DeepLabv3 of MobileNetV2's paper (table 7) with
    # DeepLab's polynomial schedule, joint scaling and crops.
    task="segmentation",
    model=dict(head="deeplabv3", output_stride=16, dropout=0.1, init="kaiming_fan_out"),
    norm=dict(group_size=8, decay=0.9, epsilon=1e-3),
    data=dict(
        name="mask_folder",
        resolution=320,
        batch_size=8,
        eval_batch_size=8,
        crop="scale",
        crop_scale=(0.5, 2.0),
    ),
    augment=dict(color="jitter", color_jitter=(0.2, 0.2, 0.2, 0.05)),
    optim=dict(
        CLIPPED_SGD, reference_lr=0.05, reference_batch_size=8, weight_decay=1e-4, schedule="poly", poly_power=0.9
    ),
    train=dict(epochs=60.0, eval_every_epochs=5.0),
)

DETECT: Tree = dict(
    # Boxes of objects, on some hundred images and more: SSDLite from trained weights, SSD's crops, a cosine. On the
    # 87 images of BCCD's val, after 10 epochs at 256 px from weights, a learning rate of 0.006 gave an AP50 of 27.5 %,
    # 0.02 gave 55.9, 0.06 gave 79.3; from scratch 0.02 gave 3.8, and 0.06 gave 16.6. Larger ones weren't tried.
    task="detection",
    model=dict(head="ssdlite", init="kaiming_fan_out"),
    norm=dict(group_size=8, decay=0.9, epsilon=1e-3),
    data=dict(name="box_folder", resolution=320, batch_size=8, eval_batch_size=8, crop="iou", expand=2.0),
    augment=dict(color="jitter", color_jitter=(0.2, 0.2, 0.2, 0.05)),
    optim=dict(CLIPPED_SGD, reference_lr=0.06, reference_batch_size=8),
    train=dict(epochs=60.0, eval_every_epochs=5.0),
)
