"""``kornia-tinyvit contract``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.cli.options import Device, Json, parse_device, refuse_idle
from kornia_tinyvit.cli.training_options import (
    BatchSize,
    Limit,
    OnBroken,
    OnCpu,
    Out,
    Precision,
    ProcessBatch,
    Rate,
    RecipeName,
    Seed,
    Side,
    Start,
    TrainedVariant,
    Validation,
    augment_samples,
    build_student,
    like,
    parse_precision,
)
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.loader import ReplayedSamples
from kornia_tinyvit.deploy.benchmark import DTYPES
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.distillation.manifest import StoreError
from kornia_tinyvit.distillation.store import LabelStore
from kornia_tinyvit.training.recipes import Recipe, find_recipe

if TYPE_CHECKING:
    from kornia_tinyvit.contraction import Candidate, SearchResult

Amount = Annotated[str | None, typer.Option(help="A number; k, M and G are thousands, millions and billions.")]


class From(StrEnum):
    """What a candidate's training begins with."""

    inherit = "inherit"
    fresh = "fresh"


def contract(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Pictures: class folders, parquet files or tar files, as for 'train'.")],
    variant: TrainedVariant = "5m",
    pretrained: Start = None,
    max_parameters: Amount = None,
    max_macs: Amount = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Milliseconds for one picture, in --engine.")] = None,
    min_throughput: Annotated[float | None, typer.Option(help="Pictures a second in batches, in --engine.")] = None,
    max_memory: Amount = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps from the seed to the budget.")] = 8,
    refine: Annotated[
        Path | None, typer.Option(help="File of a contracted network: improve it by trades within the budget instead.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of trades, with --refine.")] = 2,
    candidates: Annotated[int, typer.Option(min=1, help="Networks that a round evaluates, with --refine.")] = 8,
    min_depth: Annotated[
        int, typer.Option(min=1, help="Fewest blocks of a stage; brief trainings undervalue depth.")
    ] = 1,
    min_ratio: Annotated[float, typer.Option(help="Smallest expansion of the MBConv blocks and of the MLPs.")] = 1.0,
    start: Annotated[
        From, typer.Option(help="Train candidates from what is left of their parent's weights, or fresh.")
    ] = From.inherit,
    store: Annotated[Path | None, typer.Option(help="Soft labels of these pictures to learn from.")] = None,
    recipe: RecipeName = "in1k",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs that each candidate is trained for.")] = 1,
    img_size: Side = None,
    batch_size: BatchSize = None,
    process_batch: ProcessBatch = None,
    base_lr: Rate = None,
    validation: Validation = None,
    hold_out: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the pictures to measure on where there is no --validation.")
    ] = 0.01,
    limit: Limit = None,
    out: Out = Path("runs/contract"),
    seed: Seed = 0,
    processes: Annotated[int, typer.Option(min=1, help="Candidates that are trained at a time.")] = 1,
    precision: Precision = "no",
    cpu: OnCpu = False,
    on_broken: OnBroken = "stop",
    engine: Annotated[str, typer.Option(help=f"Where times are measured: auto, {', '.join(ENGINES)}.")] = "eager",
    dtype: Annotated[str, typer.Option(help=f"Type that the engine computes in: {', '.join(DTYPES)}.")] = "float32",
    device: Device = "cpu",
    engine_batch: Annotated[int, typer.Option(min=1, help="Pictures at a time for the throughput.")] = 16,
    as_json: Json = False,
) -> None:
    """Contract a network until it fits a budget, one factor at a time; the same command goes on after a stop.

    With --refine a network that fits it is improved: one factor is given back for what another one takes.
    --out gets search.jsonl with all candidates, search.png, and winner.safetensors, a file for every command's
    --pretrained and for 'train --variant', which trains a network like it.
    """
    from kornia_tinyvit import contraction
    from kornia_tinyvit.contraction import Bench, Budget, ProxyTraining, Space
    from kornia_tinyvit.visualization import save_search

    if refine is None:
        refuse_idle(context, ("rounds", "candidates"), "without --refine")
    else:
        refuse_idle(context, ("steps",), "with --refine")
    if validation is not None:
        refuse_idle(context, ("hold_out",), "with --validation")
    if max_latency_ms is None and min_throughput is None:
        refuse_idle(context, ("engine", "device"), "without --max-latency-ms and --min-throughput")
    if min_throughput is None:
        refuse_idle(context, ("engine_batch",), "without --min-throughput")
    parse_precision(precision)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}; got {dtype!r}.")
    budget = Budget(
        _amount(max_parameters, "--max-parameters"),
        _amount(max_macs, "--max-macs"),
        max_latency_ms,
        min_throughput,
        _amount(max_memory, "--max-memory"),
    )
    bench = Bench(engine, DTYPES[dtype], str(parse_device(device)), engine_batch)
    chosen = find_recipe(recipe, epochs=epochs, img_size=img_size, batch_size=batch_size, base_lr=base_lr)
    lesson = _plan(data, validation, store, chosen, seed, on_broken, limit, hold_out)
    evaluate = ProxyTraining(
        lesson.samples, lesson.validation, chosen, out / "training", lesson.objective, start.value, lesson.replays,
        seed, process_batch, precision=precision, cpu=cpu,
    )  # fmt: skip
    network = build_student(variant, pretrained, chosen, lesson.classes, seed, False)
    begin = network if pretrained else network.config
    shared: Any = {
        "space": Space(min_depth, min_ratio=min_ratio), "bench": bench, "processes": processes, "progress": not as_json
    }  # fmt: skip
    if refine is None:
        result = contraction.contract(begin, budget, evaluate, out, steps=steps, **shared)
    else:
        first = like(str(refine))
        result = contraction.refine(
            first, begin, budget, evaluate, out, rounds=rounds, candidates=candidates, **shared
        )  # fmt: skip
    save_search(out / "search.png", result)
    save_checkpoint(result.network(), out / "winner.safetensors", class_names=lesson.class_names)
    if as_json:
        told = {"winner": str(out / "winner.safetensors"), "evaluated": len(result.evaluated)}
        print(json.dumps(told | {"path": [candidate.to_dict() for candidate in result.path]}))
    else:
        _show(result, out)


@dataclass(frozen=True)
class _Lesson:
    """What candidates learn from."""

    samples: ReplayedSamples
    validation: ClassificationDataset
    objective: Any
    replays: list[int] | None
    classes: int
    class_names: tuple[str, ...] | None


def _plan(
    data: Path,
    validation: Path | None,
    store: Path | None,
    recipe: Recipe,
    seed: int,
    on_broken: str,
    limit: int | None,
    hold_out: float,
) -> _Lesson:
    images = ClassificationDataset.open(data)
    images = images if limit is None else images.sample(limit)
    if validation is not None:
        judged = ClassificationDataset.open(validation).with_classes(images.class_names)
    elif store is not None:
        raise ValueError("A store holds labels of all the pictures, so none can be held out: give --validation.")
    else:
        images, judged = images.split(max(1, round(hold_out * len(images))))
    samples = augment_samples(images, recipe, seed, on_broken)
    classes, names = images.num_classes, images.class_names
    if store is None:
        return _Lesson(samples, judged, None, None, classes, names)
    from kornia_tinyvit.distillation.losses import StoredLabels

    opened = LabelStore(store)
    opened.require(samples.describe())
    replays = [epoch for epoch in opened.epochs if opened.is_complete(epoch)][: recipe.epochs]
    if not replays:
        raise StoreError(f"{store} holds no whole epoch; kornia-tinyvit distill save goes on with it.")
    if opened.manifest.num_classes != classes:
        raise ValueError(f"The teacher knows {opened.manifest.num_classes} classes, but the pictures have {classes}.")
    return _Lesson(samples, judged, StoredLabels(opened, samples.augmentation), replays, classes, names)


def _amount(text: str | None, option: str) -> float | None:
    """Read a number such as 1300000, 1.3e6 or 1.3M."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kMG]?)", text.strip())
    try:
        assert found is not None  # noqa: S101 - or there is no number
        return float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]]
    except (AssertionError, ValueError):
        raise ValueError(f"{option} is a number such as 1.3M, 30e6 or 2G; got {text!r}.") from None


def _show(result: SearchResult, out: Path) -> None:
    table = Table("contracted", box=box.SIMPLE_HEAD)
    for name in (*result.budget.limits, "top-1 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in result.path:
        costs = [_short(each.costs[name]) for name in result.budget.limits]
        table.add_row(change(result, each), *costs, f"{each.accuracy:.2f}")
    Console(highlight=False).print(table)
    config = result.config
    print(f"widths {config.embed_dims}, depths {config.depths}, windows {config.window_sizes}")
    print(f"MBConv expansion {config.mbconv_expand_ratio:g}, MLP ratio {config.mlp_ratio:g}")
    print(f"{len(result.evaluated)} networks trained: {out / 'winner.safetensors'}, {out / 'search.png'}")


def change(result: SearchResult, candidate: Candidate) -> str:
    """Tell what was contracted, such as ``depths[2] 6 -> 5``, or what was given back for it."""
    if candidate.parent is None or candidate.factor is None:
        return "the first"
    from kornia_tinyvit.contraction.neighbours import read_factor

    changes = []
    for factor in candidate.factor.split(" for "):
        name, stage = read_factor(factor)
        values = [getattr(each.config, name) for each in (result.candidates[candidate.parent], candidate)]
        before, after = (value if stage is None else value[stage] for value in values)
        changes.append(f"{factor} {before:g} -> {after:g}")
    return " for ".join(changes)


def _short(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
