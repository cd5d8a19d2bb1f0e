"""The command line: a module per command."""

from __future__ import annotations

import shlex
import sys
import warnings
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from kornia_tinyvit.cli import distill
from kornia_tinyvit.cli.benchmark import benchmark
from kornia_tinyvit.cli.classify import classify
from kornia_tinyvit.cli.contract import contract
from kornia_tinyvit.cli.convert import convert
from kornia_tinyvit.cli.demo import demo
from kornia_tinyvit.cli.detect import detect
from kornia_tinyvit.cli.evaluate import evaluate
from kornia_tinyvit.cli.export import export
from kornia_tinyvit.cli.pretrained import pretrained
from kornia_tinyvit.cli.segment import segment
from kornia_tinyvit.cli.train import train
from kornia_tinyvit.deploy.export import ExportError
from kornia_tinyvit.version import __version__

__all__ = ["app", "main"]

OVERVIEW = """TinyViT for kornia and PyTorch.

Classify photos:                       kornia-tinyvit classify photo.jpg
Segment objects:                       kornia-tinyvit segment photo.jpg --point 200,150
Detect objects:                        kornia-tinyvit detect photo.jpg --weights runs/train/best.safetensors
Train, evaluate, distill or contract:  kornia-tinyvit train photos --variant 1m --weights cifar10 --recipe cifar10
Export to other runtimes:              kornia-tinyvit export --out network.onnx

All commands: kornia-tinyvit --help. Options of one: kornia-tinyvit classify --help."""
EXIT_CODES = "Exit codes: 0 success, 1 error or failed check, 2 wrong usage, 130 interrupted."
COMMANDS = (
    (demo, "demo photo.jpg"),
    (classify, "classify photo.jpg --top-k 3"),
    (segment, "segment photo.jpg --point 200,150"),
    (detect, "detect photo.jpg --weights runs/train/best.safetensors"),
    (train, "train photos --variant 1m --weights cifar10 --recipe cifar10 --out runs/photos"),
    (evaluate, "evaluate photos --weights runs/photos/best.safetensors --per-class"),
    (distill.save, "distill save photos labels --teacher 21m/in22k"),
    (distill.check, "distill check photos labels --teacher 21m/in22k"),
    (distill.train, "distill train photos labels --variant 5m"),
    (contract, "contract photos --variant 5m --weights in1k --max-parameters 3M"),
    (export, "export --weights runs/photos/best.safetensors --out network.onnx"),
    (convert, "convert --variant 5m --weights in1k --out tinyvit-5m"),
    (benchmark, "benchmark --variant 5m --engines eager,onnxruntime"),
    (pretrained, "pretrained --variant 5m"),
)
RESUMABLE = ("train ", "contract ", "distill save ", "distill train ")
# Newer versions of typer contain click instead of depending on it.
UsageError: Any = typer.BadParameter.__mro__[1]


class _Group(TyperGroup):
    """Commands in the order of :data:`COMMANDS`; typer lists groups first."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return [*dict.fromkeys(example.split()[0] for _, example in COMMANDS)]


app = typer.Typer(
    name="kornia-tinyvit", cls=_Group, epilog=EXIT_CODES, add_completion=False, pretty_exceptions_enable=False
)
distill_app = typer.Typer(help="Distill with stored soft labels: save, check, train.", no_args_is_help=True)
app.add_typer(distill_app, name="distill")
for run, example in COMMANDS:
    (distill_app if example.startswith("distill ") else app).command(epilog=f"Example: kornia-tinyvit {example}")(run)


@app.callback(invoke_without_command=True)
def overview(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """TinyViT for kornia and PyTorch: classify, segment and detect; train, distill, contract, evaluate and export."""
    if version:
        print(f"kornia-tinyvit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(OVERVIEW)


def main() -> None:
    """Run the command line; errors are one or two lines on stderr.

    Raises:
        SystemExit: with the exit code, if it is not 0.
    """
    message = ""
    warnings.formatwarning = lambda warning, *_, **__: f"Warning: {warning}\n"
    try:
        code = app(prog_name="kornia-tinyvit", standalone_mode=False) or 0
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "kornia-tinyvit"
        code, message = 2, f"Error: {' '.join(error.format_message().split())}\nSee {command} --help."
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, ExportError) as error:
        code, message = 1, f"Error: {' '.join(str(error).split())}"
    except (MemoryError, RuntimeError) as error:
        # torch has no class for this error of the CPU.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        code, message = 1, "Error: Out of memory; use a smaller batch or smaller images."
    if code == 130:  # typer turns KeyboardInterrupt into this exit code
        resumable = " ".join(sys.argv[1:]).startswith(RESUMABLE)
        resume = f" Resume: {shlex.join(['kornia-tinyvit', *sys.argv[1:]])}" if resumable else ""
        message = f"Interrupted.{resume}"
    if message:
        print(message, file=sys.stderr)
    if code:
        raise SystemExit(code)
