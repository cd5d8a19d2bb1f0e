"""Fetch, read and write files of tensors."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from kornia.core.download import download_file_from_url
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kornia_tinyvit.checkpoints.catalog import PretrainedWeights
from kornia_tinyvit.files import replacing

__all__ = [
    "CheckpointError",
    "fetch_weights",
    "list_some",
    "locate_file",
    "read_metadata",
    "read_tensors",
    "write_tensors",
]


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not belong to the network it was offered to."""


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
        return Path(download_file_from_url(urls, file_name=file_name, validate=_check_download))
    except (RuntimeError, OSError, ValueError) as error:
        places = "\n  ".join([*tried, *urls])
        raise CheckpointError(
            f"The weights could not be fetched from\n  {places}\n({error})\nWithout a network, fetch one of them "
            "elsewhere and pass the path of the file as pretrained=."
        ) from error


def _check_download(path: str) -> None:
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


def list_some(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
