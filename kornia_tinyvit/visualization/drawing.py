"""Draw masks, prompts, detections and class maps on images, and write image files."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale, rgb_to_lab
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kornia_tinyvit.detection import Detection
from kornia_tinyvit.files import replacing
from kornia_tinyvit.images import ImageInput, read_pixels, to_pil
from kornia_tinyvit.ops import RLE, decode_rle, mask_boxes

__all__ = ["distinct_colors", "draw_class_map", "draw_detections", "draw_overlay", "save_image", "save_rows"]

OPACITY = 0.45
_COLORS = 256
_ON, _OFF, _BOX = "#19c37d", "#e5383b", "#ffffff"


def distinct_colors(count: int) -> Tensor:
    """Return distinct colors :math:`(count, 3)` in [0, 1]; the first ones do not depend on the count.

    Each color has the largest distance in CIELAB to those before it (Glasbey et al. 2007, "Colour displays for
    categorical images"). They repeat after 256.

    Args:
        count: number of colors.
    """
    return _palette()[torch.arange(count) % _COLORS]


def draw_overlay(
    image: ImageInput,
    masks: Iterable[Tensor | NDArray[Any] | RLE],
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Image.Image:
    """Draw masks, tinted and with contours, and then prompts on an image.

    Args:
        image: the image, in any form that :func:`~kornia_tinyvit.images.open_image` takes.
        masks: masks :math:`(H, W)`, drawn in order: bool or integer tensors or arrays, not 0 in the mask, or their
            run-length codes. An iterator is consumed one at a time.
        points: :math:`(N, 2)`, x and y in pixels.
        labels: point labels :math:`(N,)`, 1 (foreground) green, 0 (background) red; default all 1.
        boxes: :math:`(K, 4)`, left, top, right and bottom in pixels.

    Returns:
        The drawing, of the image's size.

    Raises:
        TypeError: if a mask is floating point, or the image is no image.
        ValueError: if the image cannot be read, or a mask does not have its size.
    """
    canvas = read_pixels(image).cpu().clone()
    line = max(1, round(max(canvas.shape[1:]) / 500))
    for index, mask in enumerate(masks):
        _tint(canvas, _to_bool(mask, canvas.shape[1:]), 255 * _palette()[index % _COLORS], line)
    drawn = to_pil(canvas)
    draw = ImageDraw.Draw(drawn)
    for box in [] if boxes is None else boxes.tolist():
        draw.rectangle(box, outline="black", width=line + 2)
        draw.rectangle(box, outline=_BOX, width=line)
    if points is not None:
        radius = 3 * line + 2
        for (x, y), label in zip(points.tolist(), [1] * len(points) if labels is None else labels, strict=True):
            place = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(place, fill=_ON if label else _OFF, outline="white", width=line)
    return drawn


@torch.inference_mode()
def draw_detections(image: ImageInput, detections: Sequence[Detection], scores: bool = True) -> Image.Image:
    """Draw boxes with their labels on an image, with one color per class.

    Args:
        image: the image, in any form that :func:`~kornia_tinyvit.images.open_image` takes.
        detections: detections to draw; earlier ones are drawn on top.
        scores: whether to write the scores.

    Returns:
        The drawing, of the image's size.
    """
    drawn = to_pil(read_pixels(image))
    draw, line = ImageDraw.Draw(drawn), max(2, round(max(drawn.size) / 250))
    font = ImageFont.load_default(max(10, round(max(drawn.size) / 40)))
    colors = distinct_colors(1 + max((each.index for each in detections), default=0))
    for each in reversed(detections):
        color = tuple((colors[each.index] * 255).int().tolist())
        left, top, right, bottom = each.box
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=line)
        text = f"{each.label} {each.score:.2f}" if scores else each.label
        place = draw.textbbox((left + line, top + line), text, font=font)
        draw.rectangle((place[0] - line, place[1] - line, place[2] + line, place[3] + line), fill=color)
        bright = rgb_to_grayscale(colors[each.index, :, None, None]) > 0.5
        draw.text((left + line, top + line), text, fill="black" if bright else "white", font=font)
    return drawn


def draw_class_map(
    classes: Tensor | NDArray[Any],
    image: ImageInput | None = None,
    class_names: Sequence[str] | None = None,
    opacity: float = 0.6,
) -> Image.Image:
    """Draw a class map in the colors of :func:`distinct_colors`, alone or over its image; ignored pixels are black.

    Args:
        classes: class indices :math:`(H, W)`, integers; negative ones, such as
            :data:`~kornia_tinyvit.data.segmentation.IGNORED`, are ignored pixels.
        image: the image, in any form that :func:`~kornia_tinyvit.images.open_image` takes.
        class_names: names of the classes in the order of their indices, for a legend to the right of the map: the
            classes in it with their percentage of all pixels, the most frequent first.
        opacity: opacity of the colors over an image, in [0, 1].

    Returns:
        The drawing, of the size of the class map without the legend.

    Raises:
        TypeError: if the class indices are no integers.
        ValueError: if the class map is not two-dimensional or not of the image's size, or a class has no name.

    Example:
        >>> draw_class_map(torch.tensor([[0, 1, 1], [0, 2, -100]])).size
        (3, 2)
    """
    indices = classes.numpy(force=True) if isinstance(classes, Tensor) else np.asarray(classes)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"A class map must hold integers; got {indices.dtype}. Give the argmax of logits.")
    if indices.ndim != 2 or not indices.size:
        raise ValueError(f"A class map must be (H, W); got {indices.shape}.")
    indices = np.maximum(indices.astype(np.int64), -1)
    count = int(indices.max()) + 1
    if class_names is not None and count > len(class_names):
        raise ValueError(f"The class map holds the class {count - 1}, but there are {len(class_names)} names.")
    colors = np.zeros((count + 1, 3), np.uint8)  # the last one is black, at index -1
    colors[:-1] = (255 * distinct_colors(count)).int().numpy()
    drawn = Image.fromarray(colors[indices])
    if image is not None:
        photo = to_pil(read_pixels(image))
        if photo.size != drawn.size:
            raise ValueError(f"The class map must have the image's {photo.height}x{photo.width}; got {indices.shape}.")
        drawn = Image.blend(photo, drawn, opacity)
        drawn.paste("black", mask=Image.fromarray(indices < 0))
    return drawn if class_names is None else _add_legend(drawn, indices, colors, class_names)


def save_image(path: str | Path, image: Image.Image) -> None:
    """Write an image atomically in the format of the file extension; PNG without one.

    Args:
        path: the file to write; its folder is created.
        image: the image.

    Raises:
        OSError: if it cannot be written; an existing file is unchanged.
        ValueError: if the extension is unknown.
    """
    path = Path(path)
    with replacing(path, path.suffix or ".png") as temporary:
        image.save(temporary)


def save_rows(path: str | Path, rows: Sequence[Image.Image]) -> None:
    """Write images of equal width, stacked vertically, to one file.

    Args:
        path: the file to write; its folder is created.
        rows: at least one image, from top to bottom.
    """
    save_image(path, Image.fromarray(np.concatenate([np.asarray(row.convert("RGB")) for row in rows])))


def _add_legend(
    drawn: Image.Image, indices: NDArray[np.int64], colors: NDArray[np.uint8], class_names: Sequence[str]
) -> Image.Image:
    """Return a drawing with a legend to its right; the last color is that of index -1."""
    present, counts = np.unique(indices, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    names = ["ignored" if index < 0 else class_names[index] for index in present[order]]
    shares = [f"{100 * count / indices.size:.1f} %" for count in counts[order]]
    size = max(12, round(max(drawn.size) / 40))
    font, line, gap = ImageFont.load_default(size), round(1.4 * size), round(size / 2)
    wide = [math.ceil(max(font.getlength(text) for text in column)) for column in (names, shares)]
    width = drawn.width + line + sum(wide) + 4 * gap
    sheet = Image.new("RGB", (width, max(drawn.height, len(names) * line + gap)), "white")
    sheet.paste(drawn)
    draw, left = ImageDraw.Draw(sheet), drawn.width + gap
    for row, (index, name, share) in enumerate(zip(present[order], names, shares, strict=True)):
        top = gap + row * line
        draw.rectangle((left, top, left + size, top + size), fill=tuple(colors[index].tolist()))
        draw.text((left + line, top), name, fill="black", font=font)
        draw.text((width - gap, top), share, fill="black", font=font, anchor="ra")
    return sheet


@functools.cache
def _palette() -> Tensor:
    """Return 256 colors :math:`(256, 3)` by the sequential method of Glasbey et al."""

    def to_lab(colors: Tensor) -> Tensor:
        return rgb_to_lab(colors.T[..., None])[..., 0].T

    values = torch.linspace(0, 1, 16)
    colors = torch.cartesian_prod(values, values, values)
    lab = to_lab(colors)
    visible = (lab[:, 0] > 30) & (lab[:, 0] < 95) & (lab[:, 1:].norm(dim=1) > 20)  # neither dark, pale nor gray
    colors, lab = colors[visible], lab[visible]
    distance = torch.cdist(lab, to_lab(torch.tensor([0.0, 0.5, 1.0])[:, None].expand(3, 3))).amin(1)
    chosen = []
    for _ in range(_COLORS):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (lab - lab[chosen[-1]]).norm(dim=1))
    return colors[chosen]


def _to_bool(mask: Tensor | NDArray[Any] | RLE, size: torch.Size) -> Tensor:
    """Return a mask as a bool tensor :math:`(H, W)` on the CPU."""
    values = decode_rle(mask) if isinstance(mask, Mapping) else mask
    values = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    if values.shape != tuple(size):
        raise ValueError(f"A mask must be {tuple(size)}; got {values.shape}.")
    if values.dtype.kind not in "biu":
        raise TypeError(f"A mask must be bool or integer; got {values.dtype}. Compare logits with a threshold.")
    return torch.from_numpy(values != 0)


def _tint(canvas: Tensor, mask: Tensor, color: Tensor, line: int) -> None:
    if not mask.any():
        return
    # Only the bounding box: an image may have hundreds of masks.
    left, top, right, bottom = mask_boxes(mask[None])[0].int().tolist()
    inside = mask[top:bottom, left:right]
    around = F.pad((~inside).float(), (line, line, line, line), value=1.0)[None]
    for window in ((2 * line + 1, 1), (1, 2 * line + 1)):  # separable: two 1D windows instead of a square one
        around = F.max_pool2d(around, window, stride=1)
    contour = inside & (around[0] > 0)
    strength = OPACITY * inside.float() + (1 - OPACITY) * contour.float()
    view = canvas[:, top:bottom, left:right]
    view.copy_(torch.lerp(view.float(), color[:, None, None].expand_as(view), strength).round())
