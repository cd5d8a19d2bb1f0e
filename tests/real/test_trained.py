"""Evaluation of the networks of all tasks on a few images of real data sets, with random weights."""

import argparse

import pytest

from kornia_tinyvit import TinyViTDetector
from kornia_tinyvit.data import DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training import evaluate
from tests.conftest import shared


def test_blood_cells():
    images = DetectionDataset.open(shared("data/blood_cells"), "test")
    assert (len(images), images.class_names) == (72, ("Platelets", "RBC", "WBC"))
    images = images.sample(2)
    detector = TinyViTDetector.from_config("1m", class_names=images.class_names, img_size=64, num_queries=20)
    scores = evaluate(detector, images)
    assert (scores.images, len(scores.per_class)) == (2, 3)
    assert scores.objects == sum(len(boxes.labels) for _, boxes in images)


def test_camvid(benchmark_scripts, tmp_path):
    import real_trained

    description = real_trained.describe_camvid(argparse.Namespace(cache=tmp_path, data=shared("data/camvid")))
    images = SegmentationDataset.open(description, "val")
    assert (len(images), list(images.class_names)) == (60, real_trained.STREET)
    images = images.sample(2)
    segmenter = SemanticSegmenter.from_config("1m", class_names=images.class_names, img_size=64, width=16)
    scores = evaluate(segmenter, images)
    assert scores.confusion.shape == (11, 11)
    assert 0 < scores.pixels == sum(int((labels >= 0).sum() - (labels == 255).sum()) for _, labels in images)


def test_held_out_images_are_not_trained_on(benchmark_scripts):
    import real_trained

    for training, held_out in real_trained.list_splits(shared("data/camvid").parent).values():
        assert len(training) > len(held_out) > 0
        assert not {path.name for path in training} & {path.name for path in held_out}


@pytest.mark.slow
def test_nuclei(sam):
    """Published weights at 1024: nuclei in boxes are found."""
    images = InstanceDataset.open(shared("data/nuclei"), "val").sample(1)
    scores = evaluate(sam, images)
    assert scores.instances == len(images[0][1])
    assert scores.box_iou > 70
