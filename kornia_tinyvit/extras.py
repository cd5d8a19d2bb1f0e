"""Optional packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MissingExtraError", "optional_imports"]


class MissingExtraError(ImportError):
    """A required optional package is not installed."""


@contextmanager
def optional_imports(need: str, install: str) -> Iterator[None]:
    """Convert an ImportError of a block to an error with installation instructions.

    Args:
        need: the start of the message, such as ``"Training needs accelerate"``.
        install: the arguments of ``pip install``.

    Raises:
        MissingExtraError: if an import of the block fails.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{need}: pip install {install}.") from error
