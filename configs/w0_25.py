"""MobileNetV2 0.25 on ImageNet at 224 px: 1,519,112 parameters, 37.2 M MAdds.

Published top-1 / top-5: d-li14/mobilenetv2.pytorch 52.35 / 75.93. Not trained with this code yet.
Expected with recipe paper: no number is published at this width; expect about d-li14's 52.35.
Cost: 412 epochs of 1.28 million images, 5.9e16 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/w0_25.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    dli14_v2  52.352  150 epochs  2.1e16
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper", name="mobilenet_v2", width=0.25)
