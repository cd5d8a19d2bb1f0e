"""Text files that describe a dataset: JSON and YAML."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kornia_tinyvit.extras import optional_imports


def read_text(path: Path) -> str:
    """Return what a text file holds, in UTF-8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON.
    """
    return _parse(path, "JSON", json.loads)


def read_description(path: Path, expected: str) -> dict[str, Any]:
    """Return what a YAML or JSON file states about a dataset.

    Args:
        path: the file.
        expected: what a dataset of this kind is, for the errors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything else than names and values.
        MissingExtraError: if a YAML file is asked for without PyYAML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no data set {path}; expected {expected}.")
    described = read_json(path) if path.suffix.lower() == ".json" else _read_yaml(path)
    if not isinstance(described, dict):
        raise ValueError(f"{path} describes no data set; expected {expected}.")
    return described


def _read_yaml(path: Path) -> Any:
    with optional_imports("YAML files need PyYAML", "'kornia-tinyvit[train]'"):
        import yaml
    return _parse(path, "YAML", yaml.safe_load, yaml.YAMLError)


def _parse(path: Path, kind: str, parse: Callable[[str], Any], error: type[Exception] = ValueError) -> Any:
    text = read_text(path)
    try:
        return parse(text)
    except (ValueError, RecursionError, error) as found:
        raise ValueError(f"{path} is no {kind}: {found}") from found
