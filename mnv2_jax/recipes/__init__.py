"""Training recipes: values of config keys that differ from the defaults in `config`.

The recipes have the numbers that their authors published; `tests/test_recipes.py` compares each with a file of facts.
Where a paper or README doesn't give a number, it comes from the authors' code, which is named beside it. All recipes
follow these rules:

* `optim.reference_lr` and `data.batch_size` are those of the source, over all its devices.
* `norm.group_size` is the number of images on one device of the source, but at most 128, so that eight devices get
  whole groups. It is 32 where that number is unknown or batches have several sizes. From 16 images on, the group size
  hardly matters (Wu & He, arXiv:1803.08494, figure 1).
* Where the source computes in float16 (PyTorch's `amp`), the recipe uses bfloat16, which needs no loss scaling.
* `model.init` initialises every kind of layer as the source's code does, and `model.drop_path_rule` drops paths as it
  does.
* `model.padding` and `model.width_rule` are properties of the network, so the config file sets them.

Expect the published top-1 ± 0.3, as the docstrings of `configs/` say. Nobody has published how much results vary over
seeds. But four groups that trained MobileNetV2 by the paper's schedule, with RMSProp or SGD, got results within 0.2
(paper 72.0, TF-slim 71.8, torchvision 71.878, mmpretrain 71.86), and MobileNetV4's authors print both 83.4 and 83.7 for
the same Hybrid-L.
"""

from __future__ import annotations

from collections.abc import Mapping

from mnv2_jax.errors import UserError
from mnv2_jax.recipes.corenet import CORENET_DEEPLABV3_V2, CORENET_V1, CORENET_V2, CORENET_V3_LARGE
from mnv2_jax.recipes.deeplab import DEEPLAB_CITYSCAPES, DEEPLAB_VOC
from mnv2_jax.recipes.garden import PAPER_V4, TFMG_V1, TFMG_V2, TFMG_V3_LARGE, TFMG_V3_SMALL, TFMG_V4, by_column
from mnv2_jax.recipes.own import CIFAR, DETECT, DIGITS, FINETUNE, SCRATCH, SEGMENT
from mnv2_jax.recipes.slim import PAPER, TF_SLIM_V2
from mnv2_jax.recipes.ssdlite import TF_SSDLITE_V2, TORCHVISION_SSDLITE_V3
from mnv2_jax.recipes.timm import EFFICIENTNET_JAX, TIMM_V3_LARGE_RA
from mnv2_jax.recipes.torchvision import (
    DLI14_V2,
    DLI14_V2_BEST,
    MMPRETRAIN_V2,
    TORCHVISION_V2_V1,
    TORCHVISION_V3_LARGE_V2,
    TORCHVISION_V3_V1,
    dli14_v3,
    torchvision_v2_v2,
)
from mnv2_jax.recipes.tree import Recipe, Tree, but

__all__ = ["RECIPES", "REFUSED", "SCRATCH", "Recipe", "Tree", "but", "resolve"]

RECIPES: Mapping[str, Recipe] = {
    "paper": PAPER,
    "tf_slim_v2": TF_SLIM_V2,
    "tfmg_v1": TFMG_V1,
    "tfmg_v2": TFMG_V2,
    "tfmg_v3_large": TFMG_V3_LARGE,
    "tfmg_v3_small": TFMG_V3_SMALL,
    "paper_v4": by_column(PAPER_V4),
    "tfmg_v4": by_column(TFMG_V4),
    "corenet_v1": CORENET_V1,
    "corenet_deeplabv3_v2": CORENET_DEEPLABV3_V2,
    "corenet_v2": CORENET_V2,
    "corenet_v3_large": CORENET_V3_LARGE,
    "torchvision_v2_IMAGENET1K_V1": TORCHVISION_V2_V1,
    "torchvision_v2_IMAGENET1K_V2": torchvision_v2_v2,
    "torchvision_v3_V1": TORCHVISION_V3_V1,
    "torchvision_v3_large_V2": TORCHVISION_V3_LARGE_V2,
    "mmpretrain_v2": MMPRETRAIN_V2,
    "dli14_v2": DLI14_V2,
    "dli14_v2_best": DLI14_V2_BEST,
    "dli14_v3": dli14_v3,
    "timm_v3_large_ra": TIMM_V3_LARGE_RA,
    "efficientnet_jax_default": EFFICIENTNET_JAX,
    "cifar": CIFAR,
    "digits": DIGITS,
    "scratch": SCRATCH,
    "segment": SEGMENT,
    "detect": DETECT,
    "tf_ssdlite_v2": TF_SSDLITE_V2,
    "torchvision_ssdlite_v3": TORCHVISION_SSDLITE_V3,
    "deeplab_voc": DEEPLAB_VOC,
    "deeplab_cityscapes": DEEPLAB_CITYSCAPES,
    "finetune": FINETUNE,
}
"""Recipes by name. The names are those in the tests' file of facts; `paper` is the recipe of MobileNetV2's paper."""

REFUSED: Mapping[str, str] = {
    "paper_v1": "the paper gives no learning rate, batch size or epochs; the nearest that runs: tfmg_v1",
    "paper_v3": "the paper gives no epochs, and its learning-rate decay is ambiguous; the nearest that runs:"
    " tfmg_v3_large or tfmg_v3_small",
    "timm_v2_ra": "its author never published the command; the nearest that runs: timm_v3_large_ra",
    "timm_v2_050_lamb": "its optimiser, LAMB, isn't implemented here, and its batch size and warm-up are only in a file"
    " attached to issue 1021 of pytorch-image-models, which we don't have; the nearest that runs: timm_v3_large_ra",
    "timm_ra4": "its hyperparameters are only in a gist that we don't have; the nearest that runs: paper_v4",
    "paper_v4_distill": "it needs JFT-300M, which isn't public; the nearest that runs: paper_v4",
}
"""Published recipes that can't be run, each with the reason: a fact, a part or data that we don't have."""


def resolve(name: str, recipe: Recipe, model: str, width: float) -> Tree:
    """Returns the config keys that a recipe sets for a network.

    Args:
      name: name of the recipe, for errors.
      recipe: the recipe, as in the values of `RECIPES`.
      model: name of the network, as in `models.registry`.
      width: width multiplier of the network.

    Raises:
      UserError: if the recipe has no values for that network.
    """
    try:
        return recipe(model, width) if callable(recipe) else recipe
    except UserError as error:
        raise UserError(f"recipe={name}: {error}") from error
