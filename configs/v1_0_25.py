"""MobileNetV1 0.25 on ImageNet at 224 px: 470,072 parameters, 41.0 M MAdds.

Published top-1 / top-5: paper 50.6; TF-slim 49.8 / 74.2. Not trained with this code yet.
Expected with recipe tfmg_v1: no number is published at this width; expect at least TF-slim's 49.8.
Cost: 500 epochs of 1.28 million images, 7.9e16 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v1_0_25.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns TF model garden's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="tfmg_v1", name="mobilenet_v1", width=0.25)
