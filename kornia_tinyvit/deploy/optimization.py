"""Optimized inference: :func:`optimize`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from kornia_tinyvit.allocator import keep_memory
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.deploy.accuracy import Agreement, MaskComparison, compare
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.deploy.graph import (
    InferenceGraph,
    Pixels,
    build_graph,
    default_pixels,
    find_network,
    synthetic_images,
)
from kornia_tinyvit.deploy.measurement import as_step, interleaved
from kornia_tinyvit.images import list_images
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import without_wrappers
from kornia_tinyvit.sam.model import MobileSAM

__all__ = ["Choice", "Optimized", "optimize"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
#: Timed runs of each candidate of ``engine="auto"``.
REPETITIONS = 15


@dataclass(frozen=True)
class Choice:
    """A candidate of ``engine="auto"``.

    Args:
        engine: name of the engine.
        dtype: dtype it computes in.
        ms: median latency in milliseconds for the example; ``None`` if it was not measured.
        agreement: agreement with the model in eager float32; ``None`` without calibration images.
        rejected: why the candidate was not timed; ``None`` if it was.
    """

    engine: str
    dtype: torch.dtype
    ms: float | None = None
    agreement: Agreement | None = None
    rejected: str | None = None


class Optimized(nn.Module):
    """An inference-only copy of a model with the same signature and results, created by :func:`optimize`.

    Later changes of the model's weights do not affect it.

    Args:
        graph: the inference graph.
        example: example images :math:`(B, C, H, W)`.
        calibration: images of the calibration for int8.

    Attributes:
        engine: name of the engine.
        dtype: dtype that it computes in.
        config: the :class:`~kornia_tinyvit.TinyViTConfig` of a TinyViT.
        pixels: pixel format of the input, see :func:`optimize`.
        warmup_s: seconds of the compilation and the first run. The first of several candidates of one engine includes
            the export of the graph, which the others share.
        choices: the candidates of ``engine="auto"``, fastest first; empty otherwise.
    """

    def __init__(
        self, graph: InferenceGraph, engine: str, dtype: torch.dtype, example: Tensor, calibration: Iterable[Tensor]
    ) -> None:
        super().__init__()
        began = time.perf_counter()
        self.engine = engine
        self.dtype = dtype
        self.config = getattr(graph.network, "config", None)
        # Callers read the device and dtype of a network from its first parameter.
        self.placeholder = nn.Parameter(torch.empty(0, device=example.device), requires_grad=False)
        self.pixels = graph.pixels
        self.choices: tuple[Choice, ...] = ()
        self._run = ENGINES[engine](graph, example, dtype, calibration)
        self._channels = example.shape[1]
        self._returns_list = graph.method == "forward_intermediates"
        self(example)
        self.warmup_s = time.perf_counter() - began

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Map images :math:`(B, C, H, W)` of any size to the outputs of the model.

        Args:
            images: images in the pixel format ``pixels`` of :func:`optimize`, on its device. Images of the example's
                shape are the fastest; the first images of another shape may need another warm-up.

        Raises:
            TypeError: if the images have another dtype.
            ValueError: if they have another shape, or are on another device.
            RuntimeError: if they require a gradient.
        """
        self._check(images)
        out = self._run(images if len(images) else images.new_zeros(1, *images.shape[1:]))
        if len(images) == 0:  # engines need not support empty batches
            out = out[:0] if isinstance(out, Tensor) else tuple(each[:0] for each in out)
        return list(out) if self._returns_list else out  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Optimized:
        moved = fn(self.placeholder)
        if (moved.device, moved.dtype) != (self.placeholder.device, self.placeholder.dtype):
            raise RuntimeError("An optimized network cannot be moved or cast; optimize the model again instead.")
        return self

    def extra_repr(self) -> str:
        """Show the engine, the dtype and the pixel format."""
        return f"engine={self.engine!r}, dtype={self.dtype}, pixels={self.pixels!r}"

    def _check(self, images: Tensor) -> None:
        expected = "uint8" if self.pixels == "uint8" else "floating-point"
        if not isinstance(images, Tensor) or (images.dtype == torch.uint8) != (expected == "uint8"):
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"This network was optimized for {expected} images ({self.pixels}); got {got}.")
        if images.ndim != 4 or images.shape[1] != self._channels or min(images.shape[2:]) < 1:
            raise ValueError(f"Images must be (B, {self._channels}, H, W); got {tuple(images.shape)}.")
        device = self.placeholder.device
        if images.device != device:
            raise ValueError(f"This network was optimized for {device}; got images on {images.device}.")
        if images.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("An optimized network has no gradients; call the model itself, or detach the images.")


@dataclass
class Candidates:
    """Optimized networks of one graph for several engines and dtypes.

    Args:
        graph: the folded graph.
        calibration: see :func:`optimize`.
    """

    graph: InferenceGraph
    calibration: Sequence[Tensor | tuple[Tensor, Tensor]] = ()

    def unsupported(self, engine: str, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return the reason why an engine does not support a dtype on this machine; ``None`` if it does."""
        missing = ENGINES[engine].missing()
        if missing:
            return missing
        dtypes = ENGINES[engine].dtypes(device)
        if dtype not in dtypes:
            supported = ", ".join(map(str, dtypes)) or "nothing"
            return f"engine {engine!r} supports {supported} on this {device.type}, not {dtype}"
        if dtype == torch.int8 and not self.calibration:
            return "int8 needs calibration images: calibration=..."
        return None

    def make(self, engine: str, dtype: torch.dtype, example: Tensor) -> Optimized:
        """Optimize the model with an engine and dtype for images like ``example``.

        Raises:
            ValueError: if the engine does not support the dtype on this machine.
            ImportError: if the engine's packages are not installed.
        """
        reason = self.unsupported(engine, dtype, example.device)
        if reason:
            raise (ImportError if ENGINES[engine].missing() else ValueError)(reason)
        images = [batch if isinstance(batch, Tensor) else batch[0] for batch in self.calibration]
        return Optimized(self.graph, engine, dtype, example, images)


@overload
def optimize(model: MobileSAM, *args: Any, **kwargs: Any) -> MobileSAM: ...
@overload
def optimize(model: ImageClassifier, *args: Any, **kwargs: Any) -> ImageClassifier: ...
@overload
def optimize(model: nn.Module, *args: Any, **kwargs: Any) -> Optimized: ...
def optimize(
    model: nn.Module,
    engine: str | Sequence[str] = "auto",
    dtype: torch.dtype | None = torch.float32,
    *,
    example: Tensor | None = None,
    method: str = "forward",
    pixels: Pixels | None = None,
    calibration: Iterable[Any] = (),
    tolerance: float = 0.01,
    tune_allocator: bool = True,
) -> Optimized | ImageClassifier | MobileSAM:
    """Return a callable with the model's signature and results that is optimized for inference.

    Every engine uses :func:`torch.get_num_threads` threads.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`; an :class:`~kornia_tinyvit.ImageClassifier`; a
            :class:`~kornia_tinyvit.MobileSAM`, whose image encoder is optimized; or a module that contains a TinyViT
            and takes one image batch.
        engine: ``"eager"``, ``"inductor"``, ``"onnxruntime"`` or ``"openvino"``. ``"auto"`` times all installed
            engines, a sequence of names those, and the fastest candidate within ``tolerance`` is used.
        dtype: ``torch.float32``, ``torch.bfloat16``, ``torch.int8``, or on a GPU ``torch.float16``; ``None`` tries all
            that the engines support on this machine.
        example: images of the shape to optimize for, on the device to run on; by default one image of the model's
            resolution.
        method: for a TinyViT also ``"forward_features"`` or ``"forward_intermediates"``.
        pixels: pixel format of the input: ``"normalized"``, ``"unit"`` or ``"uint8"``, see
            :func:`~kornia_tinyvit.deploy.build_graph`.
        calibration: batches of images in the format of the input, or pairs of images and class indices :math:`(B,)`;
            for the calibration of int8, and to compare the candidates of ``"auto"``. Use 100 to 300 typical images.
            For a MobileSAM, images as for :meth:`MobileSAM.embed`; 8 suffice to compare its masks.
        tolerance: for ``"auto"``, the largest fraction of the calibration images whose top-1 class may change; for
            feature maps, the largest mean relative error; for a MobileSAM, the largest difference of the mean IoU with
            its masks from 1 (see :class:`~kornia_tinyvit.deploy.accuracy.MaskComparison`). Without images only float32
            is tried.
        tune_allocator: tune the process's memory allocator, see :func:`~kornia_tinyvit.allocator.keep_memory`; it
            affects ``"eager"`` and ``"inductor"`` on a CPU.

    Returns:
        The :class:`Optimized` model; for a classifier, a classifier with such a model, and for a MobileSAM, one with
        such an ``image_encoder``.

    Raises:
        ValueError: if the engine, dtype, method or pixel format is unknown, or the combination is not supported.
        ImportError: if the engine's packages are not installed.

    Example:
        >>> model = TinyViT.from_config("1m", pretrained="cifar10")
        >>> fast = optimize(model, engine="eager", tune_allocator=False)
        >>> fast(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """
    model = without_wrappers(model)
    if isinstance(model, ImageClassifier):
        if pixels is not None:
            raise ValueError("An ImageClassifier takes images in [0, 1]; pixels is supported for a TinyViT.")
        prepare = model.preprocessing
        with torch.no_grad():
            data = [prepare(each) if isinstance(each, Tensor) else (prepare(each[0]), each[1]) for each in calibration]
        network = optimize(
            model.model,
            engine,
            dtype,
            example=None if example is None else prepare(example),
            method=method,
            calibration=data,
            tolerance=tolerance,
            tune_allocator=tune_allocator,
        )
        return ImageClassifier(
            cast("TinyViT", network),
            preprocessing=copy.deepcopy(prepare),
            class_names=model.class_names,
            views=model.views,
        ).eval()
    if isinstance(model, MobileSAM):
        if pixels is not None or method != "forward":
            raise ValueError("A MobileSAM takes images in any form; pixels and method are supported for its encoder.")
        return _optimize_sam(model, engine, dtype, example, calibration, tolerance, tune_allocator)
    return _optimize(model, engine, dtype, example, method, pixels, list(calibration), tolerance, tune_allocator)


def _optimize_sam(
    sam: MobileSAM,
    engine: str | Sequence[str],
    dtype: torch.dtype | None,
    example: Tensor | None,
    calibration: Iterable[Any],
    tolerance: float,
    tune_allocator: bool,
) -> MobileSAM:
    """Return a MobileSAM with an optimized encoder, whose candidates are compared by their masks."""
    photos = [photo for each in calibration for photo in list_images(each)]
    if example is None:
        example = synthetic_images(sam.config, size=sam.img_size).to(next(sam.parameters()).device)
    else:
        example = sam.preprocess(example)[0]

    def replace_encoder(encoder: nn.Module) -> MobileSAM:
        return copy.deepcopy(sam, {id(sam.image_encoder): encoder}).eval()

    @functools.cache
    def comparison() -> MaskComparison:
        return MaskComparison(sam, photos)

    inputs = [sam.preprocess(photo)[0] for photo in photos]
    encoder = _optimize(
        sam.image_encoder, engine, dtype, example, "forward", None, inputs, tolerance, tune_allocator,
        lambda candidate: comparison()(replace_encoder(candidate)),
    )  # fmt: skip
    return replace_encoder(encoder)


def _optimize(
    model: nn.Module,
    engine: str | Sequence[str],
    dtype: torch.dtype | None,
    example: Tensor | None,
    method: str,
    pixels: Pixels | None,
    calibration: Sequence[Tensor | tuple[Tensor, Tensor]],
    tolerance: float,
    tune_allocator: bool,
    measure: Callable[[Optimized], Agreement] | None = None,
) -> Optimized:
    """Optimize a network; ``measure`` compares a candidate with it, by default on the calibration images."""
    if example is None:
        inner = find_network(model, "; give an example of its images")
        example = synthetic_images(inner.config, pixels=pixels or default_pixels(model))
        example = example.to(next(inner.parameters()).device)
    names = list(ENGINES) if engine == "auto" else [engine] if isinstance(engine, str) else list(engine)
    if not names or not ENGINES.keys() >= set(names):
        raise ValueError(f"engine must be auto, {', '.join(ENGINES)} or several of them; got {engine!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None; got {dtype!r}.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0; got {tolerance!r}.")
    if tune_allocator and example.device.type == "cpu":
        keep_memory()
    candidates = Candidates(build_graph(model, method, pixels), calibration)
    if len(names) == 1 and dtype is not None:
        optimized = candidates.make(names[0], dtype, example)
    else:
        optimized = _fastest(candidates, names, DTYPES if dtype is None else (dtype,), example, tolerance, measure)
    candidates.graph.onnx_models.clear()  # an engine may keep the graph, but does not need these any more
    return optimized


def _fastest(
    candidates: Candidates,
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    example: Tensor,
    tolerance: float,
    measure: Callable[[Optimized], Agreement] | None,
) -> Optimized:
    """Compare all candidates with the model, time those within the tolerance and return the fastest."""
    images = candidates.calibration
    make = functools.cache(lambda engine, dtype: candidates.make(engine, dtype, example))
    made: dict[tuple[str, torch.dtype], Optimized] = {}
    choices: dict[tuple[str, torch.dtype], Choice] = {}
    for key in itertools.product(names, dtypes):
        rejected, agreement = candidates.unsupported(*key, example.device), None
        if rejected is None and key[1] != torch.float32 and not images:
            rejected = "low precision needs images to compare on: calibration=..."
        if rejected is None:
            candidate = make(*key)
            if images:
                compare_default = functools.partial(compare, make("eager", torch.float32), batches=images)
                agreement = (measure or compare_default)(candidate)
                rejected = _disagreement(agreement, tolerance)
            if rejected is None:
                made[key] = candidate
        choices[key] = Choice(*key, agreement=agreement, rejected=rejected)
    if not made:
        reasons = "; ".join(f"{each.engine} {each.dtype}: {each.rejected}" for each in choices.values())
        raise ValueError(f"No engine is supported and within the tolerance: {reasons}")
    times = interleaved({key: as_step(candidate, example) for key, candidate in made.items()}, REPETITIONS)
    for key, seconds in times.items():
        choices[key] = dataclasses.replace(choices[key], ms=1000 * seconds)
    best = made[min(times, key=lambda key: times[key])]
    best.choices = tuple(sorted(choices.values(), key=lambda choice: choice.ms or float("inf")))
    return best


def _disagreement(found: Agreement, tolerance: float) -> str | None:
    if found.mask_iou is not None:
        too_low = found.mask_iou < 100 * (1 - tolerance)
        return f"the mean IoU with the masks of the model is {found.mask_iou:.2f} %" if too_low else None
    if found.agreement is not None:
        changed = 1 - found.agreement / 100
        return f"the top-1 class of {changed:.1%} of the images changes" if changed > tolerance else None
    return f"the mean relative error is {found.mean_error:.2g}" if found.mean_error > tolerance else None
