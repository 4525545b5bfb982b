"""Reads and writes PyTorch state dicts. Nothing is ever unpickled but by torch itself, with ``weights_only``."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from mnv2_jax.errors import UserError
from mnv2_jax.models.weights import read_safetensors, write_atomically

_WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "ema_state_dict")
"""Keys of training checkpoints behind which the weights lie."""


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .pth or .pt file, float32; counters of batches are left out.

    Raises:
      UserError: naming the file, if it is damaged, holds anything but tensors, or torch isn't here to read it.
    """
    if path.suffix == ".safetensors":
        state: Mapping[str, Any] = read_safetensors(path)[0]
    else:
        state = _read_torch(path)
    found = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
        if not name.endswith("num_batches_tracked"):
            found[name] = np.asarray(tensor)
    if bad := [name for name, array in found.items() if array.dtype.kind != "f" or not np.isfinite(array).all()]:
        raise UserError(f"{path}: {bad[0]} isn't of finite floating-point numbers; give other weights")
    return {name: array.astype(np.float32) for name, array in found.items()}


def write_state_dict(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors file, or by torch a .pth.

    Raises:
      UserError: if it can't be written, or torch isn't here to do it.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
    if path.suffix == ".safetensors":
        write_atomically(path, safetensors.numpy.save(arrays, {"format": "pt"}))
        return
    torch = _torch(path, "writing")
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, buffer)
    write_atomically(path, buffer.getvalue())


def _torch(path: pathlib.Path, verb: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: {verb} PyTorch's own format needs torch; install it, or use a .safetensors file"
        ) from error
    return torch


def _read_torch(path: pathlib.Path) -> Mapping[str, Any]:
    torch = _torch(path, "reading")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; correct the path") from error
    except Exception as error:  # torch's reader raises whatever the damage leads it to
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{path}: holds Python objects that could run code, not only tensors, and isn't read; save its"
                " state dict, or give a .safetensors file"
            ) from error
        raise UserError(f"{path}: not a whole PyTorch file ({lines[0].strip()}); get it again") from error
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"{path}: holds {type(loaded).__name__}, not a state dict; save model.state_dict()")
    if odd := [key for key, value in loaded.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(f"{path}: {odd[0]!r} in it isn't a tensor; save model.state_dict() alone")
    half = (torch.bfloat16, torch.float16)
    return {
        str(key): (value.float() if value.dtype in half else value).detach().numpy() for key, value in loaded.items()
    }
