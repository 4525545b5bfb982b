"""The fewest bytes and operations that a network needs an image, and what the device gives of both: the roofline.

Williams et al. 2009, doi:10.1145/1498765.1498785: no program is faster than its bytes at the device's bandwidth, nor
than its multiply-adds at the device's rate. Needs are read off the traced network; what the device gives is measured.

The bytes are those of the maps, under a schedule that no compiler makes by itself and a programmer can. I and O are
the values of a convolution's input and output:

    forward        reads I, writes O. The input's norm and activation are computed on loading; O is written as the
                   convolution leaves it, since the norm's statistics, summed up at the end of the same kernel, are
                   complete only then.                                                                    I + O
    backward       reads the gradient of the normalised output (O), the output as written (O: batch norm's backward
                   needs it) and the input as written (I: for the kernel's gradient and for the mask of the
                   activation), writes the gradient of the normalised input (I), the sums that the norm before needs at
                   the end of it.                                                                        2I + 2O

so 3I + 3O in training. (With a kernel for each of the two gradients, which both read O, O and I, it would be 4I + 5O.)
Beyond that:

- Images are bytes (uint8), and no gradient of them is computed: 2I + 3O for the first layer.
- A residual addition happens where the sum is loaded first: one read more, of the skipped map, and one write, of the
  sum, which its later readers would otherwise add up again; backward, one read more, of the gradient that skips.
- A mean over a map (squeeze-excite; before the classifier) reads it once more forward, since its norm's statistics
  must be complete. Its gradient is one value a channel.
- Dense layers and max-pooling count as convolutions.
- The two products of an attention are one kernel, which keeps the scores to itself (Dao et al. 2022,
  arXiv 2205.14135): I are queries, keys and values.
- In inference statistics are known beforehand: I + O, one read for an addition, nothing for a mean.

Not counted, since it isn't an image's but a step's: kernels, their gradients and the optimiser's slots, some 30 bytes a
parameter and step (MobileNetV2 1.0: 0.1 GB, at 256 images a step 0.4 MB an image). Counted though it could be had
without: the map before the last mean, whose gradient is known from one value a channel (MobileNetV2: 0.1 MB), and the
input once for the mask where there is no activation before a convolution.

MobileNetV2 1.0 at 224 px in bfloat16 needs 81.5 MB an image in training. With images in bfloat16 and a gradient of
theirs, as in any other layer, it would be 82.1 MB.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import DTypeLike

from mnv2_jax.config import Config
from mnv2_jax.models.counting import PRODUCTS, branch_that_runs, jaxprs_in, madds_of
from mnv2_jax.models.registry import Model, from_config, variable_shapes


class Needs(NamedTuple):
    """Operations and bytes that a network needs an image; the module says what is counted."""

    train_bytes: int
    """Every convolution one kernel with norm and activation in it, its two gradients one kernel."""
    infer_bytes: int
    madds: int
    """Multiply-adds forward."""
    train_madds: int
    """Forward, and as many for each of the two gradients; the first layer has only that of its kernel."""


def needs(model: Model, resolution: int, dtype: DTypeLike) -> Needs:
    """Counts a network, all of which is trained, for one image [resolution, resolution, 3].

    Args:
      model: whose own compute type isn't read.
      resolution: pixels of height and width.
      dtype: of the computation and of the maps; dense layers and what they are given are float32 at least.
    """
    name: Any = jnp.dtype(dtype).name
    typed = from_config(dataclasses.replace(model.options, dtype=name), model.norm)
    image = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
    return needs_of(lambda variables, x: typed.apply(variables, x)[0], variable_shapes(model), image)


def needs_of(apply: Callable[[Any, Any], Any], variables: Any, image: jax.ShapeDtypeStruct) -> Needs:
    """Counts any function of variables and of an image [1, h, w, c], in inference, whose maps are [1, h, w, c]."""
    closed = jax.make_jaxpr(apply)(variables, image)
    walk = _Walk()
    walk.follow(closed.jaxpr, [*[_NOTHING] * len(jax.tree.leaves(variables)), _IMAGE])
    train = infer = madds = train_madds = 0
    for layer in walk.layers:
        taken, given = layer.taken_bytes, layer.given_bytes
        infer += taken + given
        madds += layer.madds
        train += 2 * taken + 3 * given if layer.is_first else 3 * (taken + given)
        train_madds += layer.madds * (2 if layer.is_first else 3)
    again = 3 * sum(walk.added_bytes) + sum(walk.averaged_bytes)
    return Needs(train + again, infer + sum(walk.added_bytes), madds, train_madds)


_Origin = frozenset[int]
"""The layers, by their place in `_Walk.layers`, since whose outputs a value comes; of the image `_IMAGE`."""
_NOTHING: _Origin = frozenset()
_IMAGE: _Origin = frozenset([-1])


@dataclasses.dataclass
class _Layer:
    """A convolution, a product or a pooling."""

    taken_bytes: int
    """Bytes of the inputs that come from the image: not those of the kernel."""
    given_bytes: int
    value_bytes: int
    """Bytes of one value of its output."""
    madds: int
    is_first: bool
    """Whether its input is the image."""
    is_of_maps: bool
    """Whether it multiplies two maps, not a map with a kernel."""


class _Walk:
    """The layers, additions and means of a traced network, and which comes from which."""

    def __init__(self) -> None:
        self.layers: list[_Layer] = []
        self.added_bytes: list[int] = []
        self.averaged_bytes: list[int] = []

    def follow(self, jaxpr: core.Jaxpr, given: Sequence[_Origin]) -> list[_Origin]:
        """Records what runs; from the origins of what a program is given to those of what it gives."""
        origins = dict(zip(jaxpr.invars, given, strict=True))

        def origin(var: Any) -> _Origin:
            return _NOTHING if isinstance(var, core.Literal) else origins.get(var, _NOTHING)

        for eqn in jaxpr.eqns:
            its = [origin(var) for var in eqn.invars]
            for var, found in zip(eqn.outvars, self._given_by(eqn, its), strict=True):
                origins[var] = found
        return [origin(var) for var in jaxpr.outvars]

    def _given_by(self, eqn: Any, its: list[_Origin]) -> list[_Origin]:
        kind, union = eqn.primitive.name, _NOTHING.union(*its)
        if union and (kind in PRODUCTS or kind.startswith("reduce_window")):
            self._record(eqn, its)
            return [frozenset([len(self.layers) - 1])]
        if kind == "cond":
            return self.follow(branch_that_runs(eqn), its[1:])
        inner = jaxprs_in(eqn)
        if inner and len(inner[0].invars) == len(its) and len(inner[0].outvars) == len(eqn.outvars):
            return self.follow(inner[0], its)
        if kind == "add" and all(its) and its[0] != its[1]:
            self.added_bytes.append(_bytes(eqn.outvars[0]))
        # Over the axes of space: softmax, too, sums.
        if kind == "reduce_sum" and union and len(eqn.invars[0].aval.shape) == 4 and eqn.params["axes"] == (1, 2):
            # The sum converts what it loads: not the size of its input, but that of what the layer before wrote.
            each = min(self.layers[place].value_bytes for place in union if place >= 0)
            self.averaged_bytes.append(each * math.prod(eqn.invars[0].aval.shape))
        return [union] * len(eqn.outvars)

    def _record(self, eqn: Any, its: list[_Origin]) -> None:
        is_of_maps = len(its) > 1 and all(its[:2])
        taken = 0
        for var, origin in zip(eqn.invars, its, strict=True):
            before = [self.layers[place] for place in origin if place >= 0]
            if is_of_maps and len(before) == 1 and before[0].is_of_maps:
                before[0].given_bytes = 0  # the scores stay where they are
            elif origin:
                taken += math.prod(var.aval.shape) if origin == _IMAGE else _bytes(var)
        madds = madds_of(eqn) if eqn.primitive.name in PRODUCTS else 0
        is_first = _NOTHING.union(*its) == _IMAGE
        result = eqn.outvars[0]
        self.layers.append(_Layer(taken, _bytes(result), result.aval.dtype.itemsize, madds, is_first, is_of_maps))


def _bytes(var: Any) -> int:
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize


# --- the device ---------------------------------------------------------------------------------------------

_BUDGET_S = 0.6
"""Seconds for which repeats are timed; compilation is not counted."""


def measured_bandwidth() -> float:
    """Bytes a second, read and written, that the first device moves between its memory and itself.

    It adds to each value of a float32 array in place, an array well beyond any cache: 1 GiB, on the CPU 128 MiB. The
    median of several turns.
    """
    is_cpu = jax.default_backend() == "cpu"
    size, passes = (2**25, 2) if is_cpu else (2**28, 16)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)  # a call for each pass: in one program, XLA would add once
    x = jnp.zeros(size, jnp.float32)

    def turn() -> None:
        nonlocal x
        for _ in range(passes):
            x = step(x)
        x.block_until_ready()

    return 2 * x.nbytes * passes / _median_s(turn)


def measured_rate(dtype: DTypeLike) -> float:
    """Multiply-adds a second of a product of two random matrices on the first device.

    8192 × 8192 each, on the CPU 1024 × 1024, in ``dtype`` and with XLA's own precision for it (for float32 on NVIDIA's
    tensor cores that is TF32). Random, since a GPU that multiplies zeros draws less power and so runs faster. The
    median of several turns.
    """
    is_cpu = jax.default_backend() == "cpu"
    size, products = (1024, 2) if is_cpu else (8192, 8)
    keys = jax.random.split(jax.random.key(0))
    x, kernel = (jax.random.normal(key, (size, size), dtype) for key in keys)
    kernel = kernel * size**-0.5  # what is multiplied again and again keeps its scale
    multiply = jax.jit(jnp.matmul)

    def turn() -> None:
        nonlocal x
        for _ in range(products):
            x = multiply(x, kernel)
        x.block_until_ready()

    return products * size**3 / _median_s(turn)


def _median_s(turn: Callable[[], None]) -> float:
    """Median seconds of a turn, after one that compiles; of three turns at least."""
    turn()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < _BUDGET_S:
        begun = time.perf_counter()
        turn()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


# --- the two together ---------------------------------------------------------------------------------------


def bound_s(moved_bytes: float, madds: float, bytes_per_s: float, madds_per_s: float) -> float:
    """Seconds below which no program comes that moves so many bytes and does so many multiply-adds."""
    return max(moved_bytes / bytes_per_s, madds / madds_per_s)


def share(measured_s: float, moved_bytes: float, madds: float, bytes_per_s: float, madds_per_s: float) -> float:
    """The part of a measured time that the roofline asks for: 1 is as fast as can be."""
    return bound_s(moved_bytes, madds, bytes_per_s, madds_per_s) / measured_s


def of(settings: Config, what: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The roofline of a config on this device, and how near to it measured rows come.

    Args:
      settings: with `model.num_classes` set.
      what: "train" or "infer".
      rows: those of `contest.compare`.

    Returns:
      bytes_an_image, madds_an_image, bandwidth (bytes/s), rate (multiply-adds/s), bound_ms (of a batch) and shares,
      by the name of a row.
    """
    model, batch = from_config(settings.model, settings.norm), settings.data.batch_size
    its = needs(model, settings.data.resolution, settings.model.dtype)
    is_training = what == "train"
    moved, madds = (its.train_bytes, its.train_madds) if is_training else (its.infer_bytes, its.madds)
    bandwidth, rate = measured_bandwidth(), measured_rate(settings.model.dtype)
    return {
        "bytes_an_image": moved,
        "madds_an_image": madds,
        "bandwidth": bandwidth,
        "rate": rate,
        "bound_ms": 1e3 * bound_s(moved * batch, madds * batch, bandwidth, rate),
        "shares": {
            row["name"]: share(row["ms"] / 1e3, moved * batch, madds * batch, bandwidth, rate)
            for row in rows
            if "ms" in row
        },
    }
