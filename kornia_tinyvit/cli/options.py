"""Options of several commands, and the networks and devices that they describe."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch import nn

from kornia_tinyvit.classification import ImageClassifier

#: Groups of options in ``--help``, in their order.
PANELS = (
    "Weights", "Data", "Prompts", "Budget", "Search", "Training", "Teacher", "Semantic segmentation",
    "Promptable segmentation", "Detection", "Metrics", "Graph", "Web demo", "Hardware", "Output",
)  # fmt: skip
weights_option = partial(typer.Option, rich_help_panel="Weights")
data_option = partial(typer.Option, rich_help_panel="Data")
training_option = partial(typer.Option, rich_help_panel="Training")
promptable_option = partial(typer.Option, rich_help_panel="Promptable segmentation")
hardware_option = partial(typer.Option, rich_help_panel="Hardware")
output_option = partial(typer.Option, rich_help_panel="Output")

Photos = Annotated[list[Path], typer.Argument(help="Image files.")]
Variant = Annotated[str | None, weights_option(help="1m, 5m, 11m or 21m. Default: the variant of --weights.")]
Weights = Annotated[
    str | None,
    weights_option(
        help="Name in 'kornia-tinyvit pretrained', path, hub folder or URL. Default: the best of --variant; without "
        "it, the CIFAR-10 network of the package."
    ),
]
ImgSize = Annotated[int | None, weights_option(help="Side of the input in pixels. Default: that of the weights.")]
Augmented = Annotated[bool, weights_option("--tta", help="Average over a flip and a crop, at 3 times the cost.")]
Device = Annotated[str, hardware_option(help="auto (a GPU if available), cpu, cuda, cuda:1, mps, ...")]
Precision = Annotated[str, hardware_option(help="no, bf16 or fp16.")]
Workers = Annotated[int, hardware_option(min=0, help="Processes that read images.")]
MinArea = Annotated[int, promptable_option(min=1, help="Leave out objects of fewer pixels.")]
Json = Annotated[bool, output_option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, output_option("--quiet", help="Print results and errors only, no progress and no notes.")]

Network = TypeVar("Network", bound=nn.Module)

#: What a network is trained for.
TaskName = StrEnum("TaskName", ("classification", "semantic", "promptable", "detection"))


def build_network(
    kind: type[Network], variant: str | None, weights: Any, device: str, img_size: Any = None, **settings: Any
) -> Network:
    """Build a network in evaluation mode.

    Args:
        kind: class of the network; its ``from_config`` takes the other arguments.
        variant: ``--variant``.
        weights: ``--weights``.
        device: ``--device``.
        img_size: input size, ``None`` for that of the weights.
        **settings: for ``from_config``.
    """
    if img_size is not None:
        settings["img_size"] = img_size
    network: Network = kind.from_config(variant, pretrained=weights, **settings)  # type: ignore[attr-defined]
    return network.to(find_device(device)).eval()


def build_classifier(
    variant: str | None, weights: str | None, device: str, img_size: int | None = None, tta: bool = False
) -> ImageClassifier:
    """Build a classifier; without variant and weights, the network of the package."""
    if variant is None and weights is None:
        variant, weights = "1m", "cifar10"
    views = ImageClassifier.DEFAULT_VIEWS if tta else ()
    return build_network(ImageClassifier, variant, weights or True, device, img_size, views=views)


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
