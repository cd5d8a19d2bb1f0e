"""Pictures of what a network sees: where it looks, what its stages hold, and a sheet with both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import kornia.augmentation as K
import torch
from kornia.color import ApplyColorMap, ColorMap
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import resize
from kornia.image import tensor_to_image
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from kornia_tinyvit.classification import ImageClassifier, Prediction

__all__ = ["demo_augmentations", "feature_colors", "overlay_heat", "saliency", "save_sheet"]

_TILE = 232  # pixels a side
_GAP = 12
_CAPTION = 24


def saliency(classifier: nn.Module, images: Tensor, classes: Tensor | None = None, blur: float = 0.01) -> Tensor:
    """Return how strongly each pixel moves a class: the gradient of its logit with respect to the pixels.

    Args:
        classifier: maps pictures to logits, such as an :class:`ImageClassifier`.
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
    size = min(2 * math.ceil(2 * sigma) + 1, *(side - 1 + side % 2 for side in images.shape[-2:]))
    heat = gaussian_blur2d(heat, size, (sigma, sigma))
    return (heat / _percentile(heat, 0.99).clamp_min(1e-12)).clamp(0, 1)


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
    colormap = ApplyColorMap(ColorMap("inferno", num_colors=256, device=images.device, dtype=images.dtype))
    grey = images.mean(1, keepdim=True).expand_as(images) * 0.6
    return torch.lerp(grey, colormap(heat), opacity * heat)


def demo_augmentations() -> dict[str, nn.Module]:
    """Return the three kornia augmentations that the demo shows, by name; each always changes a picture alike."""
    return {
        "flip and turn": K.ImageSequential(
            K.RandomHorizontalFlip(p=1.0), K.RandomRotation((12.0, 12.0), p=1.0, resample="bilinear")
        ),
        "dark and blue": K.ColorJiggle(brightness=(0.7, 0.7), contrast=(1.2, 1.2), hue=(-0.06, -0.06), p=1.0),
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
    predictions = classifier.predict([image, *changed.values()], top_k)

    tiles = [(image, "the photo", "")]
    for (name, view), found in zip(changed.items(), predictions[1:], strict=True):
        tiles.append((view, name, f"{found[0].label} {found[0].score:.0%}"))
    heat = saliency(classifier, batch)
    below = [(overlay_heat(batch, heat)[0], "saliency", predictions[0][0].label)]
    with torch.inference_mode():
        stages = classifier.model.forward_intermediates(classifier.preprocessing(batch))
    for number, features in enumerate(stages, 1):
        colors = resize(feature_colors(features), (_TILE, _TILE), interpolation="nearest")[0]
        below.append((colors, f"stage {number}", f"{features.shape[1]} x {features.shape[2]} x {features.shape[3]}"))

    columns = max(len(tiles) + 1, len(below))
    row = _TILE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * (_TILE + _GAP) + _GAP, 2 * row + 48), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 12), title, fill="black", font=ImageFont.load_default(20))
    for number, tile in enumerate(tiles):
        _draw_tile(sheet, _GAP + number * (_TILE + _GAP), 48, *tile)
    _draw_bars(draw, _GAP + len(tiles) * (_TILE + _GAP), 48, predictions[0])
    for number, tile in enumerate(below):
        _draw_tile(sheet, _GAP + number * (_TILE + _GAP), 48 + row, *tile)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return predictions[0]


def _draw_tile(sheet: Image.Image, left: int, top: int, image: Tensor, name: str, note: str) -> None:
    """Paste a picture into a square, whole, with its name on the left below and a note on the right."""
    scale = _TILE / max(image.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
    small = resize(image[None], (height, width), interpolation="bicubic", antialias=True)[0].clamp(0, 1)
    picture = Image.fromarray(tensor_to_image((small * 255).round().byte().cpu()))
    sheet.paste(picture, (left + (_TILE - width) // 2, top + (_TILE - height) // 2))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((left, top + _TILE + 4), name, fill="#555555", font=font)
    draw.text((left + _TILE, top + _TILE + 4), note, fill="black", font=font, anchor="ra")


def _draw_bars(draw: ImageDraw.ImageDraw, left: int, top: int, predictions: Sequence[Prediction]) -> None:
    font = ImageFont.load_default(14)
    for number, prediction in enumerate(predictions):
        y = top + number * 44
        draw.text((left, y), prediction.label, fill="black", font=font)
        draw.text((left + _TILE, y), f"{prediction.score:.1%}", fill="black", font=font, anchor="ra")
        draw.rectangle((left, y + 20, left + _TILE, y + 30), fill="#eeeeee")
        draw.rectangle((left, y + 20, left + round(_TILE * prediction.score), y + 30), fill="#d1495b")


def _percentile(values: Tensor, share: float) -> Tensor:
    """Return the percentile of each picture's channel, shaped to broadcast over it."""
    flat = values.flatten(2).sort(2).values
    return flat[..., round(share * (flat.shape[2] - 1)), None, None]
