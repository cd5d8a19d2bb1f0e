"""kornia's visual prompter over MobileSAM."""

from __future__ import annotations

from typing import Any

import kornia.augmentation as K
import torch
from kornia.contrib.visual_prompter import VisualPrompter
from kornia.models.sam import SamConfig
from torch import Tensor

from kornia_tinyvit.sam.embedding import Geometry, ImageEmbedding, fingerprint
from kornia_tinyvit.sam.transforms import PIXEL_MEAN, PIXEL_STD

__all__ = ["MobileSAMPrompter"]


class MobileSAMPrompter(VisualPrompter):
    """kornia's ``VisualPrompter`` over a network that is there already; made by :meth:`MobileSAM.prompter`.

    What the encoder saw of its photo can be taken out, saved, and set again.

    Args:
        model: the :class:`MobileSAM`.

    Raises:
        ValueError: if its input is not square, which the prompter's always is.
    """

    model: Any

    def __init__(self, model: Any) -> None:
        height, width = model.img_size
        if height != width:
            raise ValueError(
                f"kornia's prompter pads photos to a square, and the input of this network is {height}x{width}; use "
                "embed and predict_masks, or a square img_size."
            )
        # It insists on building a network of its own: a small one, which takes neither memory nor random numbers.
        with torch.device("meta"):
            super().__init__(SamConfig(None, None, False, 8, 1, 1, (0,)))
        first = next(model.parameters())
        self.model = model
        self.device, self.dtype = first.device, first.dtype
        self.pixel_mean, self.pixel_std = first.new_tensor(PIXEL_MEAN), first.new_tensor(PIXEL_STD)
        resize = K.Resize(height, side="long", align_corners=False, antialias=True)
        self.transforms = K.AugmentationSequential(resize, same_on_batch=True)
        self.mask_side = height // 4
        model.image_encoder.img_size = height  # what it asks an encoder for

    def embedding(self) -> ImageEmbedding:
        """Return what the encoder saw of the photo that was set.

        Raises:
            RuntimeError: if none was.
        """
        sizes = (self._original_image_size, self._input_image_size)
        if sizes[0] is None or sizes[1] is None:
            raise RuntimeError("There is no photo: call set_image or set_embedding first.")
        geometry = Geometry(sizes[0], sizes[1], self.model.img_size)
        return ImageEmbedding(self.image_embeddings, (geometry,), fingerprint(self.model.image_encoder))

    def set_embedding(self, embedding: ImageEmbedding) -> None:
        """Take what an encoder saw before instead of :meth:`set_image`.

        Args:
            embedding: one photo's, from :meth:`embedding` or :meth:`MobileSAM.embed`.

        Raises:
            ValueError: if it is of more or fewer photos, of another input size, or of an encoder with other weights.
        """
        if len(embedding) != 1:
            raise ValueError(f"The prompter has one photo; the embedding is of {len(embedding)}. Take one, as in e[0].")
        self.model.check_embedding(embedding)
        self.reset_image()
        (geometry,) = embedding.geometries
        first = next(self.model.mask_decoder.parameters())
        self.image_embeddings = embedding.features.to(first.device, first.dtype)
        self._original_image_size, self._input_image_size = geometry.original_size, geometry.input_size
        self._input_encoder_size = geometry.img_size
        precise = torch.promote_types(first.dtype, torch.float32)
        self._prompt_scale = geometry.map_points(torch.ones(2, device=first.device, dtype=precise))
        self.is_image_set = True

    def _valid_masks(self, masks: Tensor) -> Tensor:
        side = self.mask_side
        if masks.ndim != 4 or tuple(masks.shape[1:]) != (1, side, side):
            raise ValueError(f"Masks must be (K, 1, {side}, {side}); got {tuple(masks.shape)}.")
        return masks
