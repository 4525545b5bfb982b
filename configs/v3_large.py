"""MobileNetV3-Large on ImageNet at 224 px: 5,483,032 parameters, 216.6 M MAdds.

Published top-1 / top-5: paper 75.2; TF model garden 75.7; torchvision 75.274 / 92.566. Not trained with this code yet.
Expected with recipe tfmg_v3_large: 75.7 top-1 ± 0.3, published by TF model garden; see `mnv2_jax.recipes`.
Cost: 700 epochs of 1.28 million images, 5.8e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v3_large.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    corenet_v3_large         75.13   300 epochs  1.9e17  at 128 to 320 px
    torchvision_v3_V1        74.042  600 epochs  5.0e17  for an average of three checkpoints, which isn't computed here
    torchvision_v3_large_V2  75.274  600 epochs  3.1e17  at 176 px
    timm_v3_large_ra         75.784  600 epochs  5.0e17
    dli14_v3                 74.28   150 epochs  1.2e17
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns TF model garden's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="tfmg_v3_large", name="mobilenet_v3_large")
