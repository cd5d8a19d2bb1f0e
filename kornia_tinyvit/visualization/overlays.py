"""Pictures of masks: each in a colour of its own over the photo, with what was asked for."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

__all__ = ["distinct_colors", "draw_overlay"]

OPACITY = 0.45
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_ON, _OFF, _BOX = "#19c37d", "#e5383b", "#ffffff"


def distinct_colors(count: int) -> Tensor:
    """Return colours that can be told apart, :math:`(count, 3)` in [0, 1]; the first ones do not depend on the count.

    Hues are a golden ratio of the circle apart, which leaves no two neighbours alike however many there are.
    """
    return torch.tensor([_color(index) for index in range(count)]).reshape(count, 3)


def draw_overlay(
    image: Tensor,
    masks: Iterable[Tensor],
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Image.Image:
    """Lay masks over a photo, each tinted and with its contour, and draw the prompts on top.

    Args:
        image: photo :math:`(3, H, W)`, uint8, or floating point in [0, 1].
        masks: bool, :math:`(H, W)` each; later ones lie on earlier ones. They are taken one at a time.
        points: :math:`(N, 2)`, x and y in pixels.
        labels: :math:`(N,)`, 1 drawn green, 0 red; all 1 if left out.
        boxes: :math:`(K, 4)`, left, top, right and bottom in pixels.

    Returns:
        The picture, of the photo's size.

    Raises:
        ValueError: if the photo or a mask has another shape.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"A photo must be (3, H, W); got {tuple(image.shape)}.")
    pixels = image if image.dtype == torch.uint8 else (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    canvas = pixels.cpu().clone()
    line = max(1, round(max(image.shape[1:]) / 500))
    for index, mask in enumerate(masks):
        if mask.shape != image.shape[1:]:
            raise ValueError(f"A mask must be {tuple(image.shape[1:])}; got {tuple(mask.shape)}.")
        _tint(canvas, mask.cpu(), 255 * torch.tensor(_color(index)), line)
    picture = Image.fromarray(canvas.movedim(0, -1).contiguous().numpy())
    _draw_prompts(ImageDraw.Draw(picture), line, points, labels, boxes)
    return picture


def _color(index: int) -> tuple[float, float, float]:
    hue = (0.58 + index * _GOLDEN_RATIO) % 1
    return colorsys.hsv_to_rgb(hue, (0.85, 0.6)[index % 2], (1.0, 0.8)[index // 2 % 2])


def _tint(canvas: Tensor, mask: Tensor, color: Tensor, line: int) -> None:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return
    # Only the part where the mask is: a photo may have hundreds.
    part = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    inside = mask[part]
    around = F.pad((~inside).float(), (line, line, line, line), value=1.0)[None]
    for window in ((2 * line + 1, 1), (1, 2 * line + 1)):  # a square at once would take its area
        around = F.max_pool2d(around, window, stride=1)
    contour = inside & (around[0] > 0)
    strength = OPACITY * inside.float() + (1 - OPACITY) * contour.float()
    view = canvas[:, part[0], part[1]]
    view.copy_(torch.lerp(view.float(), color[:, None, None].expand_as(view), strength).round())


def _draw_prompts(
    draw: ImageDraw.ImageDraw, line: int, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None
) -> None:
    for left, top, right, bottom in [] if boxes is None else boxes.tolist():
        draw.rectangle((left, top, right, bottom), outline="black", width=line + 2)
        draw.rectangle((left, top, right, bottom), outline=_BOX, width=line)
    on = [1] * len(points) if labels is None and points is not None else [] if labels is None else labels.tolist()
    for (x, y), label in zip([] if points is None else points.tolist(), on, strict=True):
        radius = 3 * line + 2
        place = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(place, fill=_ON if label else _OFF, outline="white", width=max(1, line))
