"""From a large network to one that fits a budget, and among those that fit it: constrained local search."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.contraction.budget import Bench, Budget, Costs
from kornia_tinyvit.contraction.journal import Journal
from kornia_tinyvit.contraction.neighbours import Space, check_contracted, contractions, expansions, smallest
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.progress import progress_bar

__all__ = ["Candidate", "Evaluate", "SearchResult", "contract", "refine"]

#: From a configuration and the trained network it was contracted from (``None`` where there is none) to its accuracy,
#: and, where it trained one, the network that the next contractions start from.
Evaluate = Callable[[TinyViTConfig, TinyViT | None], float | tuple[float, TinyViT]]

# How often a step is halved where no single factor reaches it, before the search is given up.
_HALVINGS = 12


@dataclass(frozen=True)
class Candidate:
    """A network that a search looked at.

    Args:
        number: position among the candidates; the seed is 0.
        parent: number of the network it was made from; ``None`` for the first.
        factor: what was contracted, such as ``"depths[2]"``, or given back, such as ``"mlp_ratio for depths[2]"``;
            ``None`` for the first.
        config: the network.
        costs: what it costs, see :data:`~kornia_tinyvit.contraction.budget.Costs`.
        accuracy: what the evaluation said; ``None`` if it did not meet the step's constraint and was not evaluated.
    """

    number: int
    parent: int | None
    factor: str | None
    config: TinyViTConfig
    costs: Costs
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return {**vars(self), "config": self.config.to_dict()}


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Args:
        candidates: all networks it looked at, in their order.
        kept: numbers of those it went on from, in the order in which it did.
        weights: file of the winner's weights as its evaluation left them; ``None`` if that returned no network.
        budget: what was asked for.
    """

    candidates: tuple[Candidate, ...]
    kept: tuple[int, ...]
    weights: Path | None
    budget: Budget

    @property
    def path(self) -> tuple[Candidate, ...]:
        """The kept networks, from the first to the winner."""
        return tuple(self.candidates[number] for number in self.kept)

    @property
    def evaluated(self) -> tuple[Candidate, ...]:
        """The networks that met the constraint of their step and were evaluated."""
        return tuple(candidate for candidate in self.candidates if candidate.accuracy is not None)

    @property
    def winner(self) -> Candidate:
        """The network that fits the budget."""
        return self.path[-1]

    @property
    def config(self) -> TinyViTConfig:
        """Its configuration."""
        return self.winner.config

    def network(self) -> TinyViT:
        """Build the winner, with its weights where there are some."""
        return TinyViT.from_config(self.config) if self.weights is None else _load(self.weights)

    def pareto_front(self, cost: str) -> tuple[Candidate, ...]:
        """Return the evaluated networks that no other one beats in accuracy at the same or a lower cost.

        Args:
            cost: such as ``"macs"``; with ``"throughput"`` more is better.
        """
        sign = -1 if cost == "throughput" else 1
        front: list[Candidate] = []
        for each in sorted(self.evaluated, key=lambda each: (sign * each.costs[cost], -_accuracy(each))):
            if not front or _accuracy(each) > _accuracy(front[-1]):
                front.append(each)
        return tuple(front)


def contract(
    seed: str | TinyViTConfig | TinyViT,
    budget: Budget,
    evaluate: Evaluate,
    out: str | Path,
    *,
    steps: int = 8,
    space: Space | None = None,
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
    asked = {"steps": steps}
    with _searching(seed, budget, evaluate, Path(out), space, bench, processes, progress, asked) as search:
        return search.contract(steps)


def refine(
    start: str | TinyViTConfig,
    seed: str | TinyViTConfig | TinyViT,
    budget: Budget,
    evaluate: Evaluate,
    out: str | Path,
    *,
    rounds: int = 2,
    candidates: int = 8,
    space: Space | None = None,
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
    first = TinyViTConfig.from_variant(start) if isinstance(start, str) else start
    asked = {"start": first.to_dict(), "candidates": candidates}
    with _searching(seed, budget, evaluate, Path(out), space, bench, processes, progress, asked) as search:
        return search.refine(first, rounds, candidates)


class _Search:
    """Walks from a seed to a budget. What the journal knows is not done again, so a restart walks the same way."""

    def __init__(
        self,
        seed: TinyViTConfig,
        network: TinyViT | None,
        budget: Budget,
        evaluate: Evaluate,
        out: Path,
        space: Space,
        bench: Bench,
        journal: Journal,
        workers: Executor | None,
        bar: Progress,
    ) -> None:
        self.seed, self.network, self.budget, self.evaluate = seed, network, budget, evaluate
        self.space, self.bench, self.journal, self.workers, self.bar = space, bench, journal, workers, bar
        self.weights = out / "weights"
        self.candidates: dict[TinyViTConfig, Candidate] = {}
        self.kept: list[int] = []

    def contract(self, steps: int) -> SearchResult:
        """Take all steps from the seed to the budget."""
        current = self._meet(self.seed, None, None)
        first = self.budget.excess(current.costs)
        if first:
            self._refuse_the_impossible()
        self._evaluate_all([self.seed], self._first_weights(), "seed")
        current = self._keep(self.seed, first)
        for step in range(1, steps + 1):
            limit = first * (1 - step / steps)
            while self.budget.excess(current.costs) > limit:
                met, reached = self._neighbours(current, limit)
                self._evaluate_all(met, self._weights_of(current), f"step {step} of {steps}")
                best = max(met, key=self._worth)
                current = self._keep(best, reached, met)
        return self._result(current)

    def refine(self, first: TinyViTConfig, rounds: int, candidates: int) -> SearchResult:
        """Trade factors of a network that fits the budget."""
        current = self._meet(first, None, None)
        self._refuse_outside(current)
        current = self._keep(first, 0.0)
        for turn in range(1, rounds + 1):
            trades = [config for config in self._trades(current) if self.candidates[config].accuracy is None]
            trades.sort(key=lambda config: self.budget.slack(self.candidates[config].costs))
            chosen = trades[:candidates]
            # With the first, which is new in the first round, so that no process waits for it.
            rivals = [current.config, *chosen]
            self._evaluate_all(rivals, self._first_weights(), f"round {turn} of {rounds}")
            current = self._keep(max(rivals, key=self._worth), 0.0, chosen)
        return self._result(current)

    def _result(self, current: Candidate) -> SearchResult:
        return SearchResult(tuple(self.candidates.values()), tuple(self.kept), self._weights_of(current), self.budget)

    def _refuse_outside(self, first: Candidate) -> None:
        """Refuse a network to begin with that is beyond the budget or the seed."""
        if not self.budget.holds(first.costs):
            costs = {name: first.costs[name] for name in self.budget.limits}
            raise ValueError(
                f"The first network has {costs}, beyond the budget {self.budget.limits}; contract it first."
            )
        check_contracted(first.config, self.seed)

    def _trades(self, current: Candidate) -> list[TinyViTConfig]:
        """Return the networks with one factor given back, as they are or for a step of another one."""
        taken = {name: next(chain, None) for name, chain in contractions(current.config, self.space).items()}
        found = self._grown(current.config, current, "")
        for factor, smaller in taken.items():
            if smaller is not None:
                found |= self._grown(smaller, current, factor)
        return list(found)

    def _grown(self, config: TinyViTConfig, current: Candidate, taken: str) -> dict[TinyViTConfig, None]:
        """Return a network with each factor but the one that was taken given back as far as the budget holds."""
        ways = expansions(config, self.seed, self.space)
        names = {given: f"{given} for {taken}" if taken else given for given in ways if given != taken}
        grown = [self._last_within(ways[given], current, name) for given, name in names.items()]
        return dict.fromkeys(config for config in grown if config is not None)

    def _last_within(self, chain: Iterator[TinyViTConfig], current: Candidate, factor: str) -> TinyViTConfig | None:
        """Follow networks that grow as far as the budget holds."""
        last = None
        for config in chain:
            if not self.budget.holds(self._meet(config, current, factor).costs):
                break
            last = config
        return last

    def _first_weights(self) -> Path | None:
        """Write the seed's weights where the evaluations read them."""
        if self.network is None:
            return None
        file = self.weights / "seed.safetensors"
        if not file.exists():
            save_checkpoint(self.network, file)
        return file

    def _worth(self, config: TinyViTConfig) -> tuple[float, float]:
        """Order networks by their accuracy, and equal ones by how near they are to the budget."""
        candidate = self.candidates[config]
        return _accuracy(candidate), -self.budget.excess(candidate.costs)

    def _meet(self, config: TinyViTConfig, parent: Candidate | None, factor: str | None) -> Candidate:
        """Measure a network that is new."""
        if config not in self.candidates:
            told = self.journal.find("measured", config) or self.journal.write(
                "measured",
                config,
                number=len(self.candidates),
                parent=None if parent is None else parent.number,
                factor=factor,
                costs=self.bench.measure(config, self.budget),
            )
            self.candidates[config] = Candidate(
                len(self.candidates), told["parent"], told["factor"], config, told["costs"], None
            )
        return self.candidates[config]

    def _refuse_the_impossible(self) -> None:
        least = smallest(self.seed, self.space)
        known = self.journal.find("smallest", least)
        known = known or self.journal.write("smallest", least, costs=self.bench.measure(least, self.budget))
        if not self.budget.holds(known["costs"]):
            costs = {name: known["costs"][name] for name in self.budget.limits}
            raise ValueError(
                f"The budget {self.budget.limits} cannot be met: the smallest network of the space has {costs}. "
                "Give a larger budget, a smaller picture size, or a space that goes further."
            )

    def _neighbours(self, current: Candidate, limit: float) -> tuple[list[TinyViTConfig], float]:
        """Return the neighbours that meet a constraint, or a milder one where none does, and the constraint."""
        excess = self.budget.excess(current.costs)
        for halvings in range(_HALVINGS):
            reached = excess - (excess - limit) / 2**halvings
            found = [self._first_within(current, name, reached) for name in contractions(current.config, self.space)]
            met = [config for config in found if config is not None]
            if met:
                return met, reached
        raise ValueError(
            f"The search is stuck at {current.config}: no factor that is left lowers {', '.join(self.budget.limits)}. "
            "Give a larger budget, or a space that goes further."
        )

    def _first_within(self, current: Candidate, factor: str, limit: float) -> TinyViTConfig | None:
        """Contract a factor just so far that the constraint holds."""
        for config in contractions(current.config, self.space)[factor]:
            if self.budget.excess(self._meet(config, current, factor).costs) <= limit:
                return config
        return None

    def _evaluate_all(self, configs: list[TinyViTConfig], parent: Path | None, title: str) -> None:
        """Evaluate what is not known yet, each result written down as it comes."""
        missing = [config for config in configs if self.journal.find("evaluated", config) is None]
        task = self.bar.add_task(title, total=len(configs), completed=len(configs) - len(missing))
        for config, told in self._run(missing, parent):
            self.journal.write("evaluated", config, **told)
            self.bar.advance(task)
        for config in configs:
            accuracy = (self.journal.find("evaluated", config) or {})["accuracy"]
            self.candidates[config] = dataclasses.replace(self.candidates[config], accuracy=accuracy)

    def _run(self, configs: list[TinyViTConfig], parent: Path | None) -> Iterator[tuple[TinyViTConfig, dict[str, Any]]]:
        """Evaluate, in the order in which the evaluations end."""
        jobs = {config: (self.evaluate, config, parent, self._file_of(config)) for config in configs}
        if self.workers is None:
            yield from ((config, _evaluate(*job)) for config, job in jobs.items())
            return
        running = {self.workers.submit(_evaluate, *job): config for config, job in jobs.items()}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            for future in running:
                future.cancel()

    def _keep(self, config: TinyViTConfig, limit: float, among: Sequence[TinyViTConfig] = ()) -> Candidate:
        """Go on from a network, and forget the weights of those that were evaluated with it and not chosen."""
        candidate = self.candidates[config]
        if candidate.number not in self.kept:
            self.kept.append(candidate.number)
        self.journal.write("kept", config, number=candidate.number, excess=limit)
        for other in among:
            if other != config:
                self._file_of(other).unlink(missing_ok=True)
        return candidate

    def _file_of(self, config: TinyViTConfig) -> Path:
        return self.weights / f"{self.candidates[config].number:05d}.safetensors"

    def _weights_of(self, candidate: Candidate) -> Path | None:
        told = self.journal.find("evaluated", candidate.config)
        if told is None or not told["trained"]:
            return None
        file = self._file_of(candidate.config)
        if not file.exists():
            raise ValueError(f"{file} is gone, which {self.journal.path} tells of; remove the folder to search anew.")
        return file


@contextmanager
def _searching(
    seed: str | TinyViTConfig | TinyViT,
    budget: Budget,
    evaluate: Evaluate,
    out: Path,
    space: Space | None,
    bench: Bench | None,
    processes: int,
    progress: bool,
    asked: dict[str, Any],
) -> Iterator[_Search]:
    """Open the journal of a search and what it needs, and close them however it ends."""
    network = seed if isinstance(seed, TinyViT) else None
    config = TinyViTConfig.from_variant(seed) if isinstance(seed, str) else seed
    config = config.config if isinstance(config, TinyViT) else config
    space, bench = space or Space(), bench or Bench()
    asked = {
        "seed": config.to_dict(), "weights": None if network is None else _digest(network),
        "budget": budget.limits, **asked, "space": space.describe(), "bench": bench.describe(),
        "evaluation": _describe(evaluate),
    }  # fmt: skip
    journal = Journal(out / "search.jsonl", asked)
    try:
        with _workers(processes) as workers, progress_bar(progress) as bar:
            yield _Search(config, network, budget, evaluate, out, space, bench, journal, workers, bar)
    finally:
        journal.close()


def _evaluate(evaluate: Evaluate, config: TinyViTConfig, parent: Path | None, weights: Path) -> dict[str, Any]:
    """Evaluate a network in this process; what it trained is written to a file.

    Raises:
        ValueError: if the accuracy is no number, or the network another one.
    """
    began = time.perf_counter()
    found = evaluate(config, None if parent is None else _load(parent))
    accuracy, network = found if isinstance(found, tuple) else (found, None)
    if not math.isfinite(accuracy):
        raise ValueError(f"The evaluation of {config} said {accuracy!r}; expected a finite number.")
    if network is not None:
        if network.config != config:
            raise ValueError(f"The evaluation was asked about {config} and returned the network {network.config}.")
        save_checkpoint(network, weights)
    seconds = round(time.perf_counter() - began, 3)
    return {"accuracy": float(accuracy), "trained": network is not None, "seconds": seconds}


def _load(file: Path) -> TinyViT:
    return TinyViT.from_config(pretrained=file)


def _accuracy(candidate: Candidate) -> float:
    return -math.inf if candidate.accuracy is None else candidate.accuracy


def _digest(network: TinyViT) -> str:
    """Return 16 hexadecimal digits that tell weights from others."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _describe(evaluate: Evaluate) -> Any:
    """Return what tells an evaluation from others, as far as it says so."""
    if hasattr(evaluate, "describe"):
        return evaluate.describe()
    return getattr(evaluate, "__qualname__", type(evaluate).__qualname__)


@contextmanager
def _workers(processes: int) -> Iterator[Executor | None]:
    """Give so many processes, which share the threads and end with this one however it ends; ``None`` for one."""
    if processes == 1:
        yield None
        return
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads, CUDA and the journal's lock
    with ProcessPoolExecutor(processes, context, _begin_worker, (threads,)) as pool:
        yield pool


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
