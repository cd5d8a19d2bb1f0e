"""Segment Anything on a TinyViT: masks for points and boxes, or for everything in an image."""

from kornia_tinyvit.sam.decoder import FoldedMaskDecoder, SharingMaskDecoder
from kornia_tinyvit.sam.embedding import Geometry, ImageEmbedding, fingerprint
from kornia_tinyvit.sam.generator import Mask, generate_masks
from kornia_tinyvit.sam.model import MaskPrediction, MobileSAM, MobileSAMPrompter

__all__ = [
    "FoldedMaskDecoder",
    "Geometry",
    "ImageEmbedding",
    "Mask",
    "MaskPrediction",
    "MobileSAM",
    "MobileSAMPrompter",
    "SharingMaskDecoder",
    "fingerprint",
    "generate_masks",
]
