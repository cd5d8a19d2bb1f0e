"""What the training loop needs of a task: samples, a loss, an evaluator, and how networks are written to files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kornia_tinyvit.data.datasets import check_names
from kornia_tinyvit.data.loader import read_unless_broken, replay_loader
from kornia_tinyvit.data.order import EpochOrder
from kornia_tinyvit.layers import evaluating
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import Preprocessing
from kornia_tinyvit.progress import track_progress
from kornia_tinyvit.training.metrics.counts import Counts

__all__ = [
    "Evaluator",
    "Loss",
    "ReadableItems",
    "Samples",
    "Task",
    "evaluate_network",
    "read_batches",
]


class Samples(Protocol):
    """Images and their augmentation, from which :func:`~kornia_tinyvit.data.replay_loader` makes batches."""

    order: EpochOrder
    on_broken: str
    images: Any
    augmentation: Any

    def inputs(self, batch: Any, device: torch.device) -> Any:
        """Return what the network takes of a batch, on a device."""


class Loss(Protocol):
    """A loss of each sample of a batch."""

    def describe(self) -> dict[str, Any]:
        """Return what tells it from other objectives, as JSON's types."""

    def __call__(self, outputs: Any, images: Any, batch: Any) -> Tensor:
        """Return the losses :math:`(B,)`.

        Args:
            outputs: what the network returned.
            images: what it was given: :meth:`Samples.inputs`, such as augmented images :math:`(B, 3, S, S)`.
            batch: what they were made from, such as :class:`~kornia_tinyvit.data.Batch`.
        """


class ReadableItems(Dataset[tuple[int, Any]]):
    """Indices and samples of a data set; a sample that cannot be read is ``None`` or raises.

    Args:
        images: the data set.
        read: returns a sample of it by its index; by default ``images[index]``.
        skip_broken: return ``None`` for a sample that cannot be read instead of raising its error.
    """

    def __init__(self, images: Any, read: Callable[[int], Any] | None = None, skip_broken: bool = False) -> None:
        self.images, self.read, self.skip_broken = images, read or images.__getitem__, skip_broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, read_unless_broken(self.read, index, self.skip_broken)


class Evaluator(ABC):
    """A single measurement of a network on a data set.

    Args:
        images: the data set.
        counts: the metrics, whose numbers add up over images and processes.
        read: returns a sample of the data set by its index; by default ``images[index]``.
        device: where the network is.
        batch_size: how many images it takes at a time.
        skip_broken: leave out images that cannot be read.
    """

    def __init__(
        self,
        images: Any,
        counts: Counts,
        read: Callable[[int], Any] | None = None,
        *,
        device: torch.device,
        batch_size: int = 1,
        skip_broken: bool = False,
    ) -> None:
        self.items = ReadableItems(images, read, skip_broken)
        self.counts: Any = counts
        self.device, self.batch_size = device, batch_size

    def add(self, network: nn.Module, batch: list[tuple[int, Any]]) -> list[str]:
        """Measure a network on a batch of :class:`ReadableItems`, which may be empty; return names of broken images."""
        self.measure(network, [(index, sample) for index, sample in batch if sample is not None])
        return [self.items.images.name(index) for index, sample in batch if sample is None]

    @abstractmethod
    def measure(self, network: nn.Module, samples: list[tuple[int, Any]]) -> None:
        """Add what a network, called exactly once, makes of samples.

        There may be none: a process without images of its own still takes part in what the processes do together.
        """

    @abstractmethod
    def measures(self) -> dict[str, float]:
        """Return the numbers over all that was added."""


class Task:
    """A task that networks are trained for.

    Attributes:
        metric: the name among :meth:`Evaluator.measures` of the number, the higher the better, that tells the best
            weights.
        evaluator_class: takes the validation data, the network's configuration and the options of :class:`Evaluator`.
        network_class: the network that is written.
        may_lack_classes: whether the validation data may know fewer classes than the network, whose last do not occur.
    """

    metric: ClassVar[str]
    evaluator_class: ClassVar[Callable[..., Evaluator]]
    network_class: ClassVar[Any]
    may_lack_classes: ClassVar[bool] = False

    def check(self, images: Any, config: Any, class_names: Sequence[str] | None) -> None:
        """Refuse validation images of other classes than the network's.

        Raises:
            ValueError: telling what differs.
        """
        check_names(images.class_names, class_names)
        theirs, ours = images.num_classes, config.num_classes
        if theirs > ours or (theirs < ours and not self.may_lack_classes):
            raise ValueError(f"The validation data have {theirs} classes, but the network {ours}.")

    def evaluator(self, images: Any, config: Any, samples: Any, **options: Any) -> Evaluator:
        """Begin to measure networks of a configuration on validation images.

        Args:
            images: the validation data.
            config: the network's configuration.
            samples: what it is trained on.
            **options: ``device``, ``batch_size`` and ``skip_broken``, as for :class:`Evaluator`.
        """
        return type(self).evaluator_class(images, config, **options)

    def preprocessing(self, model: nn.Module, samples: Any) -> Preprocessing:
        """Return what images go through before the network, which its files state: by default as before training."""
        return next(module.preprocessing for module in model.modules() if isinstance(module, TinyViT))

    def writer(
        self, config: Any, state: dict[str, Tensor], class_names: Sequence[str] | None, preprocessing: Preprocessing
    ) -> Callable[[Path], object]:
        """Return what writes weights to a file that the network's ``from_config`` reads."""
        network = type(self).network_class.from_config(config, class_names=class_names)
        network.backbone.preprocessing = preprocessing
        self.load(network, state)
        save: Callable[[Path], object] = network.save
        return save

    def load(self, network: Any, state: dict[str, Tensor]) -> None:
        """Load what was trained into the network that is written."""
        network.load_state_dict(state)


@torch.no_grad()
def evaluate_network(
    network: nn.Module, evaluator: Evaluator, workers: int = 0, progress: bool = False, **place: int
) -> list[str]:
    """Let an evaluator see its images, or a process's share of them.

    Args:
        network: what is measured, in evaluation mode meanwhile.
        evaluator: what measures it.
        workers: processes that read images.
        progress: show a bar.
        **place: ``process`` and ``processes``, as for :func:`read_batches`.

    Returns:
        Names of the images that could not be read.
    """
    loader = read_batches(evaluator.items, evaluator.batch_size, workers, **place)
    with evaluating(network):
        batches = track_progress(loader, "evaluating", progress)
        return [name for batch in batches for name in evaluator.add(network, batch)]


def read_batches(
    items: ReadableItems, batch_size: int, workers: int = 0, process: int = 0, processes: int = 1
) -> DataLoader[Any]:
    """Return a loader of batches of readable items; each process gets as many batches, of which some may be empty.

    Args:
        items: the data set.
        batch_size: how many images at a time.
        workers: processes that read images.
        process: number of this process.
        processes: how many there are.
    """
    count, step = len(items), batch_size * processes
    firsts = range(process * batch_size, -(-count // step) * step, step)
    return replay_loader(items, [range(first, min(first + batch_size, count)) for first in firsts], workers)
