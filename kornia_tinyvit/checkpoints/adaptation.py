"""Adapt weights to a network of other classes, input channels or windows, and reject what has no adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kornia_tinyvit.checkpoints.tensors import CheckpointError, list_some

__all__ = ["HEAD", "STEM", "WindowAdaptation", "adapt_head", "adapt_input", "adapt_windows", "check_state_dict"]

STEM = "patch_embed.seq.0.c.weight"
HEAD = ("head.weight", "head.bias")

WindowAdaptation = Literal["interpolate", "cut"]


def adapt_head(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], adapted: list[str]) -> bool:
    """Let a head for other classes start at zero; return whether that was needed."""
    weight = target.get(HEAD[0])
    old = state_dict.get(HEAD[0])
    if weight is None or (old is not None and old.shape == weight.shape):
        return False
    if old is not None and old.shape[1:] != weight.shape[1:]:
        return False  # another architecture, which is refused with its shapes
    for name in HEAD:
        state_dict[name] = torch.zeros(target[name].shape)
    origin = f"instead of {old.shape[0]} " if old is not None else "that the file does not have "
    adapted.append(f"the head has {weight.shape[0]} classes {origin}and starts at zero")
    return True


def adapt_input(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], adapted: list[str]) -> None:
    """Let the first convolution answer an image of other channels as it answered the ones it knows.

    One channel stands for a gray image, which had the same values in all channels: their weights add up. More
    channels repeat the known ones, scaled so that the sum over equal channels stays.
    """
    old, new = state_dict.get(STEM), target.get(STEM)
    if old is None or new is None or old.ndim != 4 or old.shape[1] == new.shape[1] or old.shape[0] != new.shape[0]:
        return
    have, want = old.shape[1], new.shape[1]
    if want == 1:
        state_dict[STEM] = old.sum(1, keepdim=True)
    else:
        state_dict[STEM] = old[:, torch.arange(want) % have] * (have / want)
    channels = "channel" if want == 1 else "channels"
    adapted.append(f"the first convolution takes {want} {channels} instead of {have}")


def adapt_windows(
    state_dict: dict[str, Tensor], target: Mapping[str, Tensor], how: WindowAdaptation, adapted: list[str]
) -> None:
    """Let the tables of attention biases follow the network's windows."""
    changes: dict[tuple[int, int], None] = {}
    for name, new in target.items():
        old = state_dict.get(name)
        if not name.endswith("attention_biases") or old is None or old.ndim != 2 or old.shape[0] != new.shape[0]:
            continue
        before, after = math.isqrt(old.shape[1]), math.isqrt(new.shape[1])
        if before == after or before**2 != old.shape[1]:
            continue
        table = old.float().view(1, -1, before, before)
        if how == "cut" and after < before:
            table = table[..., :after, :after]
        else:
            table = F.interpolate(table, (after, after), mode="bicubic", align_corners=False)
        state_dict[name] = table.reshape(old.shape[0], after**2)
        changes[before, after] = None
    verb = "cut" if how == "cut" else "interpolated"
    adapted.extend(f"bias tables {verb} from windows of {before} to {after} tokens" for before, after in changes)


def check_state_dict(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that a network cannot take, before it is touched.

    Args:
        state_dict: the tensors.
        target: the network's.
        source: where the tensors came from, for the error.

    Raises:
        CheckpointError: if names or shapes differ, or a tensor holds NaN or infinity.
    """
    missing = sorted(target.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - target.keys())
    shapes = [
        f"{name} is {tuple(state_dict[name].shape)} in the file and {tuple(tensor.shape)} in the network"
        for name, tensor in target.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    problems = [f"it lacks {list_some(missing)}"] if missing else []
    problems += [f"the network has no {list_some(unexpected)}"] if unexpected else []
    problems += shapes[:3] + ([f"and {len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else [])
    if problems:
        raise CheckpointError(f"{source} is of another architecture: {'; '.join(problems)}. Nothing was loaded.")
    hollow = [name for name, tensor in state_dict.items() if tensor.is_meta]
    if hollow:
        raise CheckpointError(f"{source} has no values for {list_some(hollow)}, which are on the meta device.")
    broken = [name for name, tensor in state_dict.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinite values in {list_some(broken)}, as a diverged training leaves them. "
            "Nothing was loaded; use an earlier checkpoint."
        )
