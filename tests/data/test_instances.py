"""Images with instances: polygons, run-length codes and ids are converted to masks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kornia_tinyvit.data import BrokenImageError, InstanceDataset, MissingSplitError
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.ops import compress_rle, decode_rle, encode_rle
from tests.conftest import shared
from tests.scenes import damage

SIZE = (20, 30)  # height and width
SQUARE = "3 0.2 0.2 0.5 0.2 0.5 0.6 0.2 0.6 0.2 0.2"


def add_image(root: Path, name: str = "a.png", size=SIZE) -> Path:
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], "red").save(path)
    return root


def add_labels(root: Path, *lines: str, name: str = "a.txt") -> Path:
    path = root / "labels" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return root


def write_coco(root: Path, names: dict[int, str], *annotations: dict, size=SIZE) -> None:
    """Write a COCO file about images of one size."""
    content = {
        "images": [{"id": key, "file_name": name, "height": size[0], "width": size[1]} for key, name in names.items()],
        "annotations": [{"id": number, "category_id": 1, **each} for number, each in enumerate(annotations)],
        "categories": [{"id": 1, "name": "object"}],
    }
    (root / "coco.json").write_text(json.dumps(content))


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
        image, masks = InstanceDataset.open(add_image(tmp_path))[0]
        assert (image.shape, image.dtype, float(image[0].min())) == ((3, *SIZE), torch.float32, 1.0)
        wanted = [
            box_mask(3, 2, 9, 5), box_mask(0, 19, 30, 20), box_mask(0, 0, 30, 1), box_mask(10, 10, 20, 15)
        ]  # fmt: skip
        assert torch.equal(masks, torch.stack(wanted))

    def test_polygons(self, tmp_path):
        data = InstanceDataset.open(add_labels(add_image(tmp_path), SQUARE, "", "8 0.5 0 1 0 1 1"))
        masks = data[0][1]
        assert (masks.dtype, masks.shape) == (torch.bool, (2, *SIZE))
        assert torch.equal(masks[0], box_mask(6, 4, 15, 12))
        assert masks[1].float().mean() == pytest.approx(0.25, abs=0.05)

    def test_parts_of_an_instance_are_separate(self, tmp_path):
        corners = ((0.1, 0.1), (0.6, 0.1), (0.3, 0.7))
        rings = [[(x, y), (x + 0.2, y), (x + 0.2, y + 0.2), (x, y + 0.2), (x, y)] for x, y in corners]
        numbers = " ".join(f"{number:.4f}" for ring in rings for corner in ring for number in corner)
        masks = InstanceDataset.open(add_labels(add_image(tmp_path, size=(100, 100)), f"1 {numbers}"))[0][1]
        wanted = sum(box_mask(*(round(100 * e) for e in (x, y, x + 0.2, y + 0.2)), (100, 100)) for x, y in corners) > 0
        assert iou(masks[0], wanted) > 0.9
        assert not masks[0, 40, 45]  # between the three

    @pytest.mark.parametrize("compressed", [False, True])
    def test_coco(self, tmp_path, compressed):
        add_image(add_image(tmp_path), "empty.jpg")
        ring = box_mask(2, 3, 12, 9)
        ring[5:7, 5:8] = False
        rle = encode_rle(ring)
        polygon = [[6, 4, 15, 4, 15, 12, 6, 12], [20, 2, 25, 2, 25, 6, 20, 6]]
        annotations = [
            {"image_id": 5, "segmentation": compress_rle(rle) if compressed else rle, "iscrowd": 0},
            {"image_id": 5, "segmentation": encode_rle(box_mask(0, 0, 30, 20)), "iscrowd": 1},
            {"image_id": 5, "segmentation": polygon},
        ]
        write_coco(tmp_path, {5: "a.png", 6: "empty.jpg", 7: "gone.jpg"}, *annotations)
        data = InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")
        assert ([data.name(row) for row in range(2)], data.without_image) == (["a.png", "empty.jpg"], ("gone.jpg",))
        masks = data[0][1]
        assert torch.equal(masks[0], ring)
        assert torch.equal(masks[1], box_mask(6, 4, 15, 12) | box_mask(20, 2, 25, 6))
        assert (len(masks), data[1][1].shape) == (2, (0, *SIZE))
        assert [data.with_instances().name(row) for row in range(1)] == ["a.png"]

    def test_real_polygons_agree_with_the_class_masks(self):
        labels = shared("data/coco128/instance_segmentation/labels/train2017")
        data = InstanceDataset.open(shared("data/coco128/images/train2017"), min_area=1024, instances=labels)
        assert len(data) == 128
        assert "28 images without a label file taken as background" in data.summary
        semantic = shared("data/coco128/semantic_segmentation/masks/train2017")
        inside = []
        for row in [row for row in range(len(data)) if (semantic / f"{Path(data.name(row)).stem}.png").exists()][:6]:
            classes = torch.from_numpy(np.array(Image.open(semantic / data.name(row).replace(".jpg", ".png"))))
            inside += [float((classes[mask] == classes[mask].mode().values).float().mean()) for mask in data[row][1]]
        assert len(inside) > 10
        assert np.mean(inside) > 0.95

    def test_coco_images_that_differ_in_their_suffix(self, tmp_path):
        add_image(add_image(tmp_path), "a.jpg")
        annotation = {"image_id": 2, "segmentation": [[1, 1, 9, 1, 9, 9]]}
        write_coco(tmp_path, {1: "a.png", 2: "a.jpg"}, annotation)
        data = InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")
        assert [(data.name(row), len(data[row][1])) for row in range(2)] == [("a.png", 0), ("a.jpg", 1)]

    def test_box_lines_are_filled(self, tmp_path):
        lines = "1 0.5 0.5 0.4 0.3", "2 0.1 0.1 0.9 0.1 0.9 0.9"
        (box, outline) = InstanceDataset.open(add_labels(add_image(tmp_path, size=(80, 100)), *lines))[0][1]
        assert torch.equal(box, box_mask(30, 28, 70, 52, (80, 100)))
        assert (int(box.sum()), int(outline.sum())) == (960, 2560)

    @pytest.mark.parametrize(
        ("ring", "pixels"),
        [
            ([10, 10, 20, 10, 20, 20, 10, 20], 100),
            ([10, 10, 30, 10, 30, 11, 10, 11], 20),
            ([-9, 5, 9, 5, 9, 9, -9, 9], 36),
        ],
    )
    def test_pixels_of_polygons(self, tmp_path, ring, pixels):
        """A polygon has the pixels of pycocotools, and none beyond its edges."""
        write_coco(
            add_image(tmp_path, size=(40, 50)), {1: "a.png"}, {"image_id": 1, "segmentation": [ring]}, size=(40, 50)
        )
        (mask,) = InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")[0][1]
        assert int(mask.sum()) == pixels

    def test_polygons_of_coco128_have_the_pixels_of_pycocotools(self):
        coco_masks = pytest.importorskip("pycocotools.mask")
        labels = shared("data/coco128/instance_segmentation/labels/train2017")
        data = InstanceDataset.open(shared("data/coco128/images/train2017"), instances=labels)
        row = next(row for row in range(len(data)) if data.name(row).endswith("000000000025.jpg"))
        masks = data[row][1]
        height, width = masks.shape[1:]
        for mask, line in zip(masks, (labels / "000000000025.txt").read_text().splitlines(), strict=True):
            corners = np.array(line.split()[1:], dtype=float).reshape(-1, 2) * (width, height)
            code = coco_masks.merge(coco_masks.frPyObjects([corners.ravel().tolist()], height, width))
            assert torch.equal(mask, torch.from_numpy(decode_rle(code)))

    def test_polygons_without_pycocotools(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        data = InstanceDataset.open(add_labels(add_image(tmp_path), SQUARE))
        with pytest.raises(
            MissingExtraError, match=r"polygons need pycocotools: pip install 'kornia-tinyvit\[train\]'"
        ):
            data[0]

    def test_runs_are_decoded_as_by_pycocotools(self, tmp_path):
        coco_masks = pytest.importorskip("pycocotools.mask")
        mask = np.random.default_rng(0).random(SIZE) < 0.4
        code = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
        runs = [{"size": code["size"], "counts": code["counts"].decode()}, encode_rle(mask)]
        write_coco(add_image(tmp_path), {1: "a.png"}, *({"image_id": 1, "segmentation": each} for each in runs))
        masks = InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")[0][1]
        assert torch.equal(masks, torch.from_numpy(np.stack([mask, mask])))

    def test_coco_without_categories(self, tmp_path):
        write_coco(add_image(tmp_path), {1: "a.png"}, {"image_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]})
        content = json.loads((tmp_path / "coco.json").read_text())
        del content["categories"], content["annotations"][0]["category_id"]
        (tmp_path / "coco.json").write_text(json.dumps(content))
        assert len(InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")[0][1]) == 1

    def test_only_0_and_255(self, tmp_path):
        """In masks of instances 255 is an object like any other id."""
        (add_image(tmp_path) / "masks").mkdir()
        Image.fromarray(box_mask(3, 2, 9, 5).numpy().astype(np.uint8) * 255).save(tmp_path / "masks" / "a.png")
        data = InstanceDataset.open(tmp_path / "images", instances=tmp_path / "masks")
        assert torch.equal(data[0][1], box_mask(3, 2, 9, 5)[None])
        assert data.summary == "1 image, 1 object; 255 is the object, one per image, as the masks hold only 0 and 255"

    def test_nuclei_with_the_id_255(self):
        data = InstanceDataset.open(shared("data/nuclei/val"))
        assert (len(data), data.num_objects) == (80, 4038)
        row = [data.name(row) for row in range(len(data))].index("0ea221716cf1.png")
        assert len(data[row][1]) == 369


def write_sample(root: Path, name: str, *boxes: tuple[int, int, int, int]) -> Path:
    """Write an image and a file for each of its objects."""
    add_image(root / name, f"{name}.png")
    for number, box in enumerate(boxes):
        path = root / name / "masks" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(box_mask(*box).numpy().astype(np.uint8) * 255).save(path)
    return root


class TestOneFilePerObject:
    def test_objects(self, tmp_path):
        write_sample(write_sample(tmp_path, "b", (2, 3, 9, 8), (5, 5, 20, 15), (0, 0, 0, 0)), "a", (1, 1, 2, 2))
        data = InstanceDataset.open(tmp_path)
        assert [data.name(row) for row in range(2)] == ["a/images/a.png", "b/images/b.png"]
        image, masks = data[1]
        assert image.shape == (3, *SIZE)
        assert torch.equal(masks, torch.stack([box_mask(2, 3, 9, 8), box_mask(5, 5, 20, 15)]))  # that overlap
        assert len(InstanceDataset.open(tmp_path, min_area=2)[0][1]) == 0

    def test_split(self, tmp_path):
        write_sample(tmp_path / "val", "a", (1, 1, 5, 5))
        assert InstanceDataset.open(tmp_path, "val").name(0) == "a/images/a.png"
        with pytest.raises(MissingSplitError, match=r"has no split 'train'; expected one of val\."):
            InstanceDataset.open(tmp_path, "train")
        assert InstanceDataset.open(tmp_path / "val", "train").summary.endswith("not divided into splits")
        with pytest.raises(MissingSplitError, match="not divided into splits; it has no split 'nonsense'"):
            InstanceDataset.open(tmp_path / "val", "nonsense")

    def test_incomplete_samples_are_dropped(self, tmp_path):
        write_sample(write_sample(tmp_path, "a", (1, 1, 5, 5)), "b")
        (tmp_path / "b" / "masks").mkdir()
        (tmp_path / "c" / "masks").mkdir(parents=True)
        (tmp_path / "__MACOSX" / "a").mkdir(parents=True)  # no sample
        data = InstanceDataset.open(tmp_path)
        assert (len(data), data.without_mask, data.without_image) == (1, ("b",), ("c",))

    def test_fingerprint(self, tmp_path):
        first = InstanceDataset.open(write_sample(tmp_path, "a", (1, 1, 5, 5))).fingerprint()
        assert InstanceDataset.open(tmp_path).fingerprint() == first
        write_sample(tmp_path, "a", (1, 1, 5, 5), (7, 7, 9, 9))
        assert InstanceDataset.open(tmp_path).fingerprint() != first

    def test_errors(self, tmp_path):
        write_sample(tmp_path, "a", (1, 1, 5, 5))
        Image.new("RGB", (4, 4)).save(tmp_path / "a" / "masks" / "0.png")
        with pytest.raises(BrokenImageError, match=r"0\.png is not a mask: it has the mode RGB"):
            InstanceDataset.open(tmp_path)[0]
        Image.new("L", (4, 4), 1).save(tmp_path / "a" / "masks" / "0.png")
        with pytest.raises(BrokenImageError, match="30x20 pixels upright, but its masks are 4x4"):
            InstanceDataset.open(tmp_path)[0]
        add_image(tmp_path / "a", "other.png")
        with pytest.raises(ValueError, match="holds 2 images; expected one"):
            InstanceDataset.open(tmp_path)

    def test_nuclei(self):
        data = InstanceDataset.open(shared("data/nuclei/one_file_per_object"))
        assert (len(data), data.without_mask, data.without_image) == (4, (), ())
        assert [len(masks) for _, masks in data] == [12, 21, 25, 29]
        assert all((masks.sum(0) <= 1).all() for _, masks in data)  # no object occurs twice


class TestOpen:
    def test_folders(self, tmp_path):
        for split in ("train", "val"):
            add_image(tmp_path, f"{split}/{split}.png")
            add_labels(tmp_path, SQUARE, name=f"{split}/{split}.txt")
        assert [InstanceDataset.open(tmp_path, split).name(0) for split in ("train", "val")] == ["train.png", "val.png"]
        with pytest.raises(ValueError, match=r"has no split 'other'; expected one of train, val\."):
            InstanceDataset.open(tmp_path, "other")

    @pytest.mark.parametrize("section", ["images", {"images": "images", "instances": "labels"}])
    def test_described(self, tmp_path, section):
        add_labels(add_image(tmp_path), SQUARE)
        (tmp_path / "data.json").write_text(json.dumps({"path": ".", "train": section}))
        assert len(InstanceDataset.open(tmp_path / "data.json")) == 1
        with pytest.raises(ValueError, match="has no split 'val'; expected one of train"):
            InstanceDataset.open(tmp_path / "data.json", "val")

    def test_labels_of_a_folder_without_images_in_its_path(self, tmp_path):
        """They lie beside the images."""
        (tmp_path / "data.json").write_text(json.dumps({"train": "photos"}))
        with pytest.raises(FileNotFoundError, match="There are no images"):
            InstanceDataset.open(tmp_path / "data.json")
        add_labels(add_image(tmp_path), SQUARE)
        (tmp_path / "images").rename(tmp_path / "photos")
        with pytest.raises(ValueError, match="None of the 1 images"):
            InstanceDataset.open(tmp_path / "data.json")
        (tmp_path / "labels" / "a.txt").rename(tmp_path / "photos" / "a.txt")
        assert len(InstanceDataset.open(tmp_path / "data.json")[0][1]) == 1

    def test_unpaired_files_are_dropped(self, tmp_path):
        add_labels(add_image(add_image(tmp_path), "b.png"), SQUARE)
        add_labels(tmp_path, SQUARE, name="c.txt")
        (tmp_path / "labels" / "classes.txt").write_text("cell\n")  # as LabelImg writes it
        data = InstanceDataset.open(tmp_path)
        assert (len(data), data.without_image, [len(masks) for _, masks in data]) == (2, ("c.txt",), [1, 0])
        assert data.summary == (
            "2 images, 1 object; skipped 1 label without an image; not divided into splits; "
            "1 image without a label file taken as background"
        )
        (tmp_path / "labels").rename(tmp_path / "gone")
        (tmp_path / "masks").mkdir()
        for name in "ac":
            Image.new("L", SIZE[::-1], 1).save(tmp_path / "masks" / f"{name}.png")
        data = InstanceDataset.open(tmp_path)
        assert (len(data), data.without_mask, data.without_image) == (1, ("b.png",), ("c.png",))

    def test_small_instances(self, tmp_path):
        add_labels(add_image(tmp_path), SQUARE, "1 0 0 0.1 0 0.1 0.1")
        areas = InstanceDataset.open(tmp_path)[0][1].flatten(1).sum(1).tolist()
        assert len(areas) == 2
        (kept,) = InstanceDataset.open(tmp_path, min_area=max(areas))[0][1]
        assert int(kept.sum()) == max(areas)
        assert len(InstanceDataset.open(tmp_path, min_area=max(areas) + 1)[0][1]) == 0
        with pytest.raises(ValueError, match="at least 601 pixels"):
            InstanceDataset.open(tmp_path, min_area=601).with_instances()
        InstanceDataset.open(tmp_path, min_area=max(areas)).require_objects()
        with pytest.raises(ValueError, match=r"None of 1 image has an instance of at least 601 pixels, .*a\.txt"):
            InstanceDataset.open(tmp_path, min_area=601).require_objects()

    def test_part_and_fingerprint(self, tmp_path):
        for number in range(4):
            add_labels(add_image(tmp_path, f"{number}.png"), SQUARE, name=f"{number}.txt")
        data = InstanceDataset.open(tmp_path)
        assert data.fingerprint() == InstanceDataset.open(tmp_path).fingerprint()
        drawn = data.sample(2, seed=1)
        assert len(drawn) == 2
        others = [drawn, InstanceDataset.open(tmp_path, min_area=2), data.sample(3)]
        add_labels(tmp_path, SQUARE, SQUARE, name="1.txt")
        others.append(InstanceDataset.open(tmp_path))
        assert len({each.fingerprint() for each in (data, *others)}) == 5

    def test_coco_fingerprint(self, tmp_path):
        add_image(tmp_path)
        prints = set()
        for right in (12, 13):
            write_coco(tmp_path, {1: "a.png"}, {"image_id": 1, "segmentation": [[2, 2, right, 2, right, 9]]})
            prints.add(InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json").fingerprint())
        assert len(prints) == 2


class TestErrors:
    def test_runs_of_another_size(self, tmp_path):
        """The error precedes the allocation of a mask of that size."""
        add_image(tmp_path)
        runs = {"size": [60_000, 60_000], "counts": [3_600_000_000]}
        write_coco(tmp_path, {1: "a.png"}, {"image_id": 1, "segmentation": runs})
        with pytest.raises(BrokenImageError, match=r"a mask has the size \[60000, 60000\], but the image"):
            InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")[0]

    @pytest.mark.parametrize(
        "segmentation",
        [
            [],
            [[]],
            [[1, 2, 3]],
            [[10, 10, 20, 20]],
            None,
            [[1, 2, float("nan"), 3, 4, 5]],
            "1 2",
            {"counts": [600]},
            [1, 2, 3, 4],
        ],
    )
    def test_invalid_segmentations(self, tmp_path, segmentation):
        write_coco(add_image(tmp_path), {1: "a.png"}, {"image_id": 1, "segmentation": segmentation})
        with pytest.raises(ValueError, match=r"annotation 0 of a\.png has the segmentation .* expected polygons"):
            InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"category_id": 2}, "annotation 0 has the category 2, which is not one of the 1"),
            ({"bbox": [1, 2, float("nan"), 4]}, r"annotation 0 of a\.png has the box"),
            ({"bbox": [1, 2, 3, 4], "area": -1}, "has the area -1"),
            ({"image_id": 3}, "unknown image_id 3"),
            (
                {"segmentation": [[1, 1, 9, 1, 9, 1e300]]},
                r"has a corner at \(9, 1e\+300\), far outside of its 30x20 pixels",
            ),
        ],
    )
    def test_coco_has_the_checks_of_boxes(self, tmp_path, change, message):
        annotation = {"image_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]} | change
        write_coco(add_image(tmp_path), {1: "a.png"}, annotation)
        with pytest.raises(ValueError, match=message):
            InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")

    def test_coco_states_the_size_before_the_exif_orientation(self, tmp_path):
        write_coco(add_image(tmp_path), {1: "a.jpg"}, {"image_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]})
        exif = Image.Exif()
        exif[274] = 6  # rotated by 90 degrees
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "images" / "a.jpg", exif=exif)
        with pytest.raises(BrokenImageError, match="20x30 pixels upright, but its labels are for 30x20"):
            InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")[0]

    def test_coco_states_another_size(self, tmp_path):
        annotation = {"image_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}
        write_coco(add_image(tmp_path), {1: "a.png"}, annotation, size=(30, 20))
        with pytest.raises(BrokenImageError, match="30x20 pixels upright, but its labels are for 20x30"):
            InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")[0]

    def test_not_utf8(self, tmp_path):
        add_labels(add_image(tmp_path), SQUARE)
        (tmp_path / "labels" / "a.txt").write_bytes(b"\xff\xfe0 1")
        with pytest.raises(BrokenImageError, match=r"a\.txt is not UTF-8 text"):
            InstanceDataset.open(tmp_path)[0]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("1 0.1 0.2 0.3", r"a\.txt:2 is not a label"),
            ("1 0.1 0.2 0.3 0.4 1.2 0.5", r"outside \[0, 1\]"),
            ("1 0.1 0.2 nan 0.4", "is not a label"),
            ("1", "is not a label"),
            ("1 a b", "is not a label"),
            ("-1 0.5 0.5 0.1 0.1", "has the class -1"),
        ],
    )
    def test_invalid_labels(self, tmp_path, line, message):
        data = InstanceDataset.open(add_labels(add_image(tmp_path), SQUARE, line))
        with pytest.raises(BrokenImageError, match=rf"a\.png cannot be read: .*{message}"):
            data[0]

    def test_another_size(self, tmp_path):
        (add_image(tmp_path) / "masks").mkdir()
        Image.new("L", (10, 20), 1).save(tmp_path / "masks" / "a.png")
        with pytest.raises(BrokenImageError, match="30x20 pixels upright, but its masks are 10x20"):
            InstanceDataset.open(tmp_path)[0]

    def test_corrupt_image(self, tmp_path):
        data = InstanceDataset.open(add_labels(add_image(tmp_path), SQUARE))
        damage(tmp_path / "images" / "a.png")
        with pytest.raises(BrokenImageError, match=r"a\.png"):
            data[0]

    def test_jpeg_masks(self, tmp_path):
        (add_image(tmp_path) / "masks").mkdir()
        Image.new("L", SIZE[::-1], 1).save(tmp_path / "masks" / "a.jpg")
        with pytest.raises(ValueError, match="compression changes ids"):
            InstanceDataset.open(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "is not a COCO file"),
            (
                '{"images": [], "annotations": [{"image_id": 1}], "categories": []}',
                "number 0 of its annotations has no segmentation",
            ),
        ],
    )
    def test_invalid_coco_files(self, tmp_path, content, message):
        (add_image(tmp_path) / "coco.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            InstanceDataset.open(tmp_path / "images", instances=tmp_path / "coco.json")

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no dataset"):
            InstanceDataset.open(tmp_path / "gone")
        add_image(tmp_path)
        with pytest.raises(ValueError, match=r"no images with instances\. Expected images/ and masks/ or labels/, "):
            InstanceDataset.open(tmp_path)
        with pytest.raises(FileNotFoundError, match="no folder or file"):
            InstanceDataset.open(tmp_path / "images", instances=tmp_path / "labels")
        add_labels(tmp_path, SQUARE, name="other.txt")
        with pytest.raises(ValueError, match=r"None of the 1 images of .*images has a label file"):
            InstanceDataset.open(tmp_path)
        with pytest.raises(ValueError, match="min_area"):
            InstanceDataset.open(tmp_path, min_area=0)
