"""Other names for the same tensors: the official layout, timm's, and MobileSAM's whole model.

The official names, which are also kornia's, are the ones this package uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

__all__ = ["translate", "unwrap"]

# timm counts a stage's merging as the first step of the next stage, and names the parts of a convolution otherwise.
_TIMM_TO_OFFICIAL: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"^stages\.(\d+)\.downsample\."), lambda match: f"layers.{int(match[1]) - 1}.downsample."),
    (re.compile(r"^stages\."), "layers."),
    (re.compile(r"^patch_embed\.conv1\."), "patch_embed.seq.0."),
    (re.compile(r"^patch_embed\.conv2\."), "patch_embed.seq.2."),
    (re.compile(r"^head\.norm\."), "norm_head."),
    (re.compile(r"^head\.fc\."), "head."),
    (re.compile(r"\.conv\.weight$"), ".c.weight"),
)

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
        The tensors under official names; the layout they came in, ``"official"``, ``"timm"`` or ``"mobile_sam"``; and
        the names that were left out because they are derived or belong to another part of a whole model.
    """
    tensors = dict(state_dict)
    while prefix := _common_prefix(tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

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
        tensors = {_from_timm(name): tensor for name, tensor in tensors.items()}

    derived = [name for name in tensors if name.endswith(_DERIVED)]
    return {name: tensors[name] for name in tensors if name not in derived}, layout, left_out + derived


def _common_prefix(names: Collection[str]) -> str | None:
    return next((prefix for prefix in _PREFIXES if names and all(name.startswith(prefix) for name in names)), None)


def _from_timm(name: str) -> str:
    for pattern, replacement in _TIMM_TO_OFFICIAL:
        name = pattern.sub(replacement, name)
    return name
