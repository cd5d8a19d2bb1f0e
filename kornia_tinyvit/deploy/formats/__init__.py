"""Export formats, one module per format."""

__all__ = ["ExportError"]


class ExportError(RuntimeError):
    """A network cannot be exported, or the export does not reproduce its outputs."""
