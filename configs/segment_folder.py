r"""Learns to give a class to each pixel of your own images: the small DeepLabv3 on MobileNetV2 1, from trained weights.

Put the images into images/{train,val}/NAME.jpg, the masks into masks/{train,val}/NAME.png, and the names of the classes
into classes.txt.

    python -m mnv2_jax.main --config=configs/segment_folder.py:path=DIR \
        --config.init.weights=v2.safetensors --config.init.head=new

Images that aren't square:  --config.data.size="(360,480)"
Masks of 0 and 255:         --config.data.mask_values=binary
A class to leave out:       --config.data.ignored_classes="('Unlabelled',)"
LR-ASPP:                    --config.model.head=lraspp --config.model.head_channels=128
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the segment recipe on a folder of masks, or on the data in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="mask_folder", recipe="segment", name="mobilenet_v2", width=1.0)
