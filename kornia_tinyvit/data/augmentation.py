"""Augmentation that can be replayed: a pure function of seed, epoch and sample.

The random parameters are sampled on the CPU with counter-based random numbers (:mod:`.order`); whole batches of crops
are augmented on the device.
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

from kornia_tinyvit.data import operators
from kornia_tinyvit.data import params as parameters
from kornia_tinyvit.data.order import EpochOrder, keyed_words
from kornia_tinyvit.data.params import ATTEMPTS, ReplayParams
from kornia_tinyvit.images import to_floats
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD, TrainingPreset, find_preset

__all__ = ["ReplayableAugmentation"]

#: Version of the sampling and the operators, stored in every label store. Raise it when a parameter or a pixel changes.
VERSION = 1

# Each purpose has a stream of random words, which makes a change of one leave the parameters of the others unchanged.
_STREAMS = {"crop": 1, "flip": 2, "policy": 3, "jitter": 4, "erasing": 5, "erasing_box": 6, "mixing": 7}
_CPU_CHUNK = 8  # images at a time: larger batches do not fit into the processor's cache


class ReplayableAugmentation(nn.Module):
    """Augment images such that a sample of an epoch always gives the same result.

    The result does not depend on the batch size, the other samples of the batch, the number of workers, threads or
    ranks, the step a run was resumed at, or the global random state. On one device the pixels are bit-identical; on
    another one a small fraction of them differs by rounding.

    Use it in three steps: :meth:`sample_params` for a batch, :meth:`crop` each image where it is decoded, then call
    the module on the crops. :class:`~kornia_tinyvit.data.ReplayedSamples` does the first two in the workers of a data
    loader.

    Args:
        img_size: side of the output in pixels.
        preset: a name of :data:`~kornia_tinyvit.preprocessing.TRAINING_PRESETS` or a
            :class:`~kornia_tinyvit.preprocessing.TrainingPreset`. RandAugment has the magnitudes of timm's
            ``rand-m9-mstd0.5-inc1``; erased boxes are filled with noise.
        seed: random seed, in [0, 2**64).
        num_samples: size of the dataset; required for mixup and cutmix, which pair neighbors in the epoch's order.
        mean: channel means to subtract, for values in [0, 1].
        std: channel standard deviations to divide by.
        **changes: fields of the preset to replace.

    Raises:
        ValueError: if a setting is unknown or out of its range, mixup or cutmix is set without ``num_samples``, or
            ``rotate`` is set.

    Example:
        >>> augment = ReplayableAugmentation(32, "distill", seed=7)
        >>> params = augment.sample_params(epoch=3, indices=[10, 11])
        >>> photo = torch.randint(256, (3, 48, 64), dtype=torch.uint8)
        >>> crops = torch.stack([augment.crop(photo, params, row) for row in range(2)])
        >>> augment(crops, params).shape
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
        if self.preset.rotate:
            raise ValueError("A replayable augmentation does not support rotate; masks and boxes do.")
        self.seed = seed
        self.mixes = bool(self.preset.mixup or self.preset.cutmix)
        if self.mixes and num_samples is None:
            raise ValueError("mixup and cutmix need num_samples: they pair neighbors in the epoch's order.")
        self.order = EpochOrder(num_samples or 1, seed)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def describe(self) -> dict[str, Any]:
        """Return all settings that affect the images but the seed, as JSON types."""
        described = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self.preset).items()}
        del described["label_smoothing"], described["rotate"]  # which changes targets, not images; is not supported
        mean, std = ([round(value, 6) for value in buffer.tolist()] for buffer in (self.mean, self.std))
        return {"version": VERSION, "img_size": self.img_size, **described, "mean": mean, "std": std}

    def sample_params(self, epoch: int, indices: NDArray[np.int64] | list[int] | Tensor) -> ReplayParams:
        """Sample the random parameters of a batch, on the CPU.

        Args:
            epoch: number of the epoch, from 0.
            indices: indices of the samples, :math:`(B,)`.

        Returns:
            The parameters of the batch.

        Raises:
            ValueError: if ``epoch`` is not in [0, 2**32).
            IndexError: with mixup or cutmix, if an index is not in [0, num_samples).
        """
        indices = np.asarray(indices, dtype=np.int64)
        preset = self.preset
        layers = parameters.POLICY_LAYERS[preset.policy]
        words = self._words("policy", epoch, indices, layers).reshape(len(indices), layers, 4)
        operations, magnitudes = parameters.sample_policy(preset.policy, words)
        jitter = 1 + preset.color_jitter * (2 * self._uniform("jitter", epoch, indices)[:, :3] - 1)
        chance = self._words("erasing", epoch, indices)
        erases = parameters.unit(chance[:, :1]) < preset.erasing
        tries = self._uniform("erasing_box", epoch, indices, ATTEMPTS).reshape(-1, ATTEMPTS, 4)
        partners, mixup_weight, pasted = self._sample_mixing(epoch, indices)
        return ReplayParams(
            epoch=epoch,
            indices=indices,
            crop=self._uniform("crop", epoch, indices, ATTEMPTS).reshape(-1, ATTEMPTS, 4),
            flip=self._uniform("flip", epoch, indices)[:, 0] < preset.flip,
            operations=operations,
            magnitudes=magnitudes,
            jitter=jitter.astype(np.float32),
            erased=np.where(erases, parameters.erased_box(tries, self.img_size), 0),
            noise=chance[:, 1].astype(np.int64),
            partners=partners,
            mixup_weight=mixup_weight,
            pasted=pasted,
        )

    def crop(self, image: Tensor, params: ReplayParams, row: int) -> Tensor:
        """Crop an image and resize the crop: bicubic, antialiased, in uint8.

        Args:
            image: uint8 image :math:`(C, H, W)` of any size.
            params: the result of :meth:`sample_params`.
            row: the image's row in ``params``.

        Returns:
            uint8 image :math:`(C, S, S)`.

        Raises:
            TypeError: if the image is not a uint8 tensor of three dimensions.
        """
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise TypeError(
                f"crop takes a uint8 image (C, H, W); got {image.dtype} {tuple(image.shape)}. "
                "Read it with kornia_tinyvit.images.read_pixels."
            )
        height, width = image.shape[-2:]
        top, left, rows, columns = parameters.crop_box(params.crop[row], height, width, self.preset)
        cut = image[None, :, top : top + rows, left : left + columns]
        # uint8 resizing is bit-identical on all processors and for any number of threads; floating point is not.
        return F.interpolate(cut, (self.img_size, self.img_size), mode="bicubic", antialias=True)[0]

    def forward(self, crops: Tensor, params: ReplayParams) -> Tensor:
        """Augment, normalize and mix the crops of a batch on their device.

        Args:
            crops: uint8 images :math:`(B, 3, S, S)` from :meth:`crop`.
            params: the result of :meth:`sample_params` for them.

        Returns:
            Normalized images :math:`(B, 3, S, S)`, float32.

        Raises:
            TypeError: if ``crops`` are not uint8 images.
            ValueError: if the shape of ``crops`` does not fit ``params``, or the partner of a mixed sample is not its
                neighbor in the batch.
        """
        if crops.dtype != torch.uint8:
            raise TypeError(f"Expected the uint8 crops that crop() returns; got {crops.dtype}.")
        if crops.shape != (len(params), 3, self.img_size, self.img_size):
            raise ValueError(
                f"Expected crops ({len(params)}, 3, {self.img_size}, {self.img_size}), one per row of the parameters; "
                f"got {tuple(crops.shape)}."
            )
        if len(params) == 0:
            return crops.float()
        chunk = _CPU_CHUNK if crops.device.type == "cpu" else len(params)
        parts = [slice(start, start + chunk) for start in range(0, len(params), chunk)]
        with torch.autocast(crops.device.type, enabled=False):  # the images do not depend on the training's precision
            images = torch.cat([self._augment(crops[part], params, part) for part in parts])
            return self._mix(images, params) if self.mixes else images

    def soft_labels(self, labels: Tensor, params: ReplayParams, num_classes: int) -> Tensor:
        """Return the soft labels :math:`(B, classes)` after mixing and label smoothing; rows sum to 1.

        Args:
            labels: class indices, :math:`(B,)`.
            params: the result of :meth:`sample_params`.
            num_classes: number of classes.
        """
        hard = F.one_hot(labels.long(), num_classes).float()
        if self.mixes:
            pasted = params.pasted[:, 2] * params.pasted[:, 3] / self.img_size**2
            weight = torch.from_numpy((params.mixup_weight + pasted).astype(np.float32)).to(hard)[:, None]
            hard = hard * (1 - weight) + _swap_neighbors(hard) * weight
        smoothing = self.preset.label_smoothing
        return hard * (1 - smoothing) + smoothing / num_classes

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"img_size={self.img_size}, seed={self.seed}, {self.preset}"

    # Parameters, in numpy on the CPU.

    def _words(self, stream: str, epoch: int, keys: NDArray[np.int64], blocks: int = 1) -> NDArray[np.uint32]:
        return keyed_words(self.seed, epoch, keys, _STREAMS[stream], blocks)

    def _uniform(self, stream: str, epoch: int, keys: NDArray[np.int64], blocks: int = 1) -> NDArray[np.float64]:
        return parameters.unit(self._words(stream, epoch, keys, blocks))

    def _sample_mixing(
        self, epoch: int, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Return the partners, their weights in mixup, and the boxes of cutmix."""
        weight = np.zeros(len(indices), dtype=np.float32)
        pasted = np.zeros((len(indices), 4), dtype=np.int64)
        if not self.mixes:
            return indices, weight, pasted
        partners = self.order.partners(epoch, indices)
        # Both samples of a pair have the smaller index as their key, and therefore the same parameters.
        kind, mixed, top, left, chance = self._uniform("mixing", epoch, np.minimum(indices, partners), 2)[:, :5].T
        pairs = (partners != indices) & (chance < self.preset.mix_probability)
        by_cutmix = pairs & (kind < 0.5 if self.preset.mixup and self.preset.cutmix else bool(self.preset.cutmix))
        if self.preset.mixup:
            weights = parameters.beta_quantile(self.preset.mixup, mixed)
            weight = np.where(pairs & ~by_cutmix, weights, 0).astype(np.float32)
        if self.preset.cutmix:
            fraction = parameters.beta_quantile(self.preset.cutmix, mixed)
            box = parameters.pasted_box(fraction, top, left, self.img_size)
            pasted = np.where(by_cutmix[:, None], box, pasted)
        return partners, weight, pasted

    # Pixels, in torch on the device.

    def _augment(self, crops: Tensor, params: ReplayParams, rows: slice) -> Tensor:
        flips = torch.from_numpy(params.flip[rows]).to(crops.device)[:, None, None, None]
        images = torch.where(flips, hflip(crops), crops)
        for layer in range(params.operations.shape[1]):
            chosen, magnitudes = params.operations[rows, layer], params.magnitudes[rows, layer]
            for number in np.unique(chosen[chosen >= 0]):
                operator = operators.OPERATORS[operators.OPERATIONS[number]]
                operators.apply_to(images, chosen == number, operator, magnitudes)
        if self.preset.color_jitter:
            factors = torch.from_numpy(params.jitter[rows]).to(images.device)
            for name, factor in zip(("brightness", "contrast", "color"), factors.unbind(1), strict=True):
                images = operators.OPERATORS[name](images, factor)
        normalized = KE.normalize(to_floats(images), self.mean, self.std)
        return operators.erase(normalized, params.erased[rows], params.noise[rows])

    def _mix(self, images: Tensor, params: ReplayParams) -> Tensor:
        if not np.array_equal(_swap_neighbors(torch.from_numpy(params.indices)).numpy(), params.partners):
            raise ValueError(
                "Mixed samples must be neighbors in one batch: the pairs (0, 1), (2, 3), ... of the epoch's order. "
                "Use EpochBatches, which keeps pairs together."
            )
        other = _swap_neighbors(images)
        weight = torch.from_numpy(params.mixup_weight).to(images)[:, None, None, None]
        images = images * (1 - weight) + other * weight
        return torch.where(operators.box_mask(params.pasted, images), other, images)


def _swap_neighbors(rows: Tensor) -> Tensor:
    """Swap rows 0 and 1, 2 and 3, ...; the last of an odd number stays."""
    even = len(rows) // 2 * 2
    return torch.cat([rows[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1), rows[even:]])
