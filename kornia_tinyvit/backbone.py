"""What networks with a TinyViT inside have in common: :class:`BackboneNetwork` and its files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from kornia.enhance import normalize
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import Checkpoint, CheckpointError, open_pretrained, read_checkpoint
from kornia_tinyvit.checkpoints.adaptation import check_state_dict
from kornia_tinyvit.checkpoints.loading import PREPROCESSING_KEY, read_preprocessing
from kornia_tinyvit.checkpoints.tensors import read_metadata, read_tensors, write_tensors
from kornia_tinyvit.config import TinyViTConfig, name_classes
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import check_counts

__all__ = ["BackboneConfig", "BackboneNetwork", "parameter_groups"]


@dataclass(frozen=True)
class BackboneConfig:
    """What the configurations of networks on a backbone have in common.

    Args:
        backbone: the network whose stages are read.
        num_classes: number of classes.

    Raises:
        ValueError: if a number is out of its range.
    """

    #: Values from which on not even the shapes of the parts are built from a file's configuration.
    limits: ClassVar[dict[str, int]] = {"num_classes": 2**20}

    backbone: TinyViTConfig
    num_classes: int

    def __post_init__(self) -> None:
        check_counts(**{name: getattr(self, name) for name in self.limits})

    def build_parts(self) -> dict[str, nn.Module]:
        """Build the parts behind the backbone, by name, with random weights."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Return the fields that a subclass adds."""
        return {name: value for name, value in vars(self).items() if name not in ("backbone", "num_classes")}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold.

        Raises:
            ValueError: if the backbone's activation cannot be named in a file.
        """
        return {**vars(self), "backbone": self.backbone.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a configuration from :meth:`to_dict`'s values.

        Raises:
            ValueError: if a field is unknown, missing or out of its range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise ValueError(f"{cls.__name__} has the fields {', '.join(sorted(names))}; got {', '.join(values)}.")
        return cls(**{**values, "backbone": TinyViTConfig.from_dict(values["backbone"])})


class BackboneNetwork(nn.Module):
    """Base of networks of a TinyViT and parts behind it, which take images in [0, 1] and normalize them.

    A subclass sets the class attributes. The norm, head and neck of the backbone, which its stages do without, are
    frozen.

    Args:
        backbone: the network; :meth:`from_config` builds it, too.
        num_classes: number of classes.
        class_names: names of the classes in the order of the logits; numbers if left out.
        **options: further fields of ``config_class``.

    Attributes:
        config: the configuration of everything but the names.
        mean: channel means, :math:`(C,)`.
        std: channel standard deviations, :math:`(C,)`.

    Raises:
        ValueError: if a number is out of its range, or there are not as many names as classes.
    """

    #: The class of the configuration.
    config_class: ClassVar[type[BackboneConfig]]
    #: What a file of this class is called in errors.
    kind: ClassVar[str]
    #: Side in pixels of the images of a variant; ``None`` for the variant's own.
    usual_size: ClassVar[int | None] = None
    #: How the names of the weights begin that belong to the classes, within their part.
    class_weights: ClassVar[tuple[str, ...]]

    backbone: TinyViT
    mean: Tensor
    std: Tensor
    _shape: Any

    def __init__(
        self, backbone: TinyViT, *, num_classes: int, class_names: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self._shape = self.config_class(backbone.config, num_classes, **options)
        self.class_names = name_classes(class_names, num_classes)
        self.backbone = backbone
        for name, part in self._shape.build_parts().items():
            self.add_module(name, part)
        for unused in (backbone.norm_head, backbone.head, backbone.neck):
            if unused is not None:
                unused.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(backbone.preprocessing.mean), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.preprocessing.std), persistent=False)

    @classmethod
    def from_config(
        cls,
        config: str | TinyViTConfig | BackboneConfig | None = None,
        *,
        pretrained: bool | str | Path | Checkpoint = False,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> Self:
        """Build the network from a variant, a configuration, a backbone's weights or a file that :meth:`save` wrote.

        Args:
            config: variant or configuration of the backbone, or that of the whole network; may be left out where
                ``pretrained`` is a file that carries one.
            pretrained: a file that :meth:`save` wrote, or what :meth:`TinyViT.from_config` takes, whose head is left
                out: the parts behind the backbone then begin with random weights.
            num_classes: number of classes; may be left out for a whole network or where names are given. A file of a
                network with other classes gives all weights but those that belong to the classes.
            class_names: names of the classes; those of a file of a whole network come along.
            **options: fields of the configuration, unless it is given or read as a whole, and arguments of
                :meth:`TinyViT.from_config`, such as ``img_size`` and ``window_sizes``.

        Returns:
            The network, in evaluation mode if all its weights were loaded, otherwise in training mode.

        Raises:
            ValueError: if it cannot be built, or the number of classes is unknown.
            CheckpointError: if the weights cannot be read or belong to another architecture.
        """
        own = {field.name for field in dataclasses.fields(cls.config_class)}
        fields = {name: value for name, value in options.items() if name in own}
        overrides = {name: value for name, value in options.items() if name not in own}
        if num_classes is None and class_names is not None:
            num_classes = len(class_names)
        if isinstance(pretrained, (str, Path)) and cls._file_key() in read_metadata(pretrained):
            return cls._from_file(Path(pretrained), config, num_classes, class_names, overrides)
        if isinstance(config, BackboneConfig):
            num_classes, fields, config = num_classes or config.num_classes, config.options(), config.backbone
        elif isinstance(config, str) and cls.usual_size is not None:
            overrides.setdefault("img_size", cls.usual_size)
        if num_classes is None:
            beside = "" if isinstance(pretrained, (bool, Checkpoint)) else f" {pretrained} is no {cls.kind}'s file."
            raise ValueError(f"Say how many classes there are: num_classes or class_names.{beside}")
        backbone = TinyViT.from_config(config, pretrained=pretrained, num_classes=0, **overrides)
        return cls(backbone, num_classes=num_classes, class_names=class_names, **fields).train()

    @classmethod
    def _from_file(
        cls,
        path: Path,
        asked: str | TinyViTConfig | BackboneConfig | None,
        num_classes: int | None,
        class_names: Sequence[str] | None,
        overrides: dict[str, Any],
    ) -> Self:
        tensors, metadata = read_tensors(path)
        try:
            values = json.loads(metadata[cls._file_key()])
            names = tuple(str(name) for name in values.pop("class_names"))
            stored = cls.config_class.from_dict(values)
            told = dict(json.loads(metadata.get(PREPROCESSING_KEY, "{}")))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} carries a configuration that cannot be used: {error}") from error
        preprocessing = read_preprocessing(told, stored.backbone, str(path))
        weights = _split(tensors)
        parts = _check_parts(path, weights, stored)  # before anything of that size is built
        found = read_checkpoint(weights.get("backbone", {}))
        found = replace(found, preprocessing=preprocessing)
        if isinstance(asked, str):
            open_pretrained(found, asked)  # rejects the weights of another variant
        base = asked.backbone if isinstance(asked, BackboneConfig) else asked
        base = stored.backbone if base is None or isinstance(base, str) else base
        backbone = TinyViT.from_config(base, pretrained=found, num_classes=0, **overrides)
        same = num_classes in (None, stored.num_classes)
        network = cls(
            backbone,
            num_classes=num_classes or stored.num_classes,
            class_names=names if class_names is None and same else class_names,
            **stored.options(),
        )
        for name, part in parts.items():
            module = network.get_submodule(name)
            if not same:
                part |= {key: x for key, x in module.state_dict().items() if key.startswith(cls.class_weights)}
            module.load_state_dict(part)
        return network.train(not same)

    @classmethod
    def _file_key(cls) -> str:
        return f"kornia_tinyvit.{cls.kind}"

    @property
    def config(self) -> Any:
        """What :meth:`from_config` builds the same architecture from."""
        return dataclasses.replace(self._shape, backbone=self.backbone.config)

    def normalize(self, images: Tensor) -> Tensor:
        """Subtract the means from images :math:`(B, C, H, W)` in [0, 1] and divide by the standard deviations."""
        return normalize(images, self.mean.to(images), self.std.to(images))

    def parameter_groups(self, lr: float, weight_decay: float = 0.01, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Group the parameters for a torch optimizer: :meth:`TinyViT.parameter_groups`, and the other parts' at ``lr``.

        Args:
            lr: learning rate of the parts behind the backbone and of the backbone's last block.
            weight_decay: weight decay of the matrices; one-dimensional parameters are not decayed.
            layer_decay: factor in (0, 1] from one block of the backbone to the one before.

        Raises:
            ValueError: if ``layer_decay`` is outside of (0, 1].
        """
        parts = [part for part in self.children() if part is not self.backbone]
        return parameter_groups(self.backbone, parts, lr, weight_decay, layer_decay)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with configuration, preprocessing and class names inside, whole or not at all.

        :meth:`from_config` reads it back, with ``pretrained=path``.

        Args:
            path: the file to write; its folder is made.

        Returns:
            The path.

        Raises:
            ValueError: if the backbone's activation cannot be named in a file.
        """
        values = self.config.to_dict() | {"class_names": self.class_names}
        told = {self._file_key(): values, PREPROCESSING_KEY: self.backbone.preprocessing.to_dict()}
        metadata = {key: json.dumps(value) for key, value in told.items()}
        return write_tensors(path, self.state_dict(), {"format": "pt"} | metadata)


def _split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the first part of their names, which the names lose."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _check_parts(
    path: Path, weights: Mapping[str, dict[str, Tensor]], config: BackboneConfig
) -> dict[str, dict[str, Tensor]]:
    """Return the weights of the parts behind a backbone, whose names and shapes are those of their configuration.

    Raises:
        CheckpointError: naming what differs, or what is not finite.
    """
    wanted: dict[str, dict[str, Tensor]] = {}
    if all(getattr(config, name) < limit for name, limit in config.limits.items()):
        with torch.device("meta"):
            wanted = {name: part.state_dict() for name, part in config.build_parts().items()}
    if not wanted:
        raise CheckpointError(f"{path} carries a configuration of another network. Nothing was loaded.")
    for name, wants in wanted.items():
        check_state_dict(weights.get(name, {}), wants, f"The {name} in {path}")
    return {name: weights[name] for name in wanted}


def parameter_groups(
    backbone: TinyViT, parts: Sequence[nn.Module], lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Group the parameters of a backbone and of the parts behind it for a torch optimizer.

    Args:
        backbone: the network, grouped by :meth:`TinyViT.parameter_groups`.
        parts: the parts, which learn at ``lr``; their one-dimensional parameters are not decayed.
        lr: learning rate of the parts and of the backbone's last block.
        weight_decay: weight decay of the matrices.
        layer_decay: factor in (0, 1] from one block of the backbone to the one before.

    Raises:
        ValueError: if ``layer_decay`` is outside of (0, 1].
    """
    groups = backbone.parameter_groups(lr, weight_decay, layer_decay)
    parameters = [each for part in parts for each in part.parameters() if each.requires_grad]
    for decay, flat in ((weight_decay, False), (0.0, True)):
        params = [parameter for parameter in parameters if (parameter.ndim <= 1) == flat]
        if params:
            groups.append({"params": params, "lr": lr, "weight_decay": decay})
    return groups
