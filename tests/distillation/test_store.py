"""Stores, with processes that compete, are killed and run out of disk space."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import re
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from kornia_tinyvit.distillation import store as module
from kornia_tinyvit.distillation.manifest import Manifest, StoreError, estimated_size
from kornia_tinyvit.distillation.store import FeatureStore, LabelStore, MissingRecordsError, StoreMismatchError
from kornia_tinyvit.files import describe_differences
from tests.distillation.helpers import write_records
from tests.processes import PROCESSES, start

MANIFEST = Manifest(
    num_samples=1000,
    num_classes=300,
    top_k=4,
    seed=5,
    augmentation={"crop_scale": (0.08, 1.0), "mixup": {"alpha": 0.8}},
    data={"name": "made up", "checksum": "12ab"},
    teacher={"name": "t"},
    shard_records=256,
)
FEATURES = Manifest(num_samples=30, seed=5, kind="features", shape=(3, 2, 2), shard_records=8)


def probabilities_of(epoch, indices, num_classes=MANIFEST.num_classes):
    """Return the outputs of an artificial teacher: a function of epoch and sample only."""
    keys = np.asarray(indices, dtype=np.int64)[:, None] * 7919 + np.arange(num_classes) * 104729 + epoch * 15485863
    values = torch.from_numpy((keys % 1000003 / 1000003) ** 30)
    return (values / values.sum(1, keepdim=True)).float()


def checksums_of(epoch, indices):
    return (np.asarray(indices, dtype=np.int64) * 2654435761 + epoch) % 2**32


def fill(store, epoch, shards=None, batch=100, pause=0.0):
    """Write shards, by default all, and return the number of records."""
    written = 0
    for shard in range(store.manifest.num_shards) if shards is None else shards:
        with store.writer(epoch, shard) as writer:
            while len(writer.missing()):
                chosen = writer.missing()[:batch]
                values = probabilities_of(epoch, chosen, store.manifest.num_classes)
                written += writer.write(chosen, values, checksums_of(epoch, chosen))
                time.sleep(pause)
    return written


def assert_right(store, epoch, indices):
    records = store.read(epoch, indices)
    top = probabilities_of(epoch, indices, store.manifest.num_classes).topk(store.manifest.top_k)
    assert torch.equal(records.classes.long(), top.indices)
    assert torch.equal(records.probabilities, top.values.half())
    assert records.checksums.numpy().tolist() == checksums_of(epoch, indices).tolist()


def written(store, epoch):
    return np.setdiff1d(np.arange(store.manifest.num_samples), store.missing(epoch))


@pytest.fixture
def store(tmp_path):
    with LabelStore.create(tmp_path / "store", MANIFEST) as store:
        yield store


def child_fill(path, epoch, batch, ready):
    torch.set_num_threads(1)
    store = LabelStore(path)
    ready.set()
    for shard in store.missing_shards(epoch):
        with contextlib.suppress(BlockingIOError):
            fill(store, epoch, [shard], batch, pause=0.001)  # otherwise a busy machine kills them after they are done


def child_hold(path, shard, queue, with_child):
    with LabelStore(path).writer(0, shard):
        child = os.fork() if with_child else None
        if child == 0:
            time.sleep(60)
            os._exit(0)
        queue.put(child)
        time.sleep(60)


def child_create(path, manifest, barrier, queue):
    barrier.wait()
    try:
        queue.put(LabelStore.create(path, manifest).manifest.seed)
    except StoreMismatchError as error:
        queue.put(str(error))


def child_limited(path, limit, queue):
    torch.set_num_threads(1)
    with LabelStore(path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            fill(store, 1)
        except OSError as error:
            queue.put(str(error))
        else:
            queue.put("no error")


class TestSmoke:
    def test_round_trip(self, store, tmp_path):
        assert fill(store, 3) == 1000
        reader = LabelStore(tmp_path / "store")
        indices = np.random.default_rng(0).integers(0, 1000, 500)  # with repetitions
        assert_right(reader, 3, indices)
        records = reader.read(3, indices.tolist())
        assert records.classes.dtype == torch.uint16
        assert records.probabilities.dtype == torch.float16
        assert records.checksums.dtype == torch.int64
        assert all(tensor.is_contiguous() for tensor in records)
        assert (records.probabilities.diff(dim=1) <= 0).all()
        assert torch.equal(reader.read(3, torch.tensor([9])).probabilities, reader.read(3, [9]).probabilities)
        assert [tensor.shape for tensor in reader.read(3, [])] == [(0, 4), (0, 4), (0,)]

    def test_counts(self, store):
        assert store.epochs == []
        assert store.manifest.num_shards == 4
        fill(store, 2, [1])
        assert store.epochs == [2]
        assert store.valid_count(2) == 256
        assert store.valid_count(7) == 0
        assert store.missing_shards(2) == [0, 2, 3]
        assert store.missing(2).tolist() == [*store.order.permutation(2)[:256], *store.order.permutation(2)[512:]]
        assert fill(store, 2, store.missing_shards(2)) == 744
        assert store.missing(2).tolist() == []

    def test_layout(self, store):
        """Records are stored in the order of the epoch, which makes reading sequential."""
        order = store.order.permutation(0)
        fill(store, 0)
        shard = load_file(store.path / "epoch-00000" / "shard-00001.safetensors")
        assert {name: (str(each.dtype), each.shape) for name, each in shard.items()} == {
            "classes": ("uint16", (256, 4)), "probabilities": ("float16", (256, 4)), "checksums": ("uint32", (256,)),
        }  # fmt: skip
        assert shard["checksums"].tolist() == checksums_of(0, order[256:512]).tolist()
        assert sorted(path.name for path in store.path.glob("epoch-00000/*")) == [
            f"shard-0000{number}.safetensors" for number in range(4)
        ]

    def test_other_order(self, store):
        indices = np.arange(1000)[::-1]
        assert write_records(store, 0, indices, probabilities_of(0, indices), checksums_of(0, indices)) == 1000
        assert_right(store, 0, np.arange(1000))

    def test_file_permissions(self, store):
        fill(store, 0)
        (store.path / "plain").write_text("")
        modes = {path.stat().st_mode & 0o777 for path in (store.path / "plain", *store.path.glob("*/*.safetensors"))}
        assert len(modes) == 1

    def test_pickling(self, store):
        fill(store, 0)
        copy = pickle.loads(pickle.dumps(store))
        assert_right(copy, 0, np.arange(20))
        assert len(pickle.dumps(store)) < 1000

    def test_threads(self, store):
        for epoch in range(3):
            fill(store, epoch)
        reader = LabelStore(store.path)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda epoch: assert_right(reader, epoch, np.arange(0, 1000, 7)), [0, 1, 2] * 8))

    @pytest.mark.parametrize(
        ("num_classes", "top_k", "dtype", "record"),
        [
            (1, 1, torch.uint8, 7),
            (256, 256, torch.uint8, 256 * 3 + 4),
            (257, 3, torch.uint16, 16),
            (65536, 5, torch.uint16, 24),
            (70000, 5, torch.uint32, 34),
        ],
    )
    def test_class_index_types(self, tmp_path, num_classes, top_k, dtype, record):
        manifest = replace(MANIFEST, num_classes=num_classes, top_k=top_k, num_samples=9, shard_records=4)
        assert manifest.record_bytes == record
        probabilities = torch.rand(9, num_classes, generator=torch.Generator().manual_seed(0))
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
        probabilities[:, -1] = 0.5 if num_classes > 1 else 1.0
        probabilities[:, :-1] /= 2
        with LabelStore.create(tmp_path, manifest) as store:
            write_records(store, 0, range(9), probabilities, [2**32 - 1] * 9)
            records = store.read(0, range(9))
        top = probabilities.topk(top_k)
        assert records.classes.dtype == dtype
        assert torch.equal(records.classes.long(), top.indices)
        assert (records.classes[:, 0].long() == num_classes - 1).all()
        assert torch.equal(records.probabilities, top.values.half())
        assert records.checksums.tolist() == [2**32 - 1] * 9

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_floating_types(self, store, dtype):
        order = store.order.permutation(0)[:256]
        probabilities = probabilities_of(0, order).to(dtype)
        write_records(store, 0, order, probabilities.requires_grad_(), [0] * 256)
        assert torch.equal(store.read(0, order).probabilities, probabilities.detach().topk(4).values.half())


class TestManifest:
    @pytest.mark.parametrize("manifest", [MANIFEST, FEATURES], ids=lambda manifest: manifest.kind)
    def test_round_trip(self, tmp_path, manifest):
        (tmp_path / "manifest.json").write_text(manifest.to_json())
        assert Manifest.read(tmp_path) == manifest

    def test_differences(self, store):
        store.require(asdict(MANIFEST))
        store.require({})
        with pytest.raises(StoreMismatchError) as error:
            store.require({"augmentation": {"crop_scale": (0.5, 1.0), "mixup": {"beta": 1}}})
        assert str(error.value).splitlines()[1:] == [
            "  augmentation.crop_scale: the store has [0.08, 1.0], this pipeline [0.5, 1.0];",
            "  augmentation.mixup.alpha: the store has 0.8, this pipeline nothing;",
            "  augmentation.mixup.beta: the store has nothing, this pipeline 1.",
            "It holds no records yet: delete the folder, or use another folder.",
        ]
        assert describe_differences({"a": None}, {}) == ["a: the store has None, this pipeline nothing"]
        assert describe_differences({"a": "nothing"}, {}) != []

    def test_require(self, store):
        store.require({"seed": 5, "data": MANIFEST.data})
        with pytest.raises(StoreMismatchError, match="seed: the store has 5, this pipeline 6"):
            store.require({"seed": 6})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"top_k": 301}, "top_k in .1, num_classes.*top_k=301"),
            ({"top_k": 0}, "top_k=0"),
            ({"shard_records": 255}, "even.*got 255"),
            ({"shard_records": -2}, "got -2"),
            ({"num_samples": 0}, "num_samples"),
            ({"num_samples": 2.5}, "num_samples takes integers only; got 2.5"),
            ({"seed": -1}, "seed"),
            ({"kind": "sounds"}, "'sounds'"),
            ({"shape": (3,)}, "no shape"),
            ({"kind": "features"}, "requires the shape"),
            ({"teacher": {"a": float("nan")}}, "teacher"),
            ({"teacher": {"a": torch.ones(1)}}, "teacher.*JSON"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(StoreError, match=message):
            replace(MANIFEST, **changes)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "damaged"),
            (b"[]", "damaged"),
            (b"\xff", "damaged"),
            (b'{"version": 2}', "damaged.*num_samples"),
            (MANIFEST.to_json().replace('"version": 2', '"version": 3').encode(), "version 2 .*got 3"),
            (MANIFEST.to_json().replace('"shape": []', '"shape": 3').encode(), "damaged"),
        ],
    )
    def test_damaged(self, store, content, message):
        (store.path / "manifest.json").write_bytes(content)
        with pytest.raises(StoreError, match=message):
            LabelStore(store.path)

    def test_no_store(self, tmp_path):
        with pytest.raises(StoreError, match=r"no manifest.json"):
            LabelStore(tmp_path)

    def test_other_kind(self, store):
        with pytest.raises(StoreError, match="holds logits"):
            FeatureStore(store.path)

    def test_create_again(self, store):
        assert LabelStore.create(store.path, MANIFEST).manifest == MANIFEST
        other = replace(MANIFEST, augmentation=MANIFEST.augmentation | {"crop_scale": [0.5, 1.0]}, top_k=5)
        with pytest.raises(StoreMismatchError) as error:
            LabelStore.create(store.path, other)
        assert "augmentation.crop_scale: the store has [0.08, 1.0], this pipeline [0.5, 1.0]" in str(error.value)
        assert "top_k: the store has 4, this pipeline 5" in str(error.value)
        assert "mixup" not in str(error.value)
        assert LabelStore(store.path).manifest == MANIFEST

    def test_created_concurrently(self, tmp_path):
        queue, barrier = PROCESSES.Queue(), PROCESSES.Barrier(6)
        manifests = [replace(MANIFEST, seed=5 + number % 2) for number in range(6)]
        processes = [start(child_create, tmp_path / "s", manifest, barrier, queue) for manifest in manifests]
        results = [queue.get(timeout=30) for _ in processes]
        for process in processes:
            process.join()
        winner = LabelStore(tmp_path / "s").manifest.seed
        assert results.count(winner) == 3
        assert sum(f"seed: the store has {winner}, this pipeline {11 - winner}" in str(each) for each in results) == 3
        assert [path.name for path in (tmp_path / "s").iterdir()] == ["manifest.json"]


class TestSize:
    def test_published(self):
        assert estimated_size(1_281_167, 300, 1000, 10) == pytest.approx(16.9e9, rel=0.01)  # "16 GB" of the paper
        assert estimated_size(14_197_122, 90, 21841, 100) == pytest.approx(516e9, rel=0.01)  # "481 GB", in GiB

    @pytest.mark.parametrize("num_samples", [1000, 1024, 1])
    def test_real(self, tmp_path, num_samples):
        manifest = replace(MANIFEST, num_samples=num_samples)
        with LabelStore.create(tmp_path, manifest) as store:
            fill(store, 0)
        for shard, path in enumerate(sorted(tmp_path.glob("epoch-*/*"))):
            assert path.stat().st_size == manifest.shard_bytes(shard)
            assert 0 < manifest.shard_bytes(shard) - manifest.records_in(shard) * (4 * 4 + 4) < 256

    def test_estimate(self, tmp_path):
        with LabelStore.create(tmp_path, Manifest(10_000, num_classes=12, top_k=3)) as store:
            assert store.manifest.num_shards == 2
            for epoch in range(2):
                fill(store, epoch, batch=5000)
        sizes = sum(path.stat().st_size for path in tmp_path.glob("epoch-*/*"))
        assert sizes == estimated_size(10_000, 2, 12, 3) == pytest.approx(20_000 * 13, rel=0.01)

    def test_default_shards(self):
        """8,192 records or a 48th of an epoch, limited to 16 MiB for large records."""
        assert Manifest(50_000, num_classes=1000, top_k=10).shard_records == 8192
        assert Manifest(10**6, num_classes=1000, top_k=10).shard_records == 20_832
        assert Manifest(10**7, num_classes=1000, top_k=100).shard_records == 2**24 // 404 // 2 * 2
        manifest = Manifest(10**6, kind="features", shape=(256, 64, 64))
        assert (manifest.shard_records, manifest.record_bytes) == (6, 2**21 + 4)
        assert Manifest(10**6, kind="features", shape=(2**29 - 4,)).shard_records == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: p.fill_(float("nan")), "sample 8 .*minimum nan.*softmax"),
            (lambda p: p[1].mul_(-1), "sample 9 .*minimum -"),
            (lambda p: p[1].mul_(1.02), "sample 9 .*sum 1.02"),
            (lambda p: p[0].fill_(float("inf")), "sum inf"),
        ],
    )
    def test_values(self, store, change, message):
        probabilities = probabilities_of(0, [8, 9])
        change(probabilities)
        with store.writer(0, 0) as writer, pytest.raises(StoreError, match=message):
            writer.write([8, 9], probabilities, [1, 2])
        assert store.valid_count(0) == 0

    def test_rounding(self, store):
        order = store.order.permutation(0)[:256]
        assert write_records(store, 0, order, probabilities_of(0, order) * 1.005, order) == 256

    @pytest.mark.parametrize(
        ("indices", "probabilities", "checksums", "message"),
        [
            ([8], torch.zeros(1, 299), [1], r"\(1, 300\); got torch.float32 of \(1, 299\)"),
            ([8, 9], torch.zeros(1, 300), [1, 2], r"\(2, 300\)"),
            ([8], torch.zeros(1, 300, dtype=torch.long), [1], "int64"),
            ([8], [[0.5]], [1], "got list"),
            ([8], torch.zeros(1, 300), [1, 2], "2 checksums for 1"),
            ([8], torch.zeros(1, 300), [-1], "checksums must be in"),
            ([8], torch.zeros(1, 300), [2**32], "checksums must be in"),
            ([8], torch.zeros(1, 300), [2**64 - 1], "checksums must be in"),
            ([8], torch.zeros(1, 300), [0.5], "checksums must be integers"),
            ([8.0], torch.zeros(1, 300), [1], "indices must be integers"),
            ([[8]], torch.zeros(1, 300), [1], "indices must be integers"),
        ],
    )
    def test_shapes(self, store, indices, probabilities, checksums, message):
        with store.writer(0, 0) as writer, pytest.raises(StoreError, match=message):
            writer.write(indices, probabilities, checksums)
        assert store.epochs == []

    @pytest.mark.parametrize("index", [-1, 1000])
    def test_no_such_sample(self, store, index):
        with pytest.raises(IndexError, match=str(index)):
            store.read(0, [index])
        with store.writer(0, 0) as writer, pytest.raises(StoreError, match="takes each of its samples once"):
            writer.write([index], probabilities_of(0, [0]), [0])

    def test_no_such_shard(self, store):
        with pytest.raises(StoreError, match="0 to 3; got 4"), store.writer(0, 4):
            pass

    def test_missing_records(self, store):
        with pytest.raises(MissingRecordsError, match=r"2 of 2 .* epoch 0 .*samples 1, 2.*0 of 1000.*distill save"):
            store.read(0, [1, 2])
        fill(store, 0, [0, 1])
        order = store.order.permutation(0)
        with pytest.raises(MissingRecordsError) as error:
            store.read(0, order[502:522])
        lost = ", ".join(map(str, order[512:517]))
        for part in ("10 of 20", f"{lost}, ...", "512 of 1000", "distill save"):
            assert part in str(error.value)
        with pytest.raises(MissingRecordsError, match="epoch 1"):
            store.read(1, [3])

    @pytest.mark.parametrize("change", ["empty", "zeros", "cut", "longer", "another"])
    def test_damaged_shard(self, store, change):
        fill(store, 0)
        path = store.path / "epoch-00000" / "shard-00002.safetensors"
        whole = path.read_bytes()
        path.write_bytes({
            "empty": b"", "zeros": bytes(10000), "cut": whole[:-1], "longer": whole + b"0",
            "another": save({"classes": np.zeros(3, np.int64)}),
        }[change])  # fmt: skip
        store = LabelStore(store.path)
        for action in (lambda: store.read(0, np.arange(1000)), lambda: store.missing(0), lambda: fill(store, 0, [2])):
            with pytest.raises(StoreError, match=r"shard-00002.safetensors is damaged: .*Delete it and run .*save"):
                action()
        path.unlink()
        assert fill(store, 0, store.missing_shards(0)) == 232 + 24
        assert_right(store, 0, np.arange(1000))

    @pytest.mark.parametrize("value", [b"\xff\x7f", b"\x00\xbc", b"\x00\x40"], ids=["NaN", "-1", "2"])
    def test_damaged_record(self, store, value):
        fill(store, 0)
        path = store.path / "epoch-00000" / "shard-00000.safetensors"
        shard = load_file(path)
        shard["probabilities"][3, 1] = np.frombuffer(value, np.float16)[0]
        path.write_bytes(save(shard))
        store, sample = LabelStore(store.path), int(store.order.permutation(0)[3])
        with pytest.raises(
            StoreError, match=rf"shard-00000.safetensors is damaged: the record of sample {sample} has invalid"
        ):
            store.read(0, np.arange(1000))
        assert len(store.read(0, [each for each in range(1000) if each != sample]).classes) == 999

    def test_damaged_class_index(self, tmp_path):
        store = LabelStore.create(tmp_path, Manifest(4, num_classes=9, top_k=2))
        write_records(store, 0, range(4), torch.full((4, 9), 1 / 9), range(4))
        path = tmp_path / "epoch-00000" / "shard-00000.safetensors"
        shard = load_file(path)
        shard["classes"][0, 0] = 9
        path.write_bytes(save(shard))
        with pytest.raises(StoreError, match="has invalid values"):
            store.read(0, range(4))

    def test_shard_too_large(self):
        with pytest.raises(StoreError, match="Reduce shard_records"):
            Manifest(4, num_classes=9, top_k=2, shard_records=2**70)

    def test_negative_zero(self, tmp_path):
        store = LabelStore.create(tmp_path, Manifest(1, num_classes=2, top_k=2))
        write_records(store, 0, [0], torch.tensor([[1.0, -0.0]]), [0])
        assert store.read(0, [0]).probabilities.tolist() == [[1, 0]]

    @pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
    def test_invalid_path(self, tmp_path, name):
        with pytest.raises(StoreError, match="cannot be read as a store's manifest"):
            LabelStore(tmp_path / name)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [((2**40,), "A shard of 2 records takes"), (("3",), "integers only"), ((True,), "integers only")],
    )
    def test_invalid_feature_shape(self, shape, message):
        with pytest.raises(StoreError, match=message):
            Manifest(4, kind="features", shape=shape)

    def test_changed_top_k(self, store):
        """An edited manifest does not match the files."""
        fill(store, 0)
        (store.path / "manifest.json").write_text(replace(MANIFEST, top_k=5).to_json())
        with pytest.raises(StoreError, match="damaged"):
            LabelStore(store.path).read(0, [1])


class TestWriting:
    def test_writer(self, store):
        with store.writer(1, 2) as writer:
            missing = writer.missing()
            assert missing.tolist() == store.order.permutation(1)[512:768].tolist()
            values = probabilities_of(1, missing[:100])
            assert writer.write(missing[:100], values, checksums_of(1, missing[:100])) == 100
            assert writer.missing().tolist() == missing[100:].tolist()
            for wrong in (missing[:1], store.order.permutation(1)[:1], missing[101:102], missing[[100, 100]]):
                with pytest.raises(StoreError, match=r"shard-00002.* takes each of its samples once"):
                    writer.write(wrong, probabilities_of(1, wrong), checksums_of(1, wrong))
            assert store.valid_count(1) == 0  # the file does not exist until the shard is complete
            rest = missing[100:]
            writer.write(rest, probabilities_of(1, rest), checksums_of(1, rest))
            assert store.valid_count(1) == 256
        assert_right(store, 1, missing)

    def test_unfinished(self, store):
        with store.writer(0, 0) as writer:
            first = writer.missing()[:100]
            writer.write(first, probabilities_of(0, first), checksums_of(0, first))
        assert store.missing_shards(0) == [0, 1, 2, 3]
        assert fill(store, 0) == 1000

    def test_existing_shard_is_kept(self, store):
        fill(store, 0)
        order, path = store.order.permutation(0)[:256], store.path / "epoch-00000" / "shard-00000.safetensors"
        before = path.stat()
        with store.writer(0, 0) as writer:
            assert len(writer.missing()) == 0
            assert writer.write([], torch.zeros(0, 300), []) == 0
            with pytest.raises(StoreError, match="takes each of its samples once"):
                writer.write(order, probabilities_of(1, order), [9] * 256)
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert_right(store, 0, order)

    @pytest.mark.parametrize("indices", [[0], range(255)])
    def test_part_of_a_shard(self, store, indices):
        samples = store.order.permutation(0)[indices]
        with store.writer(0, 0) as writer:
            assert writer.write(samples, probabilities_of(0, samples), checksums_of(0, samples)) == len(indices)
        assert store.epochs == []

    def test_few_maps(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_MAX_MAPS", 3)
        with LabelStore.create(tmp_path, replace(MANIFEST, shard_records=50)) as store:
            fill(store, 0)
            before = len(os.listdir("/proc/self/fd"))
            assert_right(store, 0, np.arange(1000))
            assert len(store._maps) <= 3
            assert len(os.listdir("/proc/self/fd")) == before  # mappings need no open files

    def test_not_yet_on_disk(self, store, monkeypatch):
        """A shard is renamed only after its bytes are on the disk."""

        def fail(handle):
            raise OSError(errno.EIO, "no")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match=r"shard-00000\.safetensors"):
                fill(store, 0)
        assert store.valid_count(0) == 0
        assert not [path for path in store.path.glob("epoch-00000/*") if path.suffix != ".lock"]
        assert fill(store, 0) == 1000
        assert_right(store, 0, np.arange(1000))

    def test_left_unfinished(self, store):
        """Temporary files of a killed process are removed by the next writer of the shard."""
        folder = store.path / "epoch-00000"
        folder.mkdir()
        (folder / ".shard-00000.safetensors.12ab34cd.tmp").write_bytes(b"x" * 10**6)
        (folder / "shard-00000.lock").touch()
        fill(store, 0)
        assert_right(store, 0, np.arange(1000))
        assert len(list(folder.iterdir())) == 4


class TestProcesses:
    @pytest.mark.parametrize("writers", [1, 2])
    def test_killed(self, tmp_path, writers):
        """Existing shards of killed writers are complete, correct and kept; each writer loses at most one shard."""
        manifest = replace(MANIFEST, num_samples=12_000, shard_records=128)
        store = LabelStore.create(tmp_path, manifest)
        chance = random.Random(0)
        contents = {}
        for number in range(12):
            ready = [PROCESSES.Event() for _ in range(writers)]
            processes = [start(child_fill, tmp_path, 0, 8, event) for event in ready]
            assert all(event.wait(30) for event in ready)
            target = 350 * (number + chance.random())
            while store.valid_count(0) < target:
                pass
            time.sleep(chance.random() * 0.005)
            for process in processes:
                process.kill()
                process.join()
            assert -signal.SIGKILL in [process.exitcode for process in processes]
            unfinished = [path for path in tmp_path.glob("epoch-*/.*") if path.is_file()]
            assert len(unfinished) <= writers * (number + 1)
            assert_right(LabelStore(tmp_path), 0, written(LabelStore(tmp_path), 0))
            now = {path: path.read_bytes() for path in tmp_path.glob("epoch-*/*.safetensors")}
            assert {path: now[path] for path in contents} == contents
            contents = now
        assert 20 < len(contents) < manifest.num_shards, "the writers were killed too early or too late"
        missing = store.missing_shards(0)
        assert fill(store, 0, missing, batch=500) == sum(map(manifest.records_in, missing))
        assert_right(store, 0, np.arange(12_000))
        assert {path: path.read_bytes() for path in contents} == contents
        assert len(list(tmp_path.glob("epoch-*/*"))) >= manifest.num_shards

    def test_two_writers_of_one_shard(self, tmp_path):
        """Without a lock, as on a file system without locks, both write the same bytes."""
        contents = []
        for name, batch in (("a", 7), ("b", 256)):
            store = LabelStore.create(tmp_path / name, MANIFEST)
            with store.writer(0, 0) as writer:
                other = module.ShardWriter(store, store._shard_path(0, 0), writer.missing())
                for each in (writer, other):
                    while len(chosen := each.missing()[:batch]):
                        each.write(chosen, probabilities_of(0, chosen), checksums_of(0, chosen))
                    contents.append((store.path / "epoch-00000" / "shard-00000.safetensors").read_bytes())
            assert_right(LabelStore(tmp_path / name), 0, store.order.permutation(0)[:256])
        assert len(set(contents)) == 1

    def test_read_while_written(self, tmp_path):
        store = LabelStore.create(tmp_path, replace(MANIFEST, shard_records=50))
        ready = PROCESSES.Event()
        process = start(child_fill, tmp_path, 0, 1, ready)
        assert ready.wait(30)
        counts = set()
        while process.is_alive():
            valid = written(store, 0)
            assert_right(store, 0, valid)
            counts.add(len(valid))
        process.join()
        assert process.exitcode == 0
        assert len(counts) > 3
        assert_right(store, 0, np.arange(1000))

    @pytest.mark.parametrize("with_child", [False, True], ids=["alone", "with data workers"])
    def test_locked(self, store, with_child):
        queue = PROCESSES.Queue()
        process = start(child_hold, store.path, 1, queue, with_child)
        child = queue.get(timeout=30)
        try:
            with pytest.raises(BlockingIOError, match="Shard 1 of epoch 0"):
                fill(store, 0, [1])
            assert fill(store, 0, [0]) == 256
            process.kill()
            process.join()
            assert fill(store, 0, [1]) == 256  # although a child of the killed process is alive
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)

    def test_forked(self, store):
        """A forked child does not release its parent's lock."""
        with store.writer(1, 0):
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
            with pytest.raises(BlockingIOError):
                fill(LabelStore(store.path), 1, [0])
            assert fill(store, 0) == 1000


class TestDiskFull:
    def test_file_limit(self, store):
        fill(store, 0)
        queue = PROCESSES.Queue()
        process = start(child_limited, store.path, 5000, queue)
        message = queue.get(timeout=30)
        process.join()
        assert re.search(r"File too large: '.*epoch-00001/.*shard-00000.safetensors", message)
        assert [path.name for path in (store.path / "epoch-00001").iterdir()] == ["shard-00000.lock"]
        assert_right(LabelStore(store.path), 0, np.arange(1000))
        assert fill(store, 1) == 1000

    def test_no_space(self, store, monkeypatch):
        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        fill(store, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=r"No space left on device: '.*shard-00000"):
                fill(store, 1)
        assert store.epochs == [0]
        assert not list(store.path.glob("*/.*"))
        assert_right(store, 0, np.arange(1000))
        assert fill(store, 1) == 1000

    def test_manifest(self, tmp_path, monkeypatch):
        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*manifest.json"):
            LabelStore.create(tmp_path / "s", MANIFEST)
        assert list((tmp_path / "s").iterdir()) == []

    def test_invalid_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            LabelStore.create(tmp_path / "file" / "s", MANIFEST)


class TestFeatures:
    def test_round_trip(self, tmp_path):
        features = 100 * torch.randn(30, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        features[3, 0, 0, 0] = -65504
        with FeatureStore.create(tmp_path, FEATURES) as store:
            assert write_records(store, 2, range(30), features, checksums_of(2, range(30))) == 30
        reader = pickle.loads(pickle.dumps(FeatureStore(tmp_path)))
        indices = [7, 3, 29, 0]
        records = reader.read(2, indices)
        assert torch.equal(records.features, features[indices].half())
        assert records.features.is_contiguous()
        assert records.checksums.tolist() == checksums_of(2, indices).tolist()
        shapes = [load_file(path)["features"].shape for path in sorted(tmp_path.glob("epoch-00002/*"))]
        assert shapes == [(8, 3, 2, 2)] * 3 + [(6, 3, 2, 2)]

    @pytest.mark.parametrize("value", [65505.0, -1e6, float("nan"), float("inf")])
    def test_overflow(self, tmp_path, value):
        features = torch.zeros(2, 3, 2, 2)
        features[1, 2, 1, 0] = value
        with FeatureStore.create(tmp_path, FEATURES) as store:
            with store.writer(0, 0) as writer, pytest.raises(StoreError, match=r"sample 6 reach .*65504"):
                writer.write([5, 6], features, [0, 0])
            assert store.valid_count(0) == 0

    def test_wrong_shape(self, tmp_path):
        with (
            FeatureStore.create(tmp_path, FEATURES).writer(0, 0) as writer,
            pytest.raises(StoreError, match=r"\(2, 3, 2, 2\); got torch.float32 of \(2, 3, 4\)"),
        ):
            writer.write([5, 6], torch.zeros(2, 3, 4), [0, 0])
