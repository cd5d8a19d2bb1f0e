"""Ctrl-C while batches are processed."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self


class Interruption:
    """Record a first Ctrl-C (SIGINT) instead of raising ``KeyboardInterrupt``, which a second one does.

    A context manager; in another thread than the main one it has no effect, because signals are handled there.
    """

    _GRACE = 1.0  # seconds; torchrun forwards a Ctrl-C that its ranks have received from the terminal already

    def __init__(self) -> None:
        self._time: float | None = None
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._time is None:
            self._time = now
        elif now - self._time > self._GRACE:
            raise KeyboardInterrupt

    @property
    def requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._time is not None
