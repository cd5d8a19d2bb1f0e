"""Pictures with instances: polygons, run lengths and ids become masks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kornia_tinyvit.data import BrokenImageError, InstanceDataset
from kornia_tinyvit.ops import compress_rle, encode_rle
from tests.conftest import shared
from tests.scenes import damage

SIZE = (20, 30)  # height and width
SQUARE = "3 0.2 0.2 0.5 0.2 0.5 0.6 0.2 0.6 0.2 0.2"


def add_picture(root: Path, name: str = "a.png", size=SIZE) -> Path:
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], "red").save(path)
    return root


def add_labels(root: Path, *lines: str, name: str = "a.txt") -> Path:
    path = root / "labels" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return root


def box_mask(left, top, right, bottom, size=SIZE) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def iou(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


class TestFormats:
    def test_ids(self, tmp_path):
        ids = np.zeros(SIZE, dtype=np.uint16)
        ids[2:5, 3:9], ids[10:15, 10:20], ids[0], ids[19] = 7, 300, 255, 40
        (tmp_path / "masks").mkdir()
        Image.fromarray(ids).save(tmp_path / "masks" / "a.png")
        picture, masks = InstanceDataset.open(add_picture(tmp_path))[0]
        assert (picture.shape, picture.dtype, float(picture[0].min())) == ((3, *SIZE), torch.float32, 1.0)
        wanted = [box_mask(3, 2, 9, 5), box_mask(0, 19, 30, 20), box_mask(10, 10, 20, 15)]
        assert torch.equal(masks, torch.stack(wanted))

    def test_polygons(self, tmp_path):
        data = InstanceDataset.open(add_labels(add_picture(tmp_path), SQUARE, "", "8 0.5 0 1 0 1 1"))
        masks = data[0][1]
        assert (masks.dtype, masks.shape) == (torch.bool, (2, *SIZE))
        assert iou(masks[0], box_mask(6, 4, 16, 13)) > 0.95
        assert masks[1].float().mean() == pytest.approx(0.25, abs=0.05)

    def test_parts_of_an_instance_are_not_bridged(self, tmp_path):
        corners = ((0.1, 0.1), (0.6, 0.1), (0.3, 0.7))
        rings = [[(x, y), (x + 0.2, y), (x + 0.2, y + 0.2), (x, y + 0.2), (x, y)] for x, y in corners]
        numbers = " ".join(f"{number:.4f}" for ring in rings for corner in ring for number in corner)
        masks = InstanceDataset.open(add_labels(add_picture(tmp_path, size=(100, 100)), f"1 {numbers}"))[0][1]
        wanted = sum(box_mask(*(round(100 * e) for e in (x, y, x + 0.2, y + 0.2)), (100, 100)) for x, y in corners) > 0
        assert iou(masks[0], wanted) > 0.9
        assert not masks[0, 40, 45]  # between the three

    @pytest.mark.parametrize("compressed", [False, True])
    def test_coco(self, tmp_path, compressed):
        add_picture(add_picture(tmp_path), "empty.jpg")
        ring = box_mask(2, 3, 12, 9)
        ring[5:7, 5:8] = False
        rle = encode_rle(ring)
        polygon = [[6, 4, 15, 4, 15, 12, 6, 12], [20, 2, 25, 2, 25, 6, 20, 6]]
        annotations = [
            {"image_id": 5, "segmentation": compress_rle(rle) if compressed else rle, "iscrowd": 0},
            {"image_id": 5, "segmentation": encode_rle(box_mask(0, 0, 30, 20)), "iscrowd": 1},
            {"image_id": 5, "segmentation": polygon},
        ]
        told = {
            "images": [{"id": 5, "file_name": "a.png"}, {"id": 6, "file_name": "empty.jpg"},
                       {"id": 7, "file_name": "gone.jpg"}],
            "annotations": annotations,
        }  # fmt: skip
        (tmp_path / "instances.json").write_text(json.dumps(told))
        data = InstanceDataset(tmp_path / "images", tmp_path / "instances.json")
        assert ([data.name(row) for row in range(2)], data.without_picture) == (["a.png", "empty.jpg"], ("gone",))
        masks = data[0][1]
        assert torch.equal(masks[0], ring)
        assert torch.equal(masks[1], box_mask(6, 4, 16, 13) | box_mask(20, 2, 26, 7))  # corners' pixels included
        assert (len(masks), data[1][1].shape) == (2, (0, *SIZE))
        assert [data.with_instances().name(row) for row in range(1)] == ["a.png"]

    def test_real_polygons_agree_with_the_class_masks(self):
        labels = shared("data/coco128/instance_segmentation/labels/train2017")
        data = InstanceDataset(shared("data/coco128/images/train2017"), labels, min_area=1024)
        assert (len(data), len(data.without_mask)) == (100, 28)
        semantic = shared("data/coco128/semantic_segmentation/masks/train2017")
        inside = []
        for row in range(6):
            classes = torch.from_numpy(np.array(Image.open(semantic / data.name(row).replace(".jpg", ".png"))))
            inside += [float((classes[mask] == classes[mask].mode().values).float().mean()) for mask in data[row][1]]
        assert len(inside) > 10
        assert np.mean(inside) > 0.95


class TestOpen:
    def test_folders(self, tmp_path):
        for split in ("train", "val"):
            add_picture(tmp_path, f"{split}/{split}.png")
            add_labels(tmp_path, SQUARE, name=f"{split}/{split}.txt")
        assert [InstanceDataset.open(tmp_path, split).name(0) for split in ("train", "val")] == ["train.png", "val.png"]
        assert InstanceDataset.open(tmp_path, "other").name(0) == "train/train.png"  # there are no such parts

    @pytest.mark.parametrize("section", ["images", {"images": "images", "instances": "labels"}])
    def test_described(self, tmp_path, section):
        add_labels(add_picture(tmp_path), SQUARE)
        (tmp_path / "data.json").write_text(json.dumps({"path": ".", "train": section}))
        assert len(InstanceDataset.open(tmp_path / "data.json")) == 1
        with pytest.raises(ValueError, match="instances of 'val'"):
            InstanceDataset.open(tmp_path / "data.json", "val")

    def test_labels_of_a_folder_without_images_in_its_path(self, tmp_path):
        (tmp_path / "data.json").write_text(json.dumps({"train": "photos"}))
        with pytest.raises(ValueError, match="no folder 'images'"):
            InstanceDataset.open(tmp_path / "data.json")

    def test_what_is_left_out(self, tmp_path):
        add_labels(add_picture(add_picture(tmp_path), "b.png"), SQUARE)
        add_labels(tmp_path, SQUARE, name="c.txt")
        data = InstanceDataset.open(tmp_path)
        assert (len(data), data.without_mask, data.without_picture) == (1, ("b.png",), ("c",))

    def test_small_instances(self, tmp_path):
        add_labels(add_picture(tmp_path), SQUARE, "1 0 0 0.1 0 0.1 0.1")
        areas = InstanceDataset.open(tmp_path)[0][1].flatten(1).sum(1).tolist()
        assert len(areas) == 2
        (kept,) = InstanceDataset.open(tmp_path, min_area=max(areas))[0][1]
        assert int(kept.sum()) == max(areas)
        assert len(InstanceDataset.open(tmp_path, min_area=max(areas) + 1)[0][1]) == 0
        with pytest.raises(ValueError, match="at least 601 pixels"):
            InstanceDataset.open(tmp_path, min_area=601).with_instances()

    def test_part_and_fingerprint(self, tmp_path):
        for number in range(4):
            add_labels(add_picture(tmp_path, f"{number}.png"), SQUARE, name=f"{number}.txt")
        data = InstanceDataset.open(tmp_path)
        assert data.fingerprint() == InstanceDataset.open(tmp_path).fingerprint()
        drawn = data.sample(2, seed=1)
        assert len(drawn) == 2
        others = [drawn, InstanceDataset.open(tmp_path, min_area=2), data.sample(3)]
        add_labels(tmp_path, SQUARE, SQUARE, name="1.txt")
        others.append(InstanceDataset.open(tmp_path))
        assert len({each.fingerprint() for each in (data, *others)}) == 5

    def test_coco_fingerprint(self, tmp_path):
        add_picture(tmp_path)
        prints = set()
        for right in (12, 13):
            told = {"images": [{"id": 1, "file_name": "a.png"}],
                    "annotations": [{"image_id": 1, "segmentation": [[2, 2, right, 2, right, 9]]}]}  # fmt: skip
            (tmp_path / "coco.json").write_text(json.dumps(told))
            prints.add(InstanceDataset(tmp_path / "images", tmp_path / "coco.json").fingerprint())
        assert len(prints) == 2


class TestRefusals:
    def test_runs_of_another_size(self, tmp_path):
        """Refused before masks of that size take the memory."""
        add_picture(tmp_path)
        runs = {"size": [60_000, 60_000], "counts": [3_600_000_000]}
        told = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "segmentation": runs}]}
        (tmp_path / "coco.json").write_text(json.dumps(told))
        with pytest.raises(BrokenImageError, match=r"a mask of the size \[60000, 60000\] lies on a picture of"):
            InstanceDataset(tmp_path / "images", tmp_path / "coco.json")[0]

    def test_no_text(self, tmp_path):
        add_labels(add_picture(tmp_path), SQUARE)
        (tmp_path / "labels" / "a.txt").write_bytes(b"\xff\xfe0 1")
        with pytest.raises(BrokenImageError, match=r"a\.txt is no text in UTF-8"):
            InstanceDataset.open(tmp_path)[0]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("1 0.1 0.2 0.3", "no pairs"),
            ("1 0.1 0.2 0.3 0.4 1.2 0.5", r"corners in \[0, 1\]"),
            ("1 0.1 0.2 nan 0.4", r"corners in \[0, 1\]"),
            ("1", "expected a class and corners"),
            ("1 a b", "could not convert"),
        ],
    )
    def test_labels(self, tmp_path, line, message):
        data = InstanceDataset.open(add_labels(add_picture(tmp_path), SQUARE, line))
        with pytest.raises(BrokenImageError, match=rf"a\.png cannot be read: .*{message}"):
            data[0]

    def test_another_size(self, tmp_path):
        (add_picture(tmp_path) / "masks").mkdir()
        Image.new("L", (10, 20), 1).save(tmp_path / "masks" / "a.png")
        with pytest.raises(BrokenImageError, match="30x20 pixels upright, but its masks are 10x20"):
            InstanceDataset.open(tmp_path)[0]

    def test_broken_picture(self, tmp_path):
        data = InstanceDataset.open(add_labels(add_picture(tmp_path), SQUARE))
        damage(tmp_path / "images" / "a.png")
        with pytest.raises(BrokenImageError, match=r"a\.png"):
            data[0]

    def test_jpeg_masks(self, tmp_path):
        (add_picture(tmp_path) / "masks").mkdir()
        Image.new("L", SIZE[::-1], 1).save(tmp_path / "masks" / "a.jpg")
        with pytest.raises(ValueError, match="smeared"):
            InstanceDataset.open(tmp_path)

    @pytest.mark.parametrize("content", ["{", "[]", '{"images": [], "annotations": [{"image_id": 1}]}'])
    def test_no_coco(self, tmp_path, content):
        (add_picture(tmp_path) / "coco.json").write_text(content)
        with pytest.raises(ValueError, match="not a file of instances in COCO's format"):
            InstanceDataset(tmp_path / "images", tmp_path / "coco.json")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no data set"):
            InstanceDataset.open(tmp_path / "gone")
        add_picture(tmp_path)
        with pytest.raises(ValueError, match="neither 'masks' nor 'labels'"):
            InstanceDataset.open(tmp_path)
        with pytest.raises(FileNotFoundError, match="no folder or file"):
            InstanceDataset(tmp_path / "images", tmp_path / "labels")
        add_labels(tmp_path, SQUARE, name="other.txt")
        with pytest.raises(ValueError, match="No picture of"):
            InstanceDataset.open(tmp_path)
        with pytest.raises(ValueError, match="min_area"):
            InstanceDataset.open(tmp_path, min_area=0)
