"""Other names for the same tensors: the official layout, timm's, MobileSAM's whole model, and transformers'.

The official names, which are also kornia's, are the ones this package uses.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

__all__ = ["to_timm", "to_transformers", "translate", "unwrap"]

# How names begin in the official layout and in timm's, which names the parts of a convolution otherwise.
_OFFICIAL_AND_TIMM = (
    ("layers.", "stages."),
    ("patch_embed.seq.0.", "patch_embed.conv1."),
    ("patch_embed.seq.2.", "patch_embed.conv2."),
    ("norm_head.", "head.norm."),
    ("head.", "head.fc."),
)
_CONVOLUTION = (".c.weight", ".conv.weight")
# The network inside this package's models of transformers, and their classifier.
_TRANSFORMERS_NETWORK = ("tinyvit.network.", "network.")
_TRANSFORMERS_HEAD = "classifier."

# Tables that older releases stored although they follow from the window size.
_DERIVED = "attention_bias_idxs"

# What training scripts wrap a state dict in, and what wrappers put before its names.
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SAM_ENCODER = "image_encoder."


def unwrap(content: Any) -> Any:
    """Return the state dict inside a training checkpoint such as ``{"model": ..., "epoch": ...}``."""
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return unwrap(content[key])
    return content


def translate(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    """Give tensors their official names.

    Args:
        state_dict: tensors under the names of any known layout.

    Returns:
        The tensors under official names; the layout they came in, ``"official"``, ``"timm"``, ``"mobile_sam"`` or
        ``"transformers"``; and the names that were left out because they are derived or belong to another part of a
        whole model.
    """
    tensors = strip_prefixes(state_dict)
    layout = "official"
    left_out: list[str] = []
    if any(name.startswith(_SAM_ENCODER) for name in tensors):
        layout = "mobile_sam"
        left_out += [name for name in tensors if not name.startswith(_SAM_ENCODER)]
        tensors = {
            name.removeprefix(_SAM_ENCODER): tensor for name, tensor in tensors.items() if name.startswith(_SAM_ENCODER)
        }
    elif any(name.startswith("stages.") for name in tensors):
        layout = "timm"
        tensors = {_rename(name, to_timm=False): tensor for name, tensor in tensors.items()}
    elif any(name.startswith(_TRANSFORMERS_NETWORK) for name in tensors):
        layout = "transformers"
        tensors = {_from_transformers(name): tensor for name, tensor in tensors.items()}

    derived = [name for name in tensors if name.endswith(_DERIVED)]
    return {name: tensors[name] for name in tensors if name not in derived}, layout, left_out + derived


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers such as ``DataParallel`` put before the names of all tensors."""
    tensors = dict(state_dict)
    while prefix := _common_prefix(tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _common_prefix(names: Collection[str]) -> str | None:
    return next((prefix for prefix in _PREFIXES if names and all(name.startswith(prefix) for name in names)), None)


def to_timm(name: str) -> str:
    """Return timm's name of a tensor that has its official name.

    Example:
        >>> to_timm("layers.0.downsample.conv1.c.weight")
        'stages.1.downsample.conv1.conv.weight'
    """
    return _rename(name, to_timm=True)


def to_transformers(name: str) -> str:
    """Return what ``TinyVitForImageClassification`` calls a tensor that has its official name.

    Example:
        >>> to_transformers("head.bias"), to_transformers("norm_head.bias")
        ('classifier.bias', 'tinyvit.network.norm_head.bias')
    """
    if name.startswith("head."):
        return _TRANSFORMERS_HEAD + name.removeprefix("head.")
    return _TRANSFORMERS_NETWORK[0] + name


def _from_transformers(name: str) -> str:
    if name.startswith(_TRANSFORMERS_HEAD):
        return "head." + name.removeprefix(_TRANSFORMERS_HEAD)
    return next((name.removeprefix(prefix) for prefix in _TRANSFORMERS_NETWORK if name.startswith(prefix)), name)


def _rename(name: str, *, to_timm: bool) -> str:
    """Translate the name of a tensor between the official layout and timm's, whose stages begin with a merging."""
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
