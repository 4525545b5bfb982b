"""MobileNetV2 0.5 on ImageNet.

1,968,680 parameters and 97.1 M MAdds at 224 px.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    return presets.preset(arg, name="mobilenet_v2", width=0.5)
