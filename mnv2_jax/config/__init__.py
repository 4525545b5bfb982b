"""The one configuration record of a run: frozen dataclasses, built strictly from a file and flags.

    w1_0:data=cifar10  +  --config.optim.peak_lr=0.2   ->   Loaded: the Config, and whose its values are
       `files.load`         `overrides`                     `schema`, typed by `build`, checked by `checks`

A key that no dataclass declares, a value of the wrong type, a value out of range and an option that the rest of the
config makes idle are a `UserError` of one line that names the key. Code reads attributes of `Config` and nothing else,
so an option can't be misspelt.
"""

from mnv2_jax.config.build import build
from mnv2_jax.config.checks import batch_shapes, check_devices, spanning_groups
from mnv2_jax.config.files import load, named
from mnv2_jax.config.options import OPTIONS
from mnv2_jax.config.origins import Loaded, Origin, Preset, Source
from mnv2_jax.config.schema import (
    MAY_DIFFER,
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    FaultsConfig,
    FinetuneConfig,
    InitConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    NormConfig,
    OptimConfig,
    TrainConfig,
    differences,
    flatten,
    resolved,
    to_dict,
)
from mnv2_jax.config.show import as_json, as_text

__all__ = [
    "MAY_DIFFER",
    "OPTIONS",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "FaultsConfig",
    "FinetuneConfig",
    "InitConfig",
    "Loaded",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "NormConfig",
    "OptimConfig",
    "Origin",
    "Preset",
    "Source",
    "TrainConfig",
    "as_json",
    "as_text",
    "batch_shapes",
    "build",
    "check_devices",
    "differences",
    "flatten",
    "load",
    "named",
    "resolved",
    "spanning_groups",
    "to_dict",
]
