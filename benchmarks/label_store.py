"""Size of a record of soft labels, and how many a store writes and reads per second.

    python benchmarks/label_store.py             # 200,000 records of K = 100, about a minute
    python benchmarks/label_store.py --quick

The kinds take turns; for each batch that is read, and each epoch that is written, the median of the rounds counts, so
that other work on the machine does not. Reading is out of the page cache, by a store that is opened anew; writing ends
on the disk. "front to back" are batches in the order of training, "random" ones from anywhere in the epoch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from kornia_tinyvit.deploy.measurement import describe_machine
from kornia_tinyvit.distillation import LabelStore, Manifest

CLASSES, TOP_K, READ, WRITTEN = 1000, 100, 1024, 256


def save_epoch(path: Path, manifest: Manifest) -> LabelStore:
    """Write an epoch of made-up labels, batch after batch, as `distill save` does."""
    answers = torch.randn(manifest.shard_records, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(1)
    store = LabelStore.create(path, manifest)
    for shard in store.missing_shards(0):
        with store.writer(0, shard) as writer:
            samples = writer.missing()
            for start in range(0, len(samples), WRITTEN):
                batch = samples[start : start + WRITTEN]
                writer.write(batch, answers[start : start + len(batch)], batch)
    return store


def measure(path: Path, manifest: Manifest, rounds: int) -> dict[str, float]:
    """Return records per second of each kind."""
    store = save_epoch(path / "store", manifest)
    order, random = store.order.permutation(0), np.random.default_rng(0)
    count = manifest.num_samples // READ
    times: dict[str, list[list[float]]] = {"saving": [], "front to back": [], "random": []}
    for number in range(rounds):
        began = time.perf_counter()
        save_epoch(path / f"{number}", manifest)
        times["saving"].append([(time.perf_counter() - began) / manifest.num_samples * count * READ])
        opened = LabelStore(store.path)
        opened.order.permutation(0)
        batches = {"front to back": order[: count * READ], "random": random.permutation(count * READ)}
        for kind, samples in batches.items():
            marks = [time.perf_counter()]
            for start in range(0, len(samples), READ):
                opened.read(0, samples[start : start + READ])
                marks.append(time.perf_counter())
            times[kind].append(np.diff(marks).tolist())
    return {name: count * READ / np.median(each, axis=0).sum() for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the records, fewer rounds")
    args = parser.parse_args()
    num_records, rounds = (20_000, 3) if args.quick else (200_000, 9)
    manifest = Manifest(num_records, CLASSES, TOP_K)
    print(describe_machine())
    print(
        f"{num_records} records, K = {TOP_K} of {CLASSES} classes, shards of {manifest.shard_records}; batches of "
        f"{READ} read, {WRITTEN} written"
    )
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), manifest, rounds)
        size = sum(path.stat().st_size for path in Path(folder, "store").rglob("*.safetensors"))
    print(f"  size             {size / num_records:12.3f} bytes per record")
    for name, rate in rates.items():
        print(f"  {name:16} {rate:12,.0f} records/s")


if __name__ == "__main__":
    main()
