"""Options of several commands, and the networks and devices that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import torch
from torch import nn

from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli.requests import Request, option

Network = TypeVar("Network", bound=nn.Module)
#: What a network is trained for.
TaskName = StrEnum("TaskName", ("classification", "semantic", "promptable", "detection"))
DEVICE = "auto (a GPU if available), cpu, cuda, cuda:1, mps, ..."
TTA = "Average over a flip and a crop, at 3 times the cost."
WORKERS = "Processes that read images."
NMS = "IoU above which the box of lower score of two of a class is removed. Default: none is removed."
MIN_AREA = "Leave out objects of fewer pixels."


@dataclass(frozen=True, kw_only=True)
class WeightsRequest(Request):
    """An architecture and its weights."""

    variant: str | None = option("Weights", "1m, 5m, 11m or 21m. Default: the variant of --weights.", None)
    weights: str | None = option(
        "Weights",
        "Name in 'kornia-tinyvit pretrained', path, hub folder or URL. Default: the best of --variant; without it, the "
        "CIFAR-10 network of the package.",
        None,
    )

    @property
    def pretrained(self) -> str | bool:
        """The weights of a classifier, with their default."""
        return self.weights or (True if self.variant else "cifar10")


@dataclass(frozen=True, kw_only=True)
class NetworkRequest(WeightsRequest):
    """A network on a device."""

    img_size: int | None = option("Weights", "Side of the input in pixels. Default: that of the weights.", None)
    device: str = option("Hardware", DEVICE, "auto")

    def build_network(self, kind: type[Network], pretrained: Any, **settings: Any) -> Network:
        """Build a network in evaluation mode.

        Args:
            kind: class of the network; its ``from_config`` takes the other arguments.
            pretrained: weights.
            **settings: for ``from_config``; ``img_size`` replaces that of the request.
        """
        if self.img_size is not None:
            settings.setdefault("img_size", self.img_size)
        network: Network = kind.from_config(self.variant, pretrained=pretrained, **settings)  # type: ignore[attr-defined]
        return network.to(find_device(self.device)).eval()

    def build_classifier(self, tta: bool = False) -> ImageClassifier:
        """Build a classifier."""
        views = ImageClassifier.DEFAULT_VIEWS if tta else ()
        return self.build_network(ImageClassifier, self.pretrained, views=views)


def find_device(name: str) -> torch.device:
    """Return an available device; ``"auto"`` is the accelerator, or the CPU without one.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not available ({reason}); use --device auto.") from error
    return device
