"""Frozen statistics of batch norm in fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from kornia_tinyvit.model import TinyViT

__all__ = ["freeze_statistics"]


def freeze_statistics(model: nn.Module, backbone_only: bool = False) -> RemovableHandle:
    """Keep the running statistics of batch norm fixed, and normalize with them, while a model is trained.

    The statistics of small batches are noisy, and adapters of PEFT do not store them. A hook puts the norms into
    evaluation mode before each forward pass of the model, because trainers call ``model.train()`` again and again.
    Scale and shift are trained as before.

    Args:
        model: the model whose forward pass is called in training.
        backbone_only: only the norms of a TinyViT in the model. Those of a new decoder have no statistics to keep.

    Returns:
        A handle, whose ``remove()`` ends it; it is also a context manager.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> with freeze_statistics(model):
        ...     _ = model.train()(torch.rand(2, 3, 8, 8))
        >>> model[1].running_mean.any()
        tensor(False)
    """
    return model.register_forward_pre_hook(partial(_freeze, backbone_only=backbone_only))


def _freeze(model: nn.Module, _: Any, backbone_only: bool) -> None:
    for part in model.modules() if backbone_only else [model]:
        for module in part.modules() if isinstance(part, TinyViT) or not backbone_only else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
