"""Frozen parts of a network in fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from kornia_tinyvit.model import TinyViT

__all__ = ["freeze_parts"]

_PROMPT_ENCODER = "prompt_encoder"


@contextmanager
def freeze_parts(model: nn.Module, parts: Iterable[str]) -> Iterator[None]:
    """Freeze parts of a network while a model is trained.

    Their weights and the running statistics of their batch norms stay as they are, and they run in evaluation mode,
    without stochastic depth. The frozen layers behind the input record no activations for a backward pass, of which
    there is none. A hook sets the mode before each forward pass of the model, because trainers call ``model.train()``
    again and again. Build the optimizer within the context.

    Args:
        model: the model whose forward pass is called in training, with one TinyViT: any network of
            :func:`~kornia_tinyvit.training.train`.
        parts: ``"backbone"``, the stem, the four stages and MobileSAM's neck; ``"stages=2"``, the stem and the first
            two stages (1 to 4) with their downsampling; ``"prompt_encoder"`` of MobileSAM. Heads and decoders are
            trained.

    Raises:
        ValueError: if the network does not have such a part.

    Example:
        >>> import torch
        >>> model = TinyViT.from_config("1m", num_classes=3)
        >>> with freeze_parts(model, ["backbone"]):
        ...     model.train()(torch.rand(2, 3, 64, 64)).sum().backward()
        ...     sorted(name for name, each in model.named_parameters() if each.grad is not None)
        ['head.bias', 'head.weight', 'norm_head.bias', 'norm_head.weight']
    """
    names = tuple(name for part in parts for name in _find(model, part))
    parameters = [each for name in names for each in model.get_submodule(name).parameters() if each.requires_grad]
    hook = model.register_forward_pre_hook(partial(_evaluate, names=names)) if names else None
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        if hook is not None:
            hook.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)


def _find(model: nn.Module, part: str) -> list[str]:
    """Return the names of the modules of a part."""
    modules = dict(model.named_modules())
    root, backbone = next((name, module) for name, module in modules.items() if isinstance(module, TinyViT))
    prefix = f"{root}." if root else ""
    stages = re.fullmatch(r"stages=([1-4])", part)
    if stages:
        return [f"{prefix}patch_embed", *(f"{prefix}layers.{stage}" for stage in range(int(stages[1])))]
    if part == "backbone":
        neck = [] if backbone.neck is None else [f"{prefix}neck"]
        return [f"{prefix}patch_embed", f"{prefix}layers", *neck]
    encoders = [name for name in modules if name.rpartition(".")[2] == _PROMPT_ENCODER]
    if part != _PROMPT_ENCODER or not encoders:
        known = f"backbone, stages=1 to stages=4{f' and {_PROMPT_ENCODER}' if encoders else ''}"
        raise ValueError(f"This network has no part {part!r} to freeze; expected {known}.")
    return encoders


def _evaluate(model: nn.Module, _: Any, names: tuple[str, ...]) -> None:
    for name in names:
        model.get_submodule(name).eval()
