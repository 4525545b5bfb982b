"""MobileNetV2 1.4 on ImageNet.

6,108,776 parameters and 582.2 M MAdds at 224 px.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    return presets.preset(arg, name="mobilenet_v2", width=1.4)
