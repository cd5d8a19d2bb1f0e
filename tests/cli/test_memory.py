"""What the command line says when the Out of memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kornia_tinyvit import cli
from tests.helpers import error_of
from tests.processes import start


def classify_in_limited_memory(photo: str, file: str) -> None:
    with open(file, "w") as sys.stderr:
        torch.ones(8, 8) @ torch.ones(8, 8)  # libraries reserve more than they use, so everything is loaded first
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 500 * 2**20, -1))
        sys.argv = ["kornia-tinyvit", "classify", photo]
        cli.main()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit the memory")
def test_large_photo(tmp_path):
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png", compress_level=1)
    process = start(classify_in_limited_memory, str(tmp_path / "large.png"), str(tmp_path / "stderr.txt"))
    process.join(120)
    error = (tmp_path / "stderr.txt").read_text()
    assert process.exitcode == 1, error
    assert error.strip().splitlines()[-1].startswith("Error: Out of memory")
    assert "Traceback" not in error


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_kinds(error, capfd, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: throw(error))
    assert "Out of memory" in error_of(capfd, monkeypatch)


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def throw(error):
    raise error
