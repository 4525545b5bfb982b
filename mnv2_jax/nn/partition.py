"""Partitioning over devices of functions that XLA can't look into, such as kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnv2_jax.types import Array

_CUT = ("b", "g")
"""Axes that are cut over devices: images, and groups of equally many images."""


def each_its_images(of_images: Callable[..., Array], rule: str) -> Callable[..., Array]:
    """Partitions a function: each device computes with its own images if the batch is cut along its first axis.

    XLA doesn't know what a kernel does with which axis, and would gather the batch on every device. On one device the
    program is that of the function alone; JAX's partitioning applies only if there are several.

    Args:
      of_images: a function of a batch and other arrays.
      rule: the axes of its arguments and result, in the syntax of `custom_partitioning`. "b" is the axis of images and
        "g" that of groups of consecutive images; the first array begins with "b". A result without "b" is a sum over
        the images, and is added up over the devices. No other axis is cut.
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
            names = ()  # not cut: the pieces would be padded with arbitrary values

        def of_its_images(*pieces: Array) -> Array:
            result = of_images(*pieces)
            return result if "b" in of_result or not names else jax.lax.psum(result, names)

        places = [
            NamedSharding(mesh, PartitionSpec(*(names or None if axis in _CUT else None for axis in axes)))
            for axes in (*of_operands, of_result)
        ]
        return mesh, of_its_images, places[-1], tuple(places[:-1])

    # The factors in the order in which the rule first names them.
    whole = dict.fromkeys(axis for axes in (*of_operands, of_result) for axis in axes if axis not in _CUT)
    partitioned = custom_partitioning(of_images)
    partitioned.def_partition(
        partition,
        sharding_rule=rule,
        reduction_factors=() if "b" in of_result else ("b",),
        need_replication_factors=tuple(whole),
    )
    return partitioned
