"""What a search came to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.contraction.budget import Budget, Costs
from kornia_tinyvit.model import TinyViT

__all__ = ["Candidate", "SearchResult"]


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

    @property
    def score(self) -> float:
        """The accuracy, to compare by; minus infinity if there is none."""
        return -math.inf if self.accuracy is None else self.accuracy

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
        return TinyViT.from_config(self.config, pretrained=self.weights or False)

    def pareto_front(self, cost: str) -> tuple[Candidate, ...]:
        """Return the evaluated networks that no other one beats in accuracy at the same or a lower cost.

        Args:
            cost: such as ``"macs"``; with ``"throughput"`` more is better.
        """
        sign = -1 if cost == "throughput" else 1
        front: list[Candidate] = []
        for each in sorted(self.evaluated, key=lambda each: (sign * each.costs[cost], -each.score)):
            if not front or each.score > front[-1].score:
                front.append(each)
        return tuple(front)
