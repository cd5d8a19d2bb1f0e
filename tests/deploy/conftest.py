"""Shared network and ONNX exports of the deployment tests: an export takes seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kornia_tinyvit import MobileSAM, TinyViT
from kornia_tinyvit.deploy import graph
from tests.conftest import SHALLOW, liven


@pytest.fixture(scope="session")
def model() -> TinyViT:
    torch.manual_seed(0)
    return liven(TinyViT(**SHALLOW))


@pytest.fixture(scope="session")
def sam() -> MobileSAM:
    torch.manual_seed(0)
    return MobileSAM(liven(TinyViT(**SHALLOW | {"mobile_sam": True}))).eval()


@pytest.fixture(scope="session")
def photos() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in ((48, 80), (64, 40))]


def checksum(module: nn.Module) -> float:
    return sum(float(tensor.double().abs().sum()) for tensor in module.state_dict().values())


@pytest.fixture(scope="session")
def onnx_models() -> dict[Any, Any]:
    return {}


@pytest.fixture
def exported_once(onnx_models: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and convert equal graphs only once per session."""
    trace, convert = graph.trace_images, graph.to_onnx

    def trace_images(module: nn.Module, images: Tensor, dynamic_size: bool = False) -> Any:
        size = None if dynamic_size else images.shape[2:]
        key = (checksum(module), module.method, module.pixels, len(module.views), size)
        return key, lambda: trace(module, images, dynamic_size=dynamic_size)

    def to_onnx(program: Any, opset: int) -> Any:
        key, trace_now = program
        if key not in onnx_models:
            onnx_models[key] = convert(trace_now(), opset)
        return onnx_models[key]

    monkeypatch.setattr(graph, "trace_images", trace_images)
    monkeypatch.setattr(graph, "to_onnx", to_onnx)
