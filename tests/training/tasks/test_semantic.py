"""Training segmenters: augmentation, samples, loss, evaluation and resuming."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kornia_tinyvit import TinyViT
from kornia_tinyvit.data import IGNORED, BrokenImageError, SegmentationDataset, replay_loader
from kornia_tinyvit.data.paired import PairedBatch
from kornia_tinyvit.preprocessing import Preprocessing
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training import (
    SEMANTIC,
    MaskAugmentation,
    Recipe,
    SegmentationLoss,
    SegmentationSamples,
    balanced_weights,
    evaluate,
    find_recipe,
    freeze_statistics,
    train,
)
from tests.conftest import TINY
from tests.scenes import NAMES, damage, make_scenes
from tests.training.runs import Interrupted, Stopping, losses, metrics

RECIPE = Recipe(img_size=32, epochs=3, warmup_epochs=0, batch_size=2, base_lr=0.5, min_lr=0.05, preset="semantic",
                changes={"color_jitter": 0.1})  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_scenes(tmp_path / "data")


def make_segmenter(**changes) -> SemanticSegmenter:
    torch.manual_seed(0)
    config = TINY | {"num_classes": 0, "img_size": 32, "window_sizes": (4, 4, 2, 1)} | changes
    return SemanticSegmenter(TinyViT(**config), num_classes=3, width=16, dropout=0.0, class_names=NAMES)


def fit(folder, out, recipe=RECIPE, stop_at=0, on_broken="stop", model=None, **options):
    samples = SegmentationSamples(
        SegmentationDataset.open(folder),
        MaskAugmentation(recipe.img_size, recipe.preset, 1, **recipe.changes),
        on_broken,
    )
    options = {"cpu": True, "log_every": 1, "class_names": NAMES, "task": SEMANTIC} | options
    return train(model or make_segmenter(), samples, Stopping(SegmentationLoss(), stop_at), recipe, out, **options)


def assert_same_run(out, other):
    one, two = ([{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in metrics(each)]
                for each in (out, other))  # fmt: skip
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-6)
    first, second = (
        SemanticSegmenter.from_config(pretrained=each / "last.safetensors").state_dict() for each in (out, other)
    )
    assert all(torch.allclose(first[key], second[key], rtol=1e-5, atol=1e-7) for key in first)


class TestAugmentation:
    def scene(self):
        """Return an image whose brightness encodes the class of each pixel, and its mask."""
        y, x = torch.meshgrid(torch.arange(50), torch.arange(70), indexing="ij")
        mask = (x > 30).long() + (y > 28).long() * 2
        return (mask * 60 + 30).to(torch.uint8).expand(3, 50, 70), mask

    @pytest.mark.parametrize("size", [24, 32, 64])
    def test_masks_follow_images(self, size):
        image, mask = self.scene()
        augment = MaskAugmentation(size, seed=3, color_jitter=0.0)
        seen = set()
        for index in range(40):
            crop, moved = augment(image, mask, 0, index)
            assert (crop.shape, moved.shape) == ((3, size, size), (size, size))
            encoded = ((crop[0].float() - 30) / 60).round().long()
            assert (encoded == moved).float().mean() > 1 - 2.5 / size  # except at interpolated edges
            seen.add(bool(moved[:, 0].float().mean() > moved[:, -1].float().mean()))
        assert len(seen) == 2  # some are flipped

    @pytest.mark.parametrize("flip", [0.0, 1.0])
    def test_flip(self, flip):
        image, mask = self.scene()
        augment = MaskAugmentation(50, crop_scale=(0.7, 1.0), color_jitter=0.0, flip=flip)
        for index in range(10):
            crop, moved = augment(image, mask, 0, index)
            left, right = (moved[0, column] < moved[0, -1 - column] for column in (0, -1))
            assert (bool(left), bool(right)) == ((False, True) if flip else (True, False))
            assert bool(crop[0, 0, 0] < crop[0, 0, -1]) == (not flip)

    def test_masks_are_not_interpolated(self):
        mask = torch.randint(0, 2, (300, 400)) * 254 - 100  # -100 and 154
        augment = MaskAugmentation(40)
        for index in range(5):
            moved = augment(torch.zeros(3, 300, 400, dtype=torch.uint8), mask, 0, index)[1]
            assert set(moved.unique().tolist()) == {-100, 154}

    def test_color_jitter_leaves_masks_unchanged(self):
        image, mask = self.scene()
        plain, colored = (MaskAugmentation(40, seed=2, color_jitter=each) for each in (0.0, 0.5))
        (one, first), (other, second) = (each(image, mask, 1, 4) for each in (plain, colored))
        assert torch.equal(first, second)
        assert (one.float() - other.float()).abs().mean() > 5

    def test_replayed(self):
        image, mask = self.scene()
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = MaskAugmentation(32, seed=1)(image, mask, 3, 7)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        augment = MaskAugmentation(32, seed=1)
        augment(image, mask, 0, 0)
        assert all(torch.equal(*pair) for pair in zip(first, augment(image, mask, 3, 7), strict=True))
        for other in (augment(image, mask, 4, 7), augment(image, mask, 3, 8),
                      MaskAugmentation(32, seed=2)(image, mask, 3, 7)):  # fmt: skip
            assert not torch.equal(first[0], other[0])

    @pytest.mark.parametrize("preset", ["in1k", "small"])
    def test_unsupported_presets(self, preset):
        with pytest.raises(ValueError, match=r"Masks do not support .*erasing"):
            MaskAugmentation(32, preset)

    def test_preset_of_the_recipe(self):
        recipe = find_recipe("semantic")
        described = MaskAugmentation(recipe.img_size, recipe.preset, **recipe.changes).describe()
        assert json.loads(json.dumps(described))["crop_scale"] == [0.25, 1.0]


class TestSamples:
    def test_workers(self, folder):
        samples = SegmentationSamples(SegmentationDataset.open(folder), MaskAugmentation(32))
        keys = [[(0, 1), (0, 2)], [(1, 0), (1, 5)]]
        alone, helped = (list(replay_loader(samples, keys, workers)) for workers in (0, 1))
        for one, other in zip(alone, helped, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.targets, other.targets)
        assert torch.equal(samples[0, 2].images[0], alone[0].images[1])
        inputs = samples.inputs(alone[0], torch.device("cpu"))
        assert (inputs.dtype, inputs.shape, bool(inputs.max() <= 1)) == (torch.float32, (2, 3, 32, 32), True)

    def test_corrupt_images(self, folder):
        damage(folder / "masks" / "02.png")
        images = SegmentationDataset.open(folder)
        with pytest.raises(BrokenImageError, match=r"02\.png"):
            SegmentationSamples(images, MaskAugmentation(32))[0, 2]
        batch = SegmentationSamples(images, MaskAugmentation(32), "skip").__getitems__([(0, 2), (0, 3)])
        assert (batch.valid.tolist(), batch.broken) == ([0, 1], ("02.png",))
        assert (batch.targets[0] == IGNORED).all()

    def test_on_broken(self, folder):
        with pytest.raises(ValueError, match="'stop' or 'skip'"):
            SegmentationSamples(SegmentationDataset.open(folder), MaskAugmentation(32), "ignore")


class TestSegmentationLoss:
    def batch(self, masks):
        return PairedBatch(torch.zeros(0), masks, torch.ones(len(masks)), ())

    def test_ignored_pixels_do_not_count(self):
        masks = torch.randint(0, 3, (2, 4, 5))
        masks[0, :2] = IGNORED
        logits = torch.randn(2, 3, 4, 5, requires_grad=True)
        found = SegmentationLoss()(logits, logits, self.batch(masks))
        wanted = [F.cross_entropy(logits[:1, :, 2:], masks[:1, 2:]), F.cross_entropy(logits[1:], masks[1:])]
        assert torch.allclose(found, torch.stack(wanted))
        found.sum().backward()
        assert not logits.grad[0, :, :2].any()
        assert logits.grad[0, :, 2:].all()

    def test_no_labeled_pixels(self):
        logits = torch.randn(1, 3, 4, 5, requires_grad=True)
        loss = SegmentationLoss()(logits, logits, self.batch(torch.full((1, 4, 5), IGNORED)))
        loss.sum().backward()
        assert (loss.tolist(), bool(logits.grad.any())) == ([0], False)

    def test_smoothing(self):
        logits, masks = torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)
        found = SegmentationLoss(0.3)(logits, logits, self.batch(masks))
        assert found.item() == pytest.approx(F.cross_entropy(logits, masks, label_smoothing=0.3).item(), rel=1e-5)

    def test_weights(self):
        logits, masks = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
        masks[0, 0] = IGNORED
        weights = torch.tensor([1.0, 4.0, 0.5])
        found = SegmentationLoss(class_weights=weights)(logits, logits, self.batch(masks))
        assert found.item() == pytest.approx(F.cross_entropy(logits, masks, weights).item(), rel=1e-5)

    def test_balanced_weights(self, folder):
        images = SegmentationDataset.open(folder)
        counts = torch.stack([mask[mask >= 0].bincount(minlength=3) for _, mask in images]).double()
        frequency = counts.sum(0) / counts.sum()  # all images show all classes
        found = balanced_weights(images, 1.0)
        assert (found.double() * frequency).tolist() == pytest.approx([frequency.median().item()] * 3)
        assert torch.allclose(balanced_weights(images), found.sqrt())
        assert balanced_weights(SegmentationDataset.open(folder, classes=(*NAMES, "none")))[3] == 1


class TestTraining:
    @pytest.mark.slow
    def test_it_learns(self, tmp_path):
        data = make_scenes(tmp_path / "data", 2)
        for copied in range(2, 40):  # fewer epochs, each of which saves a state
            for kind in ("images", "masks"):
                shutil.copy(data / kind / f"{copied % 2:02}.png", data / kind / f"{copied:02}.png")
        recipe = replace(
            RECIPE, epochs=4, base_lr=1.5, img_size=64, changes={"crop_scale": (0.8, 1.0), "color_jitter": 0.0}
        )
        model = make_segmenter(img_size=64, window_sizes=(4, 8, 4, 2))
        images = SegmentationDataset.open(data).sample(4)
        before = evaluate(model, images)
        result = fit(data, tmp_path / "out", recipe, model=model, log_every=50)
        found = evaluate(SemanticSegmenter.from_config(pretrained=result.best), images)
        assert before.mean_iou < 50
        assert found.mean_iou > 95
        assert found.pixel_accuracy > 98
        assert result.score is result.top1 is None

    def test_validation(self, folder, tmp_path):
        validation = SegmentationDataset.open(make_scenes(tmp_path / "val", 3, seed=20))
        result = fit(folder, tmp_path / "out", validation=validation, validate_every=2)
        lines = [line for line in metrics(tmp_path / "out") if "broken" in line]
        assert ["mean_iou" in line for line in lines] == [False, True, True]
        best = max(line.get("mean_iou", 0) for line in lines)
        assert result.to_dict()["mean_iou"] == result.score == best
        assert "top1" not in result.to_dict()
        kept = SemanticSegmenter.from_config(pretrained=result.best)
        assert (kept.class_names, kept.training) == (NAMES, False)
        found = evaluate(kept, validation)
        assert found.mean_iou == pytest.approx(best, abs=1e-3)
        line = next(line for line in lines if line.get("mean_iou") == best)
        assert line["pixel_accuracy"] == pytest.approx(found.pixel_accuracy, abs=1e-3)

    @pytest.mark.parametrize("call", [2, 4, 6])
    def test_resuming(self, folder, tmp_path, call):
        recipe = replace(RECIPE, ema_decay=0.9, epochs=2)
        changes = {"drop_path_rate": 0.3}
        fit(folder, tmp_path / "undisturbed", recipe, model=make_segmenter(**changes))
        out = tmp_path / "out"
        with pytest.raises(Interrupted):
            fit(folder, out, recipe, call, model=make_segmenter(**changes), save_minutes=0)
        fit(folder, out, recipe, model=make_segmenter(**changes))
        assert_same_run(out, tmp_path / "undisturbed")

    def test_accumulation_equals_the_large_batch(self, folder, tmp_path):
        recipe = replace(RECIPE, batch_size=4)
        for size in (4, 2):
            model = make_segmenter()
            freeze_statistics(model)  # those of the decoder as well
            fit(folder, tmp_path / str(size), recipe, model=model, process_batch=size)
        one, two = (losses(tmp_path / size) for size in ("4", "2"))
        assert one == pytest.approx(two, rel=1e-4)

    def test_corrupt_images(self, folder, tmp_path):
        damage(folder / "masks" / "02.png")
        with pytest.raises(BrokenImageError, match=r"02\.png"):
            fit(folder, tmp_path / "stopped")
        val = make_scenes(tmp_path / "val", 2, seed=20)
        damage(val / "images" / "01.png")
        result = fit(folder, tmp_path / "out", on_broken="skip", validation=SegmentationDataset.open(val))
        assert result.broken == ("02.png", "validation: 01.png")

    def test_errors(self, folder, tmp_path):
        other = make_scenes(tmp_path / "val", 1)
        (other / "classes.txt").write_text("ground\ndisc\ncube")
        with pytest.raises(ValueError, match=r"The data has the classes cube, but the network has ground, disc, box"):
            fit(folder, tmp_path / "out", validation=SegmentationDataset.open(other))
        four = SegmentationDataset.open(other, classes=(*NAMES, "more"))
        with pytest.raises(ValueError, match="4 classes, but the network has 3"):
            fit(folder, tmp_path / "out", validation=four, class_names=None)
        with pytest.raises(ValueError, match="The data has the classes cube"):
            evaluate(make_segmenter(), SegmentationDataset.open(other))
        with pytest.raises(ValueError, match="validate_every"):
            fit(folder, tmp_path / "out", validate_every=0)
        fit(folder, tmp_path / "out")
        with pytest.raises(ValueError, match=r"augmentation\.flip"):
            fit(folder, tmp_path / "out", replace(RECIPE, changes={"color_jitter": 0.1, "flip": 0.1}))


def test_files_keep_the_preprocessing(tmp_path):
    """A trained segmenter is saved with the preprocessing of its initial weights."""
    segmenter = SemanticSegmenter(TinyViT(**TINY | {"num_classes": 0}), num_classes=3, width=8)
    segmenter.backbone.preprocessing = Preprocessing(64, mean=(0.5,) * 3, std=(0.25,) * 3)
    preprocessing = SEMANTIC.preprocessing(segmenter, None)
    restored = SEMANTIC.restore(segmenter.config, segmenter.state_dict(), None, preprocessing)
    SEMANTIC.save(restored, tmp_path / "trained.safetensors")
    again = SemanticSegmenter.from_config(pretrained=tmp_path / "trained.safetensors")
    assert again.mean.tolist() == [0.5] * 3
