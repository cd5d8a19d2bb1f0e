"""Figure of a classifier's predictions, saliency and feature maps for one image and augmented views of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import kornia.augmentation as K
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from kornia_tinyvit.classification import ImageClassifier, Prediction
from kornia_tinyvit.images import to_pil
from kornia_tinyvit.modules import evaluation_copy
from kornia_tinyvit.visualization.drawing import save_image
from kornia_tinyvit.visualization.features import feature_colors, overlay_heatmap, saliency, stage_features

__all__ = ["demo_augmentations", "save_figure"]

_TILE = 232  # width in pixels
_GAP = 12
_CAPTION = 24
_TITLE = 48


def demo_augmentations() -> dict[str, nn.Module]:
    """Return the demo's three kornia augmentations by name; their parameters, except for the noise, are fixed."""
    return {
        "flip and turn": K.ImageSequential(
            K.RandomHorizontalFlip(p=1.0), K.RandomRotation((12.0, 12.0), p=1.0, resample="bilinear")
        ),
        "dark and pale": K.ColorJiggle(brightness=(0.7, 0.7), contrast=(1.2, 1.2), saturation=(0.4, 0.4), p=1.0),
        "noise and blur": K.ImageSequential(
            K.RandomGaussianBlur((5, 5), (1.5, 1.5), p=1.0), K.RandomGaussianNoise(std=0.08, p=1.0)
        ),
    }


def save_figure(
    path: str | Path,
    classifier: ImageClassifier,
    image: Tensor,
    title: str,
    views: dict[str, nn.Module] | None = None,
    top_k: int = 5,
) -> list[Prediction]:
    """Write a figure of an image: predictions, augmented views with top-1 predictions, saliency and feature maps.

    Feature maps are those of :func:`~kornia_tinyvit.visualization.stage_features`.

    Args:
        path: the PNG file to write.
        classifier: the classifier.
        image: image :math:`(3, H, W)` in [0, 1].
        title: title of the figure.
        views: augmentations by name; default :func:`demo_augmentations`.
        top_k: number of predictions to list.

    Returns:
        The predictions for the original image.
    """
    views = demo_augmentations() if views is None else views
    batch = image.unsqueeze(0)
    changed = {name: view(batch).clamp(0, 1)[0] for name, view in views.items()}
    network = evaluation_copy(classifier)
    predictions = network.predict([image, *changed.values()], top_k)
    heat = saliency(network, batch)
    stages = stage_features(network, batch)

    above = [(image, "the photo", "")]
    for (name, view), found in zip(changed.items(), predictions[1:], strict=True):
        above.append((view, name, f"{found[0].label} {found[0].score:.0%}"))
    below = [(overlay_heatmap(batch, heat)[0], "saliency", predictions[0][0].label)]
    for number, features in enumerate(stages, 1):
        below.append((feature_colors(features)[0], f"stage {number}", " x ".join(map(str, features.shape[1:]))))

    figure = _Figure(columns=max(len(above) + 1, len(below)), aspect=image.shape[-2] / image.shape[-1], title=title)
    for row, tiles in enumerate((above, below)):
        for column, tile in enumerate(tiles):
            figure.draw_tile(row, column, *tile)
    figure.draw_bars(0, len(above), predictions[0])
    save_image(path, figure.canvas)
    return predictions[0]


class _Figure:
    """Canvas of two rows of tiles with captions.

    Args:
        columns: tiles per row.
        aspect: ratio of height to width of the images.
        title: title of the figure.
    """

    def __init__(self, columns: int, aspect: float, title: str) -> None:
        self.tile = (_TILE, round(_TILE * min(max(aspect, 0.7), 1.5)))
        self.step = (_TILE + _GAP, self.tile[1] + _CAPTION + _GAP)
        self.canvas = Image.new("RGB", (_GAP + columns * self.step[0], _TITLE + 2 * self.step[1]), "white")
        self.draw = ImageDraw.Draw(self.canvas)
        self.font = ImageFont.load_default(14)
        self.draw.text((_GAP, _GAP), title, fill="black", font=ImageFont.load_default(20))

    def draw_tile(self, row: int, column: int, image: Tensor, name: str, note: str) -> None:
        """Draw an image :math:`(3, H, W)`, resized to fit a tile, with its name and a note below."""
        left, top = self._corner(row, column)
        scale = min(side / pixels for side, pixels in zip(self.tile, (image.shape[2], image.shape[1]), strict=True))
        width, height = (max(1, round(pixels * scale)) for pixels in (image.shape[2], image.shape[1]))
        resized = to_pil(image).resize((width, height), Image.Resampling.BICUBIC)
        self.canvas.paste(resized, (left + (self.tile[0] - width) // 2, top + (self.tile[1] - height) // 2))
        below = top + self.tile[1] + 4
        self.draw.text((left, below), name, fill="#555555", font=self.font)
        self.draw.text((left + _TILE, below), note, fill="black", font=self.font, anchor="ra")

    def draw_bars(self, row: int, column: int, predictions: Sequence[Prediction]) -> None:
        """Draw the scores of some classes as bars in a tile."""
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
