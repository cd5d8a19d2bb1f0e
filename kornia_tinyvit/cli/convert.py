"""``kornia-tinyvit convert``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kornia_tinyvit.checkpoints import Checkpoint, LoadReport, open_pretrained, read_checkpoint, save_checkpoint
from kornia_tinyvit.checkpoints.hub import write_timm_folder
from kornia_tinyvit.cli.options import WeightsRequest
from kornia_tinyvit.cli.requests import command, option
from kornia_tinyvit.model import TinyViT

#: Formats of a converted checkpoint.
Format = StrEnum("Format", ("transformers", "timm", "safetensors"))


@dataclass(frozen=True, kw_only=True)
class ConvertRequest(WeightsRequest):
    """The options of ``convert``."""

    use_ema: bool = option("Weights", "Take the moving average of the weights that the file holds as well.", False)
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
    pretrained: str | bool | Checkpoint = request.pretrained
    if request.use_ema:
        if request.weights is None:
            request.reject_unused(("use_ema",), "without --weights FILE")
        pretrained = read_checkpoint(str(request.weights), use_ema=True)
    found = open_pretrained(pretrained, request.variant)
    request.note(str(LoadReport(found.source, found.layout, left_out=found.left_out, ema=found.ema)))
    if form is Format.transformers:
        from kornia_tinyvit.huggingface import save_hub_folder

        save_hub_folder(out, pretrained, request.variant, request.name)
    else:
        request.reject_unused(("name",), f"with --format {form}")
        write = save_checkpoint if form is Format.safetensors else write_timm_folder
        write(TinyViT.from_config(pretrained=found), out)
    print(json.dumps({"path": str(out), "format": form}) if request.as_json else out)
