"""Files that are written whole or not at all, locks between processes, and settings compared with those of a file."""

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
    """Turn what writers say of a full disk, or of another failure of the system, into one error that names the file.

    The writers of safetensors and of torch's archives are Rust and C++ and raise errors of their own, and a file that
    is open already has no name in its errors.

    Args:
        path: what is written, for the message.

    Raises:
        OSError: with its number, its reason and ``path``.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _system_error(error: Exception) -> int | None:
    """Return the number of the system's error behind a writer's, or ``None``."""
    if isinstance(error, OSError):
        return error.errno
    if told := re.search(r"\(os error (\d+)\)", str(error)):  # Rust's way
        return int(told[1])
    # torch counts what it could write, and keeps the reason to itself; there is hardly another.
    return errno.ENOSPC if "inline_container.cc" in str(error) and "unexpected pos" in str(error) else None


@contextmanager
def replacing(path: str | Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Give a file beside ``path`` to write, which takes its place when the block ends well.

    A killed process or a machine without power leaves the old file or the new one, and perhaps a hidden leftover
    ``.NAME.*.tmp``; a block that ends in an error leaves nothing.

    Args:
        path: the file to replace; its folder is made.
        suffix: how the name to write ends, for writers and readers that go by it.

    Yields:
        The file to write, which is not there yet, so that whoever makes it gives it the permissions of a new file.

    Raises:
        OSError: as :func:`writing` does, if the system lets it not be written.
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
    """Write a text in UTF-8, whole or not at all.

    Args:
        path: the file to replace; its folder is made.
        text: what it holds then.

    Raises:
        OSError: as :func:`writing` does, if the system lets it not be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: str | Path, message: str, error: type[Exception] = BlockingIOError) -> Iterator[None]:
    """Hold a lock file to the exclusion of other processes; it is released when the process ends, however it ends.

    Args:
        path: the lock file; its folder is created.
        message: text of the error.
        error: its class.

    Raises:
        Exception: ``error``, if another process holds the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise error(message) from None
    try:
        yield
    finally:
        lock.release()


def describe_differences(
    stored: Mapping[str, Any],
    current: Mapping[str, Any],
    prefix: str = "",
    words: tuple[str, str] = ("the store has", "this pipeline"),
) -> list[str]:
    """Return a line for each difference between two nested settings, names joined by dots.

    Args:
        stored: settings as a file has them.
        current: settings now.
        prefix: put before every name.
        words: how the lines call the two.

    Returns:
        The lines; none if both are the same in JSON.

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
