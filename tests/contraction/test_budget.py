"""Budgets, costs and measurements."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kornia_tinyvit import TinyViT, TinyViTConfig
from kornia_tinyvit.contraction import Bench, Budget, count
from kornia_tinyvit.deploy.measurement import count_flops
from tests.contraction.conftest import SMALL

# arXiv:2207.10666, tables 2 and 3: variant, pixels, millions of parameters, 10^9 multiply-accumulates.
PUBLISHED = [("5m", 224, 5.4, 1.3), ("11m", 224, 11, 2.0), ("21m", 224, 21, 4.3), ("21m", 384, 21, 13.8),
             ("21m", 512, 21, 27.0)]  # fmt: skip


def variant(name: str, img_size: int) -> TinyViTConfig:
    with torch.device("meta"):
        return TinyViT.from_config(name, img_size=img_size, window_sizes="scale").config


def norm_operations(config: TinyViTConfig) -> int:
    """Return the operations of norms as fvcore counts them: 2 per value in batch norm, 5 in layer norm."""
    found = []
    costs = {nn.BatchNorm2d: 2, nn.LayerNorm: 5}
    with torch.device("meta"):
        network, images = TinyViT.from_config(config), torch.empty(1, 3, config.img_size, config.img_size)
    for module in network.modules():
        if type(module) in costs:
            module.register_forward_hook(lambda norm, given, _: found.append(costs[type(norm)] * given[0].numel()))
    network(images)
    return sum(found)


class TestCount:
    @pytest.mark.parametrize(("name", "img_size", "millions", "macs"), PUBLISHED)
    def test_published(self, name, img_size, millions, macs):
        config = variant(name, img_size)
        costs = count(config)
        assert round(costs["parameters"] / 1e6, 1 if millions < 10 else None) == millions
        assert costs["macs"] / 1e9 == pytest.approx(macs, rel=0.04 if macs < 2 else 0.013)
        # The published numbers include norms, which torch does not count.
        assert round((costs["macs"] + norm_operations(config)) / 1e9, 1) == macs

    @pytest.mark.parametrize(
        "change",
        [{}, {"num_classes": 0}, {"img_size": 50}, {"window_sizes": (4, 7, 3, 2)}, {"mlp_ratio": 2.5}, {"in_chans": 1}],
    )
    def test_layers_add_up_to_network(self, change):
        config = SMALL.replace(**change)
        network = TinyViT.from_config(config).eval()
        costs = count(config)
        assert costs["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert 2 * costs["macs"] == count_flops(
            network, torch.zeros(1, config.in_chans, config.img_size, config.img_size)
        )

    def test_memory(self):
        """The memory of this network peaks in the first block, between its expansion and the activation."""
        config = TinyViTConfig(img_size=256, embed_dims=(16, 16, 16, 16), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1))
        maps = count(config)["memory"] - 4 * count(config)["parameters"]
        expanded = 64 * 64 * 64 * 4
        assert 2 * expanded + expanded / 4 <= maps < 2.5 * expanded
        assert count(config, torch.bfloat16)["memory"] == count(config)["memory"] / 2

    def test_mobile_sam(self):
        with pytest.raises(ValueError, match="compares the accuracy of classifiers"):
            count(SMALL.replace(mobile_sam=True))


class TestBudget:
    def test_holds(self):
        budget = Budget(max_parameters=10, min_throughput=100)
        assert budget.limits == {"parameters": 10, "throughput": 100}
        assert budget.holds({"parameters": 10, "throughput": 100, "macs": 1e9})
        assert not budget.holds({"parameters": 11, "throughput": 200})
        assert not budget.holds({"parameters": 9, "throughput": 99})

    def test_excess_adds_up(self):
        budget = Budget(max_parameters=10, max_macs=100, min_throughput=50)
        costs = {"parameters": 20, "macs": 50, "throughput": 25}
        assert budget.excess(costs) == pytest.approx(2 * math.log(2))

    def test_slack(self):
        budget = Budget(max_parameters=10, min_throughput=50)
        assert budget.slack({"parameters": 5, "throughput": 100}) == pytest.approx(2 * math.log(2))
        assert budget.slack({"parameters": 10, "throughput": 50}) == 0

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ({}, "needs positive limits"),
            ({"max_macs": 0}, "macs': 0"),
            ({"max_memory": math.inf}, "memory': inf"),
        ],
    )
    def test_errors(self, limits, message):
        with pytest.raises(ValueError, match=message):
            Budget(**limits)


class TestBench:
    def test_measures_limited_costs(self):
        bench = Bench(batch_size=2, repetitions=2)
        counted = bench.measure(SMALL, Budget(max_macs=1))
        assert counted == count(SMALL)
        timed = bench.measure(SMALL, Budget(max_latency_ms=1, min_throughput=1))
        assert timed.keys() == {*counted, "latency_ms", "throughput"}
        assert 0 < timed["latency_ms"] < 1e4
        assert 1000 / timed["throughput"] < 3 * timed["latency_ms"]

    def test_errors(self):
        with pytest.raises(ValueError, match="must be positive; got 0, 15"):
            Bench(batch_size=0)
        with pytest.raises(ValueError, match="engine must be auto"):
            Bench(engine="steam").measure(SMALL, Budget(max_latency_ms=1))
