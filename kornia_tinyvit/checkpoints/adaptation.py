"""Adapt a state dict to the classes, input channels and window sizes of a network, and check that it matches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kornia_tinyvit.checkpoints.tensors import CheckpointError, list_names

__all__ = ["HEAD", "STEM", "WindowAdaptation", "adapt_head", "adapt_input", "adapt_windows", "check_state_dict"]

STEM = "patch_embed.seq.0.c.weight"
HEAD = ("head.weight", "head.bias")

WindowAdaptation = Literal["interpolate", "crop"]


def adapt_head(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], adapted: list[str]) -> bool:
    """Reset the head to zeros if the number of classes differs.

    Args:
        state_dict: tensors to load, changed in place.
        target: state dict of the network.
        adapted: list to which a description of the change is appended.

    Returns:
        Whether the head was reset.
    """
    weight = target.get(HEAD[0])
    old = state_dict.get(HEAD[0])
    if weight is None or (old is not None and old.shape == weight.shape):
        return False
    if old is not None and old.shape[1:] != weight.shape[1:]:
        return False  # another architecture, reported by check_state_dict
    for name in HEAD:
        state_dict[name] = torch.zeros(target[name].shape)
    origin = f"instead of {old.shape[0]}" if old is not None else "and is missing in the file"
    adapted.append(f"the head has {weight.shape[0]} classes {origin}; it is initialized with zeros")
    return True


def adapt_input(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], adapted: list[str]) -> None:
    """Adapt the first convolution to another number of input channels.

    For one channel (gray images) the weights are summed over the channels, which equals repeating the gray channel.
    For more channels the weights are repeated and scaled to keep the output for equal channels.

    Args:
        state_dict: tensors to load, changed in place.
        target: state dict of the network.
        adapted: list to which a description of the change is appended.
    """
    old, new = state_dict.get(STEM), target.get(STEM)
    if old is None or new is None or old.ndim != 4 or old.shape[1] == new.shape[1] or old.shape[0] != new.shape[0]:
        return
    before, after = old.shape[1], new.shape[1]
    if after == 1:
        state_dict[STEM] = old.sum(1, keepdim=True)
    else:
        state_dict[STEM] = old[:, torch.arange(after) % before] * (before / after)
    adapted.append(f"the first convolution has {after} input channel{'s'[: after > 1]} instead of {before}")


def adapt_windows(
    state_dict: dict[str, Tensor], target: Mapping[str, Tensor], how: WindowAdaptation, adapted: list[str]
) -> None:
    """Resize the attention bias tables to the window sizes of a network.

    Args:
        state_dict: tensors to load, changed in place.
        target: state dict of the network.
        how: ``"interpolate"`` (bicubic), or ``"crop"`` to keep the biases of the offsets inside a smaller window.
        adapted: list to which descriptions of the changes are appended.
    """
    changes: dict[tuple[int, int], None] = {}
    for name, new in target.items():
        old = state_dict.get(name)
        if not name.endswith("attention_biases") or old is None or old.ndim != 2 or old.shape[0] != new.shape[0]:
            continue
        before, after = math.isqrt(old.shape[1]), math.isqrt(new.shape[1])
        if before == after or before**2 != old.shape[1]:
            continue
        table = old.float().view(1, -1, before, before)
        if how == "crop" and after < before:
            table = table[..., :after, :after]
        else:
            table = F.interpolate(table, (after, after), mode="bicubic", align_corners=False)
        state_dict[name] = table.reshape(old.shape[0], after**2)
        changes[before, after] = None
    verb = "cropped" if how == "crop" else "interpolated"
    adapted.extend(f"bias tables {verb} from window size {before} to {after}" for before, after in changes)


def check_state_dict(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], source: str) -> None:
    """Check that a state dict can be loaded into a network.

    Args:
        state_dict: tensors to load.
        target: state dict of the network.
        source: origin of the tensors, for the error message.

    Raises:
        CheckpointError: if names or shapes differ, or a tensor is on the meta device or not finite.
    """
    missing = sorted(target.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - target.keys())
    shapes = [
        f"{name} is {tuple(state_dict[name].shape)} in the file and {tuple(tensor.shape)} in the network"
        for name, tensor in target.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    problems = [f"missing keys {list_names(missing)}"] if missing else []
    problems += [f"unexpected keys {list_names(unexpected)}"] if unexpected else []
    problems += shapes[:3] + ([f"and {len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else [])
    if problems:
        raise CheckpointError(f"{source} has another architecture: {'; '.join(problems)}. Nothing was loaded.")
    if meta := [name for name, tensor in state_dict.items() if tensor.is_meta]:
        raise CheckpointError(f"{source} has no values for {list_names(meta)}, which are on the meta device.")
    if bad := [name for name, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise CheckpointError(
            f"{source} has NaN or infinite values in {list_names(bad)}, probably from a diverged training. Nothing was "
            "loaded; use an earlier checkpoint."
        )
