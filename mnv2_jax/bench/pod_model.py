"""Models the least time of a train step on TPU slices from the chips' peak rates and their network."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

from mnv2_jax.errors import UserError, nearest

IMAGENET_IMAGES = 1_281_167

HOP_SECONDS = 1e-6
"""Least time of one hop over a link (jax-ml.github.io/scaling-book, "Sharded matrices", on ICI latency)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of a chip, from https://docs.cloud.google.com/tpu/docs/NAME, as in `CHIPS`."""

    flops: float
    """bfloat16 FLOP/s; a multiplication and an addition count as two."""
    memory: int
    """Bytes of HBM."""
    bandwidth: float
    """Bytes/s of HBM."""
    ici: float
    """Bytes/s that a chip sends over all its links together: half of the bidirectional bandwidth. For v4 it is the
    pod's all-reduce bandwidth of 1.1 PB/s divided by its 4096 chips."""
    dimensions: int
    """Dimensions of the torus; a chip has two links in each."""
    pod: int
    """Number of chips in the largest torus."""


CHIPS = {
    "v4": Chip(flops=275e12, memory=32 * 2**30, bandwidth=1200e9, ici=270e9, dimensions=3, pod=4096),
    "v5e": Chip(flops=197e12, memory=16 * 2**30, bandwidth=819e9, ici=200e9, dimensions=2, pod=256),
    "v5p": Chip(flops=459e12, memory=95 * 2**30, bandwidth=2765e9, ici=600e9, dimensions=3, pod=8960),
    "v6e": Chip(flops=918e12, memory=32 * 2**30, bandwidth=1638e9, ici=400e9, dimensions=2, pod=256),
}


class Topology(NamedTuple):
    """A slice: chips of one kind in a box of 2 or 3 dimensions."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Returns the number of chips in the slice."""
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Returns for each dimension whether its ends are joined.

        In 2D they are joined if the dimension has the full length of a pod, 16; in 3D if the box consists of 4×4×4
        cubes.
        """
        if self.chip.dimensions == 2:
            return tuple(length == 16 for length in self.shape)
        return (all(length % 4 == 0 for length in self.shape),) * 3


def parse_topology(text: str) -> Topology:
    """Reads ``CHIP:AxB`` or ``CHIP:AxBxC``.

    Raises:
      UserError: for text of another form, a chip that isn't in `CHIPS`, or more chips than a pod has.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", text)
    if match is None:
        raise UserError(f"--topology={text!r} must be CHIP:AxB or CHIP:AxBxC, e.g. v5e:16x16 or v4:4x4x4")
    chip, lengths = match.groups()
    if chip not in CHIPS:
        raise UserError(f"--topology={text}: unknown chip {chip!r}{nearest(chip, CHIPS)}")
    topology = Topology(text, CHIPS[chip], tuple(map(int, lengths.split("x"))))
    if len(topology.shape) != topology.chip.dimensions:
        raise UserError(f"--topology={text}: slices of {chip} have {topology.chip.dimensions} dimensions")
    if topology.num_chips > topology.chip.pod:
        raise UserError(
            f"--topology={text} has {topology.num_chips} chips; a pod of {chip} has only {topology.chip.pod}"
        )
    return topology


class Cost(NamedTuple):
    """Operations and bytes that a compiled program needs on each chip."""

    flops: float
    bytes_accessed: float
    """Bytes read and written in HBM, as XLA counts them."""
    all_reduces: int
    all_reduce_bytes: float


class StepTime(NamedTuple):
    """Least seconds of a step by each limit: compute, memory and network."""

    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        """Returns the seconds of a whole step: compute and memory overlap, the all-reduces follow the gradient."""
        return max(self.compute, self.memory) + self.network


def step_time(topology: Topology, cost: Cost) -> StepTime:
    """Returns the least time that the chips' peak rates allow. A real step takes longer."""
    chip = topology.chip
    return StepTime(
        compute=cost.flops / chip.flops, memory=cost.bytes_accessed / chip.bandwidth, network=_network(topology, cost)
    )


def _network(topology: Topology, cost: Cost) -> float:
    """Returns the seconds of the all-reduces, which use rings along all dimensions at once.

    An all-reduce is a reduce-scatter and an all-gather. A dimension that wraps has two rings, one in each direction;
    any other has one ring, there and back. A chip sends 2 (n - 1) / n of the bytes. Each of the two halves takes as
    many hops as the distance to the farthest chip.
    """
    chip, dimensions = topology.chip, [*zip(topology.shape, topology.wraps, strict=True)]
    rings = sum(2 if wraps else 1 for length, wraps in dimensions if length > 1)
    if not rings:
        return 0.0
    farthest = sum(length // 2 if wraps else length - 1 for length, wraps in dimensions)
    bandwidth = chip.ici * rings / (2 * chip.dimensions)
    sent = 2 * (1 - 1 / topology.num_chips) * cost.all_reduce_bytes
    return cost.all_reduces * 2 * farthest * HOP_SECONDS + sent / bandwidth
