"""Layers of foreign files, with our leaf names and layouts, in the order of computation.

The order of `ForeignNetwork.layers` is a promise within each kind: all convolutions (1x1 ones too) stand in the order
in which the network computes them, and so do all depthwise convolutions, all norms and all dense layers. How layers of
different kinds interleave means something only where the file says it (Keras files with a config, TFLite) and nothing
elsewhere (Keras `.weights.h5`): match kind by kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from mnv2_jax.errors import UserError, machine_fault

Kind = Literal["conv", "depthwise", "dense", "norm"]
Pads: TypeAlias = Literal["same", "valid"] | tuple[int, int]
"""Zeros around a map, of rows as of columns: as few as TensorFlow's SAME takes, none, or so many before and after."""
LARGEST = 1 << 30
"""Bytes of all arrays of a file: no MobileNet comes near, and a damaged size must not fill the memory."""

_RANK = {"conv": 4, "depthwise": 4, "dense": 2}
_NORM = {"scale", "bias", "mean", "var"}


@dataclasses.dataclass(frozen=True)
class ForeignLayer:
    """A layer with weights; one whose arrays don't fit together or aren't finite can't be made (`UserError`)."""

    name: str
    """Name in its file, for errors."""
    kind: Kind
    """Kind in the file: a classifier or a squeeze-excite of 1x1 convolutions is "conv", of dense layers "dense"."""
    arrays: Mapping[str, np.ndarray]
    """float32: kernel (conv [r, s, i, o], depthwise [r, s, 1, c], dense [c, k]) and perhaps bias [o]; or scale, bias,
    mean, var [c] of a norm."""
    activation: str | None = None
    """Activation behind it or its norm: relu, relu6, hard_swish, hard_sigmoid, or the file's name of another.
    None: nothing, the softmax of the last layer, or unknown."""
    stride: int | None = None
    """Stride of rows and columns (so the next two, too); only conv and depthwise have one. None: not in the file."""
    dilation: int | None = None
    pads: Pads | None = None

    def __post_init__(self) -> None:
        arrays = self.arrays
        if self.kind == "norm":
            shape = arrays.get("mean", np.empty(0)).shape
            fits = set(arrays) == _NORM and len(shape) == 1 and all(a.shape == shape for a in arrays.values())
        else:
            kernel = arrays.get("kernel", np.empty(0))
            fits = set(arrays) <= {"kernel", "bias"} and kernel.ndim == _RANK[self.kind]
            fits &= "bias" not in arrays or arrays["bias"].shape == kernel.shape[-1:]
            fits &= self.kind != "depthwise" or kernel.shape[2] == 1  # a depth multiplier other than 1 isn't known here
        if not fits or not all(a.size for a in arrays.values()):
            shapes = ", ".join(f"{leaf} {list(a.shape)}" for leaf, a in arrays.items()) or "nothing"
            raise UserError(
                f"{self.kind} layer {self.name!r} holds {shapes}, which no MobileNet has; give another file"
            )
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise UserError(f"layer {self.name!r} holds NaN or infinity; take the weights of an earlier step")
        if self.kind == "norm" and arrays["var"].min() < 0:
            raise UserError(f"norm {self.name!r} has a negative variance; the file is damaged, get it again")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignNetwork:
    """All layers with weights of a file, and what else it says."""

    source: Literal["keras", "tflite"]
    layers: tuple[ForeignLayer, ...]
    """Layers of each kind in the order of computation: see the module."""
    folded: bool
    """True: the norms are folded into the convolutions, which have biases (TFLite)."""
    epsilon: float | None
    """Epsilon of the norms. None: not in the file."""
    resolution: int | None
    """Height and width of the input. None: the file doesn't say, or it isn't fixed, or not square."""
    mean: tuple[float, float, float] | None
    """The network takes (pixel / 255 - mean) / std. None: the file doesn't say."""
    std: tuple[float, float, float] | None
    view: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Preprocessing` that say how images are resized and cropped, those that the file says."""
    unsaid: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    """Layers that do something to images, of which it holds the names only; True: beside the convolutions, False: in
    a model around theirs."""
    strange: tuple[str, ...] = ()
    """Layers without weights behind the last convolution that do what no head of ours does."""


def pads_of(name: str, padding: str, zeros: tuple[tuple[int, ...], ...] | None) -> Pads:
    """Padding of a layer.

    Args:
      name: of the layer.
      padding: its own, same or valid.
      zeros: rows before and after, and columns, that the layer right before it adds.

    Raises:
      UserError: if no single padding says it.
    """
    known: dict[str, Pads] = {"same": "same", "valid": "valid"}
    own = known.get(padding)
    if own is None:
        raise UserError(f"layer {name!r} has padding {padding!r}, as no MobileNet has; give another file")
    if zeros is None:
        return own
    (top, bottom), columns = zeros
    if (top, bottom) != columns or own == "same":
        raise UserError(
            f"layer {name!r} has padding {padding!r} after zeros {zeros}; only the same ones for rows and columns,"
            " before a layer without padding, can be read"
        )
    return top, bottom


def one_of(name: str, what: str, values: Iterable[int]) -> int:
    """The number that holds for rows and columns.

    Raises:
      UserError: if they differ.
    """
    first, *others = values
    if any(other != first for other in others):
        raise UserError(f"layer {name!r} has another {what} for rows than for columns; give another file")
    return int(first)


def without_softmax(layers: Iterable[ForeignLayer]) -> tuple[ForeignLayer, ...]:
    """The layers, the last of which gives logits."""
    *others, last = layers
    return (*others, dataclasses.replace(last, activation=None) if last.activation == "softmax" else last)


def as_float32(array: np.ndarray) -> np.ndarray:
    """In C order; what overflows is infinite, without a warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(array, np.float32)


@contextlib.contextmanager
def reading(path: pathlib.Path, form: str) -> Iterator[None]:
    """Whatever reading a foreign file raises becomes one `UserError` that begins with its path.

    Parsers of binary formats raise almost anything on damaged bytes (struct.error, KeyError, RuntimeError,
    RecursionError, MemoryError, ...), so that a list of exceptions would never be complete.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; correct the path") from error
    except Exception as error:
        # Damaged bytes can ask for any amount of memory, but not for a permission.
        if not isinstance(error, MemoryError) and (fault := machine_fault(error)) is not None:
            raise UserError(f"{path}: can't be read ({fault}); mend that and start again") from error
        what = f"{type(error).__name__}: {str(error) or 'no details'}"[:200]
        raise UserError(f"{path}: damaged, or not a {form} file ({what}); get it again, or give another") from error
