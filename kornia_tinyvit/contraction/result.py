"""Result of a search."""

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
    """A network of a search.

    Args:
        number: index of the candidate; the seed is 0.
        parent: number of the network it was derived from; ``None`` for the first.
        factor: the contracted factor, such as ``"depths[2]"``, or the trade, such as ``"mlp_ratio for depths[2]"``;
            ``None`` for the first.
        config: the configuration.
        costs: the costs, see :data:`~kornia_tinyvit.contraction.budget.Costs`.
        accuracy: result of the evaluation; ``None`` if the network did not meet the step's constraint.
    """

    number: int
    parent: int | None
    factor: str | None
    config: TinyViTConfig
    costs: Costs
    accuracy: float | None

    @property
    def score(self) -> float:
        """The accuracy; minus infinity without one."""
        return -math.inf if self.accuracy is None else self.accuracy

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON-compatible types."""
        return {**vars(self), "config": self.config.to_dict()}


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Args:
        candidates: all measured networks in order.
        kept: numbers of the selected networks in order of selection.
        weights: file of the winner's trained weights; ``None`` if the evaluation returned no network.
        budget: the budget.
    """

    candidates: tuple[Candidate, ...]
    kept: tuple[int, ...]
    weights: Path | None
    budget: Budget

    @property
    def path(self) -> tuple[Candidate, ...]:
        """The selected networks, from the first to the winner."""
        return tuple(self.candidates[number] for number in self.kept)

    @property
    def evaluated(self) -> tuple[Candidate, ...]:
        """The evaluated networks, which met the constraint of their step."""
        return tuple(candidate for candidate in self.candidates if candidate.accuracy is not None)

    @property
    def winner(self) -> Candidate:
        """The best network within the budget."""
        return self.path[-1]

    @property
    def config(self) -> TinyViTConfig:
        """Configuration of the winner."""
        return self.winner.config

    def network(self) -> TinyViT:
        """Build the winner, with its trained weights if there are any."""
        return TinyViT.from_config(self.config, pretrained=self.weights or False)

    def pareto_front(self, cost: str) -> tuple[Candidate, ...]:
        """Return the evaluated networks without a more accurate one at the same or a lower cost.

        Args:
            cost: name of the cost, such as ``"macs"``; for ``"throughput"`` higher is better.
        """
        sign = -1 if cost == "throughput" else 1
        front: list[Candidate] = []
        for each in sorted(self.evaluated, key=lambda each: (sign * each.costs[cost], -each.score)):
            if not front or each.score > front[-1].score:
                front.append(each)
        return tuple(front)
