r"""SSDLite on MobileNetV3-Large with torchvision's reduced tail: 3,440,060 parameters, 583.2 M MAdds at 320 px.

These counts are of torchvision's 90 classes; COCO's 80 need fewer.
Published mAP on val: 21.3 (torchvision's ssdlite320_mobilenet_v3_large).
Expected with recipe torchvision_ssdlite_v3: 21.3 ± 0.5. Not trained here yet.
Cost: 660 epochs of 118,287 images, 1.4e17 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/ssdlite_v3_coco.py:path=coco
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns torchvision's recipe on COCO, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(
        arg,
        data="coco",
        recipe="torchvision_ssdlite_v3",
        name="mobilenet_v3_large",
        width=1.0,
        padding="symmetric",
        reduced_tail="torchvision",
    )
