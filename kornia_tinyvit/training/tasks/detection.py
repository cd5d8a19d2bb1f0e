"""Training detectors: images and boxes changed together, transformers' loss, and what a detector is measured by."""

from __future__ import annotations

from typing import Any

import torch
from kornia.enhance import normalize
from kornia.models.rt_detr import DETRPostProcessor
from torch import Tensor, nn

from kornia_tinyvit.backbone import parameter_groups
from kornia_tinyvit.data.detection import DetectionDataset, Objects
from kornia_tinyvit.data.paired import PairedAugmentation, PairedBatch, PairedSamples
from kornia_tinyvit.detection import DetectorConfig, Squares, TinyViTDetector
from kornia_tinyvit.training.metrics.average_precision import DetectionMetrics
from kornia_tinyvit.training.tasks.base import Evaluator, Task

__all__ = [
    "DETECTION",
    "BoxAugmentation",
    "DetectionEvaluator",
    "DetectionLoss",
    "DetectionSamples",
    "DetectionTask",
    "DetectorTraining",
]

_VISIBLE = 0.3  # share of an object's box that a crop must hold for the object to count
_SMALLEST = 1.0  # side in pixels below which a box says nothing


class BoxAugmentation(PairedAugmentation):
    """Crop, flip and recolor an image by kornia; its boxes follow and are cut at the border.

    Objects of which a crop holds less than 30 % of the box are left out, and so are crowds. See
    :class:`~kornia_tinyvit.data.paired.PairedAugmentation` for the arguments; the usual preset is ``"detection"``.
    """

    kind = "boxes"
    usual_preset = "detection"
    data_key = "bbox_xyxy"

    def __call__(self, image: Tensor, objects: Objects, epoch: int, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Change a sample.

        Args:
            image: 8-bit image :math:`(3, H, W)` on the CPU.
            objects: what it shows.
            epoch: number of the epoch.
            index: number of the sample.

        Returns:
            uint8 image :math:`(3, S, S)`, and its target: ``boxes`` :math:`(N, 4)`, center, width and height as
            fractions of the side, and ``class_labels`` :math:`(N,)`.
        """
        kept = ~objects.crowds
        pixels, boxes, labels = self._reduce(image), objects.boxes[kept], objects.labels[kept]
        down, across = (new / old for new, old in zip(pixels.shape[-2:], image.shape[-2:], strict=True))
        boxes = boxes * boxes.new_tensor([across, down, across, down])
        # To kornia a coordinate is the middle of a pixel, here its left or upper edge.
        crop, moved = self._apply(pixels, boxes[None] - 0.5, epoch, index)
        boxes, visible = _cut(moved[0] + 0.5, self.img_size)
        return crop, {"boxes": boxes[visible] / self.img_size, "class_labels": labels[visible]}


def _cut(boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Cut boxes at the border of a square.

    Args:
        boxes: left, top, right and bottom :math:`(N, 4)`.
        side: side of the square.

    Returns:
        Center, width and height :math:`(N, 4)`, and whether enough is left of each, :math:`(N,)`.
    """
    inside = boxes.clamp(0, side)
    low, high = inside[:, :2], inside[:, 2:]
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    visible = ((high - low).prod(1) >= _VISIBLE * whole) & (high - low >= _SMALLEST).all(1)
    return torch.cat([(low + high) / 2, high - low], 1), visible


class DetectionSamples(PairedSamples):
    """Images and boxes decoded and augmented as an epoch demands, a whole batch at a time.

    See :class:`~kornia_tinyvit.data.KeyedSamples` for the arguments: a
    :class:`~kornia_tinyvit.data.DetectionDataset` and a :class:`BoxAugmentation`.
    """

    def inputs(self, batch: PairedBatch, device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the images of a batch that could be read, :math:`(B, 3, S, S)` in [0, 1], and their objects.

        If none could be read, all are returned: the processes of a training must all call their network.
        """
        rows = batch.valid.nonzero()[:, 0].tolist() or range(len(batch.valid))
        objects = [{name: values.to(device) for name, values in batch.targets[row].items()} for row in rows]
        return super().inputs(batch, device)[list(rows)], objects

    def _blank(self) -> dict[str, Tensor]:
        return {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.int64)}


class DetectorTraining(nn.Module):
    """A detector on its way: transformers' RT-DETR, which takes images in [0, 1] and normalizes them itself.

    Args:
        detector: the detector to begin with; its weights are copied.
        **changes: fields of transformers' ``RTDetrConfig``, such as ``num_denoising``.

    Attributes:
        rt_detr: transformers' model; :func:`~kornia_tinyvit.huggingface.rt_detr.from_rt_detr` makes a detector of it.
        config: the detector's configuration.

    Raises:
        MissingExtraError: if transformers is missing.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: TinyViTDetector, **changes: Any) -> None:
        from kornia_tinyvit.huggingface.rt_detr import network_of, to_rt_detr

        super().__init__()
        self.config = detector.config
        self.rt_detr = to_rt_detr(detector, **changes)
        network = network_of(self.rt_detr)
        stage: Any
        for stage in network.layers:  # transformers' configuration of the backbone does not tell it
            stage.blocks.gradient_checkpointing = detector.config.backbone.use_checkpoint
        network.head.requires_grad_(False)
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(detector, name).clone(), persistent=False)

    def forward(self, inputs: Tensor | tuple[Tensor, list[dict[str, Tensor]]]) -> Any:
        """Look for objects.

        Args:
            inputs: squares :math:`(B, 3, S, S)` in [0, 1]; or such squares, and for each its ``boxes``
                :math:`(N_i, 4)`, center, width and height as shares of its sides, and ``class_labels``
                :math:`(N_i,)`.

        Returns:
            Without objects logits :math:`(B, Q, K)` and boxes :math:`(B, Q, 4)`, as :class:`TinyViTDetector` has them;
            with objects what :class:`DetectionLoss` takes: transformers' outputs of all layers.
        """
        images, objects = (inputs, None) if isinstance(inputs, Tensor) else inputs
        pixels = normalize(images, self.mean, self.std)
        found = self.rt_detr.model(pixels, labels=objects)
        logits, boxes = found.intermediate_logits, found.intermediate_reference_points
        if objects is None:
            return logits[:, -1], boxes[:, -1]
        if self.training and found.denoising_meta_values is None and hasattr(self.rt_detr.model, _DENOISING):
            # No object to add noise to; that the weights take part all the same is what several processes rely on.
            logits = logits + 0 * getattr(self.rt_detr.model, _DENOISING).weight.sum()
        return {
            "logits": logits,
            "boxes": boxes,
            "first_logits": found.enc_topk_logits,
            "first_boxes": found.enc_topk_bboxes,
            "denoising": found.denoising_meta_values,
        }

    def parameter_groups(self, lr: float, weight_decay: float = 1e-4, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Group the parameters for a torch optimizer: :meth:`TinyViT.parameter_groups`, and the rest at ``lr``.

        Args:
            lr: learning rate of encoder, decoder and the backbone's last block.
            weight_decay: weight decay of the matrices; one-dimensional parameters are not decayed.
            layer_decay: factor in (0, 1] from one block of the backbone to the one before.

        Raises:
            ValueError: if ``layer_decay`` is outside of (0, 1].
        """
        from kornia_tinyvit.huggingface.rt_detr import network_of

        rest = [part for name, part in self.rt_detr.model.named_children() if name != "backbone"]
        return parameter_groups(network_of(self.rt_detr), rest, lr, weight_decay, layer_decay)


_DENOISING = "denoising_class_embed"


class DetectionLoss:
    """RT-DETR's loss, transformers': varifocal scores, box distance and generalized IoU of matched queries.

    It counts every layer of the decoder, the encoder's own guesses and the denoising queries. It is one number for a
    batch, the sum over its objects divided by how many there are; with several processes or accumulated batches each
    is divided by its own.

    Args:
        training: what is trained.
    """

    def __init__(self, training: DetectorTraining) -> None:
        self.config = training.rt_detr.config

    def describe(self) -> dict[str, Any]:
        """Return its kind, the weights of its parts and the denoising queries."""
        names = ("weight_loss_vfl", "weight_loss_bbox", "weight_loss_giou", "num_denoising")
        return {"kind": "boxes", **{name: getattr(self.config, name) for name in names}}

    def __call__(self, outputs: dict[str, Any], images: Any, batch: PairedBatch) -> Tensor:
        """Return the losses :math:`(B,)`: for each image that of the batch."""
        from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

        logits, boxes = outputs["logits"].float(), outputs["boxes"].float()
        loss, *_ = RTDetrForObjectDetectionLoss(
            logits[:, -1], images[1], logits.device, boxes[:, -1], self.config, logits, boxes,
            enc_topk_logits=outputs["first_logits"].float(), enc_topk_bboxes=outputs["first_boxes"].float(),
            denoising_meta_values=outputs["denoising"],
        )  # fmt: skip
        return loss.expand(len(batch.valid))


class DetectionEvaluator(Evaluator):
    """A single measurement of a detector on images with boxes.

    Args:
        images: the data set.
        config: the detector's configuration.
        **options: as for :class:`~kornia_tinyvit.training.tasks.base.Evaluator`.
    """

    def __init__(self, images: DetectionDataset, config: DetectorConfig, **options: Any) -> None:
        super().__init__(images, DetectionMetrics(images), **options)
        self._squares = Squares(config.backbone.img_size)
        self._every = DETRPostProcessor(0.0, config.num_classes, config.num_queries)

    def measure(self, network: nn.Module, samples: list[tuple[int, tuple[Tensor, Objects]]]) -> None:
        """Add what is found; samples are indices with an image :math:`(3, H, W)` in [0, 1] and its objects."""
        images = [image for _, (image, _) in samples] or [torch.zeros(3, 32, 32)]
        squares, sizes = self._squares([image.to(self.device) for image in images])
        logits, boxes = network(squares)
        found = self._every(logits.float(), boxes.float(), sizes)
        for (index, (image, _)), rows in zip(samples, found, strict=False):
            self.counts.update(index, rows, *image.shape[1:])

    def measures(self) -> dict[str, float]:
        """Return mAP over all overlaps, and at those of 50 and 75 per cent."""
        found = self.counts.compute().to_dict()
        return {name: found[name] or 0.0 for name in ("map", "map50", "map75")}


class DetectionTask(Task):
    """Boxes and classes: COCO's mAP in per cent of :class:`DetectionDataset`."""

    metric = "map"
    evaluator_class = DetectionEvaluator
    network_class = TinyViTDetector

    def load(self, network: TinyViTDetector, state: dict[str, Tensor]) -> None:
        """Load the weights of a :class:`DetectorTraining` into a detector."""
        from kornia_tinyvit.huggingface.rt_detr import load_weights

        load_weights(network, {name.removeprefix("rt_detr."): tensor for name, tensor in state.items()})


#: The task of detectors, for :func:`~kornia_tinyvit.training.train`.
DETECTION = DetectionTask()
