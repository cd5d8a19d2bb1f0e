"""``kornia-tinyvit export``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from kornia_tinyvit.checkpoints import open_pretrained
from kornia_tinyvit.cli import options
from kornia_tinyvit.cli.requests import Request, command
from kornia_tinyvit.deploy.accuracy import as_list
from kornia_tinyvit.deploy.export import ExportTask, export_onnx, export_program
from kornia_tinyvit.model import TinyViT

Format = StrEnum("Format", ("onnx", "pt2"))
#: Methods of a network that a graph can hold.
Method = StrEnum("Method", ("forward", "forward_features", "forward_intermediates"))
#: Pixel formats of the input.
Pixels = StrEnum("Pixels", ("normalized", "unit", "uint8"))


graph_option = partial(typer.Option, rich_help_panel="Graph")


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Request):
    """The options of ``export``."""

    variant: options.Variant = None
    weights: options.Weights = None
    img_size: options.ImgSize = None
    photos: Annotated[
        bool, graph_option("--photos", help="Include resizing, cropping and normalization of photos of any size.")
    ] = False
    pixels: Annotated[
        Pixels | None,
        graph_option(help="Input: normalized (default), unit (0 to 1, default with --photos) or uint8."),
    ] = None
    method: Annotated[Method, graph_option(help="Method of the network to export.")] = Method.forward
    dynamic_size: Annotated[bool, graph_option("--dynamic-size", help="Make height and width dynamic.")] = False
    opset: Annotated[int | None, graph_option(help="ONNX opset version. Default: 20.")] = None
    compiled: Annotated[
        bool, graph_option("--compiled", help="Compile a .pt2 file with AOTInductor for machines of this kind.")
    ] = False
    out: Annotated[Path, options.output_option(help="File to write: .onnx, or .pt2 for torch.export.")]
    format: Annotated[Format | None, options.output_option(help="onnx or pt2. Default: the ending of --out.")] = None


@command
def export(request: ExportRequest) -> None:
    """Export a network to ONNX or torch.export.

    The file is compared with the network before it is written; if the outputs differ, there is no file.
    """
    form = _choose_format(request)
    if form is Format.onnx:
        request.reject_unused(("compiled",), "with --format onnx")
    else:
        request.reject_unused(("opset",), "with --format pt2")
    if request.photos:
        request.reject_unused(("dynamic_size",), "with --photos, which takes any size")
    out = request.out
    model, class_names = _build(request)
    settings: dict[str, Any] = {
        "method": request.method.value,
        "pixels": request.pixels and request.pixels.value,
        "dynamic_size": request.dynamic_size,
        "class_names": class_names,
    }
    report = {"path": str(out), "format": form, **_describe(model, **settings)}
    if form is Format.onnx:
        export_onnx(model, out, opset=20 if request.opset is None else request.opset, **settings)
    else:
        export_program(model, out, compiled=request.compiled, **settings)
    report["bytes"] = out.stat().st_size
    if request.as_json:
        print(json.dumps(report))
        return
    outputs = ", ".join(_shape(shape) for shape in report["outputs"])
    source = f"{_shape(report['input'])} {report['dtype']}, {report['pixels']}"
    print(f"{out}: {report['bytes'] / 1e6:.1f} MB, from images {source}, to {outputs}")


def _choose_format(request: ExportRequest) -> Format:
    ending = request.out.suffix.removeprefix(".")
    if request.format is None and ending not in list(Format):
        raise ValueError(f"--out must end in .onnx or .pt2; got {request.out.name}.")
    form = request.format or Format(ending)
    if ending in list(Format) and ending != form:
        raise ValueError(f"--format {form} contradicts the ending of --out {request.out.name}; change one of them.")
    return form


def _build(request: ExportRequest) -> tuple[nn.Module, tuple[str, ...] | None]:
    """Build the network and return it with its class names; an encoder of MobileSAM has none."""
    variant, weights, img_size = request.variant, request.weights, request.img_size
    if variant is not None or weights is not None:
        checkpoint = open_pretrained(weights or True, variant, img_size=img_size)
        if checkpoint.config.mobile_sam and not request.photos:
            return options.build_network(TinyViT, variant, checkpoint, "cpu", img_size), None
    classifier = options.build_classifier(variant, weights, "cpu", img_size)
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


def _shape(sizes: list[str | int]) -> str:
    return f"({', '.join(map(str, sizes))})"
