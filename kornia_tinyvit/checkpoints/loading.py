"""Read checkpoints safely, translate and adapt them, and report what was done."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from kornia_tinyvit.checkpoints.adaptation import (
    HEAD,
    STEM,
    WindowAdaptation,
    adapt_head,
    adapt_input,
    adapt_windows,
    check_state_dict,
)
from kornia_tinyvit.checkpoints.catalog import PretrainedWeights, default_weights, find_weights, list_pretrained
from kornia_tinyvit.checkpoints.hub import WEIGHTS_FILE, HubMetadata, read_hub_folder
from kornia_tinyvit.checkpoints.layouts import strip_prefixes, translate, unwrap
from kornia_tinyvit.checkpoints.tensors import (
    CheckpointError,
    fetch_weights,
    list_some,
    locate_file,
    read_tensors,
    write_tensors,
)
from kornia_tinyvit.config import VARIANTS, TinyViTConfig, check_class_names
from kornia_tinyvit.preprocessing import Preprocessing, default_preprocessing

__all__ = [
    "Checkpoint",
    "LoadReport",
    "load_checkpoint",
    "open_pretrained",
    "read_checkpoint",
    "save_checkpoint",
]

_CONFIG_KEY = "kornia_tinyvit.config"
_CLASSES_KEY = "kornia_tinyvit.class_names"
#: Where the metadata of a safetensors file hold the preprocessing.
PREPROCESSING_KEY = "kornia_tinyvit.preprocessing"
_KEYS = (_CONFIG_KEY, _CLASSES_KEY, PREPROCESSING_KEY)

#: The fields that decide which tensors there are. The others can change without another file.
_ARCHITECTURE = (
    "embed_dims",
    "depths",
    "num_heads",
    "mlp_ratio",
    "mbconv_expand_ratio",
    "local_conv_size",
    "mobile_sam",
)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, under official names.

    Args:
        state_dict: the tensors.
        config: the network they belong to, stored in the file or told from the tensors' shapes.
        source: where they came from.
        layout: the naming they came in: ``"official"``, ``"timm"``, ``"mobile_sam"`` or ``"transformers"``.
        class_names: the names of the classes, where the file tells them.
        preprocessing: what images go through before the network: as stored in the file, else the default of
            ``config``, which ``None`` stands for.
        left_out: names in the file that are no weights of the network.
        others: the tensors of the other parts of a whole MobileSAM, its prompt encoder and mask decoder.
    """

    state_dict: dict[str, Tensor]
    config: TinyViTConfig
    source: str
    layout: str = "official"
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    left_out: tuple[str, ...] = ()
    others: dict[str, Tensor] = field(default_factory=dict)

    def preprocessing_for(self, config: TinyViTConfig) -> Preprocessing:
        """Return the preprocessing of a network with these weights: that of the file, at its size and channels."""
        found = self.preprocessing or default_preprocessing(self.config)
        if config.img_size != self.config.img_size:
            found = found.resize(config.img_size)
        return found.with_channels(config.in_chans)


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did.

    Args:
        source: where the weights came from.
        layout: the naming they came in.
        adapted: a sentence for every change that was made to fit the network.
        left_out: names in the file that the network has no use for.
        complete: whether every weight came from the file, so that nothing has to be trained first.
    """

    source: str
    layout: str
    adapted: tuple[str, ...] = field(default=())
    left_out: tuple[str, ...] = field(default=())
    complete: bool = True

    def __str__(self) -> str:
        lines = [f"Loaded {self.source} ({self.layout} layout)."]
        lines += [f"Adapted: {change}." for change in self.adapted]
        if self.left_out:
            lines.append(f"Left out: {list_some(self.left_out)}.")
        return "\n".join(lines)


def read_checkpoint(source: str | Path | Mapping[str, Any], base: TinyViTConfig | None = None) -> Checkpoint:
    """Read a ``.safetensors`` or PyTorch file or a hub folder, or take a state dict, in any known layout.

    Only tensors are read: a file that would have to run code is refused.

    Args:
        source: path, URL (``http``, ``https`` or ``file``) or state dict. A folder holds ``model.safetensors`` and
            ``config.json``, as timm and the transformers' classes of this package write them.
        base: what to assume where neither the file nor its shapes tell: stochastic depth, activation and so on.

    Raises:
        CheckpointError: if it cannot be fetched or read, or holds no TinyViT.
    """
    metadata: dict[str, str] = {}
    hub = HubMetadata()
    if isinstance(source, Mapping):
        content, name = source, "a state dict"
    else:
        name = str(source)
        path = locate_file(name)
        if path.is_dir():
            path, hub = path / WEIGHTS_FILE, _read_hub_folder(path)
        content, metadata = read_tensors(path)
    content = unwrap(content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{name} holds no state dict but {type(content).__name__}; expected tensors by name.")
    content = {str(key): value for key, value in content.items()}
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    no_tensors = sorted(content.keys() - tensors.keys())
    tensors = strip_prefixes(tensors)
    state_dict, layout, left_out = translate(tensors)
    if "layers.0.blocks.0.conv1.c.weight" not in state_dict:
        raise CheckpointError(
            f"{name} holds no TinyViT in the official, kornia, timm, transformers or MobileSAM layout; its first "
            f"tensors are {list_some(list(content))}."
        )
    own = _read_metadata(metadata, name)
    stored, classes = hub.config or own.config, hub.class_names or own.class_names
    config = _config_from_shapes(state_dict, stored or base, name)
    config = config if hub.img_size is None else config.replace(img_size=hub.img_size)
    if stored is not None:
        _check_stored_config(stored, config, name)
        config = stored
    others = {key: tensors[key] for key in left_out if key in tensors} if layout == "mobile_sam" else {}
    preprocessing = read_preprocessing({**own.preprocessing, **hub.preprocessing}, config, name)
    return Checkpoint(state_dict, config, name, layout, classes, preprocessing, (*left_out, *no_tensors), others)


def open_pretrained(
    pretrained: bool | str | Path | Checkpoint,
    config: str | TinyViTConfig | None = None,
    img_size: int | None = None,
) -> Checkpoint:
    """Find and read what ``from_config(config, pretrained)`` means.

    Args:
        pretrained: ``True``, a name of the catalog, a path, a URL, or a checkpoint that was read before.
        config: the variant or configuration that was asked for, if one was.
        img_size: side in pixels of the images to come, which may choose between weights.

    Returns:
        The checkpoint. Its configuration is the asked one where that was a whole configuration, else the published one
        for a name of the catalog, and else what the file tells.

    Raises:
        CheckpointError: if there are no such weights, or they are of another architecture.
    """
    if isinstance(pretrained, Checkpoint):
        return _follow(config, pretrained)
    asked = _configuration(config)
    variant = config if isinstance(config, str) else None
    if pretrained is True:
        if variant is None:
            raise CheckpointError("pretrained=True needs a variant such as '5m'; name weights or a file instead.")
        weights: PretrainedWeights | None = default_weights(variant, img_size)
    else:
        weights = find_weights(variant, str(pretrained))
    if weights is not None:
        found = read_checkpoint(weights.asset_path or fetch_weights(weights))
        class_names = found.class_names or weights.class_names
        preprocessing = weights.preprocessing
        found = replace(found, config=weights.config, class_names=class_names, preprocessing=preprocessing)
    elif _looks_like_file(str(pretrained)):
        found = read_checkpoint(str(pretrained), asked)
    else:
        names = ", ".join(f"{entry.name} ({entry.variant})" for entry in list_pretrained(variant))
        raise CheckpointError(f"There are no weights and no file {str(pretrained)!r}; there are {names}.")
    return _follow(config, found)


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Any] | Checkpoint,
    window_adaptation: WindowAdaptation = "interpolate",
) -> LoadReport:
    """Load weights into a network, adapting what has a sensible adaptation.

    Bias tables follow the network's windows; a head for other classes starts at zero; the first convolution follows the
    number of input channels. Everything is checked before the network is touched: it is loaded whole or not at all.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`.
        source: path, URL, state dict, or what :func:`~kornia_tinyvit.checkpoints.read_checkpoint` returned.
        window_adaptation: how a bias table follows another window: ``"interpolate"`` (bicubic), when the windows scale
            with the image, or ``"cut"``, when they are clipped and a token's neighbors stay where they are.

    Returns:
        What was adapted and what was left out.

    Raises:
        CheckpointError: if the file cannot be read, is of another architecture, or holds weights that are not finite.

    Example:
        >>> from kornia_tinyvit import TinyViT
        >>> model = TinyViT.from_config("1m", num_classes=10)
        >>> three = TinyViT.from_config("1m", num_classes=3)
        >>> print(load_checkpoint(three, model.state_dict()))
        Loaded a state dict (official layout).
        Adapted: the head has 3 classes instead of 10 and starts at zero.
    """
    if window_adaptation not in ("interpolate", "cut"):
        raise ValueError(f"window_adaptation must be 'interpolate' or 'cut'; got {window_adaptation!r}.")
    found = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    target = model.state_dict()
    adapted: list[str] = []
    state_dict = dict(found.state_dict)
    # A batch norm's step counter is missing from some exports and used by no published recipe.
    for name in target.keys() - state_dict.keys():
        if name.endswith("num_batches_tracked"):
            state_dict[name] = torch.zeros((), dtype=torch.long)
    extra_head = [name for name in HEAD if name in state_dict and name not in target]
    for name in extra_head:
        del state_dict[name]
    head_reset = adapt_head(state_dict, target, adapted)
    adapt_input(state_dict, target, adapted)
    adapt_windows(state_dict, target, window_adaptation, adapted)
    check_state_dict(state_dict, target, found.source)
    empty = any(tensor.is_meta for tensor in target.values())
    if empty:  # nothing to copy into: the tensors themselves become the network's, in its precision
        state_dict = {name: tensor.to(target[name].dtype) for name, tensor in state_dict.items()}
    model.load_state_dict(state_dict, assign=empty)
    return LoadReport(found.source, found.layout, tuple(adapted), (*extra_head, *found.left_out), not head_reset)


def save_checkpoint(model: nn.Module, path: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Write a network to a safetensors file that carries its configuration and preprocessing.

    ``TinyViT.from_config(pretrained=path)`` reads it back. The file is written beside its place and moved there when it
    is whole, so a killed process leaves the old file or the new one.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`.
        path: the file to write; its folder is made.
        class_names: names of the classes, in the order of the logits; the network's own if left out.

    Returns:
        The path.

    Raises:
        ValueError: if there are not as many names as classes, or the activation cannot be named in a file.
        TypeError: if ``model`` is no TinyViT.
    """
    network: Any = model
    if not isinstance(getattr(model, "config", None), TinyViTConfig):
        raise TypeError(f"save_checkpoint takes a TinyViT, whose config it stores; got {type(model).__name__}.")
    class_names = getattr(model, "class_names", None) if class_names is None else class_names
    names = check_class_names(class_names, network.config.num_classes)
    preprocessing = getattr(model, "preprocessing", None)  # a MobileSAM has its own
    told = {_CONFIG_KEY: network.config.to_dict(), _CLASSES_KEY: names}
    told[PREPROCESSING_KEY] = None if preprocessing is None else preprocessing.to_dict()
    metadata = {key: json.dumps(value) for key, value in told.items() if value is not None}
    return write_tensors(path, model.state_dict(), {"format": "pt"} | metadata)


def _looks_like_file(text: str) -> bool:
    try:
        if "/" in text or os.sep in text or urlparse(text).scheme in ("http", "https", "file"):
            return True
        return bool(Path(text).suffix) or Path(text).exists()
    except (ValueError, OSError):  # a name that no file has
        return False


def _read_metadata(metadata: Mapping[str, str], source: str) -> HubMetadata:
    try:
        told = {key: json.loads(metadata[key]) for key in _KEYS if key in metadata}
        return HubMetadata(
            TinyViTConfig.from_dict(told[_CONFIG_KEY]) if _CONFIG_KEY in told else None,
            class_names=tuple(str(label) for label in told[_CLASSES_KEY]) if _CLASSES_KEY in told else None,
            preprocessing=dict(told.get(PREPROCESSING_KEY, {})),
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source} carries a configuration that cannot be used: {error}") from error


def _read_hub_folder(folder: Path) -> HubMetadata:
    try:
        return read_hub_folder(folder)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from error


def read_preprocessing(fields: Mapping[str, Any], config: TinyViTConfig, source: str) -> Preprocessing:
    """Return the preprocessing of a network from what its file states, and the default for the rest.

    Args:
        fields: stated fields of :class:`~kornia_tinyvit.preprocessing.Preprocessing`.
        config: the network.
        source: where they were read, for the error.

    Raises:
        CheckpointError: if they are unknown or out of their range.
    """
    default = default_preprocessing(config)
    try:
        if "img_size" in fields:
            default = default.resize(int(fields["img_size"]))
        return Preprocessing.from_dict(default.to_dict() | dict(fields)).with_channels(config.in_chans)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source} carries a preprocessing that cannot be used: {error}") from error


def _config_from_shapes(state_dict: dict[str, Tensor], base: TinyViTConfig | None, source: str) -> TinyViTConfig:
    """Tell the architecture from the tensors; what shapes cannot tell follows ``base`` or the nearest variant."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in state_dict or state_dict[name].ndim != ndim:
            raise CheckpointError(f"{source} is not a whole TinyViT: it has no {name} of {ndim} dimensions.")
        return tuple(state_dict[name].shape)

    def ratio(name: str, ndim: int, dim: int, known: float) -> float:
        hidden = shape(name, ndim)[0]
        return known if hidden <= dim * known < hidden + 1 else hidden / dim

    depths = [0, 0, 0, 0]
    for name in state_dict:
        if match := re.match(r"layers\.([0-3])\.blocks\.(\d+)\.", name):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    dims = [shape("patch_embed.seq.2.c.weight", 4)[0]]
    dims += [shape(f"layers.{stage}.downsample.conv3.c.weight", 4)[0] for stage in range(3)]
    tables = [shape(f"layers.{stage}.blocks.0.attn.attention_biases", 2) for stage in (1, 2, 3)]
    windows = [math.isqrt(table[1]) for table in tables]
    if base is None:
        base = next((each for each in VARIANTS.values() if list(each.embed_dims) == dims), TinyViTConfig())
    mobile_sam = "neck.0.weight" in state_dict
    try:
        return base.replace(
            # All published networks were trained where the last window covers the last map.
            img_size=1024 if mobile_sam else max(32, 32 * windows[2]),
            in_chans=shape(STEM, 4)[1],
            num_classes=shape(HEAD[0], 2)[0] if HEAD[0] in state_dict else 0,
            embed_dims=tuple(dims),
            depths=tuple(depths),
            num_heads=(max(1, dims[0] // 32), *(table[0] for table in tables)),
            window_sizes=(windows[0], *windows),
            mlp_ratio=ratio("layers.1.blocks.0.mlp.fc1.weight", 2, dims[1], base.mlp_ratio),
            mbconv_expand_ratio=ratio("layers.0.blocks.0.conv1.c.weight", 4, dims[0], base.mbconv_expand_ratio),
            local_conv_size=shape("layers.1.blocks.0.local_conv.c.weight", 4)[-1],
            mobile_sam=mobile_sam,
        )
    except CheckpointError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} is no TinyViT that can be built: {error}") from error


def _check_stored_config(stored: TinyViTConfig, told: TinyViTConfig, source: str) -> None:
    """Refuse a stored configuration that the tensors contradict: building it could take any amount of memory."""
    told = told.replace(
        img_size=stored.img_size,
        num_heads=(stored.num_heads[0], *told.num_heads[1:]),
        window_sizes=(stored.window_sizes[0], *told.window_sizes[1:]),
    )
    differences = [
        f"{name} is {value} in the configuration and {getattr(told, name)} in the tensors"
        for name, value in vars(stored).items()
        if value != getattr(told, name)
    ]
    if differences:
        raise CheckpointError(f"{source} carries a configuration of another network: {'; '.join(differences)}.")


def _configuration(config: str | TinyViTConfig | None) -> TinyViTConfig | None:
    return TinyViTConfig.from_variant(config) if isinstance(config, str) else config


def _follow(config: str | TinyViTConfig | None, found: Checkpoint) -> Checkpoint:
    """Hold a checkpoint to what was asked for: a variant decides the architecture, a configuration everything."""
    asked = _configuration(config)
    if asked is not None:
        _check_architecture(asked, found)
    if not isinstance(config, TinyViTConfig):
        return found
    return replace(found, config=config, preprocessing=found.preprocessing_for(config))


def _check_architecture(expected: TinyViTConfig, found: Checkpoint) -> None:
    # The first stage has no heads, whatever its entry says.
    expected = expected.replace(num_heads=(found.config.num_heads[0], *expected.num_heads[1:]))
    differences = [
        f"{name} is {getattr(found.config, name)} in the file and {getattr(expected, name)} in the network"
        for name in _ARCHITECTURE
        if getattr(found.config, name) != getattr(expected, name)
        and not (name == "mobile_sam" and getattr(found.config, name))
    ]
    if differences:
        raise CheckpointError(
            f"{found.source} is of another architecture: {'; '.join(differences)}. Leave the variant out to build the "
            "network that the file was made for."
        )
