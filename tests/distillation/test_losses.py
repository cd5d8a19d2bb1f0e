import pytest
import torch
import torch.nn.functional as F

from kornia_tinyvit.distillation import distillation_loss, soft_target_cross_entropy


def dense(classes, probabilities, count):
    """The distribution as the original restores it: what is missing to 1 spread over the other classes."""
    rest = (1 - probabilities.sum(1, keepdim=True)) / max(count - classes.shape[1], 1)
    return rest.expand(-1, count).scatter(1, classes, probabilities)


@pytest.fixture
def sparse():
    torch.manual_seed(0)
    teacher = (3 * torch.randn(6, 12, dtype=torch.float64)).softmax(1)
    top = teacher.topk(4)
    return top.indices, top.values


class TestSoftTargetCrossEntropy:
    def test_equals_the_dense_loss(self, sparse):
        classes, probabilities = sparse
        logits = torch.randn(6, 12, requires_grad=True)
        expected = F.cross_entropy(logits, dense(classes, probabilities.float(), 12), reduction="none")
        loss = soft_target_cross_entropy(logits, classes, probabilities, reduction="none")
        assert torch.allclose(loss, expected, atol=1e-5)
        (gradient,) = torch.autograd.grad(expected.mean(), logits, retain_graph=True)
        (ours,) = torch.autograd.grad(soft_target_cross_entropy(logits, classes, probabilities), logits)
        assert torch.allclose(ours, gradient, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int64])
    def test_stored_types(self, sparse, dtype):
        classes, probabilities = sparse
        logits = torch.randn(6, 12)
        wide = soft_target_cross_entropy(logits, classes, probabilities)
        assert torch.allclose(
            soft_target_cross_entropy(logits, classes.to(dtype), probabilities.half()), wide, atol=2e-3
        )

    def test_all_classes_stored(self):
        logits, teacher = torch.randn(3, 5), torch.randn(3, 5).softmax(1)
        loss = soft_target_cross_entropy(logits, torch.arange(5).expand(3, 5), teacher)
        assert torch.allclose(loss, F.cross_entropy(logits, teacher), atol=1e-6)

    def test_sum_above_one_leaves_nothing_to_spread(self):
        logits = torch.tensor([[2.0, 0.0, -50.0]])
        classes, probabilities = torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.2505]])
        loss = soft_target_cross_entropy(logits, classes, probabilities)
        assert torch.allclose(loss, -(probabilities * logits.log_softmax(1)[:, :2]).sum(), atol=1e-5)

    def test_half_precision_logits(self, sparse):
        loss = soft_target_cross_entropy(torch.randn(6, 12).bfloat16(), *sparse)
        assert loss.dtype == torch.float32

    def test_refused(self, sparse):
        classes, probabilities = sparse
        with pytest.raises(ValueError, match=r"shape \(5, K\)"):
            soft_target_cross_entropy(torch.randn(5, 12), classes, probabilities)
        with pytest.raises(ValueError, match="'mean' or 'none'"):
            soft_target_cross_entropy(torch.randn(6, 12), classes, probabilities, "sum")
        with pytest.raises(ValueError, match="4 classes are stored, but the logits have 3"):
            soft_target_cross_entropy(torch.randn(6, 3), classes, probabilities)


@pytest.mark.parametrize("index", [-1, 5, 255])
def test_classes_that_there_are_not(index):
    classes = torch.tensor([[0, index]])
    with pytest.raises(ValueError, match=r"The stored classes are .* but the logits have 5"):
        soft_target_cross_entropy(torch.zeros(1, 5), classes, torch.full((1, 2), 0.5))


class TestDistillationLoss:
    def test_mixture(self, sparse):
        logits, labels = torch.randn(6, 12), torch.arange(6)
        soft, hard = soft_target_cross_entropy(logits, *sparse), F.cross_entropy(logits, labels)
        assert torch.allclose(distillation_loss(logits, *sparse), soft)
        assert torch.allclose(distillation_loss(logits, *sparse, labels, 0.25), 0.75 * soft + 0.25 * hard)
        assert torch.allclose(distillation_loss(logits, *sparse, labels, 1.0), hard)

    def test_refused(self, sparse):
        with pytest.raises(ValueError, match="needs the labels"):
            distillation_loss(torch.randn(6, 12), *sparse, hard_share=0.5)
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            distillation_loss(torch.randn(6, 12), *sparse, hard_share=1.5)
