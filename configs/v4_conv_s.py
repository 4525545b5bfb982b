"""MobileNetV4-Conv-S on ImageNet at 224 px: 3,774,024 parameters, 186.0 M MAdds.

Published top-1 / top-5: paper 73.8; timm (e2400) 73.756 / 91.430. Not trained with this code yet.
Expected with recipe paper_v4: 73.8 top-1 ± 0.3, published in the paper; see `mnv2_jax.recipes`.
Cost: 9600 epochs of 1.28 million images, 6.9e18 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v4_conv_s.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    tfmg_v4  73.8  9623 epochs  6.9e18
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper_v4", name="mobilenet_v4_conv_small")
