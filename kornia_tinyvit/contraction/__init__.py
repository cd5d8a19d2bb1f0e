"""Contraction: from a large network to one that fits a budget."""

from kornia_tinyvit.contraction.budget import Bench, Budget, count
from kornia_tinyvit.contraction.evaluation import ProxyTraining
from kornia_tinyvit.contraction.inheritance import inherit
from kornia_tinyvit.contraction.neighbors import SearchSpace, contractions, expansions, smallest
from kornia_tinyvit.contraction.plots import save_search
from kornia_tinyvit.contraction.result import Candidate, SearchResult
from kornia_tinyvit.contraction.search import contract, refine

__all__ = [
    "Bench",
    "Budget",
    "Candidate",
    "ProxyTraining",
    "SearchResult",
    "SearchSpace",
    "contract",
    "contractions",
    "count",
    "expansions",
    "inherit",
    "refine",
    "save_search",
    "smallest",
]
