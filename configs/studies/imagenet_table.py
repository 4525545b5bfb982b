"""TF-slim's table of MobileNetV2 on ImageNet: 22 cells of width and resolution, with the recipe of the paper.

Claims: the published top-1 of each cell, ± 0.3 points, on the same 50,000 images.
Cost: 66 runs of 412 epochs of 1.28 million images, three seeds a cell; `plan` counts the multiply-adds.

    python -m mnv2_jax.study plan imagenet_table
"""

from mnv2_jax.models.published import published
from mnv2_jax.study.design import Claim, Study

ROWS = [
    row
    for row in published("mobilenet_v2")
    if row["source"].startswith("tensorflow/models:research/slim") and "precision" not in row
]


def get_study() -> Study:
    """Returns the study; the data are ``imagenet/`` in the folder where it is started."""
    cells = {
        f"{row['width']}_{row['resolution']}": {
            "model.width": row["width"],
            "data.resolution": row["resolution"],
            "data.eval_resolution": row["resolution"],
        }
        for row in ROWS
    }
    return Study(
        base="w1_0:path=imagenet",
        axes={"width_resolution": cells},
        claims=[
            Claim(
                cell={"width_resolution": name},
                published=row["top1"] / 100,
                tolerance=0.003,
                source=row["source"],
            )
            for name, row in zip(cells, ROWS, strict=True)
        ],
        spread=0.0015,
        train_images=1_281_167,
    )
