r"""Learns to find objects in your own images: SSDLite on MobileNetV2 1, from trained weights.

Put the images into images/{train,val} with XML files beside them (labelImg, PASCAL VOC), or YOLO's .txt files into
labels/{train,val}; docs/data.md says what else can be read.

    python -m mnv2_jax.main --config=configs/detect_folder.py:path=DIR \
        --config.init.weights=v2.safetensors --config.init.head=new

PASCAL VOC's layout:  detect_folder.py:data=voc_detection,path=VOCdevkit
COCO's files:         detect_folder.py:data=coco,path=coco
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the detect recipe on a folder of boxes, or on the data in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="box_folder", recipe="detect", name="mobilenet_v2", width=1.0)
