"""Small transformers models of the tests."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from kornia_tinyvit import TinyViT
from kornia_tinyvit.huggingface import TinyVitBackbone, TinyVitConfig, TinyVitForImageClassification, from_tinyvit
from tests.conftest import TINY, liven


def tiny_network(**changes) -> TinyViT:
    """Return a network of 30 thousand weights in evaluation mode whose outputs depend on the image."""
    torch.manual_seed(0)
    network = TinyViT(**(TINY | changes))
    network.load_state_dict(network_weights(**changes))
    return network.eval()


@cache
def network_weights(**changes) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return liven(TinyViT(**(TINY | changes))).state_dict()


def tiny_config(**kwargs) -> TinyVitConfig:
    return TinyVitConfig.from_network(tiny_network().config, **kwargs)


def tiny_classifier(**changes) -> TinyVitForImageClassification:
    return from_tinyvit(tiny_network(**changes))


def tiny_backbone(**kwargs) -> TinyVitBackbone:
    """Return a backbone with the weights of the tiny network."""
    backbone = TinyVitBackbone(tiny_config(**kwargs)).eval()
    weights = {f"tinyvit.network.{name}": tensor for name, tensor in tiny_network().state_dict().items()}
    missing, _ = backbone.load_state_dict(weights, strict=False)
    assert not missing
    return backbone
