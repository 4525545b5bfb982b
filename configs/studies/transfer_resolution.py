"""Fine-tuning on a folder of photos at three resolutions: what a smaller image costs in accuracy.

Claims: 160 px beats 96 px. The photos are ``photos/`` and the weights ``v2.safetensors`` in the folder where it is
started.
Cost: 9 runs of 10 epochs of the photos.

    python -m mnv2_jax.study plan transfer_resolution
"""

from mnv2_jax.study.design import Relation, Study


def get_study() -> Study:
    """Returns the study."""
    return Study(
        base="finetune:data=folder:photos",
        axes={"res": (96, 128, 160)},
        settings={"init.weights": "v2.safetensors"},
        relations=[Relation(better={"res": 160}, worse={"res": 96})],
    )
