"""MobileNetV3-Large minimalistic on ImageNet at 224 px: 3,924,288 parameters, 209.1 M MAdds.

Published top-1 / top-5: TF-slim 72.3; the same weights in timm 72.270 / 90.664. Not trained with this code yet.
Expected with recipe tfmg_v3_large: no number is published for this network; expect about TF-slim's 72.3.
Cost: 700 epochs of 1.28 million images, 5.6e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v3_large_minimalistic.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns TF model garden's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="tfmg_v3_large", name="mobilenet_v3_large_minimalistic")
