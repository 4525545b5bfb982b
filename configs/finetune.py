"""Fine-tunes trained weights to classify your own images: MobileNetV2 1 with a new head; every layer is trained.

Put the images into train/CLASS/*.jpg and val/CLASS/*.jpg, in a folder or a tar. The weights bring their preprocessing.

    python -m mnv2_jax.main --config=configs/finetune.py:data=folder:DIR,res=128 --config.init.weights=v2.safetensors

Frozen backbone:     --config.finetune.train_from=classifier
Unfrozen in stages:  --config.finetune.train_from="('classifier','block_14','stem')"
                     --config.finetune.unfreeze_epochs="(2,5)"
Slower backbone:     --config.finetune.backbone_lr_factor=0.1
Unbalanced classes:  --config.loss.class_weights=balanced, or ="{cat: 3, dog: 0.5}"
Early stopping:      --config.train.patience=3
Another network:     --config.model.name=mobilenet_v1 --config.model.width=0.25
"""

from ml_collections import ConfigDict

from mnv2_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """Returns the finetune recipe on a folder, or on the data in ``arg`` (see `presets.preset`)."""
    return presets.preset(arg, data="folder", recipe="finetune", name="mobilenet_v2", width=1.0)
