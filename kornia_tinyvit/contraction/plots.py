"""The plot of a search: accuracy against each cost that the budget limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kornia_tinyvit.contraction.result import Candidate, SearchResult
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.files import replacing

__all__ = ["save_search"]

_GREY, _BLUE, _RED = "#b4b4b4", "#30638e", "#d1495b"
_UNITS = {
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "latency_ms": "milliseconds for one image",
    "throughput": "images per second",
    "memory": "bytes of memory",
}


def save_search(path: str | Path, result: SearchResult) -> None:
    """Plot the networks that a search evaluated, a panel for each cost that the budget limits.

    Gray: evaluated networks. Blue: those that were kept, from the seed to the winner. Red: the Pareto front. Dashed:
    the limit. Costs are on a logarithmic scale.

    Args:
        path: the PNG file to write.
        result: the search.

    Raises:
        MissingExtraError: without matplotlib.
    """
    with optional_imports("The plot needs matplotlib", "'kornia-tinyvit[train]'"):
        from matplotlib.figure import Figure

    limits = result.budget.limits
    figure = Figure(figsize=(5.6 * len(limits), 4), layout="constrained")
    panels = figure.subplots(1, len(limits), squeeze=False)[0]
    for axes, (cost, limit) in zip(panels, limits.items(), strict=True):
        _plot(axes, result, cost, limit)
    with replacing(path, suffix=".png") as temporary:
        figure.savefig(temporary, dpi=100)


def _plot(axes: Any, result: SearchResult, cost: str, limit: float) -> None:
    def places(networks: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        return [each.costs[cost] for each in networks], [each.score for each in networks]

    axes.axvline(limit, color="black", linestyle="--", linewidth=1, label="limit")
    axes.plot(*places(result.evaluated), "o", color=_GREY, markersize=5, label="evaluated")
    axes.plot(*places(result.path), "o-", color=_BLUE, markersize=8, label="kept")
    # Between the costs of two networks of the front, the accuracy of the cheaper one is to be had.
    front = places(result.pareto_front(cost))
    axes.plot(*front, "o-", color=_RED, markersize=4, linewidth=1, drawstyle="steps-post", label="Pareto front")
    axes.set_xscale("log")
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.minorticks_off()
    axes.set(xlabel=_UNITS[cost], ylabel="accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0, fontsize="small")


def _short(value: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"
