"""Pictures of what a network sees: where it looks, what its stages hold, and a sheet with both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import kornia.augmentation as K
import torch
from kornia.color import ApplyColorMap, ColorMap
from kornia.enhance import normalize
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import resize
from kornia.image import tensor_to_image
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from kornia_tinyvit.classification import ImageClassifier, Prediction
from kornia_tinyvit.detection import Detection
from kornia_tinyvit.files import replacing
from kornia_tinyvit.layers import evaluating
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from kornia_tinyvit.visualization.overlays import distinct_colors

__all__ = [
    "blur_size",
    "demo_augmentations",
    "draw_detections",
    "feature_colors",
    "overlay_heat",
    "saliency",
    "save_image",
    "save_rows",
    "save_sheet",
    "stage_features",
]

_TILE = 232  # pixels a side
_GAP = 12
_CAPTION = 24
_TITLE = 48


def saliency(classifier: nn.Module, images: Tensor, classes: Tensor | None = None, blur: float = 0.01) -> Tensor:
    """Return how strongly each pixel moves a class: the gradient of its logit with respect to the pixels.

    Args:
        classifier: maps pictures to logits, such as an :class:`~kornia_tinyvit.ImageClassifier`.
        images: pictures :math:`(B, C, H, W)` in [0, 1].
        classes: class indices :math:`(B,)`; the most likely ones if left out.
        blur: deviation of the Gaussian that smooths the map, as a share of the picture's longer side.

    Returns:
        Maps :math:`(B, 1, H, W)` in [0, 1], the largest over the channels, each scaled by its 99th percentile.

    Example:
        >>> classifier = ImageClassifier.from_config("1m", pretrained="cifar10")
        >>> saliency(classifier, torch.rand(1, 3, 48, 64)).shape
        torch.Size([1, 1, 48, 64])
    """
    pixels = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = classifier(pixels)
        if classes is None:
            classes = logits.argmax(1)
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), pixels)
    heat = gradient.abs().amax(1, keepdim=True)
    sigma = max(0.5, blur * max(images.shape[-2:]))
    heat = gaussian_blur2d(heat, blur_size(sigma, images), (sigma, sigma))
    return (heat / _percentile(heat, 0.99).clamp_min(1e-12)).clamp(0, 1)


def blur_size(sigma: float, images: Tensor) -> int:
    """Return the side of a Gaussian's kernel: two deviations to each side, odd, and no larger than the pictures.

    Args:
        sigma: standard deviation in pixels.
        images: pictures :math:`(B, C, H, W)`.
    """
    return min(2 * math.ceil(2 * sigma) + 1, *(side - 1 + side % 2 for side in images.shape[-2:]))


def feature_colors(features: Tensor) -> Tensor:
    r"""Show maps of many channels as colour: their first three principal components over all their cells.

    Args:
        features: maps :math:`(B, C, H, W)` with :math:`C \ge 3`; the components are shared by the batch.

    Returns:
        Pictures :math:`(B, 3, H, W)` in [0, 1]; the strongest component is red.
    """
    cells = features.detach().float().movedim(1, -1).flatten(0, 2)
    cells = cells - cells.mean(0)
    _, _, components = torch.linalg.svd(cells, full_matrices=False)
    axes = torch.zeros(3, cells.shape[1], device=cells.device)
    axes[: min(3, len(components))] = components[:3]
    # The sign of a component is arbitrary: the largest entry is made positive, so that a picture repeats.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    colors = cells @ (axes * torch.where(largest < 0, -1.0, 1.0)).T
    colors = colors.unflatten(0, (features.shape[0], *features.shape[2:])).movedim(-1, 1)
    low, high = _percentile(colors, 0.01), _percentile(colors, 0.99)
    return ((colors - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def overlay_heat(images: Tensor, heat: Tensor, opacity: float = 0.75) -> Tensor:
    """Lay a heat map over dimmed grey pictures.

    Args:
        images: pictures :math:`(B, 3, H, W)` in [0, 1].
        heat: maps :math:`(B, 1, H, W)` in [0, 1].
        opacity: share of the colour where the heat is highest.
    """
    colormap = ApplyColorMap(ColorMap("plasma", num_colors=256, device=images.device, dtype=images.dtype))
    grey = images.mean(1, keepdim=True).expand_as(images) * 0.6
    return torch.lerp(grey, colormap(heat), opacity * heat)


def demo_augmentations() -> dict[str, nn.Module]:
    """Return the three kornia augmentations that the demo shows, by name; each always changes a picture alike."""
    return {
        "flip and turn": K.ImageSequential(
            K.RandomHorizontalFlip(p=1.0), K.RandomRotation((12.0, 12.0), p=1.0, resample="bilinear")
        ),
        "dark and pale": K.ColorJiggle(brightness=(0.7, 0.7), contrast=(1.2, 1.2), saturation=(0.4, 0.4), p=1.0),
        "noise and blur": K.ImageSequential(
            K.RandomGaussianBlur((5, 5), (1.5, 1.5), p=1.0), K.RandomGaussianNoise(std=0.08, p=1.0)
        ),
    }


def save_sheet(
    path: str | Path,
    classifier: ImageClassifier,
    image: Tensor,
    title: str,
    views: dict[str, nn.Module] | None = None,
    top_k: int = 5,
) -> list[Prediction]:
    """Draw one picture's sheet: predictions, augmented views with theirs, saliency and the features of the stages.

    The features are those of the whole picture with its shorter side at four times the network's resolution, which
    shows more than the few cells that the classifier itself looks at.

    Args:
        path: the PNG file to write.
        classifier: the network to look into.
        image: picture :math:`(3, H, W)` in [0, 1].
        title: what to write above.
        views: augmentations to show by name; :func:`demo_augmentations` if left out.
        top_k: how many predictions to list.

    Returns:
        The predictions for the picture itself.
    """
    views = demo_augmentations() if views is None else views
    batch = image.unsqueeze(0)
    changed = {name: view(batch).clamp(0, 1)[0] for name, view in views.items()}
    with evaluating(classifier):
        predictions = classifier.predict([image, *changed.values()], top_k)
        heat = saliency(classifier, batch)
        stages = stage_features(classifier, batch)

    above = [(image, "the photo", "")]
    for (name, view), found in zip(changed.items(), predictions[1:], strict=True):
        above.append((view, name, f"{found[0].label} {found[0].score:.0%}"))
    below = [(overlay_heat(batch, heat)[0], "saliency", predictions[0][0].label)]
    for number, features in enumerate(stages, 1):
        below.append((feature_colors(features)[0], f"stage {number}", " x ".join(map(str, features.shape[1:]))))

    sheet = _Sheet(columns=max(len(above) + 1, len(below)), aspect=image.shape[-2] / image.shape[-1], title=title)
    for row, tiles in enumerate((above, below)):
        for column, tile in enumerate(tiles):
            sheet.draw_tile(row, column, *tile)
    sheet.draw_bars(0, len(above), predictions[0])
    save_image(path, sheet.canvas)
    return predictions[0]


def save_image(path: str | Path, image: Image.Image) -> None:
    """Write a picture in the format that the name's ending tells, or as PNG where it has none.

    Args:
        path: the file to write; its folder is made.
        image: the picture.

    Raises:
        OSError: if it cannot be written; what was there before stays.
        ValueError: if the ending is not that of a format.
    """
    path = Path(path)
    with replacing(path, path.suffix or ".png") as temporary:
        image.save(temporary)


def save_rows(path: str | Path, rows: Sequence[Image.Image]) -> None:
    """Write pictures of one width below one another.

    Args:
        path: the file to write; its folder is made.
        rows: the pictures from above, one at least.
    """
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    save_image(path, sheet)


@torch.inference_mode()
def draw_detections(image: Tensor, detections: Sequence[Detection], scores: bool = True) -> Image.Image:
    """Draw boxes with their names on a photo, each class in a colour of its own.

    Args:
        image: photo :math:`(3, H, W)` in [0, 1].
        detections: what to draw; the first ones lie on top.
        scores: whether to tell the scores, too.

    Returns:
        The picture, of the photo's size.
    """
    levels = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte()
    picture = Image.fromarray(levels.movedim(0, -1).contiguous().numpy())
    draw, line = ImageDraw.Draw(picture), max(2, round(max(picture.size) / 250))
    font = ImageFont.load_default(max(10, round(max(picture.size) / 40)))
    colors = distinct_colors(1 + max((each.index for each in detections), default=0))
    for each in reversed(detections):
        color = tuple((colors[each.index] * 255).int().tolist())
        left, top, right, bottom = each.box
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=line)
        text = f"{each.label} {each.score:.2f}" if scores else each.label
        place = draw.textbbox((left + line, top + line), text, font=font)
        draw.rectangle((place[0] - line, place[1] - line, place[2] + line, place[3] + line), fill=color)
        dark = colors[each.index].mean() > 0.6
        draw.text((left + line, top + line), text, fill="black" if dark else "white", font=font)
    return picture


def stage_features(classifier: ImageClassifier, images: Tensor) -> list[Tensor]:
    r"""Return the maps of the four stages for whole pictures, their shorter side at four times the resolution.

    That shows more than the few cells that the classifier itself looks at.

    Args:
        classifier: the network to look into.
        images: pictures :math:`(B, 3, H, W)` in [0, 1].

    Returns:
        Maps :math:`(B, C_i, H_i, W_i)`, the finest first.
    """
    scale = 4 * classifier.model.config.img_size / min(images.shape[-2:])
    height, width = (min(round(side * scale), 2048) for side in images.shape[-2:])
    whole = resize(images, (height, width), interpolation="bicubic", antialias=True).clamp(0, 1)
    mean, std = images.new_tensor(IMAGENET_MEAN), images.new_tensor(IMAGENET_STD)
    return classifier.model.forward_intermediates(normalize(whole, mean, std))


class _Sheet:
    """A page of equal tiles, each with a line of text below.

    Args:
        columns: tiles side by side, in two rows.
        aspect: height over width of the pictures.
        title: what to write above.
    """

    def __init__(self, columns: int, aspect: float, title: str) -> None:
        self.tile = (_TILE, round(_TILE * min(max(aspect, 0.7), 1.5)))
        self.step = (_TILE + _GAP, self.tile[1] + _CAPTION + _GAP)
        self.canvas = Image.new("RGB", (_GAP + columns * self.step[0], _TITLE + 2 * self.step[1]), "white")
        self.draw = ImageDraw.Draw(self.canvas)
        self.font = ImageFont.load_default(14)
        self.draw.text((_GAP, _GAP), title, fill="black", font=ImageFont.load_default(20))

    def draw_tile(self, row: int, column: int, image: Tensor, name: str, note: str) -> None:
        """Put a picture :math:`(3, H, W)` whole into a tile, its name below on the left and a note on the right."""
        left, top = self._corner(row, column)
        scale = min(side / pixels for side, pixels in zip(self.tile, (image.shape[2], image.shape[1]), strict=True))
        width, height = (max(1, round(pixels * scale)) for pixels in (image.shape[2], image.shape[1]))
        pixels = (image.detach().cpu() * 255).round().byte()
        picture = Image.fromarray(tensor_to_image(pixels)).resize((width, height), Image.Resampling.BICUBIC)
        self.canvas.paste(picture, (left + (self.tile[0] - width) // 2, top + (self.tile[1] - height) // 2))
        below = top + self.tile[1] + 4
        self.draw.text((left, below), name, fill="#555555", font=self.font)
        self.draw.text((left + _TILE, below), note, fill="black", font=self.font, anchor="ra")

    def draw_bars(self, row: int, column: int, predictions: Sequence[Prediction]) -> None:
        """Fill a tile with the scores of some classes."""
        left, top = self._corner(row, column)
        step = self.tile[1] / max(len(predictions), 1)
        for number, prediction in enumerate(predictions):
            y = top + number * step
            self.draw.text((left, y), prediction.label, fill="black", font=self.font)
            self.draw.text((left + _TILE, y), f"{prediction.score:.1%}", fill="black", font=self.font, anchor="ra")
            self.draw.rectangle((left, y + 18, left + _TILE, y + 25), fill="#eeeeee")
            self.draw.rectangle((left, y + 18, left + round(_TILE * prediction.score), y + 25), fill="#d1495b")

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        return _GAP + column * self.step[0], _TITLE + row * self.step[1]


def _percentile(values: Tensor, share: float) -> Tensor:
    """Return the percentile of each picture's channel, shaped to broadcast over it."""
    flat = values.flatten(2).sort(2).values
    return flat[..., round(share * (flat.shape[2] - 1)), None, None]
