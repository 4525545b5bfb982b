"""MobileNetV2 1 on ImageNet at 224 px: 3,504,872 parameters, 300.8 M MAdds.

Published top-1 / top-5: paper (table 4) 72.0; TF-slim 71.8 / 91.0. Not trained with this code yet.
Expected of the recipe paper: 72.0 top-1, the paper's, ± 0.3 (see `mnv2_jax.recipes`).
Cost: its 412 epochs of 1.28 million images, 4.8e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/w1_0.py:path=IMAGENET
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """The default recipe, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, name="mobilenet_v2", width=1.0)
