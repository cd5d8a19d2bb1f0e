import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from kornia_tinyvit.checkpoints.catalog import imagenet_1k_in_22k, imagenet_classes
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import BrokenImageError
from kornia_tinyvit.training.metrics.classification import (
    Metrics,
    ReadablePictures,
    collate_readable,
    extract_features,
    k_nearest_neighbours,
    linear_probe,
    select_classes,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def outputs():
    """Logits of 200 pictures of 7 classes, right a little more often than by chance, and no picture of class 6."""
    labels = torch.randint(6, (200,), generator=generator())
    return torch.randn(200, 7, generator=generator(1)) + 2 * F.one_hot(labels, 7), labels


def measure(logits, labels, batch=32):
    metrics = Metrics(logits.shape[1])
    for some, classes in zip(logits.split(batch), labels.split(batch), strict=True):
        metrics.update(some, classes)
    return metrics


class TestMetrics:
    @pytest.mark.parametrize("batch", [1, 32, 200])
    def test_by_hand(self, outputs, batch):
        logits, labels = outputs
        found = measure(logits, labels, batch).compute()
        order = logits.argsort(1, descending=True).tolist()
        rows = list(zip(order, labels.tolist(), strict=True))
        assert (found.pictures, found.top_k) == (200, 5)
        assert found.top1 == sum(row[0] == label for row, label in rows) / 2
        assert found.top5 == sum(label in row[:5] for row, label in rows) / 2
        assert 50 < found.top1 < found.top5 < 100
        for truth in range(7):
            own = [row[0] for row, label in rows if label == truth]
            assert found.class_pictures[truth] == len(own)
            assert found.confusion[truth].tolist() == [own.count(answer) for answer in range(7)]
            share = 100 * own.count(truth) / len(own) if own else math.nan
            assert found.per_class[truth].item() == pytest.approx(share, nan_ok=True)
        assert found.confusion.dtype == torch.int64

    def test_calibration(self, outputs):
        logits, labels = outputs
        found = measure(logits, labels).compute()
        scores, answers = logits.softmax(1).max(1)
        error = 0.0
        for number in range(15):
            inside = (scores > number / 15) & (scores <= (number + 1) / 15)
            count, score, top1 = found.calibration_bins[number].tolist()
            assert count == inside.sum()
            if not count:
                assert math.isnan(score)
                assert math.isnan(top1)
                continue
            right = 100 * (answers == labels)[inside].double().mean().item()
            assert score == pytest.approx(100 * scores[inside].double().mean().item())
            assert top1 == pytest.approx(right)
            error += count / 200 * abs(score - right)
        assert found.calibration_error == pytest.approx(error)
        assert error > 1

    def test_calibration_of_the_certain_and_of_the_uncertain(self):
        certain = measure(torch.tensor([[100.0, 0.0], [100.0, 0.0]]), torch.tensor([0, 1])).compute()
        assert certain.calibration_error == pytest.approx(50)
        assert certain.calibration_bins[-1].tolist() == pytest.approx([2, 100, 50])
        uncertain = measure(torch.zeros(2, 2), torch.tensor([0, 1])).compute()
        assert uncertain.calibration_error == pytest.approx(0)

    def test_processes_add_up(self, outputs):
        logits, labels = outputs
        whole = measure(logits, labels)
        parts = [measure(logits[:77], labels[:77]), measure(logits[77:], labels[77:])]
        summed = Metrics(7)
        summed.load_state(parts[0].state() + parts[1].state())
        parts[0].merge(parts[1])
        for metrics in (summed, parts[0]):
            torch.testing.assert_close(metrics.state(), whole.state(), rtol=1e-12, atol=0)
            assert torch.equal(metrics.compute().confusion, whole.compute().confusion)
        assert whole.state().dtype == torch.float64
        whole.state().zero_()
        assert whole.compute().pictures == 200

    def test_confusions(self):
        answers = [(0, 1)] * 3 + [(2, 1)] * 5 + [(1, 0)] + [(1, 1)] * 9
        metrics = Metrics(3)
        metrics.update(
            F.one_hot(torch.tensor([a for _, a in answers]), 3).float(), torch.tensor([t for t, _ in answers])
        )
        assert metrics.compute().confusions() == [(2, 1, 5), (0, 1, 3), (1, 0, 1)]
        assert metrics.compute().confusions(1) == [(2, 1, 5)]

    def test_ties_count_once(self):
        found = measure(torch.zeros(10, 10), torch.arange(10)).compute()
        assert found.top1 <= found.top5
        assert found.confusion.diagonal().sum() == found.top1 / 10
        assert found.top5 == 50

    def test_one_class(self):
        found = measure(torch.randn(3, 1), torch.zeros(3, dtype=torch.long)).compute()
        assert (found.top1, found.top5, found.top_k) == (100, 100, 1)
        assert found.confusion.tolist() == [[3]]

    def test_many_classes(self):
        metrics = Metrics(21841)
        metrics.update(F.one_hot(torch.tensor([3, 21840]), 21841).float(), torch.tensor([3, 7]))
        found = metrics.compute()
        assert (found.top1, found.confusion) == (50, None)
        assert metrics.state().numel() < 50_000
        with pytest.raises(ValueError, match="up to 2048 classes"):
            found.confusions()

    def test_half_precision_and_empty_batches(self, outputs):
        logits, labels = outputs
        metrics = measure(logits.bfloat16(), labels)
        metrics.update(logits[:0], labels[:0])
        assert metrics.compute().pictures == 200

    def test_refused(self):
        metrics = Metrics(3)
        with pytest.raises(ValueError, match="No pictures were evaluated"):
            metrics.compute()
        with pytest.raises(ValueError, match="The data has a class 3, but the network knows 3"):
            metrics.update(torch.zeros(2, 3), torch.tensor([0, 3]))
        with pytest.raises(ValueError, match="The data has a class -1"):
            metrics.update(torch.zeros(2, 3), torch.tensor([0, -1]))
        with pytest.raises(ValueError, match=r"Expected logits \(B, 3\) and labels \(B,\); got \(2, 4\) and \(2,\)"):
            metrics.update(torch.zeros(2, 4), torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="Expected the state of 3 classes"):
            metrics.load_state(Metrics(4).state())
        with pytest.raises(ValueError, match="Counts of 4 classes do not add"):
            metrics.merge(Metrics(4))
        with pytest.raises(ValueError, match="num_classes must be at least 1"):
            Metrics(0)
        assert metrics.state().sum() == 0


class TestSelectClasses:
    def test_picks(self):
        logits = torch.arange(10.0).view(2, 5)
        found = select_classes(logits, torch.tensor([4, -1, 0]))
        assert found.tolist() == [[4, -math.inf, 0], [9, -math.inf, 5]]

    @pytest.mark.parametrize("index", [5, -2])
    def test_refused(self, index):
        with pytest.raises(ValueError, match=r"Positions must be -1 or in \[0, 5\)"):
            select_classes(torch.zeros(2, 5), torch.tensor([0, index]))

    def test_imagenet(self):
        positions = imagenet_1k_in_22k()
        assert positions.shape == (1000,)
        assert positions.dtype == torch.int64
        names = imagenet_classes()
        assert (positions < 0).nonzero().flatten().tolist() == [names.index("teddy")]
        known = positions[positions >= 0]
        assert (known.diff() > 0).all()  # both lists are sorted by WordNet's identifiers
        # Counted in the sorted list of the 21841 identifiers: n01440764, n01443537, n02123045 and n15075141.
        wanted = {"tench": 359, "goldfish": 368, "tabby": 2397, "toilet tissue": 21815}
        assert {name: int(positions[names.index(name)]) for name in wanted} == wanted
        assert len(select_classes(torch.zeros(21841), positions)) == 1000


class TestFeatures:
    def test_what_the_head_sees(self, tiny, images):
        tiny.train()
        batches = [(images, torch.tensor([1, 0])), (images[:1], torch.tensor([4]))]
        features, labels = extract_features(tiny, iter(batches))
        assert tiny.training
        assert labels.tolist() == [1, 0, 4]
        tiny.eval()
        torch.testing.assert_close(tiny.head(features[:2]), tiny(images))
        torch.testing.assert_close(features[2], features[0])
        assert not features.requires_grad

    def test_none(self, tiny):
        with pytest.raises(ValueError, match="There are no pictures"):
            extract_features(tiny, [])


class TestNearestNeighbours:
    def test_by_hand(self):
        known = torch.randn(50, 6, generator=generator())
        labels = torch.randint(4, (50,), generator=generator(1))
        features = torch.randn(9, 6, generator=generator(2))
        votes = k_nearest_neighbours(known, labels, features, k=7, temperature=0.5, num_classes=5)
        assert votes.shape == (9, 5)
        for row, feature in zip(votes, features, strict=True):
            similarity = F.cosine_similarity(known, feature[None])
            expected = torch.zeros(5)
            for index in similarity.argsort(descending=True)[:7].tolist():
                expected[labels[index]] += math.exp((similarity[index].item() - 1) / 0.5)
            torch.testing.assert_close(row, expected)

    def test_pieces_and_length_do_not_matter(self, monkeypatch):
        known, features = torch.randn(30, 4, generator=generator()), torch.randn(11, 4, generator=generator(1))
        labels = torch.arange(30) % 3
        whole = k_nearest_neighbours(known, labels, features)
        monkeypatch.setattr("kornia_tinyvit.training.metrics.classification._SIMILARITIES", 60)
        torch.testing.assert_close(k_nearest_neighbours(known * 9, labels, features / 7), whole)

    def test_fewer_pictures_than_neighbours(self):
        votes = k_nearest_neighbours(torch.eye(3), torch.tensor([2, 0, 1]), torch.eye(3), k=20, temperature=0.01)
        assert votes.argmax(1).tolist() == [2, 0, 1]
        assert torch.isfinite(votes).all()

    def test_refused(self):
        with pytest.raises(ValueError, match="k and temperature must be positive; got 0"):
            k_nearest_neighbours(torch.eye(3), torch.arange(3), torch.eye(3), k=0)
        with pytest.raises(ValueError, match="Got 3 training features and 2 labels"):
            k_nearest_neighbours(torch.eye(3), torch.arange(2), torch.eye(3))


class TestLinearProbe:
    @pytest.fixture
    def data(self):
        """Features of three classes that overlap, of very different scales."""
        labels = torch.arange(300) % 3
        features = torch.randn(300, 5, generator=generator()) + 2 * F.one_hot(labels, 5)
        return features * torch.tensor([1000.0, 1.0, 0.01, 1.0, 0.0]) + 50, labels

    def test_optimum(self, data):
        features, labels = data
        layer = linear_probe(features, labels, 4, penalty=0.01)
        accuracy = (layer(features).argmax(1) == labels).double().mean()
        assert 0.8 < accuracy < 1
        spread = features.std(0, correction=0)
        spread[4] = 1  # the feature that never changes
        weight = (layer.weight * spread).double().requires_grad_()
        bias = (layer.bias + layer.weight @ features.mean(0)).double().requires_grad_()
        inputs = ((features - features.mean(0)) / spread).double()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels) + 0.005 * weight[:, :4].square().sum()
        slopes = torch.autograd.grad(loss, (weight, bias))
        assert max(slope[:3].abs().max() for slope in slopes) < 1e-3
        assert not layer.weight.requires_grad

    def test_the_same_each_time_and_in_inference(self, data):
        first = linear_probe(*data, 3)
        torch.manual_seed(5)
        with torch.inference_mode():
            again = linear_probe(data[0] + 0, data[1], 3)
        assert torch.equal(first.weight, again.weight)
        assert torch.equal(first.bias, again.bias)

    def test_penalty(self, data):
        small, large = (linear_probe(*data, 3, penalty=penalty).weight.norm() for penalty in (1e-3, 1.0))
        assert large < small / 3

    def test_refused(self, data):
        with pytest.raises(ValueError, match=r"Labels must be in \[0, 2\); got one of 2"):
            linear_probe(*data, 2)
        with pytest.raises(ValueError, match="Got 0 training features"):
            linear_probe(torch.zeros(0, 3), torch.zeros(0).long(), 2)


class TestReadablePictures:
    @pytest.fixture
    def images(self, tmp_path):
        (tmp_path / "cat").mkdir()
        for number in range(4):
            Image.new("RGB", (4 + number, 5)).save(tmp_path / "cat" / f"{number}.png")
        (tmp_path / "cat" / "2.png").write_bytes(b"nothing")
        return ClassificationDataset.open(tmp_path)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_skip(self, images, workers):
        data = ReadablePictures(images, [3, 2, 0], skip_broken=True)
        batches = list(DataLoader(data, 2, num_workers=workers, collate_fn=collate_readable))
        assert [[picture.shape[2] for picture in pictures] for pictures, _, _ in batches] == [[7], [4]]
        assert [labels.tolist() for _, labels, _ in batches] == [[0], [0]]
        assert [broken for _, _, broken in batches] == [["cat/2.png"], []]

    def test_all_broken(self, images):
        pictures, labels, broken = collate_readable([ReadablePictures(images, [2], skip_broken=True)[0]])
        assert (pictures, labels.shape, labels.dtype, broken) == ([], (0,), torch.int64, ["cat/2.png"])

    @pytest.mark.parametrize("workers", [0, 1])
    def test_stop(self, images, workers):
        with pytest.raises(BrokenImageError, match=r"2\.png"):
            list(DataLoader(ReadablePictures(images, [2]), num_workers=workers, collate_fn=collate_readable))
