"""Images into what a network takes, as transformers does it: :class:`TinyVitImageProcessor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from kornia.enhance import normalize
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, load_image
from transformers.utils import TensorType
from transformers.utils.type_validators import device_validator, image_size_validator, tensor_type_validator

from kornia_tinyvit.checkpoints.hub import PIL_RESAMPLING
from kornia_tinyvit.images import check_images, to_image
from kornia_tinyvit.preprocessing import (
    CROP_FRACTION,
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvaluationPipeline,
    Preprocessing,
    resize_images,
)

__all__ = ["TinyVitImageProcessor"]


class TinyVitImageProcessorKwargs(TypedDict, total=False):
    """What :class:`TinyVitImageProcessor` is told when it is built or called."""

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
    r"""The evaluation of :class:`~kornia_tinyvit.preprocessing.EvaluationPipeline` as an image processor.

    It takes files and URLs, PIL images, arrays and tensors: one, lists of any sizes, or batches :math:`(B, C, H, W)`.
    Levels of 8 bits are divided by 255; floating point images are in [0, 1], as kornia's are. Tensors stay on their
    device and have gradients. Gray arrays are repeated for a network of color images.

    Args:
        do_resize: resize and crop; otherwise the images of a call must have one size.
        size: ``{"height": S, "width": S}`` of what comes out.
        do_center_crop: resize the short side to ``S / crop_pct`` and crop the center; otherwise the whole image is
            resized to ``size`` whatever its aspect ratio, as the networks from 384 pixels on are evaluated.
        crop_pct: share of the resized short side that the crop keeps, in (0, 1].
        resample: Pillow's number of the interpolation: 3 (bicubic), 2 (bilinear) or 0 (nearest).
        do_rescale: divide levels by 255. Without it whole numbers are refused; floating point images never change.
        do_normalize: subtract the mean and divide by the deviation.
        image_mean: channel means, for values in [0, 1]; as many as the network has channels.
        image_std: channel deviations.
        **kwargs: what transformers stores beside them.

    Example:
        >>> processor = TinyVitImageProcessor(size=64)
        >>> processor([torch.rand(3, 90, 120), torch.rand(3, 70, 50)])["pixel_values"].shape
        torch.Size([2, 3, 64, 64])
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers reads them from the class
    valid_kwargs = TinyVitImageProcessorKwargs  # type: ignore[assignment]
    do_resize = True
    size = {"height": 224, "width": 224}  # noqa: RUF012
    do_center_crop = True
    crop_pct = CROP_FRACTION
    resample = PIL_RESAMPLING["bicubic"]
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @classmethod
    def from_preprocessing(cls, preprocessing: Preprocessing) -> TinyVitImageProcessor:
        """Return the processor that does what a network's ``preprocessing`` says.

        Args:
            preprocessing: that of a network, or the ``settings`` of a pipeline.
        """
        crop = preprocessing.crop_fraction
        return cls(
            size=preprocessing.img_size,
            do_center_crop=crop is not None,
            crop_pct=crop or 1.0,
            resample=PIL_RESAMPLING[preprocessing.interpolation],
            image_mean=list(preprocessing.mean),
            image_std=list(preprocessing.std),
        )

    @property
    def backend(self) -> str:
        """The name of what does the work."""
        return "kornia"

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Prepare images.

        Args:
            images: one image or several.
            **kwargs: other values than the processor's own for this call; ``device`` for where to work;
                ``input_data_format``, ``"channels_first"`` or ``"channels_last"``, where an array's shape leaves that
                open; ``return_tensors="np"`` for arrays instead of tensors.

        Returns:
            ``pixel_values`` :math:`(B, C, S, S)`.

        Raises:
            TypeError: if something is no image, or has numbers of another kind.
            ValueError: if a shape is wrong, or a setting out of its range.
        """
        validate_typed_dict(self.valid_kwargs, kwargs)  # type: ignore[type-var]
        settings = {name: getattr(self, name, None) for name in self._valid_kwargs_names} | kwargs
        settings = self._standardize_kwargs(**settings)
        singles = _flatten(images)
        if singles:
            tensors = [_to_tensor(image, settings) for image in singles]
            same = len({tensor.shape for tensor in tensors}) == 1
            batches = [torch.stack(tensors)] if same else [tensor[None] for tensor in tensors]
        elif isinstance(images, Tensor):
            batches = [images]  # a batch of none, which keeps its channels
        else:
            raise ValueError("Got no images; an empty batch is a tensor (0, C, H, W).")
        done = torch.cat([_evaluate(batch, settings) for batch in batches])
        if settings["return_tensors"] is not None and TensorType(settings["return_tensors"]) == TensorType.NUMPY:
            return BatchFeature({"pixel_values": done.detach().cpu().numpy()})
        return BatchFeature({"pixel_values": done})

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Bring settings into one form, without those of transformers that do not exist here."""
        done = super()._standardize_kwargs(**kwargs, default_to_square=True)
        return {name: value for name, value in done.items() if name in kwargs}


def _flatten(images: Any) -> list[Any]:
    """Return single images; what is no list and no batch is one."""
    if isinstance(images, (list, tuple)):
        return [image for each in images for image in _flatten(each)]
    if isinstance(images, (str, Path)):
        return [load_image(str(images))]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _to_tensor(image: Any, settings: dict[str, Any]) -> Tensor:
    """Return an image :math:`(C, H, W)` in [0, 1]."""
    channels = len(settings["image_mean"])
    if isinstance(image, Image.Image):
        tensor = to_image(image, channels)
    elif isinstance(image, (Tensor, np.ndarray)):
        tensor = _scale(image if isinstance(image, Tensor) else torch.tensor(image), settings["do_rescale"])
        if isinstance(image, np.ndarray) and tensor.numel() and tensor.max() > 1:
            raise ValueError(
                f"Floating point images are in [0, 1]; got {tensor.max():.4g}. Divide levels by 255, or pass uint8."
            )
        tensor = _channels_first(tensor, channels, settings["input_data_format"])
    else:
        raise TypeError(f"An image is a file, a PIL image, an array or a tensor; got {type(image).__name__}.")
    if tensor.shape[0] == 1:
        tensor = tensor.expand(channels, -1, -1)
    return tensor if settings["device"] is None else tensor.to(settings["device"])


def _scale(image: Tensor, do_rescale: bool) -> Tensor:
    if image.is_floating_point():
        return image
    if image.dtype != torch.uint8 or not do_rescale:
        told = "" if do_rescale else " and do_rescale=False, which leaves only the latter"
        raise TypeError(f"Images are uint8 or floating point in [0, 1]; got {image.dtype}{told}.")
    return image.float() / 255


def _channels_first(image: Tensor, channels: int, layout: str | ChannelDimension | None) -> Tensor:
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"An image must be (C, H, W), (H, W, C) or (H, W); got {tuple(image.shape)}.")
    if layout is None:
        if not {channels, 1} & {image.shape[0], image.shape[2]}:
            raise ValueError(f"An image must have {channels} channels, or 1; got {tuple(image.shape)}.")
        layout = ChannelDimension.FIRST if image.shape[0] in (channels, 1) else ChannelDimension.LAST
    return image.movedim(-1, 0) if ChannelDimension(layout) == ChannelDimension.LAST else image


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
        raise ValueError(f"size must be a number or {{'height': S, 'width': S}}; got {dict(settings['size'])}.")
    names = {number: name for name, number in PIL_RESAMPLING.items()}
    if settings["resample"] not in names:
        raise ValueError(f"resample is one of {', '.join(map(str, names))}; got {settings['resample']!r}.")
    interpolation = names[settings["resample"]]
    if not settings["do_center_crop"]:
        return resize_images(images, height, width, interpolation)
    if height != width:
        raise ValueError(f"A crop is square; got {height}x{width}. For an oblong size pass do_center_crop=False.")
    return EvaluationPipeline(height, settings["crop_pct"], interpolation=interpolation).resize_and_crop(images)
