"""MobileNetV3-Small minimalistic on ImageNet at 224 px: 2,044,736 parameters, 52.3 M MAdds.

Published top-1 / top-5: TF-slim 61.9; the same weights in timm 62.892 / 84.270. Not trained with this code yet.
Expected with recipe tfmg_v3_small: no number is published for this network; expect about TF-slim's 61.9.
Cost: 1000 epochs of 1.28 million images, 2.0e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v3_small_minimalistic.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns TF model garden's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="tfmg_v3_small", name="mobilenet_v3_small_minimalistic")
