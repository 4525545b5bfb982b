"""MobileNetV2 0.35 on ImageNet.

1,677,128 parameters and 59.3 M MAdds at 224 px.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    return presets.preset(arg, name="mobilenet_v2", width=0.35)
