"""What the ``config.json`` of a Hugging Face hub folder tells, as transformers' classes here and as timm write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kornia_tinyvit.config import VARIANTS, TinyViTConfig, resolve_window_sizes

__all__ = [
    "CONFIG_FILE",
    "TRANSFORMERS_NAMES",
    "WEIGHTS_FILE",
    "HubFacts",
    "read_hub_config",
    "read_timm_preprocessing",
    "timm_config",
]

#: File of a hub folder that says what the network is.
CONFIG_FILE = "config.json"
#: File of a hub folder with the network's weights.
WEIGHTS_FILE = "model.safetensors"

#: What the fields of a network's configuration are called in transformers.
TRANSFORMERS_NAMES = {
    "img_size": "image_size",
    "in_chans": "num_channels",
    "embed_dims": "embed_dims",
    "depths": "depths",
    "num_heads": "num_heads",
    "window_sizes": "window_sizes",
    "mlp_ratio": "mlp_ratio",
    "drop_rate": "drop_rate",
    "drop_path_rate": "drop_path_rate",
    "mbconv_expand_ratio": "mbconv_expand_ratio",
    "local_conv_size": "local_conv_size",
    "activation": "activation",
}
#: The arguments of timm's TinyVit that decide its tensors. The size of the picture is part of its preprocessing.
_TIMM_ARGUMENTS = (
    "in_chans",
    "embed_dims",
    "depths",
    "num_heads",
    "window_sizes",
    "mlp_ratio",
    "mbconv_expand_ratio",
    "local_conv_size",
)
_TIMM_NAMES = (("5m", 224), ("11m", 224), ("21m", 224), ("21m", 384), ("21m", 512))


@dataclass(frozen=True)
class HubFacts:
    """What a folder tells of its network beside the tensors.

    Args:
        config: the whole configuration; ``None`` where the folder leaves some of it to the shapes of the tensors.
        img_size: side in pixels of the pictures it was trained on last, where the folder tells.
        class_names: the names of the classes, where the folder tells.
    """

    config: TinyViTConfig | None = None
    img_size: int | None = None
    class_names: tuple[str, ...] | None = None


def read_hub_config(folder: Path) -> HubFacts:
    """Read the ``config.json`` of a folder.

    Args:
        folder: the folder.

    Raises:
        ValueError: if there is none, or it is that of another network.
    """
    values = _read(folder)
    if values.get("model_type") == "tinyvit":
        return _transformers_facts(values)
    if "architecture" in values:
        return _timm_facts(values)
    kind = values.get("model_type", "nothing that it names")
    raise ValueError(
        f"{folder / CONFIG_FILE} is the configuration of {kind}, not of a TinyViT of transformers or timm."
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}, so it is no folder of the Hugging Face hub.")
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__} instead of an object.")
    return values


def _transformers_facts(values: Mapping[str, Any]) -> HubFacts:
    fields = {ours: values[theirs] for ours, theirs in TRANSFORMERS_NAMES.items() if theirs in values}
    labels = values.get("id2label")
    classifier = "TinyVitForImageClassification" in (values.get("architectures") or ())
    # transformers leaves the labels out when they are its own two.
    names = tuple(labels[key] for key in sorted(labels, key=int)) if labels else ("LABEL_0", "LABEL_1")
    config = TinyViTConfig.from_dict(fields | {"num_classes": len(names) if classifier else 0})
    invented = names == tuple(f"LABEL_{index}" for index in range(len(names)))
    return HubFacts(config, config.img_size, None if invented or not classifier else names)


def _timm_facts(values: Mapping[str, Any]) -> HubFacts:
    if not str(values["architecture"]).startswith("tiny_vit_"):
        raise ValueError(f"timm's {values['architecture']} is no TinyViT.")
    told = values.get("pretrained_cfg") or {}
    names = values.get("label_names") or told.get("label_names")
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    size = told.get("input_size")
    return HubFacts(None, None if size is None else int(size[1]), None if not names else tuple(map(str, names)))


def read_timm_preprocessing(folder: Path) -> dict[str, Any] | None:
    """Return the ``pretrained_cfg`` of timm's folder, which holds its ``mean``, ``std``, ``crop_pct`` and so on.

    Args:
        folder: the folder; ``None`` is returned for those of transformers.
    """
    values = _read(folder)
    return dict(values.get("pretrained_cfg") or {}) if "architecture" in values else None


def timm_config(
    config: TinyViTConfig, preprocessing: Mapping[str, Any], class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the ``config.json`` by which timm builds a network (``timm.models._hub.save_config_for_hf``).

    A network that timm has no name for is its 5m with other arguments.

    Args:
        config: the network.
        preprocessing: timm's ``mean``, ``std``, ``crop_pct`` and ``crop_mode``.
        class_names: the names of the classes.

    Raises:
        ValueError: if timm's TinyVit cannot be such a network.
    """
    if config.mobile_sam or config.to_dict()["activation"] != "GELU":
        raise ValueError("timm's TinyVit has the activation GELU and classes: no other activation, no MobileSAM.")
    name, named = _timm_architecture(config)
    arguments = {key: getattr(config, key) for key in _TIMM_ARGUMENTS if getattr(config, key) != getattr(named, key)}
    result: dict[str, Any] = {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": config.embed_dims[-1],
        "global_pool": "avg",
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.in_chans, config.img_size, config.img_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            **preprocessing,
            "num_classes": config.num_classes,
            "pool_size": [-(-config.img_size // 32)] * 2,
            "first_conv": "patch_embed.conv1.conv",
            "classifier": "head.fc",
        },
    }
    if arguments:
        result["model_args"] = arguments
    if class_names is not None:
        result["label_names"] = list(class_names)
    return result


def _timm_architecture(config: TinyViTConfig) -> tuple[str, TinyViTConfig]:
    """Return timm's name of a network, or of its 5m where it has none, and what that name means."""
    known = {}
    for variant, size in _TIMM_NAMES:
        windows = resolve_window_sizes(VARIANTS[variant], size, "scale")
        known[f"tiny_vit_{variant}_{size}"] = VARIANTS[variant].replace(img_size=size, window_sizes=windows)
    same = (
        name
        for name, named in known.items()
        if all(getattr(named, key) == getattr(config, key) for key in (*_TIMM_ARGUMENTS, "img_size"))
    )
    name = next(same, "tiny_vit_5m_224")
    return name, known[name]
