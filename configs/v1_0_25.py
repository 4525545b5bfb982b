"""MobileNetV1 0.25 on ImageNet at 224 px: 470,072 parameters, 41.0 M MAdds.

Published top-1 / top-5: paper 50.6; TF-slim 49.8 / 74.2. Not trained with this code yet.
The default recipe is MobileNetV2's, not that of the family's own paper: 412 epochs of 1.28 million images.

    python -m mnv2_jax.main --config=configs/v1_0_25.py:path=IMAGENET
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """The default recipe, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, name="mobilenet_v1", width=0.25)
