"""The base class of networks with a TinyViT backbone, and their checkpoints."""

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
from kornia_tinyvit.checkpoints.adaptation import check_state_dict, match_classes
from kornia_tinyvit.checkpoints.loading import (
    PREPROCESSING_KEY,
    locate_pretrained,
    read_preprocessing,
    reject_other_files,
)
from kornia_tinyvit.checkpoints.tensors import locate_file, read_metadata, read_tensors, write_tensors
from kornia_tinyvit.config import TinyViTConfig, name_classes
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import plain_name, plain_state_dict, unwrapped
from kornia_tinyvit.preprocessing import check_counts

__all__ = ["BackboneConfig", "BackboneNetwork", "parameter_groups"]


@dataclass(frozen=True)
class BackboneConfig:
    """Base of the configurations of networks with a TinyViT backbone.

    Args:
        backbone: configuration of the backbone.
        num_classes: number of classes.

    Raises:
        ValueError: if a number is out of range.
    """

    #: A checkpoint whose configuration reaches one of these values is rejected before anything is built from it.
    limits: ClassVar[dict[str, int]] = {"num_classes": 2**20}

    backbone: TinyViTConfig
    num_classes: int

    def __post_init__(self) -> None:
        check_counts(**{name: getattr(self, name) for name in self.limits})

    def build_parts(self) -> dict[str, nn.Module]:
        """Return the modules behind the backbone by name, with random weights."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Return the fields that the subclass adds."""
        return {name: value for name, value in vars(self).items() if name not in ("backbone", "num_classes")}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; see :meth:`TinyViTConfig.to_dict` for its error."""
        return {**vars(self), "backbone": self.backbone.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from the values of :meth:`to_dict`.

        Args:
            values: values by field name.

        Raises:
            ValueError: if a field is unknown, missing or out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise ValueError(f"{cls.__name__} has the fields {', '.join(sorted(names))}; got {', '.join(values)}.")
        return cls(**{**values, "backbone": TinyViTConfig.from_dict(values["backbone"])})


class BackboneNetwork(nn.Module):
    """Base of networks with a TinyViT backbone, for images in [0, 1], which they normalize.

    Subclasses set the class attributes. The norm, head and neck of the backbone are not used and are frozen.

    Args:
        backbone: the backbone.
        num_classes: number of classes.
        class_names: names of the classes in the order of the logits; ``"class 0"`` and so on by default.
        **options: further fields of the configuration.

    Attributes:
        class_names: names of the classes in the order of the logits.
        mean: channel means :math:`(C,)`.
        std: channel standard deviations :math:`(C,)`.

    Raises:
        ValueError: if a number is out of range, or the number of names is not ``num_classes``.
    """

    #: The class of :attr:`config`.
    config_class: ClassVar[type[BackboneConfig]]
    #: The name of the network in the metadata of its checkpoints, and in errors.
    kind: ClassVar[str]
    #: The names of the outputs of :meth:`forward` in exported files.
    output_names: ClassVar[tuple[str, ...]] = ("logits",)
    #: The default ``img_size`` of a variant; ``None`` for the variant's.
    usual_size: ClassVar[int | None] = None
    #: Whether MobileSAM's encoder stays as it is, with strides 4, 8, 16 and 16, instead of getting stride 32.
    keeps_stride_16: ClassVar[bool] = False
    #: Prefixes, within their module, of the names of the weights whose shape depends on the number of classes.
    class_weights: ClassVar[tuple[str, ...]]

    backbone: TinyViT
    mean: Tensor
    std: Tensor
    _config: Any

    def __init__(
        self, backbone: TinyViT, *, num_classes: int, class_names: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self._config = self.config_class(backbone.config, num_classes, **options)
        self.class_names = name_classes(class_names, num_classes)
        self.backbone = backbone
        for name, part in self._config.build_parts().items():
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
        """Build the network from a variant or a configuration, with weights of the backbone or of the whole network.

        Args:
            config: variant or configuration of the backbone, or the configuration of the whole network; optional if
                ``pretrained`` is a checkpoint that stores one.
            pretrained: a checkpoint of :meth:`save`, or weights of the backbone as for :meth:`TinyViT.from_config`,
                such as a MobileSAM's; the modules behind the backbone then get random weights.
            num_classes: number of classes; optional with ``class_names``, a whole configuration or a checkpoint of
                :meth:`save`. If it is not the checkpoint's, the weights that depend on it are not loaded.
            class_names: names of the classes; by default those of the checkpoint. If any is common, the weights of
                classes are matched by name; without one, the same number of names renames the classes.
            **options: arguments of :meth:`TinyViT.from_config`, such as ``img_size`` and ``window_sizes``, and fields
                of the configuration, which are ignored if it is passed or loaded as a whole.

        Returns:
            The network, in evaluation mode if all its weights were loaded, otherwise in training mode.

        Raises:
            ValueError: if an argument is out of range, or the number of classes is unknown.
            CheckpointError: if the checkpoint cannot be read or has another architecture.
        """
        own = {field.name for field in dataclasses.fields(cls.config_class)}
        fields = {name: options.pop(name) for name in own & options.keys()}
        if num_classes is None and class_names is not None:
            num_classes = len(class_names)
        if isinstance(pretrained, (str, Path)) and isinstance(located := locate_pretrained(pretrained, config), str):
            path = locate_file(located)
            if not path.exists():
                raise CheckpointError(f"There is no checkpoint file {path}.")
            if cls._file_key() in (metadata := read_metadata(path)):
                return cls._load(path, config, num_classes, class_names, options)
            reject_other_files(located, metadata)
        if isinstance(config, BackboneConfig):
            num_classes, fields, config = num_classes or config.num_classes, config.options(), config.backbone
        elif isinstance(config, str) and cls.usual_size is not None:
            options.setdefault("img_size", cls.usual_size)
        if num_classes is None:
            note = "" if isinstance(pretrained, (bool, Checkpoint)) else f" {pretrained} stores no {cls.kind}."
            raise ValueError(f"The number of classes is unknown; pass num_classes or class_names.{note}")
        if pretrained and cls.keeps_stride_16 and not isinstance(config, TinyViTConfig):
            pretrained = open_pretrained(pretrained, config, options.get("img_size"))
            if pretrained.config.mobile_sam:
                options = {"mobile_sam": True, "img_size": pretrained.config.as_backbone().img_size} | options
        backbone = TinyViT.from_config(config, pretrained=pretrained, num_classes=0, **options)
        return cls(backbone, num_classes=num_classes, class_names=class_names, **fields).train()

    @classmethod
    def is_stored_in(cls, source: str | Path, variant: str | None = None) -> bool:
        """Return whether a file is a checkpoint of :meth:`save` of this class.

        Args:
            source: a path, a URL or a name of the catalog.
            variant: variant of a name of the catalog.

        Raises:
            CheckpointError: if there are neither weights nor a file of this name.
        """
        located = locate_pretrained(source, variant)
        return isinstance(located, str) and cls._file_key() in read_metadata(locate_file(located))

    @classmethod
    def _load(
        cls,
        path: Path,
        config: str | TinyViTConfig | BackboneConfig | None,
        num_classes: int | None,
        class_names: Sequence[str] | None,
        options: dict[str, Any],
    ) -> Self:
        """Build the network from a checkpoint of :meth:`save`."""
        tensors, metadata = read_tensors(path)
        tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
        try:
            values = json.loads(metadata[cls._file_key()])
            names = tuple(str(name) for name in values.pop("class_names"))
            stored = cls.config_class.from_dict(values)
            fields = dict(json.loads(metadata.get(PREPROCESSING_KEY, "{}")))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} stores an invalid configuration: {error}") from error
        preprocessing = read_preprocessing(fields, stored.backbone, str(path))
        parts = _select_parts(path, tensors, stored)  # before anything of that size is built
        checkpoint = replace(
            read_checkpoint(_select(tensors, "backbone")), preprocessing=preprocessing, source=str(path)
        )
        if isinstance(config, str):
            open_pretrained(checkpoint, config)  # rejects another variant
            config = None
        base = config.backbone if isinstance(config, BackboneConfig) else config or stored.backbone
        backbone = TinyViT.from_config(base, pretrained=checkpoint, num_classes=0, **options)
        rows = match_classes(names, class_names)
        same = rows is None and num_classes in (None, stored.num_classes)
        network = cls(
            backbone,
            num_classes=num_classes or stored.num_classes,
            class_names=names if class_names is None and same else class_names,
            **stored.options(),
        )
        for name, weights in parts.items():
            part = network.get_submodule(name)
            for key, new in part.state_dict().items() if not same else ():
                if key.startswith(cls.class_weights):
                    weights[key] = new if rows is None else _select_rows(weights[key], new, rows)
            part.load_state_dict(weights)
        complete = same if rows is None else bool((rows >= 0).all())
        return network.train(not complete)

    @classmethod
    def _file_key(cls) -> str:
        return f"kornia_tinyvit.{cls.kind}"

    @property
    def config(self) -> Any:
        """The configuration with which :meth:`from_config` builds the same architecture."""
        return dataclasses.replace(self._config, backbone=unwrapped(self.backbone).config)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images with :attr:`mean` and :attr:`std`.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1].

        Returns:
            Images of the same shape.
        """
        return normalize(images, self.mean.to(images), self.std.to(images))

    def parameter_groups(self, lr: float, weight_decay: float = 0.01, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Return the groups of :func:`parameter_groups` for the backbone and the modules behind it.

        Args:
            lr: learning rate of those modules and of the backbone's last block.
            weight_decay: weight decay; one-dimensional parameters get none.
            layer_decay: factor in (0, 1] from each block of the backbone to the one before it.

        Raises:
            ValueError: if ``layer_decay`` is outside of (0, 1].
        """
        parts = [part for part in self.children() if part is not self.backbone]
        return parameter_groups(self.backbone, parts, lr, weight_decay, layer_decay)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors checkpoint with configuration, preprocessing and class names, atomically.

        :meth:`from_config` loads it with ``pretrained=path``.

        Args:
            path: the file to write; its folder is created.

        Returns:
            The path.

        Raises:
            ValueError: if the backbone's activation is not a class of :mod:`torch.nn`.
        """
        values = self.config.to_dict() | {"class_names": self.class_names}
        stored = {self._file_key(): values, PREPROCESSING_KEY: unwrapped(self.backbone).preprocessing.to_dict()}
        metadata = {key: json.dumps(value) for key, value in stored.items()}
        return write_tensors(path, plain_state_dict(self), {"format": "pt"} | metadata)


def _select_rows(old: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """Return new weights whose classes are rows of the old ones, except those of index -1."""
    others = torch.arange(len(rows) - len(new), 0) + len(old)  # such as the padding of an embedding, at the end
    index = torch.cat([rows, others])
    kept = index >= 0
    selected = new.clone()
    selected[kept] = old[index[kept]].to(new)
    return selected


def _select(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the tensors of a submodule under their names within it."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _select_parts(path: Path, tensors: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, dict[str, Tensor]]:
    """Return the weights of the modules behind a backbone, checked against the configuration.

    Raises:
        CheckpointError: if they have other names or shapes, or values that are not finite.
    """
    if any(getattr(config, name) >= limit for name, limit in config.limits.items()):
        raise CheckpointError(f"{path} stores the configuration of another network. Nothing was loaded.")
    with torch.device("meta"):
        expected = config.build_parts()
    parts = {name: _select(tensors, name) for name in expected}
    for name, part in expected.items():
        check_state_dict(parts[name], part.state_dict(), f"The {name} in {path}")
    return parts


def parameter_groups(
    backbone: TinyViT, parts: Sequence[nn.Module], lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Group the parameters of a backbone and of the modules behind it for an optimizer.

    Args:
        backbone: the backbone, grouped by :meth:`TinyViT.parameter_groups`.
        parts: the modules, with learning rate ``lr``; their one-dimensional parameters get no weight decay.
        lr: learning rate of the modules and of the backbone's last block.
        weight_decay: weight decay of the other parameters.
        layer_decay: factor in (0, 1] from each block of the backbone to the one before it.

    Returns:
        Dictionaries with ``params``, ``lr`` and ``weight_decay``.

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
