"""``kornia-tinyvit contract``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kornia_tinyvit import contraction
from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.cli import training_options as shared
from kornia_tinyvit.cli.options import Device, parse_device, refuse_idle
from kornia_tinyvit.cli.requests import command
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.contraction import Candidate, SearchResult
from kornia_tinyvit.contraction.neighbors import read_factor
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.deploy.benchmark import DTYPES
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.distillation.losses import StoredLabelLoss
from kornia_tinyvit.model import TinyViT

Amount = Annotated[str | None, typer.Option(help="A number; k, M and G are thousands, millions and billions.")]


class From(StrEnum):
    """What a candidate's training begins with."""

    inherit = "inherit"
    fresh = "fresh"


@dataclass(frozen=True, kw_only=True)
class ContractRequest(shared.TrainingRequest):
    """The options of ``contract``."""

    data: Annotated[Path, typer.Argument(help="Images: class folders, parquet files or tar files, as for 'train'.")]
    max_parameters: Amount = None
    max_macs: Amount = None
    max_latency_ms: Annotated[float | None, typer.Option(help="Milliseconds for one image, in --engine.")] = None
    min_throughput: Annotated[float | None, typer.Option(help="Images a second in batches, in --engine.")] = None
    max_memory: Amount = None
    steps: Annotated[int, typer.Option(min=1, help="Steps from the seed to the budget.")] = 8
    refine: Annotated[
        Path | None, typer.Option(help="File of a contracted network: improve it by trades within the budget instead.")
    ] = None
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of trades, with --refine.")] = 2
    candidates: Annotated[int, typer.Option(min=1, help="Networks that a round evaluates, with --refine.")] = 8
    min_depth: Annotated[
        int, typer.Option(min=1, help="Fewest blocks of a stage; brief trainings undervalue depth.")
    ] = 1
    min_ratio: Annotated[float, typer.Option(help="Smallest expansion of the MBConv blocks and of the MLPs.")] = 1.0
    start: Annotated[
        From, typer.Option(help="Train candidates from what is left of their parent's weights, or fresh.")
    ] = From.inherit
    store: Annotated[Path | None, typer.Option(help="Soft labels of these images to learn from.")] = None
    recipe: shared.RecipeName = "in1k"
    epochs: Annotated[int, typer.Option(min=1, help="Epochs that each candidate is trained for.")] = 1
    hold_out: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images to measure on where there is no --validation.")
    ] = 0.01
    out: shared.Out = Path("runs/contract")
    processes: Annotated[int, typer.Option(min=1, help="Candidates that are trained at a time.")] = 1
    engine: Annotated[str, typer.Option(help=f"Where times are measured: auto, {', '.join(ENGINES)}.")] = "eager"
    dtype_name: Annotated[
        str, typer.Option("--dtype", help=f"Type that the engine computes in: {', '.join(DTYPES)}.")
    ] = "float32"
    device: Device = "cpu"
    engine_batch: Annotated[int, typer.Option(min=1, help="Images at a time for the throughput.")] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype_name not in DTYPES:
            raise ValueError(f"--dtype is one of {', '.join(DTYPES)}; got {self.dtype_name!r}.")

    def refuse_idle(self, context: typer.Context) -> None:
        """Reject options without effect."""
        timed = self.max_latency_ms is not None or self.min_throughput is not None
        for idle, names, where in (
            (self.refine is None, ("rounds", "candidates"), "without --refine"),
            (self.refine is not None, ("steps",), "with --refine"),
            (self.validation is not None, ("hold_out",), "with --validation"),
            (not timed, ("engine", "device"), "without --max-latency-ms and --min-throughput"),
            (self.min_throughput is None, ("engine_batch",), "without --min-throughput"),
        ):
            if idle:
                refuse_idle(context, names, where)


@command
def contract(context: typer.Context, asked: ContractRequest) -> None:
    """Contract a network until it fits a budget, one factor at a time; the same command goes on after a stop.

    With --refine a network that fits it is improved: one factor is given back for what another one takes.
    --out gets search.jsonl with all candidates, search.png, and winner.safetensors, a file for every command's
    --pretrained and for 'train --variant', which trains a network like it.
    """
    asked.refuse_idle(context)
    budget = contraction.Budget(
        _amount(asked.max_parameters, "--max-parameters"),
        _amount(asked.max_macs, "--max-macs"),
        asked.max_latency_ms,
        asked.min_throughput,
        _amount(asked.max_memory, "--max-memory"),
    )
    bench = contraction.Bench(
        asked.engine, DTYPES[asked.dtype_name], str(parse_device(asked.device)), asked.engine_batch
    )
    recipe, out = asked.find_recipe(asked.recipe), asked.out
    images, measured = _split(asked.drawn(ClassificationDataset.open(asked.data)), asked)
    samples = asked.samples(recipe, asked.on_broken, images)
    objective, replays = None, None
    if asked.store is not None:
        opened = shared.open_labels(asked.store, samples)
        objective, replays = StoredLabelLoss(opened, samples.augmentation), shared.whole_epochs(opened, recipe.epochs)
        if opened.manifest.num_classes != images.num_classes:
            raise ValueError(
                f"The teacher knows {opened.manifest.num_classes} classes, but the images have {images.num_classes}."
            )
    evaluate = contraction.ProxyTraining(
        samples, measured, recipe, out / "training", objective, asked.start.value, replays, asked.seed,
        asked.process_batch, precision=asked.precision, cpu=asked.cpu,
    )  # fmt: skip
    network = asked.build(TinyViT.from_config, recipe, asked.seed, num_classes=images.num_classes)
    seeded = network if asked.pretrained else network.config
    options: dict[str, Any] = {
        "space": contraction.SearchSpace(asked.min_depth, min_ratio=asked.min_ratio),
        "bench": bench,
        "processes": asked.processes,
        "progress": not asked.as_json,
    }
    if asked.refine is None:
        result = contraction.contract(seeded, budget, evaluate, out, steps=asked.steps, **options)
    else:
        options |= {"rounds": asked.rounds, "candidates": asked.candidates}
        result = contraction.refine(shared.like(str(asked.refine)), seeded, budget, evaluate, out, **options)
    winner, plot = out / "winner.safetensors", out / "search.png"
    save_checkpoint(result.network(), winner, class_names=images.class_names)
    contraction.save_search(plot, result)
    if asked.as_json:
        told = {"winner": str(winner), "evaluated": len(result.evaluated)}
        print(json.dumps(told | {"path": [candidate.to_dict() for candidate in result.path]}))
    else:
        _show(result)
        print(f"{len(result.evaluated)} networks trained: {winner}, {plot}")


def _split(
    images: ClassificationDataset, asked: ContractRequest
) -> tuple[ClassificationDataset, ClassificationDataset]:
    """Return what to train on and what to measure on."""
    validation = asked.validation_images(images.class_names)
    if validation is not None:
        return images, validation
    if asked.store is not None:
        raise ValueError("A store holds labels of all the images, so none can be held out: give --validation.")
    return images.split(max(1, round(asked.hold_out * len(images))))


def _amount(text: str | None, option: str) -> float | None:
    """Read a number such as 1300000, 1.3e6 or 1.3M."""
    if text is None:
        return None
    found = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:e\d+)?)([kMG]?)", text.strip(), re.ASCII)
    if found is None:
        raise ValueError(f"{option} is a number such as 1.3M, 30e6 or 2G; got {text!r}.")
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
    """Tell what was contracted, such as ``depths[2] 6 -> 5``, or what was given back for it."""
    if candidate.parent is None or candidate.factor is None:
        return "the first"
    changes = []
    for factor in candidate.factor.split(" for "):
        name, stage = read_factor(factor)
        values = [getattr(each.config, name) for each in (result.candidates[candidate.parent], candidate)]
        before, after = (value if stage is None else value[stage] for value in values)
        changes.append(f"{factor} {before:g} -> {after:g}")
    return " for ".join(changes)


def _short(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
