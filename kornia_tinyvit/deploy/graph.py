"""Inference graphs: a folded network with its preprocessing, for engines and exporters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from kornia_tinyvit.backbone import BackboneNetwork
from kornia_tinyvit.classification import ImageClassifier, View
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.deploy.formats.onnx import to_onnx
from kornia_tinyvit.deploy.formats.program import trace_images
from kornia_tinyvit.deploy.resize import ResizeAndCrop
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.folding import fold, fold_normalization
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import is_plain
from kornia_tinyvit.preprocessing import EvaluationPipeline, Preprocessing

if TYPE_CHECKING:
    import onnx

__all__ = ["METHODS", "InferenceGraph", "Pixels", "build_graph", "default_pixels", "find_network", "synthetic_images"]

#: Pixel formats of the input: normalized floats, floats in [0, 1], or uint8.
Pixels = Literal["normalized", "unit", "uint8"]
#: Methods of a network that a graph can run.
METHODS = ("forward", "forward_features", "forward_intermediates")
MAX_VALUES = {"unit": 1.0, "uint8": 255.0}
OPSET = 23  # the newest that ONNX Runtime and OpenVINO support; it has Attention


class InferenceGraph(nn.Module):
    """A folded network with its preprocessing.

    Args:
        network: the folded network.
        method: the method of the network to run, one of :data:`METHODS`.
        pixels: the pixel format of the input.
        mean: mean to subtract from the pixels, :math:`(1, C, 1, 1)`; ``None`` for a network that normalizes images in
            [0, 1] itself, or takes normalized ones.
        resize: preprocessing of images of any size; ``None`` if the input has the size for the network.
        views: test-time augmentation of :class:`~kornia_tinyvit.ImageClassifier`.
    """

    mean: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        method: str = "forward",
        pixels: Pixels = "normalized",
        mean: Tensor | None = None,
        resize: nn.Module | None = None,
        views: Sequence[View] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.method = method
        self.pixels = pixels
        self.resize = resize
        self.views = tuple(views)
        self.register_buffer("mean", mean)
        self.dtype = torch.float32
        #: Cached ONNX graphs by (height, width), ``None`` for dynamic shapes; shared by the engines and their dtypes.
        self.onnx_models: dict[tuple[int, ...] | None, onnx.ModelProto] = {}

    def with_dtype(self, dtype: torch.dtype) -> InferenceGraph:
        """Return a copy whose network computes in a dtype; the mean is always subtracted in float32."""
        copied = copy.deepcopy(self, {id(self.onnx_models): {}})
        copied.dtype = dtype
        copied.network.to(dtype)
        return copied

    def to_onnx(self, images: Tensor, dynamic_size: bool) -> onnx.ModelProto:
        """Convert the graph to ONNX with a dynamic batch size; the result is cached and must not be modified.

        Args:
            images: example images :math:`(B, C, H, W)`.
            dynamic_size: make height and width dynamic as well.

        Returns:
            The ONNX model.
        """
        key = None if dynamic_size else tuple(images.shape[2:])
        if key not in self.onnx_models:
            program = trace_images(self, images.cpu(), dynamic_size=dynamic_size)
            self.onnx_models[key] = to_onnx(program, OPSET)
        return self.onnx_models[key]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map images :math:`(B, C, H, W)` to the outputs of the model, in float32; a list becomes a tuple."""
        out = self._run(images)
        for view in self.views:
            out = cast("Tensor", out) + cast("Tensor", self._run(view(images)))
        if isinstance(out, (list, tuple)):
            return tuple(each.float() for each in out)
        return out.float() / (1 + len(self.views)) if self.views else out.float()

    def _run(self, images: Tensor) -> Tensor | list[Tensor]:
        if self.resize is not None:
            images = self.resize(images)
        if self.mean is not None:
            images = images.float() - self.mean
        elif self.pixels == "uint8":
            images = images.float() / MAX_VALUES[self.pixels]
        method: Callable[[Tensor], Tensor | list[Tensor]] = getattr(self.network, self.method)
        return method(images.to(self.dtype))


def find_network(model: nn.Module, advice: str = "") -> TinyViT:
    """Return the TinyViT in a model.

    Args:
        model: a TinyViT, or a module that contains one.
        advice: end of the error message.

    Raises:
        ValueError: if the model contains no TinyViT.
    """
    network = next((module for module in model.modules() if isinstance(module, TinyViT)), None)
    if network is None:
        raise ValueError(f"There is no TinyViT in this {type(model).__name__}{advice}.")
    return network


def synthetic_images(
    config: TinyViTConfig, batch: int = 1, size: tuple[int, int] | None = None, pixels: Pixels = "normalized"
) -> Tensor:
    """Generate images of smooth patterns with noise, whose outputs differ more than those of noise alone.

    Args:
        config: configuration of the network for the number of channels and the default size.
        batch: batch size, which also seeds the generator.
        size: height and width; ``config.img_size`` by default.
        pixels: pixel format.

    Returns:
        Images :math:`(B, C, H, W)`, float32 or uint8.
    """
    generator = torch.Generator().manual_seed(batch)
    pattern = torch.rand(batch, config.in_chans, 5, 7, generator=generator)
    pattern = nn.functional.interpolate(pattern, size or (config.img_size, config.img_size), mode="bilinear")
    unit = 0.8 * pattern + 0.2 * torch.rand(pattern.shape, generator=generator)
    if pixels == "uint8":
        return (unit * 255).round().to(torch.uint8)
    return 4 * unit - 2 if pixels == "normalized" else unit


def default_pixels(model: nn.Module) -> Pixels:
    """Return the pixel format that a model takes: ``"unit"`` if it normalizes images, otherwise ``"normalized"``.

    Args:
        model: see :func:`build_graph`.
    """
    return "unit" if isinstance(model, (ImageClassifier, BackboneNetwork)) else "normalized"


def build_graph(model: nn.Module, method: str = "forward", pixels: Pixels | None = None) -> InferenceGraph:
    """Fold a model and prepend its preprocessing.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`; an :class:`~kornia_tinyvit.ImageClassifier` or
            :class:`~kornia_tinyvit.TinyViTDetector`, whose graph takes images of any size; a
            :class:`~kornia_tinyvit.SemanticSegmenter`; or another module that contains a TinyViT and takes one image
            batch.
        method: ``"forward"``, or for a TinyViT ``"forward_features"`` or ``"forward_intermediates"``.
        pixels: pixel format of the input: ``"normalized"`` (default of a TinyViT and of other modules), ``"unit"``
            (floats in [0, 1], default of classifiers, segmenters and detectors) or ``"uint8"`` (integers in [0, 255]).

    Returns:
        A module of one tensor :math:`(B, C, H, W)` that returns a tensor or a tuple of tensors in float32.

    Raises:
        ValueError: if the method or the pixel format is unknown or not supported by the model.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if pixels is None:
        pixels = default_pixels(model)
    if pixels not in ("normalized", *MAX_VALUES):
        raise ValueError(f"pixels must be normalized, unit or uint8; got {pixels!r}.")
    if isinstance(model, TinyViT):
        network = fold(model)
        mean = None if pixels == "normalized" else _fold_pixels(network, network.preprocessing, pixels)
        return InferenceGraph(network, method, pixels, mean)
    kind = type(model).__name__
    if method != "forward":
        raise ValueError(f"{method} is a method of a TinyViT, which {kind} contains; pass that network instead.")
    if default_pixels(model) == "unit" and pixels == "normalized":
        raise ValueError(f"{kind} normalizes its images, so it supports only unit or uint8 images.")
    if isinstance(model, ImageClassifier):
        return _classifier_graph(model, pixels)
    if not isinstance(model, BackboneNetwork) and pixels != "normalized":
        raise ValueError(f"The preprocessing of {kind} is unknown, so it supports only normalized images.")
    other = fold(model)
    if isinstance(other, TinyViTDetector):
        other.add_module("squares", _Squares(other.squares.size))
    return InferenceGraph(other, method, pixels)


class _Squares(nn.Module):
    """The resizing of a detector for images of any size in one graph."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.resize = ResizeAndCrop(EvaluationPipeline(size, crop_fraction=None))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.resize(images), None  # the sizes are for kornia's post-processing


def _classifier_graph(model: ImageClassifier, pixels: Pixels) -> InferenceGraph:
    network, prepare = fold(model.model), model.preprocessing
    mean, resize = None, prepare
    if isinstance(prepare, EvaluationPipeline):
        mean, resize = _fold_pixels(network, prepare.settings, pixels), ResizeAndCrop(prepare, MAX_VALUES[pixels])
    elif pixels == "uint8":
        raise ValueError("uint8 images need an EvaluationPipeline; this classifier has other preprocessing.")
    return InferenceGraph(network, "forward", pixels, mean, resize, model.views)


def _fold_pixels(network: TinyViT, preprocessing: Preprocessing, pixels: Pixels) -> Tensor:
    """Fold the scale of the normalization into the first convolution, in place, and return the mean to subtract.

    A first layer that is not folded gets a convolution before it.
    """
    stem, channels = cast("nn.Sequential", network.patch_embed.seq), network.config.in_chans
    conv, after = stem[0], []
    if not is_plain(conv, nn.Conv2d):
        weight = torch.eye(channels).to(next(network.parameters())).view(channels, channels, 1, 1)
        conv, after = nn.Conv2d(channels, channels, 1, bias=False), [conv]
        conv.weight = nn.Parameter(weight, requires_grad=False)
    conv, mean = fold_normalization(conv, preprocessing.mean, preprocessing.std, MAX_VALUES[pixels])
    stem[0] = nn.Sequential(conv, *after) if after else conv
    return mean
