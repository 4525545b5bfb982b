"""Times the forms of the convolutions on the shapes that networks have, each shape and gradient by itself.

All shapes of a form are one program, in which a switch picks a shape and a loop repeats it: so a form is compiled once,
and starting a program is shared by the repetitions.
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
from jax.extend import core

from mnv2_jax.models.registry import Model, variable_shapes
from mnv2_jax.nn.forms import DEPTHWISE, IMAGE, LIBRARY, POINTWISE, Form, triton_form
from mnv2_jax.nn.window import Window
from mnv2_jax.types import Array

PARTS = ("value", "input_gradient", "kernel_gradient")
KINDS: Mapping[str, Mapping[str, Form]] = {"depthwise": DEPTHWISE, "pointwise": POINTWISE, "image": IMAGE}

_NOT_ON = {"gpu": ("rows",), "cpu": ("triton",), "tpu": ("rows", "triton")}
"""Forms that are no candidates on a platform: a loop over rows starts kernels by the hundred, Triton is a GPU's."""


def forms_here(kind: str) -> dict[str, Form]:
    """The forms of a kind that this platform can have; on a GPU those of our kernels' plans that aren't taken, too."""
    platform = jax.devices()[0].platform
    found = {name: form for name, form in KINDS[kind].items() if name not in _NOT_ON.get(platform, ())}
    if platform == "gpu" and kind == "depthwise":
        from mnv2_jax.nn.depthwise_triton import PLANS, WIDE

        found |= {f"triton, {name}": triton_form(plan) for name, plan in PLANS.items() if plan != WIDE}
    return found


_DRAWN = 2**19 - 1
"""Values; odd, so that no two images or channels are alike."""


class Shape(NamedTuple):
    """A convolution of a network."""

    height: int
    width: int
    channels_in: int
    channels_out: int
    kernel_size: int
    stride: int
    dilation: int

    @property
    def kind(self) -> str:
        """Which of `KINDS` has its forms; "dense" for none."""
        if self.channels_in <= 4:
            return "image"
        if self.kernel_size == 1:
            return "pointwise"
        return "dense"

    def __str__(self) -> str:
        """Size, channels, kernel and stride."""
        height, width, channels_in, channels_out, size, stride, dilation = self
        channels = f"{channels_in}→{channels_out}" if channels_in != channels_out else f"{channels_in}"
        dilated = f" dilation {dilation}" if dilation > 1 else ""
        return f"{height}×{width}×{channels} {size}×{size} stride {stride}{dilated}"


def shapes_of(model: Model, resolution: int) -> dict[str, list[Shape]]:
    """The convolutions of a network by kind ("depthwise", "pointwise", "image", "dense"), each shape once, in order."""
    image = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
    plain = model.with_forms(LIBRARY)
    closed = jax.make_jaxpr(lambda v, x: plain.apply(v, x)[0])(variable_shapes(plain), image)
    found: dict[str, dict[Shape, None]] = {kind: {} for kind in (*KINDS, "dense")}
    for eqn in _convolutions(closed.jaxpr):
        (_, height, width, channels), kernel = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
        stride, dilation = eqn.params["window_strides"][0], eqn.params["rhs_dilation"][0]
        shape = Shape(height, width, channels, kernel[3], kernel[0], stride, dilation)
        found["depthwise" if eqn.params["feature_group_count"] > 1 else shape.kind][shape] = None
    return {kind: list(shapes) for kind, shapes in found.items()}


def _convolutions(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _convolutions(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A shape of a kind at a batch size, whose arrays are drawn."""

    kind: str
    shape: Shape
    batch_size: int
    dtype: str
    padding: Any = "same"

    @property
    def window(self) -> Window:
        """How the kernel goes over the map."""
        return Window(self.shape.stride, self.shape.dilation, self.padding)

    @property
    def array_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of x, the kernel and dy."""
        shape, window, size = self.shape, self.window, self.shape.kernel_size
        rows, columns = (window.outputs(n, size) for n in (shape.height, shape.width))
        depth = 1 if self.kind == "depthwise" else shape.channels_in
        return (
            (self.batch_size, shape.height, shape.width, shape.channels_in),
            (size, size, depth, shape.channels_out),
            (self.batch_size, rows, columns, shape.channels_out),
        )

    def arrays(self) -> tuple[Array, Array, Array]:
        """x, kernel and dy, standard normal: `_DRAWN` values again and again; JAX would compile each draw."""
        values = np.random.default_rng(0).standard_normal((3, _DRAWN), np.float32).astype(jnp.dtype(self.dtype))
        x, kernel, dy = map(jnp.asarray, map(np.resize, values, self.array_shapes))
        return x, kernel, dy

    @property
    def bytes_moved(self) -> int:
        """The fewest that any of `PARTS` moves: one of the maps is read or written, and so is the other."""
        x, _, dy = self.array_shapes
        return (math.prod(x) + math.prod(dy)) * jnp.dtype(self.dtype).itemsize


def outputs(form: Form, case: Case, x: Array, kernel: Array, dy: Array) -> tuple[Array, Array, Array]:
    """The three parts of a form."""
    window = case.window
    return (
        form.value(x, kernel, window),
        form.input_gradient(x, kernel, dy, window),
        form.kernel_gradient(x, kernel, dy, window),
    )


def check_forms(cases: Sequence[Case], forms: Mapping[str, Form]) -> Iterator[dict[str, Any]]:
    """Compares all parts of the forms, on cases of one kind, with XLA's convolution in float32.

    Yields:
      kind, form, shape, dtype and ``errors``, for each part the norm of the difference over the norm; or ``error``, why
      it can't be computed.
    """
    arrays = [case.arrays() for case in cases]
    wide = [tuple(x.astype(jnp.float32) for x in three) for three in arrays]

    def all_outputs(form: Form, only: Sequence[int], given: Sequence[tuple[Array, ...]]) -> Any:
        run = jax.jit(lambda given: [outputs(form, cases[i], *three) for i, three in zip(only, given, strict=True)])
        return run([given[i] for i in only])

    def attempt(form: Form) -> list[Any]:
        """All cases in one program; by themselves where it fails, so that one that fails hides no other."""
        every = range(len(cases))
        try:
            found: list[Any] = all_outputs(form, every, arrays)
        except Exception:
            found = []
            for i in every:
                try:
                    found += all_outputs(form, [i], arrays)
                except Exception as error:
                    found.append(_reason(error))
        return found

    with concurrent.futures.ThreadPoolExecutor(len(forms)) as pool:
        attempts = {name: pool.submit(attempt, form) for name, form in forms.items()}
        with jax.default_matmul_precision("highest"):
            expected = all_outputs(KINDS[cases[0].kind]["lax"], range(len(cases)), wide)
        for name, future in attempts.items():
            for case, found, reference in zip(cases, future.result(), expected, strict=True):
                row = {"kind": case.kind, "form": name, "shape": str(case.shape), "dtype": case.dtype}
                if isinstance(found, str):
                    yield row | {"error": found}
                    continue
                pairs = zip(PARTS, found, reference, strict=True)
                yield row | {"errors": {part: _distance(a, b) for part, a, b in pairs}}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def _distance(a: Array, b: Array) -> float:
    """Relative distance of two arrays, by NumPy: a device would compile every operation for every shape."""
    found, expected = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def time_forms(
    cases: Sequence[Case], forms: Mapping[str, Form], *, inner: int = 20, repeats: int = 5
) -> Iterator[dict[str, Any]]:
    """Times every part of every form on every case, all of one kind, a form after the other.

    Yields:
      kind, form, shape, part, microseconds (the median of the repeats), bytes_moved (`Case.bytes_moved`); or kind, form
      and ``unavailable``, why it can't be compiled.
    """
    arrays = [case.arrays() for case in cases]
    jax.block_until_ready(arrays)
    flat = [x for three in arrays for x in three]

    def compile_form(form: Form) -> Any:
        branches = [_loop(form, case, part, place, inner) for place, case in enumerate(cases) for part in range(3)]
        program = jax.jit(lambda which, *flat: jax.lax.switch(which, branches, *flat))
        return program.lower(jnp.int32(0), *flat).compile()

    with concurrent.futures.ThreadPoolExecutor(len(forms)) as pool:
        programs = {name: pool.submit(compile_form, form) for name, form in forms.items()}
        for name, future in programs.items():
            try:
                program = future.result()
            except Exception as error:  # a form that this device's compiler refuses is a row with its reason
                yield {"kind": cases[0].kind, "form": name, "unavailable": _reason(error)}
                continue
            concurrent.futures.wait(programs.values())  # compilers tune by measuring on the same device
            for which, (case, part) in enumerate(itertools.product(cases, PARTS)):
                arguments = jnp.int32(which), *flat
                jax.block_until_ready(program(*arguments))
                times = []
                for _ in range(repeats):
                    begun = time.perf_counter()
                    jax.block_until_ready(program(*arguments))
                    times.append((time.perf_counter() - begun) / inner)
                row = {"kind": case.kind, "form": name, "shape": str(case.shape), "part": part}
                yield row | {"microseconds": 1e6 * statistics.median(times), "bytes_moved": case.bytes_moved}


def _loop(form: Form, case: Case, part: int, place: int, inner: int) -> Callable[..., Array]:
    """A function of all arrays that computes one part of one case again and again, and gives a number of the last."""
    functions = (
        lambda x, kernel, dy: form.value(x, kernel, case.window),
        lambda x, kernel, dy: form.input_gradient(x, kernel, dy, case.window),
        lambda x, kernel, dy: form.kernel_gradient(x, kernel, dy, case.window),
    )

    def run(*flat: Array) -> Array:
        three = flat[3 * place : 3 * place + 3]

        def again(turn: Array, last: Array) -> Array:
            del turn
            # Each turn waits for the one before. Without the barrier a compiler could see that all give the same, and
            # compute it once.
            fresh, _ = jax.lax.optimization_barrier((three, last))
            return functions[part](*fresh)

        empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(functions[part], *three))
        return jax.lax.fori_loop(0, inner, again, empty).astype(jnp.float32).sum()

    return run
