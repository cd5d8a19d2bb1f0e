"""The page of ``kornia-tinyvit demo --web``: what it shows, and how it lies on the screen (needs gradio)."""

from kornia_tinyvit.web.pictures import (
    MAX_BYTES,
    MAX_PIXELS,
    Changes,
    Marks,
    Photo,
    augment,
    compare,
    explain,
    open_photo,
    segment_everything,
    segment_marks,
    show_features,
)

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "Changes",
    "Marks",
    "Photo",
    "augment",
    "compare",
    "explain",
    "open_photo",
    "segment_everything",
    "segment_marks",
    "show_features",
]
