"""The file of a search: a JSON line for each candidate that was measured, evaluated or kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.files import describe_differences, locks

__all__ = ["Journal"]


class Journal:
    """Remembers what a search found out, over kills and restarts.

    The first line says what was asked for, each other one what happened: ``"measured"`` with the configuration, its
    parent and its costs, ``"evaluated"`` with the accuracy, ``"kept"`` with the limit of the step. A line that a killed
    process left half written is forgotten.

    Args:
        path: the file; its folder is made.
        asked: what decides the search, as JSON's types.

    Raises:
        ValueError: if the file holds another search, another process writes it, or a line is damaged.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        fcntl = locks()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._found: dict[tuple[str, str], dict[str, Any]] = {}
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load(asked)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"Another process searches in {path.parent}; wait for it or give another folder."
            ) from None
        except ValueError:
            self._file.close()
            raise

    def find(self, event: str, config: TinyViTConfig) -> dict[str, Any] | None:
        """Return the line about a network, or ``None``."""
        return self._found.get((event, _key(config)))

    def write(self, event: str, config: TinyViTConfig, **told: Any) -> dict[str, Any]:
        """Add a line about a network, which lasts once this returns; one that is there already is returned."""
        known = self.find(event, config)
        return known or self._append({"event": event, "config": config.to_dict(), **told})

    def close(self) -> None:
        """Let others write."""
        self._file.close()

    def _load(self, asked: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._remember(json.loads(line))
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"Line {number} of {self.path} is damaged. Remove that line to search what it told again, or the "
                    "folder to begin anew."
                ) from None
        if not self.lines:
            self._append({"event": "began", **asked})
        differences = describe_differences(self.lines[0], {"event": "began", **asked}, words=("it has", "asked for"))
        if differences:
            raise ValueError(
                f"{self.path.parent} holds another search: {'; '.join(differences)}. Give another folder, or remove it."
            )

    def _append(self, line: dict[str, Any]) -> dict[str, Any]:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        line = json.loads(json.dumps(line))  # as it will be read after a restart
        self._remember(line)
        return line

    def _remember(self, line: dict[str, Any]) -> None:
        if "config" in line:
            self._found[line["event"], json.dumps(line["config"], sort_keys=True)] = line
        elif self.lines:
            raise ValueError(line)
        self.lines.append(line)


def _key(config: TinyViTConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)
