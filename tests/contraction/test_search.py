"""Searches: paths, constraints and resumption."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch

from kornia_tinyvit import TinyViT, TinyViTConfig
from kornia_tinyvit.config import VARIANTS
from kornia_tinyvit.contraction import (
    Bench,
    Budget,
    SearchSpace,
    contract,
    contractions,
    count,
    expansions,
    refine,
    search,
)
from kornia_tinyvit.contraction.workers import open_workers
from tests.conftest import TINY
from tests.contraction.conftest import SMALL
from tests.helpers import json_lines


def toward(goal: TinyViTConfig):
    """Return an evaluation that increases toward a goal, and is 0 if another factor is contracted."""

    def evaluate(config: TinyViTConfig, parent: TinyViT | None) -> float:
        pairs = list(zip(config.embed_dims, goal.embed_dims, strict=True))
        same = {"embed_dims": goal.embed_dims, "num_heads": goal.num_heads, "drop_path_rate": goal.drop_path_rate}
        if any(ours < theirs for ours, theirs in pairs) or config.replace(**same) != goal:
            return 0.0
        return 100 - sum(math.log(ours / theirs) for ours, theirs in pairs)

    return evaluate


class Recorder:
    """An evaluation that prefers depth, records its calls and can be interrupted."""

    def __init__(self, stop_after: int | None = None, trains: bool = False) -> None:
        self.configs: list[TinyViTConfig] = []
        self.parents: list[TinyViT | None] = []
        self.stop_after, self.trains = stop_after, trains

    def __call__(self, config: TinyViTConfig, parent: TinyViT | None):
        if len(self.configs) == self.stop_after:
            raise KeyboardInterrupt
        self.configs.append(config)
        self.parents.append(parent)
        accuracy = deep(config, parent)
        return (accuracy, TinyViT.from_config(config)) if self.trains else accuracy


def deep(config: TinyViTConfig, parent: TinyViT | None) -> float:
    return sum(config.depths) + sum(config.embed_dims) / 1000 + config.mlp_ratio / 100


BUDGET = Budget(max_parameters=0.6 * count(SMALL)["parameters"], max_macs=0.7 * count(SMALL)["macs"])


@pytest.fixture(scope="module")
def pool():
    with open_workers(2) as pool:
        yield pool


@pytest.fixture
def shared_workers(pool, monkeypatch):
    """Run all searches with two processes in one pool, since each process takes seconds to start."""
    pools = {1: None, 2: pool}
    monkeypatch.setattr(search, "open_workers", lambda processes: contextlib.nullcontext(pools[processes]))


class TestSearch:
    @pytest.mark.slow
    def test_published_family(self, tmp_path):
        """The published constraints lead from 21m to 11m, and from there to 5m."""
        seed: TinyViTConfig | str = "21m"
        for name, budget in (("11m", Budget(11e6, 2.05e9)), ("5m", Budget(5.4e6, 1.3e9))):
            result = contract(seed, budget, toward(VARIANTS[name]), tmp_path / name, steps=12)
            assert result.config.replace(drop_path_rate=VARIANTS[name].drop_path_rate) == VARIANTS[name]
            assert budget.holds(result.winner.costs)
            for before, after in itertools.pairwise(result.path):
                assert after.parent == before.number
                assert after.config in contractions(before.config, SearchSpace())[after.factor]
                assert budget.excess(after.costs) < budget.excess(before.costs)
            seed = result.config

    def test_constraints(self, tmp_path):
        recorder = Recorder()
        result = contract(SMALL, BUDGET, recorder, tmp_path, steps=3)
        assert BUDGET.holds(result.winner.costs)
        assert sum(result.config.depths) == sum(SMALL.depths)
        lines = json_lines(tmp_path / "search.jsonl")
        kept = [line for line in lines if line["event"] == "kept"]
        first = BUDGET.excess(count(SMALL))
        assert kept[0]["excess"] == pytest.approx(first)
        for candidate, line in zip(result.path, kept, strict=True):
            assert BUDGET.excess(candidate.costs) <= line["excess"]
        siblings = [each for each in result.evaluated if each.parent == result.winner.parent]
        assert max(each.accuracy for each in siblings) == result.winner.accuracy
        for each in siblings:
            assert BUDGET.excess(each.costs) <= kept[-1]["excess"]
        # Networks that were measured but not evaluated exceed the constraint.
        assert all(BUDGET.excess(each.costs) > 0 for each in result.candidates if each.accuracy is None)
        assert len(recorder.configs) == len(set(recorder.configs)) == len(result.evaluated)
        assert result.weights is None
        assert result.network().config == result.config

    def test_times(self, tmp_path):
        """Latency must fall and throughput rise, here at one MAC per nanosecond."""

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

    def test_seed_within_budget(self, tmp_path):
        result = contract(SMALL, Budget(max_parameters=1e9), deep, tmp_path)
        assert [each.config for each in result.candidates] == [SMALL]

    def test_weights_are_inherited(self, tmp_path):
        torch.manual_seed(0)
        seed = TinyViT.from_config(SMALL)
        recorder = Recorder(trains=True)
        result = contract(seed, BUDGET, recorder, tmp_path, steps=2)
        assert torch.equal(recorder.parents[0].head.weight, seed.head.weight)
        by_config = {each.config: each for each in result.candidates}
        for config, parent in zip(recorder.configs[1:], recorder.parents[1:], strict=True):
            assert parent.config == result.candidates[by_config[config].parent].config
        files = sorted(file.stem for file in (tmp_path / "weights").glob("0*"))
        assert files == [f"{each.number:05d}" for each in result.path]
        assert result.network().config == result.config
        with pytest.raises(ValueError, match="weights"):
            contract(TinyViT.from_config(SMALL), BUDGET, recorder, tmp_path, steps=2)

    @pytest.mark.parametrize("stop_after", [0, 1, 7])
    def test_resume(self, tmp_path, stop_after):
        whole = contract(SMALL, BUDGET, Recorder(), tmp_path / "whole", steps=3)
        first, second = Recorder(stop_after), Recorder()
        with pytest.raises(KeyboardInterrupt):
            contract(SMALL, BUDGET, first, tmp_path / "resumed", steps=3)
        with (tmp_path / "resumed" / "search.jsonl").open("a") as file:
            file.write('{"event": "evaluated", "conf')  # an incomplete line
        assert contract(SMALL, BUDGET, second, tmp_path / "resumed", steps=3) == whole
        assert first.configs + second.configs == [each.config for each in whole.evaluated]
        third = Recorder()
        assert contract(SMALL, BUDGET, third, tmp_path / "resumed", steps=3) == whole
        assert third.configs == []

    def test_resume_with_weights(self, tmp_path):
        whole = contract(SMALL, BUDGET, Recorder(trains=True), tmp_path / "whole", steps=3)
        first, second = Recorder(len(whole.evaluated) - 2, trains=True), Recorder(trains=True)
        with pytest.raises(KeyboardInterrupt):
            contract(SMALL, BUDGET, first, tmp_path / "resumed", steps=3)
        result = contract(SMALL, BUDGET, second, tmp_path / "resumed", steps=3)
        assert [parent.config for parent in second.parents] == 2 * [whole.path[-2].config]
        names = [sorted(file.name for file in (tmp_path / run / "weights").iterdir()) for run in ("whole", "resumed")]
        assert names[0] == names[1] == [f"{each.number:05d}.safetensors" for each in whole.path]
        result.weights.unlink()
        with pytest.raises(ValueError, match="is missing"):
            contract(SMALL, BUDGET, second, tmp_path / "resumed", steps=3)

    def test_other_search_in_folder(self, tmp_path):
        contract(SMALL, BUDGET, deep, tmp_path, steps=1)
        with pytest.raises(ValueError, match="steps: it has 1, requested 2"):
            contract(SMALL, BUDGET, deep, tmp_path, steps=2)

    def test_corrupt_line(self, tmp_path):
        contract(SMALL, BUDGET, deep, tmp_path, steps=1)
        file = tmp_path / "search.jsonl"
        lines = file.read_text().splitlines()
        lines[3] = lines[3][:30]
        file.write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=r"Line 4 of .*search.jsonl is corrupt"):
            contract(SMALL, BUDGET, deep, tmp_path, steps=1)

    def test_one_search_at_a_time(self, tmp_path):
        def again(config, parent):
            with pytest.raises(ValueError, match="Another process searches in"):
                contract(SMALL, BUDGET, again, tmp_path)
            return 1.0

        contract(SMALL, Budget(max_parameters=1e9), again, tmp_path)

    @pytest.mark.usefixtures("shared_workers")
    @pytest.mark.slow
    def test_processes(self, tmp_path):
        one = contract(SMALL, BUDGET, deep, tmp_path / "one", steps=1)
        assert contract(SMALL, BUDGET, deep, tmp_path / "two", steps=1, processes=2) == one

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budget": Budget(max_parameters=100)}, "cannot be met: the smallest network of the space has"),
            ({"steps": 0}, "steps and processes must be positive; got 0 and 1"),
            ({"processes": 0}, "got 8 and 0"),
            ({"evaluate": lambda config, parent: math.nan}, "returned nan; expected a finite number"),
            ({"evaluate": lambda config, parent: (1.0, TinyViT(**TINY))}, "returned the network"),
        ],
    )
    def test_errors(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            contract(SMALL, out=tmp_path, **({"budget": BUDGET, "evaluate": deep} | options))


# Within the budget, with some of it unused.
FITS = SMALL.replace(embed_dims=(12, 16, 16, 16), num_heads=(1, 2, 2, 2), mlp_ratio=2.0)


def improve(start=FITS, seed=SMALL, budget=BUDGET, evaluate=None, out=None, **options):
    return refine(start, seed, budget, evaluate or deep, out, **options)


class TestRefine:
    def test_trades(self, tmp_path):
        recorder = Recorder()
        result = improve(evaluate=recorder, out=tmp_path, rounds=3, candidates=6)
        assert result.path[0].config == FITS
        assert len(recorder.configs) == len(set(recorder.configs)) <= 1 + 3 * 6
        assert all(BUDGET.holds(each.costs) for each in result.evaluated)
        assert len(result.path) > 1
        accuracies = [each.accuracy for each in result.path]
        assert accuracies == sorted(accuracies)
        assert accuracies[-1] == max(each.accuracy for each in result.evaluated)
        for after in result.path[1:]:
            before = result.candidates[after.parent].config
            given, _, taken = after.factor.partition(" for ")
            if taken:
                before = next(contractions(before, SearchSpace())[taken])
            assert after.config in expansions(before, SMALL, SearchSpace())[given]

    def test_last_selected_wins(self, tmp_path):
        """A later round can select a network of the first round, so numbers are not in order of selection."""
        accuracies = itertools.count(1)
        result = improve(evaluate=lambda *_: float(next(accuracies)), out=tmp_path, rounds=10, candidates=2)
        assert [each.accuracy for each in result.path] == [1, *range(3, 23, 2)]
        assert result.winner.accuracy == max(each.accuracy for each in result.evaluated)
        assert list(result.kept) != sorted(result.kept), "an early candidate is selected late"

    def test_trades_with_the_least_slack_are_evaluated(self, tmp_path):
        few = improve(out=tmp_path / "few", rounds=1, candidates=3)
        all_of_them = improve(out=tmp_path / "all", rounds=1, candidates=1000)
        slacks = sorted(BUDGET.slack(each.costs) for each in all_of_them.evaluated[1:])
        assert len(slacks) > 10
        assert sorted(BUDGET.slack(each.costs) for each in few.evaluated[1:]) == slacks[:3]
        # A trade expands as far as the budget holds.
        for each in all_of_them.evaluated[1:]:
            given = each.factor.split(" for ")[0]
            further = next(expansions(each.config, SMALL, SearchSpace())[given], None)
            assert further is None or not BUDGET.holds(count(further))

    def test_no_improvement(self, tmp_path):
        """Without an improvement the first network stays selected, and each round evaluates others."""
        recorder = Recorder()
        result = improve(evaluate=lambda *args: 0 * recorder(*args), out=tmp_path, rounds=2, candidates=4)
        assert [each.config for each in result.path] == [FITS]
        assert len(recorder.configs) == len(set(recorder.configs)) == 1 + 2 * 4

    def test_weights(self, tmp_path):
        """Every candidate inherits the seed's weights, and the weights of selected networks are kept."""
        torch.manual_seed(0)
        seed = TinyViT.from_config(SMALL)
        recorder = Recorder(trains=True)
        result = improve(seed=seed, evaluate=recorder, out=tmp_path, rounds=2, candidates=3)
        assert all(torch.equal(parent.head.weight, seed.head.weight) for parent in recorder.parents)
        files = sorted(file.stem for file in (tmp_path / "weights").glob("0*"))
        assert files == sorted(f"{each.number:05d}" for each in result.path)
        assert result.network().config == result.config

    @pytest.mark.parametrize("stop_after", [0, 2, 5])
    def test_resume(self, tmp_path, stop_after):
        whole = improve(evaluate=Recorder(trains=True), out=tmp_path / "whole", rounds=2, candidates=3)
        first, second = Recorder(stop_after, trains=True), Recorder(trains=True)
        with pytest.raises(KeyboardInterrupt):
            improve(evaluate=first, out=tmp_path / "resumed", rounds=2, candidates=3)
        again = improve(evaluate=second, out=tmp_path / "resumed", rounds=2, candidates=3)
        assert again.candidates == whole.candidates
        assert len(first.configs) + len(second.configs) == len(whole.evaluated)
        with pytest.raises(ValueError, match="candidates: it has 3, requested 4"):
            improve(evaluate=second, out=tmp_path / "resumed", rounds=2, candidates=4)

    def test_more_rounds(self, tmp_path):
        whole = improve(evaluate=Recorder(trains=True), out=tmp_path / "whole", rounds=3, candidates=3)
        for rounds in (1, 3):
            again = improve(evaluate=Recorder(trains=True), out=tmp_path / "more", rounds=rounds, candidates=3)
        assert again.candidates == whole.candidates
        assert again.weights.exists()

    @pytest.mark.slow
    @pytest.mark.usefixtures("shared_workers")
    def test_processes(self, tmp_path):
        one = improve(out=tmp_path / "one", rounds=1)
        assert improve(out=tmp_path / "two", rounds=1, processes=2) == one

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"start": SMALL}, "beyond the budget .* contract it first"),
            ({"start": FITS.replace(depths=(2, 3, 1, 2))}, "depths can only become smaller; the parent has"),
            ({"start": FITS.replace(num_classes=4)}, "keep its parent's num_classes"),
            ({"start": FITS.replace(num_heads=(1, 1, 2, 2))}, "Heads of stage 1 must keep their width of 8"),
            ({"rounds": 0}, "must be positive; got 0, 8, 1"),
            ({"candidates": 0}, "got 2, 0, 1"),
        ],
    )
    def test_errors(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            improve(out=tmp_path, **options)
