"""Download, read and write files of tensors."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from kornia.core.download import download_file_from_url
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kornia_tinyvit.checkpoints.catalog import PretrainedWeights
from kornia_tinyvit.checkpoints.pickles import read_pickle
from kornia_tinyvit.files import replacing

__all__ = [
    "CheckpointError",
    "fetch_weights",
    "list_names",
    "locate_file",
    "read_metadata",
    "read_tensors",
    "write_tensors",
]


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not match the target model."""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file atomically.

    Args:
        path: file to write; its folder is created if missing.
        tensors: tensors by name.
        metadata: metadata of the file.

    Returns:
        The path.

    Raises:
        OSError: if the file cannot be written.
    """
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(copies, metadata))
    return Path(path)


def locate_file(source: str) -> Path:
    """Return the local file of a path or URL; ``http`` and ``https`` URLs are downloaded to the cache.

    Args:
        source: path or URL.

    Raises:
        CheckpointError: if the download fails or the path is invalid.
    """
    try:
        url = urlparse(source)
        path = Path(url2pathname(url.path) if url.scheme == "file" else source)
        if url.scheme not in ("http", "https"):
            path.exists()  # raises for names that are too long or contain a null byte
            return path
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{source[:200]!r} is not a valid path or URL: {error}.") from error
    # Many URLs end with the same file name, so the name in the cache includes a hash of the URL.
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return _download([source], f"{digest}-{Path(url.path).name}")


def fetch_weights(weights: PretrainedWeights) -> Path:
    """Return the local file of published weights, downloaded to the cache if it is missing there.

    Args:
        weights: entry of the catalog.

    Raises:
        CheckpointError: if the download fails from all URLs.
    """
    urls = list(weights.urls)
    try:
        return _download(urls)
    except CheckpointError:
        if weights.fallback is None:
            raise
        # The file is named model.safetensors in every timm repository, so the cache uses the name of the repository.
        return _download([weights.fallback], f"{urlparse(weights.fallback).path.split('/')[2]}.safetensors", urls)


def _download(urls: list[str], file_name: str | None = None, tried: Sequence[str] = ()) -> Path:
    try:
        return Path(download_file_from_url(urls, file_name=file_name, validate=_check_complete))
    except (RuntimeError, OSError, ValueError) as error:
        listed = "\n  ".join([*tried, *urls])
        raise CheckpointError(
            f"The weights could not be downloaded from\n  {listed}\n({error})\nWithout a network connection, download "
            "one of these files elsewhere and pass its path as pretrained=."
        ) from error


def _check_complete(path: str) -> None:
    """Raise an error for a truncated download, which removes it from the cache.

    A pickle, torch's format before 1.6, has no index at its end; reading it fails later.
    """
    with open(path, "rb") as file:
        pickled = file.read(1) == pickle.PROTO
    if not pickled and not zipfile.is_zipfile(path):
        with safe_open(path, framework="pt"):
            pass


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, or an empty dictionary if the file is missing or unreadable.

    Args:
        path: the file.
    """
    path = Path(path)
    try:
        if not path.is_file() or not _is_safetensors(path):
            return {}
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):  # reported when the tensors are read
        return {}


def read_tensors(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a safetensors file, a file of ``torch.save`` or another pickle; nothing in it is executed.

    Args:
        path: the file.

    Returns:
        The content as of :func:`~kornia_tinyvit.checkpoints.pickles.read_pickle`, usually tensors by name, and the
        metadata of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, damaged or not a checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}.")
    try:
        if _is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with path.open("rb") as file:
            return read_pickle(file), {}
    except Exception as error:  # damaged files raise errors of many types
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {error or type(error).__name__}") from error


def _is_safetensors(path: Path) -> bool:
    """Detect a safetensors file by its suffix or by the JSON header after the first 8 bytes."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def list_names(names: Sequence[str], limit: int = 4) -> str:
    """Join the first names and the number of the remaining ones.

    Args:
        names: the names.
        limit: maximum number of names to list.

    Returns:
        The names, separated by commas.
    """
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
