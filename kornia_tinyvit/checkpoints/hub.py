"""Folders of the Hugging Face hub: read those of timm and transformers, and write those of timm."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from PIL import Image
from torch import nn

from kornia_tinyvit.checkpoints.catalog import CATALOG
from kornia_tinyvit.checkpoints.layouts import to_timm
from kornia_tinyvit.checkpoints.tensors import CheckpointError, write_tensors
from kornia_tinyvit.config import TinyViTConfig, check_class_names
from kornia_tinyvit.files import write_text
from kornia_tinyvit.modules import plain_state_dict, unwrapped
from kornia_tinyvit.preprocessing import CROP_FRACTION, SQUARE_FROM, Preprocessing

__all__ = [
    "CONFIG_FILE",
    "TRANSFORMERS_NAMES",
    "WEIGHTS_FILE",
    "HubMetadata",
    "check_network",
    "named_classes",
    "read_hub_folder",
    "timm_config",
    "timm_preprocessing",
    "write_timm_folder",
]

#: File of a hub folder with the configuration of the network.
CONFIG_FILE = "config.json"
#: File of a hub folder of transformers with the preprocessing.
_PROCESSOR_FILE = "preprocessor_config.json"
#: Name of the image processor of this package.
_PROCESSOR = "TinyVitImageProcessor"
#: File of a hub folder with the weights.
WEIGHTS_FILE = "model.safetensors"

# Given in transformers by the labels, by gradient_checkpointing_enable() and by the class of the model.
_ELSEWHERE = ("num_classes", "use_checkpoint", "mobile_sam")
#: Names in transformers of the fields of :class:`~kornia_tinyvit.TinyViTConfig`.
TRANSFORMERS_NAMES = {each.name: each.name for each in dataclasses.fields(TinyViTConfig) if each.name not in _ELSEWHERE}
TRANSFORMERS_NAMES |= {"img_size": "image_size", "in_chans": "num_channels"}
# Fields without effect on the tensors; the image size is part of timm's preprocessing.
_NO_TENSORS = ("img_size", "drop_rate", "drop_path_rate", "activation")
#: Arguments of timm's TinyVit that determine its tensors.
_TIMM_ARGUMENTS = tuple(name for name in TRANSFORMERS_NAMES if name not in _NO_TENSORS)


@dataclass(frozen=True)
class HubMetadata:
    """Metadata of a folder or file beside its tensors.

    Args:
        config: configuration of the network; ``None`` if it has to be derived from the shapes of the tensors.
        class_names: class names, if stored.
        preprocessing: stored fields of :class:`~kornia_tinyvit.preprocessing.Preprocessing`.
    """

    config: TinyViTConfig | None = None
    class_names: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def read_hub_folder(folder: Path) -> HubMetadata:
    """Read the ``config.json`` of timm or transformers, and the ``preprocessor_config.json`` of transformers.

    Args:
        folder: the folder.

    Raises:
        CheckpointError: if ``config.json`` is missing, damaged or of another network, or the preprocessing cannot be
            expressed as a :class:`~kornia_tinyvit.preprocessing.Preprocessing`.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}; expected a folder of the Hugging Face hub.")
    try:
        values = _read(path)
        if values.get("model_type") == "tinyvit":
            processor = folder / _PROCESSOR_FILE
            return _transformers_metadata(values, _read(processor) if processor.is_file() else {})
        if "architecture" in values:
            return _timm_metadata(values)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    kind = values.get("model_type", "an unnamed model")
    raise CheckpointError(f"{path} is the configuration of {kind}; expected a TinyViT of transformers or timm.")


def _read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object in {path.name}; got {type(values).__name__}.")
    return values


def _transformers_metadata(values: Mapping[str, Any], processor: Mapping[str, Any]) -> HubMetadata:
    fields = {ours: values[theirs] for ours, theirs in TRANSFORMERS_NAMES.items() if theirs in values}
    preprocessing = _processor_settings(processor) if processor else (values.get("preprocessing") or {})
    labels = values.get("id2label")
    classifier = "TinyVitForImageClassification" in (values.get("architectures") or ())
    # transformers omits its two default labels.
    names = tuple(labels[key] for key in sorted(labels, key=int)) if labels else ("LABEL_0", "LABEL_1")
    config = TinyViTConfig.from_dict(fields | {"num_classes": len(names) if classifier else 0})
    return HubMetadata(config, named_classes(names) if classifier else None, preprocessing)


def named_classes(names: Iterable[Any]) -> tuple[str, ...] | None:
    """Return class names, or ``None`` without any or for the numbered labels that transformers writes.

    Args:
        names: labels in the order of the logits.
    """
    found = tuple(map(str, names))
    return None if found == tuple(f"LABEL_{index}" for index in range(len(found))) else found


def _processor_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the settings of this package's, ViT's or ConvNeXt's image processor in transformers."""
    ours = values.get("image_processor_type", _PROCESSOR) == _PROCESSOR
    fields = {name: values[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in values}
    if values.get("do_normalize") is False:
        fields = {name: [default] * len(fields.get(name, "rgb")) for name, default in (("mean", 0.0), ("std", 1.0))}
    if not ours:  # mean and standard deviation are those of rescaled pixels
        scale = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255
        fields = {name: [value / scale for value in numbers] for name, numbers in fields.items()}
    if values.get("resample") is not None:
        fields["interpolation"] = Image.Resampling(values["resample"]).name.lower()
    size, crop, fraction = values.get("size"), values.get("crop_size"), values.get("crop_pct")
    crops = values.get("do_center_crop", True)
    if isinstance(size, Mapping) and "shortest_edge" in size:
        side = size["shortest_edge"]
        if crop and crops:
            return fields | {"img_size": _side(crop), "crop_fraction": _side(crop) / side}
        if fraction is None:
            raise ValueError(f"expected square images; got size {dict(size)} without a crop.")
        # ConvNeXt's processor crops only smaller sizes.
        return fields | {"img_size": side, "crop_fraction": fraction if side < SQUARE_FROM else None}
    if size is not None:
        fields["img_size"] = _side(size)
    if crop and crops and _side(crop) != _side(size):
        raise ValueError(f"expected a crop after a resize that keeps the aspect ratio; got size {size}, crop {crop}.")
    if fraction is not None or not ours:  # other processors resize the whole image to a square
        fields["crop_fraction"] = fraction if crops else None
    return fields


def _side(size: Any) -> int:
    sides = {size} if isinstance(size, int) else {size["height"], size["width"]}
    if len(sides) > 1:
        raise ValueError(f"expected square images; got size {dict(size)}.")
    return int(sides.pop())


def _timm_metadata(values: Mapping[str, Any]) -> HubMetadata:
    if "tiny_vit_" not in str(values["architecture"]):
        raise ValueError(f"expected a TinyViT of timm; got {values['architecture']}.")
    settings = values.get("pretrained_cfg") or values  # older files have its fields at the top
    names = values.get("label_names") or settings.get("label_names") or settings.get("labels")
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    # 0.875 is timm's DEFAULT_CROP_PCT, for every size.
    fields = {"crop_fraction": CROP_FRACTION} | timm_preprocessing(settings)
    return HubMetadata(None, named_classes(names or ()), fields)


def timm_preprocessing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the preprocessing in a ``pretrained_cfg`` or in the arguments of a training of timm.

    As in timm's ``resolve_data_config``, empty values are not stated, and ``test_input_size`` and ``test_crop_pct`` are
    not used.

    Args:
        settings: values by timm's names.

    Returns:
        The stated fields of :class:`~kornia_tinyvit.preprocessing.Preprocessing`.

    Raises:
        ValueError: if the images are not square, or the crop has no equivalent.
    """
    fields = {name: settings[name] for name in ("mean", "std", "interpolation") if settings.get(name)}
    if size := settings.get("input_size"):
        fields["img_size"] = _side({"height": size[1], "width": size[2]})
    elif settings.get("img_size"):
        fields["img_size"] = settings["img_size"]
    mode, fraction = settings.get("crop_mode") or "center", settings.get("crop_pct")
    if mode == "squash" and fraction in (None, 1):
        fields["crop_fraction"] = None
    elif mode != "center":
        raise ValueError(f"expected crop_mode center, or squash without a crop; got {mode} with crop_pct {fraction}.")
    elif fraction:
        fields["crop_fraction"] = fraction
    return fields


def check_network(model: nn.Module, class_names: Sequence[str] | None) -> tuple[TinyViTConfig, tuple[str, ...] | None]:
    """Return the configuration and the class names of a network to be saved.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`, or a network with the configuration of one.
        class_names: class names in the order of the logits; ``None`` for those of the network.

    Raises:
        TypeError: if ``model`` has no :class:`~kornia_tinyvit.TinyViTConfig`.
        ValueError: if the number of class names differs from the number of classes.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if not isinstance(config, TinyViTConfig):
        raise TypeError(f"Expected a TinyViT; got {type(model).__name__}.")
    names = getattr(model, "class_names", None) if class_names is None else class_names
    return config, check_class_names(names, config.num_classes)


def write_timm_folder(model: nn.Module, folder: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Write the ``model.safetensors`` and ``config.json`` of ``timm.create_model("local-dir:FOLDER")``.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`; its preprocessing is stored as well.
        folder: folder to write; created if missing.
        class_names: class names in the order of the logits; ``None`` for those of the network.

    Returns:
        The folder.

    Raises:
        TypeError: if ``model`` is not a TinyViT.
        ValueError: if timm's TinyVit does not support the network, or the number of class names differs from the
            number of classes.
    """
    folder, (config, names) = Path(folder), check_network(model, class_names)
    text = json.dumps(timm_config(config, cast("Preprocessing", unwrapped(model).preprocessing), names), indent=2)
    tensors = {to_timm(name): tensor for name, tensor in plain_state_dict(model).items()}
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_text(folder / CONFIG_FILE, text + "\n")
    return folder


def timm_config(
    config: TinyViTConfig, preprocessing: Preprocessing, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the ``config.json`` of a network for timm (``timm.models._hub.save_config_for_hf``).

    A network without a name in timm is stored as its 5m with other arguments.

    Args:
        config: configuration of the network.
        preprocessing: preprocessing of its images.
        class_names: class names in the order of the logits.

    Raises:
        ValueError: if timm's TinyVit does not support the network.
    """
    if config.mobile_sam or config.to_dict()["activation"] != "GELU":
        raise ValueError("timm's TinyVit supports the activation GELU only, and no MobileSAM.")
    published = {f"tiny_vit_{each.variant}_{each.img_size}": each.config for each in CATALOG if each.fallback}
    names = (
        name
        for name, named in published.items()
        if all(getattr(named, key) == getattr(config, key) for key in (*_TIMM_ARGUMENTS, "img_size"))
    )
    name = next(names, "tiny_vit_5m_224")
    base = published[name]
    arguments = {key: getattr(config, key) for key in _TIMM_ARGUMENTS if getattr(config, key) != getattr(base, key)}
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
