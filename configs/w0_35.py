"""MobileNetV2 0.35 on ImageNet at 224 px: 1,677,128 parameters, 59.3 M MAdds.

Published top-1 / top-5: TF-slim 60.3 / 82.9. Not trained with this code yet.
Expected with recipe paper: 60.3 top-1 ± 0.3, published by TF-slim; see `mnv2_jax.recipes`.
Cost: 412 epochs of 1.28 million images, 9.4e16 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/w0_35.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    dli14_v2  60.092  150 epochs  3.4e16
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper", name="mobilenet_v2", width=0.35)
