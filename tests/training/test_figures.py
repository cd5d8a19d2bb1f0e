"""Figures of predictions on held-out images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from kornia_tinyvit import MobileSAM, SemanticSegmenter, TinyViT
from kornia_tinyvit.data import ClassificationDataset, DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.training import DETECTION, PROMPTABLE, SEMANTIC, figures
from kornia_tinyvit.training.figures import save_predictions
from kornia_tinyvit.training.tasks.base import Task
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION
from tests.conftest import TINY
from tests.scenes import BOX_NAMES, CLASSES, NAMES, damage, make_boxes, make_images, make_instances, make_scenes
from tests.test_detection import make_detector

STEP = figures._TILE + figures._GAP


def open_task(kind, folder):
    """Return a task, a network in training mode and validation images."""
    torch.manual_seed(0)
    backbone = TINY | {"num_classes": 0, "img_size": 32, "window_sizes": (4, 4, 2, 1)}
    if kind == "classification":
        model = TinyViT(**TINY | {"num_classes": 3, "img_size": 32})
        model.class_names = CLASSES
        return CLASSIFICATION, model.train(), ClassificationDataset.open(make_images(folder, each=4))
    if kind == "semantic":
        segmenter = SemanticSegmenter(TinyViT(**backbone), num_classes=3, width=16, class_names=NAMES)
        return SEMANTIC, segmenter.train(), SegmentationDataset.open(make_scenes(folder, 3))
    if kind == "promptable":
        sam = MobileSAM(TinyViT(**TINY | {"mobile_sam": True}), 64)
        return PROMPTABLE, sam.train(), InstanceDataset.open(make_instances(folder, 3))
    images = DetectionDataset.open(make_boxes(folder, 3))
    detector = make_detector()
    detector.class_names = BOX_NAMES
    return DETECTION, detector.train(), images


@pytest.mark.parametrize(
    ("kind", "columns", "rows"),
    [("classification", 4, 2), ("semantic", 3, 3), ("promptable", 4, 3), ("detection", 3, 3)],
)
def test_tiles(kind, columns, rows, tmp_path, monkeypatch):
    """Each sample has its tiles side by side, and classifiers four samples per row."""
    task, network, images = open_task(kind, tmp_path / "data")
    drawn, draw = [], task.draw

    def record(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(type(task), "draw", lambda self, *args: record(*args))
    save_predictions(tmp_path / "figure.png", task, network, images)
    sheet = Image.open(tmp_path / "figure.png")
    assert sheet.width == figures._GAP + columns * STEP
    assert len(drawn) == min(8, len(images))
    height = figures._fit(drawn[0][0][0]).height + 2 * figures._LINE + figures._GAP
    assert rows * height <= sheet.height <= rows * height + 100
    for column, (image, _) in enumerate(drawn[0]):
        left = figures._GAP + column * STEP
        tile = figures._fit(image)
        assert sheet.crop((left, figures._GAP, left + tile.width, figures._GAP + tile.height)) == tile.convert("RGB")
    assert network.training
    save_predictions(tmp_path / "again.png", task, network, images)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "figure.png").read_bytes()


class TestTruth:
    def test_classification(self, tmp_path):
        task, network, _ = open_task("classification", tmp_path / "data")
        photo = Image.new("RGB", (40, 40))
        texts = [task.draw(network, photo, label)[0][1] for label in range(3)]
        assert sum(text.startswith("right: ") for text in texts) == 1
        assert all(f": {name}, predicted " in text for name, text in zip(CLASSES, texts, strict=True))

    def test_semantic(self, tmp_path):
        """Ignored pixels are black, and do not count."""
        task, network, images = open_task("semantic", tmp_path / "data")
        image, mask = images[0]
        predicted = network.predict(image)[0]
        mask = predicted.clone()
        mask[:5] = -100
        (_, truth, found) = task.draw(network, Image.new("RGB", mask.shape[::-1]), mask)
        assert truth[0].getpixel((0, 0)) == (0, 0, 0)
        assert "% of the pixels right" in found[1]
        assert task.legend(network) == NAMES

    def test_detection(self, tmp_path):
        task, network, images = open_task("detection", tmp_path / "data")
        image, objects = next(each for each in images if len(each[1].labels))
        photo = Image.new("RGB", (image.shape[2], image.shape[1]))
        _, truth, _ = task.draw(network, photo, objects)
        assert truth[1] == f"truth, {len(objects.labels)} object" + "s" * (len(objects.labels) != 1)
        assert truth[0].getbbox() is not None

    def test_promptable(self, tmp_path):
        task, network, _ = open_task("promptable", tmp_path / "data")
        photo = Image.new("RGB", (80, 60))
        assert task.draw(network, photo, torch.zeros(0, 60, 80, dtype=torch.bool)) == []
        masks = torch.zeros(60, 60, 80, dtype=torch.bool)
        for row in range(60):
            masks[row, row, : row + 1] = True
        texts = [text for _, text in task.draw(network, photo, masks)]
        assert texts[1] == "truth, 50 objects"
        assert texts[2].startswith("from boxes, mean IoU ")


def test_nothing_to_draw(tmp_path):
    images = ClassificationDataset.open(make_images(tmp_path / "data", each=2))
    save_predictions(tmp_path / "figure.png", Task(), None, images)
    assert not (tmp_path / "figure.png").exists()


def test_corrupt_images_are_left_out(tmp_path):
    task, network, images = open_task("classification", tmp_path / "data")
    for index in range(9):
        damage(tmp_path / "data" / images.name(index))
    save_predictions(tmp_path / "figure.png", task, network, images, count=12)
    with Image.open(tmp_path / "figure.png") as sheet:
        assert sheet.width == figures._GAP + 3 * STEP
