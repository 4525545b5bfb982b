"""MobileNetV4-Hybrid-L on ImageNet at 384 px: 37,764,624 parameters, 7,711.9 M MAdds.

Published top-1 / top-5: paper 83.4; timm (e600) 83.826 / 96.748. Not trained with this code yet.
The default recipe is MobileNetV2's, not that of the family's own paper: 412 epochs of 1.28 million images.

    python -m mnv2_jax.main --config=configs/v4_hybrid_l.py:path=IMAGENET
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """The default recipe, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, name="mobilenet_v4_hybrid_large")
