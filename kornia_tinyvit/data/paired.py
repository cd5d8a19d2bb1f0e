"""Images that are augmented together with their targets, such as masks or boxes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch import Tensor

from kornia_tinyvit.data.loader import Key, KeyedSamples
from kornia_tinyvit.data.order import keyed_seed
from kornia_tinyvit.images import to_uint8
from kornia_tinyvit.preprocessing import TrainingPreset, find_preset, rotations

__all__ = ["PairedAugmentation", "PairedBatch", "PairedSamples"]

_STREAM = 8  # of random words; the order and the replayable augmentation have 0 to 7


class PairedAugmentation:
    """Crop, flip, rotate and color-jitter an image with kornia, and transform its targets with it.

    The result is a function of the seed, the epoch, the sample and its files. It does not depend on the batch, the
    workers or the step a training was resumed at.

    Args:
        img_size: side of the output in pixels.
        preset: a name of :data:`~kornia_tinyvit.preprocessing.TRAINING_PRESETS` or a
            :class:`~kornia_tinyvit.preprocessing.TrainingPreset` without policy, erasing, mixup and cutmix; by default
            the preset of the task.
        seed: random seed, in [0, 2**64).
        **changes: fields of the preset to replace.

    Raises:
        ValueError: if the preset has augmentations that targets do not support, or a field is unknown.
    """

    #: The kind of the targets, for :meth:`describe`.
    kind: ClassVar[str]
    #: Version of the augmentation. Raise it when its results change.
    version: ClassVar[int] = 1
    #: Name of the preset if none is given.
    default_preset: ClassVar[str]
    #: kornia's name for the kind of the targets.
    data_key: ClassVar[str]

    def __init__(
        self, img_size: int, preset: str | TrainingPreset | None = None, seed: int = 0, **changes: object
    ) -> None:
        self.img_size, self.seed = img_size, seed
        self.preset = found = find_preset(preset or self.default_preset, **changes)
        unfit = [name for name in ("policy", "erasing", "mixup", "cutmix") if getattr(found, name)]
        if unfit:
            raise ValueError(
                f"{self.kind.capitalize()} do not support {', '.join(unfit)}; use the preset {self.default_preset!r} "
                "or another one without them."
            )
        jitter = found.color_jitter
        self._change = K.AugmentationSequential(
            K.RandomResizedCrop(
                (img_size, img_size), found.crop_scale, found.crop_ratio, resample="BILINEAR", align_corners=False
            ),
            K.RandomHorizontalFlip(p=found.flip),
            *rotations(found),
            *([K.ColorJitter(jitter, jitter, jitter, 0.0)] if jitter else []),
            data_keys=["input", self.data_key],
        )

    def describe(self) -> dict[str, Any]:
        """Return all settings that affect the results but the seed, as JSON types."""
        names = ("crop_scale", "crop_ratio", "flip", "rotate", "color_jitter")
        fields = {name: getattr(self.preset, name) for name in names}
        return {"kind": self.kind, "version": self.version, "img_size": self.img_size, **fields}

    def _apply(self, pixels: Tensor, target: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Augment an image :math:`(1, 3, H, W)` in [0, 255] and its target; return a uint8 image :math:`(3, S, S)`."""
        with torch.random.fork_rng(devices=[]):  # kornia samples from the global generator
            torch.default_generator.manual_seed(keyed_seed(self.seed, epoch, index, _STREAM))
            image, target = self._change(pixels.float() / 255, target)
        return to_uint8(image[0]), target

    def _reduce(self, image: Tensor) -> Tensor:
        """Downsample an image such that its smallest crops still have the output size, :math:`(1, 3, h, w)`.

        kornia resizes crops without antialiasing, which aliases large photos.
        """
        height, width = image.shape[-2:]
        factor = min(1.0, self.img_size / math.sqrt(self.preset.crop_scale[0] * height * width))
        size = max(1, round(height * factor)), max(1, round(width * factor))
        if size == (height, width):
            return image[None]
        return F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)


class PairedBatch(NamedTuple):
    """Augmented images with their targets, as the workers of the loader return them.

    Attributes:
        images: uint8 images :math:`(B, 3, S, S)`.
        targets: what the subclass of :class:`PairedSamples` collates for the task.
        valid: 1 for samples whose files could be read, 0 for corrupt ones, :math:`(B,)`.
        broken: names of the corrupt images.
    """

    images: Tensor
    targets: Any
    valid: Tensor
    broken: tuple[str, ...]


class PairedSamples(KeyedSamples[PairedBatch]):
    """Images and their targets, decoded and augmented; the network takes the images in [0, 1]."""

    def inputs(self, batch: PairedBatch, device: torch.device) -> Any:
        """Return the images :math:`(B, 3, S, S)` of a batch in [0, 1] on a device.

        Args:
            batch: the batch.
            device: device of the result.
        """
        return batch.images.to(device, non_blocking=True).float() / 255

    def __getitems__(self, keys: Sequence[Key]) -> PairedBatch:
        """Return the batch of some keys (epoch, sample)."""
        blank = self._gray(), self._blank()
        samples, valid, broken = self._gather(keys, lambda read, row: self._augment(read, *keys[row]), blank)
        images, targets = zip(*samples, strict=True)
        return PairedBatch(torch.stack(images), self._collate(targets), valid, broken)

    def _augment(self, read: Any, epoch: int, index: int) -> Any:
        """Return an image :math:`(3, S, S)` and its target, augmented for an epoch."""
        return self.augmentation(*read, epoch, index)

    @abstractmethod
    def _blank(self) -> Any:
        """Return the target of an image that cannot be read."""

    def _collate(self, targets: tuple[Any, ...]) -> Any:
        """Return the targets of a batch; by default as a tuple."""
        return targets
