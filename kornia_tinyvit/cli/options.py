"""Options that commands share."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch import nn

from kornia_tinyvit.classification import ImageClassifier

Variant = Annotated[
    str | None,
    typer.Option(help="1m, 5m, 11m or 21m; may be left out when --pretrained is a file with its configuration."),
]
Pretrained = Annotated[
    str | None,
    typer.Option(
        help="Weights: a name that 'pretrained' lists, a file, a hub folder or a URL. Default: the variant's best."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, ...")]
ImgSize = Annotated[int | None, typer.Option(help="Side in pixels to run at. Default: what the weights were made for.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Augmented = Annotated[bool, typer.Option("--tta", help="Average over a flip and a closer look (3 times the work).")]

MinArea = Annotated[int, typer.Option(min=1, help="Promptable: leave out objects of fewer pixels of their image.")]


Network = TypeVar("Network", bound=nn.Module)

#: What a network can be trained for.
TaskName = StrEnum("TaskName", ("classification", "semantic", "promptable", "detection"))


def refuse_idle(context: typer.Context, names: Iterable[str], where: str) -> None:
    """Refuse options that were given where they would do nothing, lest someone takes them for done.

    Args:
        context: the command's.
        names: the parameters of the command that do nothing.
        where: what makes them idle, such as ``"with --task semantic"``.

    Raises:
        ValueError: naming the options that were given.
    """
    spelled = {str(parameter.name): parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [spelled[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        them = "it" if len(given) == 1 else "them"
        raise ValueError(f"{', '.join(given)} would do nothing {where}; leave {them} out.")


def build_network(
    kind: type[Network], variant: str | None, pretrained: Any, device: str, img_size: Any = None, **settings: Any
) -> Network:
    """Build what the options describe, in evaluation mode.

    Args:
        kind: class of the network.
        variant: as ``from_config`` of the class takes it, like the rest.
        pretrained: weights.
        device: name of a device.
        img_size: size to run at, ``None`` for that of the weights.
        **settings: for ``from_config``.
    """
    if img_size is not None:
        settings["img_size"] = img_size
    network: Network = kind.from_config(variant, pretrained=pretrained, **settings)  # type: ignore[attr-defined]
    return network.to(parse_device(device)).eval()


def build_classifier(
    variant: str | None, pretrained: str | None, device: str, img_size: int | None = None, tta: bool = False
) -> ImageClassifier:
    """Build what the options describe; with none, the network that comes with the package."""
    if variant is None and pretrained is None:
        variant, pretrained = "1m", "cifar10"
    views = ImageClassifier.DEFAULT_VIEWS if tta else ()
    return build_network(ImageClassifier, variant, pretrained or True, device, img_size, views=views)


def parse_device(name: str) -> torch.device:
    """Turn a name into a device that is there.

    Raises:
        ValueError: if there is no such kind of device, or it is not available.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The device {name!r} cannot be used here ({reason}); try --device cpu.") from error
    return device
