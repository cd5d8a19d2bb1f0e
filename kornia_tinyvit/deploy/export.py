"""Files that other runtimes load: a network is written, run in its new form and compared before it gets its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.config import TinyViTConfig, check_class_names
from kornia_tinyvit.deploy.accuracy import as_list
from kornia_tinyvit.deploy.formats import ExportError
from kornia_tinyvit.deploy.formats.onnx import check_opset, to_onnx, write_onnx
from kornia_tinyvit.deploy.formats.program import check_program, trace_images, write_program
from kornia_tinyvit.deploy.graph import Pixels, build_graph, find_network, synthetic_images
from kornia_tinyvit.files import replacing
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.version import __version__

__all__ = ["ExportError", "ExportTask", "check_difference", "describe", "export_onnx", "export_program"]


def export_onnx(
    model: nn.Module, path: str | Path, *, opset: int = 20, tolerance: float = 1e-4, **settings: Any
) -> Path:
    """Write a network to an ONNX file, folded, and compare it in ONNX Runtime with the network in PyTorch.

    The input is called ``images``; outputs are ``logits``, ``features`` (without a head, or of ``forward_features``),
    ``embedding`` (MobileSAM) or ``stage1`` to ``stage4`` (``forward_intermediates``). The file's metadata tell the
    configuration, the method, what the input has to be and the names of the classes, as JSON under keys that begin
    with ``kornia_tinyvit.``. The file is written beside its place and moved there when it has been checked.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT` or an :class:`~kornia_tinyvit.ImageClassifier`, whose graph takes raw
            photos, resizing and normalization inside; or a module that holds a TinyViT.
        path: the file to write; its folder is made.
        opset: version of the operators: from 20 on Gelu is one of them, from 23 on Attention.
        tolerance: largest difference to accept, of outputs whose values are up to 1, else in proportion.
        **settings: what comes in and out: ``method``, ``pixels``, ``img_size``, ``dynamic_batch``, ``dynamic_size`` and
            ``class_names`` of :class:`ExportTask`.

    Returns:
        The path.

    Raises:
        ExportError: if the outputs differ, or the exporter cannot write the opset.
        ValueError: if the opset is older than 18 or newer than the installed onnx, or a setting is unknown.
        MissingExtraError: if onnx, onnxscript or onnxruntime is not installed.
    """
    check_opset(opset)
    task = ExportTask(model, **settings)
    proto = to_onnx(task.program(), opset, outputs=task.outputs)

    def write(temporary: Path) -> Callable[[Tensor], Any]:
        run = write_onnx(proto, temporary, opset, task.metadata())
        return lambda images: run({"images": images})

    return task.write(path, write, tolerance)


def export_program(
    model: nn.Module, path: str | Path, *, compiled: bool = False, tolerance: float = 1e-4, **settings: Any
) -> Path:
    """Write a network as a program of torch.export, or compiled, load it again and compare it with the network.

    ``torch.export.load(path).module()`` reads a program back, ``torch._inductor.aoti_load_package(path)`` a compiled
    one, which runs without Python as well. The metadata are those of :func:`export_onnx`: a program has
    them in its extra file ``metadata.json``, a compiled one in its ``get_metadata()``.

    Args:
        model: as for :func:`export_onnx`.
        path: the file to write, which has to end in ``.pt2``; its folder is made.
        compiled: compile to machine code with AOTInductor, for the machine it runs on.
        tolerance: as for :func:`export_onnx`.
        **settings: those of :class:`ExportTask`.

    Returns:
        The path.

    Raises:
        ExportError: if the outputs differ, or there is no C++ compiler to compile with.
        ValueError: if the path does not end in ``.pt2``, or a setting is unknown.
    """
    check_program(Path(path), compiled)
    task = ExportTask(model, **settings)
    return task.write(
        path, lambda temporary: write_program(task.program(), temporary, task.metadata(), compiled), tolerance
    )


class ExportTask:
    """What is exported, in whichever format: a graph, what goes in and what comes out.

    Args:
        model: the network, see :func:`export_onnx`.
        method: ``"forward"``, ``"forward_features"`` or ``"forward_intermediates"``.
        pixels: what comes in: ``"normalized"``, ``"unit"`` (floats in [0, 1]) or ``"uint8"``, see
            :func:`~kornia_tinyvit.deploy.build_graph`.
        img_size: side or (height, width) of the images. A network's is its own resolution if left out; a
            classifier's graph then takes photos of any size.
        dynamic_batch: take any number of images; otherwise one.
        dynamic_size: take images of any size; ``img_size`` is then only an example.
        class_names: names of the classes to store; a classifier has its own.

    Attributes:
        graph: the folded :class:`~kornia_tinyvit.deploy.graph.InferenceGraph`.

    Raises:
        ValueError: if there is no TinyViT in the model, or a setting is not one that it can do.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "forward",
        pixels: Pixels | None = None,
        img_size: int | tuple[int, int] | None = None,
        dynamic_batch: bool = True,
        dynamic_size: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> None:
        network, photos = find_network(model, " to export"), isinstance(model, ImageClassifier)
        self.config = config = network.config
        self.preprocessing, self.resizes = network.preprocessing, False
        if isinstance(model, ImageClassifier):
            class_names = model.class_names if class_names is None else class_names
            if isinstance(model.preprocessing, EvaluationPipeline):
                self.preprocessing, self.resizes = model.preprocessing.settings, True
        self.class_names = check_class_names(class_names, config.num_classes)
        self.graph = build_graph(model, method, pixels).eval()
        size = config.img_size if img_size is None else img_size
        self.size = (size, size) if isinstance(size, int) else size
        self.dynamic_batch = dynamic_batch
        self.dynamic_size = dynamic_size or (photos and img_size is None)

    @property
    def outputs(self) -> list[str]:
        """Names of what the graph returns."""
        if self.graph.method == "forward_intermediates":
            return [f"stage{stage}" for stage in range(1, len(self.config.depths) + 1)]
        if self.graph.method == "forward" and self.config.mobile_sam:
            return ["embedding"]
        return ["logits" if self.graph.method == "forward" and self.config.num_classes else "features"]

    def program(self) -> ExportedProgram:
        """Trace the graph."""
        return trace_images(self.graph, self.example_images(1, self.size), self.dynamic_batch, self.dynamic_size)

    def metadata(self) -> dict[str, str]:
        """Describe the network and its input, as JSON by key."""
        told = {
            "pixels": self.graph.pixels,
            "range": {"normalized": None, "unit": [0, 1], "uint8": [0, 255]}[self.graph.pixels],
            "mean": self.preprocessing.mean,
            "std": self.preprocessing.std,
            "normalization_inside": self.graph.pixels != "normalized",
            "img_size": self.preprocessing.img_size,
            "crop_fraction": self.preprocessing.crop_fraction,
            "interpolation": self.preprocessing.interpolation,
            "resize_inside": self.resizes,
        }
        names = {} if self.class_names is None else {"class_names": self.class_names}
        return describe(self.config, method=self.graph.method, input=told, **names)

    def write(self, path: str | Path, write: Callable[[Path], Callable[[Tensor], Any]], tolerance: float) -> Path:
        """Write a file beside its place, compare it with the graph and move it there.

        Args:
            path: the file; its folder is made.
            write: writes the file that it is given and returns what runs it.
            tolerance: see :func:`export_onnx`.

        Raises:
            ExportError: if an output differs; a file that was there before stays.
        """
        path = Path(path)
        with replacing(path, path.suffix) as temporary:
            self._compare(write(temporary), tolerance)
        return path

    def _compare(self, run: Callable[[Tensor], Any], tolerance: float) -> None:
        """Compare with the graph, at two numbers of images and two sizes where they are open."""
        height, width = self.size
        sizes = [(height, width), (height + 37, width + 10)] if self.dynamic_size else [(height, width)]
        for batch in (1, 3) if self.dynamic_batch else (1,):
            for size in sizes:
                images = self.example_images(batch, size)
                with torch.inference_mode():
                    expected, found = as_list(self.graph(images)), as_list(run(images))
                for name, want, have in zip(self.outputs, expected, found, strict=True):
                    check_difference(name, want, have, tolerance)

    def example_images(self, batch: int, size: tuple[int, int]) -> Tensor:
        """Draw images :math:`(B, C, H, W)` as the graph takes them."""
        images = synthetic_images(self.config, batch, size, self.graph.pixels)
        return images.to(next(self.graph.parameters()).dtype) if images.is_floating_point() else images


def describe(config: TinyViTConfig, **facts: Any) -> dict[str, str]:
    """Return the metadata of a file: the version, the configuration and more facts, as JSON by key."""
    facts = {"version": __version__, "config": config.to_dict(), **facts}
    return {f"kornia_tinyvit.{key}": json.dumps(value) for key, value in facts.items()}


def check_difference(name: str, want: Tensor, have: Tensor, tolerance: float) -> None:
    """Refuse an output whose largest difference, of values up to 1, else in proportion, is above the tolerance.

    Args:
        name: name of the output.
        want: what the network returned, :math:`(*)`.
        have: what the export returned.
        tolerance: the largest difference that is accepted.

    Raises:
        ExportError: telling the output and the difference.
    """
    if want.shape != have.shape:
        raise ExportError(f"The export returns {name} of {tuple(have.shape)} instead of {tuple(want.shape)}.")
    difference = float((have - want).abs().max() / want.abs().max().clamp(min=1))
    if not difference <= tolerance:  # NaN is refused too
        raise ExportError(
            f"The export differs from the network by {difference:.2g} in {name}, more than {tolerance:.2g}; nothing "
            "was written."
        )
