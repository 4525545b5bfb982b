"""MobileNetV2 1.3 on ImageNet at 224 px: 5,386,792 parameters, 509.4 M MAdds.

Published top-1 / top-5: TF-slim 74.4 / 92.1. Not trained with this code yet.
Cost: the recipe's 412 epochs of 1.28 million images.

    python -m mnv2_jax.main --config=configs/w1_3.py:path=IMAGENET
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """The paper's recipe, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, name="mobilenet_v2", width=1.3)
