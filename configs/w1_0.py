"""MobileNetV2 1 on ImageNet at 224 px: 3,504,872 parameters, 300.8 M MAdds.

Published top-1 / top-5: paper (table 4) 72.0; TF-slim 71.8 / 91.0. Not trained with this code yet.
Expected with recipe paper: 72.0 top-1 ± 0.3, published in the paper; see `mnv2_jax.recipes`.
Cost: 412 epochs of 1.28 million images, 4.8e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/w1_0.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    tf_slim_v2                    72.0    412 epochs  4.8e17
    tfmg_v2                       72.72   500 epochs  5.8e17
    corenet_v2                    72.93   300 epochs  2.7e17  at 128 to 320 px
    torchvision_v2_IMAGENET1K_V1  71.878  300 epochs  3.5e17
    torchvision_v2_IMAGENET1K_V2  72.154  600 epochs  4.3e17  at 176 px
    mmpretrain_v2                 71.86   300 epochs  3.5e17
    dli14_v2                      72.192  150 epochs  1.7e17
    dli14_v2_best                 72.834  250 epochs  2.9e17
    efficientnet_jax_default      none    450 epochs  5.2e17  no number is published
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper", name="mobilenet_v2", width=1.0)
