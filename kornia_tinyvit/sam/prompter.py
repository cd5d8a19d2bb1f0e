"""kornia's ``VisualPrompter`` for MobileSAM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kornia.augmentation as K
import torch
from kornia.contrib.visual_prompter import VisualPrompter
from kornia.models.sam import SamConfig
from kornia.models.structures import SegmentationResults
from torch import Tensor

from kornia_tinyvit.images import Images, list_images, read_image
from kornia_tinyvit.modules import evaluation_copy
from kornia_tinyvit.sam.embedding import Geometry, ImageEmbedding, fingerprint
from kornia_tinyvit.sam.transforms import PIXEL_MEAN, PIXEL_STD

__all__ = ["MobileSAMPrompter"]


class MobileSAMPrompter(VisualPrompter):
    """kornia's ``VisualPrompter`` over an existing network; returned by :meth:`MobileSAM.prompter`.

    Unlike kornia's, it can return the image embedding and accept one instead of an image, and it evaluates a network
    in training mode as in evaluation mode, without changing it.

    Args:
        model: the :class:`MobileSAM`.

    Raises:
        ValueError: if the model input is not square, which kornia's prompter requires.
    """

    model: Any

    def __init__(self, model: Any) -> None:
        height, width = model.img_size
        if height != width:
            raise ValueError(
                f"kornia's prompter needs a square model input; the input of this network is {height}x{width}. Use "
                "embed and predict_masks, or a square img_size."
            )
        # The base class always builds a network: a small one on the meta device costs no memory and no random numbers.
        with torch.device("meta"):
            super().__init__(SamConfig(None, None, False, 8, 1, 1, (0,)))
        first = next(model.parameters())
        self.model = model
        self.device, self.dtype = first.device, first.dtype
        self.pixel_mean, self.pixel_std = first.new_tensor(PIXEL_MEAN), first.new_tensor(PIXEL_STD)
        resize = K.Resize(height, side="long", align_corners=False, antialias=True)
        self.transforms = K.AugmentationSequential(resize, same_on_batch=True)
        model.image_encoder.img_size = height  # read by the base class

    def set_image(self, image: Images, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        """Compute the embedding of an image.

        Args:
            image: one image in any form that :func:`~kornia_tinyvit.images.open_image` takes, or a batch of one.
            mean: channel means, by default those of segment-anything.
            std: channel standard deviations, by default those of segment-anything.

        Raises:
            TypeError, FileNotFoundError: as :func:`~kornia_tinyvit.images.open_image`.
            ValueError: as that function, or if there is not one image.
        """
        images = list_images(image)
        if len(images) != 1:
            raise ValueError(f"Expected one image; got {len(images)}. Use MobileSAM.embed for several.")
        with self._evaluation():
            super().set_image(read_image(images[0]).to(self.device, self.dtype), mean, std)

    def predict(self, *args: Any, **kwargs: Any) -> SegmentationResults:
        """Predict masks for prompts on the current image.

        Args:
            *args: arguments of kornia's ``VisualPrompter.predict``.
            **kwargs: its keyword arguments.

        Returns:
            Logits and scores.
        """
        with self._evaluation():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        network = self.model
        self.model = evaluation_copy(network)
        try:
            yield
        finally:
            self.model = network

    def embedding(self) -> ImageEmbedding:
        """Return the embedding of the current image.

        Raises:
            RuntimeError: if no image is set.
        """
        sizes = (self._original_image_size, self._input_image_size)
        if sizes[0] is None or sizes[1] is None:
            raise RuntimeError("There is no image: call set_image or set_embedding first.")
        geometry = Geometry(sizes[0], sizes[1], self.model.img_size)
        return ImageEmbedding(self.image_embeddings, (geometry,), fingerprint(self.model.image_encoder))

    def set_embedding(self, embedding: ImageEmbedding) -> None:
        """Set an image embedding in place of :meth:`set_image`.

        Args:
            embedding: embedding of one image, from :meth:`embedding` or :meth:`MobileSAM.embed`.

        Raises:
            ValueError: if it is not of one image, or of another input size or other encoder weights.
        """
        if len(embedding) != 1:
            raise ValueError(f"Expected the embedding of one image; got {len(embedding)}. Select one, as in e[0].")
        self.model.check_embedding(embedding)
        self.reset_image()
        (geometry,) = embedding.geometries
        first = next(self.model.mask_decoder.parameters())
        self.image_embeddings = embedding.features.to(first.device, first.dtype)
        self._original_image_size, self._input_image_size = geometry.original_size, geometry.input_size
        self._input_encoder_size = geometry.img_size
        precise = torch.promote_types(first.dtype, torch.float32)
        self._prompt_scale = geometry.map_points(first.new_ones(2, dtype=precise))
        self.is_image_set = True

    def _valid_masks(self, masks: Tensor) -> Tensor:
        side = self.model.img_size[0] // 4
        if masks.ndim != 4 or tuple(masks.shape[1:]) != (1, side, side):
            raise ValueError(f"Masks must be (K, 1, {side}, {side}); got {tuple(masks.shape)}.")
        return masks
