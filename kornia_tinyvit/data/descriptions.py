"""JSON and YAML files that describe a dataset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kornia_tinyvit.extras import optional_imports


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not JSON.
    """
    return _parse(path, "JSON", json.loads)


def read_description(path: Path, expected: str) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file.

    Args:
        path: the file.
        expected: the expected dataset, for the messages.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it does not hold a mapping.
        MissingExtraError: for YAML files, if PyYAML is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no dataset {path}; expected {expected}.")
    described = read_json(path) if path.suffix.lower() == ".json" else _read_yaml(path)
    if not isinstance(described, dict):
        raise ValueError(f"{path} does not describe a dataset; expected {expected}.")
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
        raise ValueError(f"{path} is not {kind}: {found}") from found
