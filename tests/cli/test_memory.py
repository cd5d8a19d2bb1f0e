"""What the command line says when the Out of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kornia_tinyvit import cli
from tests.helpers import error_of

# The limit is set when everything is imported, since libraries reserve more than they use.
LIMITED = """
import resource, sys
import torch
from kornia_tinyvit.cli import main
torch.ones(8, 8) @ torch.ones(8, 8)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 500 * 2**20, -1))
sys.argv = ["kornia-tinyvit", "classify", sys.argv[1]]
main()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit the memory")
def test_large_photo(tmp_path):
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png", compress_level=1)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "large.png")], cwd=root, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("Error: Out of memory")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_kinds(error, capfd, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: throw(error))
    assert "Out of memory" in error_of(capfd, monkeypatch)


def test_other_errors_are_told_whole(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def throw(error):
    raise error
