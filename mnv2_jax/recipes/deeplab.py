"""Recipe of TensorFlow's DeepLab (tensorflow/models, research/deeplab)."""

from __future__ import annotations

from mnv2_jax.recipes.tree import Tree, but

DEEPLAB_VOC: Tree = dict(
    # The flags of train.py and their comments, for train_aug: 30,000 steps, learning rate 0.007, weight decay 4e-5 for
    # MobileNetV2. The comments ask for batches above 12, "more than 16 is better", where norms are trained. Scales are
    # drawn evenly here; there they are multiples of 0.25. The head's norms have DeepLab's decay of 0.9997 there, which
    # 30,000 steps need; here all norms have slim's 0.997 and epsilon.
    task="segmentation",
    model=dict(
        head="deeplabv3",
        head_channels=256,
        align_corners=True,
        output_stride=16,
        dropout=0.1,
        init="truncated_normal",
        dtype="bfloat16",
    ),
    norm=dict(group_size=16, decay=0.997, epsilon=1e-3),
    data=dict(
        name="voc_segmentation",
        resolution=513,
        batch_size=16,
        eval_batch_size=16,
        crop="scale",
        crop_scale=(0.5, 2.0),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    optim=dict(
        name="sgd",
        momentum=0.9,
        reference_lr=0.007,
        reference_batch_size=16,
        weight_decay=4e-5,
        weight_decay_on="no_depthwise",
        schedule="poly",
        poly_power=0.9,
    ),
    train=dict(steps=30_000, eval_every_epochs=5.0),
)
DEEPLAB_CITYSCAPES: Tree = but(
    # The author's numbers for train_fine (issue 3677 there: learning rate 0.01, crops of 769 px, 90,000 steps, norms
    # trained), and cityscapes.md's batch of 16. They are those of Xception and V2; V3's paper gives none for LR-ASPP,
    # and starts from random weights.
    DEEPLAB_VOC,
    model=dict(head="lraspp", head_channels=128, dropout=0.0),
    data=dict(name="cityscapes", resolution=769, eval_batch_size=4),
    optim=dict(reference_lr=0.01),
    train=dict(steps=90_000, eval_every_epochs=50.0),
)
