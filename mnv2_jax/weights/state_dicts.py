"""Reads and writes PyTorch state dicts. Nothing is ever unpickled but by torch itself, with ``weights_only``."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import pathlib
import re
import reprlib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import safetensors.numpy

from mnv2_jax.errors import UserError
from mnv2_jax.weights.checkpoints import Fields, architectures_said, choose, nameless_averages, networks_in
from mnv2_jax.weights.conventions import Source
from mnv2_jax.weights.file import read_safetensors, write_file
from mnv2_jax.weights.layers import LARGEST, as_float32

_METADATA = "__metadata__"
"""Key of the metadata in a safetensors header."""


def form_of(head: bytes) -> Literal["safetensors", "torch"] | None:
    """Form of a file that begins with these bytes, at least nine.

    PyTorch writes an archive, or, before 1.6 and still where it is told to, pickles one after another.
    """
    if head[8:9] == b"{":  # after the length of the header, which may begin with any byte
        return "safetensors"
    return "torch" if head.startswith((b"PK", b"\x80")) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateDict:
    """A network's tensors, and what else their file says."""

    source: Source
    """Library whose names they have; timm's ``tf_`` models have the names of its others."""
    tensors: Mapping[str, np.ndarray]
    """float32, finite."""
    architectures: tuple[str, ...]
    """Names of the network's architecture in the file; most have none, some several."""
    notes: tuple[str, ...]
    """Notes on what was chosen and left out."""


def read_state_dict(path: pathlib.Path, take: str | None = None) -> StateDict:
    """The network in a file of safetensors or of PyTorch, be it a state dict or a checkpoint of a training.

    Args:
      path: of the file.
      take: which of several networks, see `checkpoints.choose`.

    Raises:
      UserError: naming the file, if it can't be read, is damaged or too large, needs more than plain data to be read,
        or holds no network whose library is known, or one of anything but finite floats; or if torch isn't here.
    """
    _check_size(path)
    with path.open("rb") as file:
        head = file.read(9)
    form = form_of(head)
    if form == "safetensors" or (path.suffix == ".safetensors" and form is None):
        return _read_safetensors(path, take)
    if form is None:
        raise UserError(f"{path}: not a whole PyTorch file (it begins with {head!r}); get it again")
    return _read_torch(path, take)


def _read_safetensors(path: pathlib.Path, take: str | None) -> StateDict:
    tensors, metadata = read_safetensors(path)
    return _state_dict(path, {**tensors, _METADATA: metadata}, take, np.ndarray, lambda found: found)


def _state_dict(
    path: pathlib.Path,
    loaded: Mapping[Any, Any],
    take: str | None,
    tensor: type[Any],
    as_arrays: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]],
) -> StateDict:
    networks = networks_in(path, loaded, tensor)
    if not networks:
        keys = (reprlib.repr(key).strip("'") for key in loaded if key != _METADATA)
        first = ", ".join(itertools.islice(keys, 3))
        raise UserError(
            f"{path}: no tensors by the names of a library that we know ({first}, …); torchvision, timm and CoreNet are"
            " known"
        )
    chosen, notes = choose(path, networks, take)
    lost = nameless_averages(loaded, networks, tensor)
    if lost and chosen.role != "ema":
        notes.append(f"an average of weights without the names of a network isn't read: {', '.join(lost)}")
    found = {}
    for name, array in as_arrays(chosen.tensors).items():
        if not name.isprintable():  # an error that names it would not be one line
            raise UserError(f"{path}: {reprlib.repr(name)} in it is no name of a tensor; give other weights")
        if array.dtype.kind == "f":
            array = as_float32(array).reshape(array.shape)  # of no axes, too
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise UserError(f"{path}: {name} isn't of finite floating-point numbers; give other weights")
        found[name] = array
    return StateDict(
        source=chosen.anchor.source, tensors=found, architectures=architectures_said(loaded), notes=tuple(notes)
    )


def _check_size(path: pathlib.Path) -> None:
    """Refuses a file that is too large, also when unpacked, by what its archive states.

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
    if not hasattr(torch.serialization, "safe_globals"):
        raise UserError(f"{path}: {verb} PyTorch's own format needs torch 2.5 or newer, this is {torch.__version__}")
    return torch


_NAMES_OF_FIELDS = (
    "argparse.Namespace", "types.SimpleNamespace", "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")), "decimal.Decimal",
    *(f"pathlib.{kind}Path" for kind in ("", "Posix", "Pure", "PurePosix", "PureWindows", "Windows")),
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype", "numpy.ndarray",
    "torch.torch_version.TorchVersion", "torchvision.transforms.functional.InterpolationMode",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Enum", "Float", "Integer", "Path", "String")),
    "omegaconf.base.Metadata", "ml_collections.config_dict.config_dict.ConfigDict",
    *(f"{top}.callbacks.{name}" for top in ("pytorch_lightning", "lightning.pytorch")
      for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")),
)  # fmt: skip
_NAMES_OF_MAPPINGS = (
    "collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict", "munch.Munch",
    "yacs.config.CfgNode", "fvcore.common.config.CfgNode",
    *(f"{top}.utilities.parsing.AttributeDict" for top in ("pytorch_lightning", "lightning.pytorch")),
    *(f"{top}.utilities.data.AttributeDict" for top in ("lightning_fabric", "lightning.fabric")),
)  # fmt: skip
"""Classes whose objects lie in checkpoints beside the tensors. None of them is imported or called: stand-ins keep what
such an object holds, so that reading it executes nothing."""


class _Mapping:
    """Stands in for a class of mappings."""

    def __new__(cls, *args: Any) -> Any:
        """An object of the one class of mappings that torch gives fields, too."""
        return collections.OrderedDict()


def _stand_in(name: str, base: type) -> type:
    module, _, last = name.rpartition(".")
    return type(last, (base,), {"__module__": module})


_STAND_INS = (
    *(_stand_in(name, Fields) for name in _NAMES_OF_FIELDS),
    *(_stand_in(name, _Mapping) for name in _NAMES_OF_MAPPINGS),
)


def _read_torch(path: pathlib.Path, take: str | None) -> StateDict:
    torch = _torch(path, "reading")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(_STAND_INS)):
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused here
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(loaded, Mapping):
                raise UserError(f"{path}: holds {type(loaded).__name__}, not a state dict; save model.state_dict()")
            return _state_dict(path, loaded, take, torch.Tensor, lambda found: _arrays(torch, path, found))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); mend that, and start again") from error
    except Exception as error:  # torch raises whatever the damage leads it to
        raise UserError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why torch doesn't read a file, in one line."""
    said = str(error)
    if found := re.search(r"GLOBAL (\S+)", said):
        return (
            f"holds an object of the class {found[1][:100]}, which could run code when it is made, and isn't read; save"
            " the model's state dict alone, or give a .safetensors file"
        )
    if "TorchScript" in said:
        return "a TorchScript archive, which holds code, and isn't read; save the state dict of the model"
    if operand := re.search(r"Unsupported operand (\d+)", said):
        return (
            f"isn't pickled as torch does (instruction {operand[1]}); save it anew by torch.save, with its own protocol"
        )
    if "weights_only" in said:
        return (
            "holds Python objects that could run code, not only tensors, and isn't read; save its state dict, or give a"
            " .safetensors file"
        )
    lines = [line for line in said.splitlines() if line.strip()] or [type(error).__name__]
    return f"not a whole PyTorch file ({lines[0].strip()[:200]}); get it again"


def _arrays(torch: Any, path: pathlib.Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as arrays; their size is known before any of them is made."""
    for name, tensor in tensors.items():
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
