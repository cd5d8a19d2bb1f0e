"""From a model to the fastest callable of the same kind: :func:`optimize`."""

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
from kornia_tinyvit.deploy.accuracy import Agreement, compare
from kornia_tinyvit.deploy.engines import ENGINES, Engine
from kornia_tinyvit.deploy.graph import InferenceGraph, Pixels, build_graph, find_network, synthetic_images
from kornia_tinyvit.deploy.measurement import as_step, interleaved
from kornia_tinyvit.model import TinyViT

__all__ = ["Choice", "Optimized", "optimize"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
#: Repetitions that ``engine="auto"`` measures each candidate with.
REPETITIONS = 15


@dataclass(frozen=True)
class Choice:
    """A candidate of ``engine="auto"``.

    Args:
        engine: name of the engine.
        dtype: type it computes in.
        ms: median milliseconds for the example; ``None`` if it was not measured.
        agreement: how far it is from the model in PyTorch; ``None`` without images to judge by.
        rejected: why it was not a candidate for the fastest; ``None`` if it was.
    """

    engine: str
    dtype: torch.dtype
    ms: float | None = None
    agreement: Agreement | None = None
    rejected: str | None = None


class Optimized(nn.Module):
    """A model made fast: called as the model is, with the same results. Made by :func:`optimize`.

    It is for inference and holds its own copy of the weights: what happens to the model later does not reach it.

    Attributes:
        engine: name of the engine that runs it.
        dtype: type that it computes in.
        config: the :class:`~kornia_tinyvit.TinyViTConfig` of a TinyViT.
        pixels: what it takes, see :func:`optimize`.
        warmup_s: seconds that making it and its first run took; the first of several candidates for one engine
            includes the translation of the graph, which the others share.
        choices: what ``engine="auto"`` chose from, the fastest first; empty otherwise.
    """

    def __init__(
        self, graph: InferenceGraph, engine: str, dtype: torch.dtype, example: Tensor, calibration: Iterable[Tensor]
    ) -> None:
        super().__init__()
        began = time.perf_counter()
        self.engine = engine
        self.dtype = dtype
        self.config = getattr(graph.network, "config", None)
        # Tells where images are taken, and in which type, to those who ask a network's parameters for it.
        self.place = nn.Parameter(torch.empty(0, device=example.device), requires_grad=False)
        self.pixels = graph.pixels
        self.choices: tuple[Choice, ...] = ()
        self._run: Engine = ENGINES[engine](graph, example, dtype, calibration)
        self._channels = example.shape[1]
        self._returns_list = graph.method == "forward_intermediates"
        self(example)
        self.warmup_s = time.perf_counter() - began

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Map images :math:`(B, C, H, W)` of any size to what the model returns for them.

        Args:
            images: images as ``pixels`` of :func:`optimize` says, on its device. Those of the example's
                shape are the fastest; the first of another shape may wait for the engine to get ready for it.

        Raises:
            TypeError: if the images are of another type.
            ValueError: if their shape is not the one above, or they are on another device.
            RuntimeError: if a gradient is asked for.
        """
        self._check(images)
        if len(images) == 0:  # an engine need not know how to do nothing
            out = self._run(images.new_zeros(1, *images.shape[1:]))
            out = out[:0] if isinstance(out, Tensor) else tuple(each[:0] for each in out)
        else:
            out = self._run(images)
        return list(out) if self._returns_list else out  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Optimized:
        moved = fn(self.place)
        if (moved.device, moved.dtype) != (self.place.device, self.place.dtype):
            raise RuntimeError(
                "An optimized network stays as it is; optimize the model for the device and type you need."
            )
        return self

    def extra_repr(self) -> str:
        """Show what runs it."""
        return f"engine={self.engine!r}, dtype={self.dtype}, pixels={self.pixels!r}"

    def _check(self, images: Tensor) -> None:
        wanted = "uint8" if self.pixels == "uint8" else "floating point"
        if not isinstance(images, Tensor) or (images.dtype == torch.uint8) != (wanted == "uint8"):
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"This network was optimized for {wanted} images ({self.pixels}); got {got}.")
        if images.ndim != 4 or images.shape[1] != self._channels or min(images.shape[2:]) < 1:
            raise ValueError(f"Images must be (B, {self._channels}, H, W); got {tuple(images.shape)}.")
        if images.device != self.place.device:
            raise ValueError(f"This network was optimized for {self.place.device}; got images on {images.device}.")
        if images.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("An optimized network has no gradients; call the model itself, or detach the images.")


class Candidates:
    """Makes optimized networks of one model, which is folded once for all engines and types.

    Args:
        model: what :func:`optimize` takes, but no classifier.
        method: see :func:`optimize`.
        pixels: see :func:`optimize`.
        calibration: see :func:`optimize`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "forward",
        pixels: Pixels | None = None,
        calibration: Iterable[Tensor | tuple[Tensor, Tensor]] = (),
    ) -> None:
        self.graph = build_graph(model, method, pixels)
        self.calibration = list(calibration)

    def refusal(self, engine: str, dtype: torch.dtype, device: torch.device) -> str | None:
        """Tell in a line why an engine cannot run a type here; ``None`` if it can."""
        missing = ENGINES[engine].missing()
        if missing:
            return missing
        dtypes = ENGINES[engine].dtypes(device)
        if dtype not in dtypes:
            able = ", ".join(map(str, dtypes)) or "nothing"
            return f"engine {engine!r} runs {able} on this {device.type}, not {dtype}"
        if dtype == torch.int8 and not self.calibration:
            return "int8 needs images to find its ranges on: calibration=..."
        return None

    def make(self, engine: str, dtype: torch.dtype, example: Tensor) -> Optimized:
        """Make the model fast by an engine in a type for images like the example.

        Raises:
            ValueError: if the engine does not run the type here.
            ImportError: if the engine's packages are not installed.
        """
        refused = self.refusal(engine, dtype, example.device)
        if refused:
            raise (ImportError if ENGINES[engine].missing() else ValueError)(refused)
        images = [batch if isinstance(batch, Tensor) else batch[0] for batch in self.calibration]
        return Optimized(self.graph, engine, dtype, example, images)


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
    calibration: Iterable[Tensor | tuple[Tensor, Tensor]] = (),
    tolerance: float = 0.01,
    tune_allocator: bool = True,
) -> Optimized | ImageClassifier:
    """Return a callable with the model's signature and results that runs as fast as an engine can.

    Every engine uses as many threads as :func:`torch.get_num_threads` says.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`; an :class:`~kornia_tinyvit.ImageClassifier`; or a module of one
            image batch that holds a TinyViT.
        engine: ``"eager"``, ``"inductor"``, ``"onnxruntime"`` or ``"openvino"``; ``"auto"`` or several names measure
            what is installed and take the fastest whose results are within ``tolerance``.
        dtype: ``torch.float32``, ``torch.bfloat16``, ``torch.int8``, or on a GPU ``torch.float16``; ``None`` lets the
            measurement choose. What an engine does not support on this machine is refused.
        example: images of the shape to be fast at, on the device to run on; if left out, one image of the model's
            resolution.
        method: for a TinyViT also ``"forward_features"`` or ``"forward_intermediates"``.
        pixels: what comes in: ``"normalized"``, ``"unit"`` or ``"uint8"``, see
            :func:`~kornia_tinyvit.deploy.build_graph`.
        calibration: batches of images, as the result will be called with; with labels :math:`(B,)`, pairs. int8
            takes the ranges of its numbers from them, and candidates of ``"auto"`` are judged by them. 100 to 300
            ordinary images are enough.
        tolerance: for ``"auto"``: the largest share of the calibration images whose best class may change; for maps,
            the largest mean relative error. Without images only float32 is tried.
        tune_allocator: keep freed memory in this process, see :func:`~kornia_tinyvit.allocator.keep_memory`; it matters
            for ``"eager"`` and ``"inductor"`` on a CPU.

    Returns:
        The :class:`Optimized` model; for a classifier, a classifier with such a model, which ``predict`` uses too.

    Raises:
        ValueError: if the engine, the type, the method or the pixels are unknown, or do not go together here.
        ImportError: if the engine's packages are not installed.

    Example:
        >>> model = TinyViT.from_config("1m", pretrained="cifar10")
        >>> fast = optimize(model, engine="eager", tune_allocator=False)
        >>> fast(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """
    if isinstance(model, ImageClassifier):
        if pixels is not None:
            raise ValueError("An ImageClassifier takes photos in [0, 1]: pixels belongs to a TinyViT.")
        network = optimize(
            model.model,
            engine,
            dtype,
            example=None if example is None else model.preprocessing(example),
            method=method,
            calibration=_prepared(model, calibration),
            tolerance=tolerance,
            tune_allocator=tune_allocator,
        )
        return ImageClassifier(
            cast("TinyViT", network),
            preprocessing=copy.deepcopy(model.preprocessing),
            class_names=model.class_names,
            views=model.views,
        ).eval()
    if example is None:
        inner = find_network(model, "; give it an example of its images")
        example = synthetic_images(inner.config, pixels=pixels or "normalized").to(next(inner.parameters()).device)
    names = _names(engine)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None; got {dtype!r}.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0; got {tolerance!r}.")
    if tune_allocator and example.device.type == "cpu":
        keep_memory()
    candidates = Candidates(model, method, pixels, calibration)
    if len(names) == 1 and dtype is not None:
        fast = candidates.make(names[0], dtype, example)
    else:
        fast = _fastest(candidates, names, DTYPES if dtype is None else (dtype,), example, tolerance)
    candidates.graph.translated.clear()  # an engine may keep the graph, and has no more use for these
    return fast


def _names(engine: str | Sequence[str]) -> list[str]:
    names = list(ENGINES) if engine == "auto" else [engine] if isinstance(engine, str) else list(engine)
    unknown = [name for name in names if name not in ENGINES]
    if unknown or not names:
        raise ValueError(f"engine must be auto, {', '.join(ENGINES)} or several of them; got {engine!r}.")
    return names


def _fastest(
    candidates: Candidates, names: Sequence[str], dtypes: Sequence[torch.dtype], example: Tensor, tolerance: float
) -> Optimized:
    """Make all candidates, judge them by the images, measure them in turn and return the fastest that will do."""
    images = candidates.calibration
    make = functools.cache(lambda engine, dtype: candidates.make(engine, dtype, example))
    made: dict[tuple[str, torch.dtype], Optimized] = {}
    choices: dict[tuple[str, torch.dtype], Choice] = {}
    for key in itertools.product(names, dtypes):
        refused, agreement = candidates.refusal(*key, example.device), None
        if refused is None and key[1] != torch.float32 and not images:
            refused = "there are no images to judge it by: calibration=..."
        if refused is None:
            candidate = make(*key)
            agreement = compare(make("eager", torch.float32), candidate, images) if images else None
            refused = None if agreement is None else _disagreement(agreement, tolerance)
            if refused is None:
                made[key] = candidate
        choices[key] = Choice(*key, agreement=agreement, rejected=refused)
    if not made:
        told = "; ".join(f"{each.engine} {each.dtype}: {each.rejected}" for each in choices.values())
        raise ValueError(f"No engine can do this within the tolerance: {told}")
    times = interleaved({key: as_step(candidate, example) for key, candidate in made.items()}, REPETITIONS)
    for key, seconds in times.items():
        choices[key] = dataclasses.replace(choices[key], ms=1000 * seconds)
    best = made[min(times, key=lambda key: times[key])]
    best.choices = tuple(sorted(choices.values(), key=lambda choice: choice.ms or float("inf")))
    return best


def _disagreement(found: Agreement, tolerance: float) -> str | None:
    if found.agreement is not None:
        changed = 1 - found.agreement / 100
        return f"the best class of {changed:.1%} of the images changes" if changed > tolerance else None
    return f"the mean relative error is {found.mean_error:.2g}" if found.mean_error > tolerance else None


@torch.no_grad()
def _prepared(
    classifier: ImageClassifier, batches: Iterable[Tensor | tuple[Tensor, Tensor]]
) -> list[Tensor | tuple[Tensor, Tensor]]:
    prepare = classifier.preprocessing
    return [prepare(batch) if isinstance(batch, Tensor) else (prepare(batch[0]), batch[1]) for batch in batches]
