r"""The small DeepLabv3 on MobileNetV2 1 for PASCAL VOC's 21 classes: 2,113,557 parameters, 2.74 B MAdds at 513 px.

Published mIoU on val: 75.32 (the paper, table 7; TensorFlow's model zoo), trained on MS-COCO before train_aug.
Expected with recipe deeplab_voc: less, since COCO is left out; nobody has published by how much. Not trained here yet.
Cost: 30,000 steps of 16 images, 3.9e15 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/deeplabv3_voc.py:path=VOCdevkit \
        --config.init.weights=v2.safetensors --config.init.head=new

With SBD's masks (train_aug) the folder has ImageSets/Segmentation/trainaug.txt and SegmentationClassAug.
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns DeepLab's recipe on PASCAL VOC, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="voc_segmentation", recipe="deeplab_voc", name="mobilenet_v2", width=1.0)
