"""Read checkpoints safely, load them into networks, and save them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    drop_neck,
)
from kornia_tinyvit.checkpoints.arguments import training_preprocessing
from kornia_tinyvit.checkpoints.catalog import PretrainedWeights, find_weights, list_pretrained
from kornia_tinyvit.checkpoints.hub import WEIGHTS_FILE, HubMetadata, check_network, read_hub_folder
from kornia_tinyvit.checkpoints.layouts import find_network
from kornia_tinyvit.checkpoints.tensors import (
    CheckpointError,
    fetch_weights,
    list_names,
    locate_file,
    read_tensors,
    write_tensors,
)
from kornia_tinyvit.config import VARIANTS, TinyViTConfig, usual_image_size
from kornia_tinyvit.modules import plain_name, plain_state_dict, unwrapped
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
#: Key of the preprocessing in the metadata of a safetensors file.
PREPROCESSING_KEY = "kornia_tinyvit.preprocessing"

# Files of this package that hold other things than a TinyViT or a MobileSAM, by the key of their metadata.
_OTHER_FILES = {
    "kornia_tinyvit.detector": "a detector; use TinyViTDetector.from_config or kornia-tinyvit detect",
    "kornia_tinyvit.segmenter": "a semantic segmenter; use SemanticSegmenter.from_config or --task semantic",
    "kornia_tinyvit.embedding": "an image embedding; use ImageEmbedding.load",
}

#: Fields that determine the names and shapes of the tensors and are not adapted.
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
    """The content of a checkpoint, with official tensor names.

    Args:
        state_dict: the tensors.
        config: configuration of the network, stored in the file or derived from the shapes of the tensors.
        source: origin of the tensors.
        layout: original layout: ``"official"``, ``"timm"``, ``"mobile_sam"`` or ``"transformers"``.
        class_names: class names, if stored.
        preprocessing: preprocessing of the images, if stored; see :meth:`preprocessing_for`.
        left_out: names in the file that are not weights of the network, with the class of foreign objects.
        others: tensors of the prompt encoder and the mask decoder of a MobileSAM.
        ema: names in the file of moving averages of the weights, which ``use_ema=True`` reads.
    """

    state_dict: dict[str, Tensor]
    config: TinyViTConfig
    source: str
    layout: str = "official"
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    left_out: tuple[str, ...] = ()
    others: dict[str, Tensor] = field(default_factory=dict)
    ema: tuple[str, ...] = ()

    def preprocessing_for(self, config: TinyViTConfig) -> Preprocessing:
        """Return the preprocessing for a network with these weights: the stored one, or the default of their size.

        Args:
            config: configuration of the network, which may have another image size and other input channels.
        """
        found = self.preprocessing or default_preprocessing(self.config)
        if config.img_size != self.config.img_size:
            found = found.resize(config.img_size)
        return found.with_channels(config.in_chans)


@dataclass(frozen=True)
class LoadReport:
    """Result of :func:`load_checkpoint`.

    Args:
        source: origin of the weights.
        layout: original layout of the weights.
        adapted: descriptions of the changes made to match the network.
        left_out: names in the file that were not loaded, with the class of foreign objects.
        complete: whether all weights are those of the file; otherwise some classes have to be trained. A head that was
            converted from ImageNet-22k to ImageNet-1k is complete: it classifies without training.
        class_names: class names of the loaded head; ``None`` if they are unknown or the head is not complete.
        ema: names in the file of moving averages of the weights, which were not loaded.
    """

    source: str
    layout: str
    adapted: tuple[str, ...] = field(default=())
    left_out: tuple[str, ...] = field(default=())
    complete: bool = True
    class_names: tuple[str, ...] | None = None
    ema: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"Loaded {self.source} ({self.layout} layout)."]
        lines += [f"Adapted: {change}." for change in self.adapted]
        if self.left_out:
            lines.append(f"Left out: {list_names(self.left_out)}.")
        if self.ema:
            lines.append(f"Also holds EMA weights ({list_names(self.ema)}); load them with use_ema=True.")
        return "\n".join(lines)


def read_checkpoint(
    source: str | Path | Mapping[str, Any], base: TinyViTConfig | None = None, use_ema: bool = False
) -> Checkpoint:
    """Read a safetensors or PyTorch file, a hub folder or a state dict in any supported layout.

    The weights are found under any keys and prefixes, such as those of Lightning, ``DistributedDataParallel``,
    ``torch.compile`` and ``AveragedModel``, and in pickled modules. Nothing in a file is executed: objects of other
    classes than those of tensors and containers are read as inert data.

    Args:
        source: path, URL (``http``, ``https`` or ``file``) or state dict. A folder contains ``model.safetensors`` and
            ``config.json`` of timm or of this package's transformers models.
        base: configuration for fields that are neither stored nor derived from shapes, such as the activation.
        use_ema: whether to read the moving average of the weights, stored for example as ``state_dict_ema``.

    Returns:
        The content with official tensor names.

    Raises:
        CheckpointError: if the source cannot be downloaded or read, contains no TinyViT or several, or no moving
            average with ``use_ema``.
    """
    metadata: dict[str, str] = {}
    hub = HubMetadata()
    content: Any = source
    if isinstance(source, Mapping):
        name = "a state dict"
    else:
        name = str(source)
        path = locate_file(name)
        if path.is_dir():
            path, hub = path / WEIGHTS_FILE, read_hub_folder(path)
        content, metadata = read_tensors(path)
    reject_other_files(name, metadata)
    try:
        found = find_network(content, use_ema)
    except ValueError as error:
        raise CheckpointError(f"{name} {error}") from error
    state_dict = found.tensors
    own = _read_metadata(metadata, name)
    stored, classes = hub.config or own.config, hub.class_names or own.class_names
    config = _config_from_shapes(state_dict, stored or base, name)
    if stored is not None:
        _check_stored_config(stored, config, name)
        config = stored
    try:
        fields = {**training_preprocessing(content), **own.preprocessing, **hub.preprocessing}
        if stored is None and "img_size" in fields:
            config = config.replace(img_size=fields["img_size"])
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"The preprocessing stored in {name} cannot be used: {error}") from error
    preprocessing = read_preprocessing(fields, config, name) if fields else None
    return Checkpoint(
        state_dict, config, name, found.layout, classes, preprocessing, found.left_out, found.others, found.ema
    )


def open_pretrained(
    pretrained: bool | str | Path | Checkpoint,
    config: str | TinyViTConfig | None = None,
    img_size: int | None = None,
) -> Checkpoint:
    """Read the weights of ``from_config(config, pretrained=pretrained)``.

    Args:
        pretrained: ``True``, a name of the catalog, a path, a URL or a :class:`Checkpoint`.
        config: variant or configuration of the network, if given.
        img_size: side in pixels of the input images, see :func:`~kornia_tinyvit.checkpoints.catalog.default_weights`.

    Returns:
        The checkpoint. Its configuration is ``config`` if that is a :class:`~kornia_tinyvit.TinyViTConfig`, else that
        of the catalog entry or of the file.

    Raises:
        CheckpointError: if the weights do not exist or have another architecture.
        ValueError: if the variant is unknown.
    """
    expected = TinyViTConfig.from_variant(config) if isinstance(config, str) else config
    if isinstance(pretrained, Checkpoint):
        found = pretrained
    elif isinstance(located := locate_pretrained(pretrained, config, img_size), PretrainedWeights):
        found = read_checkpoint(located.asset_path or fetch_weights(located))
        found = replace(found, config=located.config, class_names=found.class_names or located.class_names)
    else:
        found = read_checkpoint(located, expected)
    if expected is not None:
        _check_architecture(expected, found)
    if isinstance(config, TinyViTConfig):
        found = replace(found, config=config, preprocessing=found.preprocessing_for(config))
    return found


def locate_pretrained(
    pretrained: bool | str | Path, config: object = None, img_size: int | None = None
) -> PretrainedWeights | str:
    """Return the entry of the catalog that ``pretrained`` names, or the path or URL of a file.

    Args:
        pretrained: ``True``, a name of the catalog, a path or a URL.
        config: the variant, or a configuration.
        img_size: side in pixels of the input images.

    Raises:
        CheckpointError: if there are neither weights nor a file of this name.
    """
    variant = config if isinstance(config, str) else None
    if (weights := find_weights(variant, pretrained, img_size)) is not None:
        return weights
    if pretrained is True:
        raise CheckpointError("pretrained=True requires a variant such as '5m'; pass a name or a file instead.")
    if _is_path(str(pretrained)):
        return str(pretrained)
    names = ", ".join(f"{entry.name} ({entry.variant})" for entry in list_pretrained(variant))
    raise CheckpointError(f"There are no weights and no file {str(pretrained)!r}; expected one of {names}.")


def reject_other_files(source: str, metadata: Mapping[str, str]) -> None:
    """Raise an error for a file of this package that is not a checkpoint of a TinyViT or a MobileSAM.

    Args:
        source: origin of the metadata, for the error message.
        metadata: metadata of the file.

    Raises:
        CheckpointError: naming what the file holds and how to read it.
    """
    if key := next(iter(_OTHER_FILES.keys() & metadata.keys()), None):
        raise CheckpointError(f"{source} holds {_OTHER_FILES[key]}.")


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Any] | Checkpoint,
    window_adaptation: WindowAdaptation = "interpolate",
    use_ema: bool = False,
) -> LoadReport:
    """Load weights into a network and adapt them to its window sizes, classes and input channels.

    Attention bias tables are resized, and the first convolution is adapted to the input channels. A network without a
    neck takes the weights of MobileSAM's encoder except its neck, norm and head, which are new. If network and file
    have class names and any is common, the rows of the head are matched by name. A head of ImageNet-22k's 21841
    classes becomes one of ImageNet-1k for a network of 1000 classes, as in the official code. Otherwise a head with
    another number of classes is initialized with zeros. If an error is raised, the network is unchanged.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`, which may be compiled or wrapped.
        source: path, URL, state dict or result of :func:`~kornia_tinyvit.checkpoints.read_checkpoint`.
        window_adaptation: resizing of bias tables: ``"interpolate"`` (bicubic) for windows that scale with the image,
            ``"crop"`` for windows that are limited to the size of the feature map.
        use_ema: whether to load the moving average of the weights, stored for example as ``state_dict_ema``.

    Returns:
        A report of adapted and left-out weights.

    Raises:
        CheckpointError: if the source cannot be read, has another architecture, or weights that are not finite.
        ValueError: if ``window_adaptation`` is unknown, or ``use_ema`` is passed with a checkpoint that has been read.

    Example:
        >>> from kornia_tinyvit import TinyViT
        >>> model = TinyViT.from_config("1m", num_classes=10)
        >>> three = TinyViT.from_config("1m", num_classes=3)
        >>> print(load_checkpoint(three, model.state_dict()))
        Loaded a state dict (official layout).
        Adapted: the head has 3 classes instead of 10; it is initialized with zeros.
    """
    if window_adaptation not in ("interpolate", "crop"):
        raise ValueError(f"window_adaptation must be 'interpolate' or 'crop'; got {window_adaptation!r}.")
    if use_ema and isinstance(source, Checkpoint):
        raise ValueError("The checkpoint has been read already; pass use_ema=True to read_checkpoint.")
    found = source if isinstance(source, Checkpoint) else read_checkpoint(source, use_ema=use_ema)
    names_in_model = {plain_name(name): name for name in model.state_dict()}
    target = plain_state_dict(model)
    adapted: list[str] = []
    state_dict = dict(found.state_dict)
    # The step counter of batch norm is missing in some exports and unused with a fixed momentum.
    for name in target.keys() - state_dict.keys():
        if name.endswith("num_batches_tracked"):
            state_dict[name] = torch.zeros((), dtype=torch.long)
    neck = drop_neck(state_dict, target, adapted)
    extra_head = [name for name in HEAD if name in state_dict and name not in target]
    for name in extra_head:
        del state_dict[name]
    wanted = getattr(unwrapped(model), "class_names", None)
    complete, names = adapt_head(state_dict, target, adapted, found.class_names, wanted)
    adapt_input(state_dict, target, adapted)
    adapt_windows(state_dict, target, window_adaptation, adapted)
    check_state_dict(state_dict, target, found.source)
    on_meta = any(tensor.is_meta for tensor in target.values())
    if on_meta:  # nothing to copy into: the tensors are assigned in the precision of the network
        state_dict = {name: tensor.to(target[name].dtype) for name, tensor in state_dict.items()}
    model.load_state_dict({names_in_model[name]: tensor for name, tensor in state_dict.items()}, assign=on_meta)
    left_out = (*neck, *extra_head, *found.left_out)
    return LoadReport(found.source, found.layout, tuple(adapted), left_out, complete, names, found.ema)


def save_checkpoint(model: nn.Module, path: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Save a network with its configuration, class names and preprocessing to a safetensors file.

    Load it with ``TinyViT.from_config(pretrained=path)``. The file is written atomically: a killed process leaves the
    old file or the complete new one.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT` or a :class:`~kornia_tinyvit.MobileSAM`, which may be compiled or
            wrapped in whole or in part.
        path: file to write; its folder is created if missing.
        class_names: class names in the order of the logits; ``None`` for those of the network.

    Returns:
        The path.

    Raises:
        ValueError: if the number of class names differs from the number of classes, or the activation is not one of
            :mod:`torch.nn`.
        TypeError: if ``model`` is not a TinyViT.
        OSError: if the file cannot be written.
    """
    config, names = check_network(model, class_names)
    preprocessing: Any = getattr(unwrapped(model), "preprocessing", None)
    values = {_CONFIG_KEY: config.to_dict(), _CLASSES_KEY: names}
    values[PREPROCESSING_KEY] = None if preprocessing is None else preprocessing.to_dict()
    metadata = {key: json.dumps(value) for key, value in values.items() if value is not None}
    return write_tensors(path, plain_state_dict(model), {"format": "pt"} | metadata)


def _is_path(text: str) -> bool:
    try:
        return "/" in text or os.sep in text or bool(Path(text).suffix) or Path(text).exists()
    except (ValueError, OSError):  # not a valid file name
        return False


def _read_metadata(metadata: Mapping[str, str], source: str) -> HubMetadata:
    try:
        values = {key: json.loads(value) for key, value in metadata.items() if key.startswith("kornia_tinyvit.")}
        return HubMetadata(
            TinyViTConfig.from_dict(values[_CONFIG_KEY]) if _CONFIG_KEY in values else None,
            tuple(map(str, values[_CLASSES_KEY])) if _CLASSES_KEY in values else None,
            dict(values.get(PREPROCESSING_KEY, {})),
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"The configuration stored in {source} cannot be used: {error}") from error


def read_preprocessing(fields: Mapping[str, Any], config: TinyViTConfig, source: str) -> Preprocessing:
    """Return the default preprocessing of a network, updated with stored fields.

    Args:
        fields: stored fields of :class:`~kornia_tinyvit.preprocessing.Preprocessing`.
        config: configuration of the network.
        source: origin of the fields, for the error message.

    Raises:
        CheckpointError: if a field is unknown or out of range.
    """
    default = default_preprocessing(config)
    try:
        if "img_size" in fields:
            default = default.resize(int(fields["img_size"]))
        return Preprocessing.from_dict(default.to_dict() | dict(fields)).with_channels(config.in_chans)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"The preprocessing stored in {source} cannot be used: {error}") from error


def _config_from_shapes(state_dict: dict[str, Tensor], base: TinyViTConfig | None, source: str) -> TinyViTConfig:
    """Derive the architecture from the tensors, and all other fields from ``base`` or the variant of this width."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in state_dict or state_dict[name].ndim != ndim:
            raise CheckpointError(f"{source} is not a complete TinyViT: it has no {name} of {ndim} dimensions.")
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
            img_size=1024 if mobile_sam else usual_image_size(windows[2]),
            in_chans=shape(STEM, 4)[1],
            num_classes=shape(HEAD[0], 2)[0] if any(name in state_dict for name in HEAD) else 0,
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
        raise CheckpointError(f"{source} is not a valid TinyViT: {error}") from error


def _check_stored_config(stored: TinyViTConfig, derived: TinyViTConfig, source: str) -> None:
    """Reject a stored configuration that contradicts the tensors: building it could allocate any amount of memory."""
    derived = derived.replace(
        img_size=stored.img_size,
        num_heads=(stored.num_heads[0], *derived.num_heads[1:]),
        window_sizes=(stored.window_sizes[0], *derived.window_sizes[1:]),
    )
    if differences := _differences(stored, derived, vars(stored), ("configuration", "tensors")):
        raise CheckpointError(f"The configuration stored in {source} is of another network: {differences}.")


def _check_architecture(expected: TinyViTConfig, found: Checkpoint) -> None:
    # The first stage has no attention heads, and a MobileSAM's weights can be loaded into a network without a neck.
    expected = expected.replace(
        num_heads=(found.config.num_heads[0], *expected.num_heads[1:]),
        mobile_sam=expected.mobile_sam or found.config.mobile_sam,
    )
    if differences := _differences(found.config, expected, _ARCHITECTURE, ("file", "network")):
        raise CheckpointError(
            f"{found.source} has another architecture: {differences}. Omit the variant to build the network of the "
            "file."
        )


def _differences(first: TinyViTConfig, second: TinyViTConfig, names: Iterable[str], places: tuple[str, str]) -> str:
    return "; ".join(
        f"{name} is {getattr(first, name)} in the {places[0]} and {getattr(second, name)} in the {places[1]}"
        for name in names
        if getattr(first, name) != getattr(second, name)
    )
