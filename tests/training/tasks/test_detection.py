"""Training detectors: augmentation, samples, loss, evaluation and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kornia_tinyvit.data import BrokenImageError, DetectionDataset, Objects, replay_loader
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.huggingface.rt_detr import from_rt_detr, network_of
from kornia_tinyvit.training import (
    DETECTION,
    BoxAugmentation,
    DetectionLoss,
    DetectionSamples,
    DetectorTraining,
    Recipe,
    evaluate,
    train,
)
from kornia_tinyvit.training.evaluation import create_evaluator
from kornia_tinyvit.training.tasks.base import evaluate_network
from kornia_tinyvit.training.tasks.detection import DetectionEvaluator
from tests.scenes import BOX_NAMES, damage, make_boxes, make_coco, write_boxes, write_coco
from tests.test_detection import make_detector
from tests.training.runs import Interrupted, Stopping, losses, metrics

RECIPE = Recipe(img_size=64, epochs=3, warmup_epochs=0, batch_size=2, base_lr=0.5, min_lr=0.05, weight_decay=1e-4,
                preset="detection", changes={"color_jitter": 0.1, "crop_scale": (0.8, 1.0)})  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_boxes(tmp_path / "data")


def objects_of(boxes, labels=None, crowds=None) -> Objects:
    count = len(boxes)
    return Objects(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.arange(count) if labels is None else torch.tensor(labels),
        torch.ones(count),
        torch.tensor(crowds or [False] * count, dtype=torch.bool),
    )


def augment(augmentation, image, objects, epoch=0, index=0) -> tuple:
    crop, target = augmentation(image, objects, epoch, index)
    return crop, target["boxes"], target["class_labels"]


class TestAugmentation:
    @pytest.mark.parametrize("size", [(60, 90), (300, 200)])
    def test_boxes_follow_the_image(self, size):
        height, width = size
        left, top, right, bottom = (round(width * 0.4), round(height * 0.35), round(width * 0.7), round(height * 0.6))
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, top:bottom, left:right] = 255
        augmentation = BoxAugmentation(64, crop_scale=(0.5, 1.0), color_jitter=0.0)
        seen = []
        for epoch in range(12):
            objects = objects_of([[left, top, right, bottom]], [2])
            crop, boxes, labels = augment(augmentation, image, objects, epoch)
            rows, columns = ((crop[0] > 127).any(dim).nonzero().flatten() for dim in (1, 0))
            if len(labels):
                assert labels.tolist() == [2]
                x, y, w, h = (64 * boxes[0]).tolist()
                edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert [x - w / 2, y - h / 2, x + w / 2, y + h / 2] == pytest.approx([int(e) for e in edges], abs=1.6)
                seen.append(x)
        assert len(seen) > 8
        assert max(seen) - min(seen) > 5  # crops and flips differ

    def test_flips_are_exact(self):
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        image[:, 10:20, 4:30] = 255
        augmentation = BoxAugmentation(64, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), color_jitter=0.0, flip=1.0)
        crop, boxes, _ = augment(augmentation, image, objects_of([[4, 10, 30, 20]]))
        assert (crop[0] > 127).any(0).nonzero().flatten()[[0, -1]].tolist() == [34, 59]
        assert (64 * boxes[0]).tolist() == pytest.approx([47, 15, 26, 10], abs=0.02)

    def test_it_depends_on_seed_epoch_and_index(self):
        image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
        objects = objects_of([[10, 10, 40, 30], [0, 0, 69, 49]])
        augmentation = BoxAugmentation(32, seed=3)
        first = augment(augmentation, image, objects, 2, 5)
        torch.rand(7)
        again = augment(BoxAugmentation(32, seed=3), image, objects, 2, 5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for epoch, index, seed in ((3, 5, 3), (2, 6, 3), (2, 5, 4)):
            other = BoxAugmentation(32, seed=seed)(image, objects, epoch, index)
            assert not torch.equal(first[0], other[0])

    def test_invisible_objects_are_dropped(self):
        augmentation = BoxAugmentation(64, crop_scale=(0.05, 0.06), flip=0.0, color_jitter=0.0)
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        corners = [[0, 0, 16, 16], [48, 0, 64, 16], [0, 48, 16, 64], [48, 48, 64, 64], [0, 0, 64, 64]]
        for epoch in range(10):
            _, boxes, labels = augment(augmentation, image, objects_of(corners), epoch)
            assert len(labels) < 3
            assert 4 not in labels  # a crop contains 6 % of it
            low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
            assert (low > -1e-6).all()
            assert (high < 1 + 1e-6).all()

    def test_crowds_and_no_objects(self):
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        augmentation = BoxAugmentation(64, crop_scale=(0.9, 1.0))
        objects = objects_of([[5, 5, 50, 50], [9, 9, 40, 40]], crowds=[True, False])
        _, boxes, labels = augment(augmentation, image, objects)
        assert (boxes.shape, labels.tolist()) == ((1, 4), [1])
        crop, boxes, labels = augment(augmentation, image, objects_of([]))
        assert (crop.shape, boxes.shape, labels.shape) == ((3, 64, 64), (0, 4), (0,))

    def test_presets(self):
        assert BoxAugmentation(64).describe()["kind"] == "boxes"
        with pytest.raises(ValueError, match="Boxes do not support policy, erasing; use the preset 'detection'"):
            BoxAugmentation(64, "finetune")


class TestSamples:
    def samples(self, folder, **options):
        return DetectionSamples(DetectionDataset.open(folder), BoxAugmentation(64), **options)

    def test_batches(self, folder):
        batch = self.samples(folder)[(0, 1)]
        assert (batch.images.shape, batch.images.dtype) == ((1, 3, 64, 64), torch.uint8)
        samples = self.samples(folder)
        batch = samples.__getitems__([(0, 0), (0, 1), (0, 2)])
        assert all(len(each["class_labels"]) == len(each["boxes"]) for each in batch.targets)
        assert len(batch.targets[0]["boxes"]) == 0
        images, objects = samples.inputs(batch, torch.device("cpu"))
        assert (images.shape, images.dtype) == ((3, 3, 64, 64), torch.float32)
        assert objects[1]["boxes"] is batch.targets[1]["boxes"]

    def test_corrupt_images(self, folder):
        damage(folder / "images" / "01.png")
        with pytest.raises(BrokenImageError, match=r"01\.png"):
            self.samples(folder)[(0, 1)]
        samples = self.samples(folder, on_broken="skip")
        batch = samples.__getitems__([(0, 1), (0, 2)])
        assert (batch.valid.tolist(), batch.broken) == ([0, 1], ("01.png",))
        images, objects = samples.inputs(batch, torch.device("cpu"))
        assert len(images) == len(objects) == 1
        torch.testing.assert_close(images[0], batch.images[1] / 255)
        images, _ = samples.inputs(samples[(0, 1)], torch.device("cpu"))
        assert len(images) == 1  # all are corrupt; the network is called nevertheless

    def test_workers(self, folder):
        keys = [[(0, 0), (0, 1)], [(1, 2), (1, 3)]]
        here, there = (list(replay_loader(self.samples(folder), keys, workers)) for workers in (0, 1))
        for one, other in zip(here, there, strict=True):
            assert torch.equal(one.images, other.images)
            for first, second in zip(one.targets, other.targets, strict=True):
                assert all(torch.equal(first[name], second[name]) for name in ("boxes", "class_labels"))


class TestLoss:
    def step(self, objects, **changes):
        torch.manual_seed(0)
        training = DetectorTraining(make_detector().train(), **{"num_denoising": 6} | changes).train()
        images = torch.rand(len(objects), 3, 64, 64, generator=torch.Generator().manual_seed(0))
        inputs = (images, objects)
        loss = DetectionLoss(training)
        batch = type("Batch", (), {"valid": torch.ones(len(objects))})
        losses = loss(training(inputs), inputs, batch)
        return training, losses

    def targets(self, *counts):
        return [{"boxes": torch.full((count, 4), 0.4), "class_labels": torch.arange(count) % 3} for count in counts]

    def test_it_equals_transformers(self):
        objects = self.targets(2, 1)
        _, losses = self.step(objects)
        torch.manual_seed(0)
        fresh = DetectorTraining(make_detector().train(), num_denoising=6).train()
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        pixels = (images - fresh.mean.view(3, 1, 1)) / fresh.std.view(3, 1, 1)
        assert losses.shape == (2,)
        expected = fresh.rt_detr(pixels, labels=objects).loss
        assert losses.tolist() == pytest.approx([expected.item()] * 2, rel=1e-4)

    @pytest.mark.parametrize("counts", [(2, 0), (0, 0), (30, 1)])
    def test_any_number_of_objects(self, counts):
        """No objects, or more than queries; all trained weights have gradients."""
        training, losses = self.step(self.targets(*counts))
        assert losses.isfinite().all()
        losses.mean().backward()
        unused = [name for name, each in training.named_parameters() if each.requires_grad and each.grad is None]
        assert unused == []
        assert all(each.grad.isfinite().all() for each in training.parameters() if each.grad is not None)

    def test_without_denoising(self):
        training, losses = self.step(self.targets(1, 0), num_denoising=0)
        losses.mean().backward()
        again = from_rt_detr(training.rt_detr)
        assert again.decoder.denoising_class_embed.weight.shape == (4, 16)

    def test_describe(self):
        training, _ = self.step(self.targets(1))
        assert DetectionLoss(training).describe() == {
            "kind": "boxes", "weight_loss_vfl": 1.0, "weight_loss_bbox": 5.0, "weight_loss_giou": 2.0,
            "num_denoising": 6,
        }  # fmt: skip


class TestDetectorTraining:
    def test_evaluation_mode_equals_the_detector(self):
        detector = make_detector()
        training = DetectorTraining(detector).eval()
        images = torch.rand(2, 3, 64, 64)
        with torch.inference_mode():
            torch.testing.assert_close(training(images), detector(images), atol=1e-5, rtol=1e-4)

    def test_parameter_groups(self):
        training = DetectorTraining(make_detector())
        groups = training.parameter_groups(1e-3, 0.1, layer_decay=0.5)
        trained = [each for each in training.parameters() if each.requires_grad]
        assert sorted(id(each) for group in groups for each in group["params"]) == sorted(map(id, trained))
        assert all(each.ndim > 1 for group in groups if group["weight_decay"] for each in group["params"])
        assert min(group["lr"] for group in groups) == pytest.approx(1e-3 * 0.5**4)

    @pytest.mark.parametrize("use_checkpoint", [False, True])
    def test_gradient_checkpointing(self, use_checkpoint):
        backbone = make_detector().config.backbone.replace(use_checkpoint=use_checkpoint)
        training = DetectorTraining(make_detector(backbone=backbone)).train()
        seen = []
        network = network_of(training.rt_detr)
        network.layers[2].blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
        logits, _ = training(torch.rand(1, 3, 64, 64))
        logits.sum().backward()
        assert len(seen) == 1 + use_checkpoint  # once more in the backward pass


def fit(folder, out, recipe=RECIPE, stop_at=0, on_broken="stop", **options):
    torch.manual_seed(0)
    model = DetectorTraining(
        TinyViTDetector.from_config(make_detector().config, class_names=BOX_NAMES), num_denoising=6
    )
    augmentation = BoxAugmentation(recipe.img_size, recipe.preset, 1, **recipe.changes)
    samples = DetectionSamples(DetectionDataset.open(folder), augmentation, on_broken)
    options = {"cpu": True, "log_every": 1, "class_names": BOX_NAMES, "task": DETECTION} | options
    return train(model, samples, Stopping(DetectionLoss(model), stop_at), recipe, out, **options)


class TestTraining:
    @pytest.mark.slow
    def test_it_learns(self, folder, tmp_path):
        recipe = replace(RECIPE, epochs=3, ema_decay=0.5)
        data = make_boxes(tmp_path / "more", 24)
        result = fit(data, tmp_path / "out", recipe, validation=DetectionDataset.open(folder), validate_every=3)
        curve = losses(tmp_path / "out")
        assert np.mean(curve[-9:]) < 0.9 * np.mean(curve[:9])
        assert result.metric == "map"
        kept = TinyViTDetector.from_config(pretrained=result.best)
        assert (kept.class_names, kept.training) == (BOX_NAMES, False)
        scores = evaluate(kept, DetectionDataset.open(folder), batch_size=4)
        assert scores.map == pytest.approx(result.score, abs=1e-3)
        logged = metrics(tmp_path / "out")[-1]
        assert {"map50", "best_f1", "threshold"} < logged.keys()
        assert DETECTION.report(scores) == pytest.approx({name: logged[name] for name in DETECTION.metrics}, abs=1e-3)

    @pytest.mark.slow
    def test_resuming(self, folder, tmp_path):
        fit(folder, tmp_path / "whole")
        with pytest.raises(Interrupted):
            fit(folder, tmp_path / "parts", stop_at=5)
        fit(folder, tmp_path / "parts")
        first, second = (
            TinyViTDetector.from_config(pretrained=tmp_path / each / "last.safetensors").state_dict()
            for each in ("whole", "parts")
        )
        assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6) for name in first)

    def test_corrupt_images(self, folder, tmp_path):
        damage(folder / "images" / "04.png")
        with pytest.raises(BrokenImageError, match=r"04\.png"):
            fit(folder, tmp_path / "out")
        result = fit(folder, tmp_path / "out", on_broken="skip", validation=DetectionDataset.open(folder))
        assert result.broken == ("04.png", "validation: 04.png")
        assert result.score is not None

    def test_other_classes(self, folder, tmp_path):
        other = make_boxes(tmp_path / "other")
        (other / "data.yaml").write_text("train: images\nnames: [disc, box, star]\n")
        images = DetectionDataset.open(other)
        assert (
            DETECTION.match(images, make_detector().config, BOX_NAMES).class_names == BOX_NAMES
        )  # no object is a star
        with pytest.raises(ValueError, match="3 classes, but the network has 2"):
            DETECTION.match(images, replace(make_detector().config, num_classes=2), None)
        (other / "data.yaml").write_text("train: images\nnames: [disc, star, box]\n")
        with pytest.raises(ValueError, match=r"The data has the classes star, but the network has disc, box, none"):
            fit(folder, tmp_path / "out", validation=DetectionDataset.open(other))

    def test_classes_in_another_order(self, folder):
        """They are matched by name."""
        detector = TinyViTDetector.from_config(make_detector().config, class_names=BOX_NAMES).eval()
        wanted = create_evaluator(detector, DetectionDataset.open(folder))[1].counts.images
        for file in (folder / "labels").iterdir():
            lines = [line.split() for line in file.read_text().splitlines()]
            file.write_text("\n".join(" ".join([str(1 - int(label)), *box]) for label, *box in lines))
        (folder / "data.yaml").write_text("train: images\nnames: [box, disc]\n")
        found = create_evaluator(detector, DetectionDataset.open(folder))[1].counts.images
        assert found.class_names == BOX_NAMES
        for (_, one), (_, two) in zip(wanted, found, strict=True):
            assert one.labels.tolist() == two.labels.tolist()

    def test_only_crowds(self, tmp_path):
        content = make_coco()
        content["annotations"] = content["annotations"][1:]
        path = write_coco(tmp_path / "data", content)
        summary = "2 images, 0 objects, 2 classes, 1 crowd or difficult object ignored"
        assert DetectionDataset.open(path).summary.startswith(summary)
        with pytest.raises(ValueError, match=r"None of 2 images has an object, .*1 crowd or difficult object"):
            fit(path, tmp_path / "out")


class TestEvaluator:
    def test_ranks_without_images(self, folder):
        detector, images = make_detector(), DetectionDataset.open(folder)
        evaluator = DetectionEvaluator(images, detector.config, device=torch.device("cpu"), batch_size=2)
        evaluator.update(detector, [])
        assert not evaluator.counts.state().any()

    def test_batches_of_mixed_sizes(self, folder):
        write_boxes(folder, "06", 1, 90, 100)
        detector, images = make_detector(), DetectionDataset.open(folder)
        found = []
        for size in (1, 5):
            evaluator = DetectionEvaluator(images, detector.config, device=torch.device("cpu"), batch_size=size)
            evaluate_network(detector, evaluator)
            found.append(evaluator.counts.state())
        assert found[0].reshape(-1)[:14].view(7, 2)[-1].tolist() == [90, 100]
        torch.testing.assert_close(*found, atol=1e-2, rtol=1e-4)
        (objects,) = detector.predict(images[6][0], 0.0)
        rows = found[0][14:].view(7, 100, 6)[6]
        assert rows[:10, 1].tolist() == pytest.approx([each.score for each in objects], abs=1e-5)
