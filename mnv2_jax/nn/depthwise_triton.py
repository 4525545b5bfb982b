"""Depthwise convolution over [b, h, w, c] as Pallas kernels for NVIDIA GPUs, limited only by memory bandwidth.

A depthwise convolution has one multiply-add per tap and value. That is so few that memory traffic decides its speed,
as in a copy. These kernels read each array from memory once and write the result once. What they read again (taps, and
the rows that neighbouring programs share) comes from the caches.

One kernel, `_gather`, computes both the value and the gradient of the input: along either axis, position
``phases * t + f`` of the result is a sum over some taps of position ``step * t + offset`` of the operand (`_Axis`). A
stride is the step of the value and the number of phases of the gradient, so neither multiplies by inserted zeros. The
other kernel, `_correlate`, computes the gradient of the kernel: it sums over all axes but the channels, in a fixed
order, so that results are reproducible.

The kernels are written for Pallas' Triton backend. A body is straight-line code for a few rows, so that the compiler
can start many loads before it needs the first of them. Block shapes must be powers of two; array shapes need not be.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float

from mnv2_jax.nn.partition import each_its_images
from mnv2_jax.nn.window import Window
from mnv2_jax.types import Array

Ref: TypeAlias = jax.Ref
T = TypeVar("T")

WARPS = 4
"""Warps of 32 threads in a program; with more warps there are fewer programs, and the last round is emptier."""

VECTOR_BYTES = 16
"""Largest number of bytes that a thread loads at once."""

THREAD_TAPS = 100
"""Largest product of taps and channels per thread. A thread keeps a float32 for each in registers; it has 255 of them,
or 168 if three programs share one of the GPU's processors."""

ROWS = 7
"""Rows of the result that a program computes. All heights of maps of MobileNets at 224 px are multiples of it. Two
programs load the rows at the edge between them."""

GATHER_AHEAD = 2
"""Number of rows whose loads are under way while one row is computed. Only one of the loads of a row reads data that
isn't in the cache yet, and compilers on their own start few loads early. More rows would take too many registers."""

NEIGHBOURS = 18
"""Largest number of neighbouring vectors of channels in a program: 288 bytes. With fewer vectors a program has more
columns, and shares fewer of its loads with other programs."""


class Plan(NamedTuple):
    """How the work on the gradient of the kernel is divided.

    Attributes:
      warps: warps of a program.
      sums: largest product of taps and channels per thread, as `THREAD_TAPS`.
      columns: number of neighbouring columns of dy per thread, if it divides the number of columns. The thread loads
        the columns of x that they share only once.
      ahead: rows whose loads are under way while one row is computed, as `GATHER_AHEAD`.
      programs: largest number of programs. Each leaves a partial sum that must be read again.
    """

    warps: int
    sums: int
    columns: int
    ahead: int
    programs: int


PLANS = {
    "wide": Plan(warps=4, sums=100, columns=1, ahead=1, programs=1056),
    "narrow": Plan(warps=4, sums=50, columns=2, ahead=2, programs=528),
    "persistent": Plan(warps=16, sums=50, columns=2, ahead=2, programs=132),
}
"""Plans by name. The amount of data in flight limits this gradient: a processor of an H100 needs about 30 KB of it.

- ``wide``: the largest loads. The sums take so many registers (153 for a 3×3 kernel) that 12 warps fit on a processor,
  each with one row ahead: 12 KB. There are eight programs for each of the 132 processors.
- ``narrow``: half as many sums per thread. Usually 16 warps fit, each with two rows ahead: 32 KB. Fewer loads repeat
  those of a neighbouring thread. There are as many programs as fit at once.
- ``persistent``: like ``narrow``, but with one program for each processor. With 512 threads each has 128 registers, and
  the compiler keeps to that; with ``narrow`` it takes more for some shapes, which leads to a second, emptier round.

``wide`` is the plan in use, because it has been measured; `bench gpu` measures the others beside it.
"""

WIDE = PLANS["wide"]


class _Axis(NamedTuple):
    """How the rows (or the columns) of a result are gathered from those of an operand, in turns.

    Attributes:
      result: size of the result.
      operand: size of the operand.
      step: distance in the operand from one turn to the next.
      phases: the positions of the result in a turn; each is a tuple of its taps (number of the tap, offset in the
        operand).
    """

    result: int
    operand: int
    step: int
    phases: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of_value(cls, size: int, kernel: int, window: Window) -> _Axis:
        """Makes the axis that computes the output from an input axis of the given size."""
        before, _ = window.pad(size, kernel)
        taps = tuple((r, r * window.dilation - before) for r in range(kernel))
        return cls(window.outputs(size, kernel), size, window.stride, (taps,))

    @classmethod
    def of_gradient(cls, size: int, kernel: int, window: Window) -> _Axis:
        """Makes the axis that computes the input's gradient, which has the given size, from the output's gradient."""
        before, _ = window.pad(size, kernel)

        def taps(phase: int) -> Iterator[tuple[int, int]]:
            for r in range(kernel):
                turns, remainder = divmod(phase + before - r * window.dilation, window.stride)
                if remainder == 0:
                    yield r, turns

        phases = tuple(tuple(taps(phase)) for phase in range(window.stride))
        return cls(size, window.outputs(size, kernel), 1, phases)

    @property
    def turns(self) -> int:
        return -(-self.result // len(self.phases))

    @property
    def offsets(self) -> list[int]:
        return sorted({offset for taps in self.phases for _, offset in taps})


def _inside(place: Array, low: int, high: int, size: int) -> list[Array]:
    """Returns the conditions for ``0 <= place < size``, except those that ``low <= place <= high`` already implies."""
    return [place >= 0] * (low < 0) + [place < size] * (high >= size)


def _all(conditions: list[Array], shape: tuple[int, int]) -> Array | None:
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, conditions), shape) if conditions else None


def _divided(number: Array, by: int) -> tuple[Array, Array]:
    """Returns quotient and remainder of a number that isn't negative."""
    return jax.lax.div(number, by), jax.lax.rem(number, by)


def _load(ref: Ref, index: tuple[Array | int, ...], conditions: list[Array], shape: tuple[int, int]) -> Array:
    """Loads the values at an index, with zeros (the padding) where a condition doesn't hold."""
    mask = _all(conditions, shape)
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0)


def _ahead(rows: list[int], load: Callable[[int], T], ahead: int) -> Iterator[tuple[int, T]]:
    """Yields each row with its loaded values; starts the loads ``ahead`` rows earlier."""
    loaded = [load(row) for row in rows[:ahead]]
    for place, row in enumerate(rows):
        loaded += [load(later) for later in rows[place + ahead : place + ahead + 1]]
        yield row, loaded[place]


def _vector(channels: int, taps: int, itemsize: int, registers: int) -> int:
    """Returns the channels per thread: a power of two that divides ``channels``, limited by loads and registers."""
    limit = min(VECTOR_BYTES // itemsize, registers // taps)
    return math.gcd(channels, 2 ** int(math.log2(max(limit, 1))))


def _compiler(warps: int) -> plgpu.CompilerParams:
    # One stage: Triton's pipelining is for loops that feed matrix products.
    return plgpu.CompilerParams(num_warps=warps, num_stages=1)


def _as_images(x: Array) -> Array:
    """Reshapes to [b, h * w * c]: offsets within an image fit into 32 bits; for images Pallas uses 64 if needed."""
    return x.reshape(x.shape[0], -1)


# --- the value and the gradient of the input ----------------------------------------------------------------


def _gather(operand: Array, kernel: Array, rows: _Axis, columns: _Axis, interpret: bool) -> Array:
    """Computes the result of the two axes, [b, rows.result, columns.result, c].

    A lane is a vector of channels of one turn of the columns of an image. Lanes are numbered over images, groups of
    neighbouring vectors, columns and vectors of a group, so that no lane is idle, whatever the number of channels. A
    program has `WARPS` * 32 lanes, times `ROWS` turns of the rows.
    """
    batch, _, _, channels = operand.shape
    size = _vector(channels, kernel.shape[0] * kernel.shape[1], operand.dtype.itemsize, THREAD_TAPS)
    shape = WARPS * 32, size
    vectors = channels // size
    group = max((n for n in range(1, NEIGHBOURS + 1) if vectors % n == 0), key=lambda n: (n % 2 == 0, n))
    lanes = batch * columns.turns * vectors
    count = min(ROWS, rows.turns)  # turns of rows in a program
    wide = jnp.promote_types(operand.dtype, jnp.float32)
    grid = pl.cdiv(rows.turns, count), pl.cdiv(lanes, shape[0])  # neighbours run together: they share rows

    # The sums that each row of the operand adds to: (turn, phase, tap). Rows are counted from a program's first row.
    uses: dict[int, list[tuple[int, int, int]]] = {}
    for turn in range(count):
        for phase, taps in enumerate(rows.phases):
            for r, offset in taps:
                uses.setdefault(turn * rows.step + offset, []).append((turn, phase, r))
    last_use = {(turn, phase): row for row in sorted(uses) for turn, phase, _ in uses[row]}

    def depthwise_gather(operand_ref: Ref, kernel_ref: Ref, result_ref: Ref) -> None:
        turn0 = pl.program_id(0) * count
        lane = pl.program_id(1) * shape[0] + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        exists = _inside(lane, 0, grid[1] * shape[0] - 1, lanes)
        image, lane = _divided(lane, columns.turns * vectors)
        group_of_vectors, lane = _divided(lane, columns.turns * group)
        turn_of_columns, vector = _divided(lane, group)
        channel = (group_of_vectors * group + vector) * size + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        image = jnp.broadcast_to(image, shape)

        read_at = turn_of_columns * (columns.step * channels) + channel
        write_at = turn_of_columns * (len(columns.phases) * channels) + channel
        taps = {
            (r, s): _load(kernel_ref, (r * kernel.shape[1] + s, channel), [], shape).astype(wide)
            for r in sorted({r for phase in rows.phases for r, _ in phase})
            for s in sorted({s for phase in columns.phases for s, _ in phase})
        }
        sums: dict[tuple[int, int, int], Array] = {}

        def load(row: int, offset: int) -> Array:
            place = turn0 * rows.step + row
            column = turn_of_columns * columns.step + offset
            conditions = [
                *exists,
                *_inside(place, row, (grid[0] - 1) * count * rows.step + row, rows.operand),
                *_inside(column, offset, (columns.turns - 1) * columns.step + offset, columns.operand),
            ]
            at = read_at + (place * (columns.operand * channels) + offset * channels)
            return _load(operand_ref, (image, at), conditions, shape)

        def store(turn: int, phase: int) -> None:
            place = (turn0 + turn) * len(rows.phases) + phase
            highest = ((grid[0] - 1) * count + turn) * len(rows.phases) + phase
            for side in range(len(columns.phases)):
                column = turn_of_columns * len(columns.phases) + side
                conditions = [
                    *exists,
                    *_inside(place, 0, highest, rows.result),
                    *_inside(column, 0, (columns.turns - 1) * len(columns.phases) + side, columns.result),
                ]
                at = write_at + (place * (columns.result * channels) + side * channels)
                total = sums.pop((turn, phase, side), None)
                total = jnp.zeros(shape, wide) if total is None else total
                plgpu.store(result_ref.at[image, at], total.astype(result_ref.dtype), mask=_all(conditions, shape))

        def load_row(row: int) -> list[tuple[int, Array]]:
            return [(offset, load(row, offset)) for offset in columns.offsets]

        for row, loaded in _ahead(sorted(uses), load_row, GATHER_AHEAD):
            for offset, values in loaded:
                values = values.astype(wide)
                for turn, phase, r in uses[row]:
                    for side, of_side in enumerate(columns.phases):
                        for s in (s for s, its_offset in of_side if its_offset == offset):
                            term = values * taps[r, s]
                            at = turn, phase, side
                            sums[at] = sums[at] + term if at in sums else term
            for turn, phase in [place for place, last in last_use.items() if last == row]:
                store(turn, phase)
        for turn in range(count):
            for phase in range(len(rows.phases)):
                if (turn, phase) not in last_use:  # stride and dilation skip this row
                    store(turn, phase)

    result = pl.pallas_call(
        depthwise_gather,
        jax.ShapeDtypeStruct((batch, rows.result * columns.result * channels), operand.dtype),
        grid=grid,
        compiler_params=_compiler(WARPS),
        interpret=interpret,
        name="depthwise_gather",
    )(_as_images(operand), kernel.reshape(-1, channels))
    return result.reshape(batch, rows.result, columns.result, channels)


@functools.partial(jax.jit, static_argnames=("window", "interpret"))  # layers that are alike are traced once
def value(
    x: Float[Array, "b h w c"], kernel: Float[Array, "r s 1 c"], window: Window, interpret: bool = False
) -> Float[Array, "b p q c"]:
    """Computes the convolution, in the type of x.

    Args:
      x: bfloat16 or float32; sums are in float32.
      kernel: kernel with odd r and s.
      window: how the kernel moves over x.
      interpret: run the kernel without a GPU, slowly.
    """
    rows = _Axis.of_value(x.shape[1], kernel.shape[0], window)
    columns = _Axis.of_value(x.shape[2], kernel.shape[1], window)

    def of_images(x: Array, kernel: Array) -> Array:
        return _gather(x, kernel, rows, columns, interpret)

    return each_its_images(of_images, "b h w c, r s o c -> b i j c")(x, kernel)


@functools.partial(jax.jit, static_argnames=("window", "size", "interpret"))
def input_gradient(
    dy: Float[Array, "b p q c"],
    kernel: Float[Array, "r s 1 c"],
    window: Window,
    size: tuple[int, int],
    interpret: bool = False,
) -> Float[Array, "b h w c"]:
    """Computes the gradient of x, which has size (h, w), from the gradient of `value`, in the type of dy."""
    rows = _Axis.of_gradient(size[0], kernel.shape[0], window)
    columns = _Axis.of_gradient(size[1], kernel.shape[1], window)

    def of_images(dy: Array, kernel: Array) -> Array:
        return _gather(dy, kernel, rows, columns, interpret)

    return each_its_images(of_images, "b i j c, r s o c -> b h w c")(dy, kernel)


# --- the gradient of the kernel -----------------------------------------------------------------------------


def _channel_block(channels: int, itemsize: int) -> int:
    """Returns the channels per program: a power of two up to 64 that leaves few lanes idle and uses the memory well.

    Memory is read in sectors of 32 bytes, and best in pairs of sectors.
    """

    def worth(block: int) -> tuple[float, int]:
        used = channels / (pl.cdiv(channels, block) * block)
        return used * {8: 0.4, 16: 0.6, 32: 0.9}.get(block * itemsize, 1.0), block

    return max((8, 16, 32, 64), key=worth)


def _correlate(x: Array, dy: Array, window: Window, kernel_size: tuple[int, int], interpret: bool, plan: Plan) -> Array:
    """Computes the gradient of the kernel, before it is rounded.

    A lane is a vector of channels of one column of an image, or of a few columns (`Plan`). A program has a block of
    channels and goes through some blocks of columns, `ROWS` rows of each at a time, with a sum for each tap. Its sums
    over its lanes are partial sums, which are added up at the end.
    """
    rows = _Axis.of_value(x.shape[1], kernel_size[0], window)
    columns = _Axis.of_value(x.shape[2], kernel_size[1], window)
    (row_taps,), (column_taps,) = rows.phases, columns.phases
    batch, _, _, channels = x.shape
    taps = kernel_size[0] * kernel_size[1]

    block = _channel_block(channels, x.dtype.itemsize)
    vector = _vector(block, taps, x.dtype.itemsize, plan.sums)
    shape = max(plan.warps * 32 * vector // block, 1), block
    side = math.gcd(columns.result, plan.columns)
    places = batch * columns.result // side
    count = min(ROWS, rows.result)
    row_blocks = pl.cdiv(rows.result, count)
    tasks = row_blocks * pl.cdiv(places, shape[0])
    blocks = pl.cdiv(channels, block)
    turns = pl.cdiv(tasks, max(plan.programs // blocks, 1))  # tasks of a program
    grid = blocks, pl.cdiv(tasks, turns)  # neighbours run together: their channels may share a sector
    wide = jnp.promote_types(x.dtype, jnp.float32)

    uses: dict[int, list[tuple[int, int]]] = {}  # by row of x, counted from a task's first row: (row of dy, tap)
    for row in range(count):
        for r, offset in row_taps:
            uses.setdefault(row * rows.step + offset, []).append((row, r))
    first_used: dict[int, list[int]] = {x_row: [] for x_row in uses}
    for row in range(count):
        first_used[min(x_row for x_row in uses if row in dict(uses[x_row]))].append(row)
    uses_of_columns: dict[int, list[tuple[int, int]]] = {}  # by column of x, counted the same way: (column of dy, tap)
    for dy_column in range(side):
        for s, offset in column_taps:
            uses_of_columns.setdefault(dy_column * columns.step + offset, []).append((dy_column, s))

    def depthwise_correlate(x_ref: Ref, dy_ref: Ref, partial_ref: Ref) -> None:
        program = pl.program_id(1)  # read outside the loop, because interpretation doesn't know it inside
        channel = pl.program_id(0) * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        channel_exists = _inside(channel, 0, blocks * block - 1, channels)

        def add(turn: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            task = program * turns + turn
            block_of_places, block_of_rows = _divided(task, row_blocks)
            row0 = block_of_rows * count
            place = block_of_places * shape[0] + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
            highest = pl.cdiv(grid[1] * turns, row_blocks) * shape[0] - 1
            exists = [*channel_exists, *_inside(place, 0, highest, places)]
            image, column = _divided(place, columns.result // side)
            image, column = jnp.broadcast_to(image, shape), column * side
            dy_at = column * channels + channel
            x_at = column * (columns.step * channels) + channel

            def load_x(row: int, offset: int) -> Array:
                x_row, x_column = row0 * rows.step + row, column * columns.step + offset
                conditions = [
                    *exists,
                    *_inside(x_row, row, (row_blocks - 1) * count * rows.step + row, rows.operand),
                    *_inside(x_column, offset, (columns.result - side) * columns.step + offset, columns.operand),
                ]
                at = x_at + (x_row * (columns.operand * channels) + offset * channels)
                return _load(x_ref, (image, at), conditions, shape)

            def load_dy(row: int, dy_column: int) -> Array:
                conditions = [*exists, *_inside(row0 + row, 0, (row_blocks - 1) * count + row, rows.result)]
                at = dy_at + ((row0 + row) * (columns.result * channels) + dy_column * channels)
                return _load(dy_ref, (image, at), conditions, shape)

            def load_row(x_row: int) -> tuple[list[tuple[int, Array]], list[tuple[tuple[int, int], Array]]]:
                x_columns = [(offset, load_x(x_row, offset)) for offset in sorted(uses_of_columns)]
                new = [(row, dy_column) for row in first_used[x_row] for dy_column in range(side)]
                return x_columns, [(at, load_dy(*at)) for at in new]

            total = list(sums)
            dy_values: dict[tuple[int, int], Array] = {}
            for x_row, (x_columns, new) in _ahead(sorted(uses), load_row, plan.ahead):
                dy_values |= {at: values.astype(wide) for at, values in new}
                for offset, x_values in x_columns:
                    x_values = x_values.astype(wide)
                    for row, r in uses[x_row]:
                        for dy_column, s in uses_of_columns[offset]:
                            total[r * kernel_size[1] + s] += x_values * dy_values[row, dy_column]
            return tuple(total)

        sums = jax.lax.fori_loop(0, turns, add, tuple(jnp.zeros(shape, wide) for _ in range(taps)))
        for tap, total in enumerate(sums):
            at = program, tap, jnp.squeeze(channel, 0)
            mask = _all(channel_exists, (1, block))
            mask = None if mask is None else jnp.squeeze(mask, 0)
            plgpu.store(partial_ref.at[at], total.sum(0), mask=mask)

    partials = pl.pallas_call(
        depthwise_correlate,
        jax.ShapeDtypeStruct((grid[1], taps, channels), wide),
        grid=grid,
        compiler_params=_compiler(plan.warps),
        interpret=interpret,
        name="depthwise_correlate",
    )(_as_images(x), _as_images(dy))
    return partials.sum(0).reshape(*kernel_size, 1, channels)


@functools.partial(jax.jit, static_argnames=("window", "kernel_size", "interpret", "plan"))
def kernel_gradient(
    x: Float[Array, "b h w c"],
    dy: Float[Array, "b p q c"],
    window: Window,
    kernel_size: tuple[int, int],
    interpret: bool = False,
    plan: Plan = WIDE,
) -> Float[Array, "r s 1 c"]:
    """Computes the gradient of a kernel of size (r, s) from the gradient of `value`, in the type of x."""

    def of_images(x: Array, dy: Array) -> Array:
        return _correlate(x, dy, window, kernel_size, interpret, plan)

    return each_its_images(of_images, "b h w c, b i j c -> r s o c")(x, dy).astype(x.dtype)
