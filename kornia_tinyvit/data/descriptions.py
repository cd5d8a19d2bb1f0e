"""JSON and YAML files that describe a dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kornia_tinyvit.data.splits import choose_split, is_split
from kornia_tinyvit.extras import optional_imports


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without its byte order mark.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def read_names(path: Path) -> list[str]:
    """Return the class names in a text file, one per line; blank lines at its end are ignored.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not UTF-8, or a line is blank.
    """
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if "" in names:
        raise ValueError(f"{path}:{names.index('') + 1} is blank; expected the name of class {names.index('')}.")
    return names


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


def find_section(path: Path, described: Mapping[str, Any], split: str) -> Any:
    """Return the section of a split in a description, also under another name of the split.

    Args:
        path: the file, for the message.
        described: its content.
        split: name of the split.

    Raises:
        MissingSplitError: if there is no such section, or it is empty.
    """
    sections = {name: part for name, part in described.items() if part and (name == split or is_split(str(name)))}
    return choose_split(path, split, sections)


def find_root(path: Path, described: Mapping[str, Any]) -> Path:
    """Return the folder that the paths of a description are relative to.

    It is its ``path``, relative to the description or, as for Ultralytics, to the working directory; or the folder of
    the description, where ``path`` is that of another machine.
    """
    stated = posix(described.get("path") or ".")
    return next((folder for folder in (path.parent / stated, Path(stated)) if os.path.isdir(folder)), path.parent)


def posix(path: object) -> str:
    """Return a path with slashes, also if it was written on Windows."""
    return str(path).replace("\\", "/")


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
