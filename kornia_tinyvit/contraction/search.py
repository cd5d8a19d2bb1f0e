"""Constrained local search for the most accurate network within a budget."""

from __future__ import annotations

import dataclasses
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
from kornia_tinyvit.progress import ProgressBar

__all__ = ["contract", "refine"]

# How often the constraint of a step is halved if no single factor meets it, before the search fails.
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

    The constraints of the steps divide :meth:`Budget.excess` of the seed equally. In each step every factor of the
    current network is contracted separately, by as little as meets the constraint (as in NetAdapt, arXiv:1804.03230).
    The resulting candidates are evaluated, and the most accurate one is selected. If no single factor meets the
    constraint, half of the step is tried, and so on.

    ``out`` receives ``search.jsonl`` with a line for every measured, evaluated and selected network, and ``weights/``
    with the trained weights of the selected ones. The same call resumes an interrupted search.

    Args:
        seed: a variant, a configuration, or a network whose weights the first contractions inherit.
        budget: limits of the result's costs.
        evaluate: the evaluation, such as :class:`~kornia_tinyvit.contraction.ProxyTraining`; with several processes it
            is pickled.
        out: folder of the search.
        steps: number of steps from the seed to the budget. More steps evaluate more networks and find better ones.
        space: limits and step sizes of the factors.
        bench: settings of the measurements, for budgets with a latency or throughput.
        processes: number of parallel evaluations; measurements never run in parallel.
        progress: show a progress bar.

    Returns:
        The winner and all candidates.

    Raises:
        ValueError: if the budget cannot be met, ``out`` holds another search, or ``steps`` or ``processes`` is less
            than 1.

    Example:
        >>> import tempfile
        >>> budget = Budget(max_parameters=1.0e6)
        >>> with tempfile.TemporaryDirectory() as out:  # an evaluation that prefers depth
        ...     result = contract("1m", budget, lambda config, parent: sum(config.depths), out)
        >>> result.config.depths, result.winner.costs["parameters"] < 1e6
        ((2, 2, 4, 2), True)
    """
    if steps < 1 or processes < 1:
        raise ValueError(f"steps and processes must be positive; got {steps} and {processes}.")
    with ExitStack() as stack:
        search = _Search(stack, seed, budget, evaluate, out, space, bench, processes, progress, {"steps": steps})
        current = search.measure(search.seed)
        first = budget.excess(current.costs)
        if first:
            least = search.costs("smallest", smallest(search.seed, search.space))
            if not budget.holds(least):
                raise ValueError(
                    f"The budget {budget.limits} cannot be met: the smallest network of the space has "
                    f"{search.limited_costs(least)}. Give a larger budget, a smaller image size, or a larger space."
                )
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
    """Improve a network within its budget by trades: expand one factor and contract at most one other by a step.

    :func:`contract` never undoes an early step, and leaves a part of the budget unused. Each round looks at all trades
    of the current network, with the expansion as large as the budget and the seed allow. The trades that were not
    evaluated before and leave the least of the budget unused are evaluated, and the best one is selected if it is more
    accurate than the current network.

    The candidates have similar accuracies, so the evaluation should train longer than for :func:`contract`. ``out``
    receives the same files; the same call resumes an interrupted search, and more rounds continue a finished one.

    Args:
        start: the network to improve: a variant or a configuration, such as :attr:`SearchResult.config`.
        seed: the network that ``start`` was contracted from, whose factors are the maxima: a variant, a configuration,
            or a network whose weights every candidate inherits.
        budget: limits of the result's costs.
        evaluate: the evaluation; with several processes it is pickled.
        out: folder of the search.
        rounds: number of rounds.
        candidates: number of evaluated trades per round.
        space: limits and step sizes of the factors.
        bench: settings of the measurements, for budgets with a latency or throughput.
        processes: number of parallel evaluations.
        progress: show a progress bar.

    Returns:
        The best network and all candidates.

    Raises:
        ValueError: if ``start`` exceeds the budget or the seed, ``out`` holds another search, or ``rounds``,
            ``candidates`` or ``processes`` is less than 1.

    Example:
        >>> import tempfile
        >>> budget = Budget(max_parameters=1.0e6)
        >>> start = TinyViTConfig.from_variant("1m", mlp_ratio=2.0)
        >>> with tempfile.TemporaryDirectory() as out:  # an evaluation that prefers depth
        ...     result = refine(
        ...         start.replace(depths=(2, 2, 2, 2)), "1m", budget, lambda config, parent: sum(config.depths), out
        ...     )
        >>> result.config.depths, result.winner.costs["parameters"] < 1e6
        ((2, 2, 4, 2), True)
    """
    if min(rounds, candidates, processes) < 1:
        raise ValueError(f"rounds, candidates and processes must be positive; got {rounds}, {candidates}, {processes}.")
    first = _config_of(start)
    settings = {"start": first.to_dict(), "candidates": candidates}
    with ExitStack() as stack:
        search = _Search(stack, seed, budget, evaluate, out, space, bench, processes, progress, settings)
        current = search.measure(first)
        if not budget.holds(current.costs):
            raise ValueError(
                f"The first network has {search.limited_costs(current.costs)}, beyond the budget {budget.limits}; "
                "contract it first."
            )
        check_contracted(first, search.seed)
        search.keep(current, 0.0)
        for turn in range(1, rounds + 1):
            trades = [each for each in search.trades(current) if each.accuracy is None]
            trades.sort(key=lambda each: budget.slack(each.costs))
            # The current network is new in the first round, and evaluated in parallel with the trades.
            configs = [each.config for each in (current, *trades[:candidates])]
            current = search.advance(configs, search.seed_weights(), f"round {turn} of {rounds}", 0.0)
        return search.result()


class _Search:
    """State of a search. Results in the journal are reused, so a restarted search follows the same path.

    The lock of the folder and the workers are closed by the stack.
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
        settings: dict[str, Any],
    ) -> None:
        out = Path(out)
        message = f"Another process searches in {out}; wait for it or give another folder."
        stack.enter_context(locked(out / ".lock", message, ValueError))
        self.workers = stack.enter_context(open_workers(processes))
        self.progress = progress
        self.seed, self.network = _config_of(seed), seed if isinstance(seed, TinyViT) else None
        self.budget, self.evaluate, self.weights = budget, evaluate, out / "weights"
        self.space, self.bench = space or SearchSpace(), bench or Bench()
        self.candidates: dict[TinyViTConfig, Candidate] = {}
        self.kept: list[int] = []
        name = getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
        settings = {
            "seed": self.seed.to_dict(), "weights": None if self.network is None else checksum(self.network),
            "budget": budget.limits, **settings, "space": vars(self.space), "bench": self.bench.describe(),
            "evaluation": evaluate.describe() if hasattr(evaluate, "describe") else name,
        }  # fmt: skip
        self.journal = Journal(out / "search.jsonl", settings)

    def result(self) -> SearchResult:
        """Return the result so far."""
        candidates = tuple(self.candidates.values())
        return SearchResult(candidates, tuple(self.kept), self.weights_of(candidates[self.kept[-1]]), self.budget)

    def measure(self, config: TinyViTConfig, parent: int | None = None, factor: str | None = None) -> Candidate:
        """Return the candidate of a configuration, with its costs."""
        if config not in self.candidates:
            number = len(self.candidates)
            costs = self.costs("measured", config, number=number, parent=parent, factor=factor)
            self.candidates[config] = Candidate(number, parent, factor, config, costs, None)
        return self.candidates[config]

    def costs(self, event: str, config: TinyViTConfig, **origin: Any) -> Costs:
        """Return the costs of a network from the journal, or measure and record them."""
        line = self.journal.find(event, config)
        line = line or self.journal.write(event, config, **origin, costs=self.bench.measure(config, self.budget))
        return dict(line["costs"])

    def limited_costs(self, costs: Costs) -> Costs:
        """Return the costs that the budget limits."""
        return {name: costs[name] for name in self.budget.limits}

    def neighbors(self, current: Candidate, limit: float) -> tuple[list[TinyViTConfig], float]:
        """Return the contractions that meet a constraint, or a milder one if there are none, and the constraint."""
        excess = self.budget.excess(current.costs)
        for halvings in range(_HALVINGS):
            reached = excess - (excess - limit) / 2**halvings
            met = []
            for factor, chain in contractions(current.config, self.space).items():
                measured = (self.measure(config, current.number, factor) for config in chain)
                within = (each.config for each in measured if self.budget.excess(each.costs) <= reached)
                met += list(islice(within, 1))
            if met:
                return met, reached
        raise ValueError(
            f"The search is stuck at {current.config}: no remaining factor lowers {', '.join(self.budget.limits)}. "
            "Give a larger budget or a larger space."
        )

    def trades(self, current: Candidate) -> list[Candidate]:
        """Return the networks with one factor expanded as far as the budget holds, and another contracted or none."""
        contracted = {factor: next(chain, None) for factor, chain in contractions(current.config, self.space).items()}
        found: dict[TinyViTConfig, Candidate] = {}
        for taken, config in {"": current.config, **contracted}.items():
            expanded = {} if config is None else expansions(config, self.seed, self.space)
            for given, chain in expanded.items():
                factor = f"{given} for {taken}" if taken else given
                measured = (self.measure(each, current.number, factor) for each in chain if given != taken)
                within = list(takewhile(lambda each: self.budget.holds(each.costs), measured))
                found |= {each.config: each for each in within[-1:]}
        return list(found.values())

    def advance(self, configs: list[TinyViTConfig], parent: Path | None, title: str, limit: float) -> Candidate:
        """Evaluate networks, select the best one and remove the weights of the others.

        Args:
            configs: the networks; of equally accurate ones the one nearer to the budget is better.
            parent: file of the weights that they inherit from.
            title: name in the progress bar.
            limit: constraint of the step, for the journal.
        """
        files = {each: self._file_of(each) for each in configs if self.journal.find("evaluated", each) is None}
        with ProgressBar(title, len(configs), self.progress, len(configs) - len(files)) as bar:
            for config, values in run_evaluations(self.workers, self.evaluate, files, parent):
                self.journal.write("evaluated", config, **values)
                bar.step()
        for config in configs:
            line = self.journal.find("evaluated", config) or {}
            self.candidates[config] = dataclasses.replace(self.candidates[config], accuracy=line["accuracy"])
        found = [self.candidates[config] for config in configs]
        best = self.keep(max(found, key=lambda each: (each.score, -self.budget.excess(each.costs))), limit)
        for each in found:
            if each.number not in self.kept:
                self._file_of(each.config).unlink(missing_ok=True)
        return best

    def keep(self, candidate: Candidate, limit: float) -> Candidate:
        """Select and record a network."""
        if candidate.number not in self.kept:
            self.kept.append(candidate.number)
        self.journal.write("kept", candidate.config, number=candidate.number, excess=limit)
        return candidate

    def seed_weights(self) -> Path | None:
        """Return the file of the seed's weights, written on the first call; ``None`` without weights."""
        if self.network is None:
            return None
        file = self.weights / "seed.safetensors"
        if not file.exists():
            save_checkpoint(self.network, file)
        return file

    def weights_of(self, candidate: Candidate) -> Path | None:
        """Return the file of a selected network's trained weights; ``None`` if its evaluation returned no network."""
        line = self.journal.find("evaluated", candidate.config)
        if line is None or not line["trained"]:
            return None
        file = self._file_of(candidate.config)
        if not file.exists():
            raise ValueError(f"{file}, listed in {self.journal.path}, is missing. Remove the folder to start over.")
        return file

    def _file_of(self, config: TinyViTConfig) -> Path:
        return self.weights / f"{self.candidates[config].number:05d}.safetensors"


def _config_of(network: str | TinyViTConfig | TinyViT) -> TinyViTConfig:
    if isinstance(network, str):
        return TinyViTConfig.from_variant(network)
    return network.config if isinstance(network, TinyViT) else network
