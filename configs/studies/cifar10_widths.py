"""MobileNetV2 of four widths on CIFAR-10, against the accuracies of chenyaofo's pytorch-cifar-models.

Claims: 92.88, 93.72, 93.79 and 94.22 % top-1 at widths 0.5, 0.75, 1.0 and 1.4, each ± 0.5 points; published as the best
epoch of one run.
Cost: 12 runs of 200 epochs of 50,000 images, 120 million images in all.

    python -m mnv2_jax.study plan cifar10_widths
"""

from mnv2_jax.study.design import Claim, Relation, Study

PUBLISHED = {0.5: 0.9288, 0.75: 0.9372, 1.0: 0.9379, 1.4: 0.9422}


def get_study() -> Study:
    """Returns the study; the data are ``cifar10/`` in the folder where it is started."""
    return Study(
        base="w1_0:data=cifar10,path=cifar10",
        axes={"model.width": tuple(PUBLISHED)},
        settings={"train.eval_every_epochs": 1},
        claims=[
            Claim(
                cell={"model.width": width},
                published=top1,
                tolerance=0.005,
                when="best",
                source="chenyaofo/pytorch-cifar-models",
            )
            for width, top1 in PUBLISHED.items()
        ],
        relations=[Relation(better={"model.width": 1.4}, worse={"model.width": 0.5}, when="best")],
        spread=0.0015,
        train_images=50_000,
    )
