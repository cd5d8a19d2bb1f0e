"""Segmentation: what is at a point, in a box, or anywhere in a photo.

:class:`MobileSAM` finds masks for prompts and, by :func:`generate_masks`, for everything; :class:`ImageEmbedding` keeps
what its encoder saw of photos.
"""

from kornia_tinyvit.segmentation.automatic import Mask, generate_masks
from kornia_tinyvit.segmentation.decoder import FoldedMaskDecoder, SharingMaskDecoder
from kornia_tinyvit.segmentation.embedding import Geometry, ImageEmbedding, fingerprint
from kornia_tinyvit.segmentation.export import export_mobile_sam
from kornia_tinyvit.segmentation.mobile_sam import MaskPrediction, MobileSAM, MobileSAMPrompter
from kornia_tinyvit.segmentation.overlay import distinct_colors, draw_overlay
from kornia_tinyvit.segmentation.regions import remove_small_regions
from kornia_tinyvit.segmentation.rle import RLE, compress_rle, decode_rle, encode_rle, rle_area, uncompress_rle
from kornia_tinyvit.segmentation.semantic import MlpDecoder, SegmenterConfig, SemanticSegmenter

__all__ = [
    "RLE",
    "FoldedMaskDecoder",
    "Geometry",
    "ImageEmbedding",
    "Mask",
    "MaskPrediction",
    "MlpDecoder",
    "MobileSAM",
    "MobileSAMPrompter",
    "SegmenterConfig",
    "SemanticSegmenter",
    "SharingMaskDecoder",
    "compress_rle",
    "decode_rle",
    "distinct_colors",
    "draw_overlay",
    "encode_rle",
    "export_mobile_sam",
    "fingerprint",
    "generate_masks",
    "remove_small_regions",
    "rle_area",
    "uncompress_rle",
]
