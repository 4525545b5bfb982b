"""MobileNetV3-Small on ImageNet at 224 px: 2,542,856 parameters, 56.5 M MAdds.

Published top-1 / top-5: paper 67.5; Keras 68.1; torchvision v1 67.668 / 87.402. Not trained with this code yet.
Expected of the recipe tfmg_v3_small: 67.5 top-1, TF model garden's, ± 0.3 (see `mnv2_jax.recipes`).
Cost: its 1000 epochs of 1.28 million images, 2.2e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v3_small.py:path=IMAGENET

data=digits takes the recipe digits, data=cifar10 cifar, data=folder:DIR and data=tfds:NAME scratch.

Other recipes (path=IMAGENET,recipe=NAME): top-1 as published, ± 0.3 too, epochs and multiply-adds in training.

    torchvision_v3_V1  67.668  600 epochs  1.3e17  averaged over three checkpoints, which isn't done here
    dli14_v3           67.214  150 epochs  3.3e16
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """TF model garden's recipe on ImageNet, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="tfmg_v3_small", name="mobilenet_v3_small")
