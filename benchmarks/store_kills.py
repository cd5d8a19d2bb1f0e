"""Kill writers of a label store at random times, and check the shards after each kill.

    python benchmarks/store_kills.py --kills 1000 --seed 0    # one writer and then two at once, about ten minutes

Writers are forked, write one epoch after another, and are killed with SIGKILL. Then all files are compared with those
of an uninterrupted writer:

torn      shards whose file is corrupt or differs from that of the uninterrupted writer
twice     duplicate records in an epoch, and shards whose file was replaced
lost      shards without a file that a killed writer had started: at most the unfinished one
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import mmap
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kornia_tinyvit.deploy.measurement import describe_machine
from kornia_tinyvit.distillation import LabelStore, Manifest

MANIFEST = Manifest(num_samples=1000, num_classes=50, top_k=5, seed=1, shard_records=64)
BATCH, MAX_SECONDS = 16, 0.1  # batch size, and maximum time until a kill


def probabilities(epoch: int, samples: NDArray[np.int64]) -> torch.Tensor:
    """Return the output of a synthetic teacher, a function of epoch and sample."""
    keys = samples[:, None] * 7919 + np.arange(MANIFEST.num_classes) * 104729 + epoch * 15485863
    values = torch.from_numpy((keys % 1000003 / 1000003) ** 20)
    return values / values.sum(1, keepdim=True)


def write_shard(store: LabelStore, epoch: int, shard: int, begun: NDArray[np.int64] | None = None) -> None:
    """Write a shard batch by batch, and log its start to ``begun``. The checksum of a sample is its index."""
    with store.writer(epoch, shard) as writer:
        if begun is not None and len(writer.missing()):
            begun[1 + begun[0]] = epoch * MANIFEST.num_shards + shard
            begun[0] += 1
        while len(samples := writer.missing()[:BATCH]):
            writer.write(samples, probabilities(epoch, samples), samples)


def write_epochs(path: Path, first: int, begun: NDArray[np.int64]) -> None:
    """Write the missing shards of one epoch after another, except those locked by another writer."""
    store = LabelStore(path)
    for epoch in itertools.count(first):
        for shard in store.missing_shards(epoch):
            with contextlib.suppress(BlockingIOError):
                write_shard(store, epoch, shard, begun)


def forked_writer(path: Path, first: int) -> tuple[int, NDArray[np.int64]]:
    """Start a writer and return its process id and its log of started shards."""
    begun = np.frombuffer(mmap.mmap(-1, 8 * 10_000), np.int64)
    process = os.fork()
    if process == 0:
        try:
            write_epochs(path, first, begun)
        finally:
            os._exit(1)
    return process, begun


@dataclass
class Findings:
    """Results after kills."""

    kills: int = 0
    torn: int = 0
    twice: int = 0
    lost: Counter[int] = field(default_factory=Counter)
    files: dict[Path, tuple[int, bytes]] = field(default_factory=dict)

    def check(self, store: LabelStore, reference: LabelStore, epochs: list[int]) -> None:
        """Compare the shards of epochs with the reference and with their earlier state."""
        for epoch in epochs:
            held: Counter[int] = Counter()
            for path in sorted(store.path.glob(f"epoch-{epoch:05d}/*.safetensors")):
                shard, content = int(path.stem.removeprefix("shard-")), path.read_bytes()
                now = path.stat().st_ino, hashlib.sha256(content).digest()
                self.twice += self.files.setdefault(path, now) != now
                write_shard(reference, epoch, shard)
                if content != (reference.path / path.relative_to(store.path)).read_bytes():
                    self.torn += 1
                    continue
                samples = store.order.permutation(epoch)[shard * MANIFEST.shard_records :][: MANIFEST.shard_records]
                held.update(LabelStore(store.path).read(epoch, samples).checksums.tolist())
            self.twice += sum(count - 1 for count in held.values())


def kill_writers(folder: Path, writers: int, kills: int, seed: int) -> Findings:
    """Kill writers at random times until the number of kills is reached, then complete the epochs."""
    rng, found = random.Random(seed), Findings()
    store = LabelStore.create(folder / "store", MANIFEST)
    reference = LabelStore.create(folder / "reference", MANIFEST)
    first = 0  # the first incomplete epoch
    while found.kills < kills:
        started = [forked_writer(store.path, first) for _ in range(writers)]
        for process, begun in started:
            time.sleep(rng.uniform(0, MAX_SECONDS))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "a writer failed"
            found.kills += 1
            found.lost[sum(not shard_path(store, number).exists() for number in begun[1 : 1 + begun[0]])] += 1
        found.check(store, reference, [epoch for epoch in store.epochs if epoch >= first])
        while not store.missing_shards(first):
            first += 1
    for epoch in store.epochs:
        for shard in store.missing_shards(epoch):
            write_shard(store, epoch, shard)
        assert not store.missing_shards(epoch)
    found.check(store, reference, store.epochs)
    return found


def shard_path(store: LabelStore, number: int) -> Path:
    """Return the file of a shard, numbered over all epochs."""
    epoch, shard = divmod(int(number), MANIFEST.num_shards)
    return store.path / f"epoch-{epoch:05d}" / f"shard-{shard:05d}.safetensors"


def report(found: Findings) -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"    {len(found.files)} shards written, of {MANIFEST.shard_records} records"
    yield f"    torn {found.torn}, twice {found.twice}"
    for lost, kills in sorted(found.lost.items()):
        yield f"    {lost} shards lost by each of {kills} kills"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="for one writer, and for two")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("$ python benchmarks/store_kills.py " + shlex.join(sys.argv[1:]))
    print(describe_machine())
    passed = True
    for writers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            found = kill_writers(Path(folder), writers, args.kills, args.seed)
        print(f"{found.kills} kills, concurrent writers: {writers}", *report(found), sep="\n", flush=True)
        passed &= not found.torn and not found.twice and max(found.lost) <= 1
    sys.exit(not passed)


if __name__ == "__main__":
    main()
