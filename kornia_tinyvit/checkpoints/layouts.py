"""Names of tensors in the layouts of the official code, timm, MobileSAM and transformers.

This package uses the official names, like kornia.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["to_timm", "to_transformers", "translate", "unwrap"]

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

# Buffers that older releases stored although they are derived from the window size.
_DERIVED = "attention_bias_idxs"

# Keys of training checkpoints that contain a state dict, and prefixes that module wrappers add.
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
    """Rename tensors to the official layout.

    Args:
        state_dict: tensors in any supported layout.

    Returns:
        The tensors under official names; their original layout, ``"official"``, ``"timm"``, ``"mobile_sam"`` or
        ``"transformers"``; and the names left out, which are derived buffers or other parts of a MobileSAM.
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
    """Remove the prefixes of module wrappers such as ``DataParallel`` if all names have them."""
    tensors = dict(state_dict)
    while tensors and (found := [prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in tensors)]):
        tensors = {name.removeprefix(found[0]): tensor for name, tensor in tensors.items()}
    return tensors


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


def _from_transformers(name: str) -> str:
    if name.startswith(_TRANSFORMERS_HEAD):
        return "head." + name.removeprefix(_TRANSFORMERS_HEAD)
    return next((name.removeprefix(prefix) for prefix in _TRANSFORMERS_NETWORK if name.startswith(prefix)), name)


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
