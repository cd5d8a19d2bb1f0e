"""A network, a photo and settings that are the same everywhere, for the recorded masks of segment-anything."""

import numpy as np
import torch

from kornia_tinyvit.sam import MobileSAM

IMG_SIZE = 256
CONTRAST = 3.0

#: Random weights predict an IoU of anything; these thresholds leave some of the masks.
SETTINGS = {
    "grid": {"points_per_side": 8, "pred_iou_thresh": 0.2, "stability_score_thresh": 0.05, "box_nms_thresh": 0.95},
    "everything": {"points_per_side": 3, "pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1.0},
    "crops": {
        "points_per_side": 6,
        "pred_iou_thresh": 0.2,
        "stability_score_thresh": 0.05,
        "stability_score_offset": 0.5,
        "box_nms_thresh": 0.95,
        "crop_nms_thresh": 0.8,
        "crop_n_layers": 1,
        "crop_n_points_downscale_factor": 2,
    },
    "regions": {
        "points_per_side": 8,
        "pred_iou_thresh": 0.2,
        "stability_score_thresh": 0.05,
        "box_nms_thresh": 0.95,
        "crop_nms_thresh": 0.9,
        "min_mask_region_area": 60,
    },
}


@torch.no_grad()
def build_network() -> MobileSAM:
    """Return a small MobileSAM whose weights come from numpy's generator, which never changes."""
    random = np.random.RandomState(0)
    sam = MobileSAM.from_config("1m", img_size=IMG_SIZE).eval()
    for name, tensor in sorted(sam.state_dict().items()):
        noise = torch.from_numpy(random.standard_normal(tuple(tensor.shape)))
        if name.endswith("gaussian_matrix"):
            tensor.copy_(noise)
        elif name.endswith("weight") and tensor.ndim > 1:
            fan_in = tensor[0].numel() if "embed" not in name and "token" not in name.split(".")[-2] else 1
            tensor.copy_(1.5 * noise / fan_in**0.5)
        elif tensor.is_floating_point() and "running" not in name:
            tensor.copy_(name.endswith("weight") + 0.1 * noise)
    # As trained networks, it shall draw masks of large pieces: the image counts, and the pixels of a cell agree.
    sam.image_encoder.neck[3].weight.mul_(CONTRAST)
    for layer in sam.mask_decoder.output_upscaling[::3]:
        layer.weight.copy_(layer.weight[..., :1, :1].expand_as(layer.weight))
    return sam


def draw_photo() -> np.ndarray:
    """Return an image of waves, rectangles and noise, uint8 (150, 200, 3)."""
    rows, columns = np.mgrid[:150, :200]
    waves = np.stack([np.sin(rows / 9) + np.cos(columns / 13), np.sin((rows + columns) / 17), np.cos(rows / 23)], -1)
    photo = 110 + 40 * waves
    photo[30:80, 60:120] += (70, -50, 20)
    photo[90:140, 20:70] -= (60, 10, 70)
    photo[60:110, 130:180] += (-40, 60, -20)
    photo += np.random.RandomState(1).uniform(-12, 12, photo.shape)
    return photo.clip(0, 255).astype(np.uint8)
