"""YOLO's files as Ultralytics reads them: the same rules for boxes and for masks."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from kornia_tinyvit.data import BrokenImageError, DetectionDataset, InstanceDataset

SPLITS = {"train": "train", "valid": "val"}  # Roboflow's folders
LABEL = "0 0.5 0.5 0.4 0.3\n"
READERS = pytest.mark.parametrize("reader", [DetectionDataset, InstanceDataset])


def write_roboflow(root: Path, yaml: str, label: str | bytes = LABEL) -> Path:
    """Write ``train`` and ``valid``, each with an image of 100x80 pixels and its labels."""
    for split in SPLITS:
        (root / split / "images").mkdir(parents=True)
        (root / split / "labels").mkdir()
        Image.new("RGB", (100, 80)).save(root / split / "images" / f"{split}.jpg")
        content = label if isinstance(label, bytes) else label.encode()
        (root / split / "labels" / f"{split}.txt").write_bytes(content)
    (root / "data.yaml").write_bytes(yaml.encode())
    return root / "data.yaml"


def count_objects(data) -> list[int]:
    return [len(each.labels if isinstance(data, DetectionDataset) else each) for _, each in data]


@READERS
class TestDescriptions:
    @pytest.mark.parametrize(
        "train",
        [
            "../train/images", "train/images", "./train/images", "..\\train\\images", "train\\images", "[train/images]",
            "train.txt", "'train/images'  # with a comment",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("path", ["", "path: .\n", "path: /content/another/machine\n"])
    def test_paths(self, tmp_path, reader, train, path):
        yaml = write_roboflow(tmp_path, f"{path}train: {train}\nval: ../valid/images\nnc: 1\nnames: ['cell']\n")
        (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf./train/images/train.jpg\r\n\r\n")
        data = reader.open(yaml)
        assert (Path(data.place(0)).name, count_objects(data)) == ("train.jpg", [1])
        assert Path(reader.open(yaml, "val").place(0)).name == "valid.jpg"

    @pytest.mark.parametrize("line", ["train\\images\\train.jpg", "./train/images/train.jpg", "train/images/train.jpg"])
    @pytest.mark.parametrize("place", ["train.txt", "lists/train.txt"])
    def test_lists(self, tmp_path, reader, line, place):
        yaml = write_roboflow(tmp_path, f"train: {place}\nnames: [cell]\n")
        (tmp_path / "lists").mkdir()
        (tmp_path / place).write_text(f"{line}\r\n")
        assert count_objects(reader.open(yaml)) == [1]

    def test_folders_of_several_splits(self, tmp_path, reader):
        yaml = write_roboflow(tmp_path, "train: [train/images, valid/images]\nnames: [cell]\n")
        assert count_objects(reader.open(yaml)) == [1, 1]

    @pytest.mark.parametrize("key", ["val", "valid", "validation"])
    def test_names_of_the_validation_split(self, tmp_path, reader, key):
        yaml = write_roboflow(tmp_path, f"train: train/images\n{key}: valid/images\nnames: [cell]\n")
        assert Path(reader.open(yaml, "val").place(0)).name == "valid.jpg"

    def test_path_relative_to_the_working_directory(self, tmp_path, reader, monkeypatch):
        yaml = write_roboflow(tmp_path / "data", "path: data\ntrain: train/images\nnames: [cell]\n")
        (tmp_path / "configs").mkdir()
        monkeypatch.chdir(tmp_path)
        assert count_objects(reader.open(yaml.rename(tmp_path / "configs" / "data.yaml"))) == [1]

    def test_keypoints(self, tmp_path, reader):
        yaml = "train: train/images\nnames: [cell]\nkpt_shape: [2, 2]\n"
        with pytest.raises(ValueError, match=r"data\.yaml describes keypoints \('kpt_shape'\), which are not read"):
            reader.open(write_roboflow(tmp_path, yaml, f"{LABEL.strip()} 0.1 0.1 0.2 0.2\n"))

    def test_mark_and_line_ends(self, tmp_path, reader):
        yaml = write_roboflow(tmp_path, "\ufefftrain: train/images\r\nnames:\r\n  0: cell\r\n")
        assert count_objects(reader.open(yaml)) == [1]


@READERS
class TestLabels:
    @pytest.mark.parametrize(
        "label", [b"\xef\xbb\xbf" + LABEL.encode(), LABEL.replace("\n", "\r\n\r\n"), f"\n{LABEL}\n  \n", LABEL * 3]
    )
    def test_tolerated(self, tmp_path, reader, label):
        data = reader.open(write_roboflow(tmp_path, "train: train/images\nnames: [cell]\n", label))
        assert count_objects(data) == [1]

    def test_background(self, tmp_path, reader):
        """An image with an empty label file or without one has no objects."""
        yaml = write_roboflow(tmp_path, "train: train/images\nnames: [cell]\n")
        for name in ("empty", "missing"):
            Image.new("RGB", (100, 80)).save(tmp_path / "train" / "images" / f"{name}.jpg")
        (tmp_path / "train" / "labels" / "empty.txt").write_text("\n")
        data = reader.open(yaml)
        assert count_objects(data) == [0, 0, 1]
        assert "1 image without a label file taken as background" in data.summary
        data.fingerprint()

    @pytest.mark.parametrize("label", ["0 0 0 1.00003 0 1 1", "0 0 0 1.009 -0.009 1.009 1"])
    def test_corners_at_the_edge_are_clamped(self, tmp_path, reader, label):
        data = reader.open(write_roboflow(tmp_path, "train: train/images\nnames: [cell]\n", label))
        _, found = data[0]
        if reader is DetectionDataset:
            assert found.boxes.tolist() == [[0, 0, 100, 80]]
        else:
            assert int(found.sum()) == 4000

    @pytest.mark.parametrize("label", ["0 0 0 1.02 0 1 1", "0 -0.02 0.5 0.1 0.1"])
    def test_corners_outside(self, tmp_path, reader, label):
        yaml = write_roboflow(tmp_path, "train: train/images\nnames: [cell]\n", f"{LABEL}{label}")
        with pytest.raises((ValueError, BrokenImageError), match=r"train\.txt:2 has values outside \[0, 1\]"):
            reader.open(yaml)[0]


class TestNames:
    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            ("names: [cat, dog]", ("cat", "dog")),
            ("names: {1: dog, 0: cat}", ("cat", "dog")),
            ("names: {'0': cat, '1': dog}", ("cat", "dog")),
            ("nc: 2\nnames:\n- cat\n- 'dog'  # quoted", ("cat", "dog")),
            ("nc: 2", ("class 0", "class 1")),
        ],
    )
    def test_forms(self, tmp_path, names, expected):
        assert (
            DetectionDataset.open(write_roboflow(tmp_path, f"train: train/images\n{names}\n")).class_names == expected
        )

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ("nc: 3\nnames: [cat, dog]", "has 2 'names', but 3 as 'nc'"),
            ("nc: many", "has many as 'nc'; expected the number of classes"),
            ("nc: 0", "expected 'names' and 'train'"),
            ("names: {1: cat, 2: dog}", "expected 0, 1, 2"),
        ],
    )
    def test_invalid(self, tmp_path, names, message):
        with pytest.raises(ValueError, match=message):
            DetectionDataset.open(write_roboflow(tmp_path, f"train: train/images\n{names}\n"))

    @pytest.mark.parametrize("entry", ["path: {long}\ntrain: train/images", "train: {long}"])
    def test_names_that_no_file_has(self, tmp_path, entry):
        path = write_roboflow(tmp_path, entry.format(long="x" * 300) + "\nnames: [cat]\n")
        if entry.startswith("path"):  # of another machine
            assert len(DetectionDataset.open(path)) == 1
        else:
            with pytest.raises(FileNotFoundError, match="There are no images"):
                DetectionDataset.open(path)

    def test_repeated_labels_are_counted(self, tmp_path):
        label = f"{LABEL}0 0.5 0.5 0.2 0.3\n{LABEL}"
        data = DetectionDataset.open(write_roboflow(tmp_path, "train: train/images\nnames: [cat]\n", label))
        assert [round(box[2] - box[0]) for box in data[0][1].boxes.tolist()] == [40, 20]
        assert data.summary == "1 image, 2 objects, 1 class; 1 repeated label left out"
