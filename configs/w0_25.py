"""MobileNetV2 0.25 on ImageNet.

1,519,112 parameters and 37.2 M MAdds at 224 px.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    return presets.preset(arg, name="mobilenet_v2", width=0.25)
