"""From images to labels: :class:`ImageClassifier`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from kornia.geometry.transform import hflip
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import Checkpoint
from kornia_tinyvit.checkpoints.catalog import default_class_names
from kornia_tinyvit.config import TinyViTConfig, name_classes
from kornia_tinyvit.images import ImageInput, read_batches
from kornia_tinyvit.layers import evaluating
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import EvaluationPipeline, check_counts

__all__ = ["ImageClassifier", "Prediction", "center_zoom"]

View = Callable[[Tensor], Tensor]
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Prediction:
    """One class that an image may show.

    Args:
        label: name of the class.
        index: position of the class in the logits.
        score: probability in [0, 1].
    """

    label: str
    index: int
    score: float


def center_zoom(images: Tensor, share: float = 0.875) -> Tensor:
    """Return the middle of images :math:`(*, H, W)`, ``share`` of each side, as a view for test-time augmentation."""
    height, width = images.shape[-2:]
    top, left = round(height * (1 - share) / 2), round(width * (1 - share) / 2)
    return images[..., top : height - top, left : width - left]


class ImageClassifier(nn.Module):
    """A :class:`TinyViT` with the preprocessing it was evaluated with and the names of its classes.

    It takes images in [0, 1] of any size and is differentiable down to the pixels, so it stands in an
    :class:`torch.nn.Sequential` behind kornia's augmentations.

    Args:
        model: the network.
        class_names: names of the classes in the order of the logits; the network's own, or numbers, if left out.
        preprocessing: what turns images in [0, 1] into what the network takes, instead of the
            :class:`~kornia_tinyvit.preprocessing.EvaluationPipeline` of ``model.preprocessing``.
        views: test-time augmentation: functions of an image batch :math:`(B, C, H, W)` whose logits are averaged with
            those of the image itself, for example ``kornia.geometry.hflip``. See :attr:`DEFAULT_VIEWS`.

    Raises:
        ValueError: if the network has no classes, or the names are not as many.

    Example:
        >>> classifier = ImageClassifier.from_config("1m", pretrained="cifar10")
        >>> classifier(torch.rand(2, 3, 48, 80)).shape
        torch.Size([2, 10])
    """

    #: A flip and a closer look, the usual test-time augmentation: three times the work.
    DEFAULT_VIEWS: tuple[View, ...] = (hflip, center_zoom)

    def __init__(
        self,
        model: TinyViT,
        *,
        class_names: Sequence[str] | None = None,
        preprocessing: nn.Module | None = None,
        views: Sequence[View] = (),
    ) -> None:
        super().__init__()
        config = model.config
        if config.num_classes == 0 or config.mobile_sam:
            raise ValueError(
                "ImageClassifier needs a network with classes; MobileSAM's encoder and num_classes=0 have none."
            )
        self.model = model
        self.preprocessing = preprocessing or EvaluationPipeline.from_preprocessing(model.preprocessing)
        self.class_names = name_classes(model.class_names if class_names is None else class_names, config.num_classes)
        self.views = tuple(views)

    @classmethod
    def from_config(
        cls,
        config: str | TinyViTConfig | None = None,
        *,
        pretrained: bool | str | Path | Checkpoint = False,
        class_names: Sequence[str] | None = None,
        views: Sequence[View] = (),
        **kwargs: Any,
    ) -> ImageClassifier:
        """Build a classifier from what :meth:`TinyViT.from_config` takes.

        Args:
            config: variant or configuration.
            pretrained: weights. Their class names come along; a head of 1000 classes without names is ImageNet-1k's.
            class_names: names of the classes, instead of those.
            views: test-time augmentation.
            **kwargs: for :meth:`TinyViT.from_config`.

        Raises:
            ValueError: if the network cannot be built, or the names are not as many as its classes.
            CheckpointError: if the weights cannot be loaded.
        """
        model = TinyViT.from_config(config, pretrained=pretrained, **kwargs)
        if class_names is None and not model.training:
            class_names = model.class_names or default_class_names(model.config.num_classes)
        classifier = cls(model, class_names=class_names, views=views)
        return classifier.train(model.training)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Return logits :math:`(B, classes)`, averaged over the views if there are any.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1], or a list of images :math:`(C, H, W)` of any sizes, on
                the device of the network.

        Raises:
            TypeError: if the images are not floating point tensors.
            ValueError: if their shape is another.
        """
        return self._average(self._prepare(images, view) for view in (None, *self.views))

    def predict(
        self, images: ImageInput | Iterable[ImageInput], top_k: int = 5, batch_size: int = 16
    ) -> list[list[Prediction]]:
        """Name what images show.

        Args:
            images: one image or several: tensors :math:`(C, H, W)` in [0, 1], paths, PIL images, or a batch tensor
                :math:`(B, C, H, W)`. They are moved to the network's device. A thread reads and resizes the next batch
                while the network works on one, so any number of files, or a generator, takes the memory of two batches.
            top_k: how many classes to name; at most all of them.
            batch_size: how many images the network takes at a time.

        Returns:
            For each image its most likely classes, the best first.

        Raises:
            TypeError: if something is no image.
            ValueError: if a file cannot be read, a shape is wrong, or a number is not positive.
            FileNotFoundError: if there is no such file.
        """
        check_counts(top_k=top_k, batch_size=batch_size)
        found: list[tuple[list[int], list[float]]] = []
        with evaluating(self), torch.inference_mode(), ThreadPoolExecutor(1) as reader:
            for inputs in _ahead(reader, self._batches(images, batch_size)):
                scores = self._average(inputs).float().softmax(1)
                best = scores.topk(min(top_k, scores.shape[1]))
                found += zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            [Prediction(self.class_names[index], index, score) for index, score in zip(indices, values, strict=True)]
            for indices, values in found
        ]

    def _average(self, inputs: Iterable[Tensor]) -> Tensor:
        """Return the logits averaged over what the views made of the images."""
        return torch.stack([self.model(images) for images in inputs]).mean(0)

    def _batches(self, images: ImageInput | Iterable[ImageInput], batch_size: int) -> Iterator[list[Tensor]]:
        """Read images batch by batch and return what each view makes of them."""
        for batch in read_batches(images, self.model, self.model.config.in_chans, batch_size):
            with torch.no_grad():
                inputs = [self._prepare(batch, view) for view in (None, *self.views)]
            yield inputs

    def _prepare(self, images: Tensor | Sequence[Tensor], view: View | None) -> Tensor:
        if isinstance(images, Tensor):
            return self.preprocessing(images if view is None else view(images))
        if not images:
            raise ValueError("Got an empty list of images; an empty batch is a tensor (0, C, H, W).")
        batches = (image.unsqueeze(0) for image in images)
        return torch.cat([self.preprocessing(batch if view is None else view(batch)) for batch in batches])


def _ahead(reader: Executor, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Return batches of which the next is always being read."""
    coming = reader.submit(next, batches, None)
    while (batch := coming.result()) is not None:
        coming = reader.submit(next, batches, None)
        yield batch
