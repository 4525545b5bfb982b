"""Reads and writes PyTorch state dicts. Nothing is ever unpickled but by torch itself, with ``weights_only``."""

from __future__ import annotations

import io
import pathlib
import reprlib
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from mnv2_jax.convert.layers import LARGEST, as_float32
from mnv2_jax.errors import UserError
from mnv2_jax.models.weights import read_safetensors, write_file

_WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "ema_state_dict")
"""Keys of training checkpoints behind which the weights lie."""


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .pth or .pt file, float32; counters of batches are left out.

    Raises:
      UserError: naming the file, if it is damaged, too large, holds anything but tensors of finite floats, or torch
        isn't here to read it.
    """
    _check_size(path)
    state = read_safetensors(path)[0] if path.suffix == ".safetensors" else _read_torch(path)
    found = {}
    for name, array in state.items():
        if not name.isprintable():  # an error that names it would not be one line
            raise UserError(f"{path}: {reprlib.repr(name)} in it is no name of a tensor; give other weights")
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
        if _is_counter(name):
            continue
        if array.dtype.kind == "f":
            array = as_float32(array).reshape(array.shape)  # of no axes, too
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise UserError(f"{path}: {name} isn't of finite floating-point numbers; give other weights")
        found[name] = array
    return found


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _check_size(path: pathlib.Path) -> None:
    """Of the file, and of what an archive says it becomes when it is unpacked.

    Raises:
      UserError: if that is more than any network here has, or the file can't be read.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); correct the path") from error
    try:
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(member.file_size for member in archive.infolist()))
    except Exception:  # no archive, or a damaged one, of which its reader will have more to say
        pass
    _refuse_large(path, size)


def _refuse_large(path: pathlib.Path, size: int) -> None:
    if size > LARGEST:
        raise UserError(
            f"{path}: {size / (1 << 30):,.1f} GiB, where {LARGEST >> 30} GiB is the most that is read; save the state"
            " dict of the model alone"
        )


def write_state_dict(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors file, or by torch a .pth.

    Raises:
      UserError: if it can't be written, or torch isn't here to do it.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
    if path.suffix == ".safetensors":
        write_file(path, safetensors.numpy.save(arrays, {"format": "pt"}))
        return
    torch = _torch(path, "writing")
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, buffer)
    write_file(path, buffer.getvalue())


def _torch(path: pathlib.Path, verb: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: {verb} PyTorch's own format needs torch; install it, or use a .safetensors file"
        ) from error
    return torch


def _read_torch(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    torch = _torch(path, "reading")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused here
            return _arrays(torch, path, torch.load(path, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except Exception as error:  # torch raises whatever the damage leads it to
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{path}: holds Python objects that could run code, not only tensors, and isn't read; save its"
                " state dict, or give a .safetensors file"
            ) from error
        raise UserError(f"{path}: not a whole PyTorch file ({lines[0].strip()[:200]}); get it again") from error


def _arrays(torch: Any, path: pathlib.Path, loaded: Any) -> dict[str, np.ndarray]:
    """Whatever torch read as the arrays of a state dict; its size is known before any of them is made."""
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"{path}: holds {type(loaded).__name__}, not a state dict; save model.state_dict()")
    tensors = {str(key): value for key, value in loaded.items() if not _is_counter(str(key))}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {reprlib.repr(name)} in it isn't a tensor; save model.state_dict() alone")
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not is_plain or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}".replace("torch.", "")
            raise UserError(
                f"{path}: {reprlib.repr(name)} isn't of finite floating-point numbers in a plain tensor ({kind}); give"
                " other weights"
            )
    _refuse_large(path, sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in tensors.values()))
    return {
        name: (tensor.float() if tensor.element_size() < 4 else tensor).detach().resolve_neg().numpy()
        for name, tensor in tensors.items()
    }
