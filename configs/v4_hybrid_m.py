"""MobileNetV4-Hybrid-M on ImageNet at 256 px: 11,074,648 parameters, 1,271.2 M MAdds.

Published top-1 / top-5: paper 80.7; timm (ix_e550) 81.478 / 95.692. Not trained with this code yet.
Expected with recipe paper_v4: 80.7 top-1 ± 0.3, published in the paper; see `mnv2_jax.recipes`.
Cost: 500 epochs of 1.28 million images, 2.4e18 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/v4_hybrid_m.py:path=IMAGENET

Recipes of other data: digits for data=digits, cifar for data=cifar10, scratch for data=folder:DIR and data=tfds:NAME.

Other recipes (path=IMAGENET,recipe=NAME), with published top-1 (expected ± 0.3), epochs, and multiply-adds in training:

    tfmg_v4  80.7  500 epochs  2.4e18
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's recipe on ImageNet, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="imagenet", recipe="paper_v4", name="mobilenet_v4_hybrid_medium")
