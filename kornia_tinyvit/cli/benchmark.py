"""``kornia-tinyvit benchmark``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from kornia_tinyvit.allocator import keep_memory
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli.export import Method
from kornia_tinyvit.cli.options import Device, ImgSize, Json, Pretrained, build_classifier, build_network, refuse_idle
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.deploy.benchmark import DTYPES, Benchmark, Row, read_images
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.deploy.measurement import describe_machine


def benchmark(
    context: typer.Context,
    variant: Annotated[
        str | None, typer.Option(help="1m, 5m, 11m or 21m; with random weights, as fast as any, but for --pretrained.")
    ] = None,
    pretrained: Pretrained = None,
    img_size: ImgSize = None,
    device: Device = "cpu",
    engines: Annotated[str, typer.Option(help="Which engines, with commas between them.")] = ",".join(ENGINES),
    dtypes: Annotated[str, typer.Option(help=f"Which of {', '.join(DTYPES)}.")] = "float32,bfloat16,int8",
    batch_sizes: Annotated[str, typer.Option(help="Images at a time, with commas between them.")] = "1,16",
    repetitions: Annotated[int, typer.Option(min=1, help="Timed runs of each; their median is told.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as many as torch takes, one a core.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Labeled images, as for 'evaluate', to calibrate int8 on and judge by."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many of them to judge by.")] = 1000,
    method: Annotated[Method, typer.Option(help="What to run.")] = Method.forward,
    tune_allocator: Annotated[
        bool, typer.Option(help="Let this process keep the memory that it frees, which is faster.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Measure in turn how fast engines run a network here, and how far its answers stay the same.

    Without --variant and --pretrained it is the network in the package. It gets normalized images from memory.
    """
    if data is None:
        refuse_idle(context, ("limit",), "without --data")
    rows = [
        Row(engine, dtype, batch)
        for batch in _numbers(batch_sizes)
        for engine in _choose(engines, ENGINES, "--engines")
        for dtype in _choose(dtypes, DTYPES, "--dtypes")
    ]
    if threads is not None:
        torch.set_num_threads(threads)
    tuned = tune_allocator and keep_memory()
    random = variant is not None and pretrained is None
    if random:
        torch.manual_seed(0)
        classifier = build_network(ImageClassifier, variant, False, device, img_size)
    else:
        classifier = build_classifier(variant, pretrained, device, img_size)
    images = None if data is None else read_images(classifier, data, limit)
    for row in rows:
        if row.dtype == "int8" and images is None:
            row.skipped = "int8 is calibrated on images: give --data"
    bench = Benchmark(classifier.model, method.value, images, compared=not random)
    bench.measure(rows, repetitions, progress=not as_json and sys.stdout.isatty())
    machine = describe_machine(device, tuned)
    report = {
        "network": {"variant": variant, "pretrained": pretrained, "img_size": classifier.model.config.img_size},
        "method": method.value,
        "gflop": bench.flops / 1e9,
        "peak_gflops": bench.peaks,
        "reference_top1": bench.top1,
        "rows": [dataclasses.asdict(row) for row in rows],
        "machine": dataclasses.asdict(machine),
    }
    if as_json:
        print(json.dumps(report))
    else:
        _show(rows, bench)
        print(f"{machine}, allocator {machine.allocator}")
    if random:
        print("The weights are random: agreement and accuracy would mean nothing and are not told.", file=sys.stderr)
    elif data is None:
        print("Give --data to be told agreement and accuracy.", file=sys.stderr)


def _choose(text: str, known: Iterable[str], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{option} takes {', '.join(known)}, with commas between them; got {text!r}.")
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[int]:
    numbers = [int(each) if each.strip().isdecimal() else 0 for each in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"--batch-sizes takes positive numbers, with commas between them; got {text!r}.")
    return list(dict.fromkeys(numbers))


def _show(rows: list[Row], bench: Benchmark) -> None:
    columns = {
        "ms": ("ms", ".2f"),
        "per s": ("images_per_second", ".0f"),
        "peak %": ("peak_fraction", ".0f"),
        "warm-up s": ("warmup_s", ".1f"),
    }
    if bench.top1 is not None:
        columns |= {"agree %": ("agreement", ".2f"), "top-1 %": ("top1", ".2f")}
    elif bench.compared:
        columns["error"] = ("error", ".1e")
    cells = (
        [row.engine, row.dtype, row.batch, *(_number(getattr(row, name), form) for name, form in columns.values())]
        for row in rows
    )
    print_table(["engine", "dtype", "batch", *columns], cells, left=2)
    for row in {(row.engine, row.dtype): row for row in rows if row.skipped}.values():
        print(f"{row.engine} {row.dtype}: {row.skipped}")
    peaks = ", ".join(f"{name} {_number(peak, '.0f')}" for name, peak in bench.peaks.items())
    print(f"{bench.flops / 1e9:.2f} GFLOP an image; GFLOP/s of large matrix products: {peaks}")
    if bench.top1 is not None:
        print(f"top-1 of the network as it is: {bench.top1:.2f} %")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
