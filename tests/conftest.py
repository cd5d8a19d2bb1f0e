"""Fixtures of several tests: small networks with nontrivial weights, and the shared data."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from kornia_tinyvit import TinyViT

settings.register_profile("project", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("project")

SHARED = Path(os.environ.get("KORNIA_TINYVIT_SHARED", Path(__file__).parents[2] / "shared"))

TINY = {
    "depths": (1, 1, 2, 1),
    "embed_dims": (16, 16, 24, 32),
    "num_heads": (1, 2, 3, 4),
    "window_sizes": (4, 4, 5, 3),
    "num_classes": 7,
    "img_size": 64,
}

#: The same with one block per stage, for tracing and compilation, whose time is proportional to the blocks.
SHALLOW = TINY | {"depths": (1, 1, 1, 1)}


def shared(path: str) -> Path:
    """Return a file of the shared data, or skip the test."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} in the folder 'shared' beside the project, which is not part of it")
    return SHARED / path


@torch.no_grad()
def liven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set weights whose output depends on the image: running statistics from data, nonzero biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("attention_biases") or parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    images = torch.rand(4, model.config.in_chans, 64, 64, generator=generator) if hasattr(model, "config") else None
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a cumulative average
    if images is not None:
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@cache
def tiny_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return liven(TinyViT(**TINY)).state_dict()


@pytest.fixture
def tiny() -> TinyViT:
    """A network of 30 thousand weights in evaluation mode."""
    torch.manual_seed(0)
    model = TinyViT(**TINY)
    model.load_state_dict(tiny_weights())
    return model.eval()


@pytest.fixture
def without_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``import onnxscript`` fail as if it were not installed."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The system's headless Chromium, driven by playwright."""
    synchronous = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium, for example Debian's package chromium")
    with synchronous.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()
