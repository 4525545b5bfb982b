"""The config of a run: frozen dataclasses, which are built strictly from a file and flags.

    w1_0:data=cifar10  +  --config.optim.peak_lr=0.2   ->   Loaded: the Config, and the origin of each value
       `files.load`         `overrides`                     `schema`, typed by `build`, checked by `checks`

Each of these is a one-line `UserError` that names the key: a key that no dataclass declares, a value of the wrong type,
a value out of range, and an option that the rest of the config leaves unused. Code reads only attributes of `Config`,
so that it can't misspell an option.
"""

from mnv2_jax.config.build import build
from mnv2_jax.config.checks import batch_shapes, check_devices, spanning_groups
from mnv2_jax.config.files import config_files, load
from mnv2_jax.config.options import OPTIONS
from mnv2_jax.config.origins import Loaded, Origin, Preset, Source, from_weights
from mnv2_jax.config.schema import (
    HEAD,
    IGNORED,
    MAY_DIFFER,
    STRUCTURE,
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
    "HEAD",
    "IGNORED",
    "MAY_DIFFER",
    "OPTIONS",
    "STRUCTURE",
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
    "config_files",
    "differences",
    "flatten",
    "from_weights",
    "load",
    "resolved",
    "spanning_groups",
    "to_dict",
]
