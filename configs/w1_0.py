"""MobileNetV2 1 on ImageNet.

3,504,872 parameters and 300.8 M MAdds at 224 px.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    return presets.preset(arg, name="mobilenet_v2", width=1.0)
