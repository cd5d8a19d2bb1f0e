"""Reading of samples with corrupt images, and the evaluation loop."""

import pytest
import torch
from PIL import Image

from kornia_tinyvit.data import BrokenImageError, ClassificationDataset, replay_loader
from kornia_tinyvit.training.metrics.counts import Counts
from kornia_tinyvit.training.tasks.base import Evaluator, ReadableItems, evaluate_network, read_batches


@pytest.fixture
def images(tmp_path):
    (tmp_path / "cat").mkdir()
    for number in range(4):
        Image.new("RGB", (4 + number, 5)).save(tmp_path / "cat" / f"{number}.png")
    (tmp_path / "cat" / "2.png").write_bytes(b"nothing")
    return ClassificationDataset.open(tmp_path)


class TestReadableItems:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_skip(self, images, workers):
        items = ReadableItems(images, skip_broken=True)
        batches = list(replay_loader(items, [[3, 2], [0]], workers))
        assert [[sample and sample[0].shape[2] for _, sample in batch] for batch in batches] == [[7, None], [4]]
        assert [[index for index, _ in batch] for batch in batches] == [[3, 2], [0]]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_stop(self, images, workers):
        with pytest.raises(BrokenImageError, match=r"2\.png"):
            list(read_batches(ReadableItems(images), 1, workers))

    @pytest.mark.parametrize(("size", "world_size"), [(1, 1), (3, 1), (1, 3), (2, 3), (4, 2)])
    def test_ranks_have_the_same_number_of_batches(self, images, size, world_size):
        items = ReadableItems(images, skip_broken=True)
        loaders = [list(read_batches(items, size, 0, rank, world_size)) for rank in range(world_size)]
        assert len({len(batches) for batches in loaders}) == 1
        assert sorted(index for batches in loaders for batch in batches for index, _ in batch) == [0, 1, 2, 3]
        assert all(len(batch) <= size for batches in loaders for batch in batches)


class Recorder(Evaluator):
    """Records the indices of each batch and the mode of the network."""

    seen: list

    def update(self, network, samples):
        self.seen.append(([index for index, _ in samples], network.training))


class TestEvaluateNetwork:
    def test_corrupt_images_are_skipped_and_returned(self, images):
        network = torch.nn.Identity().train()
        recorder = Recorder(images, Counts(), device=torch.device("cpu"), batch_size=3, skip_broken=True)
        recorder.seen = []
        assert evaluate_network(network, recorder) == ["cat/2.png"]
        assert recorder.seen == [([0, 1], False), ([3], False)]
        assert network.training

    def test_a_batch_of_corrupt_images(self, images):
        recorder = Recorder(images, Counts(), device=torch.device("cpu"), skip_broken=True)
        recorder.seen = []
        assert evaluate_network(torch.nn.Identity(), recorder, rank=2, world_size=4) == ["cat/2.png"]
        assert recorder.seen == [([], False)]
