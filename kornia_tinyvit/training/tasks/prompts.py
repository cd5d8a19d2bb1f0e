"""Prompts for training MobileSAM: drawn from masks, which are augmented with their images."""

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

#: Number of this module's formulas, raised when a prompt would come out differently.
VERSION = 1

_STREAM = 9  # of random words; those below are the order's, the replayed augmentation's and the masks'
_PADDING = tuple(round(255 * level) for level in PIXEL_MEAN)  # which normalization makes zeros of, as at inference


class Prompts(NamedTuple):
    """What the network is asked: inputs of :math:`S` pixels, and :math:`P` prompts over them.

    Attributes:
        images: inputs :math:`(B, 3, S, S)`, normalized.
        photo: which of them each prompt is about, :math:`(P,)`.
        boxes: left, top, right and bottom in pixels of the input, :math:`(P, 4)`.
        points: points on the object, x and y in pixels of the input, :math:`(P, N, 2)`.
        counts: how many of its points make a prompt, :math:`(P,)`; 0 for a box.
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
    """How prompts are drawn from masks.

    Args:
        instances: how many instances of an image are asked for, drawn anew each time; all if it has no more.
        box_fraction: probability that a prompt is a box; otherwise it is points.
        points: numbers of points on the object, of which one is drawn.
        jitter: standard deviation of the noise on a box's edges, as a share of its width or height.
        max_jitter: the most that an edge moves, in pixels of an input of 1024; SAM (arXiv:2304.02643, appendix A) has
            0.1 and 20.

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
    """Put an image into a network's input as MobileSAM does, change it with its masks, and draw prompts from these.

    An image is resized as a whole into the upper left corner of a square, whose rest is padding; of this square
    :class:`~kornia_tinyvit.training.MaskAugmentation` makes the input. So with ``crop_scale=(1, 1)`` and
    ``crop_ratio=(1, 1)`` the network is trained on just what it will be asked.

    Args:
        img_size: side in pixels of the input.
        preset: as for :class:`~kornia_tinyvit.training.MaskAugmentation`.
        seed: seed of everything, in [0, 2**64).
        prompting: how prompts are drawn.
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
        """Return everything but the seed that decides what comes out, as JSON's types."""
        told = super().describe()
        prompting = dataclasses.asdict(self.prompting) | {"points": list(self.prompting.points), "version": VERSION}
        return told | {"kind": "prompts", "prompting": prompting}

    def sample(self, image: Tensor, masks: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor, Prompts]:
        """Make a sample.

        Args:
            image: 8-bit image :math:`(3, H, W)` on the CPU.
            masks: its instances, bool :math:`(N, H, W)`.
            epoch: number of the epoch.
            index: number of the sample.

        Returns:
            8-bit input :math:`(3, S, S)`, the masks that were drawn and are still seen :math:`(P, S, S)`, maybe none,
            and a prompt for each, without images and of image 0.
        """
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, epoch, index, _STREAM))
        drawn = torch.randperm(len(masks), generator=generator)[: self.prompting.instances]
        # Without any, the image still needs something to be moved along with it.
        chosen = masks[drawn] if len(drawn) else masks.new_zeros(1, *masks.shape[1:])
        crop, moved = self(*self._letterbox(image, chosen), epoch, index)
        seen = moved[moved.flatten(1).any(1)]
        return crop, seen, self._draw(seen, generator)

    def _letterbox(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Resize an image into the corner of a square so large that the smallest crops have the input's size."""
        side = round(self.img_size / self.preset.crop_scale[0] ** 0.5)
        geometry = Geometry.fit((image.shape[1], image.shape[2]), (side, side))
        height, width = geometry.input_size
        shares = F.interpolate(
            masks[None].float(), (height, width), mode="bilinear", antialias=True, align_corners=False
        )
        square = torch.tensor(_PADDING, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
        square[:, :height, :width] = resize_image(image, geometry.input_size)
        return square, F.pad(shares[0] >= 0.5, (0, side - width, 0, side - height))

    def _draw(self, masks: Tensor, generator: torch.Generator) -> Prompts:
        asked, most = self.prompting, max(self.prompting.points)
        boxes = mask_boxes(masks)
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        limit = asked.max_jitter * self.img_size / 1024
        noise = torch.randn(boxes.shape, generator=generator) * asked.jitter * sides
        moved = (boxes + noise.clamp(-limit, limit)).clamp(0, self.img_size)
        # Noise of some deviations can turn a box of a few pixels inside out.
        sound = ((moved[:, 2:] - moved[:, :2]) >= 1).all(1, keepdim=True)
        counts = torch.tensor(asked.points)[torch.randint(len(asked.points), (len(masks),), generator=generator)]
        is_box = torch.rand(len(masks), generator=generator) < asked.box_fraction
        points = [mask.nonzero()[torch.randint(int(mask.sum()), (most,), generator=generator)] for mask in masks]
        return Prompts(
            images=torch.empty(0),
            photo=torch.zeros(len(masks), dtype=torch.int64),
            boxes=torch.where(sound, moved, boxes),
            points=torch.stack(points).flip(-1) + 0.5 if points else torch.zeros(0, most, 2),
            counts=torch.where(is_box, 0, counts),
        )


class PromptedSamples(PairedSamples):
    """Images decoded, augmented and asked about as an epoch demands, a whole batch at a time.

    See :class:`~kornia_tinyvit.data.KeyedSamples` for the arguments: an
    :class:`~kornia_tinyvit.data.InstanceDataset` and a :class:`PromptAugmentation`.
    """

    def inputs(self, batch: PairedBatch, device: torch.device) -> Prompts:
        """Return the prompts of a batch with their normalized inputs, on a device."""
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
