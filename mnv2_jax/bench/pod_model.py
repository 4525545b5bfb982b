"""TPU chips, how they are joined, and what time their limits leave a step: a model, not a measurement."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

from mnv2_jax.errors import UserError, nearest

IMAGENET_IMAGES = 1_281_167

HOP_SECONDS = 1e-6
"""Least time of a hop over a link (jax-ml.github.io/scaling-book, "Sharded matrices", on ICI latency)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of a chip; from https://docs.cloud.google.com/tpu/docs/NAME, as in `CHIPS`."""

    flops: float
    """bfloat16 FLOP/s, a multiplication and an addition being two."""
    memory: int
    """Bytes of HBM."""
    bandwidth: float
    """Bytes/s of HBM."""
    ici: float
    """Bytes/s that a chip sends over all its links at once: half of the bidirectional bandwidth; of v4, the pod's
    all-reduce bandwidth of 1.1 PB/s by its 4096 chips."""
    dimensions: int
    """Dimensions of the torus; a chip has two links in each."""
    pod: int
    """Chips of the largest torus."""


CHIPS = {
    "v4": Chip(flops=275e12, memory=32 * 2**30, bandwidth=1200e9, ici=270e9, dimensions=3, pod=4096),
    "v5e": Chip(flops=197e12, memory=16 * 2**30, bandwidth=819e9, ici=200e9, dimensions=2, pod=256),
    "v5p": Chip(flops=459e12, memory=95 * 2**30, bandwidth=2765e9, ici=600e9, dimensions=3, pod=8960),
    "v6e": Chip(flops=918e12, memory=32 * 2**30, bandwidth=1638e9, ici=400e9, dimensions=2, pod=256),
}


class Topology(NamedTuple):
    """Chips in a box."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips of the whole box."""
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension's ends are joined: in 2D where it is as long as a pod's, 16; in 3D everywhere, once
        the box is made of cubes of 4×4×4.
        """
        if self.chip.dimensions == 2:
            return tuple(length == 16 for length in self.shape)
        return (all(length % 4 == 0 for length in self.shape),) * 3


def parse_topology(text: str) -> Topology:
    """Reads ``CHIP:AxB`` or ``CHIP:AxBxC``.

    Raises:
      UserError: for what is not of this form, a chip not in `CHIPS`, or more chips than a pod has.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", text)
    if found is None:
        raise UserError(f"--topology={text!r} is not of the form CHIP:AxB or CHIP:AxBxC, as v5e:16x16 or v4:4x4x4")
    if found[1] not in CHIPS:
        raise UserError(f"--topology={text}: no chip {found[1]!r}{nearest(found[1], CHIPS)}")
    topology = Topology(text, CHIPS[found[1]], tuple(map(int, found[2].split("x"))))
    if len(topology.shape) != topology.chip.dimensions:
        raise UserError(f"--topology={text}: {found[1]} chips are joined in {topology.chip.dimensions} dimensions")
    if topology.num_chips > topology.chip.pod:
        raise UserError(
            f"--topology={text} has {topology.num_chips} chips; a pod of {found[1]} has {topology.chip.pod}"
        )
    return topology


class Cost(NamedTuple):
    """Operations and bytes that a compiled program needs of each chip."""

    flops: float
    bytes_accessed: float
    """In HBM, by XLA's count."""
    all_reduces: int
    all_reduce_bytes: float


class StepTime(NamedTuple):
    """Seconds that each limit leaves."""

    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        """Computing goes on while memory is read; the all-reduces come after the gradient."""
        return max(self.compute, self.memory) + self.network


def step_time(topology: Topology, cost: Cost) -> StepTime:
    """Time that the chips' peaks allow. A real step takes longer."""
    chip = topology.chip
    return StepTime(
        compute=cost.flops / chip.flops, memory=cost.bytes_accessed / chip.bandwidth, network=_network(topology, cost)
    )


def _network(topology: Topology, cost: Cost) -> float:
    """All-reduces over rings along all dimensions at once, each a reduce-scatter and an all-gather.

    A dimension that wraps is two rings, one in each direction; another is one ring, there and back. A chip sends
    2 (n - 1) / n of the bytes; each half takes as many hops as the farthest chip is away.
    """
    chip, dimensions = topology.chip, [*zip(topology.shape, topology.wraps, strict=True)]
    rings = sum(2 if wraps else 1 for length, wraps in dimensions if length > 1)
    if not rings:
        return 0.0
    farthest = sum(length // 2 if wraps else length - 1 for length, wraps in dimensions)
    bandwidth = chip.ici * rings / (2 * chip.dimensions)
    sent = 2 * (1 - 1 / topology.num_chips) * cost.all_reduce_bytes
    return cost.all_reduces * 2 * farthest * HOP_SECONDS + sent / bandwidth
