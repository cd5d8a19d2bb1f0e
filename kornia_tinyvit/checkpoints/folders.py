"""Write hub folders for timm."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kornia_tinyvit.checkpoints.hub import CONFIG_FILE, WEIGHTS_FILE, timm_config
from kornia_tinyvit.checkpoints.layouts import to_timm
from kornia_tinyvit.checkpoints.loading import write_tensors
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.files import write_text

__all__ = ["write_timm_folder"]


def write_timm_folder(
    folder: str | Path, model: nn.Module, preprocessing: Mapping[str, Any], class_names: Sequence[str] | None = None
) -> Path:
    """Write ``model.safetensors`` and ``config.json`` as timm does, for ``timm.create_model("local-dir:FOLDER")``.

    Args:
        folder: the folder, which is made.
        model: a :class:`~kornia_tinyvit.TinyViT`.
        preprocessing: timm's ``mean``, ``std``, ``crop_pct`` and ``crop_mode``.
        class_names: the names of the classes in the order of the logits.

    Returns:
        The folder.

    Raises:
        TypeError: if ``model`` is no TinyViT.
        ValueError: if timm's TinyVit cannot be such a network, or there are not as many names as classes.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, TinyViTConfig):
        raise TypeError(f"write_timm_folder takes a TinyViT; got {type(model).__name__}.")
    if class_names is not None and len(class_names) != config.num_classes:
        raise ValueError(f"Got {len(class_names)} class names for {config.num_classes} classes.")
    folder = Path(folder)
    text = json.dumps(timm_config(config, preprocessing, class_names), indent=2)
    tensors = {to_timm(name): tensor for name, tensor in model.state_dict().items()}
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_text(folder / CONFIG_FILE, text + "\n")
    return folder
