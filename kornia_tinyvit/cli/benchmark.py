"""``kornia-tinyvit benchmark``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from kornia_tinyvit.allocator import keep_memory
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli.export import Method
from kornia_tinyvit.cli.options import Device, ImgSize, Json, Pretrained, build_classifier, parse_device, refuse_idle
from kornia_tinyvit.deploy.accuracy import compare
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.deploy.measurement import count_flops, describe_machine, interleaved, matrix_peak
from kornia_tinyvit.deploy.optimization import Optimized, optimize
from kornia_tinyvit.training.metrics.classification import LabelledPictures, read_pictures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


@dataclass
class Row:
    """An engine that runs the network in a type at a batch size: what it takes, or the reason why it does not run.

    Shares are in per cent; the error is the mean relative one.
    """

    engine: str
    dtype: str
    batch: int
    refused: str | None = None
    ms: float | None = None
    pictures_per_second: float | None = None
    peak_share: float | None = None
    warmup_s: float | None = None
    agreement: float | None = None
    error: float | None = None
    top1: float | None = None


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
    batch_sizes: Annotated[str, typer.Option(help="Pictures at a time, with commas between them.")] = "1,16",
    repetitions: Annotated[int, typer.Option(min=1, help="Timed runs of each; their median is told.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as many as torch takes, one a core.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled pictures, as for 'evaluate', to calibrate int8 on and judge by."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many of them to judge by.")] = 1000,
    method: Annotated[Method, typer.Option(help="What to run.")] = Method.forward,
    tune_allocator: Annotated[
        bool, typer.Option(help="Let this process keep the memory that it frees, which is faster.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Measure in turn how fast engines run a network here, and how far its answers stay the same.

    Without --variant and --pretrained it is the network in the package. It gets normalised pictures from memory.
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
    classifier = _build(variant, pretrained, img_size, device)
    pictures = None if data is None else read_pictures(classifier, data, limit)
    bench = _Bench(classifier, method.value, pictures, judged=not random)
    bench.measure(rows, repetitions)
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


def _build(variant: str | None, pretrained: str | None, img_size: int | None, device: str) -> ImageClassifier:
    if variant is None or pretrained is not None:
        return build_classifier(variant, pretrained, device, img_size)
    torch.manual_seed(0)
    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    return ImageClassifier.from_config(variant, **size).to(parse_device(device)).eval()


class _Bench:
    """Measures a classifier's network.

    Args:
        classifier: the classifier.
        method: which method of the network.
        pictures: what to calibrate on and to judge by.
        judged: whether to judge.
    """

    def __init__(
        self, classifier: ImageClassifier, method: str, pictures: LabelledPictures | None, judged: bool
    ) -> None:
        self.network = classifier.model
        self.method = method
        self.pictures = pictures
        self.judged = judged and pictures is not None
        self.device = next(self.network.parameters()).device
        self.peaks: dict[str, float | None] = {}
        self.flops = count_flops(getattr(self.network, method), self._example(1))
        self.top1: float | None = None

    def measure(self, rows: list[Row], repetitions: int) -> None:
        """Fill in the rows: those of a batch size run in turn."""
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=len(rows))
            for batch in dict.fromkeys(row.batch for row in rows):
                images, made = self._example(batch), {}
                for number, row in enumerate(rows):
                    if row.batch == batch:
                        progress.update(task, description=f"{row.engine} {row.dtype}, batch {batch}")
                        fast = self._prepare(row, images)
                        if fast is not None:
                            made[number] = self._step(fast, images)
                        progress.advance(task)
                progress.update(task, description=f"timing, batch {batch}")
                for number, seconds in interleaved(made, repetitions).items():
                    self._tell(rows[number], seconds)

    def _prepare(self, row: Row, images: Tensor) -> Optimized | None:
        """Make what a row tells of, and judge it; a reason why it cannot be made is written into the row."""
        if row.dtype == "int8" and self.pictures is None:
            row.refused = "int8 is calibrated on pictures: give --data"
            return None
        calibration = () if self.pictures is None else self.pictures.calibration.split(16)
        try:
            fast = optimize(
                self.network,
                row.engine,
                DTYPES[row.dtype],
                example=images,
                method=self.method,
                calibration=calibration,
                tune_allocator=False,  # the command has done so, or not
            )
        except (ImportError, ValueError, RuntimeError) as error:  # an engine that fails must not lose the others' rows
            row.refused = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return None
        row.warmup_s = fast.warmup_s
        if self.judged:
            self._judge(row, fast)
        return fast

    def _judge(self, row: Row, fast: Optimized) -> None:
        found = compare(getattr(self.network, self.method), fast, self._batches(row.batch))
        row.agreement, row.error, row.top1 = found.agreement, found.mean_error, found.top1_candidate
        self.top1 = found.top1_reference

    def _batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return full batches, as an engine may have to get ready for any other shape; a small set makes one batch."""
        assert self.pictures is not None  # noqa: S101 - or nothing is judged
        images, labels = self.pictures.images, self.pictures.labels
        for start in range(0, max(len(images) - size, 0) + 1, size):
            yield images[start : start + size], labels[start : start + size]

    def _example(self, batch: int) -> Tensor:
        config = self.network.config
        generator = torch.Generator().manual_seed(0)
        shape = (batch, config.in_chans, config.img_size, config.img_size)
        return torch.randn(shape, generator=generator).to(self.device)

    def _step(self, fast: Optimized, images: Tensor) -> Callable[[], object]:
        def step() -> None:
            fast(images)
            if images.is_cuda:
                torch.cuda.synchronize()

        return step

    def _tell(self, row: Row, seconds: float) -> None:
        if row.dtype not in self.peaks:
            self.peaks[row.dtype] = matrix_peak(DTYPES[row.dtype], self.device)
        peak = self.peaks[row.dtype]
        row.ms = 1000 * seconds
        row.pictures_per_second = row.batch / seconds
        row.peak_share = None if peak is None else 100 * row.batch * self.flops / seconds / 1e9 / peak


def _show(rows: list[Row], bench: _Bench) -> None:
    columns = {
        "ms": [_number(row.ms, ".2f") for row in rows],
        "per s": [_number(row.pictures_per_second, ".0f") for row in rows],
        "peak %": [_number(row.peak_share, ".0f") for row in rows],
        "warm-up s": [_number(row.warmup_s, ".1f") for row in rows],
    }
    if bench.judged and bench.top1 is not None:
        columns["agree %"] = [_number(row.agreement, ".2f") for row in rows]
        columns["top-1 %"] = [_number(row.top1, ".2f") for row in rows]
    elif bench.judged:
        columns["error"] = [_number(row.error, ".1e") for row in rows]
    table = Table("engine", "dtype", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("batch", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row(row.engine, row.dtype, str(row.batch), *cells)
    Console(highlight=False).print(table)
    for row in {(row.engine, row.dtype): row for row in rows if row.refused}.values():
        print(f"{row.engine} {row.dtype}: {row.refused}")
    peaks = ", ".join(f"{name} {_number(peak, '.0f')}" for name, peak in bench.peaks.items())
    print(f"{bench.flops / 1e9:.2f} GFLOP a picture; GFLOP/s of large matrix products: {peaks}")
    if bench.top1 is not None:
        print(f"top-1 of the network as it is: {bench.top1:.2f} %")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
