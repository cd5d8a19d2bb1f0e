"""Resizing and cropping inside an exported graph, for images of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kornia_tinyvit.preprocessing import EvaluationPipeline

__all__ = ["ResizeAndCrop"]

_ROUNDING = 1e-6  # tolerance of the range for rounding errors, as in EvaluationPipeline


class ResizeAndCrop(nn.Module):
    r"""Exportable resizing and center crop of an :class:`~kornia_tinyvit.preprocessing.EvaluationPipeline`.

    Each direction is one matrix product with the antialiased kernel weights of the cropped pixels, which are computed
    from the image size by standard operators: one exported graph serves every size. OpenVINO ignores the antialiasing
    of ONNX's ``Resize``, and a crop cannot be folded into it.

    The outputs equal those of :meth:`EvaluationPipeline.resize_and_crop` within 1e-4 of the range, with one exception:
    with dynamic height and width the width is always resized first. Like Pillow, the pipeline starts with the height
    if that removes more than twice as many pixels: in images more than twice as high as wide, and without a crop in
    most portrait images. The order matters only where overshoot of the kernel is clamped in between: on COCO128 by
    at most 0.06 per pixel, and by less than 2e-4 in the mean of an image.

    Args:
        pipeline: the pipeline whose ``img_size``, ``crop_fraction`` and interpolation are used.
        max_value: the maximum pixel value: 1 for floats in [0, 1], 255 for uint8.

    Raises:
        ValueError: if the interpolation is neither bicubic nor bilinear.

    Example:
        >>> ResizeAndCrop(EvaluationPipeline(224))(torch.rand(1, 3, 480, 640)).shape
        torch.Size([1, 3, 224, 224])
    """

    def __init__(self, pipeline: EvaluationPipeline, max_value: float = 1.0) -> None:
        super().__init__()
        self.img_size = pipeline.img_size
        self.short = None if pipeline.crop_fraction is None else int(pipeline.img_size / pipeline.crop_fraction)
        self.max_value = max_value
        interpolation = pipeline.settings.interpolation
        if interpolation not in _KERNELS:
            raise ValueError(f"Export supports {' or '.join(_KERNELS)} interpolation; got {interpolation}.")
        self.kernel = _KERNELS[interpolation]

    def forward(self, images: Tensor) -> Tensor:
        """Map images :math:`(B, C, H, W)` in [0, max_value] to :math:`(B, C, S, S)` in the same range.

        Integers become float32; floating-point images keep their dtype.

        Args:
            images: images :math:`(B, C, H, W)`.
        """
        dtype = images.dtype if images.is_floating_point() else torch.float32
        exact = torch.promote_types(dtype, torch.float32)
        height, width = images.shape[-2:]
        new_height, new_width = self._resized(height, height, width), self._resized(width, height, width)
        # Quantizers of whole graphs leave float64 alone: positions and kernels in 8 bits would be meaningless.
        precise = exact if images.device.type == "mps" else torch.float64  # which MPS does not support
        rows = self._weights(height, new_height, precise, images.device).to(exact)
        columns = self._weights(width, new_width, precise, images.device).to(exact)
        pixels = images.to(exact)
        static = not (isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt))
        if static and height - new_height > max(0, 2 * (width - new_width)):
            pixels = self._clamp(self._clamp(rows @ pixels) @ columns.mT)
        else:
            pixels = self._clamp(rows @ self._clamp(pixels @ columns.mT))
        return pixels.to(dtype)

    def extra_repr(self) -> str:
        """Show the geometry and the range."""
        return f"img_size={self.img_size}, short={self.short}, max_value={self.max_value}"

    def _resized(self, length: int, height: int, width: int) -> int:
        """Return the length of a side after resizing, before the crop."""
        if self.short is None:
            return self.img_size
        return self.short * length // torch.sym_min(height, width)

    def _clamp(self, pixels: Tensor) -> Tensor:
        return pixels.clamp(-_ROUNDING * self.max_value, (1 + _ROUNDING) * self.max_value)

    def _weights(self, length: int, resized: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        r"""Return the weight of each input pixel of a side for each cropped output pixel, :math:`(S, length)`.

        The output pixel :math:`i` lies at :math:`(i + 1/2) \cdot length / resized` of the input. This is split into an
        integer and a remainder, which keeps distances exact for any image size, and accurate to rounding in bfloat16.
        """
        margin = resized - self.img_size
        first = (margin + margin // 2 % 2) // 2  # half of the margin, rounded half to even
        doubled = (2 * (torch.arange(self.img_size, device=device) + first) + 1) * length
        integer = doubled // (2 * resized)
        remainder = (doubled - 2 * resized * integer).to(dtype) / (2 * resized)
        pixels = torch.arange(length, dtype=torch.int32, device=device)
        distance = (pixels - integer.to(torch.int32).unsqueeze(1)).to(dtype) + (0.5 - remainder).unsqueeze(1)
        weights = self.kernel(distance / torch.sym_max(1.0, length / resized))
        return weights / weights.sum(1, keepdim=True)


def _bicubic(distance: Tensor) -> Tensor:
    """Return Keys' kernel with a = -1/2, as in Pillow and torch with antialiasing (Keys, 1981, equation 15)."""
    t = distance.abs().clamp(max=2)
    return torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2)


def _bilinear(distance: Tensor) -> Tensor:
    """Return the triangle kernel."""
    return (1 - distance.abs()).clamp(min=0)


_KERNELS = {"bicubic": _bicubic, "bilinear": _bilinear}
