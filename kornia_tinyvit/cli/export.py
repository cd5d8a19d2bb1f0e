"""``kornia-tinyvit export``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kornia_tinyvit.checkpoints import open_pretrained
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli.options import NetworkRequest
from kornia_tinyvit.cli.requests import command, option
from kornia_tinyvit.deploy.accuracy import as_list
from kornia_tinyvit.deploy.export import ExportTask, export_onnx, export_program
from kornia_tinyvit.model import TinyViT

Format = StrEnum("Format", ("onnx", "pt2"))
#: Methods of a network that a graph can hold.
Method = StrEnum("Method", ("forward", "forward_features", "forward_intermediates"))
#: Pixel formats of the input.
Pixels = StrEnum("Pixels", ("normalized", "unit", "uint8"))


@dataclass(frozen=True, kw_only=True)
class ExportRequest(NetworkRequest):
    """The options of ``export``."""

    device: str = "cpu"  # no option: graphs are traced and compared on the CPU
    photos: bool = option("Graph", "Include resizing, cropping and normalization of photos of any size.", False)
    pixels: Pixels | None = option(
        "Graph", "Input: normalized (default), unit (0 to 1, default with --photos) or uint8.", None
    )
    method: Method = option("Graph", "Method of the network to export.", Method.forward)
    dynamic_size: bool = option("Graph", "Make height and width dynamic.", False)
    opset: int | None = option("Graph", "ONNX opset version. Default: 20.", None)
    compiled: bool = option("Graph", "Compile a .pt2 file with AOTInductor for machines of this kind.", False)
    out: Path = option("Output", "File to write: .onnx, or .pt2 for torch.export.")
    format: Format | None = option("Output", "onnx or pt2. Default: the ending of --out.", None)


@command
def export(request: ExportRequest) -> None:
    """Export a network to ONNX or torch.export.

    The file is compared with the network before it is written; if the outputs differ, there is no file.
    """
    out, ending = request.out, request.out.suffix.removeprefix(".")
    form = request.format or ending
    if form not in list(Format):
        raise ValueError(f"--out must end in .onnx or .pt2; got {out.name}.")
    if ending in list(Format) and ending != form:
        raise ValueError(f"--format {form} contradicts the ending of --out {out.name}; change one of them.")
    request.reject_unused(("compiled",) if form == Format.onnx else ("opset",), f"with --format {form}")
    if request.photos:
        request.reject_unused(("dynamic_size",), "with --photos, which takes any size")
    model, class_names = _build(request)
    pixels = request.pixels and request.pixels.value
    settings: dict[str, Any] = {"method": request.method.value, "pixels": pixels, "class_names": class_names}
    settings["dynamic_size"] = request.dynamic_size
    report = {"path": str(out), "format": form, **_describe(model, **settings)}
    if form == Format.onnx:
        export_onnx(model, out, opset=20 if request.opset is None else request.opset, **settings)
    else:
        export_program(model, out, compiled=request.compiled, **settings)
    report["bytes"] = out.stat().st_size
    if request.as_json:
        print(json.dumps(report))
        return
    shape, *outputs = (f"({', '.join(map(str, sizes))})" for sizes in (report["input"], *report["outputs"]))
    source = f"{shape} {report['dtype']}, {report['pixels']}"
    print(f"{out}: {report['bytes'] / 1e6:.1f} MB, from images {source}, to {', '.join(outputs)}")


def _build(request: ExportRequest) -> tuple[nn.Module, tuple[str, ...] | None]:
    """Build the network and return it with its class names; an encoder of MobileSAM has none."""
    checkpoint = open_pretrained(request.pretrained, request.variant, request.img_size)
    if checkpoint.config.mobile_sam and not request.photos:
        return request.build_network(TinyViT, checkpoint), None
    classifier = request.build_network(ImageClassifier, checkpoint)
    return classifier if request.photos else classifier.model, classifier.class_names


@torch.inference_mode()
def _describe(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """Return the shapes of input and outputs, with letters for dynamic sizes."""
    task = ExportTask(model, **settings)
    images = task.example_images(1, task.size)
    sides = ("H", "W") if task.dynamic_size else task.size
    return {
        "method": task.graph.method,
        "pixels": task.graph.pixels,
        "dtype": str(images.dtype).removeprefix("torch."),
        "input": ["B", images.shape[1], *sides],
        "outputs": [["B", *output.shape[1:]] for output in as_list(task.graph(images))],
    }
