"""Adapt a state dict to the classes, input channels and window sizes of a network, and check that it matches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kornia_tinyvit.checkpoints.catalog import IMAGENET_22K, imagenet_1k_in_22k, imagenet_classes
from kornia_tinyvit.checkpoints.tensors import CheckpointError, list_names

__all__ = [
    "HEAD",
    "STEM",
    "WindowAdaptation",
    "adapt_head",
    "adapt_input",
    "adapt_windows",
    "check_state_dict",
    "drop_neck",
    "match_classes",
]

STEM = "patch_embed.seq.0.c.weight"
HEAD = ("head.weight", "head.bias")
_NECK, _NORM = "neck.", "norm_head."

WindowAdaptation = Literal["interpolate", "crop"]


def drop_neck(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], adapted: list[str]) -> tuple[str, ...]:
    """Drop the neck of MobileSAM's encoder for a network without one.

    The last merging takes stride 2 with the same weights. The norm and the head in the file are dropped as well:
    MobileSAM was trained without them. The norm is that of a new network.

    Args:
        state_dict: tensors to load, changed in place.
        target: state dict of the network.
        adapted: list to which a description of the change is appended.

    Returns:
        The names of the parts that are dropped.
    """
    if not any(name.startswith(_NECK) for name in state_dict) or any(name.startswith(_NECK) for name in target):
        return ()
    dropped = [name for name in state_dict if name.startswith((_NECK, _NORM, *HEAD))]
    for name in dropped:
        del state_dict[name]
    for name, tensor in target.items():
        if name.startswith(_NORM):
            state_dict[name] = torch.full(tensor.shape, float(name.endswith("weight")))
    adapted.append("MobileSAM's encoder gets stride 32, without its neck and with a new norm")
    return tuple(dict.fromkeys(name.partition(".")[0] for name in dropped))


def adapt_head(
    state_dict: dict[str, Tensor],
    target: Mapping[str, Tensor],
    adapted: list[str],
    names: tuple[str, ...] | None = None,
    wanted: Sequence[str] | None = None,
) -> tuple[bool, tuple[str, ...] | None]:
    """Adapt the head to the classes of a network.

    If both sides have class names and any is common, the rows are matched by name. From the 21841 classes of
    ImageNet-22k to 1000 classes, the rows of ImageNet-1k are taken as the official code does, with the mean of the
    others for the one class that is missing there. Any other head with another number of classes is set to zeros.

    Args:
        state_dict: tensors to load, changed in place.
        target: state dict of the network.
        adapted: list to which a description of the change is appended.
        names: class names of the tensors, if known.
        wanted: class names of the network, if known.

    Returns:
        Whether all classes have weights of the file, and the class names if so and if they are known.
    """
    weight, old = target.get(HEAD[0]), state_dict.get(HEAD[0])
    if weight is None or (old is not None and old.shape[1:] != weight.shape[1:]):
        return True, None  # no head, or another architecture, which check_state_dict reports
    named = None if wanted is None else tuple(wanted)
    before, after = 0 if old is None else len(old), len(weight)
    change = f"the head has {after} classes " + (f"instead of {before}" if before else "and is missing in the file")
    if before and (rows := match_classes(names, named)) is not None:
        complete = bool((rows >= 0).all())
        _select_rows(state_dict, rows, fill_with_mean=False)
        rest = "" if complete else ", the others are initialized with zeros"
        adapted.append(f"{int((rows >= 0).sum())} of the {after} classes of the head are matched by name{rest}")
        return complete, named if complete else None
    if before == after:
        return True, named or names
    if (before, after) == (IMAGENET_22K, 1000):
        _select_rows(state_dict, imagenet_1k_in_22k(), fill_with_mean=True)
        adapted.append(
            f"{change}; it has the weights of ImageNet-1k's classes, and for class 850, teddy bear, which ImageNet-22k "
            "does not have, their mean"
        )
        return True, named or imagenet_classes()
    for name in HEAD:
        state_dict[name] = torch.zeros(target[name].shape)
    adapted.append(f"{change}; it is initialized with zeros")
    return False, None


def match_classes(names: Sequence[str] | None, wanted: Sequence[str] | None) -> Tensor | None:
    """Return the index of each wanted class among the classes of a checkpoint, -1 for a class that it does not have.

    Args:
        names: class names of the checkpoint, if known.
        wanted: class names of the network, if known.

    Returns:
        Indices :math:`(K,)`; ``None`` if no name is common or all are the same in the same order.
    """
    if not names or not wanted or list(names) == list(wanted) or set(names).isdisjoint(wanted):
        return None
    known = {name: row for row, name in enumerate(names)}
    return torch.tensor([known.get(name, -1) for name in wanted])


def _select_rows(state_dict: dict[str, Tensor], rows: Tensor, fill_with_mean: bool) -> None:
    """Replace a head by some of its rows; those of index -1 become zero or the mean of the others."""
    for name in HEAD:
        if name in state_dict:
            head = state_dict[name][rows]
            head[rows < 0] = head[rows >= 0].mean(0) if fill_with_mean else 0
            state_dict[name] = head


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
        CheckpointError: if names or shapes differ, or a tensor is on the meta device, sparse or not finite.
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
    if sparse := [name for name, tensor in state_dict.items() if tensor.layout != torch.strided]:
        raise CheckpointError(f"{source} has sparse tensors in {list_names(sparse)}; pass them as x.to_dense().")
    if bad := [name for name, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise CheckpointError(
            f"{source} has NaN or infinite values in {list_names(bad)}, probably from a diverged training. Nothing was "
            "loaded; use an earlier checkpoint."
        )
