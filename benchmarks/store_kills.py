"""Kill writers of a store of soft labels at random times, and check what they leave after each kill.

    python benchmarks/store_kills.py --kills 1000 --seed 0    # one writer and then two at once, about ten minutes

Writers are forked, walk through one epoch after another, and are killed with SIGKILL. Then all files are compared with
those of a writer that nobody disturbed:

torn      shards whose file differs from the undisturbed one's, or cannot be read
twice     records that an epoch holds more than once, and shards whose file was replaced after it was there
lost      shards that a killed writer had begun and that have no file: it loses at most the one it was gathering
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
BATCH, LONGEST = 16, 0.1  # samples at a time, and seconds until a kill


def answer(epoch: int, samples: NDArray[np.int64]) -> torch.Tensor:
    """Return what a made-up teacher says: a function of epoch and sample only."""
    keys = samples[:, None] * 7919 + np.arange(MANIFEST.num_classes) * 104729 + epoch * 15485863
    values = torch.from_numpy((keys % 1000003 / 1000003) ** 20)
    return values / values.sum(1, keepdim=True)


def write_shard(store: LabelStore, epoch: int, shard: int, begun: NDArray[np.int64] | None = None) -> None:
    """Gather a shard from batches, and note down that it was begun. The checksum of a sample is its number."""
    with store.writer(epoch, shard) as writer:
        if begun is not None and len(writer.missing()):
            begun[1 + begun[0]] = epoch * MANIFEST.num_shards + shard
            begun[0] += 1
        while len(samples := writer.missing()[:BATCH]):
            writer.write(samples, answer(epoch, samples), samples)


def write_epochs(path: Path, first: int, begun: NDArray[np.int64]) -> None:
    """Write the shards of one epoch after another that no other writer has taken."""
    store = LabelStore(path)
    for epoch in itertools.count(first):
        for shard in store.missing_shards(epoch):
            with contextlib.suppress(BlockingIOError):
                write_shard(store, epoch, shard, begun)


def forked_writer(path: Path, first: int) -> tuple[int, NDArray[np.int64]]:
    """Start a writer; return its process and what it notes down."""
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
    """What was found after kills."""

    kills: int = 0
    torn: int = 0
    twice: int = 0
    lost: Counter[int] = field(default_factory=Counter)
    files: dict[Path, tuple[int, bytes]] = field(default_factory=dict)

    def look(self, store: LabelStore, undisturbed: LabelStore, epochs: list[int]) -> None:
        """Compare the shards of epochs with the undisturbed ones and with what they were."""
        for epoch in epochs:
            held: Counter[int] = Counter()
            for path in sorted(store.path.glob(f"epoch-{epoch:05d}/*.safetensors")):
                shard, content = int(path.stem.removeprefix("shard-")), path.read_bytes()
                now = path.stat().st_ino, hashlib.sha256(content).digest()
                self.twice += self.files.setdefault(path, now) != now
                write_shard(undisturbed, epoch, shard)
                if content != (undisturbed.path / path.relative_to(store.path)).read_bytes():
                    self.torn += 1
                    continue
                samples = store.order.permutation(epoch)[shard * MANIFEST.shard_records :][: MANIFEST.shard_records]
                held.update(LabelStore(store.path).read(epoch, samples).checksums.tolist())
            self.twice += sum(count - 1 for count in held.values())


def kill_writers(folder: Path, writers: int, kills: int, seed: int) -> Findings:
    """Kill writers at random until there were so many kills, then let one writer finish the epochs."""
    chance, found = random.Random(seed), Findings()
    store = LabelStore.create(folder / "store", MANIFEST)
    undisturbed = LabelStore.create(folder / "undisturbed", MANIFEST)
    first = 0  # of the epochs that are not whole
    while found.kills < kills:
        started = [forked_writer(store.path, first) for _ in range(writers)]
        for process, begun in started:
            time.sleep(chance.uniform(0, LONGEST))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "a writer failed"
            found.kills += 1
            found.lost[sum(not shard_path(store, number).exists() for number in begun[1 : 1 + begun[0]])] += 1
        found.look(store, undisturbed, [epoch for epoch in store.epochs if epoch >= first])
        while not store.missing_shards(first):
            first += 1
    for epoch in store.epochs:
        for shard in store.missing_shards(epoch):
            write_shard(store, epoch, shard)
        assert not store.missing_shards(epoch)
    found.look(store, undisturbed, store.epochs)
    return found


def shard_path(store: LabelStore, number: int) -> Path:
    """Return the file of a shard by its number over all epochs."""
    epoch, shard = divmod(int(number), MANIFEST.num_shards)
    return store.path / f"epoch-{epoch:05d}" / f"shard-{shard:05d}.safetensors"


def report(found: Findings) -> Iterator[str]:
    """Yield lines that state what was found."""
    yield f"    {len(found.files)} shards written, of {MANIFEST.shard_records} records"
    yield f"    torn {found.torn}, twice {found.twice}"
    for lost, kills in sorted(found.lost.items()):
        yield f"    {lost} shards lost by each of {kills} kills"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="with one writer, and with two")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("$ python benchmarks/store_kills.py " + shlex.join(sys.argv[1:]))
    print(describe_machine())
    good = True
    for writers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            found = kill_writers(Path(folder), writers, args.kills, args.seed)
        print(f"{found.kills} kills, writers at once: {writers}", *report(found), sep="\n", flush=True)
        good &= not found.torn and not found.twice and max(found.lost) <= 1
    sys.exit(not good)


if __name__ == "__main__":
    main()
