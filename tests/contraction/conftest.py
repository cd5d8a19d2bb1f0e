"""A small parent network and a search result."""

from __future__ import annotations

import os

import pytest
import torch

from kornia_tinyvit import TinyViT, TinyViTConfig
from kornia_tinyvit.contraction import Budget, Candidate, SearchResult
from tests.conftest import TINY, liven

SMALL = TinyViTConfig(**{**TINY, "depths": (2, 2, 2, 2), "num_classes": 3, "img_size": 32})


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out syncs to the disk, which take 5 ms for each of hundreds of journal lines."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def parent() -> TinyViT:
    torch.manual_seed(0)
    return liven(TinyViT.from_config(SMALL))


def candidate(number: int, macs: float, accuracy: float | None) -> Candidate:
    costs = {"macs": macs, "throughput": 1e9 / macs}
    return Candidate(number, number - 1 if number else None, "mlp_ratio", SMALL, costs, accuracy)


FOUND = SearchResult(
    (candidate(0, 9e6, 80.0), candidate(1, 5e6, None), candidate(2, 5e6, 81.0), candidate(3, 5e6, 70.0),
     candidate(4, 3e6, 60.0)),
    (0, 2, 4),
    None,
    Budget(max_macs=4e6, min_throughput=250),
)  # fmt: skip
