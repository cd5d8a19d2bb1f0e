"""Between this package's networks and transformers' models of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from kornia_tinyvit.checkpoints import Checkpoint, load_checkpoint
from kornia_tinyvit.checkpoints.catalog import default_class_names
from kornia_tinyvit.checkpoints.layouts import to_transformers
from kornia_tinyvit.config import TinyViTConfig, check_class_names
from kornia_tinyvit.huggingface.configuration import TinyVitConfig
from kornia_tinyvit.huggingface.modeling import TinyVitForImageClassification, TinyVitModel
from kornia_tinyvit.model import TinyViT

__all__ = ["from_checkpoint", "from_tinyvit", "to_tinyvit"]

Model = TypeVar("Model", bound=nn.Module)


def from_tinyvit(
    model: TinyViT, class_names: Sequence[str] | None = None
) -> TinyVitForImageClassification | TinyVitModel:
    """Return transformers' model of a network, with a copy of its weights, in its mode, precision and place.

    Args:
        model: the network; without classes it becomes a :class:`TinyVitModel`.
        class_names: the names of the classes in the order of the logits; the network's own if left out.

    Raises:
        ValueError: if there are not as many names as classes, or the network is MobileSAM's encoder.

    Example:
        >>> network = TinyViT.from_config("1m", pretrained="cifar10")
        >>> from_tinyvit(network).config.num_labels
        10
    """
    class_names = model.class_names if class_names is None else class_names
    labels = label_fields(check_class_names(class_names, model.config.num_classes))
    config = TinyVitConfig.from_network(model.config, **labels)
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
    """Return the network of a transformers' model, with a copy of its weights, in its mode, precision and place.

    Args:
        model: the model.

    Raises:
        ValueError: if the model does not pool, as that of a backbone.
    """
    base, classes = model, 0
    if isinstance(model, TinyVitForImageClassification):
        base, classes = model.tinyvit, model.config.num_labels or 0
    if not base.add_pooling_layer:
        raise ValueError("The model of a backbone lacks the norm of the pooled features; load a TinyVitModel instead.")
    network = TinyViT.from_config(model.config.to_network(classes))
    load_checkpoint(network, model.state_dict())
    return match_original(network, model)


def from_checkpoint(
    pretrained: bool | str | Path | Checkpoint,
    variant: str | TinyViTConfig | None = None,
    class_names: Sequence[str] | None = None,
) -> TinyVitForImageClassification | TinyVitModel:
    """Return transformers' model of any weights that :meth:`kornia_tinyvit.TinyViT.from_config` reads.

    Args:
        pretrained: ``True``, a name of the catalog, a file, a URL, or a hub folder of timm.
        variant: the variant, where that does not follow from the weights.
        class_names: the names of the classes, instead of those of the file or of ImageNet-1k.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: if there are no such weights, or they cannot be read.
        ValueError: if there are not as many names as classes.

    Example:
        >>> from_checkpoint("cifar10", "1m").config.id2label[3]
        'cat'
    """
    network = TinyViT.from_config(variant, pretrained=pretrained).eval()
    return from_tinyvit(network, class_names or network.class_names or default_class_names(network.config.num_classes))


def label_fields(names: Sequence[str] | None) -> dict[str, Any]:
    """Return how a configuration of transformers stores the names of classes, if there are any."""
    if names is None:
        return {}
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def match_original(copied: Model, original: nn.Module) -> Model:
    """Put a copied model into the mode, precision and place of the original, and return it."""
    first = next(original.parameters())
    nn.Module.to(copied, first.device, first.dtype)
    return copied.train(original.training)


def rename(name: str, places: Sequence[tuple[str, str]]) -> str:
    """Return what transformers calls a tensor whose name begins with one of some patterns, by their replacements."""
    for pattern, replacement in places:
        theirs, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return theirs
    return name
