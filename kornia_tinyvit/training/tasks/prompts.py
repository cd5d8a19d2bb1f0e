"""Prompts for training MobileSAM: sampled from augmented instance masks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from torch import Tensor

from kornia_tinyvit.data.order import keyed_seed
from kornia_tinyvit.data.paired import PairedBatch, PairedSamples
from kornia_tinyvit.ops import mask_boxes
from kornia_tinyvit.sam.embedding import Geometry
from kornia_tinyvit.sam.transforms import PIXEL_MEAN, PIXEL_STD, resize_image
from kornia_tinyvit.training.tasks.semantic import MaskAugmentation

__all__ = ["PromptAugmentation", "PromptTargets", "PromptedSamples", "Prompting", "Prompts"]

#: Version of the sampling, incremented when it changes.
VERSION = 1

_STREAM = 9  # random stream; lower numbers belong to the order, the replayed and the paired augmentation
_PADDING = tuple(round(255 * mean) for mean in PIXEL_MEAN)  # 0 after normalization, as at inference


class Prompts(NamedTuple):
    """Inputs of :class:`~kornia_tinyvit.training.PromptedSAM`: images and :math:`P` prompts on them.

    Attributes:
        images: normalized images :math:`(B, 3, S, S)`.
        photo: index of the image of each prompt, :math:`(P,)`.
        boxes: left, top, right and bottom in pixels of the input, :math:`(P, 4)`.
        points: foreground points, x and y in pixels of the input, :math:`(P, N, 2)`.
        counts: number of points of each prompt, :math:`(P,)`; 0 for a box.
    """

    images: Tensor
    photo: Tensor
    boxes: Tensor
    points: Tensor
    counts: Tensor


class PromptTargets(NamedTuple):
    """Prompts of a batch and the masks that they ask for.

    Attributes:
        prompts: the prompts, without their images.
        masks: ground truth masks of the prompts, bool :math:`(P, S, S)`.
        weights: weight of each prompt in the loss, :math:`(P,)`: 1 / :attr:`Prompting.instances`, which weighs all
            objects equally, or 0 for the placeholder of an image without instances.
    """

    prompts: Prompts
    masks: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Prompting:
    """Sampling of prompts from masks.

    Args:
        instances: maximum number of instances per image, sampled in each epoch.
        box_fraction: probability of a box prompt; the others are point prompts.
        points: numbers of foreground points of a point prompt, sampled uniformly.
        jitter: standard deviation of the noise on a box's edges, as a fraction of its width or height; 0.1 in SAM
            (arXiv:2304.02643, appendix A).
        max_jitter: maximum noise in pixels of an input of 1024 pixels; 20 in SAM.

    Raises:
        ValueError: if a value is out of its range.
    """

    instances: int = 8
    box_fraction: float = 0.5
    points: tuple[int, ...] = (1, 3)
    jitter: float = 0.1
    max_jitter: float = 20.0

    def __post_init__(self) -> None:
        fits = self.instances >= 1 and 0 <= self.box_fraction <= 1 and min(self.jitter, self.max_jitter) >= 0
        if not fits or not self.points or min(self.points) < 1:
            raise ValueError(
                f"Prompting needs instances >= 1, box_fraction in [0, 1], points >= 1 and jitter >= 0; got {self}."
            )


class PromptAugmentation(MaskAugmentation):
    """Pad an image as MobileSAM does, augment it with its masks, and sample prompts from these.

    The image is resized into the upper left corner of a square and padded, and then augmented by
    :class:`~kornia_tinyvit.training.MaskAugmentation`. With ``crop_scale=(1, 1)`` and ``crop_ratio=(1, 1)`` the inputs
    are framed as at inference.

    Args:
        img_size: side in pixels of the input.
        preset: see :class:`~kornia_tinyvit.training.MaskAugmentation`.
        seed: random seed, in [0, 2**64).
        prompting: sampling of the prompts.
        **changes: fields of the preset to replace.
    """

    def __init__(
        self,
        img_size: int,
        preset: str = "promptable",
        seed: int = 0,
        prompting: Prompting | None = None,
        **changes: object,
    ) -> None:
        super().__init__(img_size, preset, seed, **changes)
        self.prompting = prompting or Prompting()

    def describe(self) -> dict[str, Any]:
        """Return everything but the seed that determines the result, as JSON types."""
        prompting = dataclasses.asdict(self.prompting) | {"points": list(self.prompting.points), "version": VERSION}
        return super().describe() | {"kind": "prompts", "prompting": prompting}

    def sample(self, image: Tensor, masks: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor, Prompts]:
        """Augment a sample and sample its prompts.

        Args:
            image: uint8 image :math:`(3, H, W)` on the CPU.
            masks: its instances, bool :math:`(N, H, W)`.
            epoch: number of the epoch.
            index: index of the sample.

        Returns:
            uint8 image :math:`(3, S, S)`, the sampled masks :math:`(P, S, S)` that are visible in it, and a prompt for
            each, without images.
        """
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, epoch, index, _STREAM))
        sampled = torch.randperm(len(masks), generator=generator)[: self.prompting.instances]
        # kornia needs at least one mask.
        chosen = masks[sampled] if len(sampled) else masks.new_zeros(1, *masks.shape[1:])
        crop, augmented = self(*self._letterbox(image, chosen), epoch, index)
        visible = augmented[augmented.flatten(1).any(1)]
        return crop, visible, self._sample_prompts(visible, generator)

    def _letterbox(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Resize and pad an image to a square of which the smallest crops still have the size of the input."""
        side = round(self.img_size / self.preset.crop_scale[0] ** 0.5)
        geometry = Geometry.fit((image.shape[1], image.shape[2]), (side, side))
        height, width = geometry.input_size
        resized = F.interpolate(masks[None].float(), geometry.input_size, mode="bilinear", antialias=True)
        square = torch.tensor(_PADDING, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
        square[:, :height, :width] = resize_image(image, geometry.input_size)
        return square, F.pad(resized[0] >= 0.5, (0, side - width, 0, side - height))

    def _sample_prompts(self, masks: Tensor, generator: torch.Generator) -> Prompts:
        prompting, most = self.prompting, max(self.prompting.points)
        boxes = mask_boxes(masks)
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        limit = prompting.max_jitter * self.img_size / 1024
        noise = torch.randn(boxes.shape, generator=generator) * prompting.jitter * sides
        moved = (boxes + noise.clamp(-limit, limit)).clamp(0, self.img_size)
        # Noise of several standard deviations can invert a box of a few pixels.
        valid = ((moved[:, 2:] - moved[:, :2]) >= 1).all(1, keepdim=True)
        choice = torch.randint(len(prompting.points), (len(masks),), generator=generator)
        is_box = torch.rand(len(masks), generator=generator) < prompting.box_fraction
        points = [mask.nonzero()[torch.randint(int(mask.sum()), (most,), generator=generator)] for mask in masks]
        boxes, counts = torch.where(valid, moved, boxes), torch.where(is_box, 0, torch.tensor(prompting.points)[choice])
        centers = torch.stack(points).flip(-1) + 0.5 if points else torch.zeros(0, most, 2)
        return Prompts(torch.empty(0), torch.zeros(len(masks), dtype=torch.int64), boxes, centers, counts)


class PromptedSamples(PairedSamples):
    """Images and prompts, decoded, augmented and sampled; targets are :class:`PromptTargets`.

    See :class:`~kornia_tinyvit.data.KeyedSamples` for the arguments: an
    :class:`~kornia_tinyvit.data.InstanceDataset` and a :class:`PromptAugmentation`.
    """

    def inputs(self, batch: PairedBatch, device: torch.device) -> Prompts:
        """Return the prompts of a batch with its normalized images, on a device."""
        tensors = [each.to(device, non_blocking=True) for each in batch.targets.prompts[1:]]
        pixels = super().inputs(batch, device)
        return Prompts(normalize(pixels, pixels.new_tensor(PIXEL_MEAN), pixels.new_tensor(PIXEL_STD)), *tensors)

    def _augment(self, read: Any, epoch: int, index: int) -> tuple[Tensor, PromptTargets]:
        image, masks, prompts = self.augmentation.sample(*read, epoch, index)
        if not len(masks):
            return image, self._blank()
        weights = torch.full((len(masks),), 1 / self.augmentation.prompting.instances)
        return image, PromptTargets(prompts, masks, weights)

    def _blank(self) -> PromptTargets:
        """Return a box around the whole input, of weight 0: each rank's decoder then runs for every batch."""
        side, most = self.augmentation.img_size, max(self.augmentation.prompting.points)
        box, zero = torch.tensor([[0.0, 0.0, side, side]]), torch.zeros(1, dtype=torch.int64)
        prompts = Prompts(torch.empty(0), zero, box, torch.zeros(1, most, 2), zero)
        return PromptTargets(prompts, torch.zeros(1, side, side, dtype=torch.bool), torch.zeros(1))

    def _collate(self, targets: tuple[PromptTargets, ...]) -> PromptTargets:
        prompts, masks, weights = zip(*targets, strict=True)
        rows = [each._replace(photo=each.photo + row) for row, each in enumerate(prompts)]
        joined = Prompts(*(torch.cat(column) for column in zip(*rows, strict=True)))
        return PromptTargets(joined, torch.cat(masks), torch.cat(weights))
