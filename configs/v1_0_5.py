"""MobileNetV1 0.5 on ImageNet at 224 px: 1,331,592 parameters, 149.5 M MAdds.

Published top-1 / top-5: paper 63.7; TF-slim 63.3 / 84.9. Not trained with this code yet.
The default recipe is MobileNetV2's, not that of the family's own paper: 412 epochs of 1.28 million images.

    python -m mnv2_jax.main --config=configs/v1_0_5.py:path=IMAGENET
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """The default recipe, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, name="mobilenet_v1", width=0.5)
