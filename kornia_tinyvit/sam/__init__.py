"""Segment Anything on a TinyViT: masks from point, box and mask prompts, or of everything in an image."""

from kornia_tinyvit.sam.decoder import FoldedMaskDecoder, SharingMaskDecoder
from kornia_tinyvit.sam.embedding import Geometry, ImageEmbedding, MaskPrediction, fingerprint
from kornia_tinyvit.sam.generator import Mask, MaskGenerator
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.sam.prompter import MobileSAMPrompter

__all__ = [
    "FoldedMaskDecoder",
    "Geometry",
    "ImageEmbedding",
    "Mask",
    "MaskGenerator",
    "MaskPrediction",
    "MobileSAM",
    "MobileSAMPrompter",
    "SharingMaskDecoder",
    "fingerprint",
]
