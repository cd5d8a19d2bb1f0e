"""The graph that an engine runs: a folded network between the images that a user has and the results of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from kornia_tinyvit.classification import ImageClassifier, View
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.deploy.formats.onnx import to_onnx
from kornia_tinyvit.deploy.formats.program import trace_images
from kornia_tinyvit.deploy.resize import ResizeAndCrop
from kornia_tinyvit.folding import fold, fold_normalization
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import EvaluationPipeline, Preprocessing

if TYPE_CHECKING:
    import onnx

__all__ = ["METHODS", "InferenceGraph", "Pixels", "build_graph", "find_network", "synthetic_images"]

#: What comes in: images that are normalized, floats in [0, 1], or levels of 8 bits.
Pixels = Literal["normalized", "unit", "uint8"]
#: The methods of a network that a graph can run.
METHODS = ("forward", "forward_features", "forward_intermediates")
LEVELS = {"unit": 1.0, "uint8": 255.0}
OPSET = 23  # as new as ONNX Runtime and OpenVINO know; it has Attention


class InferenceGraph(nn.Module):
    """A folded network with what stands before it, for an engine to run or to trace.

    Args:
        network: the folded network.
        method: which of its methods.
        pixels: what comes in.
        mean: what to subtract from the pixels, :math:`(1, C, 1, 1)`; ``None`` if they are normalized.
        resize: what turns photos of any size into images of the network's; ``None`` if they are such images.
        views: test-time augmentation of :class:`~kornia_tinyvit.ImageClassifier`.
    """

    mean: Tensor | None
    #: The graph in ONNX by height and width, ``None`` for any: engines translate it once for all their types.
    translated: dict[tuple[int, ...] | None, onnx.ModelProto]

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
        self.translated = {}

    def with_dtype(self, dtype: torch.dtype) -> InferenceGraph:
        """Return a copy whose network computes in a type; the mean is subtracted in float32 whatever it is."""
        copied = copy.deepcopy(self, {id(self.translated): {}})
        copied.dtype = dtype
        copied.network.to(dtype)
        return copied

    def to_onnx(self, images: Tensor, dynamic_size: bool) -> onnx.ModelProto:
        """Translate the graph for any number of images of a size. It is kept in ``translated``: do not change it.

        Args:
            images: images :math:`(B, C, H, W)`.
            dynamic_size: for any height and width instead of theirs.
        """
        key = None if dynamic_size else tuple(images.shape[2:])
        if key not in self.translated:
            program = trace_images(self, images.cpu(), dynamic_size=dynamic_size)
            self.translated[key] = to_onnx(program, OPSET)
        return self.translated[key]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map images :math:`(B, C, H, W)` to what the model returns, in float32; a list becomes a tuple."""
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
        method: Callable[[Tensor], Tensor | list[Tensor]] = getattr(self.network, self.method)
        return method(images.to(self.dtype))


def find_network(model: nn.Module, advice: str = "") -> TinyViT:
    """Return the TinyViT in a model.

    Args:
        model: the model.
        advice: how the error's sentence ends.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules():
        if isinstance(module, TinyViT):
            return module
    raise ValueError(f"There is no TinyViT in this {type(model).__name__}{advice}.")


def synthetic_images(
    config: TinyViTConfig, batch: int = 1, size: tuple[int, int] | None = None, pixels: Pixels = "normalized"
) -> Tensor:
    """Draw images: rough patterns with noise, which networks tell apart better than noise alone.

    Args:
        config: the network that takes them.
        batch: how many; the same number gives the same images.
        size: height and width; the network's resolution if left out.
        pixels: what they are made of.

    Returns:
        Images :math:`(B, C, H, W)`, float32 or uint8.
    """
    generator = torch.Generator().manual_seed(batch)
    size = size or (config.img_size, config.img_size)
    pattern = torch.rand(batch, config.in_chans, 5, 7, generator=generator)
    pattern = nn.functional.interpolate(pattern, size, mode="bilinear")
    unit = 0.8 * pattern + 0.2 * torch.rand(pattern.shape, generator=generator)
    if pixels == "uint8":
        return (unit * 255).round().to(torch.uint8)
    return 4 * unit - 2 if pixels == "normalized" else unit


def build_graph(model: nn.Module, method: str = "forward", pixels: Pixels | None = None) -> InferenceGraph:
    """Fold a model and put before it what its images need.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`; an :class:`~kornia_tinyvit.ImageClassifier`, whose graph starts from
            photos of any size; or any module of one image batch that holds a TinyViT.
        method: ``"forward"``, or for a TinyViT ``"forward_features"`` or ``"forward_intermediates"``.
        pixels: what comes in: ``"normalized"`` (what a TinyViT takes), ``"unit"`` (floats in [0, 1], what a classifier
            takes) or ``"uint8"`` (integers from 0 to 255).

    Returns:
        A module of one tensor :math:`(B, C, H, W)` that returns a tensor or a tuple of tensors in float32.

    Raises:
        ValueError: if the method or the kind of pixels is unknown or not one that the model can do.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if pixels is None:
        pixels = "unit" if isinstance(model, ImageClassifier) else "normalized"
    if pixels not in ("normalized", *LEVELS):
        raise ValueError(f"pixels must be normalized, unit or uint8; got {pixels!r}.")
    if isinstance(model, ImageClassifier):
        return _classifier_graph(model, method, pixels)
    if not isinstance(model, TinyViT) and (method != "forward" or pixels != "normalized"):
        raise ValueError(f"Only a TinyViT has other methods or pixels; got a {type(model).__name__}.")
    network, mean = fold(model), None
    if isinstance(network, TinyViT) and pixels != "normalized":
        mean = _fold_pixels(network, network.preprocessing, pixels)
    return InferenceGraph(network, method, pixels, mean)


def _classifier_graph(model: ImageClassifier, method: str, pixels: Pixels) -> InferenceGraph:
    if method != "forward" or pixels == "normalized":
        raise ValueError("An ImageClassifier takes photos, unit or uint8, and has one method; pass its .model instead.")
    network, prepare = fold(model.model), model.preprocessing
    mean, resize = None, prepare
    if isinstance(prepare, EvaluationPipeline):
        mean, resize = _fold_pixels(network, prepare.settings, pixels), ResizeAndCrop(prepare, LEVELS[pixels])
    elif pixels == "uint8":
        raise ValueError("uint8 photos need the evaluation's own preprocessing; this classifier has another.")
    return InferenceGraph(network, method, pixels, mean, resize, model.views)


def _fold_pixels(network: TinyViT, preprocessing: Preprocessing, pixels: Pixels) -> Tensor:
    stem = cast("nn.Sequential", network.patch_embed.seq)
    conv = cast("nn.Conv2d", stem[0])
    stem[0], offset = fold_normalization(conv, preprocessing.mean, preprocessing.std, LEVELS[pixels])
    return offset
