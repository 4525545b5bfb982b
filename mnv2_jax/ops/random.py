"""Keys of all random numbers: by seed, by purpose and by example, without any state."""

from __future__ import annotations

import jax
from jaxtyping import Int

from mnv2_jax.types import Array, Key

STREAMS = {"init": 0, "step": 1, "augment": 2}
"""Purposes of the random numbers of a seed; each purpose has its own keys."""


def stream_key(seed: int | Array, stream: str) -> Key:
    """Returns the key of a seed for one of the purposes `STREAMS`."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS[stream])


def step_key(seed: int | Array, step: int | Array) -> Key:
    """Returns the key of a train step, which decides dropout, stochastic depth and mixing."""
    return jax.random.fold_in(stream_key(seed, "step"), step)


def example_keys(key: Key, *numbers: Int[Array, " b"]) -> Key:
    """Makes one key per example, shape [b]: ``key`` folded with each of the example's numbers in turn."""

    def fold(*row: Array) -> Key:
        folded = key
        for number in row:
            folded = jax.random.fold_in(folded, number)
        return folded

    return jax.vmap(fold)(*numbers)
