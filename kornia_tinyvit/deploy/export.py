"""Export to ONNX and torch.export, compared with the network before a file is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kornia_tinyvit.backbone import BackboneConfig, BackboneNetwork
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.config import TinyViTConfig, check_class_names
from kornia_tinyvit.deploy.accuracy import as_list
from kornia_tinyvit.deploy.formats import ExportError
from kornia_tinyvit.deploy.formats.onnx import check_opset, to_onnx, write_onnx
from kornia_tinyvit.deploy.formats.program import check_program, trace_images, write_program
from kornia_tinyvit.deploy.graph import Pixels, build_graph, find_network, synthetic_images
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.files import replacing
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import without_wrappers
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.version import __version__

__all__ = ["ExportError", "ExportTask", "check_difference", "describe", "export_onnx", "export_program"]


def export_onnx(
    model: nn.Module, path: str | Path, *, opset: int = 20, tolerance: float = 1e-4, **settings: Any
) -> Path:
    """Export a folded network to ONNX and compare its outputs in ONNX Runtime with the network's.

    The guide :doc:`/guides/onnx` lists the inputs, outputs, dynamic axes and metadata properties of every network. The
    file is written to a temporary name and renamed after the comparison.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT`; an :class:`~kornia_tinyvit.ImageClassifier` or
            :class:`~kornia_tinyvit.TinyViTDetector`, whose graph includes resizing and normalization; a
            :class:`~kornia_tinyvit.SemanticSegmenter`; or another module that contains a TinyViT. For a MobileSAM see
            :func:`export_mobile_sam`.
        path: the file to write; its folder is created.
        opset: opset version: from 20 on Gelu is one operator, from 23 on Attention.
        tolerance: maximum difference, relative to the largest absolute output or 1, whichever is larger.
        **settings: ``method``, ``pixels``, ``img_size``, ``dynamic_batch``, ``dynamic_size`` and ``class_names`` of
            :class:`ExportTask`.

    Returns:
        The path.

    Raises:
        ExportError: if the outputs differ, or the exporter does not support the opset.
        ValueError: if the opset is older than 18 or newer than the installed onnx supports, or a setting is invalid.
        MissingExtraError: if onnx, onnxscript or onnxruntime is not installed.
    """
    check_opset(opset)
    task = ExportTask(model, **settings)
    proto = to_onnx(task.program(), opset, outputs=task.outputs)
    return task.write(path, lambda file: write_onnx(proto, file, opset, task.metadata()), tolerance)


def export_program(
    model: nn.Module, path: str | Path, *, compiled: bool = False, tolerance: float = 1e-4, **settings: Any
) -> Path:
    """Export a folded network with torch.export, load it again and compare its outputs with the network's.

    ``torch.export.load(path).module()`` loads a program. ``torch._inductor.aoti_load_package(path)`` loads a compiled
    one, which also runs without Python. The metadata of :func:`export_onnx` is stored in the extra file
    ``metadata.json`` of a program, and returned by ``get_metadata()`` of a compiled one.

    Args:
        model: see :func:`export_onnx`.
        path: the file to write, which must end in ``.pt2``; its folder is created.
        compiled: compile with AOTInductor for the machine it runs on.
        tolerance: see :func:`export_onnx`.
        **settings: settings of :class:`ExportTask`.

    Returns:
        The path.

    Raises:
        ExportError: if the outputs differ, or ``compiled`` is set and no C++ compiler is found.
        ValueError: if the path does not end in ``.pt2``, or a setting is invalid.
    """
    check_program(Path(path), compiled)
    task = ExportTask(model, **settings)
    program = task.program()
    return task.write(path, lambda file: write_program(program, file, task.metadata(), compiled), tolerance)


class ExportTask:
    """The graph, inputs and outputs of an export, independent of the format.

    Args:
        model: see :func:`export_onnx`.
        method: ``"forward"``, ``"forward_features"`` or ``"forward_intermediates"``.
        pixels: pixel format of the input: ``"normalized"``, ``"unit"`` (floats in [0, 1]) or ``"uint8"``, see
            :func:`~kornia_tinyvit.deploy.build_graph`.
        img_size: side or (height, width) of the images. The default of a network is its own resolution; the default of
            a classifier or detector, which resizes images itself, makes height and width dynamic.
        dynamic_batch: make the batch size dynamic; otherwise it is 1.
        dynamic_size: make height and width dynamic; ``img_size`` is then only an example.
        class_names: class names to store; by default those of the network.

    Attributes:
        graph: the folded :class:`~kornia_tinyvit.deploy.graph.InferenceGraph`.
        outputs: names of the outputs.

    Raises:
        ValueError: if the model contains no TinyViT, is a MobileSAM, or does not support a setting.
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
        model = without_wrappers(model)
        if isinstance(model, MobileSAM):
            raise ValueError("A MobileSAM has two graphs; export it with export_mobile_sam.")
        network = find_network(model, " to export")
        self.kind = _describe_kind(model)
        self.config = model.config if isinstance(model, BackboneNetwork) else network.config
        self.preprocessing, self.resizes = network.preprocessing, isinstance(model, TinyViTDetector)
        if isinstance(model, BackboneNetwork):  # they take whole images
            self.preprocessing = replace(self.preprocessing, crop_fraction=None, interpolation="bicubic")
        if isinstance(model, ImageClassifier) and isinstance(model.preprocessing, EvaluationPipeline):
            self.preprocessing, self.resizes = model.preprocessing.settings, True
        if class_names is None and isinstance(model, (TinyViT, ImageClassifier, BackboneNetwork)):
            class_names = model.class_names
        self.class_names = check_class_names(class_names, self.config.num_classes)
        self.graph = build_graph(model, method, pixels).eval().cpu()
        size = network.config.img_size if img_size is None else img_size
        self.size = (size, size) if isinstance(size, int) else size
        self.dynamic_batch = dynamic_batch
        takes_any_size = isinstance(model, (ImageClassifier, TinyViTDetector)) and img_size is None
        self.dynamic_size = dynamic_size or takes_any_size
        self.outputs = self._name_outputs(model)

    def _name_outputs(self, model: nn.Module) -> list[str]:
        config = find_network(model).config
        if isinstance(model, BackboneNetwork):
            return list(model.output_names)
        if self.graph.method == "forward_intermediates":
            return [f"stage{stage}" for stage in range(1, len(config.depths) + 1)]
        if self.graph.method == "forward" and isinstance(model, (TinyViT, ImageClassifier)):
            return ["embedding" if config.mobile_sam else "logits" if config.num_classes else "features"]
        if isinstance(model, TinyViT):
            return ["features"]
        with torch.inference_mode():
            count = len(as_list(self.graph(self.example_images(1, self.size))))
        return ["output"] if count == 1 else [f"output{number}" for number in range(1, count + 1)]

    def program(self) -> ExportedProgram:
        """Trace the graph.

        Returns:
            The exported program.
        """
        return trace_images(self.graph, self.example_images(1, self.size), self.dynamic_batch, self.dynamic_size)

    def metadata(self) -> dict[str, str]:
        """Return the metadata properties of the network and its input, see :func:`describe`."""
        pixels = self.graph.pixels
        input_format = self.preprocessing.to_dict() | {
            "pixels": pixels,
            "range": {"normalized": None, "unit": [0, 1], "uint8": [0, 255]}[pixels],
            "normalization_inside": pixels != "normalized",
            "resize_inside": self.resizes,
        }
        names = {} if self.class_names is None else {"class_names": self.class_names}
        return describe(self.config, kind=self.kind, method=self.graph.method, input=input_format, **names)

    def write(self, path: str | Path, write: Callable[[Path], Callable[[Tensor], Any]], tolerance: float) -> Path:
        """Write a file to a temporary name, compare it with the graph and rename it.

        Args:
            path: the file; its folder is created.
            write: writes to the given path and returns the loaded export.
            tolerance: see :func:`export_onnx`.

        Returns:
            The path.

        Raises:
            ExportError: if an output differs; an existing file at ``path`` is kept.
        """
        path = Path(path)
        with replacing(path, path.suffix) as temporary:
            self._compare(write(temporary), tolerance)
        return path

    def _compare(self, run: Callable[[Tensor], Any], tolerance: float) -> None:
        """Compare an export with the graph, at two batch sizes and two image sizes where they are dynamic."""
        height, width = self.size
        sizes = [(height, width), (height + 37, width + 10)] if self.dynamic_size else [(height, width)]
        for batch in (1, 3) if self.dynamic_batch else (1,):
            for size in sizes:
                images = self.example_images(batch, size)
                with torch.inference_mode():
                    outputs = as_list(self.graph(images)), as_list(run(images))
                if self.outputs == list(TinyViTDetector.output_names):
                    outputs = outputs[0], _match_queries(*outputs)
                for name, expected, found in zip(self.outputs, *outputs, strict=True):
                    check_difference(name, expected, found, tolerance)

    def example_images(self, batch: int, size: tuple[int, int]) -> Tensor:
        """Return images :math:`(B, C, H, W)` in the pixel format of the graph.

        Args:
            batch: number of images.
            size: height and width in pixels.
        """
        images = synthetic_images(find_network(self.graph).config, batch, size, self.graph.pixels)
        return images.to(next(self.graph.parameters()).dtype) if images.is_floating_point() else images


def _describe_kind(model: nn.Module) -> str:
    if isinstance(model, BackboneNetwork):
        return model.kind
    kinds = {TinyViT: "network", ImageClassifier: "classifier"}
    return next((name for kind, name in kinds.items() if isinstance(model, kind)), "module")


def _match_queries(expected: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    """Return the queries of a detector in the order of the most similar ones of another.

    Queries are sorted by their scores in the first stage, so rounding swaps those of almost equal scores.

    Args:
        expected: logits :math:`(B, Q, K)` and boxes :math:`(B, Q, 4)`.
        found: outputs of the same shapes, or of others, which are returned as they are.
    """
    if [each.shape for each in expected] != [each.shape for each in found]:
        return list(found)
    order = torch.cdist(torch.cat(list(expected), -1), torch.cat(list(found), -1)).argmin(-1, keepdim=True)
    return [each.gather(1, order.expand(-1, -1, each.shape[-1])) for each in found]


def describe(config: TinyViTConfig | BackboneConfig, **properties: Any) -> dict[str, str]:
    """Return metadata properties: the package's version, the configuration and others, as JSON by key.

    Args:
        config: configuration of the network.
        **properties: further properties.
    """
    properties = {"version": __version__, "config": config.to_dict(), **properties}
    return {f"kornia_tinyvit.{key}": json.dumps(value) for key, value in properties.items()}


def check_difference(name: str, expected: Tensor, found: Tensor, tolerance: float) -> None:
    """Raise an error if an output of an export differs from the network's.

    Args:
        name: name of the output.
        expected: output of the network, of any shape.
        found: output of the export.
        tolerance: see :func:`export_onnx`.

    Raises:
        ExportError: if the shapes differ, or the difference is NaN or above the tolerance.
    """
    if expected.shape != found.shape:
        raise ExportError(f"The export returns {name} of {tuple(found.shape)} instead of {tuple(expected.shape)}.")
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= tolerance:  # also true for NaN
        raise ExportError(
            f"The export differs from the network by {difference:.2g} in {name}, more than {tolerance:.2g}; nothing "
            "was written."
        )
