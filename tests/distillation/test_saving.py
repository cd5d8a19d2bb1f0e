"""Saving and checking records, with processes that compete and are killed."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from kornia_tinyvit.data.datasets import BrokenImageError
from kornia_tinyvit.distillation import (
    FeatureStore,
    LabelStore,
    Manifest,
    StoreError,
    check_records,
    save_records,
    saving,
)
from tests.distillation.helpers import write_records
from tests.processes import PROCESSES, start
from tests.scenes import damage, make_images, samples_of

SIZE, NUM_CLASSES, TOP_K = 16, 9, 4


class Network(nn.Module):
    """A small teacher that counts its images and optionally sleeps."""

    def __init__(self, seed: int = 0, pause: float = 0.0, features: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.convolution = nn.Conv2d(3, 6, 4, 4)
        self.head = nn.Linear(96, NUM_CLASSES)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.pause, self.features, self.seen = pause, features, 0

    def forward(self, images):
        time.sleep(self.pause)
        self.seen += len(images)
        features = self.convolution(images).tanh()
        return features if self.features else self.head(features.flatten(1))


def small_samples(folder, preset="distill", **options):
    return samples_of(folder, preset, SIZE, **options)


def make_store(path, samples, shard_records=8, **changes):
    settings = {"num_classes": NUM_CLASSES, "top_k": TOP_K} | changes
    kind = FeatureStore if settings.get("kind") == "features" else LabelStore
    return kind.create(
        path,
        Manifest(
            num_samples=len(samples), seed=samples.augmentation.seed, augmentation=samples.augmentation.describe(),
            shard_records=shard_records, **settings,
        ),
    )  # fmt: skip


def expected(samples, epoch, teacher=None):
    """Return the order of an epoch, the outputs of a teacher for all its images and their batch."""
    order = samples.order.permutation(epoch)
    batch = samples.__getitems__([(epoch, index) for index in order.tolist()])
    with torch.no_grad():
        output = (teacher or Network())(samples.augmentation(batch.crops, batch.params))
    return order, output, batch


def assert_complete(store, samples, epochs):
    for epoch in epochs:
        order, logits, batch = expected(samples, epoch)
        records = store.read(epoch, order)
        top = logits.softmax(1).topk(TOP_K)
        assert torch.allclose(records.probabilities.float(), top.values, atol=6e-4)
        mine = logits.softmax(1).gather(1, records.classes.long())
        assert torch.allclose(mine, top.values, atol=1e-5)  # the same classes but for ties
        assert records.checksums.tolist() == batch.params.checksums().tolist()


@pytest.fixture
def folder(tmp_path):
    return make_images(
        tmp_path / "data", each=9, size=24
    )  # 27: the last shard is not full, and the last image has no mixup partner


def child_save(path, folder, epochs, pause, preset):
    torch.set_num_threads(1)
    save_records(LabelStore(path), Network(pause=pause), small_samples(folder, preset), epochs, batch_size=2)


def child_share(path, folder, epochs, barrier, queue):
    torch.set_num_threads(1)
    teacher = Network(pause=0.02)
    samples, store = small_samples(folder), LabelStore(path)
    barrier.wait()
    done = save_records(store, teacher, samples, epochs, batch_size=4)
    queue.put((done.written, done.present, done.locked, teacher.seen))


class TestSaveRecords:
    def test_teacher_on_the_cpu_keeps_memory(self, folder, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(saving, "keep_memory", lambda: calls.append(1))
        samples = small_samples(folder)
        save_records(make_store(tmp_path / "store", samples), Network(), samples, [0])
        assert calls == [1]

    def test_complete(self, folder, tmp_path):
        samples = small_samples(folder)
        store = make_store(tmp_path / "store", samples)
        steps = []
        done = save_records(store, Network(), samples, [0, 2], batch_size=5, progress=steps.append)
        assert (done.written, done.present, done.locked, done.broken) == (54, 0, 0, ())
        assert store.epochs == [0, 2]
        assert sum(steps) == 54
        assert_complete(LabelStore(store.path), samples, [0, 2])
        teacher = Network()
        steps.clear()
        done = save_records(store, teacher, samples, [0, 2], progress=steps.append)
        assert (done.written, done.present, teacher.seen, sum(steps)) == (0, 54, 0, 54)

    @pytest.mark.parametrize("preset", ["distill", "in1k"])
    def test_batch_size_and_workers_have_no_effect(self, folder, tmp_path, preset):
        samples = small_samples(folder, preset)
        for number, (size, workers) in enumerate([(1, 0), (4, 1), (64, 0)]):
            store = make_store(tmp_path / str(number), samples)
            assert save_records(store, Network(), samples, [1], size, workers).written == 27
            assert_complete(store, samples, [1])

    @pytest.mark.parametrize("preset", ["distill", "in1k"])
    def test_killed(self, folder, tmp_path, preset):
        samples = small_samples(folder, preset)
        store = make_store(tmp_path / "store", samples)
        counts = [0]
        for target in (3, 14, 30, 44):
            process = start(child_save, store.path, folder, [0, 1], 0.03, preset)
            while sum(store.valid_count(epoch) for epoch in (0, 1)) < target:
                time.sleep(0.002)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            counts.append(sum(store.valid_count(epoch) for epoch in (0, 1)))
        assert counts == sorted(set(counts))
        assert counts[-1] < 54, f"the process was killed too late: {counts}"
        done = save_records(store, Network(), samples, [0, 1], batch_size=2)
        assert done.written == 54 - counts[-1]
        assert_complete(store, samples, [0, 1])
        uninterrupted = make_store(tmp_path / "uninterrupted", samples)
        save_records(uninterrupted, Network(), samples, [0, 1], batch_size=2)
        for epoch in (0, 1):
            for one, other in zip(store.read(epoch, range(27)), uninterrupted.read(epoch, range(27)), strict=True):
                assert torch.equal(one.long() if one.dtype != torch.float16 else one.float(),
                                   other.long() if other.dtype != torch.float16 else other.float())  # fmt: skip

    def test_two_processes(self, folder, tmp_path):
        samples = small_samples(folder)
        store = make_store(tmp_path / "store", samples, shard_records=4)
        barrier, queue = PROCESSES.Barrier(2), PROCESSES.Queue()
        processes = [start(child_share, store.path, folder, [0, 1, 2], barrier, queue) for _ in range(2)]
        results = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert all(written > 0 for written, *_ in results)
        assert sum(written for written, *_ in results) == 81
        assert sum(seen for *_, seen in results) == 81  # no image was processed twice
        assert_complete(store, samples, [0, 1, 2])

    def test_locked_shards_are_skipped(self, folder, tmp_path):
        samples = small_samples(folder)
        store = make_store(tmp_path / "store", samples)
        with store.writer(0, 1):
            done = save_records(store, Network(), samples, [0])
            assert (done.written, done.locked) == (19, 1)
        assert save_records(store, Network(), samples, [0]).written == 8
        assert_complete(store, samples, [0])

    def test_existing_shard_is_kept(self, folder, tmp_path):
        samples = small_samples(folder, "in1k")
        store = make_store(tmp_path / "store", samples)
        order, logits, _ = expected(samples, 0)
        write_records(store, 0, order[8:16], torch.full((8, NUM_CLASSES), 1 / NUM_CLASSES), [77] * 8)
        done = save_records(store, Network(), samples, [0], batch_size=3)
        assert (done.written, done.present) == (19, 8)
        records = store.read(0, order)
        own = np.setdiff1d(np.arange(27), np.arange(8, 16))
        assert torch.allclose(records.probabilities.float()[own], logits.softmax(1).topk(TOP_K).values[own], atol=6e-4)
        assert records.checksums[8:16].tolist() == [77] * 8

    @pytest.mark.parametrize("workers", [0, 1])
    def test_locks_are_released_after_an_error(self, folder, tmp_path, workers):
        damage(folder / "red" / "08.png")
        samples = small_samples(folder)
        store = make_store(tmp_path / "store", samples)
        with pytest.raises(BrokenImageError):
            save_records(store, Network(), samples, [0], batch_size=2, workers=workers)
        for shard in range(store.manifest.num_shards):
            with store.writer(0, shard):
                pass

    def test_broken_images(self, folder, tmp_path):
        damage(folder / "green" / "02.png")
        damage(folder / "red" / "08.png")
        with pytest.raises(BrokenImageError, match=r"\.png is not an image"):
            save_records(make_store(tmp_path / "a", small_samples(folder)), Network(), small_samples(folder), [0])
        samples = small_samples(folder, on_broken="skip")
        store = make_store(tmp_path / "b", samples)
        done = save_records(store, Network(), samples, [0, 1], batch_size=4)
        assert done.broken == ("green/02.png", "red/08.png")
        assert done.written == 54
        records = store.read(1, [11, 26, 0])
        assert torch.allclose(records.probabilities[:2].float(), torch.tensor(1 / NUM_CLASSES), atol=1e-4)
        assert not torch.allclose(records.probabilities[2].float(), torch.tensor(1 / NUM_CLASSES), atol=1e-2)

    def test_lower_precision(self, folder, tmp_path):
        samples = small_samples(folder)
        store = make_store(tmp_path / "store", samples)
        kinds = []
        teacher = Network()
        teacher.head.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
        save_records(store, teacher, samples, [0], autocast=torch.bfloat16)
        assert set(kinds) == {torch.bfloat16}
        order, logits, _ = expected(samples, 0)
        top = logits.softmax(1).topk(TOP_K).values
        assert torch.allclose(store.read(0, order).probabilities.float(), top, atol=0.03)

    def test_features(self, folder, tmp_path):
        damage(folder / "green" / "02.png")
        samples = small_samples(folder, on_broken="skip")
        store = make_store(
            tmp_path / "store", samples, kind="features", shape=(6, 4, 4), num_classes=0, top_k=0, shard_records=6
        )
        assert save_records(store, Network(features=True), samples, [3], batch_size=4).written == 27
        order, features, batch = expected(samples, 3, Network(features=True))
        records = store.read(3, order)
        valid = batch.valid == 1
        assert torch.allclose(records.features[valid].float(), features[valid], atol=1e-3)
        assert (records.features[~valid] == 0).all()
        assert records.checksums.tolist() == batch.params.checksums().tolist()
        report = check_records(store, Network(features=True), samples, records=27)
        assert (report.records, report.drifted) == (27, ())
        assert report.largest < 1e-3
        assert check_records(store, Network(5, features=True), samples).largest > 0.1


class TestCheckRecords:
    @pytest.mark.parametrize("preset", ["distill", "in1k"])
    def test_same_teacher(self, folder, tmp_path, preset):
        samples = small_samples(folder, preset)
        store = make_store(tmp_path / "store", samples)
        save_records(store, Network(), samples, range(3))
        report = check_records(store, Network(), samples, records=20, batch_size=6)
        assert report.records >= 20
        assert report.drifted == ()
        assert 0 < report.mean <= report.largest < 6e-4
        everything = check_records(store, Network(), samples, records=1000)
        assert everything.records == 81
        assert check_records(store, Network(), samples, records=1).records in (1, 2)  # with its mixup partner

    def test_changed_teacher(self, folder, tmp_path):
        samples = small_samples(folder)
        store = make_store(tmp_path / "store", samples)
        save_records(store, Network(), samples, [0])
        report = check_records(store, Network(1), samples)
        assert report.largest > 0.2
        assert report.drifted == ()
        changed = Network()
        changed.head.bias.data[0] += 0.2
        assert 0.01 < check_records(store, changed, samples).largest < 0.2

    def test_changed_augmentation(self, folder, tmp_path):
        samples = small_samples(folder)
        store = make_store(tmp_path / "store", samples)
        save_records(store, Network(), samples, [0])
        other = small_samples(folder, "small")
        report = check_records(store, Network(), other, records=27)
        assert len(report.drifted) > 20
        assert report.largest > 0.01

    def test_store_that_is_being_written(self, folder, tmp_path):
        samples = small_samples(folder, "in1k")
        store = make_store(tmp_path / "store", samples)
        with pytest.raises(StoreError, match="has no records to check"):
            check_records(store, Network(), samples)
        with store.writer(0, 1), store.writer(0, 3):
            save_records(store, Network(), samples, [0])
        report = check_records(store, Network(), samples, records=27)
        assert report.records == 16
        assert report.largest < 6e-4

    def test_broken_images_are_uniform(self, folder, tmp_path):
        damage(folder / "green" / "02.png")
        samples = small_samples(folder, on_broken="skip")
        store = make_store(tmp_path / "store", samples)
        save_records(store, Network(), samples, [0])
        assert check_records(store, Network(), samples, records=27).largest < 6e-4

    def test_choice_depends_on_the_seed(self, folder, tmp_path):
        samples = small_samples(folder)
        store = make_store(tmp_path / "store", samples)
        save_records(store, Network(), samples, [0])
        means = {check_records(store, Network(), samples, records=5, seed=seed).mean for seed in range(3)}
        assert len(means) == 3
        again = [check_records(store, Network(), samples, records=5, seed=1) for _ in range(2)]
        assert again[0] == again[1]
        assert np.isfinite(again[0].mean)
