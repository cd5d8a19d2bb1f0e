"""Base classes of the training tasks: samples, losses, evaluators and tasks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kornia_tinyvit.data.loader import read_unless_broken, replay_loader
from kornia_tinyvit.data.order import EpochOrder
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import evaluation_copy
from kornia_tinyvit.preprocessing import Preprocessing
from kornia_tinyvit.progress import track_progress
from kornia_tinyvit.training.metrics.counts import Counts

__all__ = ["Evaluator", "Loss", "ReadableItems", "Samples", "Task", "evaluate_network", "read_batches"]


class Samples(Protocol):
    """Images and their augmentation, from which :func:`~kornia_tinyvit.data.replay_loader` makes batches."""

    order: EpochOrder
    on_broken: str
    images: Any
    augmentation: Any

    def inputs(self, batch: Any, device: torch.device) -> Any:
        """Return the network's inputs of a batch, on a device.

        Args:
            batch: the batch.
            device: device of the result.
        """


class Loss(Protocol):
    """A loss with one value per sample."""

    def describe(self) -> dict[str, Any]:
        """Return the kind of the loss and its hyperparameters, as JSON types."""

    def __call__(self, outputs: Any, images: Any, batch: Any) -> Tensor:
        """Return the losses :math:`(B,)`.

        Args:
            outputs: outputs of the network.
            images: its inputs, from :meth:`Samples.inputs`, such as augmented images :math:`(B, 3, S, S)`.
            batch: the batch, such as a :class:`~kornia_tinyvit.data.Batch`.
        """


class ReadableItems(Dataset[tuple[int, Any]]):
    """Indices and samples of a data set; a corrupt sample is ``None`` or raises.

    Args:
        images: the data set.
        skip_broken: return ``None`` for a corrupt sample instead of raising an error.

    Attributes:
        read: returns a sample by its index: ``images[index]``.
    """

    def __init__(self, images: Any, skip_broken: bool = False) -> None:
        self.images, self.skip_broken = images, skip_broken
        self.read: Callable[[int], Any] = images.__getitem__

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, read_unless_broken(self.read, index, self.skip_broken)


class Evaluator(ABC):
    """One evaluation of a network on a data set.

    Args:
        images: the data set.
        counts: the metrics.
        device: device of the network.
        batch_size: images per forward pass.
        skip_broken: skip corrupt images instead of raising an error.

    Attributes:
        counts: the metrics.
        items: the samples to evaluate.
    """

    def __init__(
        self, images: Any, counts: Counts, *, device: torch.device, batch_size: int = 1, skip_broken: bool = False
    ) -> None:
        self.items = ReadableItems(images, skip_broken)
        self.counts: Any = counts
        self.device, self.batch_size = device, batch_size

    @abstractmethod
    def update(self, network: nn.Module, samples: list[tuple[int, Any]]) -> None:
        """Call the network exactly once and update the metrics.

        Args:
            network: the network.
            samples: indices and samples; none on a rank without images left, which still takes part in the
                collective operations of the forward pass.
        """


class Task:
    """A task that networks are trained for.

    Attributes:
        metrics: fields of the evaluator's scores that are logged; the first one selects the best weights.
        evaluator_class: takes the validation data, the network's configuration and the options of :class:`Evaluator`.
        network_class: class of the saved network.
        prefix: prefix of the trained weights' names in front of those of the saved network.
        may_lack_classes: accept validation data with fewer classes than the network.
    """

    metrics: ClassVar[tuple[str, ...]]
    evaluator_class: ClassVar[Callable[..., Evaluator]]
    network_class: ClassVar[Any]
    prefix: ClassVar[str] = ""
    may_lack_classes: ClassVar[bool] = False

    @property
    def metric(self) -> str:
        """Name of the metric that selects the best weights; higher is better."""
        return self.metrics[0]

    def report(self, scores: Any) -> dict[str, float]:
        """Return the metrics of an evaluation in per cent; 0 where the data has no objects."""
        values = {name: getattr(scores, name) for name in self.metrics}
        return {name: 0.0 if math.isnan(value) else round(value, 4) for name, value in values.items()}

    def match(self, images: Any, config: Any, class_names: Sequence[str] | None) -> Any:
        """Return evaluation images with the class indices of the network, matched by name.

        Args:
            images: the data set.
            config: configuration of the network.
            class_names: names of the network's classes; ``None`` if they are unknown.

        Raises:
            ValueError: if the network does not have a class of the images, or the number of classes differs.
        """
        images = images.with_classes(class_names)
        theirs, ours = images.num_classes, config.num_classes
        if theirs > ours or (theirs < ours and not self.may_lack_classes):
            raise ValueError(f"The data has {theirs} classes, but the network has {ours}.")
        return images

    def evaluator(self, images: Any, config: Any, preprocessing: Preprocessing, **options: Any) -> Evaluator:
        """Create an evaluator on validation images.

        Args:
            images: the validation data.
            config: configuration of the network.
            preprocessing: preprocessing of the network; segmenters and detectors have their own.
            **options: ``device``, ``batch_size`` and ``skip_broken``, see :class:`Evaluator`.
        """
        return type(self).evaluator_class(images, config, **options)

    def preprocessing(self, model: nn.Module, samples: Any) -> Preprocessing:
        """Return the preprocessing to save with the weights: by default the network's before training.

        Args:
            model: the trained network.
            samples: the training images.
        """
        return _encoder(model).preprocessing

    def restore(
        self, config: Any, state: dict[str, Tensor], class_names: Sequence[str] | None, preprocessing: Preprocessing
    ) -> Any:
        """Build the network to save and load the trained weights.

        Args:
            config: configuration of the network.
            state: trained weights.
            class_names: names of the classes.
            preprocessing: preprocessing to save with the weights.
        """
        network = self.build(config, class_names)
        _encoder(network).preprocessing = preprocessing
        self.load(network, {name.removeprefix(self.prefix): tensor for name, tensor in state.items()})
        return network

    def build(self, config: Any, class_names: Sequence[str] | None) -> Any:
        """Build the network to save, with random weights.

        Args:
            config: configuration of the network.
            class_names: names of the classes.
        """
        return type(self).network_class.from_config(config, class_names=class_names)

    def load(self, network: Any, state: dict[str, Tensor]) -> None:
        """Load trained weights, without :attr:`prefix`, into the network to save.

        Args:
            network: the network to save.
            state: trained weights.
        """
        network.load_state_dict(state)

    def draw(self, network: Any, image: Image.Image, target: Any) -> list[tuple[Image.Image, str]]:
        """Draw an image, its ground truth and the prediction of a network; by default nothing.

        Args:
            network: the network to save.
            image: the image.
            target: its target in the validation data.

        Returns:
            Drawings with their captions.
        """
        return []

    def legend(self, network: Any) -> Sequence[str]:
        """Return the names of the classes in the order of their colors, if :meth:`draw` does not write them.

        Args:
            network: the network to save.
        """
        return ()

    def save(self, network: Any, path: Path) -> None:
        """Write a file that the network's ``from_config`` reads.

        Args:
            network: the network to save.
            path: the file to write.
        """
        network.save(path)


def _encoder(network: nn.Module) -> TinyViT:
    return next(module for module in network.modules() if isinstance(module, TinyViT))


@torch.no_grad()
def evaluate_network(
    network: nn.Module, evaluator: Evaluator, workers: int = 0, progress: bool = False, **shard: int
) -> list[str]:
    """Run an evaluator over its images, or over the shard of a rank.

    Args:
        network: the network, evaluated as in evaluation mode and not changed.
        evaluator: the evaluator.
        workers: number of loader processes.
        progress: show a progress bar.
        **shard: ``rank`` and ``world_size``, see :func:`read_batches`.

    Returns:
        Names of the corrupt images.
    """
    loader = read_batches(evaluator.items, evaluator.batch_size, workers, **shard)
    broken: list[str] = []
    network = evaluation_copy(network)
    for batch in track_progress(loader, "evaluating", progress):
        evaluator.update(network, [(index, sample) for index, sample in batch if sample is not None])
        broken += [evaluator.items.images.name(index) for index, sample in batch if sample is None]
    return broken


def read_batches(
    items: ReadableItems, batch_size: int, workers: int = 0, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """Return a loader of a rank's batches; all ranks get the same number of batches, of which some may be empty.

    Args:
        items: the data set.
        batch_size: images per batch.
        workers: number of loader processes.
        rank: rank of this process.
        world_size: number of ranks.
    """
    count, step = len(items), batch_size * world_size
    firsts = range(rank * batch_size, -(-count // step) * step, step)
    return replay_loader(items, [range(first, min(first + batch_size, count)) for first in firsts], workers)
