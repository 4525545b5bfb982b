"""Finds the networks in a PyTorch checkpoint, by the names that their library gives to tensors.

A checkpoint consists of nested mappings (timm's ``state_dict_ema``, torchvision's ``model_ema``, Lightning's
``state_dict``), and the tensor names in a mapping may have a prefix (``model.``, ``ema.module.``). No list of such keys
or prefixes is needed: a mapping with a name that ends in one of `names.ANCHORS` holds a network, and the text before
that ending is the prefix.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import reprlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from mnv2_jax.errors import UserError
from mnv2_jax.weights.names import ANCHORS, Anchor

_WRAPPERS = {"module", "_orig_mod", "_forward_module", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that DataParallel, torch.compile, Fabric, Opacus and FSDP insert into names. No library uses them itself."""
_AVERAGE = {"ema", "swa", "averaged", "average", "avg", "polyak", "shadow"}
"""Words in the place of a network that is an average of weights."""
_OTHER = {"teacher", "discriminator"}
"""Words in the place of another network than the trained one."""
_ARCHITECTURE = {"arch", "architecture", "model", "backbone", "encoder", "network", "net", "name", "variant"}
"""Words in the keys under which checkpoints store the name of the architecture."""
_FIRST = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys in the order in which timm prefers them, if a checkpoint has several."""
_DEEPEST = 8
"""Levels of nested mappings that are searched; real checkpoints have fewer."""
_MOST_NAMED = 6


class Fields:
    """Replaces an object in a checkpoint: it keeps the object's fields but runs none of its code."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(key): value for key, value in state.items()})


@dataclasses.dataclass(frozen=True)
class Network:
    """Tensors of one network in a checkpoint, by their library's names."""

    place: str
    """Place in the file: the keys of the mappings and the prefix of the names, as ``state_dict.model``; empty: the top
    level."""
    role: Literal["ema", "raw", "other"]
    """ema: an average of weights (EMA, SWA); raw: the weights themselves; other: another network, such as a teacher."""
    anchor: Anchor
    tensors: Mapping[str, Any]
    beside: tuple[str, ...]
    """Names in the same mapping that belong to no network."""
    is_untouched: bool
    """Whether the checkpoint says that this average contains no step yet."""

    @property
    def called(self) -> str:
        """Place of the network as text for messages."""
        return _shown(self.place) or "the file's top level"


def networks_in(path: pathlib.Path, loaded: Mapping[Any, Any], tensor: type[Any]) -> list[Network]:
    """Finds all networks in a checkpoint.

    Args:
      path: the file, for errors.
      loaded: the checkpoint.
      tensor: the class of its tensors.

    Raises:
      UserError: if the names of two tensors differ only in the name of a wrapper.
    """
    is_swapped = "averaging_state" in loaded  # Lightning's WeightAveraging stores the average in place of the weights
    networks = []
    for keys, mapping in _mappings(loaded):
        named = {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, tensor)}
        weights = {name: value for name, value in named.items() if not _is_counter(name, value)}
        tensors = {_without_wrappers(name): value for name, value in weights.items()}
        prefixes = _prefixes(tensors)
        if prefixes and len(tensors) < len(weights):
            raise UserError(
                f"{path}: holds some tensors twice, with and without the name of a wrapper; save only one of the models"
            )
        parts: dict[str, dict[str, Any]] = {prefix: {} for prefix in prefixes}
        beside = []
        for name, value in tensors.items():
            prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default="")
            library_name = _library_name(name.removeprefix(prefix), prefixes.get(prefix))
            if library_name is None:
                beside.append(name)
            else:
                parts[prefix][library_name] = value
        counts = [value for name, value in named.items() if name.endswith("n_averaged") and value.ndim == 0]
        is_untouched = any(not value for value in counts)
        for prefix, anchor in prefixes.items():
            place = _without_wrappers(".".join([*keys, prefix])).strip(".")
            role = "ema" if is_swapped and keys == ("state_dict",) else _role(place)
            networks.append(
                Network(place, role, anchor, parts[prefix], tuple(beside), is_untouched=is_untouched and role == "ema")
            )
    return networks


def choose(path: pathlib.Path, networks: list[Network], take: str | None) -> tuple[Network, list[str]]:
    """Chooses the network to convert, and returns it with notes on the choice.

    Like timm, it prefers averaged weights to raw ones. If the average covers the parameters only, the statistics of the
    norms come from the raw weights, as they did when the average was evaluated.

    Args:
      path: the file, for errors.
      networks: the networks in the file, at least one.
      take: "ema", "raw" or a place; None: an average if there is one.

    Raises:
      UserError: if no network fits ``take``, or several do.
    """
    by_role = {role: _first([each for each in networks if each.role == role]) for role in ("ema", "raw", "other")}
    if take is None:
        matches = next(group for group in by_role.values() if group)
    else:
        matches = by_role.get(take) or [each for each in networks if f"{each.place}.".startswith(f"{take}.")]
    if len(matches) != 1:
        problem = "holds several networks" if matches else f"--take={take} fits none of its networks"
        places = _list_some(each.called for each in matches or networks)
        raise UserError(f"{path}: {problem}: {places}; choose one with --take=PLACE")
    chosen = matches[0]
    notes = []
    not_chosen = [each for each in networks if each is not chosen]
    raw = [each for each in by_role["raw"] if each.anchor == chosen.anchor]
    if chosen.role == "ema":
        warning = ", although the file says that they average no step" if chosen.is_untouched else ""
        alternative = f"; for those of {raw[0].called} give --take=raw" if len(raw) == 1 else ""
        notes.append(f"the averaged weights (EMA) of {chosen.called} were taken{warning}{alternative}")
        if len(raw) == 1 and (lacking := set(raw[0].tensors) - set(chosen.tensors)):
            chosen = dataclasses.replace(chosen, tensors={**raw[0].tensors, **chosen.tensors})
            notes.append(f"{len(lacking)} tensors that the average lacks were taken from {raw[0].called}")
    elif not_chosen:
        places = _list_some(each.called for each in not_chosen)
        notes.append(f"the weights of {chosen.called} were taken, not those of {places}")
    if chosen.beside:
        roots = dict.fromkeys(name.partition(".")[0] for name in chosen.beside)
        count = len(chosen.beside)
        notes.append(f"{count} tensors that don't belong to the network were left out: {_list_some(roots)}")
    return chosen, notes


def nameless_averages(loaded: Mapping[Any, Any], networks: list[Network], tensor: type[Any]) -> list[str]:
    """Places that, by their name, hold averaged weights, but whose tensors don't have the names of a network."""
    places = [".".join(keys) for keys, mapping in _mappings(loaded) if _has_tensors(mapping, tensor)]
    network_places = {each.place for each in networks}
    lost = [place for place in places if _role(place) == "ema" and not any(_is_in(p, place) for p in network_places)]
    return [_shown(place) for place in lost]


def architectures_said(loaded: Mapping[Any, Any]) -> tuple[str, ...]:
    """Names of architectures in a checkpoint, outer ones first: texts under keys like ``arch`` and ``args.model``."""
    texts = []
    for _, mapping in _mappings(loaded):
        for key, value in mapping.items():
            value = vars(value).get("_val", value) if isinstance(value, Fields) else value  # for OmegaConf's nodes
            words = _words(key) if isinstance(key, str) and isinstance(value, str) else set()
            if words & _ARCHITECTURE and not words & _OTHER:
                texts.append(value)
    return tuple(dict.fromkeys(texts))


def _mappings(loaded: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yields all mappings and the fields of objects, with the keys that lead to them; outer ones first, each once."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), loaded)])
    visited = set()
    while waiting:
        keys, value = waiting.popleft()
        fields = vars(value) if isinstance(value, Fields) else value
        if isinstance(fields, Mapping) and id(fields) not in visited:
            visited.add(id(fields))
            yield keys, fields
            if len(keys) < _DEEPEST:
                waiting.extend(((*keys, str(key)), below) for key, below in fields.items())


def _has_tensors(mapping: Mapping[Any, Any], tensor: type[Any]) -> bool:
    """Whether a mapping holds tensors with at least one axis, or lists of such tensors."""
    lists: Iterable[Iterable[Any]] = (v if isinstance(v, list | tuple) else [v] for v in mapping.values())
    return any(isinstance(each, tensor) and each.ndim for values in lists for each in values)


def _prefixes(names: Iterable[str]) -> dict[str, Anchor]:
    """Finds the prefix of each network's tensor names, with the anchor that identifies its library."""
    anchors: dict[str, Anchor] = {}
    ends = tuple(anchor.name for anchor in ANCHORS)
    for name in sorted((name for name in names if name.endswith(ends)), key=lambda name: name.count(".")):
        for anchor in ANCHORS:
            prefix = name.removesuffix(anchor.name)
            if prefix == name or (prefix and not prefix.endswith(".")):
                continue
            anchors.setdefault(prefix, anchor)
    inside = {prefix + beginning for prefix, anchor in anchors.items() for beginning in anchor.inside}
    return {prefix: anchor for prefix, anchor in anchors.items() if prefix not in inside}


def _library_name(name: str, anchor: Anchor | None) -> str | None:
    """Returns the library's name for a tensor name without prefix; None if the tensor isn't part of the network."""
    if anchor is None:
        return None
    if not anchor.children:
        return name
    first, _, remainder = name.partition(".")
    return f"{anchor.children[first]}.{remainder}" if first in anchor.children else None


def _first(networks: list[Network]) -> list[Network]:
    """Returns the network that timm would prefer; all of them if timm has no preference."""
    preferred = [each for place in _FIRST for each in networks if _is_in(each.place, place)]
    return preferred[:1] or networks


def _is_in(place: str, outer: str) -> bool:
    return f"{place}.".startswith(f"{outer}.")


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_counter(name: str, value: Any) -> bool:
    """Whether a tensor only counts batches or steps; a weight is never a single integer."""
    return name.endswith("num_batches_tracked") or (value.ndim == 0 and "int" in str(value.dtype))


def _role(place: str) -> Literal["ema", "raw", "other"]:
    words = _words(place)
    return "ema" if words & _AVERAGE else "other" if words & _OTHER else "raw"


def _words(text: str) -> set[str]:
    """Splits a name into lower-case words: ``modelEMA.state_dict`` into model, ema, state, dict."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def _list_some(names: Iterable[str]) -> str:
    """Lists the first few of many names."""
    shown = [_shown(name) for name in names]
    return ", ".join([*shown[:_MOST_NAMED], *(["…"] if len(shown) > _MOST_NAMED else [])])


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 80 else reprlib.repr(name)
