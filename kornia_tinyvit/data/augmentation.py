"""Augmentation that can be replayed: what happens to a sample in an epoch is a pure function of seed, epoch and sample.

The decisions are drawn for each sample on the CPU with counter-based random numbers (:mod:`.keyed`); the pixels are
worked on in whole batches on the device. Between the operators pictures are rounded to 8 bits, as Pillow's are, so that
the last bits of floating point arithmetic, which differ between processors, are lost before they add up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kornia.enhance as KE
import numpy as np
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.geometry.transform import hflip, remap
from numpy.typing import NDArray
from torch import Tensor, nn

from kornia_tinyvit.data.order import EpochOrder, keyed_words
from kornia_tinyvit.images import to_uint8
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD, TrainingPreset, find_preset

__all__ = ["OPERATIONS", "Draws", "ReplayableAugmentation"]

#: Number of this module's formulas. It is stored with every distillation, and raised when a drawn value or a pixel
#: would come out differently.
VERSION = 1

# Every purpose has its own stream of random words, so that changing one leaves the draws of the others alone.
_STREAMS = {"crop": 1, "flip": 2, "policy": 3, "jitter": 4, "erasing": 5, "erasing_box": 6, "mixing": 7}
_ATTEMPTS = (
    10  # boxes tried before the random crop falls back to the centre and erasing to nothing, as in the originals
)
_LEVELS = 64  # steps between two magnitudes of a policy; rounding makes them equal on all processors
_CPU_CHUNK = 8  # pictures at a time: larger batches fall out of the processor's cache

# Magnitudes are those of timm's "rand-m9-mstd0.5-inc1", the recipe of the paper: level 9, spread 0.5, at most 10.
_LEVEL, _SPREAD, _MAX_LEVEL = 9.0, 0.5, 10.0
_POLICIES = {"rand": (2, 0.5), "trivial": (1, 1.0)}  # layers, and the probability of each
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)

#: Operators that a policy chooses from, in the order of their numbers in :class:`Draws`.
OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@dataclass(frozen=True)
class Draws:
    """What was drawn for the samples of a batch, a row each.

    Attributes:
        epoch: the epoch.
        indices: the samples, :math:`(B,)`.
        crop: uniform numbers in [0, 1) of ten tries: area, aspect ratio, top and left, :math:`(B, 10, 4)`.
        flip: whether to mirror, :math:`(B,)`.
        operations: positions in :data:`OPERATIONS` of each layer of the policy, -1 for none, :math:`(B, L)`.
        magnitudes: their strengths in their own units: degrees, bits, levels of 256, factors, shares of the width,
            :math:`(B, L)`.
        jitter: factors of brightness, contrast and saturation, :math:`(B, 3)`.
        erased: box that noise covers: top, left, height and width in pixels, all 0 for none, :math:`(B, 4)`.
        noise: key of that noise, :math:`(B,)`.
        partners: the samples they are mixed with, themselves for none, :math:`(B,)`.
        share: weight of the partner's picture in mixup, 0 for none, :math:`(B,)`.
        pasted: box of the partner that cutmix pastes, as ``erased``, :math:`(B, 4)`.
    """

    epoch: int
    indices: NDArray[np.int64]
    crop: NDArray[np.float64]
    flip: NDArray[np.bool_]
    operations: NDArray[np.int64]
    magnitudes: NDArray[np.float32]
    jitter: NDArray[np.float32]
    erased: NDArray[np.int64]
    noise: NDArray[np.int64]
    partners: NDArray[np.int64]
    share: NDArray[np.float32]
    pasted: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def checksums(self) -> NDArray[np.uint32]:
        """Return a CRC-32 of each row, :math:`(B,)`, which tells a replay that it draws what was stored."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "epoch"]
        columns = [np.ascontiguousarray(values).reshape(len(self), -1) for values in fields]
        rows = np.concatenate([values.view(np.uint8) for values in columns], axis=1)
        return np.array([zlib.crc32(row) for row in rows], dtype=np.uint32)


class ReplayableAugmentation(nn.Module):
    """Augment pictures so that the same sample of the same epoch always comes out the same.

    Nothing else has a say: not the batch's size or its other members, not the number of workers, threads or
    processes, not where a run was resumed, not the global random numbers. On one device the pixels are equal bit for
    bit; on another one a small fraction of them differs by rounding.

    It is used in three steps: :meth:`draw` the decisions for a batch, :meth:`crop` each picture where it is decoded,
    then call the module on the crops. :class:`~kornia_tinyvit.data.ReplayedSamples` does the first two in the
    workers of a data loader.

    Args:
        img_size: side in pixels of the square that comes out.
        preset: a name of :data:`~kornia_tinyvit.preprocessing.TRAINING_PRESETS` or a
            :class:`~kornia_tinyvit.preprocessing.TrainingPreset`. RandAugment has the magnitudes of the originals'
            ``rand-m9-mstd0.5-inc1``; erased boxes are filled with noise.
        seed: seed of everything, in [0, 2**64).
        num_samples: how many samples the data has; needed to mix pictures, whose pairs are neighbours in the epoch's
            order.
        mean: channel means to subtract, for values in [0, 1].
        std: channel deviations to divide by.
        **changes: fields of the preset to replace.

    Raises:
        ValueError: if a setting is unknown or out of its range, or pictures are to be mixed without ``num_samples``.

    Example:
        >>> augment = ReplayableAugmentation(32, "distill", seed=7)
        >>> draws = augment.draw(epoch=3, indices=[10, 11])
        >>> photo = torch.randint(256, (3, 48, 64), dtype=torch.uint8)
        >>> crops = torch.stack([augment.crop(photo, draws, row) for row in range(2)])
        >>> augment(crops, draws).shape
        torch.Size([2, 3, 32, 32])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        img_size: int = 224,
        preset: str | TrainingPreset = "distill",
        seed: int = 0,
        num_samples: int | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        **changes: object,
    ) -> None:
        super().__init__()
        if img_size < 1:
            raise ValueError(f"img_size must be positive; got {img_size}.")
        self.img_size = img_size
        self.preset = find_preset(preset, **changes)
        self.seed = seed
        self.mixes = bool(self.preset.mixup or self.preset.cutmix)
        if self.mixes and num_samples is None:
            raise ValueError("Mixing pictures needs num_samples: the pairs are neighbours in the epoch's order.")
        self.order = EpochOrder(num_samples or 1, seed)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self._mixup_share = _beta_quantile(self.preset.mixup) if self.preset.mixup else None
        self._cutmix_share = _beta_quantile(self.preset.cutmix) if self.preset.cutmix else None

    def describe(self) -> dict[str, Any]:
        """Return everything but the seed that decides what comes out, as JSON's types."""
        described = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self.preset).items()}
        del described["label_smoothing"]  # which changes targets, not pictures
        mean, std = ([round(value, 6) for value in buffer.tolist()] for buffer in (self.mean, self.std))
        return {"version": VERSION, "img_size": self.img_size, **described, "mean": mean, "std": std}

    def draw(self, epoch: int, indices: NDArray[np.int64] | list[int] | Tensor) -> Draws:
        """Decide what happens to samples in an epoch, on the CPU.

        Args:
            epoch: number of the epoch, from 0.
            indices: the samples, :math:`(B,)`.
        """
        indices = np.asarray(indices, dtype=np.int64)
        preset, none = self.preset, np.zeros((len(indices), 4), dtype=np.int64)
        operations, magnitudes = self._draw_policy(epoch, indices)
        jitter = 1 + preset.color_jitter * (2 * self._uniform("jitter", epoch, indices)[:, :3] - 1)
        chance = self._words("erasing", epoch, indices)
        erased = none
        if preset.erasing:
            erases = _unit(chance[:, 0]) < preset.erasing
            tries = self._uniform("erasing_box", epoch, indices, _ATTEMPTS).reshape(-1, _ATTEMPTS, 4)
            erased = np.where(erases[:, None], _erased_box(tries, self.img_size), none)
        partners, share, pasted = indices, np.zeros(len(indices), dtype=np.float32), none
        if self.mixes:
            partners, share, pasted = self._draw_mixing(epoch, indices)
        return Draws(
            epoch=epoch,
            indices=indices,
            crop=self._uniform("crop", epoch, indices, _ATTEMPTS).reshape(-1, _ATTEMPTS, 4),
            flip=self._uniform("flip", epoch, indices)[:, 0] < preset.flip,
            operations=operations,
            magnitudes=magnitudes,
            jitter=jitter.astype(np.float32),
            erased=erased,
            noise=chance[:, 1].astype(np.int64),
            partners=partners,
            share=share,
            pasted=pasted,
        )

    def crop(self, picture: Tensor, draws: Draws, row: int) -> Tensor:
        """Cut a sample's box out of its picture and resize it: bicubic, antialiased, in 8 bits.

        Args:
            picture: 8-bit picture :math:`(C, H, W)` of any size.
            draws: what :meth:`draw` returned.
            row: the picture's row in it.

        Returns:
            8-bit picture :math:`(C, S, S)`.

        Raises:
            TypeError: if the picture is not one of 8 bits.
        """
        if picture.dtype != torch.uint8 or picture.ndim != 3:
            raise TypeError(
                f"crop takes an 8-bit picture (C, H, W); got {picture.dtype} {tuple(picture.shape)}. "
                "Read it with kornia_tinyvit.images.read_pixels."
            )
        height, width = picture.shape[-2:]
        top, left, rows, columns = _crop_box(draws.crop[row], height, width, self.preset)
        cut = picture[None, :, top : top + rows, left : left + columns]
        # 8-bit resizing is the same on all processors and for any number of threads; floating point is not.
        size = (self.img_size, self.img_size)
        return F.interpolate(cut, size, mode="bicubic", antialias=True)[0]

    def forward(self, crops: Tensor, draws: Draws) -> Tensor:
        """Change, normalise and mix the crops of a batch on their device.

        Args:
            crops: 8-bit pictures :math:`(B, 3, S, S)` from :meth:`crop`.
            draws: what :meth:`draw` returned for them.

        Returns:
            Normalised pictures :math:`(B, 3, S, S)`, float32.

        Raises:
            TypeError: if ``crops`` are not 8-bit pictures.
            ValueError: if they are not as many as were drawn for, or a mixed sample's partner is not beside it.
        """
        if crops.dtype != torch.uint8:
            raise TypeError(f"Expected the 8-bit crops that crop() returns; got {crops.dtype}.")
        if crops.shape != (len(draws), 3, self.img_size, self.img_size):
            raise ValueError(
                f"Expected crops ({len(draws)}, 3, {self.img_size}, {self.img_size}), a row for each sample that was "
                f"drawn for; got {tuple(crops.shape)}."
            )
        if len(draws) == 0:
            return crops.float()
        chunk = _CPU_CHUNK if crops.device.type == "cpu" else len(draws)
        rows = np.arange(len(draws))
        parts = [rows[start : start + chunk] for start in range(0, len(rows), chunk)]
        with torch.autocast(crops.device.type, enabled=False):  # whoever trains in 16 bits gets the same pictures
            images = torch.cat([self._change(crops[part[0] : part[-1] + 1], draws, part) for part in parts])
            return self._mix(images, draws) if self.mixes else images

    def soft_labels(self, labels: Tensor, draws: Draws, num_classes: int) -> Tensor:
        """Return the targets :math:`(B, classes)` of mixed and smoothed labels, whose rows sum to 1.

        Args:
            labels: class of each sample, :math:`(B,)`.
            draws: what :meth:`draw` returned.
            num_classes: number of classes.
        """
        hard = F.one_hot(labels.long(), num_classes).float()
        if self.mixes:
            share = torch.from_numpy(self._partner_share(draws)).to(hard)[:, None]
            hard = hard * (1 - share) + _swap_neighbours(hard) * share
        smoothing = self.preset.label_smoothing
        return hard * (1 - smoothing) + smoothing / num_classes

    def extra_repr(self) -> str:
        """Show what decides the pictures."""
        return f"img_size={self.img_size}, seed={self.seed}, {self.preset}"

    # Decisions, in numpy on the CPU.

    def _words(self, stream: str, epoch: int, keys: NDArray[np.int64], blocks: int = 1) -> NDArray[np.uint32]:
        return keyed_words(self.seed, epoch, keys, _STREAMS[stream], blocks)

    def _uniform(self, stream: str, epoch: int, keys: NDArray[np.int64], blocks: int = 1) -> NDArray[np.float64]:
        return _unit(self._words(stream, epoch, keys, blocks))

    def _draw_policy(self, epoch: int, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        policy = self.preset.policy
        if policy is None:
            empty = np.zeros((len(indices), 0))
            return empty.astype(np.int64), empty.astype(np.float32)
        layers, probability = _POLICIES[policy]
        words = self._words("policy", epoch, indices, layers).reshape(len(indices), layers, 4)
        chance, choice, first, second = np.moveaxis(_unit(words), 2, 0)
        if policy == "trivial":  # one operator, or none as its first choice, of any strength
            operations = (choice * (len(OPERATIONS) + 1)).astype(np.int64) - 1
            level = first * _MAX_LEVEL
        else:
            operations = (choice * len(OPERATIONS)).astype(np.int64)
            normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)  # Box and Muller, 1958
            level = np.clip(_LEVEL + _SPREAD * normal, 0, _MAX_LEVEL)
        operations = np.where(chance < probability, operations, -1)
        share = np.round(level * _LEVELS) / (_LEVELS * _MAX_LEVEL)
        sign = np.where(words[..., 0] & 1, 1.0, -1.0)
        return operations, _magnitudes(operations, share, sign).astype(np.float32)

    def _draw_mixing(
        self, epoch: int, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        partners = self.order.partners(epoch, indices)
        # A pair has one key, the smaller of its samples, and so its members draw alike.
        kind, mixed, top, left, chance = self._uniform("mixing", epoch, np.minimum(indices, partners), 2)[:, :5].T
        pairs = (partners != indices) & (chance < self.preset.mix_probability)
        by_cutmix = pairs & (kind < 0.5 if self.preset.mixup and self.preset.cutmix else bool(self.preset.cutmix))
        share = np.zeros(len(indices), dtype=np.float32)
        pasted = np.zeros((len(indices), 4), dtype=np.int64)
        if self._mixup_share is not None:
            share = np.where(pairs & ~by_cutmix, self._mixup_share(mixed), 0).astype(np.float32)
        if self._cutmix_share is not None:
            box = _pasted_box(self._cutmix_share(mixed), top, left, self.img_size)
            pasted = np.where(by_cutmix[:, None], box, pasted)
        return partners, share, pasted

    def _partner_share(self, draws: Draws) -> NDArray[np.float32]:
        """Return how much of each mixed picture is its partner's, :math:`(B,)`."""
        area = draws.pasted[:, 2] * draws.pasted[:, 3] / self.img_size**2
        return (draws.share + area).astype(np.float32)

    # Pixels, in torch on the device.

    def _change(self, crops: Tensor, draws: Draws, rows: NDArray[np.int64]) -> Tensor:
        images = crops.clone()
        _apply(images, draws.flip[rows], hflip)
        for layer in range(draws.operations.shape[1]):
            chosen, strengths = draws.operations[rows, layer], draws.magnitudes[rows, layer]
            for number in np.unique(chosen[chosen >= 0]):
                operator = _operator(OPERATIONS[number])
                _apply(images, chosen == number, operator, strengths)
        if self.preset.color_jitter:
            every = np.ones(len(rows), dtype=bool)
            for name, column in (("brightness", 0), ("contrast", 1), ("color", 2)):
                _apply(images, every, _operator(name), draws.jitter[rows, column])
        normalized = KE.normalize(_to_floats(images), self.mean, self.std)
        return _erase(normalized, draws.erased[rows], draws.noise[rows])

    def _mix(self, images: Tensor, draws: Draws) -> Tensor:
        beside = draws.indices.copy()
        even = len(beside) // 2 * 2
        beside[:even] = beside[:even].reshape(-1, 2)[:, ::-1].ravel()
        if not np.array_equal(beside, draws.partners):
            raise ValueError(
                "Mixed samples must come in the pairs (0, 1), (2, 3), ... of the epoch's order, neighbours in one "
                "batch; EpochBatches keeps them together."
            )
        other = _swap_neighbours(images)
        share = torch.from_numpy(draws.share).to(images)[:, None, None, None]
        images = images * (1 - share) + other * share
        return torch.where(_box_mask(draws.pasted, images), other, images)


def _unit(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    return words.astype(np.float64) * 2.0**-32


def _magnitudes(
    operations: NDArray[np.int64], share: NDArray[np.float64], sign: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Turn the share of the largest strength, in [0, 1], into what each operator takes."""
    factor = np.maximum(0.1, 1 + sign * 0.9 * share)
    formulas = {
        "rotate": sign * 30 * share,
        "posterize": np.maximum(1, 4 - np.floor(4 * share)),  # with 0 bits, as in the originals, nothing is left
        "solarize": 256 - np.floor(256 * share),
        "solarize_add": np.floor(110 * share),
        "color": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
        "shear_x": sign * 0.3 * share,
        "shear_y": sign * 0.3 * share,
        "translate_x": sign * 0.45 * share,
        "translate_y": sign * 0.45 * share,
    }
    magnitudes = np.zeros(operations.shape)
    for name, values in formulas.items():
        magnitudes = np.where(operations == OPERATIONS.index(name), values, magnitudes)
    return magnitudes


def _log_uniform(uniform: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return np.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))


def _crop_box(tries: NDArray[np.float64], height: int, width: int, preset: TrainingPreset) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the first try that fits, or of the largest centre crop (torchvision's)."""
    (low, high), (narrow, wide) = preset.crop_scale, preset.crop_ratio
    area = height * width * (low + (high - low) * tries[:, 0])
    ratio = _log_uniform(tries[:, 1], narrow, wide)
    columns, rows = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = np.flatnonzero((columns >= 1) & (columns <= width) & (rows >= 1) & (rows <= height))
    if len(fits):
        best = fits[0]
        tall, broad = int(rows[best]), int(columns[best])
        return int(tries[best, 2] * (height - tall + 1)), int(tries[best, 3] * (width - broad + 1)), tall, broad
    tall = min(height, max(1, round(width / narrow)))
    broad = min(width, max(1, round(height * wide)))
    return (height - tall) // 2, (width - broad) // 2, tall, broad


def _erased_box(tries: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Return for each row the first box that is smaller than the picture, :math:`(B, 4)`, or zeros."""
    (low, high), (narrow, wide) = _ERASED_AREA, _ERASED_RATIO
    area = size * size * (low + (high - low) * tries[..., 0])
    ratio = _log_uniform(tries[..., 1], narrow, wide)
    rows, columns = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (rows < size) & (columns < size)
    first = fits.argmax(1)[:, None]
    rows, columns, top, left = (
        np.take_along_axis(values, first, 1)[:, 0] for values in (rows, columns, tries[..., 2], tries[..., 3])
    )
    box = np.stack([np.floor(top * (size - rows + 1)), np.floor(left * (size - columns + 1)), rows, columns], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), box, 0).astype(np.int64)


def _pasted_box(
    share: NDArray[np.float64], top: NDArray[np.float64], left: NDArray[np.float64], size: int
) -> NDArray[np.int64]:
    """Return cutmix's boxes (arXiv:1905.04899) around uniform centres, cut at the border, :math:`(B, 4)`."""
    side = np.floor(size * np.sqrt(share))
    edges = []
    for centre in (np.floor(top * size), np.floor(left * size)):
        start = np.clip(centre - side // 2, 0, size)
        edges.append((start, np.clip(centre + side // 2, 0, size) - start))
    (rows_from, rows), (columns_from, columns) = edges
    return np.stack([rows_from, columns_from, rows, columns], axis=1).astype(np.int64)


def _beta_quantile(alpha: float) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Return the inverse of the distribution function of Beta(alpha, alpha), which is symmetric about 1/2.

    With :math:`s = x^a` the density :math:`x^{a-1} (1-x)^{a-1}` loses its pole at 0, and the trapezoid rule on
    [0, 1/2] is accurate to 1e-6 for the values of the recipes.
    """
    grid = np.linspace(0, 0.5**alpha, 4097)
    density = (1 - grid ** (1 / alpha)) ** (alpha - 1)
    half = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    half *= 0.5 / half[-1]
    return functools.partial(_interpolated, half=half, grid=grid, alpha=alpha)


def _interpolated(
    uniform: NDArray[np.float64], half: NDArray[np.float64], grid: NDArray[np.float64], alpha: float
) -> NDArray[np.float64]:
    lower = np.interp(np.minimum(uniform, 1 - uniform), half, grid) ** (1 / alpha)
    return np.where(uniform < 0.5, lower, 1 - lower)


def _swap_neighbours(rows: Tensor) -> Tensor:
    """Exchange the rows 0 and 1, 2 and 3, ...; an odd last one stays."""
    even = len(rows) // 2 * 2
    return torch.cat([rows[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1), rows[even:]])


def _apply(
    images: Tensor,
    chosen: NDArray[np.bool_],
    operator: Callable[..., Tensor],
    strengths: NDArray[np.float32] | None = None,
) -> None:
    """Replace the chosen ones among 8-bit pictures, in place."""
    if not chosen.any():
        return
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
    if strengths is None:
        images[rows] = operator(images[rows])
    else:
        images[rows] = operator(images[rows], torch.from_numpy(strengths[chosen]).to(images.device))


def _to_floats(images: Tensor) -> Tensor:
    return images.float().div_(255)


def _operator(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an operator on 8-bit pictures :math:`(b, 3, H, W)` and magnitudes :math:`(b,)`."""
    if name in _GEOMETRIC:
        return lambda images, magnitudes: _warp(images, *_affine(name, magnitudes))
    return _INTENSITY[name]


def _on_floats(operator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, magnitudes: to_uint8(operator(_to_floats(images), magnitudes))


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    # kornia takes the level as trunc(255 x): half a level more keeps rounding from taking the one below.
    equalized = KE.equalize((images.float() + 0.5) / 255) * 255
    return (equalized - 0.25).round_().clamp_(0, 255).to(torch.uint8)


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """Lighten dark pixels; kornia's additions would go to all of them."""
    lighter = (images.int() + amount.int()[:, None, None, None]).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, lighter, images)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey, as Pillow does; the mean of 8-bit greys is exact in any order of summation."""
    grey = rgb_to_grayscale(images).sum((1, 2, 3), dtype=torch.int64)
    mean = (grey.float() / images[0, 0].numel()).round()[:, None, None, None] / 255
    factor = factor[:, None, None, None]
    return to_uint8(_to_floats(images) * factor + mean * (1 - factor))


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with Pillow's smoothing, but for the border; a convolution would be rounded otherwise on each device."""
    levels = images.int()
    rows = levels[..., :-2, :] + levels[..., 1:-1, :] + levels[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * levels[..., 1:-1, 1:-1]
    smooth = levels.float()
    smooth[..., 1:-1, 1:-1] = ((total + 6) // 13).float()  # the nearest whole number
    blend = smooth + (levels - smooth) * factor[:, None, None, None]
    return blend.round_().clamp_(0, 255).to(torch.uint8)


def _auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to all levels, but leave one of a single level as it is, as Pillow does."""
    lowest, highest = images.flatten(2).aminmax(dim=2)
    flat = (lowest == highest)[..., None, None]
    return torch.where(flat, images, to_uint8(KE.normalize_min_max(_to_floats(images))))


_INTENSITY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _on_floats(lambda images, _: KE.invert(images)),
    "posterize": _on_floats(lambda images, bits: KE.posterize(images, bits.int())),
    "solarize": _on_floats(lambda images, threshold: KE.solarize(images, threshold / 255)),
    "solarize_add": _solarize_add,
    "color": _on_floats(KE.adjust_saturation_with_gray_subtraction),
    "contrast": _contrast,
    "brightness": _on_floats(KE.adjust_brightness_accumulative),
    "sharpness": _sharpness,
}


def _affine(name: str, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices :math:`(b, 2, 2)` and shifts :math:`(b, 2)` that map where a pixel goes to where it is from.

    Coordinates go from -1 to 1 over the picture, about its centre.
    """
    matrix = torch.eye(2, device=magnitudes.device).repeat(len(magnitudes), 1, 1)
    shift = torch.zeros(len(magnitudes), 2, device=magnitudes.device)
    if name == "rotate":
        # On the CPU in double precision, so that the sine is the same for every device.
        angle = magnitudes.cpu().double().deg2rad()
        cosine, sine = angle.cos().to(magnitudes), angle.sin().to(magnitudes)
        matrix = torch.stack([cosine, -sine, sine, cosine], dim=1).unflatten(1, (2, 2))
    elif name.startswith("shear"):
        row, column = (0, 1) if name == "shear_x" else (1, 0)
        matrix[:, row, column] = magnitudes
    else:
        shift[:, 0 if name == "translate_x" else 1] = 2 * magnitudes
    return matrix, shift


def _warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Sample 8-bit pictures bilinearly where an affine map points; what lies outside is ImageNet's mean colour."""
    height, width = images.shape[-2:]
    x = ((2 * torch.arange(width, device=images.device) + 1) / width - 1)[None, None, :]
    y = ((2 * torch.arange(height, device=images.device) + 1) / height - 1)[None, :, None]
    map_x, map_y = (
        matrix[:, axis, 0, None, None] * x + matrix[:, axis, 1, None, None] * y + shift[:, axis, None, None]
        for axis in (0, 1)
    )
    fill = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
    warped = remap(_to_floats(images) - fill, map_x, map_y, normalized_coordinates=True, align_corners=False)
    return to_uint8(warped + fill)


def _box_mask(boxes: NDArray[np.int64], images: Tensor) -> Tensor:
    """Return where boxes of top, left, height and width lie, :math:`(B, 1, H, W)`."""
    top, left, rows, columns = torch.from_numpy(boxes).to(images.device).T[..., None, None, None]
    y = torch.arange(images.shape[-2], device=images.device)[:, None]
    x = torch.arange(images.shape[-1], device=images.device)
    return (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)


def _erase(images: Tensor, boxes: NDArray[np.int64], keys: NDArray[np.int64]) -> Tensor:
    """Fill boxes of normalised pictures with noise of mean 0 and deviation 1."""
    erases = np.flatnonzero(boxes[:, 2])
    if len(erases) == 0:
        return images
    rows = torch.from_numpy(erases).to(images.device)
    chosen = images[rows]
    noise = _noise(torch.from_numpy(keys[erases]).to(images.device), chosen)
    images[rows] = torch.where(_box_mask(boxes[erases], chosen), noise, chosen)
    return images


def _noise(keys: Tensor, images: Tensor) -> Tensor:
    """Return nearly normal noise that is a pure function of key and pixel, of the shape of ``images``.

    Integers only, so that all devices agree: a hash of 32 bits for each pixel, and the sum of its four bytes, which has
    the distribution of four dice of 256 sides: mean 510 and variance :math:`4 (256^2 - 1) / 12`.
    """
    pixels = torch.arange(images[0].numel(), device=images.device).view(images.shape[1:])
    words = keys[:, None, None, None] ^ pixels * 0x9E3779B1 & 0xFFFFFFFF
    for _ in range(2):  # a mixing step of multiplications and shifts, whose products stay below 2**63
        words = (words ^ words >> 16) * 0x45D9F3B & 0xFFFFFFFF
    words = words ^ words >> 16
    total = (words & 255) + (words >> 8 & 255) + (words >> 16 & 255) + (words >> 24)
    return (total - 510).to(images.dtype) / math.sqrt((256**2 - 1) / 3)
