"""Pictures into what MobileSAM takes, and its masks back: transformers' processor without torchvision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from kornia_tinyvit.ops import RLE, decode_rle, suppress_boxes

__all__ = ["TinyVitSamImageProcessor"]


class TinyVitSamImageProcessor(SamImageProcessorPil):
    """transformers' image processor of SAM, whose pipeline for masks of everything works without torchvision.

    Args:
        **kwargs: as ``SamImageProcessorPil`` takes them.
    """

    @classmethod
    def from_size(cls, image_size: int) -> TinyVitSamImageProcessor:
        """Return the processor for inputs of some size.

        Args:
            image_size: side in pixels of the square input, a multiple of 16.
        """
        masks = image_size // 4
        return cls(
            size={"longest_edge": image_size},
            pad_size={"height": image_size, "width": image_size},
            mask_size={"longest_edge": masks},
            mask_pad_size={"height": masks, "width": masks},
        )

    def post_process_for_mask_generation(
        self, all_masks: list[RLE], all_scores: Tensor, all_boxes: Tensor, crops_nms_thresh: float
    ) -> tuple[list[NDArray[np.bool_]], Tensor, list[RLE], Tensor]:
        """Keep the best of masks whose boxes lie on each other.

        Args:
            all_masks: :math:`N` masks, run-length encoded.
            all_scores: their scores :math:`(N,)`.
            all_boxes: their boxes :math:`(N, 4)`, left, top, right and bottom.
            crops_nms_thresh: of boxes with a larger IoU, only that of the best mask is kept.

        Returns:
            The masks that are kept, as arrays :math:`(H, W)`, the best first; their scores, encodings and boxes.
        """
        kept = suppress_boxes(all_boxes.cpu(), all_scores.cpu(), crops_nms_thresh)
        encoded = [all_masks[index] for index in kept.tolist()]
        return [decode_rle(mask) for mask in encoded], all_scores[kept], encoded, all_boxes[kept]
