"""MobileNetV3-Small on ImageNet at 224 px: 2,542,856 parameters, 56.5 M MAdds.

Published top-1 / top-5: paper 67.5; Keras 68.1; torchvision v1 67.668 / 87.402. Not trained with this code yet.
Expected with recipe tfmg_v3_small: 67.5 top-1 ± 0.3, published by TF model garden; see `mnv2_jax.recipes`.
Cost: 1000 epochs of 1.28 million images, 2.2e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v3_small.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    torchvision_v3_V1  67.668  600 epochs  1.3e17  for an average of three checkpoints, which isn't computed here
    dli14_v3           67.214  150 epochs  3.3e16
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns TF model garden's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="tfmg_v3_small", name="mobilenet_v3_small")
