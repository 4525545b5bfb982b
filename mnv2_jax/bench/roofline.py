"""Roofline: the least bytes and operations that a network needs per image, and the device's measured rates of both.

Williams et al. 2009, doi:10.1145/1498765.1498785: no program is faster than the device's bandwidth allows for its
bytes, nor than the device's rate allows for its multiply-adds. Bytes and multiply-adds are counted on the traced
network; bandwidth and rate are measured.

The bytes are those of the feature maps, under a schedule that no compiler finds by itself but a programmer can write. I
and O are the values of a convolution's input and output:

    forward        reads I and writes O. The input's norm and activation are computed on loading. O is written before
                   its norm, since the norm's statistics, summed at the end of the same kernel, are complete only
                   then.                                                                                  I + O
    backward       reads the gradient of the normalised output (O), the output as written (O, for batch norm's
                   backward pass) and the input as written (I, for the kernel's gradient and the activation's mask).
                   It writes the gradient of the normalised input (I) and, at its end, the sums that the preceding
                   norm needs.                                                                           2I + 2O

This makes 3I + 3O in training. (Separate kernels for the two gradients would both read O, O and I: 4I + 5O.) In
addition:

- Images are bytes (uint8) and need no gradient: 2I + 3O for the first layer.
- A residual addition is computed when the sum is first loaded. It costs one more read, of the skipped map, and one
  write, of the sum, which later readers would otherwise have to add again; and backward one more read, of the skip
  connection's gradient.
- A mean over a map (in squeeze-excite and before the classifier) reads the map once more forward, since the statistics
  of its norm must be complete first. Its gradient is one value per channel.
- Dense layers and max-pooling count as convolutions.
- The two products of an attention are one kernel, which keeps the scores on chip (Dao et al. 2022, arXiv 2205.14135).
  Its I are queries, keys and values.
- In inference the statistics are known beforehand: I + O, one read for an addition, nothing for a mean.

Kernels, their gradients and the optimiser's slots are not counted, since they are moved once per step and not per
image: about 30 bytes per parameter and step (MobileNetV2 1.0: 0.1 GB, or 0.4 MB per image at 256 images per step). Two
things are counted that could be avoided: the map before the last mean, whose gradient is known from one value per
channel (MobileNetV2: 0.1 MB), and one read of the input for the mask if no activation precedes the convolution.

MobileNetV2 1.0 at 224 px in bfloat16 needs 81.5 MB per image in training. It would be 82.1 MB if images were bfloat16
and had a gradient, as in any other layer.
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
from jaxtyping import DTypeLike

from mnv2_jax import graph
from mnv2_jax.config import Config
from mnv2_jax.models.registry import Model, from_config, variable_shapes


class Needs(NamedTuple):
    """Operations and bytes that a network needs per image, counted as the module's docstring says."""

    train_bytes: int
    """Bytes in training; a convolution with norm and activation is one kernel, and its two gradients are another."""
    infer_bytes: int
    """Bytes in inference."""
    madds: int
    """Multiply-adds of the forward pass."""
    train_madds: int
    """Multiply-adds of forward pass and gradients.

    Each of the two gradients has as many as the forward pass; the first layer has only its kernel's gradient.
    """


def needs(model: Model, size: int | tuple[int, int], dtype: DTypeLike) -> Needs:
    """Counts operations and bytes of a network for one image, with all layers trained.

    Args:
      model: network; its own compute type is ignored.
      size: height and width in pixels, or the side of a square.
      dtype: type of the computation and the maps; dense layers and their inputs are at least float32.
    """
    name: Any = jnp.dtype(dtype).name
    typed = from_config(dataclasses.replace(model.options, dtype=name), model.norm)
    height, width = (size, size) if isinstance(size, int) else size
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    return needs_of(lambda variables, x: typed.apply(variables, x)[0], variable_shapes(model), image)


def needs_of(apply: Callable[[Any, Any], Any], variables: Any, image: jax.ShapeDtypeStruct) -> Needs:
    """Counts any inference function of variables and an image [1, h, w, c] whose maps have that shape too."""
    walk = _Walk(graph.abstract(lambda held: graph.trace(lambda x: apply(held, x), image), variables))
    train = infer = madds = train_madds = 0
    for layer in walk.layers:
        read, written = layer.input_bytes, layer.output_bytes
        infer += read + written
        madds += layer.madds
        train += 2 * read + 3 * written if layer.is_first else 3 * (read + written)
        train_madds += layer.madds * (2 if layer.is_first else 3)
    train += 3 * sum(walk.added_bytes) + sum(walk.averaged_bytes)
    return Needs(train, infer + sum(walk.added_bytes), madds, train_madds)


_Origin = frozenset[int]
"""Layers whose outputs a value is computed from without a layer in between, by index in `_Walk.layers`.

`_IMAGE` stands for the image, `_NOTHING` for values that depend on neither.
"""
_NOTHING: _Origin = frozenset()
_IMAGE: _Origin = frozenset([-1])


@dataclasses.dataclass
class _Layer:
    """Costs of a convolution, a matrix product or a pooling."""

    input_bytes: int
    """Bytes of the inputs that depend on the image, so without the kernel."""
    output_bytes: int
    value_bytes: int
    """Bytes of one value of the output."""
    madds: int
    is_first: bool
    """Whether the input is the image."""
    is_of_maps: bool
    """Whether two maps are multiplied, instead of a map and a kernel."""


class _Walk:
    """Walks through a traced network and records its layers, additions and means, and how they are connected."""

    def __init__(self, traced: graph.Graph) -> None:
        self.layers: list[_Layer] = []
        self.added_bytes: list[int] = []
        self.averaged_bytes: list[int] = []
        origins: dict[Any, _Origin] = dict.fromkeys(traced.inputs, _IMAGE)
        for node in traced.nodes:
            operands = [origins.get(x, _NOTHING) if isinstance(x, graph.Value) else _NOTHING for x in node.operands]
            origins.update(dict.fromkeys(node.outputs, self._output_origin(node, operands)))

    def _output_origin(self, node: graph.Node, operands: list[_Origin]) -> _Origin:
        union = _NOTHING.union(*operands)
        if node.op in (graph.CONV, graph.DOT) or node.op.startswith("reduce_window"):
            self._record(node, operands)
            return frozenset([len(self.layers) - 1])
        if node.op == "add" and all(operands) and operands[0] != operands[1]:
            self.added_bytes.append(_bytes(node.output))
        # Only sums over the spatial axes are means of a map; softmax sums too.
        if node.op == "reduce_sum" and len(jnp.shape(node.operands[0])) == 4 and node.params["axes"] == (1, 2):
            # The sum converts the values that it loads, so their size is that in which the layer before wrote them.
            value_bytes = min(self.layers[i].value_bytes for i in union if i >= 0)
            self.averaged_bytes.append(value_bytes * math.prod(jnp.shape(node.operands[0])))
        return union

    def _record(self, node: graph.Node, operands: list[_Origin]) -> None:
        is_of_maps = len(operands) > 1 and all(operands[:2])
        input_bytes = 0
        for operand, origin in zip(node.operands, operands, strict=True):
            sources = [self.layers[i] for i in origin if i >= 0]
            if is_of_maps and len(sources) == 1 and sources[0].is_of_maps:
                sources[0].output_bytes = 0  # attention scores stay on chip
            elif origin:
                input_bytes += math.prod(jnp.shape(operand)) if origin == _IMAGE else _bytes(operand)
        is_first = _NOTHING.union(*operands) == _IMAGE
        value_bytes, madds = jnp.dtype(node.output.dtype).itemsize, graph.madds_of(node)
        self.layers.append(_Layer(input_bytes, _bytes(node.output), value_bytes, madds, is_first, is_of_maps))


def _bytes(value: Any) -> int:
    return math.prod(value.shape) * jnp.dtype(value.dtype).itemsize


# --- the device ---------------------------------------------------------------------------------------------

_BUDGET_S = 0.6
"""Seconds of repeated timing, without compilation."""


def measured_bandwidth() -> float:
    """Measures the memory bandwidth of the first device in bytes per second, reads and writes together.

    Adds 1 to each value of a float32 array in place. The array is much larger than any cache: 1 GiB, on the CPU
    128 MiB. The result is the median of several turns.
    """
    is_cpu = jax.default_backend() == "cpu"
    size, passes = (2**25, 2) if is_cpu else (2**28, 16)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)  # one call per pass: within one program XLA would add only once
    x = jnp.zeros(size, jnp.float32)

    def turn() -> None:
        nonlocal x
        for _ in range(passes):
            x = step(x)
        x.block_until_ready()

    return 2 * x.nbytes * passes / _median_s(turn)


def measured_rate(dtype: DTypeLike) -> float:
    """Measures the rate of the first device in multiply-adds per second, by products of two random matrices.

    The matrices are 8192 × 8192, on the CPU 1024 × 1024, in ``dtype`` and with XLA's default precision for it (TF32 for
    float32 on NVIDIA's tensor cores). They are random, since a GPU that multiplies zeros draws less power and so runs
    faster. The result is the median of several turns.
    """
    is_cpu = jax.default_backend() == "cpu"
    size, products = (1024, 2) if is_cpu else (8192, 8)
    keys = jax.random.split(jax.random.key(0))
    x, kernel = (jax.random.normal(key, (size, size), dtype) for key in keys)
    kernel = kernel * size**-0.5  # keeps the scale of x under repeated products
    multiply = jax.jit(jnp.matmul)

    def turn() -> None:
        nonlocal x
        for _ in range(products):
            x = multiply(x, kernel)
        x.block_until_ready()

    return products * size**3 / _median_s(turn)


def _median_s(turn: Callable[[], None]) -> float:
    """Returns the median seconds of a turn, over at least three turns after one that compiles."""
    turn()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < _BUDGET_S:
        start = time.perf_counter()
        turn()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# --- roofline -----------------------------------------------------------------------------------------------


def bound_s(moved_bytes: float, madds: float, bytes_per_s: float, madds_per_s: float) -> float:
    """Returns the least seconds of a program that moves these bytes and computes these multiply-adds."""
    return max(moved_bytes / bytes_per_s, madds / madds_per_s)


def share(measured_s: float, moved_bytes: float, madds: float, bytes_per_s: float, madds_per_s: float) -> float:
    """Returns the roofline's time divided by the measured time; 1 is the fastest possible."""
    return bound_s(moved_bytes, madds, bytes_per_s, madds_per_s) / measured_s


def of(settings: Config, mode: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Computes the roofline of a config on this device, and the share of it that measured rows reach.

    Args:
      settings: config with `model.num_classes` set.
      mode: "train" or "infer".
      rows: rows of `contest.compare`.

    Returns:
      bytes_an_image, madds_an_image, bandwidth (bytes/s), rate (multiply-adds/s), bound_ms (per batch) and shares (by
      the row's name).
    """
    model, batch = from_config(settings.model, settings.norm), settings.data.batch_size
    network = needs(model, settings.data.size or settings.data.resolution, settings.model.dtype)
    is_training = mode == "train"
    moved, madds = (network.train_bytes, network.train_madds) if is_training else (network.infer_bytes, network.madds)
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
