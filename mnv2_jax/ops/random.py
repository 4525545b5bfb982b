"""Keys of everything random: by seed, by what they are for, and by example. Nothing stateful."""

from __future__ import annotations

import jax
from jaxtyping import Int

from mnv2_jax.types import Array, Key

STREAMS = {"init": 0, "step": 1, "augment": 2}
"""Purposes that a seed is used for; each has keys of its own."""


def stream_key(seed: int | Array, stream: str) -> Key:
    """The key of one of the `STREAMS` of a seed."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS[stream])


def step_key(seed: int | Array, step: int | Array) -> Key:
    """The key of a train step, from which dropout, stochastic depth and mixing follow."""
    return jax.random.fold_in(stream_key(seed, "step"), step)


def example_keys(key: Key, *numbers: Int[Array, " b"]) -> Key:
    """One key an example: ``key`` folded with each of its numbers in turn; shape [b]."""

    def fold(*row: Array) -> Key:
        folded = key
        for number in row:
            folded = jax.random.fold_in(folded, number)
        return folded

    return jax.vmap(fold)(*numbers)
