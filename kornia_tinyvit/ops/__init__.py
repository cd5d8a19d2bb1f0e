"""Operators on tensors that depend on no network: run-length codes and regions of masks."""

from kornia_tinyvit.ops.regions import remove_small_regions
from kornia_tinyvit.ops.rle import RLE, compress_rle, decode_rle, encode_rle, rle_area, uncompress_rle

__all__ = [
    "RLE",
    "compress_rle",
    "decode_rle",
    "encode_rle",
    "remove_small_regions",
    "rle_area",
    "uncompress_rle",
]
