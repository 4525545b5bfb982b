"""V1, V2, V3-Small and V4-Conv-S on CIFAR-10 at 32 px, with the recipe `cifar` and the strides that it gives each.

The networks are compared by their scores and costs; nothing is claimed.
Cost: 12 runs of 200 epochs of 50,000 images.

    python -m mnv2_jax.study plan cifar10_family
"""

from mnv2_jax.study.design import Study

NETWORKS = ("v1_1_0", "w1_0", "v3_small", "v4_conv_s")


def get_study() -> Study:
    """Returns the study; the data are ``cifar10/`` in the folder where it is started."""
    return Study(
        base="w1_0:data=cifar10,path=cifar10,recipe=cifar",
        axes={"network": {name: {"config": f"{name}:data=cifar10,path=cifar10,recipe=cifar"} for name in NETWORKS}},
        train_images=50_000,
    )
