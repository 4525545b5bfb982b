"""MobileNetV2 1.3 on ImageNet at 224 px: 5,386,792 parameters, 509.4 M MAdds.

Published top-1 / top-5: TF-slim 74.4 / 92.1. Not trained with this code yet.
Expected with recipe paper: 74.4 top-1 ± 0.3, published by TF-slim; see `mnv2_jax.recipes`.
Cost: 412 epochs of 1.28 million images, 8.1e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/w1_3.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper", name="mobilenet_v2", width=1.3)
