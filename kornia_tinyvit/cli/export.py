"""``kornia-tinyvit export``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kornia_tinyvit.backbone import BackboneNetwork
from kornia_tinyvit.checkpoints import open_pretrained
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli.options import NetworkRequest
from kornia_tinyvit.cli.requests import command, option
from kornia_tinyvit.deploy.accuracy import as_list
from kornia_tinyvit.deploy.export import ExportTask, export_onnx, export_program
from kornia_tinyvit.deploy.sam import export_mobile_sam
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.sam import MobileSAM
from kornia_tinyvit.semantic import SemanticSegmenter

Format = StrEnum("Format", ("onnx", "pt2"))
#: Methods of a network that a graph can hold.
Method = StrEnum("Method", ("forward", "forward_features", "forward_intermediates"))
#: Pixel formats of the input.
Pixels = StrEnum("Pixels", ("normalized", "unit", "uint8"))
OPSET = 20


@dataclass(frozen=True, kw_only=True)
class ExportRequest(NetworkRequest):
    """The options of ``export``."""

    device: str = "cpu"  # no option: graphs are traced and compared on the CPU
    photos: bool = option("Graph", "Include resizing, cropping and normalization of photos of any size.", False)
    pixels: Pixels | None = option(
        "Graph",
        "Input: normalized (default of a classifier without --photos), unit (0 to 1, default of the others) or uint8.",
        None,
    )
    method: Method = option("Graph", "Method of the network to export.", Method.forward)
    dynamic_size: bool = option("Graph", "Make height and width dynamic.", False)
    opset: int | None = option("Graph", f"ONNX opset version. Default: {OPSET}.", None)
    compiled: bool = option("Graph", "Compile a .pt2 file with AOTInductor for machines of this kind.", False)
    out: Path = option(
        "Output", "File to write: .onnx, or .pt2 for torch.export. A MobileSAM is two .onnx files, NAME.encoder.onnx "
        "and NAME.decoder.onnx, or encoder.onnx and decoder.onnx in a folder.",
    )  # fmt: skip
    format: Format | None = option("Output", "onnx or pt2. Default: the ending of --out.", None)


@command
def export(request: ExportRequest) -> None:
    """Export a network to ONNX or torch.export: classifiers, segmenters, detectors, backbones and MobileSAM.

    The file is compared with the network before it is written; if the outputs differ, there is no file.
    """
    form, out = _find_format(request), request.out
    model, class_names = _build(request)
    if isinstance(model, MobileSAM):
        _export_mobile_sam(request, model, form)
        return
    if not form:
        raise ValueError(f"--out must end in .onnx or .pt2; got {out.name}. Only a MobileSAM is written to a folder.")
    request.reject_unused(("compiled",) if form == Format.onnx else ("opset",), f"with --format {form}")
    if isinstance(model, (ImageClassifier, TinyViTDetector)):
        what = "--photos, which takes" if request.photos else "a detector, which takes images of"
        request.reject_unused(("dynamic_size",), f"with {what} any size")
    pixels = request.pixels and request.pixels.value
    settings: dict[str, Any] = {"method": request.method.value, "pixels": pixels, "class_names": class_names}
    settings["dynamic_size"] = request.dynamic_size
    report = {"path": str(out), "format": form, **_describe(model, **settings)}
    if form == Format.onnx:
        export_onnx(model, out, opset=request.opset or OPSET, **settings)
    else:
        export_program(model, out, compiled=request.compiled, **settings)
    report["bytes"] = out.stat().st_size
    if request.as_json:
        print(json.dumps(report))
        return
    outputs = ", ".join(f"{name} {_shape(sizes)}" for name, sizes in report["outputs"].items())
    values = {"normalized": "normalized", "unit": "in [0, 1]", "uint8": "in [0, 255]"}[report["pixels"]]
    source = f"images {_shape(report['input'])}, {report['dtype']} {values}"
    print(f"{out}: {report['bytes'] / 1e6:.1f} MB, from {source}, to {outputs}")


def _find_format(request: ExportRequest) -> str:
    """Return the format, or nothing for a folder."""
    ending = request.out.suffix.removeprefix(".")
    form = request.format or ending
    if form and form not in list(Format):
        raise ValueError(f"--out must end in .onnx or .pt2; got {request.out.name}.")
    if ending in list(Format) and ending != form:
        raise ValueError(f"--format {form} contradicts the ending of --out {request.out.name}; change one of them.")
    return form


def _shape(sizes: list[Any]) -> str:
    return f"({', '.join(map(str, sizes))})"


def _export_mobile_sam(request: ExportRequest, sam: MobileSAM, form: str) -> None:
    """Export the encoder and the decoder of a whole MobileSAM."""
    out = request.out
    if form == Format.pt2:
        raise ValueError("A MobileSAM is exported to ONNX only; give --out NAME.onnx or a folder.")
    request.reject_unused(("photos", "pixels", "method", "dynamic_size", "compiled"), "with a MobileSAM")
    folder, prefix = (out.parent, f"{out.stem}.") if out.suffix == ".onnx" else (out, "")
    paths = export_mobile_sam(sam, folder, prefix=prefix, opset=request.opset or OPSET)
    request.note(f"A MobileSAM is two files: {paths[0]} runs once per image, {paths[1]} for each set of prompts.")
    sizes = [path.stat().st_size for path in paths]
    if request.as_json:
        print(json.dumps({"paths": [str(path) for path in paths], "format": "onnx", "bytes": sizes}))
        return
    for path, size in zip(paths, sizes, strict=True):
        print(f"{path}: {size / 1e6:.1f} MB")


def _build(request: ExportRequest) -> tuple[nn.Module, tuple[str, ...] | None]:
    """Build the network that the weights belong to, and return it with the class names of a TinyViT."""
    kinds: tuple[type[BackboneNetwork], ...] = (SemanticSegmenter, TinyViTDetector)
    for kind in kinds:
        if request.weights is not None and kind.is_stored_in(request.weights, request.variant):
            request.reject_unused(("photos", "method"), f"with a {kind.kind}, which takes photos")
            return request.build_network(kind, request.weights), None
    checkpoint = open_pretrained(request.pretrained, request.variant, request.img_size)
    if checkpoint.config.mobile_sam and checkpoint.others:
        return request.build_network(MobileSAM, request.pretrained), None
    if not (request.photos or checkpoint.config.num_classes):
        return request.build_network(TinyViT, checkpoint), None
    classifier = request.build_network(ImageClassifier, checkpoint)
    return classifier if request.photos else classifier.model, classifier.class_names


@torch.inference_mode()
def _describe(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """Return the shapes of input and outputs, with letters for dynamic sizes."""
    task = ExportTask(model, **settings)
    images = task.example_images(1, task.size)
    sides = ("H", "W") if task.dynamic_size else task.size
    outputs = zip(task.outputs, as_list(task.graph(images)), strict=True)
    return {
        "method": task.graph.method,
        "pixels": task.graph.pixels,
        "dtype": str(images.dtype).removeprefix("torch."),
        "input": ["B", images.shape[1], *sides],
        "outputs": {name: ["B", *output.shape[1:]] for name, output in outputs},
    }
