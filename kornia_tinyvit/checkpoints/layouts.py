"""Find the weights of a TinyViT in the content of a checkpoint, and convert the names of its tensors.

The layouts are those of the official code, timm, MobileSAM and transformers. This package uses the official names, like
kornia.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kornia_tinyvit.checkpoints.pickles import Name, Placeholder
from kornia_tinyvit.checkpoints.tensors import list_names
from kornia_tinyvit.modules import plain_name

__all__ = ["FoundNetwork", "find_network", "to_timm", "to_transformers"]

# Prefixes of names in the official layout and in timm's; the parts of a convolution have other names, too.
_OFFICIAL_AND_TIMM = (
    ("layers.", "stages."),
    ("patch_embed.seq.0.", "patch_embed.conv1."),
    ("patch_embed.seq.2.", "patch_embed.conv2."),
    ("norm_head.", "head.norm."),
    ("head.", "head.fc."),
)
_CONVOLUTION = (".c.weight", ".conv.weight")
# Prefixes of this package's transformers models.
_TRANSFORMERS_NETWORK = ("tinyvit.network.", "network.")
_TRANSFORMERS_HEAD = "classifier."

# A tensor by which a TinyViT is recognized in the official layout and in timm's, and the parts of the network.
_ANCHORS = {"official": "layers.0.blocks.0.conv1.c.weight", "timm": "stages.0.blocks.0.conv1.conv.weight"}
_PARTS = re.compile(r"(patch_embed|layers|stages|norm_head|head|neck)\.")
_SAM_ENCODER = "image_encoder."
_SAM_OTHERS = ("prompt_encoder.", "mask_decoder.")
# Limits of the search: a damaged or malicious file may refer to its objects often and in cycles.
_MAX_DEPTH = 32
_MAX_NAME = 500
_MAX_ENTRIES = 100_000
# Buffers that older releases stored although they are derived from the window size.
_DERIVED = "attention_bias_idxs"

# Moving averages, as in state_dict_ema, model_ema, ema, EMACallback, swa_model or averaged.
_AVERAGE = re.compile(r"(?<![a-z])(ema|swa|averaged?)(?![a-z])|Ema(?![a-z])|EMA|SWA")


@dataclass(frozen=True)
class FoundNetwork:
    """The weights of a TinyViT in a checkpoint.

    Args:
        tensors: tensors under official names.
        layout: their layout: ``"official"``, ``"timm"``, ``"mobile_sam"`` or ``"transformers"``.
        others: tensors of the prompt encoder and the mask decoder of a MobileSAM, under their official names.
        left_out: names of everything else in the checkpoint, with the class of foreign objects.
        ema: names of moving averages of the weights that were not chosen.
    """

    tensors: dict[str, Tensor]
    layout: str
    others: dict[str, Tensor]
    left_out: tuple[str, ...]
    ema: tuple[str, ...]


@dataclass(frozen=True)
class _Leaf:
    """A value in a checkpoint: the keys that lead to it, its name without wrappers, and the value."""

    path: tuple[str, ...]
    name: str
    value: Any


@dataclass(frozen=True)
class _Candidate:
    """A TinyViT in a checkpoint: the prefix of its names, their layout, and the tensor by which it was recognized."""

    prefix: str
    layout: str
    anchor: _Leaf


def find_network(content: Any, use_ema: bool = False) -> FoundNetwork:
    """Find the weights of a TinyViT in the content of a checkpoint, under any keys and prefixes.

    Args:
        content: state dict, or nested containers and modules with one, as of
            :func:`~kornia_tinyvit.checkpoints.pickles.read_pickle`.
        use_ema: whether to choose the moving average of the weights.

    Returns:
        The weights, and the names of everything else.

    Raises:
        ValueError: if there are no such weights, or several. The message is without its subject, the checkpoint.
    """
    labels: dict[tuple[str, ...], str] = {}
    leaves = list(itertools.islice(_leaves(content, labels), 5 * _MAX_ENTRIES))
    if len(leaves) == 5 * _MAX_ENTRIES:
        raise ValueError(f"has more than {len(leaves)} entries; pass its state dict.")
    candidates = [each for each in map(_recognize, leaves) if each is not None]
    chosen, averages = _choose(candidates, use_ema, content, leaves)
    return _extract(chosen, leaves, labels, averages)


def _leaves(content: Any, labels: dict[tuple[str, ...], str]) -> Iterator[_Leaf]:
    """Yield the values in nested containers, and record the class of each foreign object by its path.

    An object that occurs several times is yielded once: references may form cycles.
    """
    stack: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen: set[int] = set()
    while stack:
        path, value = stack.pop()
        if isinstance(value, (Name, Placeholder)):
            labels[path] = value.kind
        children = [] if isinstance(value, Tensor) else _children(value)
        opened = len(path) <= _MAX_DEPTH and sum(map(len, path)) <= _MAX_NAME and 0 < len(children) <= _MAX_ENTRIES
        if opened and id(value) not in seen:
            seen.add(id(value))
            stack += [((*path, str(key)), child) for key, child in reversed(children)]
        elif path and not opened:
            yield _Leaf(path, plain_name(".".join(path)), value)


def _children(value: Any) -> list[tuple[Any, Any]]:
    """Return the entries of a container; those of a module are the tensors of its state dict."""
    if isinstance(value, nn.Module):
        return list(value.state_dict().items())
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return [(index, each) for index, each in enumerate(value) if isinstance(each, (Tensor, Mapping, Placeholder))]
    if not isinstance(value, Placeholder):
        return []
    state = _mapping(value.state)
    if "_modules" in state and "_parameters" in state:
        return list(_module_tensors(state))
    return [*value.items.items(), *state.items()]


def _module_tensors(state: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the state dict of a pickled module from its attributes."""
    stack = [("", state)]
    for _ in range(_MAX_ENTRIES):
        prefix, state = stack.pop()
        hidden = state.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _mapping(state.get(kind)).items():
                if isinstance(tensor, Tensor) and not (isinstance(hidden, list) and name in hidden):
                    yield f"{prefix}{name}", tensor
        modules = reversed(list(_mapping(state.get("_modules")).items()))
        stack += [(f"{prefix}{name}.", _mapping(each.state)) for name, each in modules if isinstance(each, Placeholder)]
        if not stack:
            return
        if len(stack) > _MAX_ENTRIES or len(stack[-1][0]) > _MAX_NAME:
            break
    raise ValueError("has a module with too many parts.")


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


def _recognize(leaf: _Leaf) -> _Candidate | None:
    if isinstance(leaf.value, Tensor):
        for layout, anchor in _ANCHORS.items():
            if f".{leaf.name}".endswith(f".{anchor}"):
                return _Candidate(leaf.name.removesuffix(anchor), layout, leaf)
    return None


def _choose(
    candidates: list[_Candidate], use_ema: bool, content: Any, leaves: list[_Leaf]
) -> tuple[_Candidate, tuple[str, ...]]:
    """Return the only network that is, or is not, a moving average, and the names of the averages not chosen."""
    candidates = _without_aliases(candidates)
    if not candidates:
        if not leaves or not isinstance(content, (Mapping, nn.Module, Placeholder)):
            kind = content.kind if isinstance(content, (Name, Placeholder)) else type(content).__name__
            raise ValueError(f"has no state dict; expected tensors by name, got {kind}.")
        raise ValueError(
            "has no TinyViT in the official, kornia, timm, transformers or MobileSAM layout; its first entries are "
            f"{list_names(list(dict.fromkeys(leaf.path[0] for leaf in leaves)))}."
        )
    live = any(leaf.path[0] == "current_model_state" for leaf in leaves)  # of Lightning's callback WeightAveraging
    averages = [each for each in candidates if _is_average(each, live)]
    if use_ema and not averages:
        raise ValueError("has no EMA weights; omit use_ema=True.")
    others = [each for each in candidates if each not in averages]
    possible = averages if use_ema else others or averages
    if len(possible) > 1:
        listed = list_names([repr(_title(each)) for each in possible])
        raise ValueError(f"has several TinyViTs, {listed}; pass the state dict of one of them.")
    return possible[0], tuple(_title(each) for each in averages if each is not possible[0])


def _without_aliases(candidates: list[_Candidate]) -> list[_Candidate]:
    """Keep the first of several names of the same tensor: a module can be an attribute of several others."""
    unique: dict[int, _Candidate] = {}
    for each in candidates:
        tensor: Tensor = each.anchor.value
        unique.setdefault(id(tensor) if tensor.is_meta else tensor.data_ptr(), each)
    return list(unique.values())


def _is_average(candidate: _Candidate, live: bool) -> bool:
    first = candidate.anchor.path[0]
    if live and first in ("state_dict", "current_model_state"):
        return first == "state_dict"
    return _AVERAGE.search(".".join(candidate.anchor.path)) is not None


def _title(candidate: _Candidate) -> str:
    return candidate.prefix.removesuffix(".") or "model"


def _extract(
    chosen: _Candidate, leaves: list[_Leaf], labels: dict[tuple[str, ...], str], averages: tuple[str, ...]
) -> FoundNetwork:
    """Return the tensors under the prefix of a network, and the names of the rest."""
    parts = [(leaf, _official_name(leaf, chosen)) for leaf in leaves]
    tensors = {name: leaf.value for leaf, name in parts if name is not None}
    used = [leaf for leaf, name in parts if name is not None]
    if len(tensors) < len(used):
        raise ValueError(f"has several tensors of the same name under {_title(chosen)!r}; pass a plain state dict.")
    layout, others = chosen.layout, {}
    network = next((prefix for prefix in _TRANSFORMERS_NETWORK if f".{chosen.prefix}".endswith(f".{prefix}")), None)
    if f".{chosen.prefix}".endswith(f".{_SAM_ENCODER}"):
        layout, root = "mobile_sam", chosen.prefix.removesuffix(_SAM_ENCODER)
        others = _select(leaves, root, _SAM_OTHERS)
    elif network is not None and layout == "official" and "head.weight" not in tensors:
        layout, root = "transformers", chosen.prefix.removesuffix(network)
        head = [leaf for leaf in leaves if leaf.name.startswith(root + _TRANSFORMERS_HEAD)]
        tensors |= {leaf.name.replace(root + _TRANSFORMERS_HEAD, "head.", 1): leaf.value for leaf in head}
        used += head
    return FoundNetwork(tensors, layout, others, _left_out(chosen, leaves, used, labels, averages), averages)


def _official_name(leaf: _Leaf, chosen: _Candidate) -> str | None:
    """Return the official name of a tensor of the chosen network, and ``None`` for any other value."""
    name = leaf.name.removeprefix(chosen.prefix)
    known = isinstance(leaf.value, Tensor) and leaf.name.startswith(chosen.prefix) and _PARTS.match(name)
    if not known or name.endswith(_DERIVED):
        return None
    return _rename(name, to_timm=False) if chosen.layout == "timm" else name


def _select(leaves: list[_Leaf], root: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of some parts of a network under their names within it."""
    tensors = {leaf.name.removeprefix(root): leaf.value for leaf in leaves if leaf.name.startswith(root)}
    return {name: each for name, each in tensors.items() if name.startswith(parts) and isinstance(each, Tensor)}


def _left_out(
    chosen: _Candidate,
    leaves: list[_Leaf],
    used: list[_Leaf],
    labels: dict[tuple[str, ...], str],
    averages: tuple[str, ...],
) -> tuple[str, ...]:
    """Name what is not used, each container by one name: that of the first key that does not lead to the network."""
    container = chosen.anchor.path[:-1]
    names: dict[str, None] = {}
    paths = {leaf.path for leaf in used}
    for leaf in leaves:
        if leaf.path not in paths and not leaf.name.startswith(tuple(f"{name}." for name in averages)):
            differs = (key != other for key, other in zip(leaf.path, container, strict=False))
            depth = next((depth for depth, each in enumerate(differs) if each), len(container))
            label = labels.get(leaf.path[: depth + 1])
            names[f"{leaf.path[depth]} ({label})" if label else leaf.path[depth]] = None
    return tuple(names)


def to_timm(name: str) -> str:
    """Convert an official tensor name to timm's.

    Args:
        name: official name.

    Returns:
        timm's name.

    Example:
        >>> to_timm("layers.0.downsample.conv1.c.weight")
        'stages.1.downsample.conv1.conv.weight'
    """
    return _rename(name, to_timm=True)


def to_transformers(name: str) -> str:
    """Convert an official tensor name to that of ``TinyVitForImageClassification``.

    Args:
        name: official name.

    Returns:
        The name in transformers.

    Example:
        >>> to_transformers("head.bias"), to_transformers("norm_head.bias")
        ('classifier.bias', 'tinyvit.network.norm_head.bias')
    """
    if name.startswith("head."):
        return _TRANSFORMERS_HEAD + name.removeprefix("head.")
    return _TRANSFORMERS_NETWORK[0] + name


def _rename(name: str, *, to_timm: bool) -> str:
    """Convert a name between the official layout and timm's, where the downsampling layer starts the next stage."""
    old, new = (0, 1) if to_timm else (1, 0)
    pairs = (pair for pair in _OFFICIAL_AND_TIMM if name.startswith(pair[old]))
    if pair := next(pairs, None):
        name = pair[new] + name.removeprefix(pair[old])
    if match := re.match(r"(layers|stages)\.(\d+)\.downsample\.", name):
        stage = int(match[2]) + (1 if to_timm else -1)
        name = f"{match[1]}.{stage}.downsample.{name[match.end() :]}"
    if name.endswith(_CONVOLUTION[old]):
        name = name.removesuffix(_CONVOLUTION[old]) + _CONVOLUTION[new]
    return name
