"""Training detectors: augmentation of images with boxes, transformers' loss, evaluator and task."""

from __future__ import annotations

from typing import Any

import torch
from kornia.enhance import normalize
from kornia.models.rt_detr import DETRPostProcessor
from PIL import Image
from torch import Tensor, nn

from kornia_tinyvit.backbone import parameter_groups
from kornia_tinyvit.data.datasets import count_noun
from kornia_tinyvit.data.detection import DetectionDataset, Objects
from kornia_tinyvit.data.paired import PairedAugmentation, PairedBatch, PairedSamples
from kornia_tinyvit.detection import Detection, DetectorConfig, Squares, TinyViTDetector, suppress_duplicates
from kornia_tinyvit.training.metrics.average_precision import DetectionMetrics
from kornia_tinyvit.training.tasks.base import Evaluator, Task
from kornia_tinyvit.visualization import draw_detections

__all__ = [
    "DETECTION",
    "BoxAugmentation",
    "DetectionEvaluator",
    "DetectionLoss",
    "DetectionSamples",
    "DetectionTask",
    "DetectorTraining",
]

_MIN_VISIBLE = 0.3  # fraction of a box inside the crop, below which the object is dropped
_MIN_SIDE = 1.0  # in pixels


class BoxAugmentation(PairedAugmentation):
    """Crop and flip an image with its boxes, and jitter the image's color, by kornia.

    Boxes are clipped to the crop. Crowds and objects with less than 30 % of their box inside the crop are dropped. See
    :class:`~kornia_tinyvit.data.paired.PairedAugmentation` for the arguments; the default preset is ``"detection"``.
    """

    kind = "boxes"
    default_preset = "detection"
    data_key = "bbox_xyxy"

    def __call__(self, image: Tensor, objects: Objects, epoch: int, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Augment a sample.

        Args:
            image: uint8 image :math:`(3, H, W)` on the CPU.
            objects: its objects.
            epoch: number of the epoch.
            index: index of the sample.

        Returns:
            uint8 image :math:`(3, S, S)` and its target: ``boxes`` :math:`(N, 4)`, center, width and height as
            fractions of the side, and ``class_labels`` :math:`(N,)`.
        """
        kept = ~objects.crowds
        pixels, boxes, labels = self._reduce(image), objects.boxes[kept], objects.labels[kept]
        down, across = (new / old for new, old in zip(pixels.shape[-2:], image.shape[-2:], strict=True))
        boxes = boxes * boxes.new_tensor([across, down, across, down])
        # kornia's coordinates refer to pixel centers, those of the boxes to pixel edges.
        crop, moved = self._apply(pixels, boxes[None] - 0.5, epoch, index)
        boxes, visible = _clip(moved[0] + 0.5, self.img_size)
        return crop, {"boxes": boxes[visible] / self.img_size, "class_labels": labels[visible]}


def _clip(boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Clip boxes :math:`(N, 4)`, left, top, right and bottom, to a square.

    Returns:
        Center, width and height :math:`(N, 4)`, and whether enough of each box is visible, :math:`(N,)`.
    """
    inside = boxes.clamp(0, side)
    low, high = inside[:, :2], inside[:, 2:]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    visible = ((high - low).prod(1) >= _MIN_VISIBLE * area) & (high - low >= _MIN_SIDE).all(1)
    return torch.cat([(low + high) / 2, high - low], 1), visible


class DetectionSamples(PairedSamples):
    """Images and boxes, decoded and augmented; targets are a tuple of :class:`BoxAugmentation`'s dictionaries.

    See :class:`~kornia_tinyvit.data.KeyedSamples` for the arguments: a
    :class:`~kornia_tinyvit.data.DetectionDataset` and a :class:`BoxAugmentation`.
    """

    def inputs(self, batch: PairedBatch, device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the readable images of a batch, :math:`(B, 3, S, S)` in [0, 1], and their targets.

        If all images are corrupt, all are returned: every rank has to run its forward pass.
        """
        rows = batch.valid.nonzero()[:, 0].tolist() or list(range(len(batch.valid)))
        targets = [{name: values.to(device) for name, values in batch.targets[row].items()} for row in rows]
        return super().inputs(batch, device)[rows], targets

    def _blank(self) -> dict[str, Tensor]:
        return {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.int64)}


class DetectorTraining(nn.Module):
    """A detector in training: transformers' RT-DETR behind the detector's normalization.

    Args:
        detector: the detector; its weights are copied.
        **changes: fields of transformers' ``RTDetrConfig``, such as ``num_denoising``.

    Attributes:
        rt_detr: transformers' model; :func:`~kornia_tinyvit.huggingface.rt_detr.from_rt_detr` converts it to a
            detector.
        config: configuration of the detector.

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
        for stage in network.layers:  # transformers' configuration of the backbone has no such field
            stage.blocks.gradient_checkpointing = detector.config.backbone.use_checkpoint
        network.head.requires_grad_(False)
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(detector, name).clone(), persistent=False)

    def forward(self, inputs: Tensor | tuple[Tensor, list[dict[str, Tensor]]]) -> Any:
        """Detect objects.

        Args:
            inputs: images :math:`(B, 3, S, S)` in [0, 1]; or such images and the target of each: ``boxes``
                :math:`(N_i, 4)`, center, width and height as fractions of the side, and ``class_labels``
                :math:`(N_i,)`.

        Returns:
            Without targets logits :math:`(B, Q, K)` and boxes :math:`(B, Q, 4)`, see :class:`TinyViTDetector`; with
            targets the outputs for :class:`DetectionLoss`: logits and boxes of all decoder layers, those of the
            encoder's proposals, and the layout of the denoising queries.
        """
        images, targets = (inputs, None) if isinstance(inputs, Tensor) else inputs
        outputs = self.rt_detr.model(normalize(images, self.mean, self.std), labels=targets)
        logits, boxes = outputs.intermediate_logits, outputs.intermediate_reference_points
        if targets is None:
            return logits[:, -1], boxes[:, -1]
        denoising = getattr(self.rt_detr.model, "denoising_class_embed", None)
        if self.training and outputs.denoising_meta_values is None and denoising is not None:
            # Without objects there are no denoising queries, but every rank needs gradients of their embedding.
            logits = logits + 0 * denoising.weight.sum()
        return logits, boxes, outputs.enc_topk_logits, outputs.enc_topk_bboxes, outputs.denoising_meta_values

    def parameter_groups(self, lr: float, weight_decay: float = 1e-4, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Group the parameters for a torch optimizer: :meth:`TinyViT.parameter_groups`, and all others at ``lr``.

        Args:
            lr: learning rate of encoder, decoder and the backbone's last block.
            weight_decay: weight decay of the matrices; one-dimensional parameters are not decayed.
            layer_decay: factor in (0, 1] from one block of the backbone to the one before.

        Returns:
            Dictionaries with ``params``, ``lr`` and ``weight_decay``.

        Raises:
            ValueError: if ``layer_decay`` is outside of (0, 1].
        """
        from kornia_tinyvit.huggingface.rt_detr import network_of

        rest = [part for name, part in self.rt_detr.model.named_children() if name != "backbone"]
        return parameter_groups(network_of(self.rt_detr), rest, lr, weight_decay, layer_decay)


class DetectionLoss:
    """RT-DETR's loss from transformers: varifocal loss, L1 distance and generalized IoU of matched queries.

    It covers all layers of the decoder, the encoder's proposals and the denoising queries, and is normalized by the
    number of objects in the batch of a rank.

    Args:
        training: the network in training.
    """

    def __init__(self, training: DetectorTraining) -> None:
        self.config = training.rt_detr.config

    def describe(self) -> dict[str, Any]:
        """Return its kind, the weights of its terms and the number of denoising queries."""
        names = ("weight_loss_vfl", "weight_loss_bbox", "weight_loss_giou", "num_denoising")
        return {"kind": "boxes", **{name: getattr(self.config, name) for name in names}}

    def __call__(self, outputs: tuple[Any, ...], images: Any, batch: PairedBatch) -> Tensor:
        """Return the mean loss of the batch for each of its images, :math:`(B,)`."""
        from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

        logits, boxes, first_logits, first_boxes = (each.float() for each in outputs[:4])
        loss, *_ = RTDetrForObjectDetectionLoss(
            logits[:, -1], images[1], logits.device, boxes[:, -1], self.config, logits, boxes,
            enc_topk_logits=first_logits, enc_topk_bboxes=first_boxes, denoising_meta_values=outputs[4],
        )  # fmt: skip
        return loss.expand(len(batch.valid))


class DetectionEvaluator(Evaluator):
    """Evaluate a detector on images with boxes.

    Args:
        images: the data set.
        config: configuration of the detector.
        nms_threshold: see :meth:`TinyViTDetector.predict`.
        **options: see :class:`~kornia_tinyvit.training.tasks.base.Evaluator`.
    """

    def __init__(
        self, images: DetectionDataset, config: DetectorConfig, nms_threshold: float | None = None, **options: Any
    ) -> None:
        super().__init__(images, DetectionMetrics(images), **options)
        self._nms_threshold = nms_threshold
        self._squares = Squares(config.backbone.img_size)
        self._postprocess = DETRPostProcessor(0.0, config.num_classes, config.num_queries)

    def update(self, network: nn.Module, samples: list[tuple[int, tuple[Tensor, Objects]]]) -> None:
        """Update the metrics; a sample is an image :math:`(3, H, W)` in [0, 1] and its objects."""
        images = [image for _, (image, _) in samples] or [torch.zeros(3, 32, 32)]
        squares, sizes = self._squares([image.to(self.device) for image in images])
        logits, boxes = network(squares)
        detections = self._postprocess(logits.float(), boxes.float(), sizes)
        for (index, (image, _)), rows in zip(samples, detections, strict=False):
            kept = rows if self._nms_threshold is None else suppress_duplicates(rows, self._nms_threshold)
            self.counts.update(index, kept, *image.shape[1:])


class DetectionTask(Task):
    """Object detection: COCO's mAP, AP50 and AP75 on a :class:`~kornia_tinyvit.data.DetectionDataset`.

    The best F1 score and its score threshold, in [0, 1], are logged as well.
    """

    metrics = ("map", "map50", "map75", "best_f1", "threshold")
    evaluator_class = DetectionEvaluator
    network_class = TinyViTDetector
    prefix = "rt_detr."

    def draw(self, network: TinyViTDetector, image: Image.Image, target: Objects) -> list[tuple[Image.Image, str]]:
        """Return the image and the boxes: of the ground truth without crowds, and of scores of at least 0.3."""
        kept = ~target.crowds
        pairs = zip(target.labels[kept].tolist(), target.boxes[kept].tolist(), strict=True)
        objects = [Detection(network.class_names[index], index, 1.0, tuple(box)) for index, box in pairs]
        (found,) = network.predict(image)
        return [
            (image, "image"),
            (draw_detections(image, objects, scores=False), f"truth, {count_noun(len(objects), 'object')}"),
            (draw_detections(image, found), f"prediction, {count_noun(len(found), 'object')}"),
        ]

    def load(self, network: TinyViTDetector, state: dict[str, Tensor]) -> None:
        """Load the weights of transformers' RT-DETR into a detector."""
        from kornia_tinyvit.huggingface.rt_detr import load_weights

        load_weights(network, state)


#: The task of :class:`~kornia_tinyvit.TinyViTDetector`, for :func:`~kornia_tinyvit.training.train`.
DETECTION = DetectionTask()
