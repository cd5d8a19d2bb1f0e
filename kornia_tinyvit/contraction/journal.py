"""Journal of a search: a JSON Lines file of all measurements, evaluations and selected networks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.files import describe_differences, writing

__all__ = ["Journal"]


class Journal:
    """Records a search, which resumes from the file after an interruption.

    The first line holds the settings of the search. Each other line is an event: ``"measured"`` with the configuration,
    its parent and its costs, ``"evaluated"`` with the accuracy, ``"kept"`` with the constraint of the step. An
    incomplete last line is truncated. Only one process may write at a time: the search locks its folder.

    Args:
        path: the file; its folder is created.
        settings: all settings that affect the search, in JSON-compatible types.

    Raises:
        ValueError: if the file records a search with other settings, or a line is corrupt.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._events: dict[tuple[str, TinyViTConfig], dict[str, Any]] = {}
        settings = {"event": "began", **settings}
        recorded = self._load() or self._append(settings)
        differences = describe_differences(recorded, settings, words=("it has", "requested"))
        if differences:
            raise ValueError(
                f"{path.parent} holds another search: {'; '.join(differences)}. Give another folder, or remove it."
            )

    def find(self, event: str, config: TinyViTConfig) -> dict[str, Any] | None:
        """Return the line of an event for a network, or ``None``.

        Args:
            event: name of the event.
            config: configuration of the network.
        """
        return self._events.get((event, config))

    def write(self, event: str, config: TinyViTConfig, **values: Any) -> dict[str, Any]:
        """Record an event for a network durably and return its line; an existing line is kept.

        Args:
            event: name of the event.
            config: configuration of the network.
            **values: further values of the line.

        Returns:
            The line.
        """
        known = self.find(event, config)
        return known or self._remember(self._append({"event": event, "config": config.to_dict(), **values}))

    def _load(self) -> dict[str, Any] | None:
        """Read all events and return the first line; ``None`` if the file is empty."""
        content = self.path.read_bytes() if self.path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            os.truncate(self.path, len(complete))
        first = None
        for number, text in enumerate(complete.splitlines(), 1):
            try:
                line = dict(json.loads(text))
                first = first or line
                if number > 1:
                    self._remember(line)
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"Line {number} of {self.path} is corrupt. Remove the line to repeat its event, or the folder "
                    "to start over."
                ) from None
        return first

    def _append(self, line: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(line)
        with writing(self.path), self.path.open("ab") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return json.loads(text)  # equal to the line after a restart

    def _remember(self, line: dict[str, Any]) -> dict[str, Any]:
        self._events[line["event"], TinyViTConfig.from_dict(line["config"])] = line
        return line
