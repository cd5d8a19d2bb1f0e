"""Run the command line, and read its output."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kornia_tinyvit import TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.cli import app, main
from tests.processes import start

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTOS = ASSETS / "photos"


def make_weights(model: TinyViT, folder: Path) -> str:
    """Write a network of ten named classes to a file."""
    model.reset_classifier(10)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return str(save_checkpoint(model, folder / "weights.safetensors", CIFAR))


KINDS = ("16-bit.png", "palette.png", "cmyk.jpg", "turned.jpg", "animated.gif", "bits.png", "la.png", "floats.tif")


def write_kind(folder: Path, name: str) -> tuple[str, torch.Tensor]:
    """Write an image in one of the forms :data:`KINDS`; return its path and its pixels by Pillow, (3, H, W)."""
    photo, path = Image.open(PHOTOS / "chelsea.png").convert("RGB"), folder / name
    gray = np.asarray(photo.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    if name == "16-bit.png":
        Image.fromarray(gray.astype(np.uint16) * 257).save(path)
    elif name == "floats.tif":
        Image.fromarray(gray.astype(np.float32) / np.float32(255)).save(path)
    elif name == "palette.png":
        photo.quantize(64).save(path, transparency=bytes(range(64)))
    elif name == "animated.gif":
        photo.quantize(64).save(path, save_all=True, append_images=[Image.new("P", photo.size)])
    elif name == "turned.jpg":
        photo.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    else:
        mode = {"cmyk.jpg": "CMYK", "bits.png": "1", "la.png": "LA"}[name]
        photo.convert(mode).save(path)
    if name in ("16-bit.png", "floats.tif"):
        return str(path), torch.from_numpy(gray.astype(np.float32) / np.float32(255)).expand(3, -1, -1)
    pixels = np.array(Image.open(path).convert("RGB"))
    return str(path), torch.from_numpy(np.rot90(pixels, -1).copy() if name == "turned.jpg" else pixels).movedim(2, 0)


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


class CommandProcess:
    """The command line in a process, whose stdout and stderr go to files of a folder."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = folder / "stdout.txt", folder / "stderr.txt"
        self.process = start(_run_main, [*map(str, arguments)], environment, *self._files)

    def wait(self) -> tuple[int | None, str, str]:
        """Return the exit code, stdout and stderr."""
        self.process.join(300)
        out, err = (file.read_text() for file in self._files)
        return self.process.exitcode, out, err

    def signal(self, number: int, ready: Callable[[], bool]) -> None:
        """Send a signal once ``ready`` returns true."""
        while not ready():
            assert self.process.is_alive(), self.wait()
            time.sleep(0.005)
        os.kill(self.process.pid, number)


def _run_main(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ |= environment
    sys.argv = ["kornia-tinyvit", *arguments]
    main()


def cells(output: str) -> list[list[str]]:
    """The rows of a printed table; columns are two spaces apart, and the first may be empty."""
    _, rows = re.split(r"─\s*\n", output)
    return [re.split(r" {2,}", line[1:].rstrip()) for line in rows.splitlines() if line.strip()]


def json_lines(path: Path) -> list[dict]:
    """Read a file of JSON lines, those of them that are whole: another process may be writing it."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
