"""Times the forms of the convolutions on the shapes of a network, each shape and gradient separately.

All shapes of a form are one program: a switch picks a shape and a loop repeats it. So each form is compiled once, and
the cost of starting the program is spread over the repetitions.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax import graph
from mnv2_jax.models.registry import Model, variable_shapes
from mnv2_jax.nn.forms import DEPTHWISE, IMAGE, LIBRARY, POINTWISE, Form, triton_form
from mnv2_jax.nn.window import Window
from mnv2_jax.types import Array

PARTS = ("value", "input_gradient", "kernel_gradient")
KINDS: Mapping[str, Mapping[str, Form]] = {"depthwise": DEPTHWISE, "pointwise": POINTWISE, "image": IMAGE}

_NOT_ON = {"gpu": ("rows",), "cpu": ("triton",), "tpu": ("rows", "triton")}
"""Forms left out on each platform: the loop over rows starts hundreds of kernels, and Triton needs a GPU."""


def forms_here(kind: str) -> dict[str, Form]:
    """Returns the forms of a kind that this platform can run; on a GPU also those of our kernels' unused plans."""
    platform = jax.devices()[0].platform
    forms = {name: form for name, form in KINDS[kind].items() if name not in _NOT_ON.get(platform, ())}
    if platform == "gpu" and kind == "depthwise":
        from mnv2_jax.nn.depthwise_triton import PLANS, WIDE

        forms |= {f"triton, {name}": triton_form(plan) for name, plan in PLANS.items() if plan != WIDE}
    return forms


_DRAWN = 2**19 - 1
"""Number of random values to draw for an array; odd, so that no two images or channels are alike."""


class Shape(NamedTuple):
    """Sizes of one convolution of a network."""

    height: int
    width: int
    channels_in: int
    channels_out: int
    kernel_size: int
    stride: int
    dilation: int

    @property
    def kind(self) -> str:
        """Returns the kind in `KINDS` of an ungrouped convolution; "dense" if it has none."""
        if self.channels_in <= 4:
            return "image"
        if self.kernel_size == 1:
            return "pointwise"
        return "dense"

    def __str__(self) -> str:
        """Returns size, channels, kernel, stride and dilation as text."""
        height, width, channels_in, channels_out, size, stride, dilation = self
        channels = f"{channels_in}→{channels_out}" if channels_in != channels_out else f"{channels_in}"
        dilated = f" dilation {dilation}" if dilation > 1 else ""
        return f"{height}×{width}×{channels} {size}×{size} stride {stride}{dilated}"


def shapes_of(model: Model, resolution: int) -> dict[str, list[Shape]]:
    """Returns a network's convolutions by kind (depthwise, pointwise, image, dense): each shape once, in order."""
    image = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
    plain = model.with_forms(LIBRARY)
    traced = graph.abstract(lambda held: graph.trace(lambda x: plain.apply(held, x)[0], image), variable_shapes(plain))
    by_kind: dict[str, dict[Shape, None]] = {kind: {} for kind in (*KINDS, "dense")}
    for node in (node for node in traced.nodes if node.op == graph.CONV):
        (_, height, width, channels), kernel = map(jnp.shape, node.operands)
        stride, dilation = node.params["window_strides"][0], node.params["rhs_dilation"][0]
        shape = Shape(height, width, channels, kernel[3], kernel[0], stride, dilation)
        by_kind["depthwise" if node.params["feature_group_count"] > 1 else shape.kind][shape] = None
    return {kind: list(shapes) for kind, shapes in by_kind.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution of one kind and shape at a batch size, on random arrays."""

    kind: str
    shape: Shape
    batch_size: int
    dtype: str
    padding: Any = "same"

    @property
    def window(self) -> Window:
        """Returns stride, dilation and padding."""
        return Window(self.shape.stride, self.shape.dilation, self.padding)

    @property
    def array_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of x, the kernel and dy."""
        shape, window, size = self.shape, self.window, self.shape.kernel_size
        rows, columns = (window.outputs(n, size) for n in (shape.height, shape.width))
        depth = 1 if self.kind == "depthwise" else shape.channels_in
        return (
            (self.batch_size, shape.height, shape.width, shape.channels_in),
            (size, size, depth, shape.channels_out),
            (self.batch_size, rows, columns, shape.channels_out),
        )

    def arrays(self) -> tuple[Array, Array, Array]:
        """Returns x, kernel and dy, standard normal.

        `_DRAWN` values from NumPy are repeated, since JAX would compile a generator for each shape.
        """
        values = np.random.default_rng(0).standard_normal((3, _DRAWN), np.float32).astype(jnp.dtype(self.dtype))
        x, kernel, dy = map(jnp.asarray, map(np.resize, values, self.array_shapes))
        return x, kernel, dy

    @property
    def bytes_moved(self) -> int:
        """Returns the least bytes that each of `PARTS` moves: input and output map are each read or written once."""
        x, _, dy = self.array_shapes
        return (math.prod(x) + math.prod(dy)) * jnp.dtype(self.dtype).itemsize


def outputs(form: Form, case: Case, x: Array, kernel: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Computes the three `PARTS` of a form."""
    window = case.window
    return (
        form.value(x, kernel, window),
        form.input_gradient(x, kernel, dy, window),
        form.kernel_gradient(x, kernel, dy, window),
    )


def check_forms(cases: Sequence[Case], forms: Mapping[str, Form]) -> Iterator[dict[str, Any]]:
    """Compares all parts of the forms, on cases of one kind, with XLA's convolution in float32.

    Yields:
      kind, form, shape, dtype and ``errors``, which has for each part the norm of the difference divided by the norm;
      or, if the form can't be computed, ``error``, the reason.
    """
    arrays = [case.arrays() for case in cases]
    float32_arrays = [tuple(x.astype(jnp.float32) for x in three) for three in arrays]

    def all_outputs(form: Form, indices: Sequence[int], arrays: Sequence[tuple[Array, ...]]) -> Any:
        run = jax.jit(lambda xs: [outputs(form, cases[i], *three) for i, three in zip(indices, xs, strict=True)])
        return run([arrays[i] for i in indices])

    def attempt(form: Form) -> list[Any]:
        """Computes all cases in one program; if that fails, each by itself, so that one failure hides no result."""
        indices = range(len(cases))
        try:
            results: list[Any] = all_outputs(form, indices, arrays)
        except Exception:
            results = []
            for i in indices:
                try:
                    results += all_outputs(form, [i], arrays)
                except Exception as error:
                    results.append(_reason(error))
        return results

    with concurrent.futures.ThreadPoolExecutor(len(forms)) as pool:
        attempts = {name: pool.submit(attempt, form) for name, form in forms.items()}
        with jax.default_matmul_precision("highest"):
            expected = all_outputs(KINDS[cases[0].kind]["lax"], range(len(cases)), float32_arrays)
        for name, future in attempts.items():
            for case, result, reference in zip(cases, future.result(), expected, strict=True):
                row = {"kind": case.kind, "form": name, "shape": str(case.shape), "dtype": case.dtype}
                if isinstance(result, str):
                    yield row | {"error": result}
                    continue
                pairs = zip(PARTS, result, reference, strict=True)
                yield row | {"errors": {part: _distance(a, b) for part, a, b in pairs}}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def _distance(a: Array, b: Array) -> float:
    """Returns the relative distance of two arrays, by NumPy: a device would compile every operation per shape."""
    actual, expected = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def time_forms(
    cases: Sequence[Case], forms: Mapping[str, Form], *, inner: int = 20, repeats: int = 5
) -> Iterator[dict[str, Any]]:
    """Times every part of every form on every case, one form after the other. All cases have one kind.

    Yields:
      kind, form, shape, part, microseconds (the median of the repeats) and bytes_moved (`Case.bytes_moved`); or, if the
      form can't be compiled, kind, form and ``unavailable``, the reason.
    """
    arrays = [case.arrays() for case in cases]
    jax.block_until_ready(arrays)
    flat = [x for three in arrays for x in three]

    def compile_form(form: Form) -> Any:
        branches = [_loop(form, case, part, index, inner) for index, case in enumerate(cases) for part in range(3)]
        program = jax.jit(lambda branch, *flat: jax.lax.switch(branch, branches, *flat))
        return program.lower(jnp.int32(0), *flat).compile()

    with concurrent.futures.ThreadPoolExecutor(len(forms)) as pool:
        programs = {name: pool.submit(compile_form, form) for name, form in forms.items()}
        for name, future in programs.items():
            try:
                program = future.result()
            except Exception as error:  # a form that this device's compiler refuses becomes a row with the reason
                yield {"kind": cases[0].kind, "form": name, "unavailable": _reason(error)}
                continue
            concurrent.futures.wait(programs.values())  # compilers that are still tuning would use the same device
            for branch, (case, part) in enumerate(itertools.product(cases, PARTS)):
                arguments = jnp.int32(branch), *flat
                jax.block_until_ready(program(*arguments))
                times = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    jax.block_until_ready(program(*arguments))
                    times.append((time.perf_counter() - start) / inner)
                row = {"kind": case.kind, "form": name, "shape": str(case.shape), "part": part}
                yield row | {"microseconds": 1e6 * statistics.median(times), "bytes_moved": case.bytes_moved}


def _loop(form: Form, case: Case, part: int, index: int, inner: int) -> Callable[..., Array]:
    """Returns a function of all arrays that computes part ``part`` of case ``index`` ``inner`` times.

    The function returns the sum of the last result, so that the compiler can't drop the work.
    """
    functions = (
        lambda x, kernel, dy: form.value(x, kernel, case.window),
        lambda x, kernel, dy: form.input_gradient(x, kernel, dy, case.window),
        lambda x, kernel, dy: form.kernel_gradient(x, kernel, dy, case.window),
    )

    def run(*flat: Array) -> Array:
        three = flat[3 * index : 3 * index + 3]

        def compute(turn: Array, last: Array) -> Array:
            del turn
            # The barrier makes each turn wait for the one before. Without it a compiler could see that all turns give
            # the same result, and compute it once.
            fresh, _ = jax.lax.optimization_barrier((three, last))
            return functions[part](*fresh)

        empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(functions[part], *three))
        return jax.lax.fori_loop(0, inner, compute, empty).astype(jnp.float32).sum()

    return run
