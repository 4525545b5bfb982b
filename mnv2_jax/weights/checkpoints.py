"""Finds the network in whatever PyTorch users save, by the names that its library gives its tensors.

A checkpoint is mappings within mappings (timm's ``state_dict_ema``, torchvision's ``model_ema``, Lightning's
``state_dict``), and the names in one of them may have a prefix (``model.``, ``ema.module.``). Neither is looked up in a
list: a network is where one of `names.ANCHORS` is, and its prefix is what stands before.
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
"""Parts of names that DataParallel, torch.compile, Fabric, Opacus and FSDP put in anywhere; no library has them."""
_AVERAGE = {"ema", "swa", "averaged", "average", "avg", "polyak", "shadow"}
_OTHER = {"teacher", "discriminator"}
_ARCHITECTURE = {"arch", "architecture", "model", "backbone", "encoder", "network", "net", "name", "variant"}
_FIRST = ("state_dict_ema", "model_ema", "state_dict", "model")
"""The order in which timm takes them, where there are several."""
_DEEPEST = 8
"""Levels of mappings that are looked into; none that people save has as many."""
_MOST_NAMED = 6


class Fields:
    """Stands in for an object in a checkpoint that isn't made: has its fields, and does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(key): value for key, value in state.items()})


@dataclasses.dataclass(frozen=True)
class Network:
    """Tensors that belong together, by the names of their library."""

    place: str
    """In the file: the keys of the mappings and the prefix of the names, as ``state_dict.model``; empty: its top."""
    role: Literal["ema", "raw", "other"]
    """Whether it is an average of weights (EMA, SWA), the weights, or another network, as a teacher."""
    anchor: Anchor
    tensors: Mapping[str, Any]
    beside: tuple[str, ...]
    """Names in the same mapping that belong to no network."""
    is_untouched: bool
    """Whether it is an average of no step, as it says."""

    @property
    def called(self) -> str:
        """The place, in words."""
        return _shown(self.place) or "the file's top level"


def networks_in(path: pathlib.Path, loaded: Mapping[Any, Any], tensor: type[Any]) -> list[Network]:
    """Every network that a checkpoint holds.

    Args:
      path: of the file, for errors.
      loaded: the checkpoint.
      tensor: the class of its tensors.

    Raises:
      UserError: if nothing but the name of a wrapper tells two tensors apart.
    """
    is_swapped = "averaging_state" in loaded  # Lightning's WeightAveraging puts the average into the usual place
    found = []
    for keys, mapping in _mappings(loaded):
        given = {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, tensor)}
        weights = {name: value for name, value in given.items() if not _is_counter(name, value)}
        tensors = {_cleaned(name): value for name, value in weights.items()}
        prefixes = _prefixes(tensors)
        if prefixes and len(tensors) < len(weights):
            raise UserError(f"{path}: holds tensors of one name, with a wrapper's and without; save the one model")
        parts: dict[str, dict[str, Any]] = {prefix: {} for prefix in prefixes}
        beside = []
        for name, value in tensors.items():
            prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default="")
            own = _own_name(name.removeprefix(prefix), prefixes.get(prefix))
            if own is None:
                beside.append(name)
            else:
                parts[prefix][own] = value
        counts = [value for name, value in given.items() if name.endswith("n_averaged") and value.ndim == 0]
        is_untouched = any(not value for value in counts)
        for prefix, anchor in prefixes.items():
            place = _cleaned(".".join([*keys, prefix])).strip(".")
            role = "ema" if is_swapped and keys == ("state_dict",) else _role(place)
            found.append(
                Network(place, role, anchor, parts[prefix], tuple(beside), is_untouched=is_untouched and role == "ema")
            )
    return found


def choose(path: pathlib.Path, networks: list[Network], take: str | None) -> tuple[Network, list[str]]:
    """The network to convert, and what there is to know of the choice.

    An average is taken rather than the raw weights, as timm does. Where it is one of the parameters alone, the norms'
    statistics are the raw weights', with which it was evaluated.

    Args:
      path: of the file, for errors.
      networks: what it holds, at least one.
      take: "ema", "raw" or a place; None: an average, where there is one.

    Raises:
      UserError: if there is none of that kind, or several.
    """
    by_role = {role: _first([each for each in networks if each.role == role]) for role in ("ema", "raw", "other")}
    if take is None:
        wanted = next(group for group in by_role.values() if group)
    else:
        wanted = by_role.get(take) or [each for each in networks if f"{each.place}.".startswith(f"{take}.")]
    if len(wanted) != 1:
        told = "several networks" if wanted else f"no weights that --take={take} names, but those"
        places = _some(each.called for each in wanted or networks)
        raise UserError(f"{path}: holds {told} of {places}; --take=PLACE says which to convert")
    taken = wanted[0]
    notes = []
    others = [each for each in networks if each is not taken]
    raw = [each for each in by_role["raw"] if each.anchor == taken.anchor]
    if taken.role == "ema":
        never = ", though it says that no step is in it" if taken.is_untouched else ""
        other = f"; --take=raw takes those of {raw[0].called}" if len(raw) == 1 else ""
        notes.append(f"the averaged weights (EMA) of {taken.called} were taken{never}{other}")
        if len(raw) == 1 and (lacking := set(raw[0].tensors) - set(taken.tensors)):
            taken = dataclasses.replace(taken, tensors={**raw[0].tensors, **taken.tensors})
            notes.append(f"{len(lacking)} tensors that the average lacks are those of {raw[0].called}")
    elif others:
        notes.append(f"the weights of {taken.called} were taken, not those of {_some(each.called for each in others)}")
    if taken.beside:
        roots = dict.fromkeys(name.partition(".")[0] for name in taken.beside)
        notes.append(f"{len(taken.beside)} tensors that aren't the network's were left out: {_some(roots)}")
    return taken, notes


def nameless_averages(loaded: Mapping[Any, Any], networks: list[Network], tensor: type[Any]) -> list[str]:
    """Places that sound like an average of weights and hold tensors, but not by the names of a network."""
    places = [".".join(keys) for keys, mapping in _mappings(loaded) if _has_tensors(mapping, tensor)]
    known = {each.place for each in networks}
    lost = [place for place in places if _role(place) == "ema" and not any(_is_in(other, place) for other in known)]
    return [_shown(place) for place in lost]


def architectures_said(loaded: Mapping[Any, Any]) -> tuple[str, ...]:
    """Names of the architecture in a checkpoint, its top first: texts behind keys like ``arch`` and ``args.model``."""
    texts = []
    for _, mapping in _mappings(loaded):
        for key, value in mapping.items():
            value = vars(value).get("_val", value) if isinstance(value, Fields) else value  # OmegaConf's nodes
            words = _words(key) if isinstance(key, str) and isinstance(value, str) else set()
            if words & _ARCHITECTURE and not words & _OTHER:
                texts.append(value)
    return tuple(dict.fromkeys(texts))


def _mappings(loaded: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Mappings, and fields of objects, with the keys on the way to them; the outer ones first, each once."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), loaded)])
    seen = set()
    while waiting:
        keys, value = waiting.popleft()
        fields = vars(value) if isinstance(value, Fields) else value
        if isinstance(fields, Mapping) and id(fields) not in seen:
            seen.add(id(fields))
            yield keys, fields
            if len(keys) < _DEEPEST:
                waiting.extend(((*keys, str(key)), below) for key, below in fields.items())


def _has_tensors(mapping: Mapping[Any, Any], tensor: type[Any]) -> bool:
    """Whether it holds tensors of any axes, or lists of them."""
    lists: Iterable[Iterable[Any]] = (v if isinstance(v, list | tuple) else [v] for v in mapping.values())
    return any(isinstance(each, tensor) and each.ndim for values in lists for each in values)


def _prefixes(names: Iterable[str]) -> dict[str, Anchor]:
    """Prefixes of the names of each network, with the library that they are known by."""
    found: dict[str, Anchor] = {}
    ends = tuple(anchor.name for anchor in ANCHORS)
    for name in sorted((name for name in names if name.endswith(ends)), key=lambda name: name.count(".")):
        for anchor in ANCHORS:
            prefix = name.removesuffix(anchor.name)
            if prefix == name or (prefix and not prefix.endswith(".")):
                continue
            is_part = any(f"{other}features." == prefix for other in found)
            if not (anchor.children and is_part):
                found.setdefault(prefix, anchor)
    return found


def _own_name(name: str, anchor: Anchor | None) -> str | None:
    """The library's name of a tensor without its prefix; None if it is none of the network's."""
    if anchor is None:
        return None
    if not anchor.children:
        return name
    first, _, rest = name.partition(".")
    return f"{anchor.children[first]}.{rest}" if first in anchor.children else None


def _first(networks: list[Network]) -> list[Network]:
    """The one that timm would take, where it would one; else all."""
    known = [each for place in _FIRST for each in networks if _is_in(each.place, place)]
    return known[:1] or networks


def _is_in(place: str, outer: str) -> bool:
    return f"{place}.".startswith(f"{outer}.")


def _cleaned(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_counter(name: str, value: Any) -> bool:
    """Whether a tensor only counts batches or steps: no weight is one whole number."""
    return name.endswith("num_batches_tracked") or (value.ndim == 0 and "int" in str(value.dtype))


def _role(place: str) -> Literal["ema", "raw", "other"]:
    words = _words(place)
    return "ema" if words & _AVERAGE else "other" if words & _OTHER else "raw"


def _words(text: str) -> set[str]:
    """``modelEMA.state_dict``: model, ema, state, dict."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def _some(names: Iterable[str]) -> str:
    """The first of many."""
    shown = [_shown(name) for name in names]
    return ", ".join([*shown[:_MOST_NAMED], *(["…"] if len(shown) > _MOST_NAMED else [])])


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 80 else reprlib.repr(name)
