"""MobileNetV2 0.5 on ImageNet at 224 px: 1,968,680 parameters, 97.1 M MAdds.

Published top-1 / top-5: TF-slim 65.4 / 86.4. Not trained with this code yet.
Expected of the recipe paper: 65.4 top-1, TF-slim's, ± 0.3 (see `mnv2_jax.recipes`).
Cost: its 412 epochs of 1.28 million images, 1.5e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/w0_5.py:path=IMAGENET

data=digits takes the recipe digits, data=cifar10 cifar, data=folder:DIR and data=tfds:NAME scratch.

Other recipes (path=IMAGENET,recipe=NAME): top-1 as published, ± 0.3 too, epochs and multiply-adds in training.

    dli14_v2  64.592  150 epochs  5.6e16
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """The paper's recipe on ImageNet, or what ``arg`` asks for (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper", name="mobilenet_v2", width=0.5)
