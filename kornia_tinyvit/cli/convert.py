"""``kornia-tinyvit convert``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from kornia_tinyvit.checkpoints import open_pretrained, save_checkpoint
from kornia_tinyvit.checkpoints.hub import write_timm_folder
from kornia_tinyvit.cli import options
from kornia_tinyvit.cli.requests import Request, command
from kornia_tinyvit.model import TinyViT

#: Formats of a converted checkpoint.
Format = StrEnum("Format", ("transformers", "timm", "safetensors"))


@dataclass(frozen=True, kw_only=True)
class ConvertRequest(Request):
    """The options of ``convert``."""

    variant: options.Variant = None
    weights: options.Weights = None
    out: Annotated[Path, options.output_option(help="Folder to write, or a .safetensors file.")]
    format: Annotated[
        Format | None,
        options.output_option(
            help="transformers: hub folder with preprocessing and model card; timm: hub folder for timm; safetensors: "
            "file of this package. Default: safetensors if --out ends so, else transformers."
        ),
    ] = None
    name: Annotated[str | None, options.output_option(help="Model name in the card. Default: name of the folder.")] = (
        None
    )


@command
def convert(request: ConvertRequest) -> None:
    """Convert weights to a folder for the Hugging Face hub, or hub folders to a .safetensors file."""
    out, file = request.out, request.out.suffix == ".safetensors"
    form = request.format or (Format.safetensors if file else Format.transformers)
    if file != (form is Format.safetensors):
        raise ValueError(f"--format {form} contradicts --out {out.name}; only safetensors files end in .safetensors.")
    if form is not Format.transformers:
        request.reject_unused(("name",), f"with --format {form}")
    variant, weights = request.variant, request.weights
    if weights is None and variant is None:
        variant, weights = "1m", "cifar10"
    if form is Format.transformers:
        from kornia_tinyvit.huggingface import save_hub_folder

        save_hub_folder(out, weights or True, variant, request.name)
    else:
        write = save_checkpoint if form is Format.safetensors else write_timm_folder
        write(TinyViT.from_config(pretrained=open_pretrained(weights or True, variant)), out)
    print(json.dumps({"path": str(out), "format": form}) if request.as_json else out)
