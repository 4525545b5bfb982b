"""ResNet-50 on ImageNet at 224 px: 25,557,032 parameters, 4,089.2 M MAdds.

Published top-1 / top-5: torchvision v1 76.130 / 92.862, v2 80.858 / 95.434. Not trained with this code yet.
Expected with recipe torchvision_v2_IMAGENET1K_V2: 80.858 top-1 ± 0.3, published by torchvision; see `mnv2_jax.recipes`.
Cost: 600 epochs of 1.28 million images at 176 px, 5.8e18 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/resnet50.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns torchvision's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="torchvision_v2_IMAGENET1K_V2", name="resnet50")
