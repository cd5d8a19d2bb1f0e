"""Fine-tuning MobileSAM on instance masks: network, loss, evaluator and task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from kornia.losses import binary_focal_loss_with_logits
from PIL import Image
from torch import Tensor, nn

from kornia_tinyvit.backbone import parameter_groups
from kornia_tinyvit.checkpoints import open_pretrained, save_checkpoint
from kornia_tinyvit.config import TinyViTConfig, WindowSizes
from kornia_tinyvit.data.datasets import count_noun
from kornia_tinyvit.data.instances import InstanceDataset
from kornia_tinyvit.data.paired import PairedBatch
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.ops import central_points, mask_boxes, mask_ious
from kornia_tinyvit.sam.decoder import CHUNK, CPU_CHUNK, FoldedMaskDecoder
from kornia_tinyvit.sam.embedding import Geometry
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.sam.transforms import preprocess_image
from kornia_tinyvit.training.metrics.promptable import PromptMetrics
from kornia_tinyvit.training.tasks.base import Evaluator, Task
from kornia_tinyvit.training.tasks.prompts import Prompts
from kornia_tinyvit.visualization import draw_overlay

__all__ = [
    "PROMPTABLE",
    "MaskLoss",
    "PromptEvaluator",
    "PromptableConfig",
    "PromptableTask",
    "PromptedSAM",
    "build_sam",
]

_ALPHA = 0.25  # weight of an object's pixels in the focal loss; that of others is 1 - alpha
_DRAWN = 50  # most objects in an image of a figure
_SINGLE, _MULTI = slice(0, 1), slice(1, None)  # the single mask, and those of multimask_output


@dataclass(frozen=True)
class PromptableConfig:
    """Configuration of a :class:`PromptedSAM`.

    Args:
        encoder: configuration of the image encoder.
        img_size: side in pixels of the square input.
    """

    encoder: TinyViTConfig
    img_size: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return self.encoder.to_dict() | {"img_size": self.img_size}


class PromptedSAM(nn.Module):
    """MobileSAM in training: maps prompts on a batch of photos to all their masks.

    The encoder runs once per photo and the decoder once per kind of prompt.

    Args:
        sam: the network, which is trained in place.

    Attributes:
        sam: the network.
        config: its configuration.

    Raises:
        ValueError: if the input is not square.
    """

    def __init__(self, sam: MobileSAM) -> None:
        super().__init__()
        if sam.img_size[0] != sam.img_size[1]:
            raise ValueError(f"Training needs a square input; got {sam.img_size}. Build the network with one img_size.")
        self.sam = sam
        self.config = PromptableConfig(sam.config, sam.img_size[0])

    def forward(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return all masks of the prompts.

        Args:
            prompts: prompts of the images, see :class:`Prompts`.

        Returns:
            Logits :math:`(P, M, S/4, S/4)`, the single mask first, then those of ``multimask_output``, and predicted
            IoUs :math:`(P, M)`.
        """
        prompt_encoder, decoder = self.sam.prompt_encoder, FoldedMaskDecoder(self.sam.mask_decoder)
        features, position = self.sam.image_encoder(prompts.images), prompt_encoder.get_dense_pe()
        _, dense = prompt_encoder(points=None, boxes=None, masks=None)
        size = CPU_CHUNK if features.device.type == "cpu" else CHUNK
        decoded = []
        for photo, embedding in enumerate(features.split(1)):
            own, image = prompts.photo == photo, decoder.prepare(embedding, position, dense)
            for count in prompts.counts[own].unique().tolist():
                for rows in (own & (prompts.counts == count)).nonzero()[:, 0].split(size):
                    prompted = decoder.prompt(image, self._embed(prompts, rows, count))
                    decoded.append((rows, decoder.upscale(prompted), prompted.iou))
        rows, logits, ious = (torch.cat(parts) for parts in zip(*decoded, strict=True))
        order = rows.argsort()
        return logits[order], ious[order]

    def _embed(self, prompts: Prompts, rows: Tensor, count: int) -> Tensor:
        """Embed boxes (``count`` 0) or prompts of ``count`` points."""
        coordinates = prompts.points[rows, :count]
        points = (coordinates, torch.ones_like(coordinates[..., 0], dtype=torch.int64)) if count else None
        boxes = None if count else prompts.boxes[rows]
        return cast("Tensor", self.sam.prompt_encoder(points=points, boxes=boxes, masks=None)[0])

    def parameter_groups(self, lr: float, weight_decay: float = 0.01, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Group the trainable parameters: :meth:`TinyViT.parameter_groups`, and the other parts' at ``lr``.

        Args:
            lr: learning rate of the mask decoder and of the encoder's last block.
            weight_decay: weight decay of the matrices; one-dimensional parameters are not decayed.
            layer_decay: factor in (0, 1] from one block of the encoder to the one before.

        Returns:
            Dictionaries with ``params``, ``lr`` and ``weight_decay``.

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
    """Build a MobileSAM for training.

    Args:
        variant: variant or configuration of the encoder; optional where the weights' file contains it.
        pretrained: ``"mobile_sam"``, or a path or URL of a MobileSAM; or weights of a TinyViT as for
            :meth:`TinyViT.from_config`, which initialize the encoder without its neck; ``False`` for random weights.
        img_size: side in pixels of the input, a multiple of 16; by default that of the MobileSAM, or 1024.
        window_sizes: window sizes of an encoder without MobileSAM's weights, see :meth:`TinyViT.from_config`.
        **changes: fields of the encoder's configuration that do not affect weights, such as ``use_checkpoint``.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: if the network cannot be built.
        CheckpointError: if the weights cannot be read or belong to another architecture.
    """
    found = open_pretrained(pretrained, variant) if pretrained else None
    if found is not None and found.layout == "mobile_sam":
        whole = MobileSAM.from_config(variant, pretrained=pretrained, img_size=img_size)
        encoder = TinyViT.from_config(whole.config.replace(**changes))
        encoder.load_state_dict(whole.image_encoder.state_dict())
        whole.image_encoder = encoder  # type: ignore[assignment]
        return whole.train()
    if found is not None:
        changes["mobile_sam"] = found.config.mobile_sam  # an encoder's file keeps its neck
    size = img_size or 1024
    bare = TinyViT.from_config(
        variant, pretrained=found or False, num_classes=0, img_size=size, window_sizes=window_sizes, **changes
    )
    encoder = TinyViT.from_config(bare.config.replace(mobile_sam=True))
    encoder.load_state_dict(encoder.state_dict() | bare.state_dict())
    return MobileSAM(encoder).train()


class MaskLoss:
    """SAM's loss (arXiv:2304.02643, appendix A): focal and dice loss of masks, squared error of predicted IoUs.

    Of the masks of ``multimask_output`` only the one with the lowest loss is trained; the single mask is trained by
    boxes and several points, not by single points. The IoU is trained for all masks. Logits are compared with the
    ground truth at the size of the input.

    Args:
        focal: weight of the focal loss, with alpha 0.25 and gamma 2.
        dice: weight of the dice loss.
        iou: weight of the squared error.
    """

    def __init__(self, focal: float = 20.0, dice: float = 1.0, iou: float = 1.0) -> None:
        self.focal, self.dice, self.iou = focal, dice, iou

    def describe(self) -> dict[str, Any]:
        """Return its kind and the weights of its terms."""
        return {"kind": "masks", "focal": self.focal, "dice": self.dice, "iou": self.iou}

    def __call__(self, outputs: tuple[Tensor, Tensor], images: Prompts, batch: PairedBatch) -> Tensor:
        """Return the losses :math:`(B,)`, the weighted sum over the prompts of each image.

        A mean would weigh the only object of an image as much as all objects of another image.
        """
        logits, scores = (each.float() for each in outputs)
        truth = batch.targets.masks.to(logits.device, non_blocking=True).to(logits.dtype)
        weighted = self._losses(logits, scores, truth, images.counts == 1) * batch.targets.weights.to(logits)
        return weighted.new_zeros(len(batch.valid)).index_add(0, images.photo, weighted)

    def _losses(self, logits: Tensor, scores: Tensor, truth: Tensor, ambiguous: Tensor) -> Tensor:
        """Return the loss of each prompt, :math:`(P,)`."""
        with torch.no_grad():
            small = F.interpolate(truth[:, None], logits.shape[2:], mode="area")
            best = self._soft_losses(logits[:, _MULTI], small.expand_as(logits[:, _MULTI])).argmin(1)
            ious = mask_ious(logits > 0, small >= 0.5)
        clear = (~ambiguous).nonzero()[:, 0]
        prompts = torch.cat([torch.arange(len(logits), device=logits.device), clear])
        trained = logits[prompts, torch.cat([1 + best, torch.zeros_like(clear)])]
        losses = _LargeMaskLosses.apply(trained, truth, prompts, self.focal, self.dice)
        losses = torch.where(ambiguous[prompts], 1.0, 0.5).to(losses) * losses
        return (self.iou * (scores - ious).square().mean(1)).index_add(0, prompts, losses)

    def _soft_losses(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of each mask, :math:`(P, M)`, with soft masks as ground truth."""
        focal = binary_focal_loss_with_logits(logits, truth, alpha=_ALPHA, gamma=2.0, reduction="none")
        # kornia.losses.dice_loss reduces over the batch and expects exclusive classes.
        p, truth = logits.sigmoid().flatten(2), truth.flatten(2)
        dice = 1 - (2 * (p * truth).sum(2) + 1) / (p.sum(2) + truth.sum(2) + 1)
        return self.focal * focal.flatten(2).mean(2) + self.dice * dice


class _LargeMaskLosses(torch.autograd.Function):
    """Focal and dice loss :math:`(T,)` of logits :math:`(T, h, w)`, resized to their masks.

    The gradient is computed along with the loss, for a few masks at a time: only tensors of the size of the logits are
    stored, and a CPU's caches hold the others.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, truth: Tensor, rows: Tensor, focal: float, dice: float) -> Tensor:
        """Compare the logits with the rows of 0/1 masks :math:`(P, H, W)`."""
        losses, slopes = [], []
        size = 1 if logits.device.type == "cpu" else CHUNK
        for small, own in zip(logits.split(size), rows.split(size), strict=True):
            with torch.enable_grad():
                leaf = small[:, None].detach().requires_grad_()
                large = F.interpolate(leaf, truth.shape[1:], mode="bilinear", align_corners=False)
            loss, slope = _focal_and_dice(large.detach().flatten(1), truth[own].flatten(1), focal, dice)
            losses.append(loss)
            slopes += torch.autograd.grad(large, leaf, slope.view_as(large))
        ctx.save_for_backward(torch.cat(slopes)[:, 0])
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Return the gradient of the logits."""
        (slopes,) = ctx.saved_tensors
        return slopes * gradient[:, None, None], None, None, None, None


def _focal_and_dice(logits: Tensor, truth: Tensor, focal: float, dice: float) -> tuple[Tensor, Tensor]:
    """Return losses :math:`(T,)` of logits :math:`(T, S)` with 0/1 masks, and the gradient of each with its logits."""
    sign = 1 - 2 * truth
    flipped = sign * logits  # logits of the wrong answer
    wrong, surprise = flipped.sigmoid(), F.softplus(flipped)
    right = 1 - wrong
    weight = (1 - _ALPHA + (2 * _ALPHA - 1) * truth).mul_(wrong).mul_(wrong)
    losses = focal * (weight * surprise).mean(1)
    slope = surprise.mul_(right).mul_(2).add_(wrong).mul_(weight).mul_(sign).mul_(focal / logits.shape[1])
    area, missed = truth.sum(1), (wrong * truth).sum(1)
    overlap = 2 * (area - missed) + 1
    total = 2 * area - 2 * missed + wrong.sum(1) + 1
    per_total, shared = (dice * each[:, None] for each in (2 / total, overlap / total**2))
    return losses + dice * (1 - overlap / total), slope.addcmul_(wrong * right, shared - per_total * truth)


class PromptEvaluator(Evaluator):
    """Evaluate the masks of box and point prompts on images with instances, one image at a time at its own size.

    Args:
        images: the data set.
        config: configuration of the network.
        **options: see :class:`~kornia_tinyvit.training.tasks.base.Evaluator`.
    """

    def __init__(self, images: InstanceDataset, config: PromptableConfig, **options: Any) -> None:
        super().__init__(images, PromptMetrics(), **options | {"batch_size": 1})
        self.items.read = images.read  # uint8, as MobileSAM resizes them
        self.size = (config.img_size, config.img_size)

    def update(self, network: nn.Module, samples: list[tuple[int, tuple[Tensor, Tensor]]]) -> None:
        """Update the metrics with a box and a point prompt per instance.

        A sample is a uint8 image :math:`(3, H, W)` and its masks :math:`(N, H, W)`, bool.
        """
        found = [sample for _, sample in samples if len(sample[1])]
        blank = torch.zeros(3, *self.size, dtype=torch.uint8), torch.ones(1, *self.size, dtype=torch.bool)
        pixels, masks = found[0] if found else blank
        inputs, geometry = preprocess_image(pixels, self.size, self.device, torch.float32)
        logits, ious = network(_boxes_and_points(inputs, geometry, masks))
        boxed, pointed = logits[: len(masks), _SINGLE], logits[len(masks) :, _MULTI]
        best = ious[len(masks) :, _MULTI].argmax(1)
        pointed = pointed.take_along_dim(best.view(-1, 1, 1, 1), 1)
        # One instance at a time: the logits of all instances of a large photo need too much memory.
        for box, point, mask in zip(boxed, pointed, masks, strict=True) if found else ():
            self.counts.update("box", geometry.restore(box[None])[0] > 0, mask[None])
            self.counts.update("point", geometry.restore(point[None])[0] > 0, mask[None])


def _boxes_and_points(inputs: Tensor, geometry: Geometry, masks: Tensor) -> Prompts:
    """Return the tight boxes of the masks, followed by their central points, as prompts on one photo."""
    boxes = geometry.map_points(mask_boxes(masks).unflatten(1, (2, 2))).flatten(1)
    points = geometry.map_points(central_points(masks))[:, None]
    count = torch.tensor([0, 1]).repeat_interleave(len(masks))
    prompts = Prompts(inputs[None], torch.zeros_like(count), boxes.repeat(2, 1), points.repeat(2, 1, 1), count)
    return Prompts(*(each.to(inputs.device) for each in prompts))


class PromptableTask(Task):
    """Promptable segmentation: mean IoU of boxes and of points on a :class:`~kornia_tinyvit.data.InstanceDataset`."""

    metrics = ("box_iou", "point_iou")
    evaluator_class = PromptEvaluator
    prefix = "sam."

    def match(
        self, images: InstanceDataset, config: PromptableConfig, class_names: Sequence[str] | None
    ) -> InstanceDataset:
        """Return the images: instances have no classes."""
        return images

    def build(self, config: PromptableConfig, class_names: Sequence[str] | None) -> MobileSAM:
        """Build the network to save, with random weights."""
        return MobileSAM.from_config(config.encoder, img_size=config.img_size)

    def draw(self, network: MobileSAM, image: Image.Image, target: Tensor) -> list[tuple[Image.Image, str]]:
        """Return the image and its masks: of the ground truth, from their boxes, and from a point in each.

        Of many masks :math:`(N, H, W)` those of the largest objects are drawn.
        """
        masks = target[target.flatten(1).sum(1).argsort(descending=True, stable=True)[:_DRAWN]]
        if not len(masks):
            return []
        embedding, boxes, points = network.embed(image), mask_boxes(masks), central_points(masks)
        (boxed,) = network.predict_masks(embedding, boxes=boxes, multimask_output=False)
        (pointed,) = network.predict_masks(embedding, points=points[:, None])
        drawn = [(image, "image"), (draw_overlay(image, masks), f"truth, {count_noun(len(masks), 'object')}")]
        for name, found, prompts in (("boxes", boxed, {}), ("points", pointed.best(), {"points": points})):
            predicted = found.masks()[:, 0].cpu()
            iou = 100 * float(mask_ious(predicted, masks).mean())
            drawn.append((draw_overlay(image, predicted, **prompts), f"from {name}, mean IoU {iou:.1f} %"))
        return drawn

    def save(self, network: MobileSAM, path: Path) -> None:
        """Write a file for :meth:`MobileSAM.from_config`."""
        save_checkpoint(network, path)


#: The task of :class:`PromptedSAM`, for :func:`~kornia_tinyvit.training.train`.
PROMPTABLE = PromptableTask()
