"""Contraction: costs, neighbours, inherited weights, and searches that are killed, resumed and walk a known path."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from kornia_tinyvit import TinyViT, TinyViTConfig
from kornia_tinyvit.config import VARIANTS
from kornia_tinyvit.contraction import (
    Bench,
    Budget,
    Candidate,
    ProxyTraining,
    SearchResult,
    Space,
    contract,
    contractions,
    count,
    expansions,
    inherit,
    refine,
    smallest,
)
from kornia_tinyvit.data import ClassificationDataset
from kornia_tinyvit.deploy.benchmark import count_flops
from kornia_tinyvit.distillation import LabelStore, Manifest, StoredLabels
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.training import find_recipe
from kornia_tinyvit.visualization import save_search
from tests.conftest import TINY, liven, shared
from tests.scenes import make_pictures, samples_of

SMALL = TinyViTConfig(**{**TINY, "depths": (2, 2, 2, 2), "num_classes": 3, "img_size": 32})
# arXiv:2207.10666, tables 2 and 3: variant, pixels, millions of parameters, 10^9 multiply-accumulates.
PUBLISHED = [("5m", 224, 5.4, 1.3), ("11m", 224, 11, 2.0), ("21m", 224, 21, 4.3), ("21m", 384, 21, 13.8),
             ("21m", 512, 21, 27.0)]  # fmt: skip


def variant(name: str, img_size: int) -> TinyViTConfig:
    with torch.device("meta"):
        return TinyViT.from_config(name, img_size=img_size, window_sizes="scale").config


def norm_operations(config: TinyViTConfig) -> int:
    """What fvcore, to which a multiply-accumulate is one, adds for norms: 2 a value in batch norm, 5 in layer norm."""
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
        # The rest is norms, which torch's counter leaves out.
        assert round((costs["macs"] + norm_operations(config)) / 1e9, 1) == macs

    @pytest.mark.parametrize(
        "change",
        [{}, {"num_classes": 0}, {"img_size": 50}, {"window_sizes": (4, 7, 3, 2)}, {"mlp_ratio": 2.5}, {"in_chans": 1}],
    )
    def test_blocks_add_up_to_the_network(self, change):
        config = SMALL.replace(**change)
        network = TinyViT.from_config(config).eval()
        costs = count(config)
        assert costs["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert 2 * costs["macs"] == count_flops(
            network, torch.zeros(1, config.in_chans, config.img_size, config.img_size)
        )

    def test_memory(self):
        """Of this network the widest place is the first block, between its expansion and the activation."""
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
        [({}, "needs a limit"), ({"max_macs": 0}, "max_macs=0"), ({"max_memory": math.inf}, "max_memory=inf")],
    )
    def test_errors(self, limits, message):
        with pytest.raises(ValueError, match=message):
            Budget(**limits)


class TestBench:
    def test_times_what_is_asked_for(self):
        bench = Bench(batch_size=2, repetitions=2)
        counted = bench.measure(SMALL, Budget(max_macs=1))
        assert counted == count(SMALL)
        timed = bench.measure(SMALL, Budget(max_latency_ms=1, min_throughput=1))
        assert timed.keys() == {*counted, "latency_ms", "throughput"}
        assert 0 < timed["latency_ms"] < 1e4
        assert 1000 / timed["throughput"] < 3 * timed["latency_ms"]

    def test_errors(self):
        with pytest.raises(ValueError, match="at least 1; got 0 and 15"):
            Bench(batch_size=0)
        with pytest.raises(ValueError, match="engine must be auto"):
            Bench(engine="steam").measure(SMALL, Budget(max_latency_ms=1))


class TestContractions:
    def test_one_factor_at_a_time(self):
        for factor, chain in contractions(VARIANTS["21m"], Space()).items():
            name = factor.split("[")[0]
            allowed = {name, "num_heads"} if name == "embed_dims" else {name}
            before = VARIANTS["21m"]
            for config in chain:
                changed = {field for field in vars(config) if getattr(config, field) != getattr(before, field)}
                assert name in changed <= allowed
                before = config

    def test_values(self):
        found = {name: list(chain) for name, chain in contractions(VARIANTS["5m"], Space()).items()}
        assert [each.embed_dims[2] for each in found["embed_dims[2]"]] == [128, 96, 64, 32]
        assert [each.num_heads[2] for each in found["embed_dims[2]"]] == [4, 3, 2, 1]
        assert [each.embed_dims[0] for each in found["embed_dims[0]"]] == [48, 32, 16]
        assert [each.depths[2] for each in found["depths[2]"]] == [5, 4, 3, 2, 1]
        assert [each.window_sizes[1] for each in found["window_sizes[1]"]] == [4, 2]  # of a map of 28
        assert [each.window_sizes[2] for each in found["window_sizes[2]"]] == [7, 2]
        assert found["window_sizes[3]"] == []  # 7 is prime
        assert [each.mlp_ratio for each in found["mlp_ratio"]] == [3.5, 3.0, 2.5, 2.0, 1.5, 1.0]

    def test_space(self):
        space = Space(min_depth=2, min_window=4, ratio_step=1.0, min_ratio=2.0)
        found = {name: list(chain) for name, chain in contractions(VARIANTS["5m"], space).items()}
        assert [each.depths[2] for each in found["depths[2]"]] == [5, 4, 3, 2]
        assert [each.window_sizes[2] for each in found["window_sizes[2]"]] == [7]
        assert [each.mbconv_expand_ratio for each in found["mbconv_expand_ratio"]] == [3.0, 2.0]

    def test_smallest(self):
        least = smallest(VARIANTS["21m"], Space())
        assert least.embed_dims == (16, 32, 32, 32)
        assert not any(list(chain) for chain in contractions(least, Space()).values())

    @pytest.mark.parametrize("wrong", [{"min_depth": 0}, {"min_window": 0}, {"ratio_step": 0.0}, {"min_ratio": -1}])
    def test_errors(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Space(**wrong)


class TestExpansions:
    @pytest.mark.parametrize("space", [Space(), Space(ratio_step=1.0), Space(min_depth=2, min_window=4, min_ratio=3.0)])
    def test_the_way_back(self, space):
        """What was contracted is given back along the same networks."""
        seed = VARIANTS["5m"]
        for factor, chain in contractions(seed, Space(ratio_step=space.ratio_step)).items():
            way = [seed, *chain]
            for position, config in enumerate(way):
                found = {name: list(more) for name, more in expansions(config, seed, space).items()}
                assert found.pop(factor) == way[:position][::-1]
                assert not any(found.values())

    def test_other_factors_stay(self):
        config = smallest(VARIANTS["5m"], Space())
        for factor, chain in expansions(config, VARIANTS["5m"], Space()).items():
            name = factor.split("[")[0]
            for more in chain:
                changed = {field for field in vars(config) if getattr(config, field) != getattr(more, field)}
                assert name in changed <= {name, "num_heads"}

    def test_off_the_way(self):
        """A ratio that no number of steps leads to is not given back; the others are."""
        odd = VARIANTS["5m"].replace(mlp_ratio=3.3, depths=(2, 2, 5, 2))
        found = {name: list(chain) for name, chain in expansions(odd, VARIANTS["5m"], Space()).items()}
        assert found["mlp_ratio"] == []
        assert [each.depths[2] for each in found["depths[2]"]] == [6]


@pytest.fixture
def parent() -> TinyViT:
    torch.manual_seed(0)
    return liven(TinyViT.from_config(SMALL))


@torch.no_grad()
def silence_filters(layer: nn.Module, channels: list[int]) -> None:
    layer.c.weight[channels] = 0
    for values in (layer.bn.weight, layer.bn.bias):
        values[channels] = 0


@torch.no_grad()
def silence_rows(layer: nn.Linear, rows: list[int]) -> None:
    layer.weight[rows] = 0
    layer.bias[rows] = 0


class TestInherit:
    def test_all_of_it(self, parent, images):
        child = inherit(parent, SMALL.replace(img_size=64))
        assert child.training
        assert child.config.img_size == 64
        for name, tensor in child.state_dict().items():
            assert torch.equal(tensor, parent.state_dict()[name]), name
        child.head.weight.data.zero_()
        assert parent.head.weight.any()  # the parent stays as it is

    @pytest.mark.parametrize(
        ("factor", "value"),
        [
            ("mbconv_expand_ratio", 3.0),
            ("mlp_ratio", 3.0),
            ("embed_dims", (12, 16, 24, 32)),
        ],
    )
    def test_what_is_zero_is_cut_exactly(self, parent, images, factor, value):
        """Cut channels that contribute nothing, and the outputs stay; cut any others, and they do not."""
        smaller = SMALL.replace(**{factor: value})
        assert not torch.allclose(inherit(parent, smaller).eval()(images), parent(images), atol=1e-2)
        silence = {
            "mbconv_expand_ratio": self.silence_expansion,
            "mlp_ratio": self.silence_mlps,
            "embed_dims": self.silence_first_stage,
        }
        silence[factor](parent)
        torch.testing.assert_close(inherit(parent, smaller).eval()(images), parent(images), atol=1e-5, rtol=1e-4)

    def silence_expansion(self, parent):
        for block in parent.layers[0].blocks:
            silence_filters(block.conv2, [3, *range(20, 35)])

    def silence_mlps(self, parent):
        for stage in (1, 2, 3):
            for block in parent.layers[stage].blocks:
                width = block.attn.proj.in_features
                silence_rows(block.mlp.fc1, list(range(1, 1 + width)))

    def silence_first_stage(self, parent):
        silence_filters(parent.patch_embed.seq[0], [0, 5])
        for layer in (parent.patch_embed.seq[2], *(block.conv3 for block in parent.layers[0].blocks)):
            silence_filters(layer, [1, 2, 7, 14])
        for block in parent.layers[0].blocks:  # which shrinks with its width
            silence_filters(block.conv2, list(range(16, 32)))

    def silence_block(self, parent, number=0, scale=1.0):
        """Let a block of the second stage do nothing but scale its map."""
        block = parent.layers[1].blocks[number]
        for layer in (block.attn.proj, block.mlp.fc2):
            silence_rows(layer, list(range(16)))
        norm = block.local_conv.bn
        with torch.no_grad():
            block.local_conv.c.weight.zero_()[:, :, 1, 1] = scale
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean)

    @pytest.mark.parametrize(("number", "scale"), [(0, 1.0), (1, 1.0), (0, -3.0)])
    def test_blocks_that_do_nothing_are_cut_exactly(self, parent, images, number, scale):
        """Any block that does nothing, and the first also if it scales, which the merging before it takes over."""
        self.silence_block(parent, number, scale)
        child = inherit(parent, SMALL.replace(depths=(2, 1, 2, 2))).eval()
        kept = parent.layers[1].blocks[1 - number].mlp.fc1.weight
        assert torch.equal(child.layers[1].blocks[0].mlp.fc1.weight, kept)
        torch.testing.assert_close(child(images), parent(images), atol=1e-5, rtol=1e-4)

    def test_biases_of_the_distances_that_are_left(self, parent):
        child = inherit(parent, SMALL.replace(window_sizes=(4, 3, 2, 3)))
        whole = parent.layers[1].blocks[0].attn.attention_biases.view(2, 4, 4)
        assert torch.equal(child.layers[1].blocks[0].attn.attention_biases.view(2, 3, 3), whole[:, :3, :3])

    def test_most_important_heads(self, parent):
        attention = parent.layers[1].blocks[1].attn
        silence_rows(attention.qkv, list(range(16, 24)))  # the values of the first head
        child = inherit(parent, SMALL.replace(embed_dims=(16, 8, 24, 32), num_heads=(1, 1, 3, 4)))
        kept = child.layers[1].blocks[1].attn.attention_biases
        assert torch.equal(kept, attention.attention_biases[1:])

    def test_any_mixture(self, parent, images):
        child = inherit(parent, smallest(SMALL, Space()))
        assert child(images).shape == (2, 3)
        assert child.config == smallest(SMALL, Space())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"depths": (2, 3, 2, 2)}, "depths can only become smaller"),
            ({"mlp_ratio": 5.0}, "mlp_ratio can only become smaller"),
            ({"num_classes": 4}, "its parent's num_classes"),
            ({"num_heads": (1, 1, 3, 4)}, "heads of stage 1 are 8 wide and stay so; got 16"),
            ({"mobile_sam": True}, "cannot be contracted"),
        ],
    )
    def test_errors(self, parent, change, message):
        with pytest.raises(ValueError, match=message):
            inherit(parent, SMALL.replace(**change))

    def test_learns_faster_than_from_scratch_on_cifar10(self):
        pictures = ClassificationDataset.open(shared("data/cifar10/test.parquet")).sample(320)
        whole = TinyViT.from_config("1m", pretrained="cifar10")
        prepare = EvaluationPipeline(whole.config.img_size)
        images = torch.cat([prepare(pictures[row][0][None]) for row in range(len(pictures))])
        labels = torch.tensor(pictures.labels)
        smaller = whole.config.replace(embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), mlp_ratio=3.0)
        losses = []
        for start in ("inherit", "fresh"):
            torch.manual_seed(0)
            model = inherit(whole, smaller) if start == "inherit" else TinyViT.from_config(smaller)
            losses.append(fit(model, images, labels))
        assert losses[0] < losses[1] - 1, losses


def fit(model: TinyViT, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Learn from all but 128 pictures in a few steps, and return the loss on those."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for rows in torch.arange(128, len(labels)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model.train()(images[:128]), labels[:128]))


def toward(goal: TinyViTConfig):
    """An evaluation that is the better, the nearer a network comes to a goal without contracting anything else."""

    def evaluate(config: TinyViTConfig, parent: TinyViT | None) -> float:
        pairs = list(zip(config.embed_dims, goal.embed_dims, strict=True))
        same = {"embed_dims": goal.embed_dims, "num_heads": goal.num_heads, "drop_path_rate": goal.drop_path_rate}
        if any(ours < theirs for ours, theirs in pairs) or config.replace(**same) != goal:
            return 0.0
        return 100 - sum(math.log(ours / theirs) for ours, theirs in pairs)

    return evaluate


class Recorder:
    """An evaluation that likes depth, remembers what it was asked and stops when it is told."""

    def __init__(self, stop_after: int | None = None, trains: bool = False) -> None:
        self.asked: list[TinyViTConfig] = []
        self.parents: list[TinyViT | None] = []
        self.stop_after, self.trains = stop_after, trains

    def __call__(self, config: TinyViTConfig, parent: TinyViT | None):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(config)
        self.parents.append(parent)
        accuracy = deep(config, parent)
        return (accuracy, TinyViT.from_config(config)) if self.trains else accuracy


def deep(config: TinyViTConfig, parent: TinyViT | None) -> float:
    return sum(config.depths) + sum(config.embed_dims) / 1000 + config.mlp_ratio / 100


BUDGET = Budget(max_parameters=0.6 * count(SMALL)["parameters"], max_macs=0.7 * count(SMALL)["macs"])


class TestSearch:
    def test_published_family(self, tmp_path):
        """From 21m under the published constraints the search comes to 11m, and from there to 5m."""
        seed: TinyViTConfig | str = "21m"
        for name, budget in (("11m", Budget(11e6, 2.05e9)), ("5m", Budget(5.4e6, 1.3e9))):
            result = contract(seed, budget, toward(VARIANTS[name]), tmp_path / name, steps=12)
            assert result.config.replace(drop_path_rate=VARIANTS[name].drop_path_rate) == VARIANTS[name]
            assert budget.holds(result.winner.costs)
            for before, after in itertools.pairwise(result.path):
                assert after.parent == before.number
                assert after.config in contractions(before.config, Space())[after.factor]
                assert budget.excess(after.costs) < budget.excess(before.costs)
            seed = result.config

    def test_constraints(self, tmp_path):
        recorder = Recorder()
        result = contract(SMALL, BUDGET, recorder, tmp_path, steps=3)
        assert BUDGET.holds(result.winner.costs)
        assert sum(result.config.depths) == sum(SMALL.depths)
        lines = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
        kept = [line for line in lines if line["event"] == "kept"]
        first = BUDGET.excess(count(SMALL))
        assert kept[0]["excess"] == pytest.approx(first)
        for candidate, line in zip(result.path, kept, strict=True):
            assert BUDGET.excess(candidate.costs) <= line["excess"]
        siblings = [each for each in result.evaluated if each.parent == result.winner.parent]
        assert max(each.accuracy for each in siblings) == result.winner.accuracy
        for each in siblings:
            assert BUDGET.excess(each.costs) <= kept[-1]["excess"]
        # What was measured only is just what a step of its factor does not meet.
        assert all(BUDGET.excess(each.costs) > 0 for each in result.candidates if each.accuracy is None)
        assert len(recorder.asked) == len(set(recorder.asked)) == len(result.evaluated)
        assert result.weights is None
        assert result.network().config == result.config

    def test_times(self, tmp_path):
        """A latency has to fall and a throughput to rise, here those of a machine that does a MAC a nanosecond."""

        class Stopwatch(Bench):
            def measure(self, config, budget):
                costs = count(config)
                return costs | {"latency_ms": costs["macs"] / 1e6, "throughput": 1e9 / costs["macs"]}

        macs = count(SMALL)["macs"]
        budget = Budget(max_latency_ms=0.8 * macs / 1e6, min_throughput=1e9 / (0.6 * macs))
        result = contract(SMALL, budget, deep, tmp_path, steps=3, bench=Stopwatch())
        assert result.winner.costs["macs"] <= 0.6 * macs
        rates = [each.costs["throughput"] for each in result.path]
        assert rates == sorted(rates)

    def test_nothing_to_do(self, tmp_path):
        result = contract(SMALL, Budget(max_parameters=1e9), deep, tmp_path)
        assert [each.config for each in result.candidates] == [SMALL]

    def test_weights_are_handed_on(self, tmp_path):
        torch.manual_seed(0)
        seed = TinyViT.from_config(SMALL)
        recorder = Recorder(trains=True)
        result = contract(seed, BUDGET, recorder, tmp_path, steps=2)
        assert torch.equal(recorder.parents[0].head.weight, seed.head.weight)
        by_config = {each.config: each for each in result.candidates}
        for config, parent in zip(recorder.asked[1:], recorder.parents[1:], strict=True):
            assert parent.config == result.candidates[by_config[config].parent].config
        files = sorted(file.stem for file in (tmp_path / "weights").glob("0*"))
        assert files == [f"{each.number:05d}" for each in result.path]
        assert result.network().config == result.config
        with pytest.raises(ValueError, match="weights"):
            contract(TinyViT.from_config(SMALL), BUDGET, recorder, tmp_path, steps=2)

    @pytest.mark.parametrize("stop_after", [0, 1, 7])
    def test_resumed(self, tmp_path, stop_after):
        whole = contract(SMALL, BUDGET, Recorder(), tmp_path / "whole", steps=3)
        first, second = Recorder(stop_after), Recorder()
        with pytest.raises(KeyboardInterrupt):
            contract(SMALL, BUDGET, first, tmp_path / "torn", steps=3)
        with (tmp_path / "torn" / "search.jsonl").open("a") as file:
            file.write('{"event": "evaluated", "conf')  # what a killed write leaves
        assert contract(SMALL, BUDGET, second, tmp_path / "torn", steps=3) == whole
        assert first.asked + second.asked == [each.config for each in whole.evaluated]
        third = Recorder()
        assert contract(SMALL, BUDGET, third, tmp_path / "torn", steps=3) == whole
        assert third.asked == []

    def test_weights_outlast_a_stop(self, tmp_path):
        whole = contract(SMALL, BUDGET, Recorder(trains=True), tmp_path / "whole", steps=3)
        first, second = Recorder(len(whole.evaluated) - 2, trains=True), Recorder(trains=True)
        with pytest.raises(KeyboardInterrupt):
            contract(SMALL, BUDGET, first, tmp_path / "torn", steps=3)
        result = contract(SMALL, BUDGET, second, tmp_path / "torn", steps=3)
        assert [parent.config for parent in second.parents] == 2 * [whole.path[-2].config]
        names = [sorted(file.name for file in (tmp_path / run / "weights").iterdir()) for run in ("whole", "torn")]
        assert names[0] == names[1] == [f"{each.number:05d}.safetensors" for each in whole.path]
        result.weights.unlink()
        with pytest.raises(ValueError, match="is gone"):
            contract(SMALL, BUDGET, second, tmp_path / "torn", steps=3)

    def test_another_search_in_the_folder(self, tmp_path):
        contract(SMALL, BUDGET, deep, tmp_path, steps=1)
        with pytest.raises(ValueError, match="steps: it has 1, asked for 2"):
            contract(SMALL, BUDGET, deep, tmp_path, steps=2)

    def test_damaged_line(self, tmp_path):
        contract(SMALL, BUDGET, deep, tmp_path, steps=1)
        file = tmp_path / "search.jsonl"
        lines = file.read_text().splitlines()
        lines[3] = lines[3][:30]
        file.write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=r"Line 4 of .*search.jsonl is damaged"):
            contract(SMALL, BUDGET, deep, tmp_path, steps=1)

    def test_one_search_at_a_time(self, tmp_path):
        def again(config, parent):
            with pytest.raises(ValueError, match="Another process searches in"):
                contract(SMALL, BUDGET, again, tmp_path)
            return 1.0

        contract(SMALL, Budget(max_parameters=1e9), again, tmp_path)

    def test_processes(self, tmp_path):
        one = contract(SMALL, BUDGET, deep, tmp_path / "one", steps=1)
        assert contract(SMALL, BUDGET, deep, tmp_path / "two", steps=1, processes=2) == one

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budget": Budget(max_parameters=100)}, "cannot be met: the smallest network of the space has"),
            ({"steps": 0}, "steps and processes are at least 1; got 0 and 1"),
            ({"processes": 0}, "got 8 and 0"),
            ({"evaluate": lambda config, parent: math.nan}, "said nan; expected a finite number"),
            ({"evaluate": lambda config, parent: (1.0, TinyViT(**TINY))}, "returned the network"),
        ],
    )
    def test_errors(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            contract(SMALL, out=tmp_path, **({"budget": BUDGET, "evaluate": deep} | options))


# Within the budget, with a part of it unused.
FITS = SMALL.replace(embed_dims=(12, 16, 16, 16), num_heads=(1, 2, 2, 2), mlp_ratio=2.0)


def improve(start=FITS, seed=SMALL, budget=BUDGET, evaluate=None, out=None, **options):
    return refine(start, seed, budget, evaluate or deep, out, **options)


class TestRefine:
    def test_trades(self, tmp_path):
        recorder = Recorder()
        result = improve(evaluate=recorder, out=tmp_path, rounds=3, candidates=6)
        assert result.path[0].config == FITS
        assert len(recorder.asked) == len(set(recorder.asked)) <= 1 + 3 * 6
        assert all(BUDGET.holds(each.costs) for each in result.evaluated)
        assert len(result.path) > 1
        accuracies = [each.accuracy for each in result.path]
        assert accuracies == sorted(accuracies)
        assert accuracies[-1] == max(each.accuracy for each in result.evaluated)
        for after in result.path[1:]:
            before = result.candidates[after.parent].config
            given, _, taken = after.factor.partition(" for ")
            if taken:
                before = next(contractions(before, Space())[taken])
            assert after.config in expansions(before, SMALL, Space())[given]

    def test_the_last_kept_wins(self, tmp_path):
        """A network that the first round met and left may be what a later one goes on to: numbers are no order."""
        asked = itertools.count(1)
        result = improve(evaluate=lambda *_: float(next(asked)), out=tmp_path, rounds=10, candidates=2)
        assert [each.accuracy for each in result.path] == [1, *range(3, 23, 2)]
        assert result.winner.accuracy == max(each.accuracy for each in result.evaluated)
        assert list(result.kept) != sorted(result.kept), "one that was met early is kept late"

    def test_a_round_looks_at_those_that_leave_the_least(self, tmp_path):
        few = improve(out=tmp_path / "few", rounds=1, candidates=3)
        all_of_them = improve(out=tmp_path / "all", rounds=1, candidates=1000)
        slacks = sorted(BUDGET.slack(each.costs) for each in all_of_them.evaluated[1:])
        assert len(slacks) > 10
        assert sorted(BUDGET.slack(each.costs) for each in few.evaluated[1:]) == slacks[:3]
        # A trade gives back as far as the budget holds.
        for each in all_of_them.evaluated[1:]:
            given = each.factor.split(" for ")[0]
            further = next(expansions(each.config, SMALL, Space())[given], None)
            assert further is None or not BUDGET.holds(count(further))

    def test_the_best_there_is(self, tmp_path):
        """Where nothing better is found the first is kept, and each round looks at others."""
        recorder = Recorder()
        result = improve(evaluate=lambda *asked: 0 * recorder(*asked), out=tmp_path, rounds=2, candidates=4)
        assert [each.config for each in result.path] == [FITS]
        assert len(recorder.asked) == len(set(recorder.asked)) == 1 + 2 * 4

    def test_weights(self, tmp_path):
        """Every candidate starts from the seed's weights, and those of the path are kept."""
        torch.manual_seed(0)
        seed = TinyViT.from_config(SMALL)
        recorder = Recorder(trains=True)
        result = improve(seed=seed, evaluate=recorder, out=tmp_path, rounds=2, candidates=3)
        assert all(torch.equal(parent.head.weight, seed.head.weight) for parent in recorder.parents)
        files = sorted(file.stem for file in (tmp_path / "weights").glob("0*"))
        assert files == sorted(f"{each.number:05d}" for each in result.path)
        assert result.network().config == result.config

    @pytest.mark.parametrize("stop_after", [0, 2, 5])
    def test_resumed(self, tmp_path, stop_after):
        whole = improve(evaluate=Recorder(trains=True), out=tmp_path / "whole", rounds=2, candidates=3)
        first, second = Recorder(stop_after, trains=True), Recorder(trains=True)
        with pytest.raises(KeyboardInterrupt):
            improve(evaluate=first, out=tmp_path / "torn", rounds=2, candidates=3)
        again = improve(evaluate=second, out=tmp_path / "torn", rounds=2, candidates=3)
        assert again.candidates == whole.candidates
        assert len(first.asked) + len(second.asked) == len(whole.evaluated)
        with pytest.raises(ValueError, match="candidates: it has 3, asked for 4"):
            improve(evaluate=second, out=tmp_path / "torn", rounds=2, candidates=4)

    def test_more_rounds(self, tmp_path):
        whole = improve(evaluate=Recorder(trains=True), out=tmp_path / "whole", rounds=3, candidates=3)
        for rounds in (1, 3):
            again = improve(evaluate=Recorder(trains=True), out=tmp_path / "more", rounds=rounds, candidates=3)
        assert again.candidates == whole.candidates
        assert again.weights.exists()

    def test_processes(self, tmp_path):
        one = improve(out=tmp_path / "one", rounds=1)
        assert improve(out=tmp_path / "two", rounds=1, processes=2) == one

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"start": SMALL}, "beyond the budget .* contract it first"),
            ({"start": FITS.replace(depths=(2, 3, 1, 2))}, "depths can only become smaller; the parent has"),
            ({"start": FITS.replace(num_classes=4)}, "has its parent's num_classes"),
            ({"start": FITS.replace(num_heads=(1, 1, 2, 2))}, "heads of stage 1 are 8 wide"),
            ({"rounds": 0}, "at least 1; got 0, 8, 1"),
            ({"candidates": 0}, "got 2, 0, 1"),
        ],
    )
    def test_errors(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            improve(out=tmp_path, **options)


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


class TestPicture:
    def test_pareto_front(self):
        assert [each.number for each in FOUND.pareto_front("macs")] == [4, 2]
        assert [each.number for each in FOUND.pareto_front("throughput")] == [4, 2]

    def test_drawn(self, tmp_path):
        save_search(tmp_path / "new" / "search.png", FOUND)
        pixels = np.asarray(Image.open(tmp_path / "new" / "search.png").convert("RGB")).astype(int)
        assert pixels.shape == (400, 1120, 3)  # a panel for each limit
        for panel in np.split(pixels, 2, axis=1):
            for color in ((0xB4, 0xB4, 0xB4), (0x30, 0x63, 0x8E), (0xD1, 0x49, 0x5B)):
                inside = panel[60:330, 70:]
                assert (np.abs(inside - color).sum(-1) == 0).sum() > 10

    def test_a_single_network(self, tmp_path):
        save_search(tmp_path / "search.png", replace(FOUND, candidates=FOUND.candidates[:1], kept=(0,)))
        assert (tmp_path / "search.png").stat().st_size > 0


RECIPE = find_recipe("cifar10", img_size=32, epochs=2, batch_size=8, base_lr=0.05, ema_decay=0.5)


class TestProxyTraining:
    @pytest.fixture
    def proxy(self, tmp_path) -> ProxyTraining:
        samples = samples_of(make_pictures(tmp_path / "data"), preset="small")
        validation = ClassificationDataset.open(make_pictures(tmp_path / "val", each=4, seed=5))
        return ProxyTraining(samples, validation, RECIPE, tmp_path / "training", cpu=True)

    def test_trains(self, proxy, parent):
        config = SMALL.replace(mlp_ratio=3.0)
        accuracy, network = proxy(config, None)
        assert network.config == config
        assert 0 <= accuracy <= 100
        assert list(proxy.folder.iterdir()) == []
        again, _ = proxy(config, None)
        assert again == accuracy

    def test_start(self, proxy, parent):
        # With hardly any learning rate a network stays what it began as.
        still = replace(proxy, recipe=replace(RECIPE, base_lr=1e-9, min_lr=0.0, ema_decay=0.0))
        _, inherited = still(SMALL, parent)
        _, fresh = replace(still, start="fresh")(SMALL, parent)
        torch.testing.assert_close(inherited.head.weight, parent.head.weight)
        assert not torch.allclose(fresh.head.weight, parent.head.weight)

    def test_stored_labels(self, proxy, tmp_path):
        samples = proxy.samples
        manifest = Manifest(num_classes=3, top_k=1, teacher={}, **samples.describe())
        rows = samples.order.permutation(0)
        draws = samples.augmentation.draw(0, rows.tolist())
        sure = F.one_hot(torch.tensor([samples.images.labels[row] for row in rows.tolist()]), 3).float()
        with LabelStore.create(tmp_path / "store", manifest) as store:
            store.write(0, rows, sure, draws.checksums())
        objective = StoredLabels(LabelStore(tmp_path / "store"), samples.augmentation)
        learns = pickle.loads(pickle.dumps(replace(proxy, objective=objective, replays=[0])))
        assert learns.describe()["objective"]["kind"] == "stored labels"
        assert learns.describe() != proxy.describe()
        accuracy, network = learns(SMALL, None)
        assert accuracy > 0
        assert network.config == SMALL

    def test_errors(self, proxy):
        with pytest.raises(ValueError, match="'inherit' or 'fresh'; got 'noise'"):
            replace(proxy, start="noise")
