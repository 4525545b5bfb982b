"""MobileNetV2 on ImageNet: TF-slim's 22 cells of width and resolution, and CoreNet's four widths at 224 px.

TF-slim's cells have the recipe of the paper, CoreNet's the recipe `corenet_v2`: other data, steps and stems.
Claims: the published top-1 of each cell, ± 0.3 points, on the same 50,000 images.
Cost: 78 runs, three seeds a cell: 66 of 412 epochs and 12 of 300 epochs of 1.28 million images; `plan` counts the
multiply-adds.

    python -m mnv2_jax.study plan imagenet_table
"""

from mnv2_jax.models.published import published
from mnv2_jax.study.design import Claim, Study

SLIM, CORENET = "tensorflow/models:research/slim", "apple/corenet:projects/mobilenet_v2"
CONFIG_OF_WIDTH = {0.25: "w0_25", 0.5: "w0_5", 0.75: "w0_75", 1.0: "w1_0"}
"""The recipe `corenet_v2` takes its dropout from the width of the config."""


def get_study() -> Study:
    """Returns the study; the data are ``imagenet/`` in the folder where it is started."""
    rows = [row for row in published("mobilenet_v2") if "precision" not in row]
    slim = {f"slim_{row['width']}_{row['resolution']}": row for row in rows if row["source"].startswith(SLIM)}
    corenet = {f"corenet_{row['width']}": row for row in rows if row["source"].startswith(CORENET)}
    cells = {
        name: {
            "model.width": row["width"],
            "data.resolution": row["resolution"],
            "data.eval_resolution": row["resolution"],
        }
        for name, row in slim.items()
    } | {
        name: {
            "config": f"{CONFIG_OF_WIDTH[row['width']]}:path=imagenet,recipe=corenet_v2",
            "model.width_rule": "corenet",
        }
        for name, row in corenet.items()
    }
    return Study(
        base="w1_0:path=imagenet",
        axes={"published": cells},
        claims=[
            Claim(
                cell={"published": name},
                published=row["top1"] / 100,
                tolerance=0.003,
                source=row["source"],
            )
            for name, row in (slim | corenet).items()
        ],
        spread=0.0015,
        train_images=1_281_167,
    )
