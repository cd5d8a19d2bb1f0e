import io
import json
import shutil

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.cli import app
from kornia_tinyvit.training.data import LabelledImages
from tests.cli.test_classify import CIFAR, error_of, make_weights, run

FOLDERS = ("truck", "cat", "frog")


@pytest.fixture
def weights(tiny, tmp_path) -> str:
    return make_weights(tiny, tmp_path)


@pytest.fixture
def photos() -> list[Image.Image]:
    """Pictures of several sizes that the small network does not take for one class alone."""
    generator = torch.Generator().manual_seed(0)
    photos = []
    for number in range(12):
        pixels = torch.rand(3, 4, 4, generator=generator) * 255
        photos.append(Image.fromarray(pixels.byte().movedim(0, -1).numpy()).resize((40 + 5 * number, 60)))
    return photos


@pytest.fixture
def folder(photos, tmp_path):
    for number, photo in enumerate(photos):
        path = tmp_path / "data" / FOLDERS[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path)
    return tmp_path / "data"


def expected_accuracy(weights, data, labels, **changes):
    classifier = ImageClassifier.from_config(pretrained=weights, **changes)
    found = classifier.predict([data[number][0] for number in range(len(data))], top_k=5)
    hits = [[each.index == label for each in row] for row, label in zip(found, labels, strict=True)]
    return {f"top{k}": round(100 * sum(any(row[:k]) for row in hits) / len(hits), 2) for k in (1, 5)}


@pytest.fixture
def truth(weights, folder) -> list[int]:
    """Move the pictures so that some, and not all, lie in the folder that the network would choose."""
    classifier = ImageClassifier.from_config(pretrained=weights)
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        if number % 2:
            label = classifier.predict(path)[0][0].label
            (folder / label).mkdir(exist_ok=True)
            path.rename(folder / label / path.name)
    data = LabelledImages(folder)
    return [CIFAR.index(data.class_names[label]) for label in data.labels]


class TestFolder:
    @pytest.mark.parametrize("batch_size", ["1", "5", "64"])
    def test_classes_are_matched_by_name(self, weights, folder, truth, batch_size):
        report = json.loads(run("evaluate", str(folder), "--pretrained", weights, "--batch-size", batch_size, "--json"))
        expected = expected_accuracy(weights, LabelledImages(folder), truth)
        assert report == {"pictures": 12, **expected}
        assert 40 < expected["top1"] < 100

    def test_text(self, weights, folder, truth):
        expected = expected_accuracy(weights, LabelledImages(folder), truth)
        output = run("evaluate", str(folder), "--pretrained", weights)
        assert output.strip() == f"12 pictures: top-1 {expected['top1']:.2f} %, top-5 {expected['top5']:.2f} %"

    @pytest.mark.parametrize(
        ("options", "changes"),
        [(["--tta"], {"views": ImageClassifier.DEFAULT_VIEWS}), (["--img-size", "96"], {"img_size": 96})],
    )
    def test_options(self, weights, folder, truth, options, changes):
        report = json.loads(run("evaluate", str(folder), "--pretrained", weights, "--json", *options))
        assert report == {"pictures": 12, **expected_accuracy(weights, LabelledImages(folder), truth, **changes)}

    @pytest.mark.parametrize(("limit", "pictures"), [("1", 1), ("7", 7), ("1000", 12)])
    def test_limit(self, weights, folder, limit, pictures):
        arguments = ("evaluate", str(folder), "--pretrained", weights, "--limit", limit, "--json")
        report = json.loads(run(*arguments))
        assert report["pictures"] == pictures
        assert json.loads(run(*arguments)) == report  # the same pictures each time

    def test_workers(self, weights, folder):
        arguments = ("evaluate", str(folder), "--pretrained", weights, "--json")
        assert json.loads(run(*arguments, "--workers", "1")) == json.loads(run(*arguments))

    def test_other_names_count_by_position(self, weights, folder):
        for number, name in enumerate(FOLDERS):
            (folder / name).rename(folder / f"class {number}")
        data = LabelledImages(folder)
        report = json.loads(run("evaluate", str(folder), "--pretrained", weights, "--json"))
        assert report == {"pictures": 12, **expected_accuracy(weights, data, data.labels)}


class TestParquet:
    def test_labels_are_positions(self, weights, photos, tmp_path):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        classifier = ImageClassifier.from_config(pretrained=weights)
        images, labels = [], []
        for number, photo in enumerate(photos):
            buffer = io.BytesIO()
            photo.save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
            labels.append(classifier.predict(photo)[0][0].index if number % 3 else 9 - number % 10)
        path = tmp_path / "test.parquet"
        pq.write_table(pa.table({"image": images, "label": labels}), path)
        report = json.loads(run("evaluate", str(path), "--pretrained", weights, "--json"))
        expected = expected_accuracy(weights, LabelledImages(path), labels)
        assert report == {"pictures": 12, **expected}
        assert 60 < expected["top1"] <= 100


class TestErrors:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("gone", "There is no data set"),
            ("empty", "holds no pictures in class folders"),
            ("notes.parquet", "is no parquet file"),
        ],
    )
    def test_no_data(self, weights, tmp_path, capfd, monkeypatch, data, message):
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes.parquet").write_text("nothing")
        assert message in error_of(
            capfd, monkeypatch, "evaluate", str(tmp_path / data), "--pretrained", weights, "--json"
        )

    def test_unknown_class(self, weights, folder, capfd, monkeypatch):
        (folder / "cat").rename(folder / "unicorn")
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), "--pretrained", weights, "--json")
        assert "does not know the classes unicorn of the data" in error

    def test_more_classes_than_the_network(self, weights, folder, capfd, monkeypatch):
        for number in range(11):
            shutil.copytree(folder / "cat", folder / f"kind {number:02}")
        for name in FOLDERS:
            shutil.rmtree(folder / name)
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), "--pretrained", weights, "--json")
        assert "The data has a class 10, but the network knows 10" in error

    def test_damaged_picture(self, weights, folder, capfd, monkeypatch):
        (folder / "cat" / "01.png").write_bytes(b"nothing")
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), "--pretrained", weights, "--json")
        assert "01.png is not a picture that can be read" in error

    @pytest.mark.parametrize("option", ["--limit", "--batch-size"])
    def test_counts_start_at_one(self, folder, option):
        result = CliRunner().invoke(app, ["evaluate", str(folder), option, "0"])
        assert result.exit_code == 2
