import io
import json
import pickle
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import BrokenImageError, match_classes
from kornia_tinyvit.data.splits import MissingSplitError
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.images import read_image, read_pixels

FILES = ["ant/1.png", "cat/0.bmp", "cat/young/1.png", "dog/10.JPG", "dog/2.png"]


def as_lists(items):
    """Collate images of different sizes for a data loader."""
    images, labels = zip(*items, strict=True)
    return list(images), torch.tensor(labels)


def photo(shade: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, (shade, 0, 255 - shade))


@pytest.fixture
def folder(tmp_path):
    """Three classes, one of them with a subfolder, among files that are not images."""
    root = tmp_path / "pets"
    for number, name in enumerate(("dog/2.png", "dog/10.JPG", "ant/1.png", "cat/young/1.png", "cat/0.bmp")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photo(40 * number, (8 + number, 6)).save(root / name)
    (root / "readme.txt").write_text("not a class")
    (root / "dog" / "labels.csv").write_text("not an image")
    photo(255).save(root / "outside.png")
    return root


def pack(root, path, files, top=""):
    """Write files of a folder to a tar file, in the given order and without entries for folders."""
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(root / file, f"{top}{file}", recursive=False)
    return path


def write_parquet(path, photos, labels, column="image"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = []
    for each in photos:
        buffer = io.BytesIO()
        each.save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({column: images, "label": labels, "other": ["x"] * len(labels)}), path)
    return path


class TestFolder:
    def test_classes_and_order(self, folder):
        data = ClassificationDataset.open(folder)
        assert data.class_names == ("ant", "cat", "dog")
        assert data.labels == [0, 1, 1, 2, 2]
        assert len(data) == 5
        for index, file in enumerate(FILES):
            image, label = data[index]
            assert torch.equal(image, read_image(folder / file))
            assert torch.equal(data.read(index)[0], read_pixels(folder / file))
            assert label == data.labels[index]
            assert data.name(index) == file
        assert data.name(-1) == FILES[-1]
        assert torch.equal(data[-1][0], data[4][0])
        with pytest.raises(IndexError):
            data.read(5)[0]

    def test_hidden_files(self, folder):
        (folder / "cat" / ".thumbnails").mkdir()
        for name in (".thumbnails/0.png", "._0.png"):
            photo(0).save(folder / "cat" / name)
        (folder / ".cache").mkdir()
        photo(0).save(folder / ".cache" / "1.png")
        data = ClassificationDataset.open(folder)
        assert [data.name(index) for index in range(len(data))] == FILES
        assert data.class_names == ("ant", "cat", "dog")

    def test_class_without_images(self, folder):
        (folder / "bee").mkdir()
        data = ClassificationDataset.open(folder)
        assert data.class_names == ("ant", "bee", "cat", "dog")
        assert data.labels == [0, 2, 2, 3, 3]
        assert data.num_classes == 4

    def test_folder_named_like_an_image(self, folder):
        (folder / "cat" / "album.png").mkdir()
        assert len(ClassificationDataset.open(folder)) == 5

    def test_class_folders_come_before_other_files(self, folder):
        (folder / "index.parquet").write_bytes(b"")
        pack(folder, folder.parent / "dog.tar", ["dog/2.png"])
        shutil.move(folder.parent / "dog.tar", folder)
        assert ClassificationDataset.open(folder).labels == [0, 1, 1, 2, 2]

    def test_deep_image(self, folder):
        pixels = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
        Image.fromarray(pixels).save(folder / "ant" / "1.png")
        data = ClassificationDataset.open(folder)
        assert torch.equal(data[0][0], read_image(folder / "ant" / "1.png"))
        assert (data.read(0)[0] / 255 - data[0][0]).abs().max() <= 0.5 / 255 + 1e-6

    def test_string_path(self, folder):
        assert ClassificationDataset.open(str(folder)).labels == ClassificationDataset.open(folder).labels

    def test_corrupt_image(self, folder):
        (folder / "ant" / "1.png").write_bytes(b"not an image")
        for read in (ClassificationDataset.open(folder).__getitem__, ClassificationDataset.open(folder).read):
            with pytest.raises(BrokenImageError, match=r"ant.1\.png is not an image that can be read: Pillow does"):
                read(0)
        (folder / "ant" / "1.png").write_bytes((folder / "dog" / "2.png").read_bytes()[:45])
        with pytest.raises(BrokenImageError, match=r"ant.1\.png is not an image that can be read"):
            ClassificationDataset.open(folder)[0]

    def test_corrupt_image_in_a_worker(self, folder):
        (folder / "ant" / "1.png").write_bytes(b"not an image")
        with pytest.raises(BrokenImageError, match=r"ant.1\.png"):
            next(iter(DataLoader(ClassificationDataset.open(folder), 5, num_workers=1, collate_fn=as_lists)))

    def test_deleted_image(self, folder):
        data = ClassificationDataset.open(folder)
        (folder / "ant" / "1.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"Image .*ant.1\.png no longer exists"):
            data[0]

    def test_empty(self, tmp_path):
        with pytest.raises(ValueError, match="holds no images in class folders"):
            ClassificationDataset.open(tmp_path)
        (tmp_path / "cat").mkdir()
        with pytest.raises(ValueError, match="holds no images in class folders"):
            ClassificationDataset.open(tmp_path)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"There is no dataset .*nowhere; expected a folder"):
            ClassificationDataset.open(tmp_path / "nowhere")


class TestScan:
    def test_skipped_files_are_counted(self, folder):
        for junk in ("cat/Thumbs.db", "cat/.DS_Store", "cat/._0.bmp", "dog/desktop.ini"):
            (folder / junk).write_bytes(b"")
        for junk in ("__MACOSX", "dog/@eaDir"):
            (folder / junk).mkdir()
            photo(0).save(folder / junk / "1.png")
        for other in ("notes.txt", "meta.json", "a.h5", "b.mpeg", "LICENSE"):
            (folder / "cat" / other).write_text("")
        (folder / "ant" / "gone.png").symlink_to(folder / "nowhere.png")
        data = ClassificationDataset.open(folder)
        assert [data.name(index) for index in range(len(data))] == FILES
        assert data.skipped == {
            "hidden or system file{s}": 6, "dangling link{s}": 1, "image{s} outside of class folders": 1, ".csv": 1,
            ".txt": 2, ".json": 1, ".h5": 1, ".mpeg": 1, "file{s} without a suffix": 1,
        }  # fmt: skip
        assert data.summary.startswith("5 images, 3 classes; skipped 6 hidden or system files, 2 .txt, 1 .csv, ")
        assert "1 dangling link, 1 file without a suffix, 1 image outside of class folders" in data.summary

    def test_classes_without_images_are_noted(self, folder):
        (folder / "bee").mkdir()
        assert ", 4 classes, 1 without images (bee); " in ClassificationDataset.open(folder).summary

    @pytest.mark.slow
    def test_many_images(self, tmp_path):
        (tmp_path / "cat").mkdir()
        for number in range(1001):
            (tmp_path / "cat" / f"{number}.jpg").touch()
        assert ClassificationDataset.open(tmp_path).summary.startswith("1,001 images, 1 class; ")

    @pytest.mark.parametrize("suffix", ["HEIC", "heif", "AVIF", "WebP", "jp2", "TIFF", "jfif", "mpo", "qoi"])
    def test_everything_that_pillow_decodes(self, tmp_path, suffix):
        if suffix.lower().startswith("hei"):
            pytest.importorskip("pillow_heif")
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / f"1.{suffix}").touch()
        assert len(ClassificationDataset.open(tmp_path)) == 1

    def test_heif_is_counted_without_its_package(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        monkeypatch.setattr("kornia_tinyvit.data.folders.find_spec", lambda name: None)
        monkeypatch.setattr(Image, "EXTENSION", {k: v for k, v in Image.EXTENSION.items() if v != "HEIF"})
        (folder / "cat" / "1.HEIC").touch()
        assert "1 .heic" in ClassificationDataset.open(folder).summary

    def test_linked_folders_are_followed_once(self, folder, tmp_path):
        photo(1).save(folder / "dog" / "3.png")
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "puppy").symlink_to(folder / "dog", target_is_directory=True)
        (folder / "dog" / "loop").symlink_to(folder, target_is_directory=True)
        (folder / "dog" / "self").symlink_to(folder / "dog" / "self")
        data = ClassificationDataset.open(tmp_path / "linked")
        assert (data.class_names, len(data)) == (("puppy",), 7)  # three dogs, and the others by the loop
        assert data.skipped["cyclic link{s}"] == 1
        assert data.skipped["dangling link{s}"] == 1
        loop = ClassificationDataset.open(folder)
        assert (len(loop), loop.skipped["cyclic link{s}"]) == (6, 1)


class TestSplits:
    def divide(self, folder, root, names, wanted=("ant", "cat", "dog")):
        for name in names:
            for each in wanted:
                shutil.copytree(folder / each, root / name / each)
        return root

    @pytest.mark.parametrize(
        "names", [("train", "val"), ("train", "valid"), ("training", "validation", "test"), ("Train", "Val")]
    )
    def test_folders(self, folder, tmp_path, names):
        root = self.divide(folder, tmp_path / "data", names)
        (root / names[1] / "dog" / "2.png").unlink()
        for split, count in (("train", 5), ("val", 4)):
            data = ClassificationDataset.open(root, split)
            assert (data.class_names, len(data)) == (("ant", "cat", "dog"), count)
            assert data.is_divided
        assert len(ClassificationDataset.open(root)) == 5
        with pytest.raises(MissingSplitError) as error:
            ClassificationDataset.open(root, "nonsense")
        assert f"has no split 'nonsense'; expected one of {', '.join(sorted(names))}." in str(error.value)

    def test_tests_without_classes(self, folder, tmp_path):
        """The layout of Kaggle's competitions."""
        root = self.divide(folder, tmp_path / "data", ("train",))
        (root / "test").mkdir()
        photo(0).save(root / "test" / "1.png")
        assert ClassificationDataset.open(root).class_names == ("ant", "cat", "dog")

    def test_a_class_that_is_called_train(self, tmp_path):
        for name in ("train", "car"):
            (tmp_path / name / "side").mkdir(parents=True)
            photo(0).save(tmp_path / name / "side" / "1.png")
        assert ClassificationDataset.open(tmp_path).class_names == ("car", "train")

    def test_undivided(self, folder):
        data = ClassificationDataset.open(folder, "val")
        assert not data.is_divided
        assert data.summary.endswith("; not divided into splits")
        with pytest.raises(MissingSplitError, match="is not divided into splits; it has no split 'nonsense'"):
            ClassificationDataset.open(folder, "nonsense")

    def test_tars(self, folder, tmp_path):
        root = self.divide(folder, tmp_path / "data", ("train",))
        self.divide(folder, root, ("val",), ("cat", "dog"))
        with tarfile.open(tmp_path / "data.tar", "w") as tar:
            tar.add(root, "data")
        archives = tmp_path / "archives"
        archives.mkdir()
        for split in ("train", "val"):
            with tarfile.open(archives / f"{split}.tar", "w") as tar:
                tar.add(root / split, split)
        for path in (tmp_path / "data.tar", archives):
            assert len(ClassificationDataset.open(path)) == 5
            assert ClassificationDataset.open(path, "validation").class_names == ("cat", "dog")
            assert ClassificationDataset.open(path).is_divided
            with pytest.raises(MissingSplitError, match="has no split 'test'; expected one of train, val"):
                ClassificationDataset.open(path, "test")

    def test_parquet_of_each_split_in_a_folder(self, tmp_path):
        pytest.importorskip("pyarrow")
        for label, split in enumerate(("train", "test")):
            (tmp_path / split).mkdir()
            write_parquet(tmp_path / split / "0000.parquet", [photo(0)], [label])
        assert ClassificationDataset.open(tmp_path).labels == [0]
        assert ClassificationDataset.open(tmp_path, "test").labels == [1]


class TestPixels:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_as_images(self, mode, channels):
        shades = photo(200)
        shades.putpixel((2, 3), (7, 90, 31))
        pixels = read_pixels(shades.convert(mode), channels)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (channels, 6, 8))
        assert torch.equal(pixels.float() / 255, read_image(shades.convert(mode), channels))

    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_16_bits_are_rounded(self, tmp_path, channels):
        Image.fromarray(np.array([[0, 128, 129, 385, 386, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
        pixels = read_pixels(tmp_path / "deep.png", channels)
        assert pixels.dtype == torch.uint8
        assert pixels[:3].tolist() == [[[0, 0, 1, 1, 2, 255]]] * min(channels, 3)
        assert (pixels[3:] == 255).all()

    def test_exif_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        photo = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
        photo.save(tmp_path / "photo.png", exif=exif)
        pixels = read_pixels(tmp_path / "photo.png")
        assert torch.equal(pixels, read_pixels(photo).rot90(-1, (1, 2)))
        assert torch.equal(pixels.float() / 255, read_image(tmp_path / "photo.png"))

    def test_the_image_is_not_modified(self):
        image = photo(10)
        read_pixels(image).zero_()
        assert image.getpixel((0, 0)) == (10, 0, 245)

    @pytest.mark.parametrize("mode", ["RGB", "I;16"])
    def test_no_mode_of_two_channels(self, mode):
        with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
            read_pixels(Image.new(mode, (2, 2)), 2)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"There is no image .*missing\.jpg"):
            read_pixels(tmp_path / "missing.jpg")


class TestParquet:
    @pytest.mark.parametrize("column", ["image", "img"])
    def test_reads(self, tmp_path, column):
        pytest.importorskip("pyarrow")
        photos = [photo(10), photo(200, (5, 9)), photo(90)]
        data = ClassificationDataset.open(write_parquet(tmp_path / "test.parquet", photos, [3, 0, 3], column))
        assert data.class_names is None
        assert data.labels == [3, 0, 3]
        assert len(data) == 3
        image, label = data[1]
        assert label == 0
        assert image.shape == (3, 9, 5)
        torch.testing.assert_close(image[:, 0, 0], torch.tensor([200, 0, 55]) / 255)

    @pytest.mark.parametrize("columns", [{"label": [1]}, {"image": [{"bytes": b""}]}, {"image": ["x"], "label": [1]}])
    def test_other_columns(self, tmp_path, columns):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), tmp_path / "other.parquet")
        with pytest.raises(ValueError, match=r"other\.parquet has .* expected (encoded images|images in one of image)"):
            ClassificationDataset.open(tmp_path / "other.parquet")

    def test_no_parquet(self, tmp_path):
        pytest.importorskip("pyarrow")
        whole = write_parquet(tmp_path / "whole.parquet", [photo(0)], [0]).read_bytes()
        length = int.from_bytes(whole[-8:-4], "little")  # of the footer
        (tmp_path / "thrift.parquet").write_bytes(whole[: -8 - length] + bytes(length) + whole[-8:])
        with pytest.raises(ValueError, match=r"thrift\.parquet is not a parquet file"):
            ClassificationDataset.open(tmp_path / "thrift.parquet")
        (tmp_path / "notes.parquet").write_text("not parquet")
        with pytest.raises(ValueError, match=r"notes\.parquet is not a parquet file"):
            ClassificationDataset.open(tmp_path / "notes.parquet")

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        (tmp_path / "test.parquet").write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'kornia-tinyvit\[train\]'"):
            ClassificationDataset.open(tmp_path / "test.parquet")
        assert issubclass(MissingExtraError, ImportError)

    def test_folders_need_no_pyarrow(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert len(ClassificationDataset.open(folder)) == 5

    def test_parts(self, tmp_path):
        pytest.importorskip("pyarrow")
        photos = [photo(20 * number, (5 + number, 6)) for number in range(7)]
        write_parquet(tmp_path / "train-00001-of-00002.parquet", photos[4:], [0, 1, 4])
        write_parquet(tmp_path / "train-00000-of-00002.parquet", photos[:4], [3, 0, 3, 2])
        (tmp_path / "README.md").write_text("about it")
        (tmp_path / ".train.parquet").write_text("an incomplete download")
        data = ClassificationDataset.open(tmp_path)
        assert data.labels == [3, 0, 3, 2, 0, 1, 4]
        assert data.num_classes == 5
        assert [data[index][0].shape[2] for index in range(7)] == [5, 6, 7, 8, 9, 10, 11]
        assert [data.read(index)[0][0, 0, 0].item() for index in range(7)] == [0, 20, 40, 60, 80, 100, 120]
        assert data.name(3) == "train-00000-of-00002.parquet row 3"
        assert data.name(4) == "train-00001-of-00002.parquet row 0"
        with pytest.raises(IndexError):
            data[7]

    def test_parts_of_two_splits(self, tmp_path):
        pytest.importorskip("pyarrow")
        for name in ("train-00000-of-00001", "test-00000-of-00001"):
            write_parquet(tmp_path / f"{name}.parquet", [photo(0)], [0])
        write_parquet(tmp_path / "test-00000-of-00001.parquet", [photo(0)], [5])
        assert ClassificationDataset.open(tmp_path).labels == [0]
        assert ClassificationDataset.open(tmp_path, "test").labels == [5]
        with pytest.raises(MissingSplitError, match="has no split 'validation'; expected one of test, train"):
            ClassificationDataset.open(tmp_path, "validation")

    def test_many_row_groups(self, tmp_path):
        pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        path = write_parquet(tmp_path / "test.parquet", [photo(number) for number in range(9)], list(range(9)))
        pq.write_table(pq.read_table(path), path, row_group_size=2)
        data = ClassificationDataset.open(path)
        assert [data.read(index)[0][0, 0, 0].item() for index in range(9)] == list(range(9))

    @pytest.mark.parametrize("content", [b"not an image", b"", None])
    def test_corrupt_row_is_named(self, tmp_path, content):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        images = [{"bytes": each, "path": "1.png"} for each in (b"any", b"any", content)]
        pq.write_table(pa.table({"image": images, "label": [0, 0, 0]}), tmp_path / "test.parquet")
        for read in (
            ClassificationDataset.open(tmp_path / "test.parquet").__getitem__,
            ClassificationDataset.open(tmp_path).read,
        ):
            with pytest.raises(BrokenImageError, match=r"test\.parquet row 2 is not an image that can be read"):
                read(2)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, -1], "row 1 has the label -1; expected a class index from 0"),
            ([None, 1], "row 0 has no label"),
            ([None, "cat"], "row 0 has no label"),
            ([0.0, 1.0], "has labels of the type double; expected class indices or names"),
        ],
    )
    def test_invalid_labels(self, tmp_path, labels, message):
        pytest.importorskip("pyarrow")
        with pytest.raises(ValueError, match=rf"test\.parquet {message}"):
            ClassificationDataset.open(write_parquet(tmp_path / "test.parquet", [photo(0)] * 2, labels))

    def test_pickled(self, tmp_path):
        pytest.importorskip("pyarrow")
        photos = [Image.effect_noise((64, 64), 50) for _ in range(20)]
        data = ClassificationDataset.open(write_parquet(tmp_path / "test.parquet", photos, [1] * 20))
        pickled = pickle.dumps(data)
        assert len(pickled) < 2000  # without the images
        assert torch.equal(pickle.loads(pickled).read(7)[0], data.read(7)[0])


class TestParquetColumns:
    def write(self, path, columns, features=None):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        table = pa.table(columns)
        if features is not None:
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, path / "train.parquet")
        return path / "train.parquet"

    def encoded(self, shade):
        buffer = io.BytesIO()
        photo(shade).save(buffer, "PNG")
        return buffer.getvalue()

    def test_class_names_of_the_metadata(self, tmp_path):
        features = {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        columns = {"image": [{"bytes": self.encoded(0)}] * 3, "label": [1, 0, 1]}
        data = ClassificationDataset.open(self.write(tmp_path, columns, features))
        assert (data.class_names, data.num_classes) == (("dog", "cat"), 2)
        assert data.with_classes(("cat", "cow", "dog")).labels == [0, 2, 0]
        assert pickle.loads(pickle.dumps(data)).class_names == ("dog", "cat")
        columns["label"] = [0, 2, 0]
        with pytest.raises(ValueError, match="row 1 has the label 2; expected a class index from 0 below 2"):
            ClassificationDataset.open(self.write(tmp_path, columns, features))

    @pytest.mark.parametrize("metadata", ["x", "[]", '{"info": null}', '{"info": {"features": []}}'])
    def test_other_metadata(self, tmp_path, metadata):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        table = pa.table({"image": [{"bytes": self.encoded(0)}], "label": [0]})
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
        assert ClassificationDataset.open(tmp_path / "a.parquet").class_names is None

    @pytest.mark.parametrize("kind", ["binary", "large_binary"])
    @pytest.mark.parametrize(("image", "label"), [("jpg", "cls"), ("png", "labels"), ("img", "fine_label")])
    def test_binary_images(self, tmp_path, kind, image, label):
        pa = pytest.importorskip("pyarrow")
        values = pa.array([self.encoded(0), self.encoded(200)], getattr(pa, kind)())
        data = ClassificationDataset.open(self.write(tmp_path, {image: values, label: [0, 1], "coarse_label": [5, 5]}))
        assert data.labels == [0, 1]
        assert data.read(1)[0][0, 0, 0] == 200

    def test_columns_of_other_names(self, tmp_path):
        features = {"scan": {"_type": "Image"}, "kind": {"names": ["a", "b"], "_type": "ClassLabel"}}
        columns = {"scan": [{"bytes": self.encoded(7)}], "kind": [1]}
        assert ClassificationDataset.open(self.write(tmp_path, columns, features)).labels == [1]
        with pytest.raises(ValueError, match=r"has the columns scan, kind; expected images in one of image, img, jpg"):
            ClassificationDataset.open(self.write(tmp_path, columns))

    @pytest.mark.parametrize("encode", [False, True])
    def test_names_as_labels(self, tmp_path, encode):
        pa = pytest.importorskip("pyarrow")
        names = pa.array(["owl", "cat", "owl"])
        columns = {"image": [{"bytes": self.encoded(0)}] * 3, "label": names.dictionary_encode() if encode else names}
        data = ClassificationDataset.open(self.write(tmp_path, columns))
        assert (data.class_names, data.labels) == (("cat", "owl"), [1, 0, 1])

    def test_parts_that_differ(self, tmp_path):
        columns = {"image": [{"bytes": self.encoded(0)}], "label": [0]}
        for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
            path = self.write(tmp_path, columns, {"label": {"names": names, "_type": "ClassLabel"}})
            path.rename(tmp_path / f"train-{number}.parquet")
        with pytest.raises(ValueError, match="name their classes differently"):
            ClassificationDataset.open(tmp_path)


class TestTar:
    @pytest.mark.parametrize("top", ["", "./", "pets/", "./pets/", "/pets/"])
    def test_equals_the_folder(self, folder, tmp_path, top):
        files = ["outside.png", "readme.txt", "dog/labels.csv", *reversed(FILES)]
        data = ClassificationDataset.open(pack(folder, tmp_path / "images.tar", files, top))
        expected = ClassificationDataset.open(folder)
        assert data.class_names == expected.class_names
        assert data.labels == expected.labels
        assert data.num_classes == 3
        for index, file in enumerate(FILES):
            assert torch.equal(data[index][0], expected[index][0])
            assert torch.equal(data.read(index)[0], expected.read(index)[0])
            assert data.name(index) == f"images.tar: {top.strip('./') and 'pets/'}{file}"

    def test_folders_of_the_archive(self, folder, tmp_path):
        (folder / "bee").mkdir()
        (folder / "cat" / "._0.bmp").write_text("metadata of macOS")
        with tarfile.open(tmp_path / "images.tar", "w") as tar:
            tar.add(folder, "pets")
        data = ClassificationDataset.open(tmp_path / "images.tar")
        assert data.class_names == ("ant", "bee", "cat", "dog")
        assert data.labels == [0, 2, 2, 3, 3]

    def test_one_class(self, folder, tmp_path):
        data = ClassificationDataset.open(pack(folder, tmp_path / "images.tar", ["dog/2.png", "dog/10.JPG"]))
        assert (data.class_names, data.labels) == (("dog",), [0, 0])

    def archives(self, folder, root):
        root.mkdir()
        for name in ("dog", "ant", "cat"):
            files = [file.removeprefix(f"{name}/") for file in FILES if file.startswith(name)]
            pack(folder / name, root / f"{name}.tar", files)
        return root

    def test_one_archive_per_class(self, folder, tmp_path):
        data = ClassificationDataset.open(self.archives(folder, tmp_path / "imagenet"))
        expected = ClassificationDataset.open(folder)
        assert data.class_names == ("ant", "cat", "dog")
        assert data.labels == expected.labels
        assert data.name(2) == "cat.tar: young/1.png"
        for index in range(5):
            assert torch.equal(data.read(index)[0], expected.read(index)[0])

    def test_archives_in_an_archive(self, folder, tmp_path):
        archives = self.archives(folder, tmp_path / "imagenet")
        data = ClassificationDataset.open(pack(archives, tmp_path / "train.tar", ["dog.tar", "cat.tar", "ant.tar"]))
        expected = ClassificationDataset.open(folder)
        assert (data.class_names, data.labels) == (expected.class_names, expected.labels)
        for index, file in enumerate(FILES):
            assert torch.equal(data.read(index)[0], expected.read(index)[0])
            assert data.name(index) == f"train.tar: {file}"

    def test_hard_links(self, folder, tmp_path):
        (folder / "dog" / "3.png").hardlink_to(folder / "dog" / "2.png")
        data = ClassificationDataset.open(
            pack(folder, tmp_path / "images.tar", ["ant/1.png", "dog/2.png", "dog/3.png"])
        )
        assert data.labels == [0, 1, 1]
        assert torch.equal(data.read(1)[0], data.read(2)[0])

    def test_long_names(self, folder, tmp_path):
        long = f"dog/{'very ' * 40}long.png"
        shutil.copy(folder / "dog" / "2.png", folder / long)
        data = ClassificationDataset.open(pack(folder, tmp_path / "images.tar", [long, "dog/2.png", "ant/1.png"]))
        assert data.name(2) == f"images.tar: {long}"
        assert torch.equal(data.read(2)[0], data.read(1)[0])

    def test_corrupt_image_is_named(self, folder, tmp_path):
        (folder / "cat" / "0.bmp").write_bytes(b"not an image")
        data = ClassificationDataset.open(pack(folder, tmp_path / "images.tar", FILES))
        with pytest.raises(BrokenImageError, match=r"images\.tar: cat/0\.bmp is not an image"):
            data.read(1)[0]
        data.read(2)[0]

    def test_truncated_archive(self, folder, tmp_path):
        path = pack(folder, tmp_path / "images.tar", FILES)
        data = ClassificationDataset.open(path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(BrokenImageError, match=r"2\.png is not .*: the tar file ends after 0 of its \d+ bytes"):
            data[4]

    def test_compressed(self, folder, tmp_path):
        path = tmp_path / "images.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(folder, "")
        with pytest.raises(ValueError, match=r"images\.tar\.gz is compressed"):
            ClassificationDataset.open(path)
        with pytest.raises(ValueError, match=r"images\.tar is not a tar file, or is compressed"):
            ClassificationDataset.open(path.rename(tmp_path / "images.tar"))

    @pytest.mark.parametrize("top", ["", "./"])
    def test_a_class_with_subfolders(self, folder, tmp_path, top):
        """As in a folder, the class is the top folder."""
        (folder / "cat" / "0.bmp").rename(folder / "cat" / "young" / "0.bmp")
        path = pack(folder, tmp_path / "a.tar", ["cat/young/0.bmp", "cat/young/1.png"], top)
        assert ClassificationDataset.open(path).class_names == ("cat",)

    def test_archive_of_its_own_name(self, folder, tmp_path):
        path = pack(folder, tmp_path / "pets.tar", ["cat/young/1.png"], "pets/")
        assert ClassificationDataset.open(path).class_names == ("cat",)

    def test_symbolic_links_and_junk(self, folder, tmp_path):
        (folder / "dog" / "3.png").symlink_to("../ant/1.png")
        (folder / "dog" / "4.png").symlink_to("gone.png")
        (folder / "__MACOSX").mkdir()
        (folder / "__MACOSX" / "1.png").write_bytes(b"")
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(folder, "")
        data = ClassificationDataset.open(tmp_path / "a.tar")
        assert data.labels == [0, 1, 1, 2, 2, 2]
        assert torch.equal(data.read(5)[0], data.read(0)[0])
        assert data.class_names == ("ant", "cat", "dog")
        assert data.skipped["dangling link{s}"] == data.skipped["hidden or system file{s}"] == 1
        assert "1 .txt" in data.summary

    def test_no_images(self, folder, tmp_path):
        with pytest.raises(ValueError, match="holds no images in class folders"):
            ClassificationDataset.open(pack(folder, tmp_path / "images.tar", ["readme.txt", "outside.png"]))

    def test_processes_and_threads(self, folder, tmp_path):
        data = ClassificationDataset.open(pack(folder, tmp_path / "images.tar", FILES))
        expected = [data.read(index)[0] for index in range(5)] * 20
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda index: data.read(index)[0], [0, 1, 2, 3, 4] * 20))
        assert all(map(torch.equal, found, expected))
        again = pickle.loads(pickle.dumps(data))
        assert torch.equal(again.read(3)[0], data.read(3)[0])
        batches = list(DataLoader(data, 2, num_workers=2, collate_fn=as_lists))
        assert torch.cat([labels for _, labels in batches]).tolist() == data.labels


class TestFingerprint:
    def test_independent_of_the_location(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "elsewhere" / "animals")
        fingerprint = ClassificationDataset.open(folder).fingerprint()
        assert ClassificationDataset.open(tmp_path / "elsewhere" / "animals").fingerprint() == fingerprint
        assert len(fingerprint) == 16
        assert int(fingerprint, 16) >= 0

    def test_depends_on_the_content(self, folder):
        fingerprints = [ClassificationDataset.open(folder).fingerprint()]
        for change in (
            lambda: (folder / "ant" / "1.png").rename(folder / "ant" / "2.png"),
            lambda: (folder / "ant" / "2.png").rename(folder / "cat" / "2.png"),
            lambda: photo(5, (9, 9)).save(folder / "dog" / "2.png", compress_level=0),
            (folder / "dog" / "2.png").unlink,
            (folder / "bee").mkdir,
        ):
            change()
            fingerprints.append(ClassificationDataset.open(folder).fingerprint())
        assert len(set(fingerprints)) == 6

    def test_decodes_no_image(self, folder):
        (folder / "ant" / "1.png").write_bytes(b"not an image")
        data = ClassificationDataset.open(folder)
        fingerprint = data.fingerprint()
        shutil.rmtree(folder)
        assert data.fingerprint() == fingerprint

    def test_tar_and_parquet(self, folder, tmp_path):
        pytest.importorskip("pyarrow")
        tar = pack(folder, tmp_path / "images.tar", FILES)
        rows = write_parquet(tmp_path / "test.parquet", [photo(1)] * 2, [0, 1])
        found = {ClassificationDataset.open(tar).fingerprint(), ClassificationDataset.open(rows).fingerprint()}
        (tmp_path / "moved").mkdir()
        for path in (tar, rows):
            assert ClassificationDataset.open(path.rename(tmp_path / "moved" / path.name)).fingerprint() in found
        other = write_parquet(tmp_path / "test.parquet", [photo(1)] * 2, [1, 0])
        assert ClassificationDataset.open(other).fingerprint() not in found
        assert len(found) == 2


class TestDataLoader:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_loader(self, folder, workers):
        data = ClassificationDataset.open(folder)
        batches = list(DataLoader(data, 2, num_workers=workers, collate_fn=as_lists))
        assert [[each.shape for each in photos] for photos, _ in batches][2] == [(3, 6, 8)]
        assert [len(photos) for photos, _ in batches] == [2, 2, 1]
        assert torch.cat([labels for _, labels in batches]).tolist() == data.labels


class TestSample:
    def test_same_images_and_classes(self, folder):
        data = ClassificationDataset.open(folder)
        drawn = data.sample(3, seed=1)
        assert len(drawn) == len(drawn.labels) == 3
        assert drawn.class_names == data.class_names
        assert drawn.num_classes == data.num_classes
        whole = {data.name(row): (data.read(row)[0], data.labels[row]) for row in range(len(data))}
        for row in range(3):
            pixels, label = whole[drawn.name(row)]
            assert torch.equal(drawn.read(row)[0], pixels)
            assert drawn[row][1] == label

    def test_seed_and_fingerprint(self, folder):
        data = ClassificationDataset.open(folder)
        names = [{data.sample(3, seed).name(row) for row in range(3)} for seed in range(8)]
        assert names[0] == {data.sample(3).name(row) for row in range(3)}
        assert any(chosen != names[0] for chosen in names)
        assert data.sample(3).fingerprint() == data.sample(3).fingerprint() != data.fingerprint()
        assert data.sample(len(data)).fingerprint() == data.fingerprint()

    @pytest.mark.parametrize("count", [0, 6])
    def test_errors(self, folder, count):
        with pytest.raises(ValueError, match=f"sample {count} of 5"):
            ClassificationDataset.open(folder).sample(count)

    def test_split(self, folder):
        data = ClassificationDataset.open(folder)
        rest, held_out = data.split(2, seed=4)
        assert (len(rest), len(held_out)) == (3, 2)
        assert held_out.fingerprint() == data.sample(2, seed=4).fingerprint()
        names = [{each.name(row) for row in range(len(each))} for each in (rest, held_out, data)]
        assert names[0] | names[1] == names[2]
        assert rest.num_classes == held_out.num_classes == data.num_classes
        with pytest.raises(ValueError, match="hold out 5 of 5 images and keep some"):
            data.split(5)


class TestWithClasses:
    def test_by_name(self, folder):
        data = ClassificationDataset.open(folder)
        names = ("zebra", *reversed(data.class_names))
        mapped = data.with_classes(names)
        assert mapped.num_classes == len(names)
        assert [names[label] for label in mapped.labels] == [data.class_names[label] for label in data.labels]
        assert mapped[0][1] == mapped.labels[0]
        assert data.labels != mapped.labels

    def test_indices_are_kept_without_common_names(self, folder):
        data = ClassificationDataset.open(folder)
        assert data.with_classes(None).labels == data.labels
        assert data.with_classes(("class 0", "class 1", "class 2")).labels == data.labels

    def test_errors(self, folder):
        data = ClassificationDataset.open(folder)
        with pytest.raises(ValueError, match="The data has the classes cat, dog, but the network has ant"):
            data.with_classes(data.class_names[:1])
        with pytest.raises(ValueError, match="classes ant, cat, dog, but the network has a, b, c, d, e and 2 more"):
            data.with_classes("abcdefg")

    def test_classes_without_images_are_not_needed(self, folder):
        (folder / "bee").mkdir()
        data = ClassificationDataset.open(folder).with_classes(("dog", "cat", "ant"))
        assert data.labels == [2, 1, 1, 0, 0]

    def test_wordnet_ids_are_in_order(self):
        ids, names = [f"n{index:08}" for index in range(1000)], [f"name {index}" for index in range(1000)]
        assert match_classes(ids, names) == [*range(1000)]

    def test_wordnet_ids_are_matched_by_name(self):
        ids, half = [f"n{index:08}" for index in range(1000)], [f"n{index:08}" for index in range(10)]
        assert match_classes(ids, ids[::-1]) == [*range(1000)][::-1]
        assert match_classes(half, ids[::-1]) == [*range(999, 989, -1)]
        with pytest.raises(ValueError, match="matched by name"):  # such as Imagenette with a network of CIFAR-10
            match_classes(half, [f"name {index}" for index in range(10)])

    def test_names_that_occur_twice(self, folder):
        names = ("crane", "crane", "dog")
        data = ClassificationDataset.open(folder)
        data.class_names = names
        assert data.with_classes(names).labels == data.labels
