"""Published weights by name: downloaded once, checked, and cached.

timm/mobilenetv2_140.ra_in1k    from Hugging Face, in huggingface_hub's own cache; without .TAG: timm's default tag
torchvision/mobilenet_v2.v2     from download.pytorch.org, in $MNV2_JAX_CACHE or ~/.cache/mnv2_jax/weights
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import http.client
import json
import math
import os
import pathlib
import reprlib
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Literal

import tqdm

from mnv2_jax.errors import UserError, nearest
from mnv2_jax.json_files import read_json

Source = Literal["timm", "timm_tf", "torchvision", "transformers"]
TIMEOUT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A weights file on this machine, with what its publisher says of it."""

    path: pathlib.Path
    source: Source
    """Library whose layer names and padding the file uses; timm_tf: timm's names, TensorFlow's padding and epsilon."""
    model: Mapping[str, Any]
    """Arguments of `models.registry.create_model`, including `name`, without those that equal the default."""
    preprocessing: Mapping[str, Any] | None
    """Fields of `config.DataConfig` for the published evaluation; None if the publisher doesn't say."""
    labels: tuple[str, ...] = ()
    """Names of the classes, as in `weights.file.WeightsInfo`; empty if they aren't stated."""
    class_ids: tuple[str, ...] = ()
    """Names of the class folders, as in `weights.file.WeightsInfo`; empty if they aren't stated."""


@dataclasses.dataclass(frozen=True)
class _Timm:
    tag: str | None
    """Tag of timm's default weights; None: timm has the network but no weights for it."""
    model: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Torchvision:
    file: str
    """Name of the file; it ends in the first 8 hex digits of the file's SHA-256."""
    model: Mapping[str, Any]
    resize: int = 256
    """Short side in pixels to which images are resized before the central 224 pixels are cropped."""


_FILE = pathlib.Path(__file__).with_name("published_weights.json")
_LIST = json.loads(_FILE.read_text(encoding="utf-8"))
"""Weights that existed on the list's date. Below width 0.75 timm doesn't scale V3's stem (fixed_stem_head), unlike
TF-slim."""
DATE: str = _LIST["date"]
TIMM = {name: _Timm(**entry) for name, entry in _LIST["timm"].items()}
TORCHVISION_URL = "https://download.pytorch.org/models/"
TORCHVISION = {name: _Torchvision(**entry) for name, entry in _LIST["torchvision"].items()}
"""torchvision's weights by name; v1 and v2 stand for its IMAGENET1K_V1 and IMAGENET1K_V2."""


def is_published_name(text: str) -> bool:
    """Whether a text names published weights. A file or folder of that name has precedence."""
    return text.startswith(("timm/", "torchvision/")) and not os.path.exists(text)


def known_names() -> list[str]:
    """Names that `fetch` accepts, sorted; timm's names without tags, because each has several."""
    timm = [f"timm/{name}" for name, entry in TIMM.items() if entry.tag]
    return sorted(timm + [f"torchvision/{name}" for name in TORCHVISION])


def list_weights(pattern: str = "*") -> list[str]:
    """Names of published weights that match a shell pattern, sorted; timm's names with their default tag."""
    timm = [f"timm/{name}.{entry.tag}" for name, entry in TIMM.items() if entry.tag]
    return sorted(fnmatch.filter([*timm, *(f"torchvision/{name}" for name in TORCHVISION)], pattern))


def model_of(name: str) -> Mapping[str, Any]:
    """Arguments of `models.registry.create_model` for a name from `list_weights`."""
    publisher, _, short_name = name.partition("/")
    if publisher == "timm":
        return TIMM[short_name.partition(".")[0]].model
    return TORCHVISION[short_name].model


def is_tensorflow(architecture: str) -> bool:
    """Whether an architecture's name begins with one of timm's tf_ models (TensorFlow's padding and epsilon)."""
    return _base_name(architecture).startswith(tuple(name for name in TIMM if name.startswith("tf_")))


def of_architecture(architecture: str, source: str, path: pathlib.Path) -> Fetched | None:
    """Returns the model and options for a file whose architecture has this name.

    Args:
      architecture: in any common spelling: ``tf_mobilenetv3_small_100``, ``hf-hub:timm/mobilenetv2_140.ra_in1k``.
      source: the library whose tensor names the file uses.
      path: the file.

    Returns:
      None if the library has no known architecture of this name.
    """
    base = _base_name(architecture)
    # timm's and torchvision's ResNets have the same tensor names. A tag or an owner in the name means timm's.
    is_resnet = base == "resnet50" and base != architecture
    if base in TIMM and (source == "timm" or is_resnet):
        return _of_timm(path, base, {}, "")
    if source == "torchvision" and base in {entry.model["name"] for entry in TORCHVISION.values()}:
        return Fetched(path=path, source="torchvision", model={"name": base}, preprocessing=None)
    return None


def _base_name(architecture: str) -> str:
    return architecture.strip().rpartition("/")[2].partition(".")[0]


def fetch(name: str) -> Fetched:
    """Downloads published weights. Weights that were downloaded before are taken from the cache, without a network.

    Args:
      name: ``timm/ARCHITECTURE.TAG``, ``timm/ARCHITECTURE`` or ``torchvision/NAME``; see `known_names`.

    Raises:
      UserError: for an unknown name, or for weights that can't be downloaded or are damaged.
    """
    publisher, _, short_name = name.partition("/")
    if publisher == "torchvision" and short_name in TORCHVISION:
        return _fetch_torchvision(name, TORCHVISION[short_name])
    architecture, _, tag = short_name.partition(".")
    if publisher == "timm" and architecture in TIMM:
        return _fetch_timm(name, architecture, tag)
    stem = f"timm/{architecture}" if publisher == "timm" else name
    raise UserError(f"there are no published weights named {name!r}{nearest(stem, known_names())}")


# --- Hugging Face -------------------------------------------------------------------------------------------


def _fetch_timm(name: str, architecture: str, tag: str) -> Fetched:
    tag = tag or TIMM[architecture].tag or ""
    if not tag:
        raise UserError(
            f"{name}: timm publishes no weights of {architecture}; choose one of: {', '.join(known_names())}"
        )
    repository = f"timm/{architecture}.{tag}"
    config, weights = _hugging_face_files(repository, ("config.json", "model.safetensors"))
    return _of_timm(weights, architecture, _read_config(config), str(config))


def read_config_beside(path: pathlib.Path) -> Fetched | None:
    """Reads the ``config.json`` beside a weights file of timm or transformers and returns the same facts as `fetch`.

    It names the network, tells whether that uses TensorFlow's padding, and gives timm's preprocessing, or the output
    stride and the classes of transformers' segmentation. The weights file says none of this.

    Returns:
      None if there is no ``config.json``, or it is of another library, or its network isn't known here.

    Raises:
      UserError: if it holds an invalid preprocessing, or a network that isn't MobileNetV2.
    """
    config = path.with_name("config.json")
    if path.suffix not in (".safetensors", ".bin") or not os.path.isfile(config):
        return None
    try:
        facts = _read_config(config)
    except UserError:
        return None  # a file of something else
    if facts.get("architectures") == [_TRANSFORMERS]:
        return _of_transformers(path, facts, str(config))
    architecture = facts.get("architecture")
    if not isinstance(architecture, str) or architecture not in TIMM or not isinstance(facts.get(_CONFIG), Mapping):
        return None
    return _of_timm(path, architecture, facts, str(config))


def _of_timm(path: pathlib.Path, architecture: str, config: Mapping[str, Any], origin: str) -> Fetched:
    return Fetched(
        path=path,
        source="timm_tf" if architecture.startswith("tf_") else "timm",
        model=TIMM[architecture].model,
        preprocessing=timm_preprocessing(config, origin),
        **_timm_classes(config, origin),
    )


_TRANSFORMERS = "MobileNetV2ForSemanticSegmentation"
_TRANSFORMERS_FIXED: Mapping[str, Any] = {
    "hidden_act": "relu6", "expand_ratio": 6, "first_layer_is_expansion": True, "layer_norm_eps": 0.001,
    "num_channels": 3, "depth_divisible_by": 8, "min_depth": 8,
}  # fmt: skip
"""Values in a ``config.json`` of transformers that MobileNetV2 has; a file may leave them out."""


def _of_transformers(path: pathlib.Path, config: Mapping[str, Any], origin: str) -> Fetched:
    """Facts in a ``config.json`` of transformers' MobileNetV2 for segmentation.

    Raises:
      UserError: beginning with ``origin``, if it isn't MobileNetV2, or its names of classes are invalid.
    """
    for key, value in _TRANSFORMERS_FIXED.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{origin}: {key}={reprlib.repr(config[key])}, but networks are read only with {value!r}; give others"
            )
    model = {
        "name": "mobilenet_v2",
        "width": config.get("depth_multiplier", 1.0),
        "output_stride": config.get("output_stride", 32),
        "padding": "same" if config.get("tf_padding", True) else "symmetric",
    }
    names = config.get("id2label", {})
    if not (names == {} or _is_texts(names)) or sorted(names) != sorted(map(str, range(len(names)))):
        raise UserError(f"{origin}: id2label={reprlib.repr(names)} must map the indices from 0 to names")
    labels = tuple(names[str(index)] for index in range(len(names)))
    is_named = not any(label.startswith("LABEL_") for label in labels)  # what transformers writes for no names
    return Fetched(path=path, source="transformers", model=model, preprocessing=None, labels=labels if is_named else ())


def _timm_classes(config: Mapping[str, Any], origin: str) -> dict[str, tuple[str, ...]]:
    """Names of the classes in a timm ``config.json``, as fields of `Fetched`; empty if it has none.

    Its ``label_names`` are a list, or a mapping from indices that may leave some out. ``label_descriptions`` give the
    readable name of each.

    Raises:
      UserError: beginning with ``origin``, for invalid names.
    """
    pretrained_cfg = config.get(_CONFIG)
    parts = [config, pretrained_cfg if isinstance(pretrained_cfg, Mapping) else {}]  # timm prefers the former, too

    def first(*keys: str) -> Any:
        return next((part[key] for key in keys for part in parts if part.get(key)), None)

    names, descriptions, count = first("label_names", "labels"), first("label_descriptions") or {}, first("num_classes")
    if names is None:
        return {}
    by_index = dict(enumerate(names)) if isinstance(names, list) else names
    if not _is_texts(by_index) or not all(str(index).isdecimal() for index in by_index):
        raise UserError(f"{origin}: label_names={reprlib.repr(names)} must be a list of names or map indices to names")
    if not _is_texts(descriptions):
        raise UserError(f"{origin}: label_descriptions={reprlib.repr(descriptions)} must map label_names to texts")
    indices = {int(index): name for index, name in by_index.items()}
    count = count if isinstance(count, int) else max(indices) + 1
    if not max(indices) < count < 1 << 20 or len(indices) < len(by_index):
        raise UserError(
            f"{origin}: label_names={reprlib.repr(names)} must give at most one name for each of {count} classes"
        )
    class_ids = tuple(indices.get(index, f"class {index}") for index in range(count))
    labels = tuple(descriptions.get(name, name) for name in class_ids)
    return {"labels": labels, "class_ids": () if labels == class_ids else class_ids}


def _is_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) and text for text in value.values())


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (ValueError, RecursionError) as error:  # such as numbers of thousands of digits, or deeply nested brackets
        raise UserError(f"{path}: can't be read as JSON ({type(error).__name__}); get it again") from error


def timm_preprocessing(config: Mapping[str, Any], origin: str = "config.json") -> dict[str, Any] | None:
    """Preprocessing of the evaluation in a timm ``config.json``; None if its ``pretrained_cfg`` is missing or
    incomplete.

    Raises:
      UserError: beginning with ``origin``, for an invalid value.
    """
    pretrained_cfg = config.get(_CONFIG)
    if not isinstance(pretrained_cfg, Mapping) or any(pretrained_cfg.get(key) is None for key in _IS_VALID):
        return None
    for key, (is_valid, expected) in _IS_VALID.items():
        if not is_valid(pretrained_cfg[key]):
            raise UserError(
                f"{origin}: {_CONFIG}.{key}={reprlib.repr(pretrained_cfg[key])} must be {expected}; get the file again"
            )
    resolution = pretrained_cfg["input_size"][-1]
    return _preprocessing(
        resolution,
        # timm rounds the short side down, and `data.images.evaluation_view` to the nearest pixel. With this share both
        # get the same size.
        resize=math.floor(resolution / pretrained_cfg["crop_pct"]),
        interpolation=pretrained_cfg["interpolation"],
        mean=tuple(pretrained_cfg["mean"]),
        std=tuple(pretrained_cfg["std"]),
    )


_CONFIG = "pretrained_cfg"


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # false for NaN


def _is_three(value: Any, low: float, high: float, kind: type = object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    return all(isinstance(v, kind) and _is_number(v, low, high) for v in value)


_IS_VALID: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (lambda v: _is_three(v, 1, 4096, int), "three integers: channels, height and width"),
    "crop_pct": (lambda v: _is_number(v, 0.01, 1), "a number from 0.01 to 1"),
    "interpolation": (lambda v: v in ("bilinear", "bicubic"), "bilinear or bicubic"),
    "mean": (lambda v: _is_three(v, -255, 255), "three numbers"),
    "std": (lambda v: _is_three(v, 1e-3, 255), "three numbers of at least 0.001"),
}
"""Checks of the values of a ``pretrained_cfg``, each with a text for its error. The bounds are `config.checks`'."""


def _preprocessing(
    resolution: int,
    resize: int,
    interpolation: str = "bilinear",
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> dict[str, Any]:
    return {
        "resolution": resolution,
        "eval_crop": "resize_crop",
        "eval_crop_fraction": resolution / resize,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
    }


def _hugging_face_files(repository: str, files: tuple[str, ...]) -> list[pathlib.Path]:
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise UserError(
            f"{repository}: the download needs the package huggingface_hub, which can't be imported ({error}); run pip"
            " install 'mnv2_jax[convert]'"
        ) from error
    try:
        try:
            return [
                pathlib.Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=True)) for file in files
            ]
        except LocalEntryNotFoundError:
            # Without a network hf_hub_download would retry for half a minute; this request is made only once.
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repository, files[0]), timeout=TIMEOUT_SECONDS
            )
            return [
                pathlib.Path(huggingface_hub.hf_hub_download(repository, file, etag_timeout=TIMEOUT_SECONDS))
                for file in files
            ]
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repository}: Hugging Face has no weights of this name; correct the tag (https://huggingface.co/timm"
            " lists all), or leave it out for timm's default"
        ) from error
    except Exception as error:  # the errors of requests, httpx and huggingface_hub have no common base class
        url = f"https://huggingface.co/{repository}/resolve/main"
        both = " and ".join(f"{url}/{file}" for file in reversed(files))
        remedy = (
            f"download {both} on another machine, put both into one folder, and give the path of the first instead of"
            " the name"
        )
        raise UserError(_unreachable(repository, error, remedy)) from error


def _unreachable(name: str, error: Exception, remedy: str) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{name}: the download failed ({reason}); connect to the internet and start again, or {remedy}"


# --- torchvision --------------------------------------------------------------------------------------------


def _fetch_torchvision(name: str, entry: _Torchvision) -> Fetched:
    path = _cache_folder() / entry.file
    url = TORCHVISION_URL + entry.file
    try:
        if not (path.is_file() and _is_whole(path)):
            _download(name, url, path)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # the error is also the open response
        remedy = (
            f"download {url} on another machine, and convert that file: mnv2 convert --model={entry.model['name']}"
            f" {entry.file} OUT.safetensors"
        )
        raise UserError(_unreachable(name, error, remedy)) from error
    except OSError as error:
        raise UserError(
            f"{path}: can't be read or written ({error.strerror}); fix that, or set MNV2_JAX_CACHE to a writable folder"
        ) from error
    return Fetched(path=path, source="torchvision", model=entry.model, preprocessing=_preprocessing(224, entry.resize))


def _cache_folder() -> pathlib.Path:
    return pathlib.Path(os.path.expanduser(os.environ.get("MNV2_JAX_CACHE") or "~/.cache/mnv2_jax/weights"))


def _is_whole(path: pathlib.Path) -> bool:
    """Whether a file's SHA-256 begins with the digits at the end of its name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(path.stem.rsplit("-", 1)[1])


def _download(name: str, url: str, path: pathlib.Path) -> None:
    """Downloads a file and moves it into place once it is complete. An interrupted download leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download_", dir=path.parent) as folder:
        part = pathlib.Path(folder, path.name)
        with _opener().open(url, timeout=TIMEOUT_SECONDS) as response, open(part, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            # disable=None shows the bar only on a terminal.
            with tqdm.tqdm(desc=name, total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        if not _is_whole(part):
            raise UserError(
                f"{name}: the download of {url} ({part.stat().st_size} bytes) doesn't match the SHA-256 at the end of"
                " the file's name, so it was truncated or changed and has been deleted; start again"
            )
        os.replace(part, path)


def _opener() -> urllib.request.OpenerDirector:
    """Opens HTTP and HTTPS addresses and follows redirects; urllib's default opener would open files and FTP, too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
