"""The formats of exported files, one file each."""

__all__ = ["ExportError"]


class ExportError(RuntimeError):
    """A network cannot be exported, or what was exported does not do what the network does."""
