"""The folder of a training: what was asked for, its metrics, its weights and the state to go on from."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from kornia_tinyvit.files import describe_differences, locked, write_text, writing

__all__ = ["RunFolder"]


_NOT_SHOWN = {"step", "epoch", "seconds", "broken"}


class RunFolder:
    """Files of a training, each put into place whole, so that a kill at any time leaves what was there before.

    Args:
        path: the folder; it is made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending = path / "state.tmp"  # where a state is written, which counts after keep_state
        self._board: Any = None

    def weights(self, name: str) -> Path:
        """Return the file of the ``best`` or the ``last`` weights."""
        return self.path / f"{name}.safetensors"

    def begun(self) -> dict[str, Any] | None:
        """Return what was asked for when the training in this folder began, or ``None``."""
        file = self.path / "run.json"
        return json.loads(file.read_text()) if file.exists() else None

    def claim(self, asked: dict[str, Any]) -> None:
        """Refuse a folder that holds another training than is asked for.

        Raises:
            ValueError: telling the differences.
        """
        begun = self.begun()
        if begun is None:
            return
        differences = describe_differences(begun, asked, words=("it has", "asked for"))
        if differences:
            raise ValueError(
                f"{self.path} holds another training: {'; '.join(differences)}. Give another folder, or remove it."
            )

    def alone(self) -> AbstractContextManager[None]:
        """Keep the trainings of other processes out; it ends with the process, however that ends.

        Raises:
            ValueError: if another process trains in the folder.
        """
        message = f"Another process trains in {self.path}; wait for it or give another folder."
        return locked(self.path / ".lock", message, ValueError)

    def begin(self, asked: dict[str, Any], step: int) -> None:
        """Write down what is asked for, and forget what was told of steps after this one: they come again."""
        write_text(self.path / "run.json", json.dumps(asked, indent=1))
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            lines = [line for line in metrics.read_text().splitlines() if _is_at_most(line, step)]
            write_text(metrics, "".join(line + "\n" for line in lines))
        with suppress(ImportError):  # TensorBoard is a convenience, not a need
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run told is told again.
            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the metrics, and its numbers to TensorBoard where that is installed."""
        metrics = self.path / "metrics.jsonl"
        with writing(metrics), metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name in line.keys() - _NOT_SHOWN:
                self._board.add_scalar(name, line[name], line["step"])

    def newest_state(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the folder of the newest whole state and how far it was, or ``None``."""
        states = self._states()
        return (states[-1], json.loads((states[-1] / "progress.json").read_text())) if states else None

    def clear_pending(self) -> None:
        """Remove what a killed process wrote of a state."""
        shutil.rmtree(self.pending, ignore_errors=True)

    @contextmanager
    def writing_state(self) -> Iterator[None]:
        """Leave nothing of a state that cannot be written, and tell which it was.

        Raises:
            OSError: if the disk is full, or fails.
        """
        try:
            with writing(self.pending):
                yield
        except OSError:
            self.clear_pending()
            raise

    def keep_state(self, progress: dict[str, Any]) -> None:
        """Put the new state in the place of the one before.

        Args:
            progress: how far it is, with ``step``.
        """
        write_text(self.pending / "progress.json", json.dumps(progress))
        os.replace(self.pending, self.path / f"state-{progress['step']:09d}")
        for older in self._states()[:-1]:
            shutil.rmtree(older)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def _states(self) -> list[Path]:
        return sorted(path for path in self.path.glob("state-*") if re.fullmatch(r"state-\d{9,}", path.name))


def _is_at_most(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:  # the killed run's half line
        return False
