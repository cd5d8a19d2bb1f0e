"""Visualization of feature maps, saliency, detections, masks and class maps."""

from kornia_tinyvit.visualization.drawing import (
    distinct_colors,
    draw_class_map,
    draw_detections,
    draw_overlay,
    save_image,
    save_rows,
)
from kornia_tinyvit.visualization.features import feature_colors, kernel_size, overlay_heatmap, saliency, stage_features
from kornia_tinyvit.visualization.figures import demo_augmentations, save_figure

__all__ = [
    "demo_augmentations",
    "distinct_colors",
    "draw_class_map",
    "draw_detections",
    "draw_overlay",
    "feature_colors",
    "kernel_size",
    "overlay_heatmap",
    "saliency",
    "save_figure",
    "save_image",
    "save_rows",
    "stage_features",
]
