"""Resizing and cropping photos inside a graph that takes them at any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kornia_tinyvit.preprocessing import EvaluationPipeline

__all__ = ["ResizeAndCrop"]

_ROUNDING = 1e-6  # what a sum over pure white may exceed the range by, as in EvaluationPipeline


class ResizeAndCrop(nn.Module):
    r"""The resizing and cropping of an :class:`~kornia_tinyvit.preprocessing.EvaluationPipeline`, for export.

    Each direction is one matrix product with the weights of the antialiased kernel, computed from the size of
    the photo by ordinary operators, so that one exported graph serves every size. Only what the crop keeps is computed.
    ONNX's ``Resize`` would do, but OpenVINO ignores its antialiasing, and a crop could not be folded into it.

    The results are those of :meth:`EvaluationPipeline.resize_and_crop` within 1e-4 of the range. The one exception: a
    graph whose height and width are open always resizes the width first, where the pipeline, as Pillow, takes the
    height first if that loses more than twice as many pixels: photos more than twice as high as wide, and without a
    crop most portraits. The two orders differ where the kernel's overshoot at sharp edges is clamped in between: on
    the photos of COCO128 by 0.06 at most, and by less than 2e-4 in the mean of any photo.

    Args:
        pipeline: the pipeline whose ``img_size``, ``crop_fraction`` and interpolation are taken.
        levels: the largest value of a pixel: 1 for floats in [0, 1], 255 for uint8.

    Raises:
        ValueError: if the interpolation is neither bicubic nor bilinear.

    Example:
        >>> ResizeAndCrop(EvaluationPipeline(224))(torch.rand(1, 3, 480, 640)).shape
        torch.Size([1, 3, 224, 224])
    """

    def __init__(self, pipeline: EvaluationPipeline, levels: float = 1.0) -> None:
        super().__init__()
        self.img_size = pipeline.img_size
        self.short = None if pipeline.crop_fraction is None else int(pipeline.img_size / pipeline.crop_fraction)
        self.levels = levels
        interpolation = pipeline.settings.interpolation
        if interpolation not in _KERNELS:
            raise ValueError(f"Graphs resize photos by {' or '.join(_KERNELS)} interpolation, not {interpolation}.")
        self.kernel = _KERNELS[interpolation]

    def forward(self, images: Tensor) -> Tensor:
        """Map photos :math:`(B, C, H, W)` in [0, levels] to :math:`(B, C, S, S)` in [0, levels] but for rounding.

        Integers become float32; floating point numbers keep their type.
        """
        dtype = images.dtype if images.is_floating_point() else torch.float32
        exact = torch.promote_types(dtype, torch.float32)
        height, width = images.shape[-2:]
        rows = self._weights(height, self._resized(height, height, width), exact, images.device)
        columns = self._weights(width, self._resized(width, height, width), exact, images.device)
        pixels = images.to(exact)
        if self._rows_first(height, width):
            pixels = self._clamp(self._clamp(rows @ pixels) @ columns.mT)
        else:
            pixels = self._clamp(rows @ self._clamp(pixels @ columns.mT))
        return pixels.to(dtype)

    def extra_repr(self) -> str:
        """Show what decides the geometry and the range."""
        return f"img_size={self.img_size}, short={self.short}, levels={self.levels}"

    def _resized(self, length: int, height: int, width: int) -> int:
        """Return what a side is resized to, of which the crop then keeps the middle."""
        if self.short is None:
            return self.img_size
        return self.short * length // torch.sym_min(height, width)

    def _rows_first(self, height: int, width: int) -> bool:
        if isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt):
            return False
        lost_rows = height - self._resized(height, height, width)
        lost_columns = width - self._resized(width, height, width)
        return bool(lost_rows > max(0, 2 * lost_columns))

    def _clamp(self, pixels: Tensor) -> Tensor:
        return pixels.clamp(-_ROUNDING * self.levels, (1 + _ROUNDING) * self.levels)

    def _weights(self, length: int, resized: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        r"""Return what each pixel of a side gives to each pixel that the crop keeps, :math:`(S, length)`.

        The pixel :math:`i` of the resized side lies at :math:`(i + 1/2) \cdot length / resized` of the side itself.
        That is split into a whole number and a rest, so that distances are exact in photos of any size, and no more
        than rounded in bfloat16, which engines may compute in.
        """
        margin = resized - self.img_size
        first = (margin + margin // 2 % 2) // 2  # the half, rounded to the even number as Python's round does
        doubled = (2 * (torch.arange(self.img_size, device=device) + first) + 1) * length
        whole = doubled // (2 * resized)
        rest = (doubled - 2 * resized * whole).to(dtype) / (2 * resized)
        pixels = torch.arange(length, dtype=torch.int32, device=device)
        distance = (pixels - whole.to(torch.int32).unsqueeze(1)).to(dtype) + (0.5 - rest).unsqueeze(1)
        weights = self.kernel(distance / torch.sym_max(1.0, length / resized))
        return weights / weights.sum(1, keepdim=True)


def _bicubic(distance: Tensor) -> Tensor:
    """Return Keys' kernel with a = -1/2, which Pillow and torch take for antialiasing (Keys, 1981, equation 15)."""
    t = distance.abs().clamp(max=2)
    return torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2)


def _bilinear(distance: Tensor) -> Tensor:
    """Return the triangle of bilinear interpolation."""
    return (1 - distance.abs()).clamp(min=0)


_KERNELS = {"bicubic": _bicubic, "bilinear": _bilinear}
