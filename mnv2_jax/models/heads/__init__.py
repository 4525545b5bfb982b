"""Heads: what follows the features of a network, one file for each kind."""

from __future__ import annotations

from collections.abc import Mapping

from mnv2_jax.models.heads.base import Head
from mnv2_jax.models.heads.classifier import CLASSIFIER
from mnv2_jax.models.heads.deeplabv3 import DEEPLABV3
from mnv2_jax.models.heads.lraspp import LRASPP
from mnv2_jax.models.heads.ssdlite import SSDLITE

HEADS: Mapping[str, Head] = {
    "classifier": CLASSIFIER,
    "deeplabv3": DEEPLABV3,
    "lraspp": LRASPP,
    "ssdlite": SSDLITE,
}
"""Heads by the value of `config.ModelConfig.head`."""
