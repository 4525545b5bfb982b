"""Functions of a batch that XLA can't look into, as kernels are, over several devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnv2_jax.types import Array

_CUT = ("b", "g")
"""Axes that devices share: images, and groups of as many images each."""


def each_its_images(of_images: Callable[..., Array], rule: str) -> Callable[..., Array]:
    """The function, partitioned: each device computes with its own images, where a batch is cut along its first axis.

    Of a kernel XLA doesn't know what it does with which axis, and would gather the batch on every device. For one
    device the program is that of the function alone; JAX's partitioning comes in only where there are more.

    Args:
      of_images: takes a batch and other arrays.
      rule: its axes, as `custom_partitioning` takes them. "b" is that of the images and "g" that of groups of images
        that follow each other; the first array begins with "b". A result without "b" is a sum over the images, and is
        added up over the devices. No other axis is cut.
    """
    *operands, result = ([axes.split() for axes in part.split(",")] for part in rule.split("->"))
    (of_operands,), (of_result,) = operands, result

    def partition(mesh: Mesh, arrays: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
        cut = next(iter(arrays[0].sharding.spec), None)
        names = () if cut is None else (cut,) if isinstance(cut, str) else tuple(cut)
        pieces = math.prod(mesh.shape[name] for name in names)
        sizes = [
            array.shape[place]
            for array, axes in zip(arrays, of_operands, strict=True)
            for place, axis in enumerate(axes)
            if axis in _CUT
        ]
        if any(size % pieces for size in sizes):
            names = ()  # the pieces would be filled up with anything

        def of_its_images(*pieces: Array) -> Array:
            found = of_images(*pieces)
            return found if "b" in of_result or not names else jax.lax.psum(found, names)

        places = [
            NamedSharding(mesh, PartitionSpec(*(names or None if axis in _CUT else None for axis in axes)))
            for axes in (*of_operands, of_result)
        ]
        return mesh, of_its_images, places[-1], tuple(places[:-1])

    # In the order in which they are first seen.
    whole = dict.fromkeys(axis for axes in (*of_operands, of_result) for axis in axes if axis not in _CUT)
    partitioned = custom_partitioning(of_images)
    partitioned.def_partition(
        partition,
        sharding_rule=rule,
        reduction_factors=() if "b" in of_result else ("b",),
        need_replication_factors=tuple(whole),
    )
    return partitioned
