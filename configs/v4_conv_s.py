"""MobileNetV4-Conv-S on ImageNet at 224 px: 3,774,024 parameters, 186.0 M MAdds.

Published top-1 / top-5: paper 73.8; timm (e2400) 73.756 / 91.430. Not trained with this code yet.
Expected of the recipe paper_v4: 73.8 top-1, the paper's, ± 0.3 (see `mnv2_jax.recipes`).
Cost: its 9600 epochs of 1.28 million images, 6.9e18 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v4_conv_s.py:path=IMAGENET

data=digits takes the recipe digits, data=cifar10 cifar, data=folder:DIR and data=tfds:NAME scratch.

Other recipes (path=IMAGENET,recipe=NAME): top-1 as published, ± 0.3 too, epochs and multiply-adds in training.

    tfmg_v4  73.8  9623 epochs  6.9e18
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """The paper's recipe on ImageNet, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper_v4", name="mobilenet_v4_conv_small")
