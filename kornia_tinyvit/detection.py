"""From images to boxes: :class:`TinyViTDetector`, kornia's RT-DETR on a TinyViT."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
from kornia_tinyvit.images import ImageInput, check_images, read_batches
from kornia_tinyvit.layers import evaluating
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import check_counts, resize_images

__all__ = ["Detection", "DetectorConfig", "Squares", "TinyViTDetector"]

_MLP_RATIO = 4  # of kornia's decoder layers
_COARSEST = 32  # pixels a cell of the last map stands for
_HEADS = 8  # of kornia's encoder and decoder


@dataclass(frozen=True)
class Detection(Prediction):
    """One object that an image shows.

    Args:
        label: name of its class.
        index: position of the class in the logits.
        score: confidence in [0, 1].
        box: left, top, right and bottom in pixels of the image.
    """

    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class DetectorConfig(BackboneConfig):
    """Everything that decides the architecture of a :class:`TinyViTDetector`.

    The defaults are those of RT-DETR on its smallest backbone, ResNet-18 (arXiv:2304.08069), but for the number of
    classes.

    Args:
        backbone: the network whose maps at strides 8, 16 and 32 are read; images are shown as squares of its
            ``img_size``, which must be a multiple of 32.
        num_classes: classes an object may have.
        hidden_dim: channels of encoder and decoder, a multiple of 8.
        num_queries: how many objects an image can show.
        decoder_layers: layers of the decoder.
        expansion: width of the encoder's convolutions as a share of ``hidden_dim``.

    Raises:
        ValueError: if a number is out of its range, or there are more queries than cells in the maps.
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
            raise ValueError(f"hidden_dim must be a multiple of {_HEADS}, one part a head; got {self.hidden_dim}.")
        if not 0 < self.expansion <= 1 or int(self.hidden_dim * self.expansion) < 1:
            raise ValueError(f"expansion must be in (0, 1] and leave a channel; got {self.expansion!r}.")
        if self.backbone.mobile_sam:
            raise ValueError("MobileSAM's encoder has no map at stride 32; take another network.")
        side = self.backbone.img_size
        if side % _COARSEST:
            raise ValueError(f"A detector's img_size must be a multiple of {_COARSEST}; got {side}.")
        cells = sum((side // stride) ** 2 for stride in (8, 16, 32))
        if self.num_queries > cells:
            raise ValueError(
                f"Images of {side} pixels have {cells} cells to look for objects in, fewer than {self.num_queries} "
                "queries; lower num_queries or raise img_size."
            )

    def build_parts(self) -> dict[str, nn.Module]:
        """Build kornia's hybrid encoder and RT-DETR head, with random weights."""
        channels, hidden = list(self.backbone.embed_dims[1:]), self.hidden_dim
        return {
            "encoder": HybridEncoder(channels, hidden, _MLP_RATIO * hidden, self.expansion),
            "decoder": RTDETRHead(self.num_classes, hidden, self.num_queries, [hidden] * 3, self.decoder_layers),
        }


class Squares(nn.Module):
    """Resize images of any sizes to squares, antialiased, and tell their sizes: kornia's detectors' preprocessing.

    Args:
        size: side of the squares in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Map images to squares.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1], or a list of images :math:`(C, H, W)` of any sizes.

        Returns:
            Squares :math:`(B, C, S, S)`, and heights and widths :math:`(B, 2)`.

        Raises:
            ValueError: if the list is empty.
        """
        if isinstance(images, Tensor):
            sizes = torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)
            return resize_images(images, self.size, self.size), sizes
        if not images:
            raise ValueError("Got an empty list of images; an empty batch is a tensor (0, C, H, W).")
        squares = [resize_images(image.unsqueeze(0), self.size, self.size) for image in images]
        sizes = torch.tensor([image.shape[-2:] for image in images], device=squares[0].device)
        return torch.cat(squares), sizes


class TinyViTDetector(BackboneNetwork):
    """RT-DETR (arXiv:2304.08069), kornia's, on the maps of a :class:`~kornia_tinyvit.TinyViT` at strides 8, 16 and 32.

    It takes images in [0, 1] of any size, shows them as squares to the network and normalizes them itself, so it
    stands behind kornia's augmentations, and gradients reach the pixels. The backbone's norm, which its maps do
    without, is frozen. kornia's classes infer only: training happens in transformers' RT-DETR, which has the same
    weights; see :mod:`kornia_tinyvit.huggingface.rt_detr`.

    Args:
        backbone: the network; :meth:`from_config` builds it, too.
        num_classes: classes an object may have.
        class_names: names of the classes in the order of the logits; numbers if left out.
        **options: further fields of :class:`DetectorConfig`.

    Attributes:
        config: the :class:`DetectorConfig` that tells all of it but the names.
        encoder: kornia's hybrid encoder.
        decoder: kornia's RT-DETR head.

    Raises:
        ValueError: if a number is out of its range, or there are not as many names as classes.

    Example:
        >>> detector = TinyViTDetector.from_config("1m", num_classes=5, img_size=128, num_queries=20, hidden_dim=32)
        >>> logits, boxes = detector.eval()(torch.rand(2, 3, 90, 120))
        >>> logits.shape, boxes.shape
        (torch.Size([2, 20, 5]), torch.Size([2, 20, 4]))
    """

    config_class = DetectorConfig
    kind = "detector"
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
        """Look for objects.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1], or a list of images :math:`(C, H, W)` of any sizes, on
                the device of the network.

        Returns:
            Logits :math:`(B, Q, K)`, whose sigmoid is the confidence, and boxes :math:`(B, Q, 4)`: center, width and
            height as shares of the image's sides.

        Raises:
            TypeError: if the images are not floating point tensors.
            ValueError: if their shape is another.
        """
        for each in [images] if isinstance(images, Tensor) else (image.unsqueeze(0) for image in images):
            check_images(each, self.backbone.config.in_chans)
        squares, _ = self.squares(images)
        if not len(squares):
            shape = (0, self._shape.num_queries)
            return squares.new_zeros(*shape, self._shape.num_classes), squares.new_zeros(*shape, 4)
        maps = self.backbone.forward_intermediates(self.normalize(squares))
        return self.decoder(self.encoder(maps[1:]))

    def predict(
        self, images: ImageInput | Iterable[ImageInput], confidence_threshold: float = 0.3, batch_size: int = 8
    ) -> list[list[Detection]]:
        """Find the objects of images of any sizes.

        Args:
            images: one image or several: tensors :math:`(C, H, W)` in [0, 1], paths, PIL images, or a batch tensor
                :math:`(B, C, H, W)`. They are moved to the network's device.
            confidence_threshold: least score of what is returned, in [0, 1).
            batch_size: how many images the network takes at a time.

        Returns:
            For each image its objects, the surest first, with boxes that lie in the image.

        Raises:
            TypeError: if something is no image.
            ValueError: if a file cannot be read, a shape is wrong, or a number is out of its range.
            FileNotFoundError: if there is no such file.
        """
        check_counts(batch_size=batch_size)
        if not 0 <= confidence_threshold < 1:
            raise ValueError(f"confidence_threshold must be in [0, 1); got {confidence_threshold!r}.")
        select = self.post_processor(confidence_threshold)
        found: list[list[Detection]] = []
        with evaluating(self), torch.inference_mode():
            for batch in read_batches(images, self, self.backbone.config.in_chans, batch_size):
                logits, boxes = self(batch)
                sizes = torch.tensor([image.shape[-2:] for image in batch], device=logits.device)
                for rows, size in zip(select(logits.float(), boxes.float(), sizes), sizes.tolist(), strict=True):
                    found.append(self._name(rows.tolist(), *size))
        return found

    def post_processor(self, confidence_threshold: float = 0.3) -> DETRPostProcessor:
        """Return kornia's post-processing of what :meth:`forward` returns.

        Args:
            confidence_threshold: least score of what it keeps.
        """
        config = self._shape
        return DETRPostProcessor(confidence_threshold, config.num_classes, config.num_queries)

    def object_detector(self, confidence_threshold: float = 0.3) -> ObjectDetector:
        """Return kornia's :class:`~kornia.contrib.object_detection.ObjectDetector` around this network.

        It shares the weights, and puts the network into evaluation mode.

        Args:
            confidence_threshold: least score of what it finds.
        """
        return ObjectDetector(self, self.squares, self.post_processor(confidence_threshold))

    def _name(self, rows: list[list[float]], height: int, width: int) -> list[Detection]:
        """Turn rows of class, score, left, top, width and height into detections."""
        found = []
        for number, score, left, top, wide, high in rows:
            right, bottom = min(left + wide, width), min(top + high, height)
            box = (max(left, 0.0), max(top, 0.0), float(right), float(bottom))
            found.append(Detection(self.class_names[int(number)], int(number), score, box))
        return found


@torch.no_grad()
def _initialize(head: RTDETRHead) -> None:
    """Give a head first weights as RT-DETR's authors do (lyuwenyu/RT-DETR, ``rtdetr_decoder.py``).

    kornia's class has torch's everywhere. Scores begin low, since nearly all queries show nothing (the prior of
    arXiv:1708.02002); boxes begin where their anchors are; the points that a query looks at lie on a ring around it
    (arXiv:2010.04159).
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
