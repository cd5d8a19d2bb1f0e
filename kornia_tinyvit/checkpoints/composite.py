"""Files of networks that are more than a TinyViT: a backbone and parts behind it, with configuration and classes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from kornia_tinyvit.checkpoints.loading import (
    Checkpoint,
    CheckpointError,
    open_pretrained,
    read_checkpoint,
    read_tensors,
    write_tensors,
)
from kornia_tinyvit.config import TinyViTConfig

__all__ = ["CompositeConfig", "CompositeFile", "name_classes", "part_groups", "read_composite", "write_composite"]

_BACKBONE = "backbone."

Config = TypeVar("Config", bound="CompositeConfig")


@dataclass(frozen=True)
class CompositeConfig:
    """What the configurations of networks on a backbone have in common.

    Args:
        backbone: the network whose stages are read.
        num_classes: classes to tell apart.

    Raises:
        ValueError: if a number is out of its range.
    """

    backbone: TinyViTConfig
    num_classes: int

    def __post_init__(self) -> None:
        self._check_positive("num_classes")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold.

        Raises:
            ValueError: if the backbone's activation cannot be named in a file.
        """
        return {**vars(self), "backbone": self.backbone.to_dict()}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Rebuild a configuration from :meth:`to_dict`'s values.

        Raises:
            ValueError: if a field is unknown, missing or out of its range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise ValueError(f"{cls.__name__} has the fields {', '.join(sorted(names))}; got {', '.join(values)}.")
        return cls(**{**values, "backbone": TinyViTConfig.from_dict(values["backbone"])})


@dataclass(frozen=True)
class CompositeFile:
    """What :func:`write_composite` wrote.

    Args:
        path: the file.
        config: the configuration of the whole.
        class_names: names of the classes.
        tensors: the weights by name.
    """

    path: Path
    config: Any
    class_names: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the weights whose names begin with a prefix, without it."""
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}

    def backbone(self, asked: str | TinyViTConfig | CompositeConfig | None) -> tuple[TinyViTConfig, Checkpoint]:
        """Return the backbone's configuration, that of the file unless another is asked for, and its weights.

        What the file tells of it is held against its tensors before anything of that size is built.

        Raises:
            CheckpointError: if they are of another architecture than is asked for.
        """
        found = read_checkpoint(self.part(_BACKBONE))
        if isinstance(asked, CompositeConfig):
            asked = asked.backbone
        if isinstance(asked, str):
            open_pretrained(found, asked)  # refuses another variant's weights
            asked = None
        return asked or self.config.backbone, found

    def check(self, part: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        """Refuse a part that is not the one its configuration tells, before one of that size is built.

        Args:
            part: weights by name.
            wanted: tensors of the shapes that the configuration tells, such as those of a network on the meta device;
                empty if it cannot be built at all.

        Raises:
            CheckpointError: naming what differs, or what is not finite.
        """
        differences = [name for name in wanted if name not in part or part[name].shape != wanted[name].shape]
        differences += sorted(part.keys() - wanted.keys())
        if differences or not wanted:
            raise CheckpointError(
                f"{self.path} carries a configuration of another network; {', '.join(differences[:4])} are others. "
                "Nothing was loaded."
            )
        broken = [name for name, x in part.items() if x.is_floating_point() and not x.isfinite().all()]
        if broken:
            raise CheckpointError(
                f"{self.path} holds NaN or infinite values in {', '.join(broken[:4])}. Nothing was loaded."
            )


def read_composite(path: Path, key: str, config: type[CompositeConfig]) -> CompositeFile:
    """Read a file of :func:`write_composite`.

    Args:
        path: the file.
        key: what its configuration is stored under.
        config: class of the configuration.

    Raises:
        CheckpointError: if it is damaged, or its configuration cannot be used.
    """
    tensors, metadata = read_tensors(path)
    try:
        told = json.loads(metadata[key])
        names = tuple(str(name) for name in told.pop("class_names"))
        return CompositeFile(path, config.from_dict(told), names, tensors)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} carries a configuration that cannot be used: {error}") from error


def write_composite(path: str | Path, key: str, model: nn.Module, class_names: Sequence[str]) -> Path:
    """Write the weights of a network with its ``config`` and class names inside, whole or not at all.

    Args:
        path: the file to write; its folder is made.
        key: what the configuration is stored under.
        model: the network.
        class_names: names of its classes.

    Returns:
        The path.

    Raises:
        ValueError: if the backbone's activation cannot be named in a file.
    """
    config: Any = model.config
    told = config.to_dict() | {"class_names": tuple(class_names)}
    return write_tensors(path, model.state_dict(), {"format": "pt", key: json.dumps(told)})


def name_classes(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return the names of classes, numbers if there are none.

    Raises:
        ValueError: if there are not as many names as classes.
    """
    if class_names is None:
        return tuple(f"class {index}" for index in range(num_classes))
    if len(class_names) != num_classes:
        raise ValueError(f"Got {len(class_names)} class names for {num_classes} classes.")
    return tuple(class_names)


def part_groups(parts: Sequence[nn.Module], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters of parts behind a backbone for a torch optimizer; one-dimensional ones are not decayed.

    Args:
        parts: the parts.
        lr: learning rate of all.
        weight_decay: weight decay of the matrices.
    """
    parameters = [each for part in parts for each in part.parameters() if each.requires_grad]
    groups = []
    for decay, flat in ((weight_decay, False), (0.0, True)):
        params = [parameter for parameter in parameters if (parameter.ndim <= 1) == flat]
        groups.append({"params": params, "lr": lr, "weight_decay": decay})
    return [group for group in groups if group["params"]]
