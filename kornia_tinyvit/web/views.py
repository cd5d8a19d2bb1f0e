"""What the page shows: functions from a photo to images and numbers, without the page."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import kornia.augmentation as K
import torch
from PIL import Image
from torch import Tensor, nn

from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.images import read_pixels, to_image, to_pil, to_pixels
from kornia_tinyvit.ops import RLE, decode_rle
from kornia_tinyvit.sam import ImageEmbedding, MobileSAM
from kornia_tinyvit.visualization import (
    draw_overlay,
    feature_colors,
    kernel_size,
    overlay_heatmap,
    saliency,
    stage_features,
)

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "AugmentationParams",
    "Photo",
    "UserPrompts",
    "augment",
    "compare",
    "explain",
    "open_photo",
    "segment_everything",
    "segment_prompts",
    "show_features",
]

#: Largest file in bytes that the page takes.
MAX_BYTES = 20 * 2**20
#: Largest image in pixels that the page takes; larger ones are refused before they are decoded.
MAX_PIXELS = 40_000_000

SIDE = 1024  # longer side that photos are kept with: what MobileSAM sees, and more than classifiers do
TILE = 480  # width that the few cells of a stage are drawn with

Point = tuple[float, float]
Row = tuple[str, float, float]


@dataclass(eq=False)
class Photo:
    """A photo as the page keeps it for a visitor.

    Args:
        image: its pixels, RGB, at most 1,024 a side.
        embedding: what MobileSAM's encoder saw of it, once it was asked.
    """

    image: Image.Image
    embedding: ImageEmbedding | None = field(default=None, repr=False)

    def tensor(self, model: nn.Module) -> Tensor:
        """Return the photo as a batch :math:`(1, 3, H, W)` in [0, 1] on the device of a network."""
        return to_image(self.image)[None].to(next(model.parameters()).device)

    def embed(self, sam: MobileSAM) -> ImageEmbedding:
        """Return what the encoder sees of the photo, which it is asked only once."""
        if self.embedding is None:
            self.embedding = sam.embed(self.image)
        return self.embedding


def open_photo(path: str | Path, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read a photo that somebody brought, and make it small enough to play with.

    Args:
        path: the file. Of an animation the first image is taken.
        max_pixels: the most pixels that are decoded.

    Raises:
        ValueError: if it is no image, is damaged, or has too many pixels; the file is told by its name alone.
    """
    path = Path(path)
    try:
        pixels = read_pixels(path, max_pixels=max_pixels)
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error
    image = to_pil(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    return Photo(image)


def explain(classifier: ImageClassifier, photo: Photo, top_k: int = 5) -> tuple[dict[str, float], Image.Image]:
    """Name what a photo shows, and draw where the network looks for it.

    Args:
        classifier: the network, in evaluation mode.
        photo: the photo.
        top_k: how many classes to name; at most all of them.

    Returns:
        Scores in [0, 1] by label, the best first, and the photo in gray under the saliency of the best.
    """
    image = photo.tensor(classifier)
    (found,) = classifier.predict(image, top_k)
    names = _names(classifier)
    heat = saliency(classifier, image)
    return {names[each.index]: each.score for each in found}, to_pil(overlay_heatmap(image, heat)[0])


@dataclass(frozen=True)
class AugmentationParams:
    """How a photo is changed; the defaults leave it as it is.

    Args:
        brightness: from 0, black, to 2, white; 1 changes nothing.
        contrast: factor from 0 on.
        saturation: factor from 0, gray, on.
        hue: turn of the color circle in [-0.5, 0.5].
        rotation: degrees, to the left.
        perspective: share of the height that the right edge loses, or if negative the left edge, in [-1, 1].
        blur: deviation of the Gaussian in pixels.
        noise: deviation of the added noise, of values in [0, 1].
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    rotation: float = 0.0
    perspective: float = 0.0
    blur: float = 0.0
    noise: float = 0.0


def augment(images: Tensor, changes: AugmentationParams) -> Tensor:
    """Change images by kornia's augmentations, each with the one strength that is asked for.

    The noise is the same whenever it is drawn, so that an image changes by what was changed alone.

    Args:
        images: images :math:`(B, 3, H, W)` in [0, 1].
        changes: the strengths.

    Returns:
        Images of the same shape in [0, 1]; what came in where nothing is to be changed.
    """
    thin = min(images.shape[-2:]) == 1  # a line has no perspective
    for name, value in vars(changes).items():
        if value != getattr(AugmentationParams, name) and not (thin and name == "perspective"):
            step, fixed = _step(name, value, images)
            params = step.forward_parameters(images.shape) | fixed
            images = step(images, params=params).clamp(0, 1)
    return images


def _step(name: str, value: float, images: Tensor) -> tuple[K.AugmentationBase2D, dict[str, Tensor]]:
    """Return an augmentation that always has this strength, and what else it is not to draw at random."""
    if name == "perspective":
        return K.RandomPerspective(abs(value), p=1.0), {"end_points": _corners(images, value)}
    if name == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return K.RandomGaussianNoise(std=value, p=1.0), {"gaussian_noise": value * noise.to(images)}
    only = (value, value)
    if name == "blur":
        return K.RandomGaussianBlur(kernel_size(value, images), only, p=1.0), {}
    return getattr(K, f"Random{name.capitalize()}")(only, p=1.0), {}


def _corners(images: Tensor, perspective: float) -> Tensor:
    """Return where the corners of images go, clockwise from the upper left, :math:`(B, 4, 2)`."""
    bottom, right = (side - 1.0 for side in images.shape[-2:])
    cut = min(abs(perspective), 0.98) * bottom / 2  # an edge without length has no way back
    left_cut, right_cut = (0.0, cut) if perspective > 0 else (cut, 0.0)
    corners = [[0, left_cut], [right, right_cut], [right, bottom - right_cut], [0, bottom - left_cut]]
    return torch.tensor(corners, device=images.device).expand(len(images), 4, 2)


@torch.inference_mode()
def compare(
    classifier: ImageClassifier, photo: Photo, changes: AugmentationParams, top_k: int = 5
) -> tuple[Image.Image, list[Row]]:
    """Change a photo and tell how the prediction moves.

    Args:
        classifier: the network, in evaluation mode.
        photo: the photo.
        changes: what to do with it.
        top_k: how many classes to tell: those with the highest score before or after.

    Returns:
        The changed photo, and rows of a label and its score in [0, 1] before and after, the highest first.
    """
    image = photo.tensor(classifier)
    changed = augment(image, changes)
    before, after = classifier(torch.cat([image, changed])).float().softmax(1)
    names = _names(classifier)
    highest = torch.maximum(before, after)
    chosen = highest.topk(min(top_k, len(highest))).indices.tolist()
    rows = [(names[index], before[index].item(), after[index].item()) for index in chosen]
    return to_pil(changed[0]), rows


@torch.inference_mode()
def show_features(classifier: ImageClassifier, photo: Photo) -> list[tuple[Image.Image, str]]:
    """Draw what the four stages of a network hold, the principal components of their channels as color.

    Args:
        classifier: the network, in evaluation mode.
        photo: the photo.

    Returns:
        For each stage its image, with the cells as squares, and a line about its map.
    """
    drawn = []
    for number, features in enumerate(stage_features(classifier, photo.tensor(classifier)), 1):
        image = to_pil(feature_colors(features)[0])
        scale = max(1, round(TILE / max(image.size)))
        size = (image.width * scale, image.height * scale)
        channels, height, width = features.shape[1:]
        about = f"stage {number}: {channels} channels of {height} x {width} cells"
        drawn.append((image.resize(size, Image.Resampling.NEAREST), about))
    return drawn


@dataclass(frozen=True)
class UserPrompts:
    """What a visitor marked on a photo, in pixels of it; each mark gives a new record.

    Args:
        points: x, y and 1 for a point on the object or 0 for one off it.
        corner: the first corner of a box that is being drawn.
        box: left, top, right and bottom.
    """

    points: tuple[tuple[float, float, int], ...] = ()
    corner: Point | None = None
    box: tuple[float, float, float, float] | None = None

    def add_point(self, x: float, y: float, on: bool) -> UserPrompts:
        """Mark a point on or off the object.

        Args:
            x: column in pixels of the photo.
            y: row in pixels of the photo.
            on: whether the point is on the object.

        Returns:
            The new prompts.
        """
        return dataclasses.replace(self, points=(*self.points, (x, y, int(on))))

    def add_corner(self, x: float, y: float) -> UserPrompts:
        """Mark a corner of the box; the second makes the box, and a third starts another.

        Args:
            x: column in pixels of the photo.
            y: row in pixels of the photo.

        Returns:
            The new prompts.

        Raises:
            ValueError: if the second lies on a line with the first.
        """
        if self.corner is None:
            return dataclasses.replace(self, corner=(x, y), box=None)
        (left, right), (top, bottom) = sorted((self.corner[0], x)), sorted((self.corner[1], y))
        if left == right or top == bottom:
            raise ValueError("The box is empty: its second corner must lie beside and above or below the first.")
        return dataclasses.replace(self, corner=None, box=(left, top, right, bottom))

    @property
    def ready(self) -> bool:
        """Whether the marks say what to look for."""
        return self.box is not None or any(on for *_, on in self.points)


def segment_prompts(sam: MobileSAM, photo: Photo, marks: UserPrompts) -> tuple[Image.Image, str]:
    """Find what a visitor marked.

    Args:
        sam: the network.
        photo: the photo.
        marks: what is marked, :attr:`~UserPrompts.ready`.

    Returns:
        The photo with the mask and the marks, and a sentence about it.

    Raises:
        ValueError: if nothing on the object is marked.
    """
    points, labels, boxes = _prompts(marks)
    found = sam.predict_best(photo.embed(sam), points, labels, boxes)
    (mask,) = found.masks()[:, 0].cpu()
    share, score = mask.float().mean().item(), found.scores.item()
    return draw_prompts(photo, marks, [mask]), f"The mask covers {share:.1%} of the photo; predicted IoU {score:.2f}."


def draw_prompts(photo: Photo, marks: UserPrompts, masks: Sequence[Tensor] = ()) -> Image.Image:
    """Draw masks and marks over a photo; a box that has one corner yet is a dot there."""
    points, labels, boxes = _prompts(marks)
    if marks.corner is not None:
        x, y = marks.corner
        boxes = torch.tensor([[x - 2, y - 2, x + 2, y + 2]])
    if points is not None and labels is not None:
        points, labels = points[0], labels[0]
    return draw_overlay(to_pixels(photo.image), masks, points, labels, boxes)


def segment_everything(sam: MobileSAM, photo: Photo, points_per_side: int = 16) -> tuple[Image.Image, str]:
    """Find all there is in a photo.

    Args:
        sam: the network.
        photo: the photo.
        points_per_side: points of the grid along a side of the photo.

    Returns:
        The photo with all masks, small ones on top, and a sentence about them.
    """
    # Encoded, because hundreds of masks of a photo take much memory.
    (masks,) = sam.generate_masks(photo.embed(sam), points_per_side=points_per_side, output_mode="coco_rle")
    masks.sort(key=lambda mask: mask.area, reverse=True)
    decoded = (torch.from_numpy(decode_rle(cast("RLE", mask.segmentation))) for mask in masks)
    told = f"Found {len(masks)} {'mask' if len(masks) == 1 else 'masks'} at {points_per_side**2} points."
    return draw_overlay(to_pixels(photo.image), decoded), told


def _prompts(marks: UserPrompts) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return marks as the points :math:`(1, N, 2)`, labels :math:`(1, N)` and box :math:`(1, 4)` of one prompt."""
    points, labels = torch.tensor(marks.points, dtype=torch.float32).view(1, -1, 3).split((2, 1), 2)
    box = None if marks.box is None else torch.tensor([marks.box], dtype=torch.float32)
    return (points, labels[..., 0].long(), box) if marks.points else (None, None, box)


def _names(classifier: ImageClassifier) -> list[str]:
    """Return names of the classes of which no two are alike; ImageNet has two cranes."""
    counts = Counter(classifier.class_names)
    return [f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(classifier.class_names)]
