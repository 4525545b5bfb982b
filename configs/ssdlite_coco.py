r"""SSDLite on MobileNetV2 1 for COCO's 80 classes: 4,337,013 parameters, 734.6 M MAdds at 300 px, 1917 anchors.

Published mAP: 22.1 on test-dev (the paper, table 6, at 320 px); 22 on a part of val (TensorFlow's model zoo).
Expected with recipe tf_ssdlite_v2: unknown, since the length of the published training is. Not trained here yet.
Cost: 200,000 steps of 24 images, 1.1e16 multiply-adds in training.

    python -m mnv2_jax.main --config=configs/ssdlite_coco.py:path=coco \
        --config.init.weights=v2.safetensors --config.init.head=new
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns TensorFlow's recipe on COCO, or the data and recipe in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="coco", recipe="tf_ssdlite_v2", name="mobilenet_v2", width=1.0)
