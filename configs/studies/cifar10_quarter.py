"""MobileNetV2 0.25 on CIFAR-10 for ten epochs, three seeds: what two CPU cores say of CIFAR-10 in an hour and a half.

Claims: none; the study measures the spread over seeds of a run that is cut short.
Cost: 3 runs of 10 epochs of 50,000 images.

    python -m mnv2_jax.study run cifar10_quarter --workdir=studies/cifar10_quarter
"""

from mnv2_jax.study.design import Study


def get_study() -> Study:
    """Returns the study; the data are ``cifar10/`` in the folder where it is started."""
    return Study(
        base="w0_25:data=cifar10,path=cifar10",
        axes={"model.width": (0.25,)},
        settings={"train.epochs": 10, "train.eval_every_epochs": 1},
        train_images=50_000,
    )
