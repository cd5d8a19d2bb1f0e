"""Operators on tensors: run-length encoding, connected regions and boxes of masks."""

from kornia_tinyvit.ops.boxes import central_points, mask_boxes, mask_ious, nms
from kornia_tinyvit.ops.regions import remove_small_regions
from kornia_tinyvit.ops.rle import RLE, compress_rle, decode_rle, encode_rle, rle_area, uncompress_rle

__all__ = [
    "RLE",
    "central_points",
    "compress_rle",
    "decode_rle",
    "encode_rle",
    "mask_boxes",
    "mask_ious",
    "nms",
    "remove_small_regions",
    "rle_area",
    "uncompress_rle",
]
