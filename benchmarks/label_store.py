"""Size of a record of soft labels, and how many a store writes and reads per second.

    python benchmarks/label_store.py             # 200,000 records of K = 100, about a minute
    python benchmarks/label_store.py --quick

Each rate is the median of rounds in which the kinds take turns. Reading is out of the page cache; writing ends on the
disk. "front to back" reads batches in the order in which training does, "random" batches from the whole epoch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
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


def seconds(action: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(path: Path, manifest: Manifest, rounds: int) -> dict[str, float]:
    """Return records per second of each kind."""
    store = save_epoch(path / "store", manifest)
    order, random = store.order.permutation(0), np.random.default_rng(0)
    starts = range(0, manifest.num_samples - READ + 1, READ)
    rates: dict[str, list[float]] = {"saving": [], "front to back": [], "random": []}
    for number in range(rounds):
        saving = seconds(lambda: save_epoch(path / f"{number}", manifest))  # noqa: B023
        opened = LabelStore(store.path)
        opened.order.permutation(0)
        reading = seconds(lambda: [opened.read(0, order[start : start + READ]) for start in starts])  # noqa: B023
        batches = random.integers(0, manifest.num_samples, (len(starts), READ))
        scattered = seconds(lambda: [opened.read(0, batch) for batch in batches])  # noqa: B023
        rates["saving"].append(manifest.num_samples / saving)
        rates["front to back"].append(batches.size / reading)
        rates["random"].append(batches.size / scattered)
    return {name: statistics.median(each) for name, each in rates.items()}


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
