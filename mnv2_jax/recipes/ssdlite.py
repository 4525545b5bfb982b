"""Recipes of SSDLite on COCO: TensorFlow's of MobileNetV2 and torchvision's of MobileNetV3."""

from __future__ import annotations

from mnv2_jax.recipes.tree import Tree

TF_SSDLITE_V2: Tree = dict(
    # ssdlite_mobilenet_v2_coco.config of the Object Detection API: 200,000 steps of 24 images, at a learning rate that
    # only falls after 800,720, from a trained detector; its comment says that the length is for another data set, and
    # nobody says how the published weights were trained. Its ssd_random_crop is SSD's with other shares of overlap, and
    # of the anchors without an object those train whose own boxes overlap by less than 0.99. Here torchvision's crop
    # and the plain ranking.
    task="detection",
    model=dict(head="ssdlite", anchors="tensorflow", box_scores="sigmoid", init="truncated_normal"),
    norm=dict(group_size=24, decay=0.9997, epsilon=1e-3),
    data=dict(
        name="coco",
        resolution=300,
        batch_size=24,
        eval_batch_size=24,
        crop="iou",
        antialias=False,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        eval_min_score=1e-8,
        eval_nms_iou=0.6,
    ),
    optim=dict(
        name="rmsprop",
        reference_lr=0.004,
        reference_batch_size=24,
        momentum=0.9,
        rms_decay=0.9,
        epsilon=1.0,
        l2=4e-5,
        schedule="exponential",
        decay_factor=0.95,
        decay_every_steps=800_720,
    ),
    train=dict(steps=200_000, eval_every_epochs=2.0),
)

TORCHVISION_SSDLITE_V3: Tree = dict(
    # references/detection/README.md: 8 GPUs of 24 images, 660 epochs, the preset ssdlite. On a GPU the statistics are
    # those of 24 images. The warm-up takes the steps of the first epoch. The weights are drawn from N(0, 0.03) there,
    # features included; images without boxes (1,021 of COCO's) and crowds are left out, while here the former train
    # the background and the latter nothing. Of boxes with the same best anchor the last has it, here the first.
    task="detection",
    model=dict(head="ssdlite", anchors="torchvision", box_scores="softmax", init="torchvision_v3"),
    norm=dict(group_size=24, decay=0.97, epsilon=1e-3),
    data=dict(
        name="coco",
        resolution=320,
        batch_size=192,
        eval_batch_size=24,
        crop="iou",
        antialias=False,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        eval_min_score=0.001,
        eval_nms_iou=0.55,
        eval_max_boxes=300,
    ),
    optim=dict(
        name="sgd",
        momentum=0.9,
        reference_lr=0.15,
        reference_batch_size=192,
        weight_decay=4e-5,
        weight_decay_on="all",
        schedule="cosine",
        update_every="epoch",
        warmup_steps=610,
        warmup_init_lr=0.15 / 1000,
        cosine_from="start",
    ),
    train=dict(epochs=660.0, eval_every_epochs=10.0),
)
