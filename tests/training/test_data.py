import io
import sys

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kornia_tinyvit.preprocessing import read_image
from kornia_tinyvit.training.data import LabelledImages, MissingExtraError, collate


def picture(shade: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, (shade, 0, 255 - shade))


@pytest.fixture
def folder(tmp_path):
    """Three classes, one of them with pictures in a folder of its own, among files that are no pictures."""
    root = tmp_path / "pets"
    for number, name in enumerate(("dog/2.png", "dog/10.JPG", "ant/1.png", "cat/young/1.png", "cat/0.bmp")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(40 * number, (8 + number, 6)).save(root / name)
    (root / "readme.txt").write_text("no class")
    (root / "dog" / "labels.csv").write_text("no picture")
    picture(255).save(root / "outside.png")
    return root


def write_parquet(path, pictures, labels):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = []
    for each in pictures:
        buffer = io.BytesIO()
        each.save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images, "label": labels, "other": ["x"] * len(labels)}), path)
    return path


class TestFolder:
    def test_classes_and_order(self, folder):
        data = LabelledImages(folder)
        assert data.class_names == ("ant", "cat", "dog")
        assert data.labels == [0, 1, 1, 2, 2]
        assert len(data) == 5
        files = ["ant/1.png", "cat/0.bmp", "cat/young/1.png", "dog/10.JPG", "dog/2.png"]
        for (image, label), file, expected in zip((data[i] for i in range(5)), files, data.labels, strict=True):
            assert torch.equal(image, read_image(folder / file))
            assert label == expected

    def test_text_path(self, folder):
        assert LabelledImages(str(folder)).labels == LabelledImages(folder).labels

    def test_damaged_picture(self, folder):
        (folder / "ant" / "1.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"1\.png is not a picture that can be read"):
            LabelledImages(folder)[0]

    def test_empty(self, tmp_path):
        with pytest.raises(ValueError, match="holds no pictures in class folders"):
            LabelledImages(tmp_path)
        (tmp_path / "cat").mkdir()
        with pytest.raises(ValueError, match="holds no pictures in class folders"):
            LabelledImages(tmp_path)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"There is no data set .*nowhere; expected a folder"):
            LabelledImages(tmp_path / "nowhere")


class TestParquet:
    def test_reads(self, tmp_path):
        pytest.importorskip("pyarrow")
        pictures = [picture(10), picture(200, (5, 9)), picture(90)]
        data = LabelledImages(write_parquet(tmp_path / "test.parquet", pictures, [3, 0, 3]))
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
        with pytest.raises(ValueError, match=r"other\.parquet is no parquet file with a column image"):
            LabelledImages(tmp_path / "other.parquet")

    def test_no_parquet(self, tmp_path):
        pytest.importorskip("pyarrow")
        (tmp_path / "notes.parquet").write_text("nothing of the kind")
        with pytest.raises(ValueError, match=r"notes\.parquet is no parquet file"):
            LabelledImages(tmp_path / "notes.parquet")

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        (tmp_path / "test.parquet").write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'kornia-tinyvit\[train\]'"):
            LabelledImages(tmp_path / "test.parquet")
        assert issubclass(MissingExtraError, ImportError)

    def test_folders_need_no_pyarrow(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert len(LabelledImages(folder)) == 5


class TestCollate:
    def test_sizes_stay(self, folder):
        data = LabelledImages(folder)
        pictures, labels = collate([data[4], data[0]])
        assert [each.shape for each in pictures] == [(3, 6, 8), (3, 6, 10)]
        assert labels.tolist() == [2, 0]
        assert labels.dtype == torch.int64

    @pytest.mark.parametrize("workers", [0, 1])
    def test_loader(self, folder, workers):
        data = LabelledImages(folder)
        batches = list(DataLoader(data, 2, num_workers=workers, collate_fn=collate))
        assert [len(pictures) for pictures, _ in batches] == [2, 2, 1]
        assert torch.cat([labels for _, labels in batches]).tolist() == data.labels
