"""What all datasets have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

__all__ = ["BrokenImageError", "ImageLoader", "check_names", "match_classes"]


class BrokenImageError(ValueError):
    """An image of a dataset, or its target, cannot be decoded; the message names it."""


def match_classes(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> list[int] | None:
    """Return the positions of a dataset's classes among a network's, or ``None`` to match them by position.

    Args:
        ours: names of the dataset's classes, where they are known.
        theirs: names of the network's.

    Raises:
        ValueError: if some but not all of the dataset's classes are among the network's.
    """
    if ours is None or theirs is None or not set(ours) & set(theirs):
        return None
    unknown = sorted(set(ours) - set(theirs))
    if unknown:
        raise ValueError(f"The network does not know the classes {', '.join(unknown[:5])} of the data.")
    return [theirs.index(name) for name in ours]


def check_names(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> None:
    """Reject a dataset whose classes have other names than a network's, or another order.

    Args:
        ours: names of the dataset's classes, where they are known.
        theirs: names of the network's.

    Raises:
        ValueError: naming some that differ.
    """
    if ours is not None and theirs is not None and tuple(ours) != tuple(theirs):
        others = sorted(set(ours) ^ set(theirs))[:5]
        raise ValueError(f"The validation pictures have other classes than the network: {', '.join(others)}.")


class ImageLoader(DataLoader[Any]):
    """A data loader that raises what a worker says of a picture as it was said.

    torch's own puts the worker's whole traceback into the message.

    Args:
        pictures: the data.
        collate_fn: makes a batch of what the data returns.
        **options: as torch's loader takes them.
    """

    def __init__(self, pictures: Any, *, collate_fn: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(_Telling(pictures), collate_fn=partial(_collate_unless_error, collate_fn), **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches.

        Raises:
            BrokenImageError: if a picture cannot be decoded.
            OSError: if its file cannot be read.
        """
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


class _Telling(Dataset[Any]):
    """Hands an error about a picture over in the place of a batch."""

    def __init__(self, pictures: Any) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, keys: list[Any]) -> Any:
        try:
            if hasattr(self.pictures, "__getitems__"):
                return self.pictures.__getitems__(keys)
            return [self.pictures[key] for key in keys]
        except (BrokenImageError, OSError) as error:
            return error


def _collate_unless_error(collate_fn: Callable[[Any], Any], found: Any) -> Any:
    return found if isinstance(found, Exception) else collate_fn(found)
