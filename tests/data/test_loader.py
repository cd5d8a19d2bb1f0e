"""The order of batches, and the samples that workers make."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kornia_tinyvit.data import EpochBatches, EpochOrder, ReplayableAugmentation, ReplayedSamples, replay_loader
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import BrokenImageError
from tests.scenes import damage, make_images, samples_of


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_images(tmp_path / "data")


def assert_equal_batches(one, other):
    assert torch.equal(one.crops, other.crops)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.valid, other.valid)
    assert one.broken == other.broken
    assert (one.params.checksums() == other.params.checksums()).all()


class TestEpochBatches:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_global_batches_are_the_same(self, world_size, accumulate):
        order = EpochOrder(61, seed=5)
        size = 24 // (world_size * accumulate)
        shards = [list(EpochBatches(order, size, 3, rank, world_size, accumulate)) for rank in range(world_size)]
        assert {len(shard) for shard in shards} == {2 * accumulate * 3}
        for step in range(6):
            parts = range(step * accumulate, (step + 1) * accumulate)
            together = [key for part in parts for shard in shards for key in shard[part]]
            epoch, batch = divmod(step, 2)
            samples = order.permutation(epoch)[24 * batch : 24 * batch + 24].tolist()
            assert together == [(epoch, sample) for sample in samples]

    def test_pairs_stay_together(self):
        order = EpochOrder(50, seed=1)
        for rank in range(3):
            for keys in EpochBatches(order, 4, 2, rank, 3):
                samples = np.array([sample for _, sample in keys])
                assert set(order.partners(keys[0][0], samples)) == set(samples.tolist())

    @pytest.mark.parametrize("start", [0, 1, 4, 9, 15, 18])
    def test_resume(self, start):
        order = EpochOrder(40, seed=5)
        whole = list(EpochBatches(order, 6, 3, replays=[2, 7]))
        rest = EpochBatches(order, 6, 3, start=start, replays=[2, 7])
        assert list(rest) == whole[start:]
        assert len(rest) == 18 - start
        assert (rest.batches_per_epoch, rest.end) == (6, 18)

    def test_replays_in_turn(self):
        batches = EpochBatches(EpochOrder(9), 4, epochs=5, replays=[4, 9])
        assert [keys[0][0] for keys in batches] == [4, 4, 9, 9, 4, 4, 9, 9, 4, 4]
        assert [keys[0][0] for keys in EpochBatches(EpochOrder(4), 4, epochs=3)] == [0, 1, 2]

    def test_other_samples_are_dropped_in_each_epoch(self):
        seen = {}
        for keys in EpochBatches(EpochOrder(15), 4, epochs=6, accumulate=3):
            seen.setdefault(keys[0][0], set()).update(sample for _, sample in keys)
        assert [len(samples) for samples in seen.values()] == [12] * 6
        assert set.intersection(*seen.values()) != set.union(*seen.values()) == set(range(15))

    @pytest.mark.parametrize("size", [0, 1, 5, -2])
    def test_rejects_odd_batch_sizes(self, size):
        with pytest.raises(ValueError, match=f"batch_size must be even.*got {size}"):
            EpochBatches(EpochOrder(100), size, 1)

    def test_rejects_too_few_samples(self):
        with pytest.raises(ValueError, match="23 samples, fewer than a global batch of 24"):
            EpochBatches(EpochOrder(23), 4, 1, world_size=3, accumulate=2)
        assert len(EpochBatches(EpochOrder(24), 4, 1, world_size=3, accumulate=2)) == 2


class TestReplayedSamples:
    def test_batch(self, folder):
        samples = samples_of(folder)
        batch = samples.__getitems__([(4, 20), (4, 3)])
        params = samples.augmentation.sample_params(4, [20, 3])
        for row, index in enumerate((20, 3)):
            assert torch.equal(batch.crops[row], samples.augmentation.crop(samples.images.read(index)[0], params, row))
        assert (batch.params.checksums() == params.checksums()).all()
        assert batch.labels.tolist() == [2, 0]
        assert batch.valid.tolist() == [1, 1]
        assert batch.broken == ()
        assert len(samples) == 24
        assert_equal_batches(samples[4, 20], samples.__getitems__([(4, 20)]))

    @pytest.mark.parametrize("content", [b"", b"not an image", None])
    def test_corrupt_images(self, folder, content):
        path = folder / "green" / "01.png"
        if content is None:
            content = path.read_bytes()[:-900]  # truncated
        path.write_bytes(content)
        index = 9
        keys = [(0, 1), (0, index), (0, 23)]
        with pytest.raises(BrokenImageError, match=r"green/01\.png is not an image"):
            samples_of(folder).__getitems__(keys)
        batch = samples_of(folder, on_broken="skip").__getitems__(keys)
        assert batch.valid.tolist() == [1, 0, 1]
        assert batch.broken == ("green/01.png",)
        assert (batch.crops[1] == 128).all()
        path.unlink()
        make_images(folder.parent / "whole")
        (folder.parent / "whole" / "green" / "01.png").rename(path)
        whole = samples_of(folder).__getitems__(keys)
        assert torch.equal(batch.crops[::2], whole.crops[::2])

    def test_a_missing_file_is_not_skipped(self, folder):
        samples = samples_of(folder, on_broken="skip")
        (folder / "blue" / "00.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"blue/00\.png"):
            samples.__getitems__([(0, 0)])

    def test_workers_give_the_same_batches(self, folder):
        damage(folder / "red" / "03.png")
        samples = samples_of(folder, "in1k", on_broken="skip")
        batches = EpochBatches(samples.order, 6, 2)
        alone, helped = (list(replay_loader(samples, batches, workers)) for workers in (0, 2))
        assert len(alone) == len(helped) == 8
        assert sum(len(batch.broken) for batch in alone) == 2
        for one, other in zip(alone, helped, strict=True):
            assert_equal_batches(one, other)

    @pytest.mark.parametrize(("error", "spoil"), [(BrokenImageError, damage), (FileNotFoundError, Path.unlink)])
    def test_workers_raise_the_same_errors(self, folder, error, spoil):
        samples = samples_of(folder)
        spoil(folder / "red" / "03.png")
        messages = []
        for workers in (0, 1):
            with pytest.raises(error, match=r"red/03\.png") as caught:
                list(replay_loader(samples, EpochBatches(samples.order, 8, 1), workers))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]

    def test_gray_images_and_transparent_ones(self, folder):
        buffer = io.BytesIO()
        Image.new("L", (50, 30), 77).save(buffer, "PNG")
        (folder / "blue" / "00.png").write_bytes(buffer.getvalue())
        Image.new("RGBA", (33, 60), (9, 9, 9, 0)).save(folder / "blue" / "01.png")
        batch = samples_of(folder).__getitems__([(0, 0), (0, 1)])
        assert (batch.crops[0] == 77).all()
        assert (batch.crops[1] == 9).all()

    def test_errors(self, folder):
        images = ClassificationDataset.open(folder)
        with pytest.raises(ValueError, match="'stop' or 'skip'; got 'ignore'"):
            ReplayedSamples(images, ReplayableAugmentation(32), on_broken="ignore")
        with pytest.raises(ValueError, match="mixes 20 samples, but the dataset has 24"):
            ReplayedSamples(images, ReplayableAugmentation(32, "in1k", num_samples=20))
        ReplayedSamples(images, ReplayableAugmentation(32, "distill", num_samples=20))
