"""``kornia-tinyvit export``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from kornia_tinyvit.checkpoints import open_pretrained
from kornia_tinyvit.cli.options import ImgSize, Json, Pretrained, Variant, build_classifier, build_network
from kornia_tinyvit.deploy.accuracy import as_list
from kornia_tinyvit.deploy.export import ExportTask, export_onnx, export_program
from kornia_tinyvit.model import TinyViT

#: What a network computes.
Method = StrEnum("Method", ("forward", "forward_features", "forward_intermediates"))


#: What images are made of.
Pixels = StrEnum("Pixels", ("normalized", "unit", "uint8"))


def export(
    out: Annotated[Path, typer.Argument(help="File to write: .onnx, or .pt2 for torch.export.")],
    variant: Variant = None,
    pretrained: Pretrained = None,
    img_size: ImgSize = None,
    photos: Annotated[
        bool, typer.Option("--photos", help="Start from photos of any size: the graph resizes, crops and normalizes.")
    ] = False,
    pixels: Annotated[
        Pixels | None,
        typer.Option(help="What comes in: normalized (the default), unit (0 to 1; the default of photos) or uint8."),
    ] = None,
    method: Annotated[Method, typer.Option(help="What the graph returns.")] = Method.forward,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Take images of any size.")] = False,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators. Default: 20.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile a .pt2 for this kind of machine.")] = False,
    as_json: Json = False,
) -> None:
    """Write a network to a file that other runtimes load; without --variant, the network in the package.

    What was written is run and compared with the network; if it differs, nothing is left behind.
    """
    if out.suffix not in {".onnx", ".pt2"}:
        raise ValueError(f"The file's ending tells its format, .onnx or .pt2; got {out.name}.")
    if out.suffix == ".onnx" and compiled:
        raise ValueError("--compiled is for .pt2 files.")
    if out.suffix == ".pt2" and opset is not None:
        raise ValueError("--opset is for .onnx files.")
    model, class_names = _build(variant, pretrained, img_size, photos)
    settings: dict[str, Any] = {
        "method": method.value,
        "pixels": pixels and pixels.value,
        "dynamic_size": dynamic_size,
        "class_names": class_names,
    }
    report = {"path": str(out), **_describe(model, **settings)}
    if out.suffix == ".onnx":
        export_onnx(model, out, opset=20 if opset is None else opset, **settings)
    else:
        export_program(model, out, compiled=compiled, **settings)
    report["bytes"] = out.stat().st_size
    if as_json:
        print(json.dumps(report))
        return
    outputs = ", ".join(_shape(shape) for shape in report["outputs"])
    taken = f"{_shape(report['input'])} {report['dtype']}, {report['pixels']}"
    print(f"{out}: {report['bytes'] / 1e6:.1f} MB, from images {taken}, to {outputs}")


def _build(
    variant: str | None, pretrained: str | None, img_size: int | None, photos: bool
) -> tuple[nn.Module, tuple[str, ...] | None]:
    """Build the network and tell its classes; MobileSAM's encoder has none, so it is no classifier."""
    if variant is not None or pretrained is not None:
        checkpoint = open_pretrained(pretrained or True, variant, img_size=img_size)
        if checkpoint.config.mobile_sam and not photos:
            return build_network(TinyViT, variant, checkpoint, "cpu", img_size), None
    classifier = build_classifier(variant, pretrained, "cpu", img_size)
    return classifier if photos else classifier.model, classifier.class_names


@torch.inference_mode()
def _describe(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """Return shapes of input and outputs; sizes that are left open are letters, and outputs those of the usual size."""
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
