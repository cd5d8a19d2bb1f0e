"""The output folder of a training: its configuration, metrics, weights and states."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from kornia_tinyvit.files import describe_differences, locked, write_text, writing

__all__ = ["RunFolder"]

_NOT_SCALARS = {"step", "epoch", "seconds", "broken"}


class RunFolder:
    """Files of a training, each replaced atomically.

    Args:
        path: the folder; it is created by the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending = path / "state.tmp"  # a state while it is written, until publish_state
        self._board: Any = None

    def weights(self, name: str) -> Path:
        """Return the file of the ``best`` or the ``last`` weights."""
        return self.path / f"{name}.safetensors"

    @property
    def predictions(self) -> Path:
        """The file of the figure of predictions."""
        return self.path / "predictions.png"

    def config(self) -> dict[str, Any] | None:
        """Return the configuration of the training in this folder, or ``None`` without a training."""
        file = self.path / "run.json"
        return json.loads(file.read_text()) if file.exists() else None

    def check_config(self, config: dict[str, Any], epoch: float = 0.0) -> dict[str, Any]:
        """Reject a training of another configuration; only the number of epochs may be greater.

        Args:
            config: configuration of the training.
            epoch: epochs of the training in this folder that are finished.

        Returns:
            The configuration to :meth:`start` with. Its ``extensions`` are those of the folder, each with the previous
            number of epochs, ``from``, the new one, ``to``, and the ``epoch`` from which the new schedule applies. An
            extended training keeps the length of its warm-up.

        Raises:
            ValueError: naming the differences, if the folder holds another training.
        """
        stored = self.config() or config
        extensions = list(stored.get("extensions", []))
        ours, theirs = stored.get("recipe", {}), config.get("recipe", {})
        if theirs.get("epochs", 0) > ours.get("epochs", 0):
            extensions.append({"from": ours["epochs"], "to": theirs["epochs"], "epoch": epoch})
            ours = ours | {"epochs": theirs["epochs"]}
            config = config | {"recipe": theirs | {"warmup_epochs": ours["warmup_epochs"]}}
        known = {name: value for name, value in stored.items() if name != "extensions"}
        known |= {"recipe": ours} if ours else {}
        differences = describe_differences(known, config, words=("it has", "requested"))
        if differences:
            raise ValueError(
                f"{self.path} holds another training: {'; '.join(differences)}. Give another folder, or remove it."
            )
        return config | {"extensions": extensions}

    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder until the end of the context or of the process.

        Returns:
            The context.

        Raises:
            ValueError: if another process trains in the folder.
        """
        message = f"Another process trains in {self.path}; wait for it or give another folder."
        return locked(self.path / ".lock", message, ValueError)

    def start(self, config: dict[str, Any], step: int) -> None:
        """Write the configuration, truncate the metrics after the resumed step, and open TensorBoard's file.

        Args:
            config: configuration of the training.
            step: optimizer step to resume after; 0 for a new training.
        """
        write_text(self.path / "run.json", json.dumps(config, indent=1))
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            lines = [line for line in metrics.read_text().splitlines() if _is_at_most(line, step)]
            write_text(metrics, "".join(line + "\n" for line in lines))
        with suppress(ImportError):  # TensorBoard is optional
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to the metrics and its scalars to TensorBoard."""
        metrics = self.path / "metrics.jsonl"
        with writing(metrics), metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name in line.keys() - _NOT_SCALARS:
                self._board.add_scalar(name, line[name], line["step"])

    def newest_state(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the folder and the progress of the newest state, or ``None``."""
        states = self._states()
        return (states[-1], json.loads((states[-1] / "progress.json").read_text())) if states else None

    def clear_pending(self) -> None:
        """Remove an unfinished state."""
        shutil.rmtree(self.pending, ignore_errors=True)

    def publish_state(self, progress: dict[str, Any]) -> None:
        """Replace the previous state by the pending one.

        Args:
            progress: progress of the training, with ``step``.
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
        return sorted(self.path.glob("state-*"))


def _is_at_most(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:  # an incomplete line of a killed process
        return False
