"""Results that the web demo shows: functions from a photo to images and numbers, independent of gradio."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import kornia.augmentation as K
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from kornia_tinyvit import visualization
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.images import read_image, read_pixels, to_pil
from kornia_tinyvit.sam import ImageEmbedding, MobileSAM

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

#: Maximum size of an uploaded file in bytes.
MAX_BYTES = 20 * 2**20
#: Maximum number of pixels of an uploaded image, checked before decoding.
MAX_PIXELS = 40_000_000

SIDE = 1024  # maximum side of stored photos: the input size of MobileSAM, larger than that of classifiers
TILE = 480  # side in pixels that feature maps are enlarged to

Row = tuple[str, float, float]


@dataclass(eq=False)
class Photo:
    """An uploaded image in the session state.

    Args:
        image: RGB image of at most 1,024 pixels per side.
        embedding: its image embedding once it is computed.
    """

    image: Image.Image
    embedding: ImageEmbedding | None = field(default=None, repr=False)

    def tensor(self, model: nn.Module) -> Tensor:
        """Return the image as a batch :math:`(1, 3, H, W)` in [0, 1] on the device of a network."""
        return read_image(self.image)[None].to(next(model.parameters()).device)

    def embed(self, sam: MobileSAM) -> ImageEmbedding:
        """Return the image embedding, computed once."""
        if self.embedding is None:
            self.embedding = sam.embed(self.image)
        return self.embedding


def open_photo(path: str | Path, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read an uploaded image and limit its size.

    Args:
        path: the file; of an animation the first frame.
        max_pixels: maximum number of pixels.

    Raises:
        ValueError: if it is not an image, is damaged, or has too many pixels; without the folder of the file.
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
    """Classify a photo and draw its saliency map.

    Args:
        classifier: the classifier, in evaluation mode.
        photo: the photo.
        top_k: maximum number of classes.

    Returns:
        Scores in [0, 1] by label, sorted by descending score, and the saliency map of the top-1 class over the photo.
    """
    image = photo.tensor(classifier)
    (found,) = classifier.predict(image, top_k)
    names = _names(classifier)
    heat = visualization.saliency(classifier, image)
    return {names[each.index]: each.score for each in found}, to_pil(visualization.overlay_heatmap(image, heat)[0])


@dataclass(frozen=True)
class AugmentationParams:
    """Fixed parameters of augmentations; the defaults are the identity.

    Args:
        brightness: in [0, 2]; 0 is black, 2 white.
        contrast: non-negative factor.
        saturation: non-negative factor; 0 is gray.
        hue: shift of the hue in [-0.5, 0.5] turns.
        rotation: degrees, counterclockwise.
        perspective: fraction of the height by which the right edge, or if negative the left edge, shrinks, in [-1, 1].
        blur: standard deviation of the Gaussian blur in pixels.
        noise: standard deviation of the Gaussian noise, for values in [0, 1].
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    rotation: float = 0.0
    perspective: float = 0.0
    blur: float = 0.0
    noise: float = 0.0


def augment(images: Tensor, params: AugmentationParams) -> Tensor:
    """Apply kornia's augmentations with fixed parameters, including fixed noise.

    Args:
        images: images :math:`(B, 3, H, W)` in [0, 1].
        params: the parameters.

    Returns:
        Images of the same shape in [0, 1]; the input itself for the default parameters.
    """
    thin = min(images.shape[-2:]) == 1  # a perspective transform needs two rows and columns
    for name, value in vars(params).items():
        if value != getattr(AugmentationParams, name) and not (thin and name == "perspective"):
            step, fixed = _step(name, value, images)
            images = step(images, params=step.forward_parameters(images.shape) | fixed).clamp(0, 1)
    return images


def _step(name: str, value: float, images: Tensor) -> tuple[K.AugmentationBase2D, dict[str, Tensor]]:
    """Return an augmentation with a fixed parameter, and further parameters in place of random ones."""
    if name == "perspective":
        return K.RandomPerspective(abs(value), p=1.0), {"end_points": _corners(images, value)}
    if name == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return K.RandomGaussianNoise(std=value, p=1.0), {"gaussian_noise": value * noise.to(images)}
    only = (value, value)
    if name == "blur":
        return K.RandomGaussianBlur(visualization.kernel_size(value, images), only, p=1.0), {}
    return getattr(K, f"Random{name.capitalize()}")(only, p=1.0), {}


def _corners(images: Tensor, perspective: float) -> Tensor:
    """Return the target corners of images, clockwise from the upper left, :math:`(B, 4, 2)`."""
    bottom, right = (side - 1.0 for side in images.shape[-2:])
    cut = min(abs(perspective), 0.98) * bottom / 2  # an edge of length 0 is not invertible
    left_cut, right_cut = (0.0, cut) if perspective > 0 else (cut, 0.0)
    corners = [[0, left_cut], [right, right_cut], [right, bottom - right_cut], [0, bottom - left_cut]]
    return torch.tensor(corners, device=images.device).expand(len(images), 4, 2)


@torch.inference_mode()
def compare(
    classifier: ImageClassifier, photo: Photo, params: AugmentationParams, top_k: int = 5
) -> tuple[Image.Image, list[Row]]:
    """Augment a photo and compare the predictions.

    Args:
        classifier: the classifier, in evaluation mode.
        photo: the photo.
        params: parameters of the augmentations.
        top_k: number of classes with the highest score before or after.

    Returns:
        The augmented photo, and rows of a label and its scores in [0, 1] before and after, in descending order.
    """
    image = photo.tensor(classifier)
    changed = augment(image, params)
    before, after = classifier(torch.cat([image, changed])).float().softmax(1)
    names = _names(classifier)
    highest = torch.maximum(before, after)
    chosen = highest.topk(min(top_k, len(highest))).indices.tolist()
    rows = [(names[index], before[index].item(), after[index].item()) for index in chosen]
    return to_pil(changed[0]), rows


@torch.inference_mode()
def show_features(classifier: ImageClassifier, photo: Photo) -> list[tuple[Image.Image, str]]:
    """Draw the feature maps of the four stages, the principal components of their channels as colors.

    Args:
        classifier: the classifier, in evaluation mode.
        photo: the photo.

    Returns:
        An image and a caption per stage.
    """
    drawn = []
    for number, features in enumerate(visualization.stage_features(classifier, photo.tensor(classifier)), 1):
        image = to_pil(visualization.feature_colors(features)[0])
        channels, height, width = features.shape[1:]
        caption = f"stage {number}: {channels} channels of {height} x {width} cells"
        scale = max(1, round(TILE / max(image.size)))
        drawn.append((ImageOps.scale(image, scale, Image.Resampling.NEAREST), caption))
    return drawn


@dataclass(frozen=True)
class UserPrompts:
    """Point and box prompts of a user in pixels of the photo; immutable.

    Args:
        points: x, y and label: 1 foreground, 0 background.
        corner: first corner of an incomplete box.
        box: left, top, right and bottom.
    """

    points: tuple[tuple[float, float, int], ...] = ()
    corner: tuple[float, float] | None = None
    box: tuple[float, float, float, float] | None = None

    def add_point(self, x: float, y: float, on: bool) -> UserPrompts:
        """Add a point prompt.

        Args:
            x: column in pixels of the photo.
            y: row in pixels of the photo.
            on: whether the point is foreground.

        Returns:
            The new prompts.
        """
        return dataclasses.replace(self, points=(*self.points, (x, y, int(on))))

    def add_corner(self, x: float, y: float) -> UserPrompts:
        """Add a corner of the box; the second completes it, a third starts a new box.

        Args:
            x: column in pixels of the photo.
            y: row in pixels of the photo.

        Returns:
            The new prompts.

        Raises:
            ValueError: if the box is empty.
        """
        if self.corner is None:
            return dataclasses.replace(self, corner=(x, y), box=None)
        (left, right), (top, bottom) = sorted((self.corner[0], x)), sorted((self.corner[1], y))
        if left == right or top == bottom:
            raise ValueError("The box is empty: its second corner must lie beside and above or below the first.")
        return dataclasses.replace(self, corner=None, box=(left, top, right, bottom))

    @property
    def ready(self) -> bool:
        """Whether there is a box or a foreground point."""
        return self.box is not None or any(on for *_, on in self.points)


def segment_prompts(sam: MobileSAM, photo: Photo, prompts: UserPrompts) -> tuple[Image.Image, str]:
    """Predict the mask of a user's prompts.

    Args:
        sam: the network.
        photo: the photo.
        prompts: the prompts, :attr:`~UserPrompts.ready`.

    Returns:
        The photo with mask and prompts, and a message with area and predicted IoU.

    Raises:
        ValueError: if there are no prompts.
    """
    points, labels, boxes = _to_tensors(prompts)
    found = sam.predict_best(photo.embed(sam), points, labels, boxes)
    (mask,) = found.masks()[:, 0].cpu()
    message = f"The mask covers {mask.float().mean():.1%} of the photo; predicted IoU {found.scores.item():.2f}."
    return draw_prompts(photo, prompts, [mask]), message


def draw_prompts(photo: Photo, prompts: UserPrompts, masks: Sequence[Tensor] = ()) -> Image.Image:
    """Draw masks and prompts on a photo; an incomplete box as a dot at its corner."""
    points, labels, boxes = _to_tensors(prompts)
    if prompts.corner is not None:
        x, y = prompts.corner
        boxes = torch.tensor([[x - 2, y - 2, x + 2, y + 2]])
    points, labels = (None if each is None else each[0] for each in (points, labels))
    return visualization.draw_overlay(photo.image, masks, points, labels, boxes)


def segment_everything(sam: MobileSAM, photo: Photo, points_per_side: int = 16) -> tuple[Image.Image, str]:
    """Segment everything in a photo.

    Args:
        sam: the network.
        photo: the photo.
        points_per_side: points of the grid along each side of the photo.

    Returns:
        The photo with all masks, small ones on top, and a message with their number.
    """
    # RLE: hundreds of binary masks would take much memory.
    (masks,) = sam.generate_masks(photo.embed(sam), points_per_side=points_per_side, output_mode="coco_rle")
    masks.sort(key=lambda mask: mask.area, reverse=True)
    message = f"Found {len(masks)} {'mask' if len(masks) == 1 else 'masks'} at {points_per_side**2} points."
    return visualization.draw_overlay(photo.image, (mask.segmentation for mask in masks)), message


def _to_tensors(prompts: UserPrompts) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return points :math:`(1, N, 2)`, labels :math:`(1, N)` and box :math:`(1, 4)` of one prompt."""
    points, labels = torch.tensor(prompts.points, dtype=torch.float32).view(1, -1, 3).split((2, 1), 2)
    box = None if prompts.box is None else torch.tensor([prompts.box], dtype=torch.float32)
    return (points, labels[..., 0].long(), box) if prompts.points else (None, None, box)


def _names(classifier: ImageClassifier) -> list[str]:
    """Return unique class names; ImageNet has two classes named crane."""
    counts = Counter(classifier.class_names)
    return [f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(classifier.class_names)]
