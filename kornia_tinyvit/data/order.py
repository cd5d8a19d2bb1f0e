"""Random numbers that are a pure function of seed, epoch, sample and purpose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["EpochOrder", "keyed_words", "philox"]

# Multipliers and key increments of Philox 4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_CHUNK = 1 << 18  # samples per call of the generator, which bounds the memory for large datasets
_ORDER_STREAM = 0  # the augmentation's streams start at 1


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox 4x32-10, the counter-based generator of Salmon et al. (SC 2011), vectorized over counters.

    Args:
        counter: four words below 2**32 along the first axis, :math:`(4, ...)`.
        key: two words below 2**32.

    Returns:
        Four random words per counter, :math:`(4, ...)`.
    """
    c0, c1, c2, c3 = (word.astype(np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c0, c2 = (p1 >> _HIGH) ^ c1 ^ np.uint64(k0), (p0 >> _HIGH) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def keyed_words(seed: int, epoch: int, indices: NDArray[np.int64], stream: int, blocks: int = 1) -> NDArray[np.uint32]:
    """Return random words; each row depends only on its own key.

    Args:
        seed: in [0, 2**64).
        epoch: in [0, 2**32).
        indices: index of each row, in [0, 2**32), :math:`(B,)`.
        stream: number of the purpose; different purposes have independent words.
        blocks: number of groups of four words.

    Returns:
        Words :math:`(B, 4 * blocks)`, each uniform in [0, 2**32).
    """
    rows = np.asarray(indices, dtype=np.uint64)[:, None]
    block = np.arange(blocks, dtype=np.uint64)[None, :]
    counter = np.stack(np.broadcast_arrays(rows, np.uint64(epoch), np.uint64(stream), block))
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return words.transpose(1, 2, 0).reshape(len(rows), 4 * blocks)


def keyed_seed(seed: int, epoch: int, index: int, stream: int) -> int:
    """Return a seed in [0, 2**63) for a random generator, from the key of :func:`keyed_words`."""
    words = keyed_words(seed, epoch, np.array([index]), stream)[0].astype(np.uint64)
    return int(words[0] << np.uint64(31) | words[1] >> np.uint64(1))


class EpochOrder:
    """The order of the samples in each epoch: a permutation that is a pure function of seed and epoch.

    Args:
        num_samples: number of samples, in [1, 2**32).
        seed: random seed, in [0, 2**64).

    Raises:
        ValueError: if ``num_samples`` or ``seed`` is out of its range.

    Example:
        >>> order = EpochOrder(5, seed=0)
        >>> sorted(order.permutation(3).tolist())
        [0, 1, 2, 3, 4]
        >>> order.permutation(3)[order.positions(3, np.array([4, 0]))].tolist()
        [4, 0]
    """

    def __init__(self, num_samples: int, seed: int = 0) -> None:
        if not 0 < num_samples < 2**32:
            raise ValueError(f"num_samples must be in [1, 2**32); got {num_samples}.")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64); got {seed}.")
        self.num_samples = num_samples
        self.seed = seed
        self._cached = (-1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples of an epoch in their order, :math:`(N,)`.

        Args:
            epoch: number of the epoch, in [0, 2**32).

        Raises:
            ValueError: if ``epoch`` is out of its range.
        """
        return self._prepare(epoch)[1]

    def positions(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of samples in the epoch's order, :math:`(B,)`.

        Args:
            epoch: number of the epoch, in [0, 2**32).
            indices: the samples, :math:`(B,)`.

        Raises:
            ValueError: if ``epoch`` is out of its range.
            IndexError: if an index is not in [0, num_samples).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_samples:
            raise IndexError(
                f"Sample indices must be in [0, {self.num_samples}); got {indices.min()} to {indices.max()}."
            )
        return self._prepare(epoch)[2][indices]

    def partners(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sample that each is mixed with: its neighbor in the pairs (0, 1), (2, 3), ... of the order.

        The last sample of an odd number is its own partner. See :meth:`positions` for the arguments.

        Args:
            epoch: number of the epoch, from 0.
            indices: indices of the samples, :math:`(B,)`.
        """
        neighbors = self.positions(epoch, indices) ^ 1
        return np.where(neighbors < self.num_samples, self.permutation(epoch)[neighbors % self.num_samples], indices)

    def _prepare(self, epoch: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """Return the epoch, its permutation and the inverse permutation; those of the last epoch are cached."""
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch must be in [0, 2**32); got {epoch}.")
        cached = self._cached
        if epoch != cached[0]:
            starts = range(0, self.num_samples, _CHUNK)
            chunks = (np.arange(start, min(start + _CHUNK, self.num_samples)) for start in starts)
            words = np.concatenate([keyed_words(self.seed, epoch, each, _ORDER_STREAM)[:, :2] for each in chunks])
            keys = words[:, 0].astype(np.uint64) << _HIGH | words[:, 1]
            permutation = np.argsort(keys, kind="stable")  # equal keys have the same order on all machines
            positions = np.empty_like(permutation)
            positions[permutation] = np.arange(self.num_samples)
            self._cached = cached = epoch, permutation, positions
        return cached
