"""Fine-tuning MobileSAM on one's own masks: prompts drawn from them, the loss, and how well prompts find them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from kornia.losses import binary_focal_loss_with_logits
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import open_pretrained, save_checkpoint
from kornia_tinyvit.checkpoints.composite import part_groups
from kornia_tinyvit.config import TinyViTConfig, WindowSizes
from kornia_tinyvit.data.instances import InstanceDataset
from kornia_tinyvit.data.loader import Key
from kornia_tinyvit.data.order import keyed_seed
from kornia_tinyvit.data.paired import PairedSamples
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.ops import central_points, mask_boxes
from kornia_tinyvit.sam.decoder import CHUNK, CPU_CHUNK, FoldedMaskDecoder
from kornia_tinyvit.sam.embedding import Geometry
from kornia_tinyvit.sam.model import PIXEL_MEAN, PIXEL_STD, MobileSAM, prepare_photo, resize_levels
from kornia_tinyvit.training.tasks.classification import ReadableItems, as_it_is, measure_network
from kornia_tinyvit.training.tasks.semantic import MaskAugmentation

__all__ = [
    "FREEZABLE",
    "PROMPTABLE",
    "MaskLoss",
    "PromptAugmentation",
    "PromptMetrics",
    "Promptable",
    "PromptableConfig",
    "PromptedBatch",
    "PromptedSAM",
    "PromptedSamples",
    "Prompting",
    "Prompts",
    "build_sam",
    "evaluate_prompts",
]

#: Number of this module's formulas, raised when a prompt would come out differently.
VERSION = 1

#: Parts of MobileSAM whose weights may stay as they are; the mask decoder always learns.
FREEZABLE = ("image_encoder", "prompt_encoder")

_STREAM = 9  # of random words; those below are the order's, the replayed augmentation's and the masks'
_PADDING = tuple(round(255 * level) for level in PIXEL_MEAN)  # which normalisation makes zeros of, as at inference
_SINGLE, _SEVERAL = slice(0, 1), slice(1, None)  # of a prompt's masks: the one for clear prompts, those for ambiguous


class Prompts(NamedTuple):
    """What the network is asked: inputs of :math:`S` pixels, and :math:`P` prompts over them.

    Attributes:
        images: inputs :math:`(B, 3, S, S)`, normalised.
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


class PromptedBatch(NamedTuple):
    """Pictures, masks and prompts as the workers hand them over.

    Attributes:
        crops: 8-bit inputs :math:`(B, 3, S, S)`.
        masks: what the prompts should find, bool :math:`(P, S, S)`.
        weights: what each prompt counts, :math:`(P,)`: one part of as many as are asked for at most, so that all
            objects count alike; 0 for those that stand for a picture without an instance.
        prompts: the prompts, still without their images.
        valid: 1 for samples whose files could be read, 0 for broken ones, :math:`(B,)`.
        broken: names of the pictures that could not be read.
    """

    crops: Tensor
    masks: Tensor
    weights: Tensor
    prompts: Prompts
    valid: Tensor
    broken: tuple[str, ...]


@dataclass(frozen=True)
class Prompting:
    """How prompts are drawn from masks.

    Args:
        instances: how many instances of a picture are asked for, drawn anew each time; all if it has no more.
        box_share: probability that a prompt is a box; otherwise it is points.
        points: numbers of points on the object, of which one is drawn.
        jitter: standard deviation of the noise on a box's edges, as a share of its width or height.
        max_jitter: the most that an edge moves, in pixels of an input of 1024; SAM (arXiv:2304.02643, appendix A) has
            0.1 and 20.

    Raises:
        ValueError: if a value is out of its range.
    """

    instances: int = 8
    box_share: float = 0.5
    points: tuple[int, ...] = (1, 3)
    jitter: float = 0.1
    max_jitter: float = 20.0

    def __post_init__(self) -> None:
        fits = self.instances >= 1 and 0 <= self.box_share <= 1 and min(self.jitter, self.max_jitter) >= 0
        if not fits or not self.points or min(self.points) < 1:
            raise ValueError(
                "Prompting needs instances >= 1, box_share in [0, 1], numbers of points from 1 up and a jitter that is "
                f"not negative; got {self}."
            )


class PromptAugmentation(MaskAugmentation):
    """Put a picture into a network's input as MobileSAM does, change it with its masks, and draw prompts from these.

    A picture is resized as a whole into the upper left corner of a square, whose rest is padding; of this square
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

    def sample(self, picture: Tensor, masks: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor, Prompts]:
        """Make a sample.

        Args:
            picture: 8-bit picture :math:`(3, H, W)` on the CPU.
            masks: its instances, bool :math:`(N, H, W)`.
            epoch: number of the epoch.
            index: number of the sample.

        Returns:
            8-bit input :math:`(3, S, S)`, the masks that were drawn and are still seen :math:`(P, S, S)`, maybe none,
            and a prompt for each, without images and of picture 0.
        """
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, epoch, index, _STREAM))
        drawn = torch.randperm(len(masks), generator=generator)[: self.prompting.instances]
        # Without any, the picture still needs something to be moved along with it.
        chosen = masks[drawn] if len(drawn) else masks.new_zeros(1, *masks.shape[1:])
        crop, moved = self(*self._letterbox(picture, chosen), epoch, index)
        seen = moved[moved.flatten(1).any(1)]
        return crop, seen, self._draw(seen, generator)

    def _letterbox(self, picture: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Resize a picture into the corner of a square so large that the smallest crops have the input's size."""
        side = round(self.img_size / self.preset.crop_scale[0] ** 0.5)
        geometry = Geometry.fit((picture.shape[1], picture.shape[2]), (side, side))
        height, width = geometry.input_size
        shares = F.interpolate(
            masks[None].float(), (height, width), mode="bilinear", antialias=True, align_corners=False
        )
        square = torch.tensor(_PADDING, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
        square[:, :height, :width] = resize_levels(picture, geometry.input_size)
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
        is_box = torch.rand(len(masks), generator=generator) < asked.box_share
        points = [mask.nonzero()[torch.randint(int(mask.sum()), (most,), generator=generator)] for mask in masks]
        return Prompts(
            images=torch.empty(0),
            photo=torch.zeros(len(masks), dtype=torch.int64),
            boxes=torch.where(sound, moved, boxes),
            points=torch.stack(points).flip(-1) + 0.5 if points else torch.zeros(0, most, 2),
            counts=torch.where(is_box, 0, counts),
        )


class PromptedSamples(PairedSamples[PromptedBatch]):
    """Pictures decoded, augmented and asked about as an epoch demands, a whole batch at a time.

    See :class:`~kornia_tinyvit.data.KeyedSamples` for the arguments: an
    :class:`~kornia_tinyvit.data.InstanceDataset` and a :class:`PromptAugmentation`.
    """

    def inputs(self, batch: PromptedBatch, device: torch.device) -> Prompts:
        """Return the prompts of a batch with their normalised inputs, on a device."""
        tensors = [each.to(device, non_blocking=True) for each in batch.prompts[1:]]
        pixels = batch.crops.to(device, non_blocking=True).float() / 255
        return Prompts(normalize(pixels, pixels.new_tensor(PIXEL_MEAN), pixels.new_tensor(PIXEL_STD)), *tensors)

    def __getitems__(self, keys: Sequence[Key]) -> PromptedBatch:
        """Return the samples of keys (epoch, sample)."""
        found = [self._sample(*key) for key in keys]
        valid = torch.tensor([0.0 if sample is None else 1.0 for sample in found])
        broken = tuple(self.images.name(index) for (_, index), each in zip(keys, found, strict=True) if each is None)
        crops, masks, prompts, weights = zip(*(self._or_nothing(sample) for sample in found), strict=True)
        rows = [asked._replace(photo=asked.photo + row) for row, asked in enumerate(prompts)]
        together = Prompts(*(torch.cat(column) for column in zip(*rows, strict=True)))
        return PromptedBatch(torch.stack(crops), torch.cat(masks), torch.cat(weights), together, valid, broken)

    def _sample(self, epoch: int, index: int) -> tuple[Tensor, Tensor, Prompts] | None:
        read = self._read(index)
        return None if read is None else self.augmentation.sample(*read, epoch, index)

    def _or_nothing(self, sample: tuple[Tensor, Tensor, Prompts] | None) -> tuple[Tensor, Tensor, Prompts, Tensor]:
        """Return a sample with weights; without instances, a box around everything that does not count.

        Every batch then asks something of the decoder, in all processes.
        """
        side, most = self.augmentation.img_size, max(self.augmentation.prompting.points)
        if sample is not None and len(sample[1]):
            return *sample, torch.full((len(sample[1]),), 1 / self.augmentation.prompting.instances)
        crop = torch.full((3, side, side), 128, dtype=torch.uint8) if sample is None else sample[0]
        box = torch.tensor([[0.0, 0.0, side, side]])
        one = torch.zeros(1, dtype=torch.int64)
        asked = Prompts(torch.empty(0), one, box, torch.zeros(1, most, 2), one)
        return crop, torch.zeros(1, side, side, dtype=torch.bool), asked, torch.zeros(1)


@dataclass(frozen=True)
class PromptableConfig:
    """What is trained.

    Args:
        encoder: configuration of the image encoder.
        img_size: side in pixels of the square input.
        frozen: parts whose weights stay, of :data:`FREEZABLE`.
    """

    encoder: TinyViTConfig
    img_size: int
    frozen: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return self.encoder.to_dict() | {"img_size": self.img_size, "frozen": list(self.frozen)}


class PromptedSAM(nn.Module):
    """MobileSAM as the training loop calls it: prompts of many photos in, all their masks out.

    The encoder runs once a photo and the decoder once for all prompts of a kind. A frozen part is kept in evaluation
    mode, and nothing of it is recorded for gradients.

    Args:
        sam: the network, which is trained in place.
        freeze: parts whose weights stay, of :data:`FREEZABLE`.

    Raises:
        ValueError: if there is no such part, or the input is not square.
    """

    def __init__(self, sam: MobileSAM, freeze: Iterable[str] = ()) -> None:
        super().__init__()
        asked = set(freeze)
        frozen = tuple(name for name in FREEZABLE if name in asked)
        unknown = sorted(asked - set(FREEZABLE))
        if unknown:
            raise ValueError(f"Parts that can be frozen are {', '.join(FREEZABLE)}; got {', '.join(unknown)}.")
        if sam.img_size[0] != sam.img_size[1]:
            raise ValueError(f"Training takes square inputs; this network has {sam.img_size}. Give img_size a number.")
        self.sam = sam
        self.config = PromptableConfig(sam.config, sam.img_size[0], frozen)
        for name in frozen:
            self.sam.get_submodule(name).requires_grad_(False)

    def train(self, mode: bool = True) -> PromptedSAM:
        """Switch to training, but for frozen parts."""
        super().train(mode)
        for name in self.config.frozen:
            self.sam.get_submodule(name).eval()
        return self

    def forward(self, asked: Prompts) -> tuple[Tensor, Tensor]:
        """Return all masks of the prompts.

        Returns:
            Logits :math:`(P, M, S/4, S/4)`, first the mask for clear prompts, then those for ambiguous ones, and
            predicted IoUs :math:`(P, M)`.
        """
        features = self.sam.image_encoder(asked.images)
        kinds = [(asked.counts == count).nonzero()[:, 0] for count in asked.counts.unique().tolist()]
        found = [self._decode(features, asked, rows) for rows in kinds]
        order = torch.cat(kinds).argsort()
        logits, scores = (torch.cat(parts)[order] for parts in zip(*found, strict=True))
        return logits, scores

    def _decode(self, features: Tensor, asked: Prompts, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Decode prompts of one kind, which have equally many points, or a box each."""
        count = int(asked.counts[rows[0]])
        points, boxes = None, None
        if count:
            placed = asked.points[rows, :count]
            points = (placed, torch.ones(placed.shape[:2], dtype=torch.int64, device=placed.device))
        else:
            boxes = asked.boxes[rows]
        sparse, dense = self.sam.prompt_encoder(points=points, boxes=boxes, masks=None)
        photo, position = asked.photo[rows], self.sam.prompt_encoder.get_dense_pe()
        if torch.is_grad_enabled():
            # kornia's decoder takes one photo for all prompts, but adds a dense prompt for each: there they come in.
            none = features.new_zeros(1, *features.shape[1:])
            decoded = self.sam.mask_decoder.predict_masks(none, position, sparse, dense + features[photo])
            return decoded[0], decoded[1]
        return self._decode_folded(features, position, sparse, dense, photo)

    def _decode_folded(
        self, features: Tensor, position: Tensor, sparse: Tensor, dense: Tensor, photo: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode without gradients, a photo at a time; the prompts come in the order of their photos."""
        decoder = FoldedMaskDecoder(self.sam.mask_decoder)
        size = CPU_CHUNK if sparse.device.type == "cpu" else CHUNK
        masks, scores = [], []
        for each in photo.unique_consecutive().tolist():
            image = decoder.prepare(features[each : each + 1], position, dense[:1])
            for chunk in sparse[photo == each].split(size):
                prompted = decoder.prompt(image, chunk)
                masks.append(decoder.upscale(prompted))
                scores.append(prompted.iou)
        return torch.cat(masks), torch.cat(scores)

    def parameter_groups(self, lr: float, weight_decay: float = 0.01, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Group the parameters that learn: :meth:`TinyViT.parameter_groups`, and the other parts' at ``lr``.

        Args:
            lr: learning rate of the mask decoder and of the encoder's last block.
            weight_decay: weight decay of the matrices; one-dimensional parameters are not decayed.
            layer_decay: factor in (0, 1] from one block of the encoder to the one before.

        Raises:
            ValueError: if ``layer_decay`` is outside of (0, 1].
        """
        groups = cast("TinyViT", self.sam.image_encoder).parameter_groups(lr, weight_decay, layer_decay)
        return groups + part_groups([self.sam.prompt_encoder, self.sam.mask_decoder], lr, weight_decay)


def build_sam(
    variant: str | TinyViTConfig | None = None,
    pretrained: str | Path | None = None,
    img_size: int | None = None,
    window_sizes: WindowSizes | None = None,
    **changes: Any,
) -> MobileSAM:
    """Build a MobileSAM to train, from whatever weights there are to begin with.

    Args:
        variant: variant or configuration of the encoder; may be left out where a file tells it.
        pretrained: ``"mobile_sam"``, or a path or URL of a whole MobileSAM; or weights of a TinyViT alone, as
            :meth:`TinyViT.from_config` takes them, for all of the encoder but its neck; ``None`` for random weights.
        img_size: side in pixels of the input, a multiple of 16; that of a whole MobileSAM, or 1024, if left out.
        window_sizes: for a new or a bare encoder; as for :meth:`TinyViT.from_config`.
        **changes: fields of the encoder's configuration to replace that change no weights, such as ``use_checkpoint``.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: if it cannot be built.
        CheckpointError: if the weights cannot be read or belong to another architecture.
    """
    if pretrained is not None and open_pretrained(pretrained, variant).layout == "mobile_sam":
        whole = MobileSAM.from_config(variant, pretrained=pretrained, img_size=img_size)
        encoder = TinyViT.from_config(whole.config.replace(**changes))
        encoder.load_state_dict(whole.image_encoder.state_dict())
        whole.image_encoder = encoder  # type: ignore[assignment]
        return whole.train()
    size = img_size or 1024
    bare = TinyViT.from_config(
        variant, pretrained=pretrained or False, num_classes=0, img_size=size, window_sizes=window_sizes, **changes
    )
    encoder = TinyViT.from_config(bare.config.replace(mobile_sam=True))
    encoder.load_state_dict(encoder.state_dict() | bare.state_dict())
    return MobileSAM(encoder).train()


class MaskLoss:
    """Focal and dice loss of the masks and squared error of the predicted IoU, as SAM weighs them.

    Of the masks for ambiguous prompts only that with the smallest loss learns; the single mask learns from all prompts
    but single points. All masks learn to tell their own IoU (arXiv:2304.02643, appendix A). Losses are taken at the
    size of the input, so that the sub-pixels of the low-resolution logits count.

    Args:
        focal: weight of the focal loss, with alpha 0.25 and gamma 2.
        dice: weight of the dice loss.
        iou: weight of the squared error.
    """

    def __init__(self, focal: float = 20.0, dice: float = 1.0, iou: float = 1.0) -> None:
        self.focal, self.dice, self.iou = focal, dice, iou

    def describe(self) -> dict[str, Any]:
        """Return its kind and the weights."""
        return {"kind": "masks", "focal": self.focal, "dice": self.dice, "iou": self.iou}

    def __call__(self, outputs: tuple[Tensor, Tensor], images: Prompts, batch: PromptedBatch) -> Tensor:
        """Return the losses :math:`(B,)`, weighted sums over a picture's prompts.

        A mean over them would let the one object of a picture, which needs no prompt to be found, count as much as all
        objects of another.
        """
        logits, scores = (each.float() for each in outputs)
        truth = batch.masks.to(logits.device, non_blocking=True)[:, None].float()
        ambiguous = images.counts == 1
        losses = self._losses(logits, scores, truth, ambiguous)
        weighted = losses * batch.weights.to(logits)
        return weighted.new_zeros(len(batch.valid)).index_add(0, images.photo, weighted)

    def _losses(self, logits: Tensor, scores: Tensor, truth: Tensor, ambiguous: Tensor) -> Tensor:
        """Return the loss of each prompt, :math:`(P,)`."""
        with torch.no_grad():
            small = F.interpolate(truth, logits.shape[2:], mode="area")
            best = self._mask_losses(logits[:, _SEVERAL], small.expand_as(logits[:, _SEVERAL])).argmin(1)
        rows = torch.arange(len(logits), device=logits.device)
        learning = torch.stack([logits[:, 0], logits[rows, 1 + best]], 1)
        large = F.interpolate(learning, truth.shape[2:], mode="bilinear", align_corners=False)
        single, several = self._mask_losses(large, truth.expand_as(large)).unbind(1)
        losses = torch.where(ambiguous, several, (single + several) / 2)
        with torch.no_grad():
            wanted = _ious(logits > 0, small >= 0.5)
        return losses + self.iou * (scores - wanted).square().mean(1)

    def _mask_losses(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of each mask, :math:`(P, M)`, against shares of pixels."""
        focal = binary_focal_loss_with_logits(logits, truth, alpha=0.25, gamma=2.0, reduction="none")
        # kornia's dice loss takes a batch as a whole, or compares classes that exclude each other.
        found, wanted = logits.sigmoid().flatten(2), truth.flatten(2)
        dice = 1 - (2 * (found * wanted).sum(2) + 1) / (found.sum(2) + wanted.sum(2) + 1)
        return self.focal * focal.flatten(2).mean(2) + self.dice * dice


class PromptMetrics:
    """Collect how well prompts find their masks, in sums that add up over pictures and processes.

    Example:
        >>> metrics = PromptMetrics()
        >>> mask = torch.tensor([[[True, True, False]]])
        >>> metrics.update("box", torch.tensor([[[True, False, False]]]), mask)
        >>> metrics.compute()
        {'instances': 1, 'box_iou': 50.0, 'point_iou': nan}
    """

    kinds = ("box", "point")

    def __init__(self) -> None:
        self._sums = torch.zeros(len(self.kinds), 2, dtype=torch.float64)  # of IoUs, and how many

    def update(self, kind: str, found: Tensor, wanted: Tensor) -> None:
        """Add masks.

        Args:
            kind: ``"box"`` or ``"point"``.
            found: predicted masks, bool :math:`(N, H, W)`.
            wanted: the true ones, of the same shape.

        Raises:
            ValueError: if the shapes differ.
        """
        if found.shape != wanted.shape:
            raise ValueError(f"Expected masks of the shape {tuple(wanted.shape)}; got {tuple(found.shape)}.")
        ious = _ious(found, wanted.to(found.device)).double()
        self._sums[self.kinds.index(kind)] += torch.tensor([float(ious.sum()), len(ious)], dtype=torch.float64)

    def state(self) -> Tensor:
        """Return all sums as one float64 vector :math:`(n,)`; that of all pictures is the sum over the processes."""
        return self._sums.flatten().clone()

    def load_state(self, state: Tensor) -> None:
        """Take over sums of :meth:`state`."""
        self._sums = state.detach().to("cpu", torch.float64, copy=True).view_as(self._sums)

    def compute(self) -> dict[str, float]:
        """Return the instances and, in per cent, the mean IoU of each kind of prompt over them, NaN without any."""
        instances = int(self._sums[:, 1].max())
        means = 100 * self._sums[:, 0] / self._sums[:, 1]
        named = zip(self.kinds, means.tolist(), strict=True)
        return {"instances": instances, **{f"{kind}_iou": mean for kind, mean in named}}


def evaluate_prompts(sam: MobileSAM, images: InstanceDataset, workers: int = 0) -> dict[str, float]:
    """Measure how well a network finds instances, at the size of their photos.

    Args:
        sam: the network; its input must be square.
        images: the photos and their instances.
        workers: processes that read photos.

    Returns:
        How many ``instances`` there were, and the mean IoU in per cent of one tight box each, ``box_iou``, and of one
        point each at :func:`central_points`, ``point_iou``, for which the mask with the highest score counts.
    """
    network = PromptedSAM(sam)
    judge = PromptJudge(images, network.config, False, next(sam.parameters()).device)
    measure_network(network, judge, workers)
    return judge.counts.compute()


class Promptable:
    """Masks of prompts: mean IoU in per cent of a box each, and of a point each, on :class:`InstanceDataset`."""

    measure = "box_iou"

    def check(self, images: InstanceDataset, config: PromptableConfig, class_names: Sequence[str] | None) -> None:
        """Let all pictures pass: instances have no classes."""

    def judge(
        self,
        images: InstanceDataset,
        config: PromptableConfig,
        samples: PromptedSamples,
        batch_size: int,
        device: torch.device,
    ) -> PromptJudge:
        """Begin to compare masks, one photo at a time since each has its own size."""
        return PromptJudge(images, config, samples.on_broken == "skip", device)

    def save(
        self,
        config: PromptableConfig,
        state: dict[str, Tensor],
        paths: Sequence[Path],
        class_names: Sequence[str] | None,
    ) -> None:
        """Write files for :meth:`MobileSAM.from_config`, as ``checkpoint``."""
        sam = MobileSAM.from_config(config.encoder, img_size=config.img_size)
        sam.load_state_dict({name.removeprefix("sam."): tensor for name, tensor in state.items()})
        for path in paths:
            save_checkpoint(sam, path)


#: The task of MobileSAM, for :func:`~kornia_tinyvit.training.train`.
PROMPTABLE = Promptable()


class PromptJudge:
    """A single measurement of what prompts find on validation photos; see :class:`~.tasks.Judge`."""

    collate = staticmethod(as_it_is)
    batch_size = 1

    def __init__(
        self, images: InstanceDataset, config: PromptableConfig, skip_broken: bool, device: torch.device
    ) -> None:
        self.pictures = ReadableItems(images, images.read, skip_broken)
        self.size, self.device = (config.img_size, config.img_size), device
        self.counts = PromptMetrics()

    def add(self, network: nn.Module, batch: list[tuple[tuple[Tensor, Tensor] | None, str]]) -> list[str]:
        """Ask for the instances of a photo by a box and by a point each."""
        sample = batch[0][0] if batch else None
        # Without a photo of its own a process still takes part in what the network's processes do together.
        blank = torch.zeros(3, *self.size, dtype=torch.uint8), torch.ones(1, *self.size, dtype=torch.bool)
        pixels, masks = blank if sample is None or not len(sample[1]) else sample
        inputs, geometry = prepare_photo(pixels, self.size, self.device, torch.float32)
        logits, scores = network(_boxes_and_points(inputs, geometry, masks))
        if sample is not None and len(sample[1]):
            count = len(masks)
            several = 1 + scores[count:, _SEVERAL].argmax(1)
            rows = torch.arange(count, device=logits.device)
            self._compare("box", logits[:count, _SINGLE], geometry, masks)
            self._compare("point", logits[count:][rows, several][:, None], geometry, masks)
        return [name for found, name in batch if found is None]

    def measures(self) -> dict[str, float]:
        """Return the mean IoUs in per cent."""
        found = self.counts.compute()
        return {f"{kind}_iou": round(found[f"{kind}_iou"], 4) for kind in PromptMetrics.kinds}

    def _compare(self, kind: str, logits: Tensor, geometry: Geometry, masks: Tensor) -> None:
        # One at a time: the logits of all instances of a large photo would not fit into memory.
        for each, mask in zip(logits, masks, strict=True):
            self.counts.update(kind, geometry.restore(each[None])[0] > 0, mask[None])


def _boxes_and_points(inputs: Tensor, geometry: Geometry, masks: Tensor) -> Prompts:
    """Return a tight box for each mask of a photo, and after all of these a central point for each."""
    boxes = geometry.map_points(mask_boxes(masks).unflatten(1, (2, 2))).flatten(1)
    points = geometry.map_points(central_points(masks))[:, None]
    count = torch.tensor([0, 1]).repeat_interleave(len(masks))
    asked = Prompts(inputs[None], torch.zeros_like(count), boxes.repeat(2, 1), points.repeat(2, 1, 1), count)
    return Prompts(*(each.to(inputs.device) for each in asked))


def _ious(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the IoU of masks :math:`(*, H, W)`, bool; 0 for two empty ones."""
    both = (found & wanted).flatten(-2).sum(-1)
    either = (found | wanted).flatten(-2).sum(-1)
    return both / either.clamp(min=1)
