"""Augmentation that can be replayed: what happens to a sample in an epoch is a pure function of seed, epoch and sample.

The decisions are drawn for each sample on the CPU with counter-based random numbers (:mod:`.order`); the pixels are
worked on in whole batches on the device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import kornia.enhance as KE
import numpy as np
import torch
import torch.nn.functional as F
from kornia.geometry.transform import hflip
from numpy.typing import NDArray
from torch import Tensor, nn

from kornia_tinyvit.data import drawing, operators
from kornia_tinyvit.data.drawing import ATTEMPTS, Draws
from kornia_tinyvit.data.order import EpochOrder, keyed_words
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD, TrainingPreset, find_preset

__all__ = ["ReplayableAugmentation"]

#: Number of the formulas here and in what is drawn and done. It is stored with every distillation, and raised when a
#: drawn value or a pixel would come out differently.
VERSION = 1

# Every purpose has its own stream of random words, so that changing one leaves the draws of the others alone.
_STREAMS = {"crop": 1, "flip": 2, "policy": 3, "jitter": 4, "erasing": 5, "erasing_box": 6, "mixing": 7}
_CPU_CHUNK = 8  # images at a time: larger batches fall out of the processor's cache


class ReplayableAugmentation(nn.Module):
    """Augment images so that the same sample of the same epoch always comes out the same.

    Nothing else has a say: not the batch's size or its other members, not the number of workers, threads or
    processes, not where a run was resumed, not the global random numbers. On one device the pixels are equal bit for
    bit; on another one a small fraction of them differs by rounding.

    It is used in three steps: :meth:`draw` the decisions for a batch, :meth:`crop` each image where it is decoded,
    then call the module on the crops. :class:`~kornia_tinyvit.data.ReplayedSamples` does the first two in the
    workers of a data loader.

    Args:
        img_size: side in pixels of the square that comes out.
        preset: a name of :data:`~kornia_tinyvit.preprocessing.TRAINING_PRESETS` or a
            :class:`~kornia_tinyvit.preprocessing.TrainingPreset`. RandAugment has the magnitudes of the originals'
            ``rand-m9-mstd0.5-inc1``; erased boxes are filled with noise.
        seed: seed of everything, in [0, 2**64).
        num_samples: how many samples the data has; needed to mix images, whose pairs are neighbors in the epoch's
            order.
        mean: channel means to subtract, for values in [0, 1].
        std: channel deviations to divide by.
        **changes: fields of the preset to replace.

    Raises:
        ValueError: if a setting is unknown or out of its range, or images are to be mixed without ``num_samples``.

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
            raise ValueError("Mixing images needs num_samples: the pairs are neighbors in the epoch's order.")
        self.order = EpochOrder(num_samples or 1, seed)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self._mixup_share = drawing.beta_quantile(self.preset.mixup) if self.preset.mixup else None
        self._cutmix_share = drawing.beta_quantile(self.preset.cutmix) if self.preset.cutmix else None

    def describe(self) -> dict[str, Any]:
        """Return everything but the seed that decides what comes out, as JSON's types."""
        described = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self.preset).items()}
        del described["label_smoothing"]  # which changes targets, not images
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
        layers = drawing.POLICY_LAYERS[preset.policy]
        words = self._words("policy", epoch, indices, layers).reshape(len(indices), layers, 4)
        operations, magnitudes = drawing.draw_policy(preset.policy, words)
        jitter = 1 + preset.color_jitter * (2 * self._uniform("jitter", epoch, indices)[:, :3] - 1)
        chance = self._words("erasing", epoch, indices)
        erased = none
        if preset.erasing:
            erases = drawing.unit(chance[:, 0]) < preset.erasing
            tries = self._uniform("erasing_box", epoch, indices, ATTEMPTS).reshape(-1, ATTEMPTS, 4)
            erased = np.where(erases[:, None], drawing.erased_box(tries, self.img_size), none)
        partners, share, pasted = indices, np.zeros(len(indices), dtype=np.float32), none
        if self.mixes:
            partners, share, pasted = self._draw_mixing(epoch, indices)
        return Draws(
            epoch=epoch,
            indices=indices,
            crop=self._uniform("crop", epoch, indices, ATTEMPTS).reshape(-1, ATTEMPTS, 4),
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

    def crop(self, image: Tensor, draws: Draws, row: int) -> Tensor:
        """Cut a sample's box out of its image and resize it: bicubic, antialiased, in 8 bits.

        Args:
            image: 8-bit image :math:`(C, H, W)` of any size.
            draws: what :meth:`draw` returned.
            row: the image's row in it.

        Returns:
            8-bit image :math:`(C, S, S)`.

        Raises:
            TypeError: if the image is not one of 8 bits.
        """
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise TypeError(
                f"crop takes an 8-bit image (C, H, W); got {image.dtype} {tuple(image.shape)}. "
                "Read it with kornia_tinyvit.images.read_pixels."
            )
        height, width = image.shape[-2:]
        top, left, rows, columns = drawing.crop_box(draws.crop[row], height, width, self.preset)
        cut = image[None, :, top : top + rows, left : left + columns]
        # 8-bit resizing is the same on all processors and for any number of threads; floating point is not.
        size = (self.img_size, self.img_size)
        return F.interpolate(cut, size, mode="bicubic", antialias=True)[0]

    def forward(self, crops: Tensor, draws: Draws) -> Tensor:
        """Change, normalize and mix the crops of a batch on their device.

        Args:
            crops: 8-bit images :math:`(B, 3, S, S)` from :meth:`crop`.
            draws: what :meth:`draw` returned for them.

        Returns:
            Normalized images :math:`(B, 3, S, S)`, float32.

        Raises:
            TypeError: if ``crops`` are not 8-bit images.
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
        parts = [slice(start, start + chunk) for start in range(0, len(draws), chunk)]
        with torch.autocast(crops.device.type, enabled=False):  # whoever trains in 16 bits gets the same images
            images = torch.cat([self._change(crops[part], draws, part) for part in parts])
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
            pasted = draws.pasted[:, 2] * draws.pasted[:, 3] / self.img_size**2
            share = torch.from_numpy((draws.share + pasted).astype(np.float32)).to(hard)[:, None]
            hard = hard * (1 - share) + _swap_neighbors(hard) * share
        smoothing = self.preset.label_smoothing
        return hard * (1 - smoothing) + smoothing / num_classes

    def extra_repr(self) -> str:
        """Show what decides the images."""
        return f"img_size={self.img_size}, seed={self.seed}, {self.preset}"

    # Decisions, in numpy on the CPU.

    def _words(self, stream: str, epoch: int, keys: NDArray[np.int64], blocks: int = 1) -> NDArray[np.uint32]:
        return keyed_words(self.seed, epoch, keys, _STREAMS[stream], blocks)

    def _uniform(self, stream: str, epoch: int, keys: NDArray[np.int64], blocks: int = 1) -> NDArray[np.float64]:
        return drawing.unit(self._words(stream, epoch, keys, blocks))

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
            box = drawing.pasted_box(self._cutmix_share(mixed), top, left, self.img_size)
            pasted = np.where(by_cutmix[:, None], box, pasted)
        return partners, share, pasted

    # Pixels, in torch on the device.

    def _change(self, crops: Tensor, draws: Draws, rows: slice) -> Tensor:
        images = crops.clone()
        operators.apply_to(images, draws.flip[rows], hflip)
        for layer in range(draws.operations.shape[1]):
            chosen, strengths = draws.operations[rows, layer], draws.magnitudes[rows, layer]
            for number in np.unique(chosen[chosen >= 0]):
                operator = operators.OPERATORS[operators.OPERATIONS[number]]
                operators.apply_to(images, chosen == number, operator, strengths)
        if self.preset.color_jitter:
            every = np.ones(len(images), dtype=bool)
            for name, column in (("brightness", 0), ("contrast", 1), ("color", 2)):
                operators.apply_to(images, every, operators.OPERATORS[name], draws.jitter[rows, column])
        normalized = KE.normalize(operators.to_floats(images), self.mean, self.std)
        return operators.erase(normalized, draws.erased[rows], draws.noise[rows])

    def _mix(self, images: Tensor, draws: Draws) -> Tensor:
        if not np.array_equal(_swap_neighbors(torch.from_numpy(draws.indices)).numpy(), draws.partners):
            raise ValueError(
                "Mixed samples must come in the pairs (0, 1), (2, 3), ... of the epoch's order, neighbors in one "
                "batch; EpochBatches keeps them together."
            )
        other = _swap_neighbors(images)
        share = torch.from_numpy(draws.share).to(images)[:, None, None, None]
        images = images * (1 - share) + other * share
        return torch.where(operators.box_mask(draws.pasted, images), other, images)


def _swap_neighbors(rows: Tensor) -> Tensor:
    """Exchange the rows 0 and 1, 2 and 3, ...; an odd last one stays."""
    even = len(rows) // 2 * 2
    return torch.cat([rows[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1), rows[even:]])
