"""MobileNetV2 1.4 on ImageNet at 224 px: 6,108,776 parameters, 582.2 M MAdds.

Published top-1 / top-5: paper (table 4) 74.7; TF-slim 75.0 / 92.5. Not trained with this code yet.
Expected with recipe paper: 74.7 top-1 ± 0.3, published in the paper; see `mnv2_jax.recipes`.
Cost: 412 epochs of 1.28 million images, 9.2e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/w1_4.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper", name="mobilenet_v2", width=1.4)
