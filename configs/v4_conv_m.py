"""MobileNetV4-Conv-M on ImageNet at 256 px: 9,715,512 parameters, 1,080.2 M MAdds.

Published top-1 / top-5: paper 79.9; timm (e500) 79.916 / 95.188. Not trained with this code yet.
The default recipe is MobileNetV2's, not that of the family's own paper: 412 epochs of 1.28 million images.

    python -m mnv2_jax.main --config=configs/v4_conv_m.py:path=IMAGENET
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """The default recipe, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, name="mobilenet_v4_conv_medium")
