"""From a large network to one that fits a budget, and among those that fit it: constrained local search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.contraction.budget import Bench, Budget, Costs
from kornia_tinyvit.contraction.journal import Journal
from kornia_tinyvit.contraction.neighbors import SearchSpace, check_contracted, contractions, expansions, smallest
from kornia_tinyvit.contraction.result import Candidate, SearchResult
from kornia_tinyvit.contraction.workers import Evaluate, open_workers, run_evaluations
from kornia_tinyvit.distillation.teachers import checksum
from kornia_tinyvit.files import locked
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.progress import progress_bar

__all__ = ["contract", "refine"]

# How often a step is halved where no single factor reaches it, before the search is given up.
_HALVINGS = 12


def contract(
    seed: str | TinyViTConfig | TinyViT,
    budget: Budget,
    evaluate: Evaluate,
    out: str | Path,
    *,
    steps: int = 8,
    space: SearchSpace | None = None,
    bench: Bench | None = None,
    processes: int = 1,
    progress: bool = False,
) -> SearchResult:
    """Contract a network until it fits a budget, by the progressive local search of arXiv:2207.10666, section 3.2.

    Each step has a constraint between the seed's costs and the budget: of the way :meth:`Budget.excess`, an equal share
    is due at every step. From the best network so far each factor is contracted alone, just so far that the step's
    constraint holds (as NetAdapt does, arXiv:1804.03230); those that can reach it are evaluated, and the one with the
    best accuracy is kept. Where no single factor reaches the constraint, half the way is tried, and so on.

    ``out`` gets ``search.jsonl`` with a line for everything that was measured, evaluated and kept, and ``weights/``
    with those of the kept networks. The same call goes on after a stop, with what was measured and evaluated before.

    Args:
        seed: a variant, a configuration, or a network whose weights the first contractions start from.
        budget: what the result may cost.
        evaluate: tells the accuracy of a network, such as :class:`~kornia_tinyvit.contraction.ProxyTraining`. With
            several processes it is pickled.
        out: folder of the search.
        steps: steps from the seed to the budget. More steps contract less at a time, which finds better networks and
            evaluates more of them.
        space: how far each factor may go.
        bench: where times are measured; needed by budgets with a latency or throughput.
        processes: evaluations at a time. Times are measured while nothing else runs.
        progress: show a bar.

    Returns:
        The winner and all candidates.

    Raises:
        ValueError: if the budget cannot be met, ``out`` holds another search, or a number is out of its range.

    Example:
        >>> import tempfile
        >>> budget = Budget(max_parameters=1.0e6)
        >>> with tempfile.TemporaryDirectory() as out:  # an evaluation that likes depth
        ...     result = contract("1m", budget, lambda config, parent: sum(config.depths), out)
        >>> result.config.depths, result.winner.costs["parameters"] < 1e6
        ((2, 2, 4, 2), True)
    """
    if steps < 1 or processes < 1:
        raise ValueError(f"steps and processes are at least 1; got {steps} and {processes}.")
    with ExitStack() as stack:
        search = _Search(stack, seed, budget, evaluate, out, space, bench, processes, progress, {"steps": steps})
        current = search.measure(search.seed, None, None)
        first = budget.excess(current.costs)
        if first:
            search.check_possible()
        current = search.advance([search.seed], search.seed_weights(), "seed", first)
        for step in range(1, steps + 1):
            limit = first * (1 - step / steps)
            while budget.excess(current.costs) > limit:
                met, reached = search.neighbors(current, limit)
                current = search.advance(met, search.weights_of(current), f"step {step} of {steps}", reached)
        return search.result()


def refine(
    start: str | TinyViTConfig,
    seed: str | TinyViTConfig | TinyViT,
    budget: Budget,
    evaluate: Evaluate,
    out: str | Path,
    *,
    rounds: int = 2,
    candidates: int = 8,
    space: SearchSpace | None = None,
    bench: Bench | None = None,
    processes: int = 1,
    progress: bool = False,
) -> SearchResult:
    """Improve a network within its budget by trades: one factor is given back for what another one takes.

    Contraction alone cannot give back what an early step took, and leaves a part of the budget unused. Here each round
    looks at all networks that are the current one with no factor, or one, contracted by a step, and another one given
    back as far as the budget and the seed allow. Of those that are new, the ones that leave the least of the budget are
    evaluated, and the best of them is gone on from if it is better than the current one.

    These networks cost about the same, so accuracies that lie close decide: train longer than for :func:`contract`.
    ``out`` gets the same files, and the same call goes on after a stop, or with more rounds.

    Args:
        start: the network to improve: a variant or a configuration, such as :attr:`SearchResult.config`.
        seed: what it was contracted from, which nothing outgrows: a variant, a configuration, or a network, and then
            every candidate is handed this one as its parent.
        budget: what the result may cost.
        evaluate: tells the accuracy of a network; with several processes it is pickled.
        out: folder of the search.
        rounds: rounds of trades.
        candidates: networks that a round evaluates.
        space: how far each factor may be contracted.
        bench: where times are measured; needed by budgets with a latency or throughput.
        processes: evaluations at a time.
        progress: show a bar.

    Returns:
        The best network and all candidates.

    Raises:
        ValueError: if the first network is beyond the budget or the seed, ``out`` holds another search, or a number is
            out of its range.

    Example:
        >>> import tempfile
        >>> budget = Budget(max_parameters=1.0e6)
        >>> start = TinyViTConfig.from_variant("1m", mlp_ratio=2.0)
        >>> with tempfile.TemporaryDirectory() as out:  # an evaluation that likes depth
        ...     result = refine(
        ...         start.replace(depths=(2, 2, 2, 2)), "1m", budget, lambda config, parent: sum(config.depths), out
        ...     )
        >>> result.config.depths, result.winner.costs["parameters"] < 1e6
        ((2, 2, 4, 2), True)
    """
    if min(rounds, candidates, processes) < 1:
        raise ValueError(f"rounds, candidates and processes are at least 1; got {rounds}, {candidates}, {processes}.")
    first = _config_of(start)
    asked = {"start": first.to_dict(), "candidates": candidates}
    with ExitStack() as stack:
        search = _Search(stack, seed, budget, evaluate, out, space, bench, processes, progress, asked)
        current = search.measure(first, None, None)
        search.check_budget(
            current.costs, "The first network has {costs}, beyond the budget {limits}; contract it first."
        )
        check_contracted(first, search.seed)
        search.keep(current, 0.0)
        for turn in range(1, rounds + 1):
            trades = [each for each in search.trades(current) if each.accuracy is None]
            trades.sort(key=lambda each: budget.slack(each.costs))
            # With the current one, which is new in the first round, so that no process waits for it.
            rivals = [each.config for each in (current, *trades[:candidates])]
            current = search.advance(rivals, search.seed_weights(), f"round {turn} of {rounds}", 0.0)
        return search.result()


class _Search:
    """Walks from network to network. What the journal knows is not done again, so a restart walks the same way.

    The stack holds the lock of its folder, the workers and the bar, and closes them however the search ends.
    """

    def __init__(
        self,
        stack: ExitStack,
        seed: str | TinyViTConfig | TinyViT,
        budget: Budget,
        evaluate: Evaluate,
        out: str | Path,
        space: SearchSpace | None,
        bench: Bench | None,
        processes: int,
        progress: bool,
        asked: dict[str, Any],
    ) -> None:
        out = Path(out)
        message = f"Another process searches in {out}; wait for it or give another folder."
        stack.enter_context(locked(out / ".lock", message, ValueError))
        self.workers = stack.enter_context(open_workers(processes))
        self.bar = stack.enter_context(progress_bar(progress))
        self.seed, self.network = _config_of(seed), seed if isinstance(seed, TinyViT) else None
        self.budget, self.evaluate, self.weights = budget, evaluate, out / "weights"
        self.space, self.bench = space or SearchSpace(), bench or Bench()
        self.candidates: dict[TinyViTConfig, Candidate] = {}
        self.kept: list[int] = []
        asked = {
            "seed": self.seed.to_dict(), "weights": None if self.network is None else checksum(self.network),
            "budget": budget.limits, **asked, "space": vars(self.space), "bench": self.bench.describe(),
            "evaluation": _describe(evaluate),
        }  # fmt: skip
        self.journal = Journal(out / "search.jsonl", asked)

    def result(self) -> SearchResult:
        """Return what was found so far."""
        candidates = tuple(self.candidates.values())
        return SearchResult(candidates, tuple(self.kept), self.weights_of(candidates[self.kept[-1]]), self.budget)

    def measure(self, config: TinyViTConfig, parent: Candidate | None, factor: str | None) -> Candidate:
        """Return a network with its costs, which are measured if it is new."""
        if config not in self.candidates:
            number = len(self.candidates)
            origin = {"number": number, "parent": None if parent is None else parent.number, "factor": factor}
            told = self._measured("measured", config, origin)
            self.candidates[config] = Candidate(number, told["parent"], told["factor"], config, told["costs"], None)
        return self.candidates[config]

    def _measured(self, event: str, config: TinyViTConfig, origin: Mapping[str, Any]) -> dict[str, Any]:
        known = self.journal.find(event, config)
        return known or self.journal.write(event, config, **origin, costs=self.bench.measure(config, self.budget))

    def check_budget(self, costs: Costs, message: str) -> None:
        """Raise an error with such a message if costs are beyond the budget."""
        limits = self.budget.limits
        if not self.budget.holds(costs):
            raise ValueError(message.format(costs={name: costs[name] for name in limits}, limits=limits))

    def check_possible(self) -> None:
        """Raise an error if no network of the space fits the budget."""
        self.check_budget(
            self._measured("smallest", smallest(self.seed, self.space), {})["costs"],
            "The budget {limits} cannot be met: the smallest network of the space has {costs}. "
            "Give a larger budget, a smaller image size, or a space that goes further.",
        )

    def neighbors(self, current: Candidate, limit: float) -> tuple[list[TinyViTConfig], float]:
        """Return the neighbors that meet a constraint, or a milder one where none does, and the constraint."""
        excess = self.budget.excess(current.costs)
        for halvings in range(_HALVINGS):
            reached = excess - (excess - limit) / 2**halvings
            met = []
            for factor, chain in contractions(current.config, self.space).items():
                measured = (self.measure(config, current, factor) for config in chain)
                within = (each.config for each in measured if self.budget.excess(each.costs) <= reached)
                met += list(islice(within, 1))
            if met:
                return met, reached
        raise ValueError(
            f"The search is stuck at {current.config}: no factor that is left lowers {', '.join(self.budget.limits)}. "
            "Give a larger budget, or a space that goes further."
        )

    def trades(self, current: Candidate) -> list[Candidate]:
        """Return the networks with one factor given back, as they are or for a step of another one."""
        found = self._grown(current.config, current, None)
        for taken, chain in contractions(current.config, self.space).items():
            smaller = next(chain, None)
            if smaller is not None:
                found |= self._grown(smaller, current, taken)
        return list(found.values())

    def _grown(self, config: TinyViTConfig, current: Candidate, taken: str | None) -> dict[TinyViTConfig, Candidate]:
        """Return a network with each factor but the one that was taken given back as far as the budget holds."""
        found: dict[TinyViTConfig, Candidate] = {}
        for given, chain in expansions(config, self.seed, self.space).items():
            factor = f"{given} for {taken}" if taken else given
            measured = (self.measure(each, current, factor) for each in chain if given != taken)
            within = list(takewhile(lambda each: self.budget.holds(each.costs), measured))
            found |= {each.config: each for each in within[-1:]}
        return found

    def advance(self, rivals: list[TinyViTConfig], parent: Path | None, title: str, limit: float) -> Candidate:
        """Evaluate networks, go on from the best, and remove the weights of those that are not kept.

        Args:
            rivals: the networks; of equally accurate ones that which is nearer to the budget is better.
            parent: the weights that their evaluations start from.
            title: for the bar.
            limit: the constraint of the step, for the journal.
        """
        files = {each: self._file_of(each) for each in rivals if self.journal.find("evaluated", each) is None}
        task = self.bar.add_task(title, total=len(rivals), completed=len(rivals) - len(files))
        for config, told in run_evaluations(self.workers, self.evaluate, files, parent):
            self.journal.write("evaluated", config, **told)  # each result as it comes
            self.bar.advance(task)
        for config in rivals:
            accuracy = (self.journal.find("evaluated", config) or {})["accuracy"]
            self.candidates[config] = dataclasses.replace(self.candidates[config], accuracy=accuracy)
        found = [self.candidates[config] for config in rivals]
        best = self.keep(max(found, key=lambda each: (each.score, -self.budget.excess(each.costs))), limit)
        for each in found:
            if each.number not in self.kept:
                self._file_of(each.config).unlink(missing_ok=True)
        return best

    def keep(self, candidate: Candidate, limit: float) -> Candidate:
        """Go on from a network."""
        if candidate.number not in self.kept:
            self.kept.append(candidate.number)
        self.journal.write("kept", candidate.config, number=candidate.number, excess=limit)
        return candidate

    def seed_weights(self) -> Path | None:
        """Write the seed's weights where the evaluations read them."""
        if self.network is None:
            return None
        file = self.weights / "seed.safetensors"
        if not file.exists():
            save_checkpoint(self.network, file)
        return file

    def weights_of(self, candidate: Candidate) -> Path | None:
        """Return the file of a kept network's weights, if its evaluation trained it."""
        told = self.journal.find("evaluated", candidate.config)
        if told is None or not told["trained"]:
            return None
        file = self._file_of(candidate.config)
        if not file.exists():
            raise ValueError(f"{file} is gone, which {self.journal.path} tells of; remove the folder to search anew.")
        return file

    def _file_of(self, config: TinyViTConfig) -> Path:
        return self.weights / f"{self.candidates[config].number:05d}.safetensors"


def _config_of(network: str | TinyViTConfig | TinyViT) -> TinyViTConfig:
    if isinstance(network, str):
        return TinyViTConfig.from_variant(network)
    return network.config if isinstance(network, TinyViT) else network


def _describe(evaluate: Evaluate) -> Any:
    """Return what tells an evaluation from others, as far as it says so."""
    if hasattr(evaluate, "describe"):
        return evaluate.describe()
    return getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
