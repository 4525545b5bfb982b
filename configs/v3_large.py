"""MobileNetV3-Large on ImageNet at 224 px: 5,483,032 parameters, 216.6 M MAdds.

Published top-1 / top-5: paper 75.2; Keras 75.6; torchvision v1 74.042 / 91.340. Not trained with this code yet.
The default recipe is MobileNetV2's, not that of the family's own paper: 412 epochs of 1.28 million images.

    python -m mnv2_jax.main --config=configs/v3_large.py:path=IMAGENET
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """The default recipe, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, name="mobilenet_v3_large")
