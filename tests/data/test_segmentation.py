"""Images with masks: pairing, ids and errors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kornia_tinyvit.data import IGNORED, BrokenImageError, SegmentationDataset
from tests.conftest import shared

NAMES = {0: "unlabeled", 3: "sky", 7: "road", 40: "tree"}


def write_pair(root: Path, stem: str, ids, suffix: str = ".jpg", mask_size=None) -> None:
    ids = np.asarray(ids)
    for kind in ("images", "masks"):
        (root / kind / stem).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", ids.shape[::-1], "red").save(root / "images" / f"{stem}{suffix}")
    mask = Image.fromarray(ids.astype(np.uint16 if ids.max() > 255 else np.uint8))
    mask.resize(mask_size or mask.size, Image.Resampling.NEAREST).save(root / "masks" / f"{stem}.png")


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pair(tmp_path, "a", [[0, 3, 7], [255, 40, 40]])
    write_pair(tmp_path, "street/b", np.full((5, 4), 7))
    return tmp_path


def opened(folder, classes=NAMES, **options) -> SegmentationDataset:
    return SegmentationDataset.open(folder / "images", classes=classes, masks=folder / "masks", **options)


class TestItems:
    def test_ids_are_converted_to_class_indices(self, folder):
        data = opened(folder)
        assert (len(data), data.num_classes, data.ids) == (2, 3, (3, 7, 40))
        assert data.class_names == ("sky", "road", "tree")
        image, mask = data[0]
        assert (image.shape, image.dtype) == ((3, 2, 3), torch.float32)
        assert image.max() <= 1
        assert mask.tolist() == [[IGNORED, 0, 1], [IGNORED, 2, 2]]
        assert (mask.dtype, data.name(1)) == (torch.int64, "street/b.jpg")
        assert [len(each) for each in data] == [2, 2]  # iteration terminates

    def test_without_names(self, folder):
        data = opened(folder, None)
        assert (data.ids, data.class_names[1]) == ((0, 3, 7, 40), "class 3")

    def test_names_in_order(self, tmp_path):
        write_pair(tmp_path, "a", [[0, 1], [2, 255]])
        data = opened(tmp_path, ["x", "void", "z"])
        assert data.class_names == ("x", "z")
        assert data[0][1].tolist() == [[0, IGNORED], [1, IGNORED]]

    def test_class_255(self, tmp_path):
        write_pair(tmp_path, "a", [[0, 255]])
        assert opened(tmp_path, {0: "ground", 255: "sky"})[0][1].tolist() == [[0, 1]]

    def test_ignored(self, folder):
        data = opened(folder, ignored=(7,))
        assert data.class_names == ("sky", "tree")
        assert (data[1][1] == IGNORED).all()

    def test_16_bits(self, tmp_path):
        write_pair(tmp_path, "a", [[0, 3000], [300, 2]])
        assert opened(tmp_path, None).ids == (0, 2, 300, 3000)
        assert opened(tmp_path, None)[0][1].tolist() == [[0, 3], [2, 1]]

    def test_palette(self, tmp_path):
        write_pair(tmp_path, "a", [[3, 7], [40, 7]])
        mask = Image.fromarray(np.array([[3, 7], [40, 7]], dtype=np.uint8))
        mask.putpalette([255, 0, 0] * 256)
        mask.save(tmp_path / "masks" / "a.png")
        assert Image.open(tmp_path / "masks" / "a.png").mode == "P"
        assert opened(tmp_path)[0][1].tolist() == [[0, 1], [2, 1]]

    def test_exif_orientation(self, tmp_path):
        write_pair(tmp_path, "a", np.full((3, 2), 7))
        exif = Image.Exif()
        exif[274] = 6  # rotated by 90 degrees
        Image.new("RGB", (3, 2)).save(tmp_path / "images" / "a.jpg", exif=exif)
        assert opened(tmp_path)[0][0].shape == (3, 3, 2)

    def test_unpaired(self, folder):
        (folder / "masks" / "a.png").unlink()
        (folder / "images" / "street" / "b.jpg").rename(folder / "images" / "street" / "c.jpg")
        write_pair(folder, "d", [[3]])
        data = opened(folder)
        assert (len(data), data.without_mask) == (1, ("a.jpg", "street/c.jpg"))
        assert data.without_image == ("street/b.png",)

    def test_sample(self, folder):
        for number in range(8):
            write_pair(folder, f"more{number}", [[3]])
        drawn = opened(folder).sample(4, seed=1)
        assert (len(drawn), drawn.class_names) == (4, opened(folder).class_names)
        assert [drawn.name(row) for row in range(4)] == [opened(folder).sample(4, seed=1).name(row) for row in range(4)]
        with pytest.raises(ValueError, match="Cannot sample 11 of 10"):
            opened(folder).sample(11)

    def test_fingerprint(self, folder, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("other") / "data"
        folder.rename(elsewhere)
        data = opened(elsewhere)
        first = data.fingerprint()
        elsewhere.rename(folder)
        assert opened(folder).fingerprint() == first
        assert opened(folder, {**NAMES, 7: "path"}).fingerprint() != first
        assert opened(folder).sample(1).fingerprint() != first

    def test_pickled(self, folder):
        again = pickle.loads(pickle.dumps(opened(folder)))
        assert torch.equal(again[0][1], opened(folder)[0][1])


class TestErrors:
    def test_names_not_in_utf8(self, folder):
        (folder / "classes.txt").write_bytes(b"sky\x80\nroad")
        with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 text"):
            SegmentationDataset.open(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"classes": 3}, "has the classes 3; expected names by id, or a list"),
            ({"classes": {"sky": 3}}, "must be integers"),
            ({"ignored": ["x"]}, "must be integers"),
            ({"ignored": 3}, "a list 'ignored' of ids"),
        ],
    )
    def test_invalid_descriptions(self, folder, changes, message):
        sections = {"train": {"images": "images", "masks": "masks"}}
        (folder / "data.json").write_text(json.dumps(sections | {"classes": ["sky", "road"]} | changes))
        with pytest.raises(ValueError, match=message):
            SegmentationDataset.open(folder / "data.json")

    def test_other_sizes(self, tmp_path):
        write_pair(tmp_path, "a", np.full((4, 6), 7), mask_size=(4, 6))
        with pytest.raises(BrokenImageError, match=r"a\.jpg is 6x4 pixels upright, but its mask .*a\.png is 4x6"):
            opened(tmp_path)[0]

    def test_unknown_ids(self, folder):
        with pytest.raises(BrokenImageError, match=r"a\.png holds the ids 40, which are not classes"):
            opened(folder, {3: "sky", 7: "road"}, ignored=(0,))[0]

    @pytest.mark.parametrize("kind", ["images/a.jpg", "masks/a.png"])
    @pytest.mark.parametrize("content", [b"", b"not an image", None])
    def test_corrupt(self, folder, kind, content):
        file = folder / kind
        file.write_bytes(file.read_bytes()[:40] if content is None else content)
        with pytest.raises(BrokenImageError, match=kind.split("/")[1]):
            opened(folder)[0]

    def test_color_mask(self, folder):
        Image.new("RGB", (3, 2)).save(folder / "masks" / "a.png")
        with pytest.raises(BrokenImageError, match=r"a\.png is not a mask: it has the mode RGB"):
            opened(folder)[0]

    def test_deleted_mask(self, folder):
        data = opened(folder)
        (folder / "masks" / "a.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"Mask .*a\.png no longer exists"):
            data[0]

    def test_jpeg_masks(self, folder):
        Image.new("L", (3, 2)).save(folder / "masks" / "a.jpg")
        (folder / "masks" / "a.png").unlink()
        with pytest.raises(ValueError, match=r"JPEG masks such as a\.jpg"):
            opened(folder)

    def test_two_files_of_the_same_name(self, folder):
        Image.new("RGB", (3, 2)).save(folder / "images" / "a.png")
        with pytest.raises(ValueError, match=r"both a\.jpg and a\.png"):
            opened(folder)

    def test_no_pairs(self, folder):
        with pytest.raises(ValueError, match=r"No image of .*: 2 images, 1 masks"):
            SegmentationDataset.open(folder / "images", classes=NAMES, masks=folder / "masks" / "street")

    def test_missing_folder(self, folder):
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            SegmentationDataset.open(folder / "images", classes=NAMES, masks=folder / "gone")

    @pytest.mark.parametrize("classes", [{-1: "a", 0: "b"}, {0: "b", 70000: "a"}, {0: "void", 1: "a"}, ["a"]])
    def test_ids_out_of_range(self, folder, classes):
        with pytest.raises(ValueError, match=r"at least two classes that are not ignored, with ids in"):
            opened(folder, classes)


class TestOpen:
    def test_folder(self, folder):
        (folder / "classes.txt").write_text("\n".join(f"name {index}" for index in range(41)))
        data = SegmentationDataset.open(folder)
        assert (data.num_classes, data.class_names[7]) == (41, "name 7")
        assert SegmentationDataset.open(folder, classes=NAMES).num_classes == 3

    def test_folder_of_splits(self, tmp_path):
        for split, ids in (("train", [[1]]), ("val", [[2]])):
            for kind in ("images", "masks"):
                write_pair(tmp_path / "data", "a", ids)
                (tmp_path / kind).mkdir(exist_ok=True)
                (tmp_path / "data" / kind).rename(tmp_path / kind / split)
        for split, index in (("train", 0), ("val", 1)):
            data = SegmentationDataset.open(tmp_path, split)
            assert (data.ids, data[0][1].tolist()) == ((1, 2), [[index]])  # the same classes in both

    @pytest.mark.parametrize("suffix", [".yaml", ".json"])
    def test_description(self, folder, suffix):
        content = {"train": {"images": "images", "masks": "masks"}, "classes": NAMES, "ignored": [7]}
        file = folder / f"data{suffix}"
        file.write_text(json.dumps(content))  # also valid YAML
        data = SegmentationDataset.open(file)
        assert data.class_names == ("sky", "tree")
        with pytest.raises(ValueError, match="has no split 'val'; expected one of train"):
            SegmentationDataset.open(file, "val")

    @pytest.mark.parametrize("content", ["[1", "- 1", "\t"])
    def test_invalid_files(self, tmp_path, content):
        (tmp_path / "data.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"data\.yaml"):
            SegmentationDataset.open(tmp_path / "data.yaml")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no dataset"):
            SegmentationDataset.open(tmp_path / "gone.yaml")


def write_binary(root: Path, masks=((0, 255), (0, 0)), dtype=np.uint8) -> Path:
    """Write masks of 0 and 255."""
    for number, ids in enumerate(masks):
        write_pair(root, f"{number}", [list(ids)])
        Image.fromarray(np.array([ids], dtype=dtype)).save(root / "masks" / f"{number}.png")
    return root


class TestBinaryMasks:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_without_names(self, tmp_path, dtype):
        write_binary(tmp_path, dtype=dtype)
        data = SegmentationDataset.open(tmp_path / "images", masks=tmp_path / "masks")
        assert (data.class_names, data.ids, data.ignored) == (("background", "object"), (0, 255), ())
        assert [mask.tolist() for _, mask in data] == [[[0, 1]], [[0, 0]]]
        assert data.summary == "2 images, 2 classes; 255 is the object, as the masks hold only 0 and 255"
        data.require_objects()

    def test_with_two_names(self, tmp_path):
        (write_binary(tmp_path) / "classes.txt").write_text("ground\ncell\n")
        data = SegmentationDataset.open(tmp_path)
        assert (data.class_names, data[0][1].tolist()) == (("ground", "cell"), [[0, 1]])
        assert "255 is 'cell'" in data.summary

    def test_one_other_id_makes_255_unlabeled(self, tmp_path):
        data = SegmentationDataset.open(write_binary(tmp_path, ((0, 255), (0, 1))))
        assert (data.ids, data.ignored) == ((0, 1), (255,))
        (tmp_path / "classes.txt").write_text("ground\ncell\n")
        assert SegmentationDataset.open(tmp_path)[0][1].tolist() == [[0, IGNORED]]

    def test_255_is_a_class_of_16_bits(self, tmp_path):
        data = SegmentationDataset.open(write_binary(tmp_path, ((0, 255), (0, 300)), np.uint16))
        assert data.ids == (0, 255, 300)
        with pytest.raises(BrokenImageError, match=r"0\.png holds the ids 255, which are not classes"):
            SegmentationDataset.open(tmp_path, classes={0: "ground", 300: "cell"})[0]

    @pytest.mark.parametrize("masks", [((0, 0),), ((7, 255),), ((255, 255),)])
    def test_one_class(self, tmp_path, masks):
        with pytest.raises(
            ValueError, match=r"All labeled pixels of 1 mask have the id .*expected at least two classes"
        ):
            SegmentationDataset.open(write_binary(tmp_path, masks))

    def test_one_class_of_several_names(self, tmp_path):
        (write_binary(tmp_path, ((0, 0), (0, 255))) / "classes.txt").write_text("ground\ncell\ntree\n")
        with pytest.raises(ValueError, match=r"2 masks have the class 'ground', .*0\.png.* Ignored ids: 255\."):
            SegmentationDataset.open(tmp_path).require_objects()


class TestClasses:
    def open(self, root, ids, names=None):
        write_pair(root, "a", ids)
        if names is not None:
            (root / "classes.txt").write_text(names)
        return SegmentationDataset.open(root)

    @pytest.mark.parametrize(
        "names", ["\ufeffsky\nroad\ntree\n", "sky\r\nroad\r\ntree\r\n\r\n", "sky \nroad\ntree\n\n\n"]
    )
    def test_lines(self, tmp_path, names):
        assert self.open(tmp_path, [[0, 2]], names).class_names == ("sky", "road", "tree")

    def test_blank_line_between_names(self, tmp_path):
        with pytest.raises(ValueError, match=r"classes\.txt:2 is blank; expected the name of class 1"):
            self.open(tmp_path, [[0, 2]], "sky\n\ntree\n")

    @pytest.mark.parametrize(
        ("ids", "names", "network", "expected"),
        [
            ([[0, 1]], "sky\nroad", ("road", "tree", "sky"), [[2, 0]]),  # by name
            ([[0, 7]], None, ("class 0", "class 3", "class 7"), [[0, 2]]),  # the ids of a split that lacks one
            ([[1, 2]], None, ("sky", "road", "tree"), [[1, 2]]),  # ids are indices where only the network has names
            ([[0, 255]], None, ("ground", "cell"), [[0, 1]]),
            ([[0, 1]], "sky\nroad", ("class 0", "class 1"), [[0, 1]]),  # the network has no names
        ],
    )
    def test_of_a_network(self, tmp_path, ids, names, network, expected):
        data = self.open(tmp_path, ids, names).with_classes(network)
        assert (data.class_names, data.num_classes) == (network, len(network))
        assert data[0][1].tolist() == expected
        assert len(data.ids) == len(network)

    @pytest.mark.parametrize(
        ("ids", "names", "network"),
        [
            ([[0, 1]], "sky\nroad", ("sky", "tree")),
            ([[0, 1]], "sky\nroad", ("tree", "ground")),
            ([[0, 9]], None, ("class 0", "class 3")),
            ([[0, 2]], None, ("sky", "road")),
        ],
    )
    def test_that_a_network_lacks(self, tmp_path, ids, names, network):
        with pytest.raises(ValueError, match=r"has the classes .* but the network has .* matched by name"):
            self.open(tmp_path, ids, names).with_classes(network)

    def test_of_another_split(self, tmp_path):
        data = self.open(tmp_path / "train", [[0, 1, 2]], "sky\nvoid\ntree")
        named = data.open_split(self.open(tmp_path / "named", [[0, 1]], "tree\nsky") and tmp_path / "named")
        assert (named.class_names, named[0][1].tolist()) == (("sky", "tree"), [[1, 0]])
        write_pair(tmp_path / "unnamed", "a", [[2, 1]])
        unnamed = data.open_split(tmp_path / "unnamed")
        assert (unnamed.class_names, unnamed[0][1].tolist()) == (("sky", "tree"), [[1, IGNORED]])


def test_corrupt_masks_are_left_out_of_the_ids(tmp_path):
    """They are reported when the sample is read, as --on-broken asks."""
    write_pair(tmp_path, "a", [[0, 1]])
    write_pair(tmp_path, "b", [[0, 1]])
    (tmp_path / "masks" / "b.png").write_bytes(b"no image")
    data = SegmentationDataset.open(tmp_path)
    assert data.ids == (0, 1)
    with pytest.raises(BrokenImageError, match=r"b\.png"):
        data[1]


def test_coco128():
    data = SegmentationDataset.open(shared("data/coco128/semantic_segmentation/config.yaml"))
    assert (len(data), data.num_classes, len(data.without_mask), data.without_image) == (100, 129, 28, ())
    image, mask = data[0]
    assert image.shape[1:] == mask.shape
    assert 0 <= mask[mask != IGNORED].min() <= mask.max() < 129
