"""Atomic writes, locks between processes, and comparison of settings with stored ones."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = ["describe_differences", "locked", "replacing", "write_text", "writing"]


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Convert system errors of any writer, such as a full disk, to an OSError with the path.

    safetensors and torch raise their own types of errors from Rust and C++, and the errors of an open file have no
    path.

    Args:
        path: the file that the block writes.

    Raises:
        OSError: with errno, reason and ``path``, if the block raised a system error.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _system_error(error: Exception) -> int | None:
    """Return the errno of the system error that a writer's error reports, or ``None``."""
    if isinstance(error, OSError):
        return error.errno
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # Rust
        return int(match[1])
    # torch reports a short write without its reason; a full disk is by far the most common.
    return errno.ENOSPC if "inline_container.cc" in str(error) and "unexpected pos" in str(error) else None


@contextmanager
def replacing(path: str | Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Write a file atomically: yield a temporary path that replaces ``path`` after the block.

    An error in the block removes the temporary file. A killed process or a power failure leaves the old or the new
    file, and possibly the temporary file ``.NAME.*.tmp``.

    Args:
        path: the file to replace; its folder is created.
        suffix: suffix of the temporary path, for writers that depend on it.

    Yields:
        The temporary path, which does not exist yet.

    Raises:
        OSError: if the file cannot be written; see :func:`writing`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 atomically.

    Args:
        path: the file to replace; its folder is created.
        text: the new content.

    Raises:
        OSError: if the file cannot be written; see :func:`writing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: str | Path, message: str, error: type[Exception] = BlockingIOError) -> Iterator[None]:
    """Hold a lock file exclusively for a block; the system releases it when the process ends in any way.

    Args:
        path: the lock file; its folder is created.
        message: message of the error.
        error: class of the error.

    Raises:
        Exception: ``error(message)``, if another process holds the lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise error(message) from None
    with lock:
        yield


def describe_differences(
    stored: Mapping[str, Any],
    current: Mapping[str, Any],
    prefix: str = "",
    words: tuple[str, str] = ("the store has", "this pipeline"),
) -> list[str]:
    """Describe the differences between two nested dictionaries, one line per value.

    Args:
        stored: settings of a file.
        current: settings to compare them with.
        prefix: prefix of every name.
        words: the words before the stored and the current value.

    Returns:
        The lines, with the names of nested settings joined by dots; none if both are equal in JSON.

    Example:
        >>> describe_differences({"crop": {"scale": [0.08, 1.0]}}, {"crop": {"scale": (0.5, 1.0)}})
        ['crop.scale: the store has [0.08, 1.0], this pipeline [0.5, 1.0]']
    """
    lines = []
    for name in [*stored, *(name for name in current if name not in stored)]:
        ours, theirs = (json.loads(json.dumps(each[name])) if name in each else "nothing" for each in (stored, current))
        if isinstance(ours, dict) and isinstance(theirs, dict):
            lines += describe_differences(ours, theirs, f"{prefix}{name}.", words)
        elif (name in stored) != (name in current) or ours != theirs:
            lines.append(f"{prefix}{name}: {words[0]} {ours}, {words[1]} {theirs}")
    return lines
