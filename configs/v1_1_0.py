"""MobileNetV1 1 on ImageNet at 224 px: 4,231,976 parameters, 568.7 M MAdds.

Published top-1 / top-5: paper 70.6; TF-slim 70.9 / 89.9; TF model garden 72.33. Not trained with this code yet.
Expected with recipe tfmg_v1: 72.33 top-1 ± 0.3, published by TF model garden; see `mnv2_jax.recipes`.
Cost: 500 epochs of 1.28 million images, 1.1e18 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v1_1_0.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    corenet_v1  74.04  300 epochs  5.1e17  at 128 to 320 px, with --config.model.width_rule=corenet
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns TF model garden's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="tfmg_v1", name="mobilenet_v1", width=1.0)
