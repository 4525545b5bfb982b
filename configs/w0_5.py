"""MobileNetV2 0.5 on ImageNet at 224 px: 1,968,680 parameters, 97.1 M MAdds.

Published top-1 / top-5: TF-slim 65.4 / 86.4. Not trained with this code yet.
Expected with recipe paper: 65.4 top-1 ± 0.3, published by TF-slim; see `mnv2_jax.recipes`.
Cost: 412 epochs of 1.28 million images, 1.5e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/w0_5.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    dli14_v2  64.592  150 epochs  5.6e16
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper", name="mobilenet_v2", width=0.5)
