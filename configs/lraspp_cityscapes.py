r"""LR-ASPP on MobileNetV3-Large with a reduced tail for Cityscapes' 19 classes: 1,505,550 parameters, as published.

9.32 B MAdds at 1024 × 2048 px, of convolutions alone; the paper prints 9.74, and doesn't say of what.
Published mIoU on val: 72.36 (V3's paper, table 7), from random weights, at output stride 16. Expected ± 0.5.
The paper gives no recipe; this is DeepLab's. Not trained here yet.
Cost: 90,000 steps of 16 crops of 769 px, 1.1e16 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/lraspp_cityscapes.py:path=cityscapes
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns DeepLab's recipe on Cityscapes, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(
        arg,
        data="cityscapes",
        recipe="deeplab_cityscapes",
        name="mobilenet_v3_large",
        width=1.0,
        reduced_tail="paper",
    )
