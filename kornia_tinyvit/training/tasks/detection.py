"""Training detectors: pictures and boxes changed together, transformers' loss, and what a detector is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from kornia.models.rt_detr import DETRPostProcessor
from torch import Tensor, nn

from kornia_tinyvit.checkpoints.composite import part_groups
from kornia_tinyvit.data.detection import DetectionDataset, Objects
from kornia_tinyvit.data.loader import Key
from kornia_tinyvit.data.paired import PairedAugmentation, PairedSamples
from kornia_tinyvit.detection import DetectorConfig, Squares, TinyViTDetector
from kornia_tinyvit.training.metrics.average_precision import BoxMetrics, DetectionScores
from kornia_tinyvit.training.tasks.classification import (
    ReadableItems,
    as_it_is,
    check_names,
    measure_network,
)

__all__ = [
    "DETECTION",
    "BoxAugmentation",
    "BoxedBatch",
    "BoxedSamples",
    "DetectionLoss",
    "DetectionTask",
    "DetectorTraining",
    "evaluate_detector",
]

_VISIBLE = 0.3  # share of an object's box that a crop must hold for the object to count
_SMALLEST = 1.0  # side in pixels below which a box says nothing


class BoxedBatch(NamedTuple):
    """Pictures and boxes as the workers hand them over, augmented.

    Attributes:
        crops: 8-bit pictures :math:`(B, 3, S, S)`.
        boxes: for each picture centre, width and height as shares of its sides, :math:`(N_i, 4)`.
        labels: for each picture class indices :math:`(N_i,)`.
        valid: 1 for samples whose picture could be read, 0 for broken ones, :math:`(B,)`.
        broken: names of the pictures that could not be read.
    """

    crops: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    valid: Tensor
    broken: tuple[str, ...]


class BoxAugmentation(PairedAugmentation):
    """Crop, flip and recolour a picture by kornia; its boxes follow and are cut at the border.

    Objects of which a crop holds less than 30 % of the box are left out, and so are crowds. See
    :class:`~kornia_tinyvit.data.paired.PairedAugmentation` for the arguments; the usual preset is ``"detection"``.
    """

    kind = "boxes"
    usual_preset = "detection"
    data_key = "bbox_xyxy"

    def __call__(self, picture: Tensor, objects: Objects, epoch: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Change a sample.

        Args:
            picture: 8-bit picture :math:`(3, H, W)` on the CPU.
            objects: what it shows.
            epoch: number of the epoch.
            index: number of the sample.

        Returns:
            8-bit picture :math:`(3, S, S)`, boxes :math:`(N, 4)`, centre, width and height as shares of its side, and
            class indices :math:`(N,)`.
        """
        kept = ~objects.crowds
        pixels, boxes, labels = picture[None], objects.boxes[kept], objects.labels[kept]
        size = self._reduced_size(pixels)
        if size != tuple(pixels.shape[-2:]):
            factors = [new / old for new, old in zip(size, pixels.shape[-2:], strict=True)]
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
            boxes = boxes * boxes.new_tensor([factors[1], factors[0]] * 2)
        # To kornia a coordinate is the middle of a pixel, here its left or upper edge.
        crop, moved = self._apply(pixels, boxes[None] - 0.5, epoch, index)
        boxes, visible = _cut(moved[0] + 0.5, self.img_size)
        return crop, boxes[visible] / self.img_size, labels[visible]


def _cut(boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Cut boxes at the border of a square.

    Args:
        boxes: left, top, right and bottom :math:`(N, 4)`.
        side: side of the square.

    Returns:
        Centre, width and height :math:`(N, 4)`, and whether enough is left of each, :math:`(N,)`.
    """
    inside = boxes.clamp(0, side)
    low, high = inside[:, :2], inside[:, 2:]
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    visible = ((high - low).prod(1) >= _VISIBLE * whole) & (high - low >= _SMALLEST).all(1)
    return torch.cat([(low + high) / 2, high - low], 1), visible


class BoxedSamples(PairedSamples[BoxedBatch]):
    """Pictures and boxes decoded and augmented as an epoch demands, a whole batch at a time.

    See :class:`~kornia_tinyvit.data.KeyedSamples` for the arguments: a
    :class:`~kornia_tinyvit.data.DetectionDataset` and a :class:`BoxAugmentation`.
    """

    def __getitems__(self, keys: Sequence[Key]) -> BoxedBatch:
        """Return the samples of keys (epoch, sample)."""
        crops = self._grey(len(keys))
        boxes, labels = [], []
        valid = torch.ones(len(keys))
        broken = []
        for row, (epoch, index) in enumerate(keys):
            sample = self._read(index)
            own = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
            if sample is None:
                valid[row] = 0
                broken.append(self.images.name(index))
            else:
                crops[row], *own = self.augmentation(*sample, epoch, index)
            boxes.append(own[0])
            labels.append(own[1])
        return BoxedBatch(crops, tuple(boxes), tuple(labels), valid, tuple(broken))

    def inputs(self, batch: BoxedBatch, device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the pictures of a batch that could be read, :math:`(B, 3, S, S)` in [0, 1], and their objects.

        If none could be read, all are returned: the processes of a training must all call their network.
        """
        rows = [row for row, whole in enumerate(batch.valid.tolist()) if whole] or list(range(len(batch.valid)))
        images = super().inputs(batch, device)[rows]
        objects = [{"boxes": batch.boxes[row].to(device), "class_labels": batch.labels[row].to(device)} for row in rows]
        return images, objects


class DetectorTraining(nn.Module):
    """A detector on its way: transformers' RT-DETR, which takes pictures in [0, 1] and normalises them itself.

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
                :math:`(N_i, 4)`, centre, width and height as shares of its sides, and ``class_labels``
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
        groups = network_of(self.rt_detr).parameter_groups(lr, weight_decay, layer_decay)
        return groups + part_groups(rest, lr, weight_decay)


_DENOISING = "denoising_class_embed"


class DetectionLoss:
    """RT-DETR's loss, transformers': varifocal scores, box distance and generalised IoU of matched queries.

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

    def __call__(self, outputs: dict[str, Any], images: Any, batch: BoxedBatch) -> Tensor:
        """Return the losses :math:`(B,)`: for each picture that of the batch."""
        from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

        logits, boxes = outputs["logits"].float(), outputs["boxes"].float()
        loss, *_ = RTDetrForObjectDetectionLoss(
            logits[:, -1], images[1], logits.device, boxes[:, -1], self.config, logits, boxes,
            enc_topk_logits=outputs["first_logits"].float(), enc_topk_bboxes=outputs["first_boxes"].float(),
            denoising_meta_values=outputs["denoising"],
        )  # fmt: skip
        return loss.expand(len(batch.valid))


class DetectionTask:
    """Boxes and classes: COCO's mAP in per cent of :class:`DetectionDataset`."""

    measure = "map"

    def check(self, images: DetectionDataset, config: DetectorConfig, class_names: Sequence[str] | None) -> None:
        """Refuse boxes of other classes than the network's."""
        check_names(images.class_names, class_names)
        if images.num_classes != config.num_classes:
            raise ValueError(
                f"The validation boxes have {images.num_classes} classes, but the network {config.num_classes}."
            )

    def judge(
        self,
        images: DetectionDataset,
        config: DetectorConfig,
        samples: BoxedSamples,
        batch_size: int,
        device: torch.device,
    ) -> BoxJudge:
        """Begin to collect what is found."""
        return BoxJudge(images, config, samples.on_broken == "skip", batch_size, device)

    def save(
        self, config: DetectorConfig, state: dict[str, Tensor], paths: Sequence[Path], class_names: Sequence[str] | None
    ) -> None:
        """Write files for :meth:`TinyViTDetector.from_config`."""
        from kornia_tinyvit.huggingface.rt_detr import load_weights

        plain = TinyViTDetector.from_config(config, class_names=class_names)
        load_weights(plain, {name.removeprefix("rt_detr."): tensor for name, tensor in state.items()})
        for path in paths:
            plain.save(path)


#: The task of detectors, for :func:`~kornia_tinyvit.training.train`.
DETECTION = DetectionTask()


class BoxJudge:
    """A single measurement of a detector on validation pictures; see :class:`~.tasks.Judge`."""

    collate = staticmethod(as_it_is)

    def __init__(
        self, images: DetectionDataset, config: DetectorConfig, skip_broken: bool, batch_size: int, device: torch.device
    ) -> None:
        self.pictures = ReadableItems(images, partial(_numbered, images), skip_broken)
        self.config, self.batch_size, self.device = config, batch_size, device
        self.counts = BoxMetrics(images)
        self._squares = Squares(config.backbone.img_size)
        self._every = DETRPostProcessor(0.0, config.num_classes, config.num_queries)

    def add(self, network: nn.Module, batch: list[tuple[tuple[int, Tensor] | None, str]]) -> list[str]:
        """Add what is found on pictures."""
        read = [sample for sample, _ in batch if sample is not None]
        # Without pictures of its own a process still takes part in what the network's processes do together.
        blank = torch.zeros(self.config.backbone.in_chans, 32, 32)
        squares, sizes = self._squares([picture.to(self.device) for _, picture in read] or [blank.to(self.device)])
        logits, boxes = network(squares)
        found = self._every(logits.float(), boxes.float(), sizes)
        for (index, picture), rows in zip(read, found, strict=False):
            self.counts.update(index, rows, *picture.shape[1:])
        return [name for sample, name in batch if sample is None]

    def measures(self) -> dict[str, float]:
        """Return mAP over all overlaps, and at those of 50 and 75 per cent."""
        found = self.counts.compute().to_dict()
        return {name: found[name] or 0.0 for name in ("map", "map50", "map75")}


def _numbered(images: DetectionDataset, index: int) -> tuple[int, Tensor]:
    return index, images[index][0]


def evaluate_detector(
    detector: TinyViTDetector, images: DetectionDataset, batch_size: int = 8, workers: int = 0, progress: bool = False
) -> DetectionScores:
    """Measure a detector on whole pictures, in their own pixels.

    Args:
        detector: the detector, seen as :meth:`TinyViTDetector.predict` sees pictures.
        images: pictures and boxes.
        batch_size: how many pictures the network takes at a time.
        workers: processes that read pictures.
        progress: show a bar.

    Raises:
        ValueError: if the boxes have other classes than the detector.
        BrokenImageError: if a picture cannot be read.
        MissingExtraError: if pycocotools is missing.
    """
    check_names(images.class_names, detector.class_names)
    judge = BoxJudge(images, detector.config, False, batch_size, next(detector.parameters()).device)
    measure_network(detector, judge, workers, progress)
    return judge.counts.compute()
