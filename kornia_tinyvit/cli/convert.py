"""``kornia-tinyvit convert``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kornia_tinyvit.checkpoints import open_pretrained, save_checkpoint
from kornia_tinyvit.checkpoints.hub import write_timm_folder
from kornia_tinyvit.cli.options import WeightsRequest
from kornia_tinyvit.cli.requests import command, option
from kornia_tinyvit.model import TinyViT

#: Formats of a converted checkpoint.
Format = StrEnum("Format", ("transformers", "timm", "safetensors"))


@dataclass(frozen=True, kw_only=True)
class ConvertRequest(WeightsRequest):
    """The options of ``convert``."""

    out: Path = option("Output", "Folder to write, or a .safetensors file.")
    format: Format | None = option(
        "Output",
        "transformers: hub folder with preprocessing and model card; timm: hub folder for timm; safetensors: file of "
        "this package. Default: safetensors if --out ends so, else transformers.",
        None,
    )
    name: str | None = option("Output", "Model name in the card. Default: name of the folder.", None)


@command
def convert(request: ConvertRequest) -> None:
    """Convert weights to a folder for the Hugging Face hub, or hub folders to a .safetensors file."""
    out, file = request.out, request.out.suffix == ".safetensors"
    form = request.format or (Format.safetensors if file else Format.transformers)
    if file != (form is Format.safetensors):
        raise ValueError(f"--format {form} contradicts --out {out.name}; only safetensors files end in .safetensors.")
    if form is Format.transformers:
        from kornia_tinyvit.huggingface import save_hub_folder

        save_hub_folder(out, request.pretrained, request.variant, request.name)
    else:
        request.reject_unused(("name",), f"with --format {form}")
        write = save_checkpoint if form is Format.safetensors else write_timm_folder
        write(TinyViT.from_config(pretrained=open_pretrained(request.pretrained, request.variant)), out)
    print(json.dumps({"path": str(out), "format": form}) if request.as_json else out)
