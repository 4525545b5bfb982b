r"""DeepLabv3 on MobileNetV2 1 for ADE20K's 150 classes: 7,956,886 parameters, 32.14 B MAdds at 512 px, output stride 8.

Published mIoU: CoreNet 35.20. Not trained with this code yet.
Expected with recipe corenet_deeplabv3_v2: 35.2 ± 1, published by CoreNet; the recipe says what it leaves out.
Cost: 50 epochs of 20,210 images, 9.7e16 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/deeplabv3_ade20k.py:path=ADEChallengeData2016 \
        --config.init.weights=mobilenetv2-1.00.pt --config.init.head=new

The weights are CoreNet's of ImageNet (72.93 top-1), whose layers pad and scale pixels as this config does.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns CoreNet's recipe on ADE20K, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(
        arg,
        data="ade20k",
        recipe="corenet_deeplabv3_v2",
        name="mobilenet_v2",
        width=1.0,
        width_rule="corenet",
        padding="symmetric",
    )
