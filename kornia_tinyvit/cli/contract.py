"""``kornia-tinyvit contract``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from kornia_tinyvit import contraction
from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.cli import training_options as shared
from kornia_tinyvit.cli.options import find_device
from kornia_tinyvit.cli.requests import command, option
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.contraction import Candidate, SearchResult
from kornia_tinyvit.contraction.neighbors import read_factor
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.deploy.benchmark import DTYPES
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.distillation.losses import StoredLabelLoss
from kornia_tinyvit.model import TinyViT


class Start(StrEnum):
    """First weights of candidates."""

    inherit = "inherit"
    fresh = "fresh"


AMOUNT = "Number, with the suffix k, M or G for 1e3, 1e6 or 1e9."


@dataclass(frozen=True, kw_only=True)
class ContractRequest(shared.TrainingRequest):
    """The options of ``contract``."""

    max_parameters: str | None = option("Budget", AMOUNT, None)
    max_macs: str | None = option("Budget", AMOUNT, None)
    max_memory: str | None = option("Budget", AMOUNT, None)
    max_latency_ms: float | None = option("Budget", "Milliseconds per image, in --engine.", None)
    min_throughput: float | None = option("Budget", "Images per second in batches, in --engine.", None)
    engine: str = option("Budget", f"Engine of the limits of time: auto, {', '.join(ENGINES)}.", "eager")
    engine_device: str = option("Budget", "Device of the engine, as for --device.", "cpu")
    engine_batch: int = option("Budget", "Batch size of --min-throughput.", 16, min=1)
    dtype_name: str = option("Budget", f"Type of the engine: {', '.join(DTYPES)}.", "float32", "--dtype")
    steps: int = option("Search", "Steps from the seed to the budget.", 8, min=1)
    refine: Path | None = option("Search", "File of a contracted network to improve within the budget instead.", None)
    rounds: int = option("Search", "Rounds of --refine.", 2, min=1)
    candidates: int = option("Search", "Networks that a round of --refine evaluates.", 8, min=1)
    min_depth: int = option("Search", "Minimum blocks per stage; brief trainings undervalue depth.", 1, min=1)
    min_ratio: float = option("Search", "Minimum expansion ratio of MBConv blocks and MLPs.", 1.0)
    start: Start = option("Search", "Weights of candidates: inherited from their parent, or random.", Start.inherit)
    processes: int = option("Search", "Candidates that are trained in parallel.", 1, min=1)
    store: Path | None = option("Training", "Label store of these images, to train on soft labels.", None)
    epochs: int = option("Training", "Epochs of each candidate.", 1, min=1)
    hold_out: float = option("Data", "Fraction of the images to evaluate on without --validation.", 0.01, min=0, max=1)
    out: Path = option("Output", shared.OUT, Path("runs/contract"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype_name not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {self.dtype_name!r}.")
        timed = self.max_latency_ms is not None or self.min_throughput is not None
        for unused, names, reason in (
            (self.refine is None, ("rounds", "candidates"), "without --refine"),
            (self.refine is not None, ("steps",), "with --refine"),
            (self.validation is not None, ("hold_out",), "with --validation"),
            (self.start is Start.fresh, ("weights",), "with --start fresh"),
            (not timed, ("engine", "engine_device"), "without --max-latency-ms and --min-throughput"),
            (not timed and self.max_memory is None, ("dtype_name",), "without limits of time or memory"),
            (self.min_throughput is None, ("engine_batch",), "without --min-throughput"),
        ):
            if unused:
                self.reject_unused(names, reason)


@command
def contract(request: ContractRequest) -> None:
    """Contract a network until it fits a budget, one factor at a time, or resume a search.

    --refine improves a network that fits: it enlarges one factor and reduces another. The folder gets search.jsonl with
    all candidates, search.png, and winner.safetensors, a file for --weights of every command and for the --variant of
    'train', which trains the same architecture.
    """
    amounts = {name: _amount(request, name) for name in ("max_parameters", "max_macs", "max_memory")}
    budget = contraction.Budget(**amounts, max_latency_ms=request.max_latency_ms, min_throughput=request.min_throughput)
    device = str(find_device(request.engine_device))
    bench = contraction.Bench(request.engine, DTYPES[request.dtype_name], device, request.engine_batch)
    recipe, out = request.find_recipe(), request.out
    images, validation = _split(request.sample(ClassificationDataset.open(request.data)), request)
    request.note_run(images, request.device, request.weights or "random", validation)
    recipe = request.fit_batch(recipe, images)
    classes: dict[str, Any] = {"num_classes": images.num_classes, "class_names": images.class_names}
    network = request.build(TinyViT.from_config, recipe, request.seed, **classes)
    statistics = {} if request.store is not None else network.preprocessing.statistics  # a store has its own
    samples = request.augment(recipe, request.on_broken, images, **statistics)
    objective, replays = None, None
    if request.store is not None:
        store = shared.open_labels(request.store, samples)
        objective = StoredLabelLoss(store, samples.augmentation)
        replays = shared.find_epochs(store, recipe.epochs, request)
        shared.match_labels(samples, store.manifest.teacher.get("class_names"), store.manifest.num_classes)
        images, validation = samples.images, validation.with_classes(samples.images.class_names)
    evaluate = contraction.ProxyTraining(
        samples, validation, recipe, out / "training", objective, request.start.value, replays, request.seed,
        request.process_batch, precision=request.precision, cpu=request.cpu,
    )  # fmt: skip
    seed = network if request.weights else network.config
    space = contraction.SearchSpace(request.min_depth, min_ratio=request.min_ratio)
    settings: dict[str, Any] = {"space": space, "bench": bench, "processes": request.processes}
    settings["progress"] = request.shows_progress
    if request.refine is None:
        result = contraction.contract(seed, budget, evaluate, out, steps=request.steps, **settings)
    else:
        settings |= {"rounds": request.rounds, "candidates": request.candidates}
        start = shared.read_config(str(request.refine))
        result = contraction.refine(start, seed, budget, evaluate, out, **settings)
    winner, plot = out / "winner.safetensors", out / "search.png"
    save_checkpoint(result.network(), winner, class_names=images.class_names)
    contraction.save_search(plot, result)
    if request.as_json:
        report = {"winner": str(winner), "evaluated": len(result.evaluated)}
        print(json.dumps(report | {"path": [candidate.to_dict() for candidate in result.path]}))
    else:
        _show(result)
        print(f"{len(result.evaluated)} networks trained: {winner}, {plot}")


def _split(
    images: ClassificationDataset, request: ContractRequest
) -> tuple[ClassificationDataset, ClassificationDataset]:
    """Return the images to train on and those to evaluate on."""
    validation = request.open_validation(ClassificationDataset.open, images)
    if validation is not None:
        request.reject_unused(("hold_out",), "with validation images")
        return images, validation.with_classes(images.class_names)
    if request.store is not None:
        raise ValueError("A store has labels of all images, so none can be held out; give --validation.")
    return images.split(max(1, round(request.hold_out * len(images))))


def _amount(request: ContractRequest, name: str) -> float | None:
    """Read a number such as 1300000, 1.3e6 or 1.3M."""
    text = getattr(request, name)
    if text is None:
        return None
    found = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:e\d+)?)([kMG]?)", text.strip(), re.ASCII)
    if found is None:
        raise ValueError(f"--{name.replace('_', '-')} must be a number such as 1.3M, 30e6 or 2G; got {text!r}.")
    return float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]]


def _show(result: SearchResult) -> None:
    limits = result.budget.limits
    rows = [
        [change(result, each), *(_short(each.costs[name]) for name in limits), f"{each.accuracy:.2f}"]
        for each in result.path
    ]
    print_table(["contracted", *limits, "top-1 %"], rows)
    config = result.config
    print(f"widths {config.embed_dims}, depths {config.depths}, windows {config.window_sizes}")
    print(f"MBConv expansion {config.mbconv_expand_ratio:g}, MLP ratio {config.mlp_ratio:g}")


def change(result: SearchResult, candidate: Candidate) -> str:
    """Return what was contracted, e.g. ``depths[2] 6 -> 5``, and of a trade also what was enlarged."""
    if candidate.parent is None or candidate.factor is None:
        return "start"
    changes = []
    for factor in candidate.factor.split(" for "):
        name, stage = read_factor(factor)
        values = [getattr(each.config, name) for each in (result.candidates[candidate.parent], candidate)]
        before, after = (value if stage is None else value[stage] for value in values)
        changes.append(f"{factor} {before:g} -> {after:g}")
    return " for ".join(changes)


def _short(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
