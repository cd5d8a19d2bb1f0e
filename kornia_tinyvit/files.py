"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


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
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
