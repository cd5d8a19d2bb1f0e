"""Images with boxes in the formats of YOLO, COCO and Pascal VOC."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from kornia_tinyvit.data import BrokenImageError, DetectionDataset
from tests.conftest import shared
from tests.scenes import ANIMALS, make_coco, write_coco, write_image, write_voc, write_yolo


class TestYolo:
    def test_items(self, tmp_path):
        data = DetectionDataset.open(write_yolo(tmp_path, {"a": "1 0.5 0.5 0.25 0.5\n0 0.1 0.5 0.1 0.2\n\n", "b": ""}))
        assert (len(data), data.class_names, data.num_classes, data.left_out) == (2, ANIMALS, 3, ())
        image, objects = data[0]
        assert (image.shape, image.dtype) == ((3, 20, 40), torch.float32)
        assert objects.boxes.tolist() == [[15, 5, 25, 15], pytest.approx([2, 8, 6, 12], abs=1e-5)]
        assert (objects.labels.tolist(), objects.crowds.tolist()) == ([1, 0], [False, False])
        assert objects.areas.tolist() == pytest.approx([100, 16])
        assert data.read(0)[0].dtype == torch.uint8
        assert [len(each) for each in data] == [2, 2]  # iteration terminates

    def test_images_without_objects(self, tmp_path):
        data = DetectionDataset.open(write_yolo(tmp_path, {"a": "1 0.5 0.5 0.25 0.5", "b": "", "c": None}))
        for index in (1, 2):
            objects = data[index][1]
            assert objects.boxes.shape == (0, 4)
            assert (objects.labels.dtype, len(objects.labels)) == (torch.int64, 0)

    def test_boxes_are_clipped(self, tmp_path):
        data = DetectionDataset.open(write_yolo(tmp_path, {"a": "0 0.1 0.9 0.4 0.4"}))
        assert data[0][1].boxes[0].tolist() == pytest.approx([0, 14, 12, 20], abs=1e-5)

    def test_boxes_without_an_area_are_dropped(self, tmp_path):
        data = DetectionDataset.open(write_yolo(tmp_path, {"a": "0 0.5 0.5 0 0.4\n1 0.5 0.5 0.5 0.5\n2 0.2 0.3 0.1 0"}))
        assert data[0][1].labels.tolist() == [1]
        assert [line.rsplit("/", 1)[1] for line in data.left_out] == [
            "a.txt:1: a box without an area", "a.txt:3: a box without an area",
        ]  # fmt: skip

    def test_outlines(self, tmp_path):
        data = DetectionDataset.open(write_yolo(tmp_path, {"a": "2 0.1 0.2 0.5 0.1 0.3 0.9"}))
        assert data[0][1].boxes[0].tolist() == pytest.approx([4, 2, 20, 18], abs=1e-5)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("3 0.5 0.5 0.1 0.1", r"a\.txt:2 has the class 3; expected an index below 3"),
            ("-1 0.5 0.5 0.1 0.1", "has the class -1"),
            ("0.5 0.5 0.5 0.1 0.1", "has the class 0.5"),
            ("0 20 10 4 4", r"a\.txt:2 has values outside \[0, 1\].*not pixels"),
            ("0 0.5 0.5 -0.2 0.1", "values outside"),
            ("0 0.5 0.5 0.1", "is not a label"),
            ("0 0.5 0.5 nan 0.1", "is not a label"),
            ("cat 0.5 0.5 0.1 0.1", "is not a label: .*got 'cat 0.5"),
        ],
    )
    def test_invalid_labels(self, tmp_path, line, message):
        with pytest.raises(ValueError, match=message):
            DetectionDataset.open(write_yolo(tmp_path, {"a": f"0 0.5 0.5 0.1 0.1\n{line}"}))

    def test_lists_of_images(self, tmp_path):
        yaml = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.1 0.1", "b": "1 0.5 0.5 0.1 0.1"}, yaml="""
path: .
train: [first.txt, images/train]
names: [cat, dog]
""")  # fmt: skip
        (tmp_path / "first.txt").write_text("./images/train/b.png\n\n")
        data = DetectionDataset.open(yaml)
        assert [data.name(row) for row in range(3)] == ["./images/train/b.png", "a.png", "b.png"]
        assert [data[row][1].labels.tolist() for row in range(3)] == [[1], [0], [1]]
        (tmp_path / "first.txt").write_text("gone.png")
        with pytest.raises(FileNotFoundError, match=r"first\.txt lists gone\.png"):
            DetectionDataset.open(yaml)

    def test_images_one_folder_up(self, tmp_path):
        write_yolo(tmp_path, {"a": "0 0.5 0.5 0.1 0.1"})
        (tmp_path / "boxes").mkdir()
        (tmp_path / "labels").rename(tmp_path / "boxes" / "labels")
        (tmp_path / "data.yaml").rename(tmp_path / "boxes" / "data.yaml")
        assert DetectionDataset.open(tmp_path / "boxes")[0][1].labels.tolist() == [0]

    @pytest.mark.parametrize(
        ("yaml", "error", "message"),
        [
            ("train: images/train", ValueError, "expected 'names' and 'train'"),
            ("names: [a]", ValueError, "has no split 'train'; it has none"),
            ("train: images/gone\nnames: [a]", FileNotFoundError, "images/gone"),
            ("train: images/train\nnames: {0: a, 2: b}", ValueError, "expected 0, 1, 2"),
            ("- 1", ValueError, "does not describe a dataset"),
            ("a: [", ValueError, "is not YAML"),
        ],
    )
    def test_invalid_descriptions(self, tmp_path, yaml, error, message):
        with pytest.raises(error, match=message):
            DetectionDataset.open(write_yolo(tmp_path, {"a": "0 0.5 0.5 0.1 0.1"}, yaml=yaml))

    def test_no_labels_at_all(self, tmp_path):
        with pytest.raises(ValueError, match="None of the 2 images of 'train'"):
            DetectionDataset.open(write_yolo(tmp_path, {"a": None, "b": None}))
        with pytest.raises(ValueError, match="no object in its 1 images; 1 boxes have no area"):
            DetectionDataset.open(write_yolo(tmp_path / "more", {"a": "0 0.5 0.5 0 0"}))

    def test_not_utf8(self, tmp_path):
        path = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.1 0.1"})
        next(path.parent.rglob("a.txt")).write_bytes(b"0 0.5\xff")
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
            DetectionDataset.open(path)

    @pytest.mark.parametrize(
        ("yaml", "message"),
        [
            ("train: images/train\nnames: cat", "has the names cat; expected a list"),
            ("train: images/train\nnames: {0: cat, x: owl}", r"names the classes \[0, 'x'\]"),
            ("train: 5\nnames: [cat]", "has 5 as 'train'; expected folders or files of images"),
            ("train: [images/train, 5]\nnames: [cat]", "has 5 as 'train'"),
        ],
    )
    def test_invalid_sections(self, tmp_path, yaml, message):
        path = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.1 0.1"}, yaml=yaml)
        with pytest.raises(ValueError, match=message):
            DetectionDataset.open(path)


class TestCoco:
    def test_items(self, tmp_path):
        data = DetectionDataset.open(write_coco(tmp_path, make_coco()))
        assert data.class_names == ("owl", "cat")  # in the order of the ids
        objects = data[0][1]
        assert objects.boxes.tolist() == [[4, 2, 24, 12], [10, 5, 15, 10]]
        assert (objects.labels.tolist(), objects.crowds.tolist()) == ([1, 0], [False, True])
        assert objects.areas.tolist() == [120, 25]
        assert len(data[1][1].labels) == 0
        assert Path(data.place(1)) == tmp_path / "val2017" / "b.png"

    @pytest.mark.parametrize("folder", ["images/val2017", "annotations"])
    def test_places_of_the_images(self, tmp_path, folder):
        assert len(DetectionDataset.open(write_coco(tmp_path, make_coco(), folder))) == 2

    def test_folders(self, tmp_path):
        write_coco(tmp_path / "coco", make_coco())
        assert len(DetectionDataset.open(tmp_path / "coco", "val")) == 2
        with pytest.raises(
            FileNotFoundError,
            match=r"no images with boxes of 'train'\. Expected a YAML file of Ultralytics, images/ and labels/",
        ):
            DetectionDataset.open(tmp_path / "coco", "train")
        path = write_coco(tmp_path / "other", make_coco(), "train")
        path.rename(tmp_path / "other" / "train" / "_annotations.coco.json")
        assert len(DetectionDataset.open(tmp_path / "other", "train")) == 2
        for name in ("instances_val.json", "instances_val2014.json"):
            (tmp_path / "coco" / "annotations" / name).write_text("{}")
        with pytest.raises(ValueError, match="several datasets"):
            DetectionDataset.open(tmp_path / "coco", "val")

    def test_boxes_outside(self, tmp_path):
        boxes = [[-5, -5, 10, 10], [50, 0, 10, 10], [3, 3, 0, 4], [30, 10, 100, 5]]
        annotations = [
            {"id": number, "image_id": 7, "category_id": 3, "bbox": box} for number, box in enumerate(boxes, 11)
        ]
        data = DetectionDataset.open(write_coco(tmp_path, make_coco(annotations=annotations)))
        assert data[0][1].boxes.tolist() == [[0, 0, 5, 5], [30, 10, 40, 15]]
        assert data[0][1].areas.tolist() == [25, 50]
        assert len(data.left_out) == 2
        assert "annotation 12 of a.png: the box [50, 0, 10, 10] has no area in 40x20 pixels" in data.left_out[0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"category_id": 4}, r"json: annotation 1 has the category 4, which is not one of the 2"),
            ({"image_id": 8}, "annotation 1 has the unknown image_id 8"),
            ({"bbox": [1, 2, 3]}, r"annotation 1 of a\.png has the box \[1, 2, 3\]"),
            ({"bbox": [1, 2, float("nan"), 4]}, "has the box"),
            ({"bbox": None}, "has the box"),
            ({"area": float("nan")}, "has the area nan; expected pixels"),
            ({"area": "12"}, "has the area 12"),
            ({"area": -4}, "has the area -4"),
            ({"image_id": [7]}, r"number 0 of its annotations has image_id \[7\]"),
            ({"category_id": {}}, r"number 0 of its annotations has category_id \{\}"),
        ],
    )
    def test_invalid_annotations(self, tmp_path, change, message):
        annotation = make_coco()["annotations"][0] | change
        with pytest.raises(ValueError, match=message):
            DetectionDataset.open(write_coco(tmp_path, make_coco(annotations=[annotation])))

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            ("images", {"height": "20"}, "number 1 of its images has height 20; expected pixels"),
            ("images", {"width": 0}, "has width 0; expected pixels"),
            ("images", {"width": 1e300}, "has width 1e"),
            ("images", {"file_name": {}}, "has file_name {}; expected a string"),
            ("images", {"id": [1]}, r"has id \[1\]; expected a number or a string"),
            ("categories", {"id": "cat"}, "number 1 of its categories has id cat; expected a number"),
        ],
    )
    def test_invalid_values(self, tmp_path, part, change, message):
        path = write_coco(tmp_path, make_coco())
        content = make_coco()
        content[part][1] |= change
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            DetectionDataset.open(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "is not a COCO file"),
            (
                json.dumps(make_coco(annotations=[{"id": 1}])),
                "number 0 of its annotations has no image_id, category_id",
            ),
            (json.dumps(make_coco(categories=make_coco()["categories"] * 2)), "two categories with the same id"),
            (
                json.dumps(make_coco(images=[make_coco()["images"][0] | {"width": 0}])),
                "number 0 of its images has width 0",
            ),
        ],
    )
    def test_invalid_files(self, tmp_path, text, message):
        path = write_coco(tmp_path, make_coco())
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            DetectionDataset.open(path)

    def test_missing_images(self, tmp_path):
        path = write_coco(tmp_path, make_coco())
        (tmp_path / "val2017" / "b.png").unlink()
        data = DetectionDataset.open(path)
        assert (len(data), data.without_image) == (1, ("b.png",))
        (tmp_path / "val2017" / "a.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"such as a\.png"):
            DetectionDataset.open(path)
        with pytest.raises(FileNotFoundError, match=r"No image of .* is in"):
            DetectionDataset.open(path, images=tmp_path)

    def test_image_of_another_size(self, tmp_path):
        data = DetectionDataset.open(write_coco(tmp_path, make_coco()))
        write_image(tmp_path / "val2017" / "a.png", 20, 40)
        with pytest.raises(BrokenImageError, match=r"a\.png is 20x40 pixels upright, but its labels are for 40x20"):
            data[0]


class TestVoc:
    def test_items(self, tmp_path):
        data = DetectionDataset.open(write_voc(tmp_path, {"b": ["owl 5 3 24 12", "cat 1 1 40 20 1"], "a": []}))
        assert (len(data), data.class_names, data.left_out) == (2, ("cat", "owl"), ())
        assert [data.name(row) for row in range(2)] == ["b.jpg", "a.jpg"]  # in the order of the list
        objects = data[0][1]
        assert objects.boxes.tolist() == [
            [4, 2, 24, 12],
            [0, 0, 40, 20],
        ]  # including the first and last pixels
        assert objects.areas.tolist() == [200, 800]
        assert (objects.labels.tolist(), objects.crowds.tolist()) == ([1, 0], [False, True])
        assert len(data[1][1].labels) == 0

    def test_splits_have_the_same_classes(self, tmp_path):
        write_voc(tmp_path, {"a": ["owl 5 3 24 12"]})
        write_voc(tmp_path, {"b": ["cat 1 1 40 20"]}, split="val")
        for split, label in (("train", 1), ("val", 0)):
            data = DetectionDataset.open(tmp_path, split)
            assert (data.class_names, data[0][1].labels.tolist()) == (("cat", "owl"), [label])
        with pytest.raises(FileNotFoundError, match=r"has no split 'test'; expected one of train, val\."):
            DetectionDataset.open(tmp_path, "test")

    def test_boxes_of_one_pixel_and_without_an_area(self, tmp_path):
        lines = ["cat 7 7 7 7", "cat 9 5 8 9", "cat 41 1 50 5", "cat 0 0 10.5 10"]
        data = DetectionDataset.open(write_voc(tmp_path, {"a": lines}))
        assert data[0][1].boxes.tolist() == [[6, 6, 7, 7], [0, 0, 10.5, 10]]
        assert [line.rsplit("/", 1)[1] for line in data.left_out] == [
            "a.xml: the box of its object 2 has no area",
            "a.xml: the box of its object 3 has no area",
        ]

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("</annotation>", "", r"a\.xml is not XML"),
            ("<annotation>", '<?xml version="1.0" encoding="none"?><annotation>', "is not XML"),
            ("<name>cat</name>", "", r"a\.xml has no name in its 'object'"),
            ("<xmin>5</xmin>", "", r"has no bndbox/xmin in its 'object'"),
            ("<xmin>5</xmin>", "<xmin>x</xmin>", r"has 'x' as bndbox/xmin; expected a number of pixels"),
            ("<xmin>5</xmin>", "<xmin>nan</xmin>", "has 'nan' as"),
            ("<width>40</width>", "", "has no size/width in its 'annotation'"),
            ("<width>40</width>", "<width>0</width>", "states an image of 0x20 pixels"),
        ],
    )
    def test_invalid_annotations(self, tmp_path, old, new, message):
        write_voc(tmp_path, {"a": ["cat 5 3 24 12"]})
        file = tmp_path / "Annotations" / "a.xml"
        file.write_text(file.read_text().replace(old, new))
        with pytest.raises(ValueError, match=message):
            DetectionDataset.open(tmp_path)

    def test_missing_files(self, tmp_path):
        write_voc(tmp_path, {"a": ["cat 5 3 24 12"], "b": ["cat 5 3 24 12"]})
        (tmp_path / "JPEGImages" / "b.jpg").unlink()
        data = DetectionDataset.open(tmp_path)
        assert (len(data), data.without_image) == (1, ("b",))
        (tmp_path / "Annotations" / "a.xml").unlink()
        with pytest.raises(FileNotFoundError, match=r"There is no file .*a\.xml for an image of 'train', a"):
            DetectionDataset.open(tmp_path)

    def test_image_of_another_size(self, tmp_path):
        data = DetectionDataset.open(write_voc(tmp_path, {"a": ["cat 5 3 12 12"]}, size=(20, 40)))
        with pytest.raises(BrokenImageError, match=r"a\.jpg is 40x20 pixels upright, but its labels are for 20x40"):
            data[0]

    @pytest.mark.parametrize(("split", "count"), [("train", 205), ("val", 87), ("test", 72)])
    def test_blood_cells(self, split, count):
        data = DetectionDataset.open(shared("data/blood_cells"), split)
        assert (len(data), data.class_names) == (count, ("Platelets", "RBC", "WBC"))
        assert (data.left_out, data.without_image) == ((), ())
        image, objects = data[0]
        assert image.shape == (3, 480, 640)
        assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
        assert (objects.boxes >= 0).all()


class TestDataset:
    def test_corrupt_image(self, tmp_path):
        data = DetectionDataset.open(write_yolo(tmp_path, {"a": "0 0.5 0.5 0.1 0.1"}))
        Path(data.place(0)).write_bytes(b"not an image")
        with pytest.raises(BrokenImageError, match=r"a\.png"):
            data[0]

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"There is no dataset .*gone\.yaml"):
            DetectionDataset.open(tmp_path / "gone.yaml")

    def test_sample(self, tmp_path):
        data = DetectionDataset.open(write_yolo(tmp_path, {str(n): f"{n % 3} 0.5 0.5 0.1 0.1" for n in range(9)}))
        drawn = data.sample(4, seed=1)
        assert (len(drawn), drawn.class_names) == (4, ANIMALS)
        assert [drawn.name(row) for row in range(4)] == [data.sample(4, seed=1).name(row) for row in range(4)]
        assert drawn.fingerprint() != data.fingerprint()
        with pytest.raises(ValueError, match="Cannot sample 10 of 9"):
            data.sample(10)

    def test_fingerprint(self, tmp_path):
        labels = {"a": "0 0.5 0.5 0.1 0.1", "b": ""}
        one = DetectionDataset.open(write_yolo(tmp_path / "one", labels)).fingerprint()
        assert DetectionDataset.open(write_yolo(tmp_path / "same", labels)).fingerprint() == one
        moved = DetectionDataset.open(write_yolo(tmp_path / "moved", labels | {"a": "0 0.5 0.5 0.1 0.2"}))
        renamed = DetectionDataset.open(write_yolo(tmp_path / "renamed", labels, names=("x", "y", "z")))
        assert len({one, moved.fingerprint(), renamed.fingerprint()}) == 3

    def test_pickles(self, tmp_path):
        data = DetectionDataset.open(write_yolo(tmp_path, {"a": "0 0.5 0.5 0.1 0.1"}))
        assert pickle.loads(pickle.dumps(data))[0][1].labels.tolist() == [0]

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_coco128(self, split):
        data = DetectionDataset.open(shared("data/coco128/object_detection/config.yaml"), split)
        assert (len(data), data.num_classes, data.class_names[0], data.left_out) == (128, 80, "person", ())
        image, objects = data[0]
        assert len(objects.labels)
        limits = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert (objects.boxes >= 0).all()
        assert (objects.boxes <= limits + 1e-3).all()
