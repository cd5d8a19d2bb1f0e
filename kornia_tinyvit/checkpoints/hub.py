"""Folders of the Hugging Face hub, as transformers' classes here and as timm write them: read, and written for timm."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kornia_tinyvit.checkpoints.layouts import to_timm
from kornia_tinyvit.checkpoints.tensors import write_tensors
from kornia_tinyvit.config import VARIANTS, TinyViTConfig, check_class_names, resolve_window_sizes
from kornia_tinyvit.files import write_text
from kornia_tinyvit.preprocessing import Preprocessing

__all__ = [
    "CONFIG_FILE",
    "PIL_RESAMPLING",
    "TRANSFORMERS_NAMES",
    "WEIGHTS_FILE",
    "HubMetadata",
    "read_hub_folder",
    "timm_config",
    "write_timm_folder",
]

#: File of a hub folder that says what the network is.
CONFIG_FILE = "config.json"
#: File of a hub folder of transformers that says how images are prepared.
_PROCESSOR_FILE = "preprocessor_config.json"
#: Pillow's numbers of the interpolations, by which transformers names them.
PIL_RESAMPLING = {"nearest": 0, "bilinear": 2, "bicubic": 3}
#: File of a hub folder with the network's weights.
WEIGHTS_FILE = "model.safetensors"

_ELSEWHERE = ("num_classes", "use_checkpoint", "mobile_sam")  # told by labels, by a switch of models, and by the class
#: What the fields of a network's configuration are called in transformers.
TRANSFORMERS_NAMES = {each.name: each.name for each in dataclasses.fields(TinyViTConfig) if each.name not in _ELSEWHERE}
TRANSFORMERS_NAMES |= {"img_size": "image_size", "in_chans": "num_channels"}
# The size of the image is part of timm's preprocessing.
_NO_TENSORS = ("img_size", "drop_rate", "drop_path_rate", "activation")
#: The arguments of timm's TinyVit that decide its tensors.
_TIMM_ARGUMENTS = tuple(name for name in TRANSFORMERS_NAMES if name not in _NO_TENSORS)
_TIMM_NAMES = (("5m", 224), ("11m", 224), ("21m", 224), ("21m", 384), ("21m", 512))


@dataclass(frozen=True)
class HubMetadata:
    """What a folder or a file states about its network beside the tensors.

    Args:
        config: the whole configuration; ``None`` where some of it is left to the shapes of the tensors.
        img_size: side in pixels of the images it was trained on last, where stated.
        class_names: the names of the classes, where stated.
        preprocessing: the stated fields of :class:`~kornia_tinyvit.preprocessing.Preprocessing`.
    """

    config: TinyViTConfig | None = None
    img_size: int | None = None
    class_names: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def read_hub_folder(folder: Path) -> HubMetadata:
    """Read the ``config.json`` of a folder, and the ``preprocessor_config.json`` beside it that transformers writes.

    Args:
        folder: the folder.

    Raises:
        ValueError: if there is no ``config.json``, or it is that of another network, or the preprocessing is not one
            that :class:`~kornia_tinyvit.preprocessing.Preprocessing` can describe.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}, so it is no folder of the Hugging Face hub.")
    values = _read(path)
    if values.get("model_type") == "tinyvit":
        processor = folder / _PROCESSOR_FILE
        return _transformers_metadata(values, _read(processor) if processor.is_file() else {})
    if "architecture" in values:
        return _timm_metadata(values)
    kind = values.get("model_type", "nothing that it names")
    raise ValueError(f"{path} is the configuration of {kind}, not of a TinyViT of transformers or timm.")


def _read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__} instead of an object.")
    return values


def _transformers_metadata(values: Mapping[str, Any], processor: Mapping[str, Any]) -> HubMetadata:
    fields = {ours: values[theirs] for ours, theirs in TRANSFORMERS_NAMES.items() if theirs in values}
    labels = values.get("id2label")
    classifier = "TinyVitForImageClassification" in (values.get("architectures") or ())
    # transformers leaves the labels out when they are its own two.
    names = tuple(labels[key] for key in sorted(labels, key=int)) if labels else ("LABEL_0", "LABEL_1")
    config = TinyViTConfig.from_dict(fields | {"num_classes": len(names) if classifier else 0})
    invented = names == tuple(f"LABEL_{index}" for index in range(len(names)))
    known = None if invented or not classifier else names
    return HubMetadata(config, config.img_size, known, _processor_settings(processor))


def _processor_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that an image processor of transformers states: this package's, ViT's or ConvNeXt's."""
    fields = {name: values[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in values}
    if values.get("do_normalize") is False:
        fields = {name: [default] * len(fields.get(name, "rgb")) for name, default in (("mean", 0.0), ("std", 1.0))}
    if values.get("resample") is not None:
        names = {number: name for name, number in PIL_RESAMPLING.items()}
        fields["interpolation"] = names.get(values["resample"], f"Pillow's {values['resample']}")
    size, crop = values.get("size"), values.get("crop_size")
    if isinstance(size, Mapping) and "shortest_edge" in size:
        side = _side(crop) if crop and values.get("do_center_crop", True) else None
        if side is None:
            raise ValueError(f"Images are resized to squares; got the size {dict(size)} without a crop.")
        return fields | {"img_size": side, "crop_fraction": side / size["shortest_edge"]}
    if size is not None:
        fields["img_size"] = _side(size)
    if "crop_pct" in values:
        fields["crop_fraction"] = values["crop_pct"] if values.get("do_center_crop", True) else None
    return fields


def _side(size: Any) -> int:
    sides = {size} if isinstance(size, int) else {size["height"], size["width"]}
    if len(sides) > 1:
        raise ValueError(f"Images are resized to squares; got the size {dict(size)}.")
    return int(sides.pop())


def _timm_metadata(values: Mapping[str, Any]) -> HubMetadata:
    if not str(values["architecture"]).startswith("tiny_vit_"):
        raise ValueError(f"timm's {values['architecture']} is no TinyViT.")
    told = values.get("pretrained_cfg") or {}
    names = values.get("label_names") or told.get("label_names")
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    fields = {name: told[name] for name in ("mean", "std", "interpolation") if name in told}
    if told.get("crop_mode", "center") != "center":
        fields["crop_fraction"] = None
    elif "crop_pct" in told:
        fields["crop_fraction"] = told["crop_pct"]
    size = int(told["input_size"][1]) if told.get("input_size") else None
    fields |= {} if size is None else {"img_size": size}
    return HubMetadata(None, size, None if not names else tuple(map(str, names)), fields)


def write_timm_folder(model: nn.Module, folder: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Write ``model.safetensors`` and ``config.json`` as timm does, for ``timm.create_model("local-dir:FOLDER")``.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`, whose preprocessing is written, too.
        folder: the folder, which is made.
        class_names: the names of the classes in the order of the logits; the network's own if left out.

    Returns:
        The folder.

    Raises:
        TypeError: if ``model`` is no TinyViT.
        ValueError: if timm's TinyVit cannot be such a network, or there are not as many names as classes.
    """
    network: Any = model
    if not isinstance(getattr(model, "config", None), TinyViTConfig):
        raise TypeError(f"write_timm_folder takes a TinyViT; got {type(model).__name__}.")
    class_names = network.class_names if class_names is None else class_names
    names = check_class_names(class_names, network.config.num_classes)
    folder = Path(folder)
    text = json.dumps(timm_config(network.config, network.preprocessing, names), indent=2)
    tensors = {to_timm(name): tensor for name, tensor in model.state_dict().items()}
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_text(folder / CONFIG_FILE, text + "\n")
    return folder


def timm_config(
    config: TinyViTConfig, preprocessing: Preprocessing, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the ``config.json`` by which timm builds a network (``timm.models._hub.save_config_for_hf``).

    A network that timm has no name for is its 5m with other arguments.

    Args:
        config: the network.
        preprocessing: what its images go through.
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
            "input_size": [config.in_chans, preprocessing.img_size, preprocessing.img_size],
            "fixed_input_size": False,
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "crop_pct": preprocessing.crop_fraction or 1.0,
            "crop_mode": "squash" if preprocessing.crop_fraction is None else "center",
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
