"""Optional packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MissingExtraError", "optional_imports"]


class MissingExtraError(ImportError):
    """An optional package is needed that is not installed."""


@contextmanager
def optional_imports(need: str, install: str) -> Iterator[None]:
    """Import optional packages in a block, with an error that states how to install those that are missing.

    Args:
        need: what needs which package, such as ``"Training needs accelerate"``.
        install: what pip is given.

    Raises:
        MissingExtraError: if an import fails.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{need}: pip install {install}.") from error
