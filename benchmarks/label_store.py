"""Measure the size of a record of soft labels, and the rates of writing and reading a store.

    python benchmarks/label_store.py             # 200,000 records of K = 100, about a minute
    python benchmarks/label_store.py --quick

The kinds are interleaved, and the median over the rounds is used for each batch that is read and each epoch that is
written, which reduces the effect of other load. Each round opens the store again and reads from the page cache; writing
includes the sync to disk. "sequential" reads batches in the order of the epoch, "random" in random order.
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
    """Write an epoch of synthetic labels batch by batch, like `distill save`."""
    probabilities = torch.randn(manifest.shard_records, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(1)
    store = LabelStore.create(path, manifest)
    for shard in store.missing_shards(0):
        with store.writer(0, shard) as writer:
            samples = writer.missing()
            for start in range(0, len(samples), WRITTEN):
                batch = samples[start : start + WRITTEN]
                writer.write(batch, probabilities[start : start + len(batch)], batch)
    return store


def measure(path: Path, manifest: Manifest, rounds: int) -> dict[str, float]:
    """Return records per second of each kind."""
    store = save_epoch(path / "store", manifest)
    order, random = store.order.permutation(0), np.random.default_rng(0)
    count = manifest.num_samples // READ
    times: dict[str, list[list[float]]] = {"saving": [], "sequential": [], "random": []}
    for number in range(rounds):
        began = time.perf_counter()
        save_epoch(path / f"{number}", manifest)
        times["saving"].append([(time.perf_counter() - began) / manifest.num_samples * count * READ])
        opened = LabelStore(store.path)
        opened.order.permutation(0)
        batches = {"sequential": order[: count * READ], "random": random.permutation(count * READ)}
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
        f"{num_records} records, K = {TOP_K} of {CLASSES} classes, shards of {manifest.shard_records}; batch size "
        f"{READ} for reading, {WRITTEN} for writing"
    )
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), manifest, rounds)
        size = sum(path.stat().st_size for path in Path(folder, "store").rglob("*.safetensors"))
    print(f"  size             {size / num_records:12.3f} bytes per record")
    for name, rate in rates.items():
        print(f"  {name:16} {rate:12,.0f} records/s")


if __name__ == "__main__":
    main()
