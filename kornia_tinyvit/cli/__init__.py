"""The command line, one file a command."""

from __future__ import annotations

import sys

import torch
import typer

from kornia_tinyvit.cli.benchmark import benchmark
from kornia_tinyvit.cli.classify import classify
from kornia_tinyvit.cli.contract import contract
from kornia_tinyvit.cli.convert import convert
from kornia_tinyvit.cli.demo import demo
from kornia_tinyvit.cli.detect import detect
from kornia_tinyvit.cli.distill import distill
from kornia_tinyvit.cli.evaluate import evaluate
from kornia_tinyvit.cli.export import export
from kornia_tinyvit.cli.pretrained import pretrained
from kornia_tinyvit.cli.segment import segment
from kornia_tinyvit.cli.train import train
from kornia_tinyvit.deploy.export import ExportError

__all__ = ["app", "main"]

app = typer.Typer(
    name="kornia-tinyvit",
    help="TinyViT for kornia and PyTorch: classify and segment images, find objects; train, distil, contract, "
    "evaluate and export networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    demo, classify, segment, detect, evaluate, train, contract, export, convert, benchmark, pretrained
):  # fmt: skip
    app.command()(command)
app.add_typer(distill, name="distill")


def main() -> None:
    """Run the command line; what a user can mend is said in a sentence, without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, ExportError) as error:
        print("Error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        print("Error: The memory does not suffice; try fewer images at a time, or smaller ones.", file=sys.stderr)
        raise SystemExit(1) from None


def _lacks_memory(error: Exception) -> bool:
    """Tell whether an error is that of numpy, or of torch on any device, when there is no more memory."""
    # torch has no class of its own for the CPU's.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
