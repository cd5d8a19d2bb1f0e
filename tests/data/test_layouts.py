"""Folders of splits, by the names and in the orders that data sets have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kornia_tinyvit.data import DetectionDataset, InstanceDataset, SegmentationDataset
from tests.conftest import shared
from tests.scenes import write_image, write_voc

OPENERS = {"masks": (SegmentationDataset, InstanceDataset), "labels": (DetectionDataset, InstanceDataset)}


def write(images: Path, labels: Path, name: str = "a") -> None:
    """Write an image and its labels."""
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(images / f"{name}.jpg")
    if "labels" in labels.parts:
        (labels / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    else:
        write_mask(labels / f"{name}.png")


def write_mask(path: Path, ids=(1, 2)) -> None:
    mask = np.zeros((20, 40), dtype=np.uint8)
    for number, each in enumerate(ids):
        mask[:, 10 * number : 10 * number + 8] = each
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


@pytest.mark.parametrize("kind", ["masks", "labels"])
class TestSplits:
    @pytest.mark.parametrize("order", ["{kind}/{split}", "{split}/{kind}"])
    @pytest.mark.parametrize("names", [("train", "val"), ("training", "validation"), ("train2017", "val2017")])
    def test_both_orders(self, tmp_path, kind, order, names):
        for split, name in zip(("train", "val"), names, strict=True):
            write(*(tmp_path / order.format(kind=each, split=name) for each in ("images", kind)), split)
        for split in ("train", "val"):
            for opener in OPENERS[kind]:
                data = opener.open(tmp_path, split)
                assert (len(data), Path(data.name(0)).name) == (1, f"{split}.jpg")
        for opener in OPENERS[kind]:
            with pytest.raises(ValueError, match=rf"has no split 'test'; expected one of {names[0]}, {names[1]}\."):
                opener.open(tmp_path, "test")

    def test_no_splits(self, tmp_path, kind):
        write(tmp_path / "images", tmp_path / kind)
        for opener in OPENERS[kind]:
            for split in ("train", "val"):
                assert "not divided into splits" in opener.open(tmp_path, split).summary
            with pytest.raises(ValueError, match="is not divided into splits; it has no split 'nonsense'"):
                opener.open(tmp_path, "nonsense")

    def test_files_that_are_no_images(self, tmp_path, kind):
        write(tmp_path / "images", tmp_path / kind)
        (tmp_path / "images" / "Thumbs.db").write_bytes(b"")
        (tmp_path / "images" / "b.jpg").symlink_to(tmp_path / "gone.jpg")
        for opener in OPENERS[kind]:
            data = opener.open(tmp_path)
            assert len(data) == 1
            assert "; skipped 1 dangling link, 1 hidden or system file; not divided" in data.summary

    def test_split_of_another_name(self, tmp_path, kind):
        write(tmp_path / "fold1" / "images", tmp_path / "fold1" / kind)
        assert [len(opener.open(tmp_path, "fold1")) for opener in OPENERS[kind]] == [1, 1]

    def test_neither(self, tmp_path, kind):
        (tmp_path / "photos").mkdir()
        for opener in OPENERS[kind]:
            with pytest.raises(
                (ValueError, FileNotFoundError), match=rf"Expected .*images/ and .*{kind}/.*SPLIT/images/"
            ):
                opener.open(tmp_path)


class TestClassesOfYolo:
    def test_names(self, tmp_path):
        write(tmp_path / "images", tmp_path / "labels")
        assert DetectionDataset.open(tmp_path).class_names == ("class 0",)
        (tmp_path / "labels" / "classes.txt").write_text("\ufeffcell\r\nother\r\n\r\n")
        data = DetectionDataset.open(tmp_path)
        assert data.class_names == ("cell", "other")
        assert data.summary == "1 image, 1 object, 2 classes; not divided into splits"

    def test_each_split_has_the_classes_of_all(self, tmp_path):
        for split in ("train", "val"):
            write(tmp_path / split / "images", tmp_path / split / "labels")
        (tmp_path / "val" / "labels" / "a.txt").write_text("4 0.5 0.5 0.5 0.5\n")
        (tmp_path / "val" / "labels" / "readme.txt").write_text("no labels")
        assert [DetectionDataset.open(tmp_path, split).num_classes for split in ("train", "val")] == [5, 5]
        (tmp_path / "val" / "labels" / "classes.txt").write_text("\n".join("abcde"))  # as LabelImg writes it
        assert [DetectionDataset.open(tmp_path, split).class_names[4] for split in ("train", "val")] == ["e", "e"]


class TestFilesOfCoco:
    @pytest.mark.parametrize("place", ["annotations/instances_{}2017.json", "{}/_annotations.coco.json"])
    @pytest.mark.parametrize("names", [("train", "val"), ("train", "valid")])
    def test_instances_and_boxes(self, tmp_path, place, names):
        for name in names:
            write_image(tmp_path / f"{name}2017" / f"{name}.jpg")
            write_image(tmp_path / name / f"{name}.jpg")
            annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16}
            path = tmp_path / place.format(name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({
                "images": [{"id": 1, "file_name": f"{name}.jpg", "width": 40, "height": 20}],
                "annotations": [annotation | {"segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}],
                "categories": [{"id": 1, "name": "cell"}],
            }))  # fmt: skip
        for split, name in zip(("train", "val"), names, strict=True):
            for opener in (InstanceDataset, DetectionDataset):
                for data in (opener.open(tmp_path, split), opener.open(tmp_path / place.format(name))):
                    assert (len(data), data.name(0), data.num_objects) == (1, f"{name}.jpg", 1)
            assert int(InstanceDataset.open(tmp_path, split)[0][1].sum()) == 16

    def test_names_with_backslashes(self, tmp_path):
        write_image(tmp_path / "sub" / "a.jpg")
        content = {
            "images": [{"id": 1, "file_name": "sub\\a.jpg", "width": 40, "height": 20}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
            "categories": [{"id": 1, "name": "cell"}],
        }
        (tmp_path / "coco.json").write_text("\ufeff" + json.dumps(content))
        assert DetectionDataset.open(tmp_path / "coco.json").name(0) == "sub/a.jpg"


class TestDescriptionsInFolders:
    def test_yaml(self, tmp_path):
        write(tmp_path / "photos", tmp_path / "labels")
        write(tmp_path / "photos", tmp_path / "classes")
        (tmp_path / "data.yaml").write_text("train: {images: .\\photos, masks: classes, instances: labels}\n")
        assert SegmentationDataset.open(tmp_path).ids == (0, 1, 2)
        assert len(InstanceDataset.open(tmp_path)[0][1]) == 1
        for opener in (SegmentationDataset, InstanceDataset):
            with pytest.raises(ValueError, match=r"data\.yaml has no split 'val'; expected one of train"):
                opener.open(tmp_path, "val")


class TestVoc:
    def test_masks(self, tmp_path):
        write_voc(tmp_path, {"a": ["cat 1 1 9 9"], "b": ["cat 1 1 9 9"]})
        for kind in ("SegmentationClass", "SegmentationObject"):
            write_mask(tmp_path / kind / "a.png", (1, 2, 255))
        for lists in ("Main", "Segmentation"):
            classes, objects = SegmentationDataset.open(tmp_path), InstanceDataset.open(tmp_path)
            assert [data.name(0) for data in (classes, objects)] == ["a.jpg", "a.jpg"]
            assert (classes.ids, classes.ignored, len(objects[0][1])) == ((0, 1, 2), (255,), 2)
            assert (objects.num_objects, objects.without_mask) == (2, ("b",) if lists == "Main" else ())
            (tmp_path / "ImageSets" / "Segmentation").mkdir(exist_ok=True)
            (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
        with pytest.raises(FileNotFoundError, match="has no split 'val'; expected one of train"):
            SegmentationDataset.open(tmp_path, "val")

    def test_boxes_without_lists(self, tmp_path):
        write_voc(tmp_path, {"a": ["cat 1 1 9 9"], "b": ["dog 1 1 9 9"]})
        (tmp_path / "ImageSets" / "Main" / "train.txt").unlink()
        data = DetectionDataset.open(tmp_path)
        assert (len(data), data.summary) == (2, "2 images, 2 objects, 2 classes; not divided into splits")

    def test_boxes_are_no_instances(self, tmp_path):
        write_voc(tmp_path, {"a": ["cat 1 1 9 9"]})
        with pytest.raises(ValueError, match="boxes of Pascal VOC, which are for --task detection"):
            InstanceDataset.open(tmp_path)

    def test_blood_cells(self):
        summary = DetectionDataset.open(shared("data/blood_cells"), "val").summary
        assert summary.startswith("87 images, ")
        assert summary.endswith(" objects, 3 classes")


class TestRealData:
    @pytest.mark.parametrize(("split", "count"), [("train", 200), ("val", 80)])
    def test_nuclei(self, split, count):
        data = InstanceDataset.open(shared("data/nuclei"), split)
        assert len(data) == count
        if split == "val":
            assert data.summary == "80 images, 4,038 objects"

    def test_camvid(self):
        data = SegmentationDataset.open(shared("data/camvid"), "val")
        assert (len(data), data.ids, data.summary) == (60, tuple(range(12)), "60 images, 12 classes, ignored ids 255")
