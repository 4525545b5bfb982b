"""MobileNetV2 1.3 on ImageNet.

5,386,792 parameters and 509.4 M MAdds at 224 px.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    return presets.preset(arg, name="mobilenet_v2", width=1.3)
