"""Frozen statistics of batch norm in fine-tuning."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["freeze_statistics"]


def freeze_statistics(model: nn.Module) -> RemovableHandle:
    """Keep the running statistics of batch norm fixed, and normalize with them, while a model is trained.

    The statistics of small batches are noisy, and adapters of PEFT do not store them. A hook puts the norms into
    evaluation mode before each forward pass of the model, because trainers call ``model.train()`` again and again.
    Scale and shift are trained as before.

    Args:
        model: the model whose forward pass is called in training.

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
    return model.register_forward_pre_hook(_freeze)


def _freeze(model: nn.Module, _: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
