"""MobileNetV4-Conv-L on ImageNet at 384 px: 32,590,864 parameters, 6,376.2 M MAdds.

Published top-1 / top-5: paper 82.9; timm (e600) 82.974 / 96.244. Not trained with this code yet.
Expected with recipe paper_v4: 82.9 top-1 ± 0.3, published in the paper; see `mnv2_jax.recipes`.
Cost: 500 epochs of 1.28 million images, 1.2e19 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v4_conv_l.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    tfmg_v4  82.92  500 epochs  1.2e19
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper_v4", name="mobilenet_v4_conv_large")
