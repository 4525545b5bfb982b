"""Layers of foreign files, with our leaf names and layouts, in the order of computation.

`ForeignNetwork.layers` guarantees the order within each kind: all convolutions (including 1x1) come in the order in
which the network computes them, and so do all depthwise convolutions, all norms and all dense layers. The order between
layers of different kinds is that of the network only if the file states it (Keras files with a config, TFLite), not
otherwise (Keras `.weights.h5`). So match layers kind by kind.
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
"""Zeros around a map, the same for rows and columns: as in TensorFlow's SAME, none, or numbers before and after."""
LARGEST = 1 << 30
"""Limit on the bytes of all arrays in a file. No MobileNet comes near, and a damaged size must not fill the memory."""

_RANK = {"conv": 4, "depthwise": 4, "dense": 2}
_NORM = {"scale", "bias", "mean", "var"}


@dataclasses.dataclass(frozen=True)
class ForeignLayer:
    """A layer with weights. Arrays that don't fit together or aren't finite raise `UserError`."""

    name: str
    """Name in its file, for errors."""
    kind: Kind
    """Kind in the file: a classifier or squeeze-excite made of 1x1 convolutions is "conv", of dense layers "dense"."""
    arrays: Mapping[str, np.ndarray]
    """float32: kernel (conv [r, s, i, o], depthwise [r, s, 1, c], dense [c, k]) and perhaps bias [o]; or scale, bias,
    mean, var [c] of a norm."""
    activation: str | None = None
    """Activation after the layer or its norm: relu, relu6, hard_swish, hard_sigmoid, or the file's name of another.
    None: no activation, the softmax of the last layer, or unknown."""
    stride: int | None = None
    """Stride of rows and columns; only conv and depthwise have one. None: not in the file."""
    dilation: int | None = None
    """Dilation of rows and columns, like `stride`."""
    pads: Pads | None = None
    """Zeros around the input, like `stride`."""

    def __post_init__(self) -> None:
        arrays = self.arrays
        if self.kind == "norm":
            shape = arrays.get("mean", np.empty(0)).shape
            fits = set(arrays) == _NORM and len(shape) == 1 and all(a.shape == shape for a in arrays.values())
        else:
            kernel = arrays.get("kernel", np.empty(0))
            fits = set(arrays) <= {"kernel", "bias"} and kernel.ndim == _RANK[self.kind]
            fits &= "bias" not in arrays or arrays["bias"].shape == kernel.shape[-1:]
            fits &= self.kind != "depthwise" or kernel.shape[2] == 1  # only a depth multiplier of 1 is supported
        if not fits or not all(a.size for a in arrays.values()):
            shapes = ", ".join(f"{leaf} {list(a.shape)}" for leaf, a in arrays.items()) or "nothing"
            raise UserError(f"{self.kind} layer {self.name!r} holds {shapes}, unlike any MobileNet; give another file")
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise UserError(f"layer {self.name!r} holds NaN or infinity; give the weights of an earlier step")
        if self.kind == "norm" and arrays["var"].min() < 0:
            raise UserError(f"norm {self.name!r} has a negative variance, so the file is damaged; get it again")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignNetwork:
    """All layers with weights in a file, and what else the file says."""

    source: Literal["keras", "tflite"]
    layers: tuple[ForeignLayer, ...]
    """Layers, those of each kind in the order of computation: see the module."""
    folded: bool
    """True: the norms are folded into the convolutions, which have biases (TFLite)."""
    epsilon: float | None
    """Epsilon of the norms. None: not in the file."""
    resolution: int | None
    """Height and width of the input. None: the file doesn't say, or the input isn't fixed or not square."""
    mean: tuple[float, float, float] | None
    """Mean of the normalisation: the network's input is (pixel / 255 - mean) / std. None: the file doesn't say."""
    std: tuple[float, float, float] | None
    """Standard deviation of the normalisation, like `mean`."""
    view: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Preprocessing` for resizing and cropping, as far as the file states them."""
    pixel_layers: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    """Names of layers that change images, if the file holds no more than the names. True: the layer is in the same
    model as the convolutions; False: in a model around that one."""
    unsupported: tuple[str, ...] = ()
    """Layers without weights after the last convolution that none of our heads has."""
    head: str = "classifier"
    """What follows the features, as in `config.ModelConfig.head`."""
    align_corners: bool = False
    """How a dense head resizes its logits; see `config.ModelConfig.align_corners`."""


def pads_of(name: str, padding: str, zeros: tuple[tuple[int, ...], ...] | None) -> Pads:
    """Combines a layer's own padding with the zeros that the layer before it adds.

    Args:
      name: name of the layer.
      padding: the layer's own padding, same or valid.
      zeros: rows before and after, and columns before and after, that the previous layer adds; None: none.

    Raises:
      UserError: if no single padding has the same effect.
    """
    paddings: dict[str, Pads] = {"same": "same", "valid": "valid"}
    own_pads = paddings.get(padding)
    if own_pads is None:
        raise UserError(f"layer {name!r} has padding {padding!r}, unlike any MobileNet; give another file")
    if zeros is None:
        return own_pads
    (top, bottom), columns = zeros
    if (top, bottom) != columns or own_pads == "same":
        raise UserError(
            f"layer {name!r} has padding {padding!r} after zeros {zeros}; zeros can only be read if rows and columns"
            " have the same ones and the layer itself has padding 'valid'"
        )
    return top, bottom


def one_of(name: str, quantity: str, values: Iterable[int]) -> int:
    """Returns the one value that rows and columns share.

    Args:
      name: name of the layer, for errors.
      quantity: what the values are, such as "stride".
      values: for rows and columns.

    Raises:
      UserError: if the values differ.
    """
    first, *remaining = values
    if any(value != first for value in remaining):
        raise UserError(f"layer {name!r} has a different {quantity} for rows and for columns; give another file")
    return int(first)


def without_softmax(layers: Iterable[ForeignLayer]) -> tuple[ForeignLayer, ...]:
    """Removes the softmax after the last layer, so that the layer gives logits."""
    *earlier, last = layers
    return (*earlier, dataclasses.replace(last, activation=None) if last.activation == "softmax" else last)


def as_float32(array: np.ndarray) -> np.ndarray:
    """Converts an array to float32 in C order. Values that overflow become infinite, without a warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(array, np.float32)


@contextlib.contextmanager
def reading(path: pathlib.Path, form: str) -> Iterator[None]:
    """Turns any error while a foreign file is read into one `UserError` that begins with the file's path.

    Parsers of binary formats raise almost anything on damaged bytes (struct.error, KeyError, RuntimeError,
    RecursionError, MemoryError, ...), so a list of exceptions would never be complete.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; correct the path") from error
    except Exception as error:
        # A MemoryError may come from damaged bytes, a missing permission can't.
        if not isinstance(error, MemoryError) and (fault := machine_fault(error)) is not None:
            raise UserError(f"{path}: can't be read ({fault}); fix that and start again") from error
        reason = f"{type(error).__name__}: {str(error) or 'no details'}"[:200]
        raise UserError(f"{path}: damaged, or not a {form} file ({reason}); get it again, or give another") from error
