"""MobileNetV3-Large minimalistic on ImageNet at 224 px: 3,924,288 parameters, 209.1 M MAdds.

Published top-1 / top-5: TF-slim 72.3; its weights by timm 72.270 / 90.664. Not trained with this code yet.
Expected of the recipe tfmg_v3_large: not published for this network; about TF-slim's 72.3.
Cost: its 700 epochs of 1.28 million images, 5.6e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v3_large_minimalistic.py:path=IMAGENET

data=digits takes the recipe digits, data=cifar10 cifar, data=folder:DIR and data=tfds:NAME scratch.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """TF model garden's recipe on ImageNet, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="tfmg_v3_large", name="mobilenet_v3_large_minimalistic")
