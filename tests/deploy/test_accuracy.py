import copy
import math

import pytest
import torch

from kornia_tinyvit.deploy.accuracy import Agreement, MaskComparison, compare


@pytest.fixture
def logits():
    """Logits of five images of four classes."""
    return torch.tensor(
        [[3.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0], [2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]]
    )


def as_images(logits):
    return logits.view(-1, 4, 1, 1)


def read(images):
    return images.flatten(1)


def swap_last(images):
    """Swap the two largest logits of the last image of a batch."""
    output = images.flatten(1).clone()
    output[-1, 2:] = output[-1, 2:].flip(0)
    return output


class TestCompare:
    def test_equal(self, logits):
        labels = torch.tensor([0, 1, 2, 1, 3])
        assert compare(read, read, [(as_images(logits), labels)]) == Agreement(5, 80.0, 80.0, 100.0, 0.0, 0.0)

    @pytest.mark.parametrize("sizes", [[5], [2, 2, 1], [1, 4]])
    def test_counts_over_batches(self, logits, sizes):
        labels = torch.tensor([0, 1, 2, 1, 3])
        batches = list(zip(as_images(logits).split(sizes), labels.split(sizes), strict=True))
        result = compare(read, lambda images: read(images) * 1.5, batches)
        assert result == Agreement(5, 80.0, 80.0, 100.0, pytest.approx(0.5), pytest.approx(0.5))

    def test_wrong_class(self, logits):
        result = compare(read, swap_last, [(as_images(logits), torch.tensor([0, 1, 2, 0, 3]))])
        assert (result.top1_reference, result.top1_candidate, result.agreement) == (100.0, 80.0, 80.0)
        assert result.max_error == pytest.approx(math.sqrt(2 / 5))
        assert result.mean_error == pytest.approx(math.sqrt(2 / 5) / 5)

    def test_without_labels(self, logits):
        result = compare(read, swap_last, [as_images(logits)])
        assert (result.top1_reference, result.top1_candidate, result.agreement) == (None, None, 80.0)

    def test_low_precision(self, logits):
        result = compare(read, lambda images: read(images + 0.3).bfloat16() - 0.3, [as_images(logits)])
        assert 0 < result.mean_error < 1e-2
        assert result.agreement == 100.0

    def test_feature_maps(self):
        images = torch.rand(3, 2, 8, 8)
        labeled = [(images, torch.zeros(3, dtype=torch.long))]
        several = compare(lambda x: [x, x[:, :, ::2]], lambda x: [x, 1.1 * x[:, :, ::2]], labeled)
        assert several.agreement is several.top1_reference is several.top1_candidate is None
        assert several.max_error == pytest.approx(0.1)
        assert several.mean_error == pytest.approx(0.05)
        single = compare(lambda x: x, lambda x: -x, labeled)
        assert (single.agreement, single.mean_error) == (None, pytest.approx(2.0))

    def test_broken_candidate(self, logits):
        broken = compare(read, lambda images: read(images) * math.nan, [as_images(logits)])
        assert math.isnan(broken.max_error)
        zero = compare(lambda x: 0 * read(x), read, [as_images(logits)])
        assert zero.max_error == math.inf
        assert compare(lambda x: 0 * read(x), lambda x: 0 * read(x), [as_images(logits)]).max_error == 0

    def test_no_gradients(self):
        network = torch.nn.Linear(4, 4)
        seen = []
        compare(lambda x: seen.append(network(x.flatten(1))) or seen[-1], read, [torch.rand(2, 4, 1, 1)])
        assert not seen[0].requires_grad

    def test_errors(self, logits):
        images = as_images(logits)
        with pytest.raises(ValueError, match="no images"):
            compare(read, read, [])
        with pytest.raises(ValueError, match=r"expected \(5, 4\); got \(5, 3\)"):
            compare(read, lambda x: read(x)[:, :3], [images])
        with pytest.raises(ValueError, match="differ in shape"):
            compare(lambda x: [x, x], lambda x: [x], [images])
        with pytest.raises(ValueError, match="Only 5 of 10"):
            compare(read, read, [(images, torch.zeros(5, dtype=torch.long)), images])


class TestMasks:
    def test_same_network(self, sam, photos):
        found = compare(sam, sam, photos)
        assert (found.images, found.mask_iou, found.min_mask_iou, found.max_error) == (2, 100, 100, 0)
        assert (found.agreement, found.top1_reference) == (None, None)

    def test_changed_encoder(self, sam, photos):
        """The masks that both predict for the same points and boxes."""
        other = copy.deepcopy(sam)
        with torch.no_grad():
            other.image_encoder.neck[2].weight.mul_(1.2)
            other.image_encoder.neck[0].weight[:32] = 0
        found = MaskComparison(sam, photos, points_per_side=2)(other)
        ious, errors = [], []
        for photo in photos:
            height, width = photo.shape[1:]
            points = torch.tensor([[x * width, y * height] for x in (0.25, 0.75) for y in (0.25, 0.75)])[:, None]
            embeddings = sam.embed(photo), other.embed(photo)
            (three,) = sam.predict_masks(embeddings[0], points)
            (others,) = other.predict_masks(embeddings[1], points)
            chosen = three.scores.argmax(1)
            for number, best in enumerate(chosen):
                mask, changed = three.masks()[number, best], others.masks()[number, best]
                if mask.any():
                    rows, columns = mask.nonzero().unbind(1)
                    box = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
                    prompts = {"boxes": torch.tensor(box).float(), "multimask_output": False}
                    first = sam.predict_masks(embeddings[0], **prompts)[0].masks()[0, 0]
                    second = other.predict_masks(embeddings[1], **prompts)[0].masks()[0, 0]
                    ious.append((mask & changed).sum() / (mask | changed).sum())
                    ious += [(first & second).sum() / (first | second).sum()] if first.any() else []
            difference = embeddings[0].features - embeddings[1].features
            errors.append(difference.norm() / embeddings[0].features.norm())
        assert found.mask_iou == pytest.approx(100 * float(torch.stack(ious).mean()), abs=1e-4)
        assert found.min_mask_iou == pytest.approx(100 * float(torch.stack(ious).min()), abs=1e-4)
        assert 0 < found.min_mask_iou < found.mask_iou < 100
        assert found.max_error == pytest.approx(float(torch.stack(errors).max()), rel=1e-4)

    def test_errors(self, sam, photos):
        with pytest.raises(ValueError, match="no images to compare"):
            compare(sam, sam, [])
        nothing = copy.deepcopy(sam)
        nothing.mask_threshold = 1e6
        with pytest.raises(ValueError, match="The reference finds no mask"):
            compare(nothing, sam, photos)
