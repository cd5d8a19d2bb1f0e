"""``kornia-tinyvit benchmark``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from kornia_tinyvit.allocator import keep_memory
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli.export import Method
from kornia_tinyvit.cli.options import NetworkRequest, find_device
from kornia_tinyvit.cli.requests import command, option
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.deploy.benchmark import DTYPES, Benchmark, Row, read_images
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.deploy.measurement import describe_machine


@dataclass(frozen=True, kw_only=True)
class BenchmarkRequest(NetworkRequest):
    """The options of ``benchmark``."""

    variant: str | None = option(
        "Weights", "1m, 5m, 11m or 21m; random weights without --weights, which are as fast.", None
    )
    data: Path | None = option("Data", "Labeled images as for 'evaluate', to calibrate int8 and compare outputs.", None)
    limit: int = option("Data", "Number of images to compare outputs on.", 1000, min=1)
    engines: str = option("Metrics", "Engines, separated by commas.", ",".join(ENGINES))
    dtypes: str = option("Metrics", f"Types, separated by commas: {', '.join(DTYPES)}.", "float32,bfloat16,int8")
    batch_sizes: str = option("Metrics", "Batch sizes, separated by commas.", "1,16")
    repetitions: int = option("Metrics", "Timed runs; the median is reported.", 15, min=1)
    method: Method = option("Metrics", "Method of the network to run.", Method.forward)
    threads: int | None = option("Hardware", "Threads. Default: torch.get_num_threads().", None, min=1)
    tune_allocator: bool = option("Hardware", "Keep freed memory in the process, which is faster.", True)


@command
def benchmark(request: BenchmarkRequest) -> None:
    """Measure the speed of inference engines on this machine, and the agreement of their outputs.

    The default network is the one of the package. Its inputs are normalized images in memory.
    """
    random = request.variant is not None and request.weights is None
    if request.data is None or random:
        request.reject_unused(("limit",), "without --data" if request.data is None else "with random weights")
    rows = [
        Row(engine, dtype, batch)
        for batch in _numbers(request.batch_sizes)
        for engine in _choose(request.engines, ENGINES, "--engines")
        for dtype in _choose(request.dtypes, DTYPES, "--dtypes")
    ]
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    tuned = request.tune_allocator and keep_memory()
    device = str(find_device(request.device))
    if random:
        torch.manual_seed(0)
        classifier = request.build_network(ImageClassifier, False)
    else:
        classifier = request.build_classifier()
    images = None if request.data is None else read_images(classifier, request.data, request.limit)
    for row in rows:
        if row.dtype == "int8" and images is None:
            row.skipped = "int8 is calibrated on images: give --data"
    bench = Benchmark(classifier.model, request.method.value, images, compared=not random)
    bench.measure(rows, request.repetitions, progress=request.shows_progress)
    machine = describe_machine(device, tuned)
    if request.as_json:
        size = classifier.model.config.img_size
        report = {
            "network": {"variant": request.variant, "weights": request.weights, "img_size": size},
            "method": request.method.value,
            "gflop": bench.flops / 1e9,
            "peak_gflops": bench.peaks,
            "reference_top1": bench.top1,
            "rows": [dataclasses.asdict(row) for row in rows],
            "machine": dataclasses.asdict(machine),
        }
        print(json.dumps(report))
    else:
        _show(rows, bench)
        print(f"{machine}, allocator {machine.allocator}")
    if random:
        request.note("The weights are random, so agreement and accuracy are not measured.")
    elif request.data is None:
        request.note("Give --data to measure agreement and accuracy.")


def _choose(text: str, known: Iterable[str], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{option} takes {', '.join(known)}, separated by commas; got {text!r}.")
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[int]:
    numbers = [int(each) if each.strip().isdecimal() else 0 for each in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"--batch-sizes takes positive numbers, separated by commas; got {text!r}.")
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
    print(f"{bench.flops / 1e9:.2f} GFLOP per image; GFLOP/s of large matrix products: {peaks}")
    if bench.top1 is not None:
        print(f"top-1 of the unconverted network: {bench.top1:.2f} %")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
