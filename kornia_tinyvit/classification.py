"""Image classification: :class:`ImageClassifier`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from kornia_tinyvit.images import Images, map_images, read_batches
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import evaluation_copy, unwrapped
from kornia_tinyvit.preprocessing import EvaluationPipeline, check_counts

__all__ = ["ImageClassifier", "Prediction", "center_zoom"]

View = Callable[[Tensor], Tensor]
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Prediction:
    """A predicted class.

    Args:
        label: name of the class.
        index: index of the class.
        score: probability in [0, 1].
    """

    label: str
    index: int
    score: float


def center_zoom(images: Tensor, fraction: float = 0.875) -> Tensor:
    """Return the center crop of images as a view for test-time augmentation.

    Args:
        images: images :math:`(*, H, W)`.
        fraction: fraction of each side that the crop keeps.
    """
    height, width = images.shape[-2:]
    top, left = round(height * (1 - fraction) / 2), round(width * (1 - fraction) / 2)
    return images[..., top : height - top, left : width - left]


class ImageClassifier(nn.Module):
    """A :class:`TinyViT` with its preprocessing and class names.

    It takes images in [0, 1] of any size and is differentiable with respect to the pixels, so it composes with kornia's
    augmentations in an :class:`torch.nn.Sequential`.

    Args:
        model: the network.
        class_names: names of the classes in the order of the logits; by default those of the network, or
            ``"class 0"`` and so on.
        preprocessing: module that resizes and normalizes images in [0, 1]; by default the
            :class:`~kornia_tinyvit.preprocessing.EvaluationPipeline` of ``model.preprocessing``.
        views: test-time augmentation: functions of images :math:`(B, C, H, W)`, such as ``kornia.geometry.hflip``,
            whose logits are averaged with those of the images themselves. See :attr:`DEFAULT_VIEWS`.

    Raises:
        ValueError: if the network has no classes, or the number of names differs from it.

    Example:
        >>> classifier = ImageClassifier.from_config("1m", pretrained="cifar10")
        >>> classifier(torch.rand(2, 3, 48, 80)).shape
        torch.Size([2, 10])
    """

    #: A horizontal flip and a center crop, the usual test-time augmentation, at three times the cost.
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
        inner: TinyViT = unwrapped(model)
        config = inner.config
        if config.num_classes == 0 or config.mobile_sam:
            raise ValueError("ImageClassifier needs a network with a head, without mobile_sam or num_classes=0.")
        self.model = model
        self.preprocessing = preprocessing or EvaluationPipeline.from_preprocessing(inner.preprocessing)
        self.class_names = name_classes(inner.class_names if class_names is None else class_names, config.num_classes)
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
        """Build a classifier with the arguments of :meth:`TinyViT.from_config`.

        Args:
            config: variant or configuration.
            pretrained: the pretrained weights.
            class_names: names of the classes; by default those of the weights, or ImageNet-1k's for 1000 classes.
            views: test-time augmentation.
            **kwargs: further arguments of :meth:`TinyViT.from_config`.

        Returns:
            The classifier, in the mode of :meth:`TinyViT.from_config`.

        Raises:
            ValueError: if an argument is out of range, or the number of names differs from that of the classes.
            CheckpointError: if the weights cannot be loaded.
        """
        model = TinyViT.from_config(config, pretrained=pretrained, class_names=class_names, **kwargs)
        if pretrained and model.config.mobile_sam:
            source = pretrained.source if isinstance(pretrained, Checkpoint) else pretrained
            raise ValueError(
                f"{source} holds MobileSAM's encoder, which has no classes. Use MobileSAM.from_config or the "
                "command segment, or pass num_classes to train a classifier from it."
            )
        class_names = model.class_names
        if class_names is None and not model.training:
            class_names = default_class_names(model.config.num_classes)
        classifier = cls(model, class_names=class_names, views=views)
        return classifier.train(model.training)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Compute logits :math:`(B, classes)`, averaged over the views.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1], or a list of images :math:`(C, H, W)` of any sizes, on
                the device of the network.

        Raises:
            TypeError: if the images are not floating point tensors.
            ValueError: if they have another shape.
        """
        return self._average(self._prepare(images))

    def predict(self, images: Images, top_k: int = 5, batch_size: int = 16) -> list[list[Prediction]]:
        """Classify images of any size.

        A thread prepares the next batch while the network processes one. No more than two batches are in memory,
        however many files or images of a generator there are.

        Args:
            images: one or several images in any form that :func:`~kornia_tinyvit.images.open_image` takes: paths,
                encoded files, PIL images, arrays :math:`(H, W, C)`, tensors :math:`(C, H, W)`, or a batch. They are
                moved to the network's device.
            top_k: number of classes to return, at most all.
            batch_size: number of images per forward pass.

        Returns:
            The classes of each image, sorted by descending score.

        Raises:
            TypeError: if an element is not an image.
            ValueError: if a file cannot be read, a shape is wrong, values are outside of [0, 1], or a number is not
                positive.
            FileNotFoundError: if a file does not exist.
        """
        check_counts(top_k=top_k, batch_size=batch_size)
        network, predictions = evaluation_copy(self), []
        with torch.inference_mode(), ThreadPoolExecutor(1) as reader:
            for inputs in _prefetch(reader, network._batches(images, batch_size)):
                scores = network._average(inputs).float().softmax(1)
                best = scores.topk(min(top_k, scores.shape[1]))
                for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                    ranked = zip(indices, values, strict=True)
                    predictions.append([Prediction(self.class_names[index], index, score) for index, score in ranked])
        return predictions

    def _average(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the logits averaged over the views."""
        return torch.stack([self.model(images) for images in inputs]).mean(0)

    def _batches(self, images: Images, batch_size: int) -> Iterator[list[Tensor]]:
        for batch in read_batches(images, self.model, unwrapped(self.model).config.in_chans, batch_size):
            with torch.no_grad():
                inputs = self._prepare(batch)
            yield inputs

    def _prepare(self, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Return the network's inputs: the images themselves and each view of them."""

        def prepare(view: View) -> Tensor:
            return map_images(lambda batch: self.preprocessing(view(batch)), images)

        return [map_images(self.preprocessing, images), *map(prepare, self.views)]


def _prefetch(reader: Executor, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Iterate over batches while a thread reads the next one."""
    pending = reader.submit(next, batches, None)
    while (batch := pending.result()) is not None:
        pending = reader.submit(next, batches, None)
        yield batch
