"""Random batches out of our store and out of the original's layout, side by side in one run.

    python benchmarks/logit_store.py             # 200,000 records of K = 100, about 15 seconds
    python benchmarks/logit_store.py --quick

Both hold the same records and are read from the page cache, batch after batch in turn: the median of the batches is
reported. "as the original" is how that code reads: a dictionary from key to place, then a seek and a read a record,
and a batch stacked from them. Our reader checks of each record that it is valid.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from kornia_tinyvit.distillation.official import OfficialLogits
from kornia_tinyvit.distillation.store import LabelStore, Manifest, Records

CLASSES, TOP_K, BATCH = 1000, 100, 1024
SHARDS = 200  # an epoch of ImageNet-22k has 217


class SeekingReader:
    """The original's layout, read a record at a time."""

    def __init__(self, folder: Path) -> None:
        self.size = 4 + 4 * TOP_K
        self.places = {key: place for place, key in enumerate((folder / "rank0-keys.txt").read_text().split())}
        self.file = open(folder / "rank0-values.bin", "rb")  # noqa: SIM115

    def read(self, keys: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the seeds, classes and probabilities of a batch."""
        seeds, classes, probabilities = [], [], []
        for key in keys:
            self.file.seek(self.places[key] * self.size)
            record = self.file.read(self.size)
            seeds.append(int(np.frombuffer(record[:4], "<i4")[0]))
            classes.append(np.frombuffer(record[4 : 4 + 2 * TOP_K], "<i2"))
            probabilities.append(np.frombuffer(record[4 + 2 * TOP_K :], "<f2"))
        return torch.tensor(seeds), torch.from_numpy(np.stack(classes)), torch.from_numpy(np.stack(probabilities))


def dense(records: Records) -> torch.Tensor:
    """Return all probabilities, with none for what was not stored."""
    return torch.zeros(len(records.classes), CLASSES).scatter_(1, records.classes.long(), records.probabilities.float())


def fill(store: LabelStore, folder: Path, others: list[LabelStore]) -> None:
    """Write the same made-up records in all layouts."""
    layout = np.dtype([("seed", "<i4"), ("classes", "<i2", (TOP_K,)), ("probabilities", "<f2", (TOP_K,))])
    order = store.order.permutation(0)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    with open(folder / "rank0-keys.txt", "w") as keys, open(folder / "rank0-values.bin", "wb") as values:
        for start in range(0, len(order), 8192):
            samples = order[start : start + 8192]
            store.write(0, samples, torch.randn(len(samples), CLASSES, generator=generator).softmax(1), samples)
            stored = store.read(0, samples)
            for other in others:
                other.write(0, samples, dense(stored), samples)
            records = np.empty(len(samples), layout)
            records["seed"], records["classes"] = stored.checksums, stored.classes
            records["probabilities"] = stored.probabilities
            keys.writelines(f"{sample:08d}\n" for sample in samples)
            values.write(records.tobytes())


def measure(path: Path, num_records: int, repetitions: int) -> dict[str, float]:
    """Return records a second of each reader."""
    many = Manifest(num_records, CLASSES, TOP_K, shard_records=num_records // SHARDS // 2 * 2)
    with (
        LabelStore.create(path / "ours", Manifest(num_records, CLASSES, TOP_K)) as store,
        LabelStore.create(path / "shards", many) as other,
    ):
        fill(store, path / f"logits_top{TOP_K}_epoch0", [other])
    store, sharded, official = LabelStore(path / "ours"), LabelStore(path / "shards"), OfficialLogits(path)
    seeking = SeekingReader(path / f"logits_top{TOP_K}_epoch0")
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {}
    for repetition in range(repetitions + 10):
        indices = random.integers(0, num_records, BATCH)
        keys = [f"{index:08d}" for index in indices]
        found = {}
        for name, read in (
            ("our store", lambda: store.read(0, indices)),  # noqa: B023
            (f"our store in {SHARDS} shards", lambda: sharded.read(0, indices)),  # noqa: B023
            ("our reader of the original's layout", lambda: official.read(0, keys)),  # noqa: B023
            ("as the original", lambda: seeking.read(keys)),  # noqa: B023
        ):
            start = time.perf_counter()
            found[name] = read()
            if repetition >= 10:  # the first ones open files and bring them into the page cache
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        if repetition == 0:
            assert (found["our store"].probabilities == found[f"our store in {SHARDS} shards"].probabilities).all()
            assert (found["our store"].classes.long() == found["as the original"][1]).all()
            assert (found["our store"].probabilities == found["as the original"][2]).all()
    return {name: BATCH / statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the records, fewer repetitions")
    args = parser.parse_args()
    num_records, repetitions = (20_000, 50) if args.quick else (200_000, 300)
    with open("/proc/cpuinfo") as file:
        processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    print(
        f"{date.today()}  {platform.machine()} {processor}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}"
    )
    print(
        f"random batches of {BATCH} out of {num_records} records, K = {TOP_K} of {CLASSES} classes, page cache, median"
    )
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), num_records, repetitions)
    for name, rate in rates.items():
        print(f"  {name:36} {rate:12,.0f} records/s   {rate / rates['as the original']:6.1f} x")


if __name__ == "__main__":
    main()
