"""Image processor for transformers: :class:`TinyVitImageProcessor`."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from kornia.enhance import normalize
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, load_image
from transformers.utils import TensorType
from transformers.utils.type_validators import device_validator, image_size_validator, tensor_type_validator

from kornia_tinyvit.images import check_images, open_image, to_floats
from kornia_tinyvit.preprocessing import (
    CROP_FRACTION,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    EvaluationPipeline,
    Preprocessing,
    resize_images,
)

__all__ = ["TinyVitImageProcessor"]


class TinyVitImageProcessorKwargs(TypedDict, total=False):
    """Arguments of :class:`TinyVitImageProcessor`."""

    do_resize: bool | None
    size: Annotated[int | list[int] | tuple[int, ...] | dict[str, int] | None, image_size_validator()]
    do_center_crop: bool | None
    crop_pct: float | None
    resample: int | None
    do_rescale: bool | None
    do_normalize: bool | None
    image_mean: list[float] | tuple[float, ...] | None
    image_std: list[float] | tuple[float, ...] | None
    input_data_format: str | ChannelDimension | None
    device: Annotated[str | torch.device | None, device_validator()]
    return_tensors: Annotated[str | TensorType | None, tensor_type_validator()]


class TinyVitImageProcessor(BaseImageProcessor):
    r"""Image processor with the transforms of :class:`~kornia_tinyvit.preprocessing.EvaluationPipeline`.

    It accepts URLs and images in any form that :func:`~kornia_tinyvit.images.open_image` takes: a single image, lists
    of images of any sizes, or batches. Unlike that function it also takes arrays :math:`(C, H, W)`, as other processors
    do. Tensors stay on their device and are differentiable.

    Args:
        do_resize: resize and crop; otherwise all images of a call must have the same size.
        size: output size ``{"height": S, "width": S}``.
        do_center_crop: resize the short side to ``S / crop_pct`` and crop the center; otherwise resize the whole image
            to ``size`` whatever its aspect ratio, as for the published networks from 384 pixels on.
        crop_pct: fraction of the resized short side that the crop keeps, in (0, 1].
        resample: Pillow's number of the interpolation: 3 (bicubic), 2 (bilinear) or 0 (nearest).
        do_rescale: divide uint8 images by 255. If ``False``, only floating point images are accepted.
        do_normalize: subtract the mean and divide by the standard deviation.
        image_mean: channel means for values in [0, 1].
        image_std: channel standard deviations.
        **kwargs: other fields that transformers stores.

    Example:
        >>> processor = TinyVitImageProcessor(size=64)
        >>> processor([torch.rand(3, 90, 120), torch.rand(3, 70, 50)])["pixel_values"].shape
        torch.Size([2, 3, 64, 64])
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers reads them from the class
    valid_kwargs = TinyVitImageProcessorKwargs
    do_resize = True
    size = {"height": 224, "width": 224}  # noqa: RUF012
    do_center_crop = True
    crop_pct = CROP_FRACTION
    resample = int(Image.Resampling.BICUBIC)
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @classmethod
    def from_preprocessing(cls, preprocessing: Preprocessing) -> TinyVitImageProcessor:
        """Create a processor from the preprocessing of a network.

        Args:
            preprocessing: ``preprocessing`` of a network, or ``settings`` of a pipeline.
        """
        crop = preprocessing.crop_fraction
        return cls(
            size=preprocessing.img_size,
            do_center_crop=crop is not None,
            crop_pct=crop or 1.0,
            resample=int(Image.Resampling[preprocessing.interpolation.upper()]),
            image_mean=list(preprocessing.mean),
            image_std=list(preprocessing.std),
        )

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return "kornia"

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Preprocess images.

        Args:
            images: an image or a sequence of images.
            **kwargs: settings for this call instead of those of the processor; ``device`` of the computation;
                ``input_data_format``, ``"channels_first"`` or ``"channels_last"``, for arrays of ambiguous shape;
                ``return_tensors="np"`` for arrays instead of tensors.

        Returns:
            ``pixel_values`` :math:`(B, C, S, S)`.

        Raises:
            TypeError: if an input is not an image, or has an unsupported data type.
            ValueError: if a file cannot be read, a shape is wrong, or values or a setting are out of range.
            FileNotFoundError: if a file does not exist.
        """
        validate_typed_dict(self.valid_kwargs, kwargs)
        settings = {name: getattr(self, name, None) for name in self._valid_kwargs_names} | kwargs
        settings = self._standardize_kwargs(**settings)
        singles = _flatten(images)
        if singles:
            tensors = [_to_tensor(image, settings) for image in singles]
            same = len({tensor.shape for tensor in tensors}) == 1
            batches = [torch.stack(tensors)] if same else [tensor[None] for tensor in tensors]
        elif isinstance(images, Tensor):
            batches = [images]  # an empty batch (0, C, H, W)
        else:
            raise ValueError("Got no images; pass a tensor (0, C, H, W) for an empty batch.")
        pixels = torch.cat([_evaluate(batch, settings) for batch in batches])
        if settings["return_tensors"] is not None and TensorType(settings["return_tensors"]) == TensorType.NUMPY:
            return BatchFeature({"pixel_values": pixels.detach().cpu().numpy()})
        return BatchFeature({"pixel_values": pixels})

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """Convert settings to their canonical types, without fields that this processor does not have."""
        settings = super()._standardize_kwargs(**kwargs, default_to_square=True)
        return {name: value for name, value in settings.items() if name in kwargs}


def _flatten(images: Any) -> list[Any]:
    """Split lists and batches into single images, and load URLs and base64 strings."""
    if isinstance(images, (list, tuple)):
        return [image for each in images for image in _flatten(each)]
    if isinstance(images, str) and images.startswith(("http://", "https://", "data:image/")):
        return [load_image(images)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _to_tensor(image: Any, settings: dict[str, Any]) -> Tensor:
    """Convert an image to a tensor :math:`(C, H, W)` in [0, 1]."""
    channels = len(settings["image_mean"])
    if isinstance(image, (Tensor, np.ndarray)) and image.ndim == 3:
        image = _standard_layout(image, channels, settings["input_data_format"])
    pixels = open_image(image, channels)
    if pixels.dtype == torch.uint8 and not settings["do_rescale"]:
        raise TypeError("With do_rescale=False images must be floating point in [0, 1]; got uint8. Divide them by 255.")
    return to_floats(pixels if settings["device"] is None else pixels.to(settings["device"]))


def _standard_layout(
    image: Tensor | NDArray[Any], channels: int, layout: str | ChannelDimension | None
) -> Tensor | NDArray[Any]:
    """Return tensors as :math:`(C, H, W)` and arrays as :math:`(H, W, C)`."""
    if isinstance(image, Tensor):
        return image if layout is None or ChannelDimension(layout) == ChannelDimension.FIRST else image.movedim(-1, 0)
    counts = (1, 3, 4, channels)
    if layout is None:
        last = image.shape[2] in counts or image.shape[0] not in counts
        layout = ChannelDimension.LAST if last else ChannelDimension.FIRST
    return image if ChannelDimension(layout) == ChannelDimension.LAST else np.moveaxis(image, 0, -1)


def _evaluate(images: Tensor, settings: dict[str, Any]) -> Tensor:
    """Resize, crop and normalize a batch :math:`(B, C, H, W)`."""
    mean, std = torch.tensor(settings["image_mean"]), torch.tensor(settings["image_std"])
    check_images(images, len(mean))
    if settings["do_resize"]:
        images = _resize(images, settings)
    return normalize(images, mean.to(images), std.to(images)) if settings["do_normalize"] else images


def _resize(images: Tensor, settings: dict[str, Any]) -> Tensor:
    height, width = settings["size"].height, settings["size"].width
    if height is None or width is None:
        raise ValueError(f"size must be an integer or {{'height': S, 'width': S}}; got {dict(settings['size'])}.")
    interpolation = Image.Resampling(settings["resample"]).name.lower()
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"resample must be 0, 2 or 3; got {settings['resample']!r}.")
    if not settings["do_center_crop"]:
        return resize_images(images, height, width, interpolation)
    if height != width:
        raise ValueError(f"Center crops must be square; got {height}x{width}. Pass do_center_crop=False for this size.")
    return EvaluationPipeline(height, settings["crop_pct"], interpolation=interpolation).resize_and_crop(images)
