"""Run the command line, and read its output."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kornia_tinyvit import TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.cli import app, main

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTOS = ASSETS / "photos"


def make_weights(model: TinyViT, folder: Path) -> str:
    """Write a network of ten named classes to a file."""
    model.reset_classifier(10)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return str(save_checkpoint(model, folder / "weights.safetensors", CIFAR))


def run_both(*arguments: str) -> tuple[str, str]:
    """Run the command line in this process and return its stdout and stderr."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def run(*arguments: str) -> str:
    """Run the command line in this process and return its stdout."""
    return run_both(*arguments)[0]


def error_of(capfd, monkeypatch, *arguments: str) -> str:
    """Run the command line in this process, expect exit code 1, and return the line of the error."""
    monkeypatch.setattr(sys, "argv", ["kornia-tinyvit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    *notes, error = captured.err.splitlines()
    assert error.startswith("Error: ")
    assert not any("Error" in note or "Traceback" in note for note in notes)
    return error


def cells(output: str) -> list[list[str]]:
    """The rows of a printed table; columns are two spaces apart, and the first may be empty."""
    _, rows = re.split(r"─\s*\n", output)
    return [re.split(r" {2,}", line[1:].rstrip()) for line in rows.splitlines() if line.strip()]


def json_lines(path: Path) -> list[dict]:
    """Read a file of JSON lines, those of them that are whole: another process may be writing it."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
