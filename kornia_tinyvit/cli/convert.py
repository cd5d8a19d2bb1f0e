"""``kornia-tinyvit convert``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kornia_tinyvit.checkpoints import open_pretrained, save_checkpoint
from kornia_tinyvit.checkpoints.hub import write_timm_folder
from kornia_tinyvit.cli.options import Pretrained, Variant, refuse_idle
from kornia_tinyvit.model import TinyViT

__all__ = ["Layout", "convert"]


#: What a converted checkpoint is for.
Layout = StrEnum("Layout", ("transformers", "timm", "file"))


def convert(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="The folder to write; with --layout file the .safetensors file.")],
    variant: Variant = None,
    pretrained: Pretrained = None,
    layout: Annotated[
        Layout,
        typer.Option(
            help="transformers: a hub folder with preprocessing and a model card; timm: a hub folder for timm; "
            "file: this package's own file.",
        ),
    ] = Layout.transformers,
    name: Annotated[
        str | None, typer.Option(help="What the model card calls the model. Default: the folder's name.")
    ] = None,
) -> None:
    """Write weights as a folder for the Hugging Face hub, or hub folders as one of this package's files.

    The weights may be a name that 'pretrained' lists, a file, a URL, or a hub folder of transformers or timm.
    """
    if layout is not Layout.transformers:
        refuse_idle(context, ("name",), f"with --layout {layout}")
    if pretrained is None and variant is None:
        variant, pretrained = "1m", "cifar10"
    if layout is Layout.transformers:
        from kornia_tinyvit.huggingface import save_hub_folder

        save_hub_folder(out, pretrained or True, variant, name)
    else:
        write = save_checkpoint if layout is Layout.file else write_timm_folder
        write(TinyViT.from_config(pretrained=open_pretrained(pretrained or True, variant)), out)
    print(out)
