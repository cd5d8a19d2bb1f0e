"""The sheet of the demo: a photo, changed views of it, what the network finds in them, and where it looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import kornia.augmentation as K
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from kornia_tinyvit.classification import ImageClassifier, Prediction
from kornia_tinyvit.images import to_pil
from kornia_tinyvit.layers import evaluating
from kornia_tinyvit.visualization.drawing import save_image
from kornia_tinyvit.visualization.features import feature_colors, overlay_heatmap, saliency, stage_features

__all__ = ["demo_augmentations", "save_figure"]

_TILE = 232  # pixels a side
_GAP = 12
_CAPTION = 24
_TITLE = 48


def demo_augmentations() -> dict[str, nn.Module]:
    """Return the three kornia augmentations that the demo shows, by name; each always changes an image alike."""
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
    """Draw one image's sheet: predictions, augmented views with theirs, saliency and the features of the stages.

    The features are those of the whole image with its shorter side at four times the network's resolution, which
    shows more than the few cells that the classifier itself looks at.

    Args:
        path: the PNG file to write.
        classifier: the network to look into.
        image: image :math:`(3, H, W)` in [0, 1].
        title: what to write above.
        views: augmentations to show by name; :func:`demo_augmentations` if left out.
        top_k: how many predictions to list.

    Returns:
        The predictions for the image itself.
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
    below = [(overlay_heatmap(batch, heat)[0], "saliency", predictions[0][0].label)]
    for number, features in enumerate(stages, 1):
        below.append((feature_colors(features)[0], f"stage {number}", " x ".join(map(str, features.shape[1:]))))

    sheet = _Sheet(columns=max(len(above) + 1, len(below)), aspect=image.shape[-2] / image.shape[-1], title=title)
    for row, tiles in enumerate((above, below)):
        for column, tile in enumerate(tiles):
            sheet.draw_tile(row, column, *tile)
    sheet.draw_bars(0, len(above), predictions[0])
    save_image(path, sheet.canvas)
    return predictions[0]


class _Sheet:
    """A page of equal tiles, each with a line of text below.

    Args:
        columns: tiles side by side, in two rows.
        aspect: height over width of the images.
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
        """Put an image :math:`(3, H, W)` whole into a tile, its name below on the left and a note on the right."""
        left, top = self._corner(row, column)
        scale = min(side / pixels for side, pixels in zip(self.tile, (image.shape[2], image.shape[1]), strict=True))
        width, height = (max(1, round(pixels * scale)) for pixels in (image.shape[2], image.shape[1]))
        resized = to_pil(image).resize((width, height), Image.Resampling.BICUBIC)
        self.canvas.paste(resized, (left + (self.tile[0] - width) // 2, top + (self.tile[1] - height) // 2))
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
