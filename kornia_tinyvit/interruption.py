"""Ctrl-C while batches are processed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["deferred_interrupt"]

_GRACE = 1.0  # seconds; torchrun forwards a Ctrl-C that its ranks have received from the terminal already


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C (SIGINT); only a second one raises ``KeyboardInterrupt``.

    Outside of the main thread it has no effect, because signals are handled there.

    Yields:
        The event.
    """
    requested, first = threading.Event(), 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if not requested.is_set():
            first = now
            requested.set()
        elif now - first > _GRACE:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)
