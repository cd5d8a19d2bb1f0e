"""What all datasets have in common."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["BrokenImageError", "check_names", "match_classes"]


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
