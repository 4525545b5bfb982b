"""Width and resolution on the digits that come with scikit-learn: 3 widths × 2 resolutions × 3 seeds, 10 epochs each.

Claims: none is published; the relations say that a wider network and a higher resolution have a higher score.
Cost: 18 runs of 10 epochs of 1,437 images, about 7 minutes on two CPU cores.

    python -m mnv2_jax.study run digits_widths --workdir=studies/digits_widths
"""

from mnv2_jax.study.design import Relation, Study


def get_study() -> Study:
    """Returns the study."""
    return Study(
        base="w0_35:data=digits",
        axes={"model.width": (0.25, 0.35, 0.5), "data.resolution": (16, 32)},
        settings={"train.epochs": 10, "log.tensorboard": False},
        relations=[
            *(
                Relation(
                    better={"model.width": 0.5, "data.resolution": resolution},
                    worse={"model.width": 0.25, "data.resolution": resolution},
                )
                for resolution in (16, 32)
            ),
            *(
                Relation(
                    better={"model.width": width, "data.resolution": 32},
                    worse={"model.width": width, "data.resolution": 16},
                )
                for width in (0.25, 0.35, 0.5)
            ),
        ],
    )
