"""Read checkpoints safely, translate and adapt them, and report what was done."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
import torch.nn.functional as F
from kornia.core.download import download_file_from_url
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kornia_tinyvit.checkpoints.catalog import PretrainedWeights, default_weights, find_weights, list_pretrained
from kornia_tinyvit.checkpoints.hub import WEIGHTS_FILE, HubFacts, read_hub_config
from kornia_tinyvit.checkpoints.layouts import strip_prefixes, translate, unwrap
from kornia_tinyvit.config import VARIANTS, TinyViTConfig
from kornia_tinyvit.files import replacing

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "load_checkpoint",
    "open_pretrained",
    "read_checkpoint",
    "save_checkpoint",
]

_CONFIG_KEY = "kornia_tinyvit.config"
_CLASSES_KEY = "kornia_tinyvit.class_names"
_STEM = "patch_embed.seq.0.c.weight"
_HEAD = ("head.weight", "head.bias")

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

WindowAdaptation = Literal["interpolate", "cut"]


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not belong to the network it was offered to."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, under official names.

    Args:
        state_dict: the tensors.
        config: the network they belong to, stored in the file or told from the tensors' shapes.
        source: where they came from.
        layout: the naming they came in: ``"official"``, ``"timm"``, ``"mobile_sam"`` or ``"transformers"``.
        class_names: the names of the classes, where the file tells them.
        left_out: names in the file that are no weights of the network.
        others: the tensors of the other parts of a whole MobileSAM, its prompt encoder and mask decoder.
    """

    state_dict: dict[str, Tensor]
    config: TinyViTConfig
    source: str
    layout: str = "official"
    class_names: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()
    others: dict[str, Tensor] = field(default_factory=dict)


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
            lines.append(f"Left out: {_some(self.left_out)}.")
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
    facts = HubFacts()
    if isinstance(source, Mapping):
        content, name = source, "a state dict"
    else:
        name = str(source)
        path = locate_file(name)
        if path.is_dir():
            path, facts = path / WEIGHTS_FILE, _read_hub_config(path)
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
            f"tensors are {_some(list(content))}."
        )
    stored, classes = _read_metadata(metadata, name)
    stored, classes = facts.config or stored, facts.class_names or classes
    config = _config_from_shapes(state_dict, stored or base, name)
    config = config if facts.img_size is None else config.replace(img_size=facts.img_size)
    if stored is not None:
        _refuse_false_config(stored, config, name)
        config = stored
    others = {key: tensors[key] for key in left_out if key in tensors} if layout == "mobile_sam" else {}
    return Checkpoint(state_dict, config, name, layout, classes, (*left_out, *no_tensors), others)


def open_pretrained(
    pretrained: bool | str | Path | Checkpoint,
    config: str | TinyViTConfig | None = None,
    img_size: int | None = None,
) -> Checkpoint:
    """Find and read what ``from_config(config, pretrained)`` means.

    Args:
        pretrained: ``True``, a name of the catalog, a path, a URL, or a checkpoint that was read before.
        config: the variant or configuration that was asked for, if one was.
        img_size: side in pixels of the pictures to come, which may choose between weights.

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
        found = replace(found, config=weights.config, class_names=found.class_names or weights.class_names)
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
            with the picture, or ``"cut"``, when they are clipped and a token's neighbours stay where they are.

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
    extra_head = [name for name in _HEAD if name in state_dict and name not in target]
    for name in extra_head:
        del state_dict[name]
    head_reset = _adapt_head(state_dict, target, adapted)
    _adapt_input(state_dict, target, adapted)
    _adapt_windows(state_dict, target, window_adaptation, adapted)
    refuse_misfits(state_dict, target, found.source)
    empty = any(tensor.is_meta for tensor in target.values())
    if empty:  # nothing to copy into: the tensors themselves become the network's, in its precision
        state_dict = {name: tensor.to(target[name].dtype) for name, tensor in state_dict.items()}
    model.load_state_dict(state_dict, assign=empty)
    return LoadReport(found.source, found.layout, tuple(adapted), (*extra_head, *found.left_out), not head_reset)


def save_checkpoint(model: nn.Module, path: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Write a network to a safetensors file that carries its configuration.

    ``TinyViT.from_config(pretrained=path)`` reads it back. The file is written beside its place and moved there when it
    is whole, so a killed process leaves the old file or the new one.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`.
        path: the file to write; its folder is made.
        class_names: names of the classes, in the order of the logits.

    Returns:
        The path.

    Raises:
        ValueError: if there are not as many names as classes, or the activation cannot be named in a file.
        TypeError: if ``model`` is no TinyViT.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, TinyViTConfig):
        raise TypeError(f"save_checkpoint takes a TinyViT, whose config it stores; got {type(model).__name__}.")
    metadata = {"format": "pt", _CONFIG_KEY: json.dumps(config.to_dict())}
    if class_names is not None:
        if len(class_names) != config.num_classes:
            raise ValueError(f"Got {len(class_names)} class names for {config.num_classes} classes.")
        metadata[_CLASSES_KEY] = json.dumps(list(class_names))
    return write_tensors(path, model.state_dict(), metadata)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file beside its place and move it there when it is whole; its folder is made.

    Args:
        path: the file to write.
        tensors: what it holds, by name.
        metadata: texts that it carries.

    Returns:
        The path.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(kept, metadata))
    return Path(path)


def _looks_like_file(text: str) -> bool:
    try:
        if "/" in text or os.sep in text or urlparse(text).scheme in ("http", "https", "file"):
            return True
        return bool(Path(text).suffix) or Path(text).exists()
    except (ValueError, OSError):  # a name that no file has
        return False


def locate_file(source: str) -> Path:
    """Return the file that a path or an address means, fetching it into the cache if it lies elsewhere.

    Raises:
        CheckpointError: if it cannot be fetched, or no file can have such a name.
    """
    try:
        url = urlparse(source)
        path = Path(url2pathname(url.path) if url.scheme == "file" else source)
        if url.scheme not in ("http", "https"):
            path.exists()  # raises for what is too long for a name or holds a zero byte
            return path
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{source[:200]!r} is no name that a file or an address can have: {error}.") from error
    # Files of one name lie at many places, so the name in the cache tells the place too.
    place = hashlib.sha256(source.encode()).hexdigest()[:16]
    return _download([source], f"{place}-{Path(url.path).name}")


def fetch_weights(weights: PretrainedWeights) -> Path:
    """Return the file of published weights, fetching it into the cache if it is not there.

    Raises:
        CheckpointError: if it cannot be fetched from any of its places.
    """
    urls = list(weights.urls)
    try:
        return _download(urls)
    except CheckpointError:
        if weights.fallback is None:
            raise
        # Every timm repository calls its file model.safetensors, so the cache needs a name of its own.
        return _download([weights.fallback], f"{urlparse(weights.fallback).path.split('/')[2]}.safetensors", urls)


def _download(urls: list[str], file_name: str | None = None, tried: Sequence[str] = ()) -> Path:
    try:
        return Path(download_file_from_url(urls, file_name=file_name, validate=_refuse_torn))
    except (RuntimeError, OSError, ValueError) as error:
        places = "\n  ".join([*tried, *urls])
        raise CheckpointError(
            f"The weights could not be fetched from\n  {places}\n({error})\nWithout a network, fetch one of them "
            "elsewhere and pass the path of the file as pretrained=."
        ) from error


def _refuse_torn(path: str) -> None:
    """Refuse a download that is no whole archive, so that it does not stay in the cache.

    A pickle, torch's format before 1.6, has no index at its end to tell by; reading it will.
    """
    with open(path, "rb") as file:
        pickled = file.read(1) == pickle.PROTO
    if not pickled and not zipfile.is_zipfile(path):
        with safe_open(path, framework="pt"):
            pass


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the texts that a safetensors file carries; none where there is no such file, or none that can be read."""
    path = Path(path)
    try:
        if not path.is_file() or not _is_safetensors(path):
            return {}
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):  # reading the tensors will tell
        return {}


def read_tensors(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a safetensors or PyTorch file: what it holds, usually tensors by name, and the texts that it carries.

    Raises:
        CheckpointError: if there is no such file, or it is damaged or would have to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}.")
    try:
        if _is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and reading it could run code, so it is refused. If you "
            "trust it, load it yourself and pass its state dict."
        ) from error
    except Exception as error:  # damaged bytes make torch's reader fail in every way there is
        raise CheckpointError(f"{path} is truncated or no checkpoint: {error}") from error


def _is_safetensors(path: Path) -> bool:
    """Tell a safetensors file by its name or, whatever its name, by the JSON that follows the header's length."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_metadata(metadata: Mapping[str, str], source: str) -> tuple[TinyViTConfig | None, tuple[str, ...] | None]:
    config, classes = metadata.get(_CONFIG_KEY), metadata.get(_CLASSES_KEY)
    try:
        return (
            None if config is None else TinyViTConfig.from_dict(json.loads(config)),
            None if classes is None else tuple(str(label) for label in json.loads(classes)),
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source} carries a configuration that cannot be used: {error}") from error


def _read_hub_config(folder: Path) -> HubFacts:
    try:
        return read_hub_config(folder)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from error


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
            in_chans=shape(_STEM, 4)[1],
            num_classes=shape(_HEAD[0], 2)[0] if _HEAD[0] in state_dict else 0,
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


def _refuse_false_config(stored: TinyViTConfig, told: TinyViTConfig, source: str) -> None:
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
        _refuse_other_architecture(asked, found)
    return replace(found, config=config) if isinstance(config, TinyViTConfig) else found


def _refuse_other_architecture(expected: TinyViTConfig, found: Checkpoint) -> None:
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


def _adapt_head(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], adapted: list[str]) -> bool:
    """Let a head for other classes start at zero; return whether that was needed."""
    weight = target.get(_HEAD[0])
    old = state_dict.get(_HEAD[0])
    if weight is None or (old is not None and old.shape == weight.shape):
        return False
    if old is not None and old.shape[1:] != weight.shape[1:]:
        return False  # another architecture, which is refused with its shapes
    for name in _HEAD:
        state_dict[name] = torch.zeros(target[name].shape)
    origin = f"instead of {old.shape[0]} " if old is not None else "that the file does not have "
    adapted.append(f"the head has {weight.shape[0]} classes {origin}and starts at zero")
    return True


def _adapt_input(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], adapted: list[str]) -> None:
    """Let the first convolution answer a picture of other channels as it answered the ones it knows.

    One channel stands for a grey picture, which had the same values in all channels: their weights add up. More
    channels repeat the known ones, scaled so that the sum over equal channels stays.
    """
    old, new = state_dict.get(_STEM), target.get(_STEM)
    if old is None or new is None or old.ndim != 4 or old.shape[1] == new.shape[1] or old.shape[0] != new.shape[0]:
        return
    have, want = old.shape[1], new.shape[1]
    if want == 1:
        state_dict[_STEM] = old.sum(1, keepdim=True)
    else:
        state_dict[_STEM] = old[:, torch.arange(want) % have] * (have / want)
    channels = "channel" if want == 1 else "channels"
    adapted.append(f"the first convolution takes {want} {channels} instead of {have}")


def _adapt_windows(
    state_dict: dict[str, Tensor], target: Mapping[str, Tensor], how: WindowAdaptation, adapted: list[str]
) -> None:
    changes: dict[tuple[int, int], None] = {}
    for name, new in target.items():
        old = state_dict.get(name)
        if not name.endswith("attention_biases") or old is None or old.ndim != 2 or old.shape[0] != new.shape[0]:
            continue
        before, after = math.isqrt(old.shape[1]), math.isqrt(new.shape[1])
        if before == after or before**2 != old.shape[1]:
            continue
        table = old.float().view(1, -1, before, before)
        if how == "cut" and after < before:
            table = table[..., :after, :after]
        else:
            table = F.interpolate(table, (after, after), mode="bicubic", align_corners=False)
        state_dict[name] = table.reshape(old.shape[0], after**2)
        changes[before, after] = None
    verb = "cut" if how == "cut" else "interpolated"
    adapted.extend(f"bias tables {verb} from windows of {before} to {after} tokens" for before, after in changes)


def refuse_misfits(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that a network cannot take, before it is touched.

    Args:
        state_dict: the tensors.
        target: the network's.
        source: where the tensors came from, for the error.

    Raises:
        CheckpointError: if names or shapes differ, or a tensor holds NaN or infinity.
    """
    missing = sorted(target.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - target.keys())
    shapes = [
        f"{name} is {tuple(state_dict[name].shape)} in the file and {tuple(tensor.shape)} in the network"
        for name, tensor in target.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    problems = [f"it lacks {_some(missing)}"] if missing else []
    problems += [f"the network has no {_some(unexpected)}"] if unexpected else []
    problems += shapes[:3] + ([f"and {len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else [])
    if problems:
        raise CheckpointError(f"{source} is of another architecture: {'; '.join(problems)}. Nothing was loaded.")
    hollow = [name for name, tensor in state_dict.items() if tensor.is_meta]
    if hollow:
        raise CheckpointError(f"{source} has no values for {_some(hollow)}, which are on the meta device.")
    broken = [name for name, tensor in state_dict.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinite values in {_some(broken)}, as a diverged training leaves them. Nothing "
            "was loaded; use an earlier checkpoint."
        )


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
