"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]


class MovingAverage:
    """Exponential moving average of parameters and floating point buffers.

    Each rank averages its own shard of parameters that FSDP shards.

    Args:
        model: the network.
        decay: weight of the old average in an update; in update ``n`` at most ``(1 + n) / (10 + n)``, which reduces
            the weight of the initial network.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = [tensor.detach().clone() for tensor in _averaged(model)]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the current weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        # _foreach_lerp_ does not mix sharded parameters and plain buffers; averages need local tensors only.
        averages, current = ([_local(x.detach()) for x in tensors] for tensors in (self.tensors, _averaged(model)))
        torch._foreach_lerp_(averages, current, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Load the average into the network and restore its own weights afterwards."""
        current = [tensor.detach().clone() for tensor in _averaged(model)]
        _fill(model, self.tensors)
        try:
            yield
        finally:
            _fill(model, current)

    def state_dict(self) -> dict[str, Any]:
        """Return the average, of sharded parameters the shard of this rank."""
        return {"updates": self.updates, "tensors": [_local(tensor) for tensor in self.tensors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved average."""
        self.updates = state["updates"]
        for tensor, saved in zip(self.tensors, state["tensors"], strict=True):
            _local(tensor).copy_(saved)


def _local(tensor: Tensor) -> Tensor:
    """Return the shard of this rank of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _averaged(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


@torch.no_grad()
def _fill(model: nn.Module, values: list[Tensor]) -> None:
    for tensor, value in zip(_averaged(model), values, strict=True):
        tensor.copy_(value)
