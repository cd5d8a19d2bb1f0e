"""Images of what a network sees and finds: features, saliency, detections and masks."""

from kornia_tinyvit.visualization.drawing import distinct_colors, draw_detections, draw_overlay, save_image, save_rows
from kornia_tinyvit.visualization.features import blur_size, feature_colors, overlay_heat, saliency, stage_features
from kornia_tinyvit.visualization.sheets import demo_augmentations, save_sheet

__all__ = [
    "blur_size",
    "demo_augmentations",
    "distinct_colors",
    "draw_detections",
    "draw_overlay",
    "feature_colors",
    "overlay_heat",
    "saliency",
    "save_image",
    "save_rows",
    "save_sheet",
    "stage_features",
]
