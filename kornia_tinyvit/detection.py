"""Object detection: :class:`TinyViTDetector`, kornia's RT-DETR with a TinyViT backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from kornia.contrib.object_detection import ObjectDetector
from kornia.models.rt_detr import DETRPostProcessor
from kornia.models.rt_detr.architecture.hybrid_encoder import HybridEncoder
from kornia.models.rt_detr.architecture.rtdetr_head import MultiScaleDeformableAttention, RTDETRHead
from torch import Tensor, nn

from kornia_tinyvit.backbone import BackboneConfig, BackboneNetwork
from kornia_tinyvit.classification import Prediction
from kornia_tinyvit.images import Images, check_images, map_images, read_batches
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import evaluation_copy
from kornia_tinyvit.ops import nms
from kornia_tinyvit.preprocessing import check_counts, resize_images

__all__ = ["Detection", "DetectorConfig", "Squares", "TinyViTDetector", "suppress_duplicates"]

_MLP_RATIO = 4  # of kornia's decoder layers
_STRIDES = (8, 16, 32)  # of the feature maps
_HEADS = 8  # of kornia's encoder and decoder


@dataclass(frozen=True)
class Detection(Prediction):
    """A detected object.

    Args:
        label: name of the class.
        index: index of the class.
        score: confidence in [0, 1].
        box: left, top, right and bottom in pixels of the image.
    """

    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class DetectorConfig(BackboneConfig):
    """Configuration of a :class:`TinyViTDetector`; the defaults are those of RT-DETR-R18 (arXiv:2304.08069).

    Args:
        backbone: configuration of the backbone; images are resized to squares of its ``img_size``, a multiple of 32.
        num_classes: number of classes.
        hidden_dim: channels of encoder and decoder, a multiple of 8.
        num_queries: number of queries, the most objects that can be detected in an image.
        decoder_layers: layers of the decoder.
        expansion: ratio of the channels of the encoder's convolutions to ``hidden_dim``, in (0, 1].

    Raises:
        ValueError: if a number is out of range, or there are more queries than cells in the feature maps.
    """

    limits: ClassVar[dict[str, int]] = BackboneConfig.limits | {
        "hidden_dim": 2**16,
        "num_queries": 2**20,
        "decoder_layers": 2**7,
    }

    hidden_dim: int = 256
    num_queries: int = 300
    decoder_layers: int = 3
    expansion: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim % _HEADS:
            raise ValueError(f"hidden_dim must be a multiple of {_HEADS}, the number of heads; got {self.hidden_dim}.")
        if not 0 < self.expansion <= 1 or int(self.hidden_dim * self.expansion) < 1:
            raise ValueError(f"expansion must be in (0, 1] and leave a channel; got {self.expansion!r}.")
        if self.backbone.mobile_sam:
            raise ValueError("A backbone with mobile_sam=True has no feature map at stride 32; use mobile_sam=False.")
        side = self.backbone.img_size
        if side % _STRIDES[-1]:
            raise ValueError(f"The img_size of a detector must be a multiple of {_STRIDES[-1]}; got {side}.")
        cells = sum((side // stride) ** 2 for stride in _STRIDES)
        if self.num_queries > cells:
            raise ValueError(
                f"num_queries={self.num_queries} exceeds the {cells} cells of the feature maps at {side} pixels; lower "
                "num_queries or raise img_size."
            )

    def build_parts(self) -> dict[str, nn.Module]:
        """Return kornia's hybrid encoder and RT-DETR head, with random weights."""
        channels, hidden = list(self.backbone.embed_dims[1:]), self.hidden_dim
        return {
            "encoder": HybridEncoder(channels, hidden, _MLP_RATIO * hidden, self.expansion),
            "decoder": RTDETRHead(self.num_classes, hidden, self.num_queries, [hidden] * 3, self.decoder_layers),
        }


class Squares(nn.Module):
    """Resize images to squares, antialiased, in the form of preprocessing that kornia's ``ObjectDetector`` calls.

    Args:
        size: side of the squares in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Resize images to squares.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1], or a list of images :math:`(C, H, W)` of any sizes.

        Returns:
            Squares :math:`(B, C, S, S)`, and heights and widths :math:`(B, 2)`.

        Raises:
            ValueError: if the list is empty.
        """
        squares = map_images(lambda x: resize_images(x, self.size, self.size), images)
        if isinstance(images, Tensor):
            return squares, torch.tensor(images.shape[-2:], device=images.device).expand(images.shape[0], 2)
        return squares, torch.tensor([image.shape[-2:] for image in images], device=squares.device)


class TinyViTDetector(BackboneNetwork):
    """kornia's RT-DETR (arXiv:2304.08069) on a :class:`~kornia_tinyvit.TinyViT`'s feature maps at strides 8, 16 and 32.

    It resizes images in [0, 1] to squares and normalizes them itself, and is differentiable with respect to the pixels.
    The norm of the backbone is not used and is frozen. kornia's RT-DETR has no training loss; training runs in
    transformers' RT-DETR, which has the same weights (see :mod:`kornia_tinyvit.huggingface.rt_detr`).

    Args:
        backbone: the backbone.
        num_classes: number of classes.
        class_names: names of the classes in the order of the logits; ``"class 0"`` and so on by default.
        **options: further fields of :class:`DetectorConfig`.

    Attributes:
        encoder: kornia's hybrid encoder.
        decoder: kornia's RT-DETR head.

    Raises:
        ValueError: if a number is out of range, or the number of names is not ``num_classes``.

    Example:
        >>> detector = TinyViTDetector.from_config("1m", num_classes=5, img_size=128, num_queries=20, hidden_dim=32)
        >>> logits, boxes = detector.eval()(torch.rand(2, 3, 90, 120))
        >>> logits.shape, boxes.shape
        (torch.Size([2, 20, 5]), torch.Size([2, 20, 4]))
    """

    config_class = DetectorConfig
    kind = "detector"
    output_names = ("logits", "boxes")
    usual_size = 640
    class_weights = ("denoising_class_embed.", "enc_score_head.", "dec_score_head.")

    encoder: HybridEncoder
    decoder: RTDETRHead

    def __init__(
        self, backbone: TinyViT, *, num_classes: int, class_names: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(backbone, num_classes=num_classes, class_names=class_names, **options)
        _initialize(self.decoder)
        self.squares = Squares(backbone.config.img_size)

    def forward(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the logits and boxes of the queries.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1], or a list of images :math:`(C, H, W)` of any sizes, on
                the device of the network.

        Returns:
            Logits :math:`(B, Q, K)`, whose sigmoid is the confidence, and boxes :math:`(B, Q, 4)` as center, width and
            height, normalized by the image size.

        Raises:
            TypeError: if the images are not floating point tensors.
            ValueError: if they have another shape.
        """
        for batch in [images] if isinstance(images, Tensor) else (image.unsqueeze(0) for image in images):
            check_images(batch, self.backbone.config.in_chans)
        squares, _ = self.squares(images)
        if not squares.shape[0]:  # kornia's encoder does not support empty batches
            shape = (0, self._config.num_queries)
            return squares.new_zeros(*shape, self._config.num_classes), squares.new_zeros(*shape, 4)
        features = self.backbone.forward_intermediates(self.normalize(squares))
        return self.decoder(self.encoder(features[1:]))

    def predict(
        self,
        images: Images,
        confidence_threshold: float = 0.3,
        batch_size: int = 8,
        nms_threshold: float | None = None,
    ) -> list[list[Detection]]:
        """Detect objects in images of any size.

        Args:
            images: one or several images, as for :meth:`ImageClassifier.predict`.
            confidence_threshold: least score of the detections, in [0, 1).
            batch_size: number of images per forward pass.
            nms_threshold: IoU for :func:`suppress_duplicates`; ``None`` to keep all detections.

        Returns:
            The detections of each image, sorted by descending score, with boxes clipped to the image.

        Raises:
            TypeError: if an element is not an image.
            ValueError: if a file cannot be read, a shape is wrong, or values or a number are out of range.
            FileNotFoundError: if a file does not exist.
        """
        check_counts(batch_size=batch_size)
        if not 0 <= confidence_threshold < 1:
            raise ValueError(f"confidence_threshold must be in [0, 1); got {confidence_threshold!r}.")
        select = self.post_processor(confidence_threshold)
        network = evaluation_copy(self)
        detections: list[list[Detection]] = []
        with torch.inference_mode():
            for batch in read_batches(images, self, self.backbone.config.in_chans, batch_size):
                logits, boxes = network(batch)
                sizes = torch.tensor([image.shape[-2:] for image in batch], device=logits.device)
                for rows, size in zip(select(logits.float(), boxes.float(), sizes), sizes.tolist(), strict=True):
                    kept = rows if nms_threshold is None else suppress_duplicates(rows, nms_threshold)
                    detections.append([self._detection(row, *size) for row in kept.tolist()])
        return detections

    def post_processor(self, confidence_threshold: float = 0.3) -> DETRPostProcessor:
        """Return kornia's post-processing of the outputs of :meth:`forward`.

        Args:
            confidence_threshold: least score of the detections.
        """
        return DETRPostProcessor(confidence_threshold, self._config.num_classes, self._config.num_queries)

    def object_detector(self, confidence_threshold: float = 0.3) -> ObjectDetector:
        """Return kornia's :class:`~kornia.contrib.object_detection.ObjectDetector` with this network as its model.

        The network is put into evaluation mode.

        Args:
            confidence_threshold: least score of the detections.
        """
        return ObjectDetector(self, self.squares, self.post_processor(confidence_threshold))

    def _detection(self, row: list[float], height: int, width: int) -> Detection:
        """Convert class, score, left, top, width and height of an object to a detection."""
        index, score, left, top, wide, high = row
        box = (max(left, 0.0), max(top, 0.0), float(min(left + wide, width)), float(min(top + high, height)))
        return Detection(self.class_names[int(index)], int(index), score, box)


def suppress_duplicates(detections: Tensor, threshold: float) -> Tensor:
    """Remove duplicates by non-maximum suppression within each class.

    Args:
        detections: class index, score, left, top, width and height, :math:`(D, 6)`, as of kornia's
            ``DETRPostProcessor``.
        threshold: a box whose IoU with one of its class with a higher score exceeds this is removed, in [0, 1].

    Returns:
        The kept detections in their order, :math:`(N, 6)`, on the CPU.

    Raises:
        ValueError: if the threshold is out of range.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"The IoU threshold of duplicates must be in [0, 1]; got {threshold!r}.")
    detections = detections.cpu()
    classes, scores, corner, size = detections.split((1, 1, 2, 2), 1)
    boxes, kept = torch.cat([corner, corner + size], 1), torch.zeros(len(detections), dtype=torch.bool)
    for each in classes.unique():
        members = (classes[:, 0] == each).nonzero()[:, 0]
        kept[members[nms(boxes[members], scores[members, 0], threshold)]] = True
    return detections[kept]


@torch.no_grad()
def _initialize(head: RTDETRHead) -> None:
    """Initialize a head as the authors do (lyuwenyu/RT-DETR, ``rtdetr_decoder.py``); kornia has torch's defaults.

    Scores start at the prior probability of arXiv:1708.02002, boxes at their anchors, and the sampling points of
    deformable attention on rings around the reference point (arXiv:2010.04159).
    """
    prior = 0.01
    for scores in (head.enc_score_head, *head.dec_score_head):
        nn.init.xavier_uniform_(scores.weight)
        nn.init.constant_(scores.bias, -math.log((1 - prior) / prior))
    for corners in (head.enc_bbox_head, *head.dec_bbox_head):
        nn.init.zeros_(corners.layers[-1].weight)
        nn.init.zeros_(corners.layers[-1].bias)
    for module in head.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            _initialize_attention(module)


def _initialize_attention(attention: MultiScaleDeformableAttention) -> None:
    angles = torch.arange(attention.num_heads) * (2 * math.pi / attention.num_heads)
    ring = torch.stack([angles.cos(), angles.sin()], -1)
    ring = ring / ring.abs().max(-1, keepdim=True)[0]
    steps = torch.arange(1, attention.num_points + 1).view(1, 1, -1, 1)
    offsets = ring.view(-1, 1, 1, 2) * steps.expand(1, attention.num_levels, -1, 1)
    nn.init.zeros_(attention.sampling_offsets.weight)
    attention.sampling_offsets.bias.copy_(offsets.flatten())
    nn.init.zeros_(attention.attention_weights.weight)
    nn.init.zeros_(attention.attention_weights.bias)
    for linear in (attention.value_proj, attention.output_proj):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
