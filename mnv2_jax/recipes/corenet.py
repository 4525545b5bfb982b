"""Recipes of CoreNet."""

from __future__ import annotations

from mnv2_jax.recipes.tree import Recipe, Tree, but


def _corenet(dropout: float, **sections: Tree) -> Recipe:
    """Makes a recipe of projects/mobilenet_v*/classification/*.yaml.

    The dropout rate shrinks with the width (modeling/models/classification). CoreNet's V1 has no activation after
    depthwise convolutions, and its V1 and V2 keep some widths; for both, set model.width_rule=corenet.
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
    tree = but(base, **sections)

    def recipe(name: str, width: float) -> Tree:
        del name
        return but(tree, model=dict(dropout=min(dropout, round(dropout * width, 3))))

    return recipe


CORENET_DEEPLABV3_V2: Tree = dict(
    # projects/mobilenet_v2/segmentation/ade20k_mobilenet_v2.yaml, as far as the published facts go. Left out: Gaussian
    # noise and blur. The colours are torchvision's jitter, not CoreNet's photometric distortion.
    task="segmentation",
    model=dict(
        head="deeplabv3",
        head_channels=512,
        aspp_rates=(12, 24, 36),
        aux_head=True,
        align_corners=True,
        output_stride=8,
        dropout=0.1,
        init="kaiming_fan_out",
        dtype="bfloat16",
    ),
    norm=dict(group_size=16, decay=0.9, epsilon=1e-5),  # synchronised over its four GPUs
    data=dict(
        name="ade20k",
        resolution=512,
        batch_size=16,
        eval_batch_size=16,
        crop="scale",
        crop_short_side=(256, 768),
        crop_long_side=1024,
        crop_class_share=0.75,
        eval_short_side=512,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    ),
    augment=dict(color="jitter", color_jitter=(0.5, 0.5, 0.5, 0.05), rotation_degrees=10.0),
    loss=dict(aux_weight=0.4),
    optim=dict(
        name="sgd",
        momentum=0.9,
        reference_lr=0.02,
        reference_batch_size=16,
        final_lr=1e-4,
        weight_decay=1e-4,
        weight_decay_on="no_norm_bias",
        schedule="cosine",
        update_every="epoch",
        ema_decay=0.9999,
        ema_warmup=False,
    ),
    train=dict(epochs=50.0),
)

_CORENET_OPTIM = dict(reference_lr=0.4, final_lr=2e-4, warmup_steps=7500, warmup_init_lr=0.05)

CORENET_V2 = _corenet(0.2, data=dict(batch_size=1024), optim=_CORENET_OPTIM | dict(reference_batch_size=1024))

CORENET_V1 = _corenet(0.1, data=dict(batch_size=512), optim=_CORENET_OPTIM | dict(reference_batch_size=512))

CORENET_V3_LARGE = _corenet(
    0.2,
    model=dict(init="corenet_v3"),
    data=dict(batch_size=2048),
    optim=dict(reference_lr=0.8, reference_batch_size=2048, final_lr=4e-4, warmup_steps=3000, warmup_init_lr=0.1),
)
