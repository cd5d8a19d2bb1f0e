"""Plot of a search: accuracy over each cost that the budget limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kornia_tinyvit.contraction.result import Candidate, SearchResult
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.files import replacing

__all__ = ["save_search"]

_GRAY, _BLUE, _RED = "#b4b4b4", "#30638e", "#d1495b"
_UNITS = {
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "latency_ms": "milliseconds for one image",
    "throughput": "images per second",
    "memory": "bytes of memory",
}


def save_search(path: str | Path, result: SearchResult) -> None:
    """Plot the evaluated networks of a search, with one panel per cost that the budget limits.

    Gray: evaluated networks. Blue: selected ones, from the seed to the winner. Red: the Pareto front. Dashed: the
    limit. Costs are on a logarithmic scale.

    Args:
        path: the PNG file to write.
        result: the search.

    Raises:
        MissingExtraError: if matplotlib is not installed.
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
    from matplotlib.ticker import EngFormatter

    def points(networks: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        return [each.costs[cost] for each in networks], [each.score for each in networks]

    axes.axvline(limit, color="black", linestyle="--", linewidth=1, label="limit")
    axes.plot(*points(result.evaluated), "o", color=_GRAY, markersize=5, label="evaluated")
    axes.plot(*points(result.path), "o-", color=_BLUE, markersize=8, label="kept")
    # Between two networks of the front, the accuracy of the cheaper one is available.
    front = points(result.pareto_front(cost))
    axes.plot(*front, "o-", color=_RED, markersize=4, linewidth=1, drawstyle="steps-post", label="Pareto front")
    axes.set_xscale("log")
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
    shorten = EngFormatter(sep="")  # 1k, 1M, 1G; milliseconds may be less than 1
    axes.xaxis.set_major_formatter(lambda value, _: shorten(value) if value >= 1 else f"{value:.3g}")
    axes.minorticks_off()
    axes.set(xlabel=_UNITS[cost], ylabel="accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0, fontsize="small")
