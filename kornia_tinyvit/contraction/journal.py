"""The file of a search: a JSON line for each candidate that was measured, evaluated or kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.files import describe_differences, writing

__all__ = ["Journal"]


class Journal:
    """Remembers what a search found out, over kills and restarts.

    The first line says what was asked for, each other one what happened: ``"measured"`` with the configuration, its
    parent and its costs, ``"evaluated"`` with the accuracy, ``"kept"`` with the limit of the step. A line that a killed
    process left half written is forgotten. Only one process at a time may write: the search locks its folder.

    Args:
        path: the file; its folder is made.
        asked: what decides the search, as JSON's types.

    Raises:
        ValueError: if the file holds another search, or a line is damaged.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._found: dict[tuple[str, str], dict[str, Any]] = {}
        asked = {"event": "began", **asked}
        began = self._load() or self._append(asked)
        differences = describe_differences(began, asked, words=("it has", "asked for"))
        if differences:
            raise ValueError(
                f"{path.parent} holds another search: {'; '.join(differences)}. Give another folder, or remove it."
            )

    def find(self, event: str, config: TinyViTConfig) -> dict[str, Any] | None:
        """Return the line about a network, or ``None``."""
        return self._found.get((event, _key(config.to_dict())))

    def write(self, event: str, config: TinyViTConfig, **told: Any) -> dict[str, Any]:
        """Add a line about a network, which lasts once this returns; one that is there already is returned."""
        known = self.find(event, config)
        return known or self._remember(self._append({"event": event, "config": config.to_dict(), **told}))

    def _load(self) -> dict[str, Any] | None:
        """Read what is there, and return its first line, if there is one."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        first = None
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = dict(json.loads(text))
                first = first or line
                if number > 1:
                    self._remember(line)
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"Line {number} of {self.path} is damaged. Remove that line to search what it told again, or the "
                    "folder to begin anew."
                ) from None
        return first

    def _append(self, line: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(line)
        with writing(self.path), self.path.open("ab") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return json.loads(text)  # as it will be read after a restart

    def _remember(self, line: dict[str, Any]) -> dict[str, Any]:
        self._found[line["event"], _key(line["config"])] = line
        return line


def _key(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)
