"""Moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]


class MovingAverage:
    """Exponential moving average of parameters and floating point buffers.

    The average is kept tensor by tensor beside the network. Of parameters that are cut over several processes (by
    FSDP) each process averages its own part.

    Args:
        model: the network.
        decay: share of the old average that each update keeps; less in the first steps, ``(1 + n) / (10 + n)``, so
            that the random first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = [tensor.detach().clone() for tensor in _averaged(model)]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        # One call takes no mixture of cut parameters and whole buffers, and an average needs nobody else's part.
        mine, theirs = ([_local(tensor.detach()) for tensor in each] for each in (self.tensors, _averaged(model)))
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the network its average, and its own weights back afterwards."""
        current = [tensor.detach().clone() for tensor in _averaged(model)]
        _fill(model, self.tensors)
        try:
            yield
        finally:
            _fill(model, current)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes: the part of this process."""
        return {"updates": self.updates, "tensors": [_local(tensor) for tensor in self.tensors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved average."""
        self.updates = state["updates"]
        for tensor, saved in zip(self.tensors, state["tensors"], strict=True):
            _local(tensor).copy_(saved)


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is cut over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _averaged(model: nn.Module) -> list[Tensor]:
    buffers = (buffer for buffer in model.buffers() if buffer.is_floating_point())
    return [*model.parameters(), *buffers]


@torch.no_grad()
def _fill(model: nn.Module, values: list[Tensor]) -> None:
    for tensor, value in zip(_averaged(model), values, strict=True):
        tensor.copy_(value)
