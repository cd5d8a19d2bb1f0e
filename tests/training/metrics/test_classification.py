import math

import pytest
import torch
import torch.nn.functional as F

from kornia_tinyvit.checkpoints.catalog import imagenet_1k_in_22k, imagenet_classes
from kornia_tinyvit.training.metrics.classification import ClassificationMetrics, select_classes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def outputs():
    """Logits of 200 images of 7 classes, more accurate than chance, and no image of class 6."""
    labels = torch.randint(6, (200,), generator=generator())
    return torch.randn(200, 7, generator=generator(1)) + 2 * F.one_hot(labels, 7), labels


def update(logits, labels, batch=32):
    metrics = ClassificationMetrics(logits.shape[1])
    for some, classes in zip(logits.split(batch), labels.split(batch), strict=True):
        metrics.update(some, classes)
    return metrics


class TestMetrics:
    @pytest.mark.parametrize("batch", [1, 32, 200])
    def test_by_hand(self, outputs, batch):
        logits, labels = outputs
        found = update(logits, labels, batch).compute()
        order = logits.argsort(1, descending=True).tolist()
        rows = list(zip(order, labels.tolist(), strict=True))
        assert (found.images, found.top_k) == (200, 5)
        assert found.top1 == sum(row[0] == label for row, label in rows) / 2
        assert found.top5 == sum(label in row[:5] for row, label in rows) / 2
        assert 50 < found.top1 < found.top5 < 100
        for truth in range(7):
            own = [row[0] for row, label in rows if label == truth]
            assert found.class_images[truth] == len(own)
            assert found.confusion[truth].tolist() == [own.count(answer) for answer in range(7)]
            share = 100 * own.count(truth) / len(own) if own else math.nan
            assert found.per_class[truth].item() == pytest.approx(share, nan_ok=True)
        assert found.confusion.dtype == torch.int64

    def test_calibration(self, outputs):
        logits, labels = outputs
        found = update(logits, labels).compute()
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

    def test_calibration_of_extreme_confidences(self):
        certain = update(torch.tensor([[100.0, 0.0], [100.0, 0.0]]), torch.tensor([0, 1])).compute()
        assert certain.calibration_error == pytest.approx(50)
        assert certain.calibration_bins[-1].tolist() == pytest.approx([2, 100, 50])
        uncertain = update(torch.zeros(2, 2), torch.tensor([0, 1])).compute()
        assert uncertain.calibration_error == pytest.approx(0)

    def test_counts_add_up(self, outputs):
        logits, labels = outputs
        whole = update(logits, labels)
        parts = [update(logits[:77], labels[:77]), update(logits[77:], labels[77:])]
        summed = ClassificationMetrics(7)
        summed.load_state(parts[0].state() + parts[1].state())
        torch.testing.assert_close(summed.state(), whole.state(), rtol=1e-12, atol=0)
        assert torch.equal(summed.compute().confusion, whole.compute().confusion)
        assert whole.state().dtype == torch.float64
        whole.state().zero_()
        assert whole.compute().images == 200

    def test_confusions(self):
        answers = [(0, 1)] * 3 + [(2, 1)] * 5 + [(1, 0)] + [(1, 1)] * 9
        metrics = ClassificationMetrics(3)
        metrics.update(
            F.one_hot(torch.tensor([a for _, a in answers]), 3).float(), torch.tensor([t for t, _ in answers])
        )
        assert metrics.compute().confusions() == [(2, 1, 5), (0, 1, 3), (1, 0, 1)]
        assert metrics.compute().confusions(1) == [(2, 1, 5)]

    def test_ties_count_once(self):
        found = update(torch.zeros(10, 10), torch.arange(10)).compute()
        assert found.top1 <= found.top5
        assert found.confusion.diagonal().sum() == found.top1 / 10
        assert found.top5 == 50

    def test_one_class(self):
        found = update(torch.randn(3, 1), torch.zeros(3, dtype=torch.long)).compute()
        assert (found.top1, found.top5, found.top_k) == (100, 100, 1)
        assert found.confusion.tolist() == [[3]]

    def test_many_classes(self):
        metrics = ClassificationMetrics(21841)
        metrics.update(F.one_hot(torch.tensor([3, 21840]), 21841).float(), torch.tensor([3, 7]))
        found = metrics.compute()
        assert (found.top1, found.confusion) == (50, None)
        assert metrics.state().numel() < 50_000
        with pytest.raises(ValueError, match="limited to 2048 classes"):
            found.confusions()

    def test_half_precision_and_empty_batches(self, outputs):
        logits, labels = outputs
        metrics = update(logits.bfloat16(), labels)
        metrics.update(logits[:0], labels[:0])
        assert metrics.compute().images == 200

    def test_errors(self):
        metrics = ClassificationMetrics(3)
        with pytest.raises(ValueError, match="No images were evaluated"):
            metrics.compute()
        with pytest.raises(ValueError, match="The data has a class 3, but the network has 3 classes"):
            metrics.update(torch.zeros(2, 3), torch.tensor([0, 3]))
        with pytest.raises(ValueError, match="The data has a class -1"):
            metrics.update(torch.zeros(2, 3), torch.tensor([0, -1]))
        with pytest.raises(ValueError, match=r"Expected logits \(B, 3\) and labels \(B,\); got \(2, 4\) and \(2,\)"):
            metrics.update(torch.zeros(2, 4), torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="Expected 61 counts"):
            metrics.load_state(ClassificationMetrics(4).state())
        with pytest.raises(ValueError, match="num_classes must be at least 1"):
            ClassificationMetrics(0)
        assert metrics.state().sum() == 0


class TestSelectClasses:
    def test_selection(self):
        logits = torch.arange(10.0).view(2, 5)
        found = select_classes(logits, torch.tensor([4, -1, 0]))
        assert found.tolist() == [[4, -math.inf, 0], [9, -math.inf, 5]]

    @pytest.mark.parametrize("index", [5, -2])
    def test_errors(self, index):
        with pytest.raises(ValueError, match=r"Class indices must be -1 or in \[0, 5\)"):
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
