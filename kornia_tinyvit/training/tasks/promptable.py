"""Fine-tuning MobileSAM on one's own masks: the network, the loss, and how well prompts find their masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from kornia.losses import binary_focal_loss_with_logits
from torch import Tensor, nn

from kornia_tinyvit.backbone import parameter_groups
from kornia_tinyvit.checkpoints import open_pretrained, save_checkpoint
from kornia_tinyvit.config import TinyViTConfig, WindowSizes
from kornia_tinyvit.data.instances import InstanceDataset
from kornia_tinyvit.data.paired import PairedBatch
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.ops import central_points, mask_boxes
from kornia_tinyvit.preprocessing import Preprocessing
from kornia_tinyvit.sam.decoder import CHUNK, CPU_CHUNK, FoldedMaskDecoder
from kornia_tinyvit.sam.embedding import Geometry
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.sam.transforms import preprocess_image
from kornia_tinyvit.training.metrics.promptable import PromptMetrics, mask_ious
from kornia_tinyvit.training.tasks.base import Evaluator, Task
from kornia_tinyvit.training.tasks.prompts import Prompts

__all__ = [
    "FREEZABLE",
    "PROMPTABLE",
    "MaskLoss",
    "PromptEvaluator",
    "PromptableConfig",
    "PromptableTask",
    "PromptedSAM",
    "build_sam",
]

#: Parts of MobileSAM whose weights may stay as they are; the mask decoder always learns.
FREEZABLE = ("image_encoder", "prompt_encoder")

_SINGLE, _SEVERAL = slice(0, 1), slice(1, None)  # of a prompt's masks: the one for clear prompts, those for ambiguous


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
        encoder, parts = cast("TinyViT", self.sam.image_encoder), [self.sam.prompt_encoder, self.sam.mask_decoder]
        return parameter_groups(encoder, parts, lr, weight_decay, layer_decay)


def build_sam(
    variant: str | TinyViTConfig | None = None,
    *,
    pretrained: str | Path | Literal[False] = False,
    img_size: int | None = None,
    window_sizes: WindowSizes | None = None,
    **changes: Any,
) -> MobileSAM:
    """Build a MobileSAM to train, from whatever weights there are to begin with.

    Args:
        variant: variant or configuration of the encoder; may be left out where a file tells it.
        pretrained: ``"mobile_sam"``, or a path or URL of a whole MobileSAM; or weights of a TinyViT alone, as
            :meth:`TinyViT.from_config` takes them, for all of the encoder but its neck; ``False`` for random weights.
        img_size: side in pixels of the input, a multiple of 16; that of a whole MobileSAM, or 1024, if left out.
        window_sizes: for a new or a bare encoder; as for :meth:`TinyViT.from_config`.
        **changes: fields of the encoder's configuration to replace that change no weights, such as ``use_checkpoint``.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: if it cannot be built.
        CheckpointError: if the weights cannot be read or belong to another architecture.
    """
    if pretrained and open_pretrained(pretrained, variant).layout == "mobile_sam":
        whole = MobileSAM.from_config(variant, pretrained=pretrained, img_size=img_size)
        encoder = TinyViT.from_config(whole.config.replace(**changes))
        encoder.load_state_dict(whole.image_encoder.state_dict())
        whole.image_encoder = encoder  # type: ignore[assignment]
        return whole.train()
    size = img_size or 1024
    bare = TinyViT.from_config(
        variant, pretrained=pretrained, num_classes=0, img_size=size, window_sizes=window_sizes, **changes
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

    def __call__(self, outputs: tuple[Tensor, Tensor], images: Prompts, batch: PairedBatch) -> Tensor:
        """Return the losses :math:`(B,)`, weighted sums over an image's prompts.

        A mean over them would let the one object of an image, which needs no prompt to be found, count as much as all
        objects of another.
        """
        logits, scores = (each.float() for each in outputs)
        truth = batch.targets.masks.to(logits.device, non_blocking=True)[:, None].float()
        ambiguous = images.counts == 1
        losses = self._losses(logits, scores, truth, ambiguous)
        weighted = losses * batch.targets.weights.to(logits)
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
            wanted = mask_ious(logits > 0, small >= 0.5)
        return losses + self.iou * (scores - wanted).square().mean(1)

    def _mask_losses(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of each mask, :math:`(P, M)`, against shares of pixels."""
        focal = binary_focal_loss_with_logits(logits, truth, alpha=0.25, gamma=2.0, reduction="none")
        # kornia's dice loss takes a batch as a whole, or compares classes that exclude each other.
        found, wanted = logits.sigmoid().flatten(2), truth.flatten(2)
        dice = 1 - (2 * (found * wanted).sum(2) + 1) / (found.sum(2) + wanted.sum(2) + 1)
        return self.focal * focal.flatten(2).mean(2) + self.dice * dice


class PromptEvaluator(Evaluator):
    """A single measurement of what prompts find on images with instances, one at a time since each has its own size.

    Args:
        images: the data set.
        config: what the network is.
        **options: as for :class:`~kornia_tinyvit.training.tasks.base.Evaluator`.
    """

    def __init__(self, images: InstanceDataset, config: PromptableConfig, **options: Any) -> None:
        super().__init__(images, PromptMetrics(), images.read, **options | {"batch_size": 1})
        self.size = (config.img_size, config.img_size)

    def measure(self, network: nn.Module, samples: list[tuple[int, tuple[Tensor, Tensor]]]) -> None:
        """Prompt for each instance by a box and by a point; a sample is an index with a uint8 image and its masks.

        The image is :math:`(3, H, W)`, the masks :math:`(N, H, W)`, bool.
        """
        found = [sample for _, sample in samples if len(sample[1])]
        blank = torch.zeros(3, *self.size, dtype=torch.uint8), torch.ones(1, *self.size, dtype=torch.bool)
        pixels, masks = found[0] if found else blank
        inputs, geometry = preprocess_image(pixels, self.size, self.device, torch.float32)
        logits, scores = network(_boxes_and_points(inputs, geometry, masks))
        if found:
            count = len(masks)
            several = 1 + scores[count:, _SEVERAL].argmax(1)
            rows = torch.arange(count, device=logits.device)
            self._compare("box", logits[:count, _SINGLE], geometry, masks)
            self._compare("point", logits[count:][rows, several][:, None], geometry, masks)

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


class PromptableTask(Task):
    """Masks of prompts: mean IoU in per cent of a box each, and of a point each, on :class:`InstanceDataset`."""

    metric = "box_iou"
    evaluator_class = PromptEvaluator

    def check(self, images: InstanceDataset, config: PromptableConfig, class_names: Sequence[str] | None) -> None:
        """Let all images pass: instances have no classes."""

    def writer(
        self,
        config: PromptableConfig,
        state: dict[str, Tensor],
        class_names: Sequence[str] | None,
        preprocessing: Preprocessing,
    ) -> Callable[[Path], object]:
        """Write files for :meth:`MobileSAM.from_config`, which has its own preprocessing."""
        sam = MobileSAM.from_config(config.encoder, img_size=config.img_size)
        sam.load_state_dict({name.removeprefix("sam."): tensor for name, tensor in state.items()})
        return partial(save_checkpoint, sam)


#: The task of MobileSAM, for :func:`~kornia_tinyvit.training.train`.
PROMPTABLE = PromptableTask()
