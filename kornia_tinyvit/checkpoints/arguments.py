"""Preprocessing in checkpoints of trainings: timm's arguments, the official configuration, pickled networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kornia_tinyvit.checkpoints.hub import timm_preprocessing
from kornia_tinyvit.checkpoints.pickles import Placeholder
from kornia_tinyvit.preprocessing import CROP_FRACTION, IMAGENET_MEAN, IMAGENET_STD

__all__ = ["training_preprocessing"]

_OWN = "kornia_tinyvit.preprocessing.Preprocessing"
# MEAN_AND_STD_TYPE of the official code.
_STATISTICS = {
    "default": (IMAGENET_MEAN, IMAGENET_STD),
    "inception": ((0.5,) * 3, (0.5,) * 3),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def training_preprocessing(content: Any) -> dict[str, Any]:
    """Return the preprocessing that the checkpoint of a training states.

    It is read from ``args`` of timm's ``train.py``, ``config`` of the official ``main.py`` and the attribute
    ``preprocessing`` of a pickled :class:`~kornia_tinyvit.TinyViT`.

    Args:
        content: content of the file.

    Returns:
        The stated fields of :class:`~kornia_tinyvit.preprocessing.Preprocessing`.

    Raises:
        ValueError: if it cannot be expressed by them.
    """
    entries = _entries(content)
    own, arguments, config = (entries.get(name) for name in ("preprocessing", "args", "config"))
    if isinstance(own, Placeholder) and own.kind == _OWN:
        return dict(_entries(own))
    arguments, data = _entries(arguments), _entries(_entries(config).get("DATA"))
    if {"crop_pct", "interpolation"} <= arguments.keys():
        return timm_preprocessing(arguments)
    if {"IMG_SIZE", "INTERPOLATION", "MEAN_AND_STD_TYPE"} <= data.keys():
        return _official_preprocessing(data, _entries(_entries(config).get("TEST")))
    return {}


def _entries(value: Any) -> Mapping[Any, Any]:
    """Return the entries of a dictionary, or the attributes of an object."""
    if isinstance(value, Placeholder):
        return {**value.items, **(value.state if isinstance(value.state, dict) else {})}
    return value if isinstance(value, Mapping) else getattr(value, "__dict__", {})


def _official_preprocessing(data: Mapping[Any, Any], test: Mapping[Any, Any]) -> dict[str, Any]:
    """Convert the configuration as ``build_transform`` of the official code does."""
    if data["MEAN_AND_STD_TYPE"] not in _STATISTICS:
        raise ValueError(f"expected MEAN_AND_STD_TYPE {', '.join(_STATISTICS)}; got {data['MEAN_AND_STD_TYPE']}.")
    mean, std = _STATISTICS[data["MEAN_AND_STD_TYPE"]]
    smooth = data["INTERPOLATION"] in ("bicubic", "lanczos", "hamming")
    return {
        "img_size": data["IMG_SIZE"],
        "crop_fraction": CROP_FRACTION if test.get("CROP", True) else None,
        "interpolation": data["INTERPOLATION"] if smooth else "bilinear",
        "mean": mean,
        "std": std,
    }
