"""From pictures to boxes: :class:`TinyViTDetector`, kornia's RT-DETR on a TinyViT."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from kornia.contrib.object_detection import ObjectDetector
from kornia.enhance import normalize
from kornia.models.rt_detr import DETRPostProcessor
from kornia.models.rt_detr.architecture.hybrid_encoder import HybridEncoder
from kornia.models.rt_detr.architecture.rtdetr_head import MultiScaleDeformableAttention, RTDETRHead
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import Checkpoint
from kornia_tinyvit.checkpoints.composite import CompositeConfig, name_classes, read_composite, write_composite
from kornia_tinyvit.checkpoints.loading import read_metadata
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.layers import evaluating
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import (
    ImageInput,
    as_images,
    check_counts,
    check_images,
    default_evaluation,
    resize_images,
)

__all__ = ["Detection", "DetectorConfig", "Squares", "TinyViTDetector"]

_CONFIG_KEY = "kornia_tinyvit.detector"
_PARTS = ("encoder", "decoder")
_USUAL_SIZE = 640
_MLP_RATIO = 4  # of kornia's decoder layers
_COARSEST = 32  # pixels a cell of the last map stands for
_HEADS = 8  # of kornia's encoder and decoder


@dataclass(frozen=True)
class Detection:
    """One object that a picture shows.

    Args:
        label: name of its class.
        index: position of the class in the logits.
        score: confidence in [0, 1].
        box: left, top, right and bottom in pixels of the picture.
    """

    label: str
    index: int
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class DetectorConfig(CompositeConfig):
    """Everything that decides the architecture of a :class:`TinyViTDetector`.

    The defaults are those of RT-DETR on its smallest backbone, ResNet-18 (arXiv:2304.08069), but for the number of
    classes.

    Args:
        backbone: the network whose maps at strides 8, 16 and 32 are read; pictures are shown as squares of its
            ``img_size``, which must be a multiple of 32.
        num_classes: classes an object may have.
        hidden_dim: channels of encoder and decoder, a multiple of 8.
        num_queries: how many objects a picture can show.
        decoder_layers: layers of the decoder.
        expansion: width of the encoder's convolutions as a share of ``hidden_dim``.

    Raises:
        ValueError: if a number is out of its range, or there are more queries than cells in the maps.
    """

    hidden_dim: int = 256
    num_queries: int = 300
    decoder_layers: int = 3
    expansion: float = 0.5

    def __post_init__(self) -> None:
        self._check_positive("num_classes", "hidden_dim", "num_queries", "decoder_layers")
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
                f"Pictures of {side} pixels have {cells} cells to look for objects in, fewer than {self.num_queries} "
                "queries; lower num_queries or raise img_size."
            )

    def build_encoder(self) -> HybridEncoder:
        """Build kornia's hybrid encoder, with random weights."""
        channels = list(self.backbone.embed_dims[1:])
        return HybridEncoder(channels, self.hidden_dim, _MLP_RATIO * self.hidden_dim, self.expansion)

    def build_decoder(self) -> RTDETRHead:
        """Build kornia's RT-DETR head, with random weights."""
        return RTDETRHead(
            self.num_classes, self.hidden_dim, self.num_queries, [self.hidden_dim] * 3, self.decoder_layers
        )


class Squares(nn.Module):
    """Resize pictures of any sizes to squares, antialiased, and tell their sizes: kornia's detectors' preprocessing.

    Args:
        size: side of the squares in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Map pictures to squares.

        Args:
            images: pictures :math:`(B, C, H, W)` in [0, 1], or a list of pictures :math:`(C, H, W)` of any sizes.

        Returns:
            Squares :math:`(B, C, S, S)`, and heights and widths :math:`(B, 2)`.

        Raises:
            ValueError: if the list is empty.
        """
        if isinstance(images, Tensor):
            sizes = torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)
            return resize_images(images, self.size, self.size), sizes
        if not images:
            raise ValueError("Got an empty list of pictures; an empty batch is a tensor (0, C, H, W).")
        squares = [resize_images(image.unsqueeze(0), self.size, self.size) for image in images]
        sizes = torch.tensor([image.shape[-2:] for image in images], device=squares[0].device)
        return torch.cat(squares), sizes


class TinyViTDetector(nn.Module):
    """RT-DETR (arXiv:2304.08069), kornia's, on the maps of a :class:`~kornia_tinyvit.TinyViT` at strides 8, 16 and 32.

    It takes pictures in [0, 1] of any size, shows them as squares to the network and normalises them itself, so it
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

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: TinyViT, *, num_classes: int, class_names: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self._shape = config = DetectorConfig(backbone.config, num_classes, **options)
        self.class_names = name_classes(class_names, num_classes)
        self.backbone = backbone
        self.encoder = config.build_encoder()
        self.decoder = config.build_decoder()
        _initialise(self.decoder)
        for unused in (backbone.norm_head, backbone.head):
            unused.requires_grad_(False)
        self.squares = Squares(backbone.config.img_size)
        statistics = default_evaluation(backbone.config)
        self.register_buffer("mean", statistics.mean, persistent=False)
        self.register_buffer("std", statistics.std, persistent=False)

    @classmethod
    def from_config(
        cls,
        config: str | TinyViTConfig | DetectorConfig | None = None,
        *,
        pretrained: bool | str | Path | Checkpoint = False,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        hidden_dim: int = 256,
        num_queries: int = 300,
        decoder_layers: int = 3,
        expansion: float = 0.5,
        **kwargs: Any,
    ) -> TinyViTDetector:
        """Build a detector from a variant, a configuration, a backbone's weights or what :meth:`save` wrote.

        Args:
            config: variant or configuration of the backbone, or that of a whole detector; may be left out where
                ``pretrained`` is a file that carries one.
            pretrained: a file that :meth:`save` wrote, or what :meth:`TinyViT.from_config` takes, whose head is left
                out: encoder and decoder then begin with random weights.
            num_classes: classes an object may have; may be left out for a whole detector or where names are given. A
                detector's file for other classes gives all but what tells classes apart.
            class_names: names of the classes; those of a detector's file come along.
            hidden_dim: channels of encoder and decoder; a detector's file and a :class:`DetectorConfig` have their own,
                as for the next three.
            num_queries: how many objects a picture can show.
            decoder_layers: layers of the decoder.
            expansion: width of the encoder's convolutions as a share of ``hidden_dim``.
            **kwargs: for :meth:`TinyViT.from_config`, such as ``window_sizes`` and ``img_size``, which is 640 for a
                variant.

        Returns:
            The detector, in evaluation mode if all its weights were loaded.

        Raises:
            ValueError: if it cannot be built, or the number of classes is not told.
            CheckpointError: if the weights cannot be read or belong to another architecture.
        """
        if num_classes is None and class_names is not None:
            num_classes = len(class_names)
        if isinstance(pretrained, (str, Path)) and _CONFIG_KEY in read_metadata(pretrained):
            return cls._from_file(Path(pretrained), config, num_classes, class_names, kwargs)
        options = {
            "hidden_dim": hidden_dim, "num_queries": num_queries, "decoder_layers": decoder_layers,
            "expansion": expansion,
        }  # fmt: skip
        if isinstance(config, DetectorConfig):
            num_classes, options = num_classes or config.num_classes, _options(config)
            config = config.backbone
        elif isinstance(config, str):
            kwargs.setdefault("img_size", _USUAL_SIZE)
        if num_classes is None:
            beside = "" if isinstance(pretrained, (bool, Checkpoint)) else f" {pretrained} is no detector's file."
            raise ValueError(f"Say how many classes an object may have: num_classes or class_names.{beside}")
        backbone = TinyViT.from_config(config, pretrained=pretrained, num_classes=0, **kwargs)
        return cls(backbone, num_classes=num_classes, class_names=class_names, **options).train()

    @classmethod
    def _from_file(
        cls,
        path: Path,
        config: str | TinyViTConfig | DetectorConfig | None,
        num_classes: int | None,
        class_names: Sequence[str] | None,
        kwargs: dict[str, Any],
    ) -> TinyViTDetector:
        file = read_composite(path, _CONFIG_KEY, DetectorConfig)
        stored, parts = file.config, {part: file.part(f"{part}.") for part in _PARTS}
        wanted = _shapes(stored)
        for part, tensors in parts.items():
            file.check(tensors, wanted.get(part, {}))
        base, found = file.backbone(config)
        backbone = TinyViT.from_config(base, pretrained=found, num_classes=0, **kwargs)
        same = num_classes in (None, stored.num_classes)
        if class_names is None and same:
            class_names = file.class_names
        detector = cls(
            backbone, num_classes=num_classes or stored.num_classes, class_names=class_names, **_options(stored)
        )
        if not same:
            parts["decoder"] |= {
                name: x
                for name, x in detector.decoder.state_dict().items()
                if name.split(".")[0] in ("denoising_class_embed", "enc_score_head", "dec_score_head")
            }
        for part, tensors in parts.items():
            getattr(detector, part).load_state_dict(tensors)
        return detector.train(not same)

    @property
    def config(self) -> DetectorConfig:
        """What :meth:`from_config` builds the same architecture from."""
        return dataclasses.replace(self._shape, backbone=self.backbone.config)

    def forward(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Look for objects.

        Args:
            images: pictures :math:`(B, C, H, W)` in [0, 1], or a list of pictures :math:`(C, H, W)` of any sizes, on
                the device of the network.

        Returns:
            Logits :math:`(B, Q, K)`, whose sigmoid is the confidence, and boxes :math:`(B, Q, 4)`: centre, width and
            height as shares of the picture's sides.

        Raises:
            TypeError: if the pictures are not floating point tensors.
            ValueError: if their shape is another.
        """
        for each in [images] if isinstance(images, Tensor) else (image.unsqueeze(0) for image in images):
            check_images(each, self.backbone.config.in_chans)
        squares, _ = self.squares(images)
        if not len(squares):
            shape = (0, self._shape.num_queries)
            return squares.new_zeros(*shape, self._shape.num_classes), squares.new_zeros(*shape, 4)
        maps = self.backbone.forward_intermediates(normalize(squares, self.mean.to(squares), self.std.to(squares)))
        return self.decoder(self.encoder(maps[1:]))

    def predict(
        self, images: ImageInput | Iterable[ImageInput], confidence_threshold: float = 0.3, batch_size: int = 8
    ) -> list[list[Detection]]:
        """Find the objects of pictures of any sizes.

        Args:
            images: one picture or several: tensors :math:`(C, H, W)` in [0, 1], paths, PIL images, or a batch tensor
                :math:`(B, C, H, W)`. They are moved to the network's device.
            confidence_threshold: least score of what is returned, in [0, 1).
            batch_size: how many pictures the network takes at a time.

        Returns:
            For each picture its objects, the surest first, with boxes that lie in the picture.

        Raises:
            TypeError: if something is no picture.
            ValueError: if a file cannot be read, a shape is wrong, or a number is out of its range.
            FileNotFoundError: if there is no such file.
        """
        check_counts(batch_size=batch_size)
        if not 0 <= confidence_threshold < 1:
            raise ValueError(f"confidence_threshold must be in [0, 1); got {confidence_threshold!r}.")
        first, channels = next(self.parameters()), self.backbone.config.in_chans
        pictures = (picture.to(first.device, first.dtype) for picture in as_images(images, channels))
        select = self.post_processor(confidence_threshold)
        found: list[list[Detection]] = []
        with evaluating(self), torch.inference_mode():
            while batch := list(islice(pictures, batch_size)):
                logits, boxes = self(batch)
                sizes = torch.tensor([picture.shape[-2:] for picture in batch], device=logits.device)
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

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with configuration and class names inside, whole or not at all.

        :meth:`from_config` reads it back: ``TinyViTDetector.from_config(pretrained=path)``.

        Args:
            path: the file to write; its folder is made.

        Returns:
            The path.

        Raises:
            ValueError: if the backbone's activation cannot be named in a file.
        """
        return write_composite(path, _CONFIG_KEY, self, self.class_names)


def _options(config: DetectorConfig) -> dict[str, Any]:
    """Return the fields of a configuration that are the detector's own."""
    return {name: value for name, value in vars(config).items() if name not in ("backbone", "num_classes")}


def _shapes(config: DetectorConfig) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of encoder and decoder without memory; none if not even the shapes can be made."""
    if config.hidden_dim >= 2**16 or config.num_classes >= 2**20 or config.decoder_layers >= 2**7:
        return {}
    with torch.device("meta"):
        return {"encoder": config.build_encoder().state_dict(), "decoder": config.build_decoder().state_dict()}


@torch.no_grad()
def _initialise(head: RTDETRHead) -> None:
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
            _initialise_attention(module)


def _initialise_attention(attention: MultiScaleDeformableAttention) -> None:
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
