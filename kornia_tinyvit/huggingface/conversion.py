"""Convert networks to transformers models and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from kornia_tinyvit.checkpoints import Checkpoint, load_checkpoint
from kornia_tinyvit.checkpoints.catalog import default_class_names
from kornia_tinyvit.checkpoints.hub import named_classes
from kornia_tinyvit.checkpoints.layouts import to_transformers
from kornia_tinyvit.config import TinyViTConfig, check_class_names
from kornia_tinyvit.huggingface.configuration import TinyVitConfig
from kornia_tinyvit.huggingface.modeling import TinyVitForImageClassification, TinyVitModel
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import without_wrappers

__all__ = ["from_checkpoint", "from_tinyvit", "to_tinyvit"]

Model = TypeVar("Model", bound=nn.Module)


def from_tinyvit(
    model: TinyViT, class_names: Sequence[str] | None = None
) -> TinyVitForImageClassification | TinyVitModel:
    """Convert a network to a transformers model with the same weights, preprocessing, mode, data type and device.

    Args:
        model: the network; without classes it becomes a :class:`TinyVitModel`.
        class_names: class names in the order of the logits; ``None`` for those of the network.

    Returns:
        The model with a copy of the weights.

    Raises:
        ValueError: if the number of class names differs from the number of classes, or the network is MobileSAM's
            encoder.

    Example:
        >>> network = TinyViT.from_config("1m", pretrained="cifar10")
        >>> from_tinyvit(network).config.num_labels
        10
    """
    model = without_wrappers(model)
    class_names = model.class_names if class_names is None else class_names
    labels = label_fields(check_class_names(class_names, model.config.num_classes))
    config = TinyVitConfig.from_network(model.config, preprocessing=model.preprocessing.to_dict(), **labels)
    weights = {to_transformers(name): tensor for name, tensor in model.state_dict().items()}
    found: TinyVitForImageClassification | TinyVitModel
    if model.config.num_classes:
        found = TinyVitForImageClassification(config)
    else:
        found = TinyVitModel(config)
        weights = {name.removeprefix("tinyvit."): tensor for name, tensor in weights.items()}
    found.load_state_dict(weights)
    return match_original(found, model)


def to_tinyvit(model: TinyVitForImageClassification | TinyVitModel) -> TinyViT:
    """Convert a transformers model to a network, with the preprocessing and class names of its configuration.

    The weights, the mode, the data type and the device are the same.

    Args:
        model: the model.

    Returns:
        The network with a copy of the weights.

    Raises:
        ValueError: if the model has no pooling layer, as in a backbone.
    """
    base, classes = model, 0
    if isinstance(model, TinyVitForImageClassification):
        base, classes = model.tinyvit, model.config.num_labels or 0
    if not base.add_pooling_layer:
        raise ValueError("Expected a model with a pooling layer; got that of a backbone. Load a TinyVitModel instead.")
    network = TinyViT.from_config(model.config.to_network(classes))
    load_checkpoint(network, model.state_dict())
    network.preprocessing = model.config.to_preprocessing()
    network.class_names = named_classes(model.config.id2label[index] for index in range(classes))
    return match_original(network, model)


def from_checkpoint(
    pretrained: bool | str | Path | Checkpoint,
    variant: str | TinyViTConfig | None = None,
    class_names: Sequence[str] | None = None,
) -> TinyVitForImageClassification | TinyVitModel:
    """Load weights as in :meth:`kornia_tinyvit.TinyViT.from_config` into a transformers model.

    Args:
        pretrained: ``True``, a name of the catalog, a file, a URL or a hub folder of timm.
        variant: variant or configuration of the network, if the weights do not determine it.
        class_names: class names in the order of the logits; ``None`` for those of the file or of ImageNet-1k.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: if the weights do not exist or cannot be read.
        ValueError: if the number of class names differs from the number of classes.

    Example:
        >>> from_checkpoint("cifar10", "1m").config.id2label[3]
        'cat'
    """
    network = TinyViT.from_config(variant, pretrained=pretrained).eval()
    return from_tinyvit(network, class_names or network.class_names or default_class_names(network.config.num_classes))


def label_fields(names: Sequence[str] | None) -> dict[str, Any]:
    """Return the fields of a transformers configuration for class names; empty for ``None``.

    Args:
        names: class names in the order of the logits.
    """
    if names is None:
        return {}
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def match_original(copied: Model, original: nn.Module) -> Model:
    """Set a converted model to the mode, data type and device of the original, and return it.

    Args:
        copied: the converted model.
        original: the original.
    """
    first = next(original.parameters())
    nn.Module.to(copied, first.device, first.dtype)
    return copied.train(original.training)


def rename(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    """Replace the prefix of a tensor name by the first pattern that matches.

    Args:
        name: name of the tensor.
        prefixes: regular expressions of prefixes, with their replacements.
    """
    for pattern, replacement in prefixes:
        theirs, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return theirs
    return name
