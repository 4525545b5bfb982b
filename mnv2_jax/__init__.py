"""MobileNets in JAX. These are the public names of the library; each is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnv2_jax.config import DataConfig as DataConfig
    from mnv2_jax.config import ModelConfig as ModelConfig
    from mnv2_jax.config import NormConfig as NormConfig
    from mnv2_jax.data.loading import Data as Data
    from mnv2_jax.data.loading import open_data as open_data
    from mnv2_jax.data.sources import Dataset as Dataset
    from mnv2_jax.data.sources import register_dataset as register_dataset
    from mnv2_jax.data.split import Split as Split
    from mnv2_jax.errors import UserError as UserError
    from mnv2_jax.models.info import ModelInfo as ModelInfo
    from mnv2_jax.models.info import model_info as model_info
    from mnv2_jax.models.registry import Model as Model
    from mnv2_jax.models.registry import create_model as create_model
    from mnv2_jax.models.registry import list_models as list_models
    from mnv2_jax.models.registry import register_model as register_model
    from mnv2_jax.ops.augment import normalise as normalise
    from mnv2_jax.runs.weights import load_weights as load_weights
    from mnv2_jax.tasks.base import register_task as register_task
    from mnv2_jax.tasks.builtin import register_classification as register_classification
    from mnv2_jax.tasks.classification import Classification as Classification
    from mnv2_jax.tasks.predictor import Predictor as Predictor
    from mnv2_jax.weights.file import Preprocessing as Preprocessing
    from mnv2_jax.weights.file import Weights as Weights
    from mnv2_jax.weights.file import WeightsInfo as WeightsInfo
    from mnv2_jax.weights.file import save_weights as save_weights
    from mnv2_jax.weights.hub import list_weights as list_weights

_EXPORTS = {
    "Classification": "mnv2_jax.tasks.classification",
    "Data": "mnv2_jax.data.loading",
    "DataConfig": "mnv2_jax.config",
    "Dataset": "mnv2_jax.data.sources",
    "Model": "mnv2_jax.models.registry",
    "ModelConfig": "mnv2_jax.config",
    "ModelInfo": "mnv2_jax.models.info",
    "NormConfig": "mnv2_jax.config",
    "Predictor": "mnv2_jax.tasks.predictor",
    "Preprocessing": "mnv2_jax.weights.file",
    "Split": "mnv2_jax.data.split",
    "UserError": "mnv2_jax.errors",
    "Weights": "mnv2_jax.weights.file",
    "WeightsInfo": "mnv2_jax.weights.file",
    "create_model": "mnv2_jax.models.registry",
    "list_models": "mnv2_jax.models.registry",
    "list_weights": "mnv2_jax.weights.hub",
    "load_weights": "mnv2_jax.runs.weights",
    "model_info": "mnv2_jax.models.info",
    "normalise": "mnv2_jax.ops.augment",
    "open_data": "mnv2_jax.data.loading",
    "register_classification": "mnv2_jax.tasks.builtin",
    "register_dataset": "mnv2_jax.data.sources",
    "register_model": "mnv2_jax.models.registry",
    "register_task": "mnv2_jax.tasks.base",
    "save_weights": "mnv2_jax.weights.file",
}

__all__ = list(_EXPORTS)
_NOT_EXPORTED = {"annotations", "importlib", "TYPE_CHECKING", "Any"}


def __dir__() -> list[str]:
    """Lists the names of all exports, so that Tab completes them."""
    return sorted({*globals(), *_EXPORTS} - _NOT_EXPORTED)


def __getattr__(name: str) -> Any:
    """Imports an export on first use, so that ``python -m mnv2_jax.main --help`` doesn't import JAX."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mnv2_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
