import io
import json
import re
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kornia_tinyvit import ImageClassifier, MobileSAM, save_checkpoint
from kornia_tinyvit.cli import app
from kornia_tinyvit.data.classification import ClassificationDataset
from tests.helpers import CIFAR, cells, error_of, make_weights, run, run_both

FOLDERS = ("truck", "cat", "frog")


@pytest.fixture
def weights(tiny, tmp_path) -> str:
    return make_weights(tiny, tmp_path)


@pytest.fixture
def photos() -> list[Image.Image]:
    """Images of several sizes that the small network does not take for one class alone."""
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
    """Move the images so that some, and not all, lie in the folder that the network would choose."""
    classifier = ImageClassifier.from_config(pretrained=weights)
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        if number % 2:
            label = classifier.predict(path)[0][0].label
            (folder / label).mkdir(exist_ok=True)
            path.rename(folder / label / path.name)
    data = ClassificationDataset.open(folder)
    return [CIFAR.index(data.class_names[label]) for label in data.labels]


class TestFolder:
    @pytest.mark.parametrize("batch_size", ["1", "5", "64"])
    def test_classes_are_matched_by_name(self, weights, folder, truth, batch_size):
        report = json.loads(run("evaluate", str(folder), "--weights", weights, "--batch-size", batch_size, "--json"))
        expected = expected_accuracy(weights, ClassificationDataset.open(folder), truth)
        assert report == {"images": 12, **expected}
        assert 40 < expected["top1"] < 100

    def test_text(self, weights, folder, truth):
        expected = expected_accuracy(weights, ClassificationDataset.open(folder), truth)
        output = run("evaluate", str(folder), "--weights", weights)
        assert output.strip() == f"12 images: top-1 {expected['top1']:.2f} %, top-5 {expected['top5']:.2f} %"

    @pytest.mark.parametrize(
        ("options", "changes"),
        [(["--tta"], {"views": ImageClassifier.DEFAULT_VIEWS}), (["--img-size", "96"], {"img_size": 96})],
    )
    def test_options(self, weights, folder, truth, options, changes):
        report = json.loads(run("evaluate", str(folder), "--weights", weights, "--json", *options))
        assert report == {
            "images": 12,
            **expected_accuracy(weights, ClassificationDataset.open(folder), truth, **changes),
        }

    @pytest.mark.parametrize(("limit", "images"), [("1", 1), ("7", 7), ("1000", 12)])
    def test_limit(self, weights, folder, limit, images):
        arguments = ("evaluate", str(folder), "--weights", weights, "--limit", limit, "--json")
        report = json.loads(run(*arguments))
        assert report["images"] == images
        assert json.loads(run(*arguments)) == report  # the same images each time

    def test_workers(self, weights, folder):
        arguments = ("evaluate", str(folder), "--weights", weights, "--json")
        assert json.loads(run(*arguments, "--workers", "1")) == json.loads(run(*arguments))

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_broken_image_is_one_line(self, weights, folder, workers, capfd, monkeypatch):
        (folder / "cat" / "a.png").write_bytes(b"nothing")
        options = ("--weights", weights, "--workers", workers, "--json")
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), *options)
        assert re.fullmatch(r"Error: \S+cat/a\.png is not an image that can be read: Pillow .*", error)

    def test_other_names_are_an_error(self, weights, folder, capfd, monkeypatch):
        for number, name in enumerate(FOLDERS):
            (folder / name).rename(folder / f"kind {number}")
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), "--weights", weights, "--json")
        assert "The data has the classes kind 0, kind 1, kind 2, but the network has airplane, automobile" in error

    def test_position_of_a_network_without_names(self, tiny, folder, tmp_path):
        weights = str(save_checkpoint(tiny, tmp_path / "unnamed.safetensors"))
        data = ClassificationDataset.open(folder)
        result = CliRunner().invoke(app, ["evaluate", str(folder), "--weights", weights, "--json"])
        assert json.loads(result.stdout) == {"images": 12, **expected_accuracy(weights, data, data.labels)}
        assert "Classes are matched by position, as they have no common names." in result.stderr

    def test_opening_line(self, weights, folder):
        (folder / "cat" / "notes.txt").write_text("")
        _, notes = run_both("evaluate", str(folder), "--weights", weights)
        assert notes.startswith(
            f"12 images, 3 classes; skipped 1 .txt; not divided into splits; device cpu; weights {weights}\n"
        )
        assert "The data has 3 of the network's 10 classes." in notes

    def test_splits(self, weights, folder, tmp_path, capfd, monkeypatch):
        for split, names in (("train", FOLDERS), ("valid", FOLDERS[:2])):
            for name in names:
                shutil.copytree(folder / name, tmp_path / "divided" / split / name)
        command = ("evaluate", str(tmp_path / "divided"), "--weights", weights, "--json")
        counts = [json.loads(run(*command, *split))["images"] for split in ((), ("--split", "train"))]
        assert counts == [8, 12]
        assert "no split 'other'; expected one of train, valid" in error_of(
            capfd, monkeypatch, *command, "--split", "other"
        )
        flat = ("evaluate", str(folder), "--weights", weights, "--split", "nonsense")
        assert "is not divided into splits; it has no split 'nonsense'" in error_of(capfd, monkeypatch, *flat)


class TestMeasures:
    """Further metrics."""

    def answers(self, weights, folder):
        """The classes of the images and what the network takes them for, by name."""
        classifier = ImageClassifier.from_config(pretrained=weights)
        data = ClassificationDataset.open(folder)
        found = classifier.predict([data[number][0] for number in range(len(data))], top_k=1)
        return [data.class_names[label] for label in data.labels], [row[0].label for row in found], found

    def report(self, weights, folder, *options):
        return json.loads(run("evaluate", str(folder), "--weights", weights, "--json", *options))

    def test_per_class(self, weights, folder, truth):
        labels, answers, _ = self.answers(weights, folder)
        rows = self.report(weights, folder, "--per-class")["per_class"]
        assert [row["class"] for row in rows] == [name for name in CIFAR if name in labels]
        for row in rows:
            own = [answer for label, answer in zip(labels, answers, strict=True) if label == row["class"]]
            assert row["images"] == len(own)
            assert row["top1"] == round(100 * own.count(row["class"]) / len(own), 2)
        printed = cells(run("evaluate", str(folder), "--weights", weights, "--per-class"))
        for row in rows:
            wanted = [row["class"], str(row["images"]), f"{row['top1']:.2f}"]
            assert wanted in [[cell for cell in line if cell] for line in printed]

    def test_confusion(self, weights, folder, truth):
        labels, answers, _ = self.answers(weights, folder)
        pairs = Counter(pair for pair in zip(labels, answers, strict=True) if pair[0] != pair[1])
        rows = self.report(weights, folder, "--confusion")["confusion"]
        assert {(row["class"], row["predicted"]): row["images"] for row in rows} == dict(pairs)
        assert [row["images"] for row in rows] == sorted(pairs.values(), reverse=True)
        output = run("evaluate", str(folder), "--weights", weights, "--confusion").strip().splitlines()
        assert output[1] == f"{rows[0]['class']} predicted as {rows[0]['predicted']}: {rows[0]['images']}"
        assert len(output) == 1 + len(rows)

    def test_calibration(self, weights, folder, truth):
        labels, answers, found = self.answers(weights, folder)
        bins = {}
        for label, answer, row in zip(labels, answers, found, strict=True):
            bins.setdefault(int(row[0].score * 15), []).append(row[0].score - (label == answer))
        error = 100 * sum(abs(sum(gaps)) for gaps in bins.values()) / len(labels)
        calibration = self.report(weights, folder, "--calibration")["calibration"]
        assert calibration["error"] == pytest.approx(error, abs=0.01)
        assert [each["images"] for each in calibration["bins"]] == [len(bins[key]) for key in sorted(bins)]
        output = run("evaluate", str(folder), "--weights", weights, "--calibration")
        assert f"expected calibration error {calibration['error']:.2f} %" in output

    def test_features_of_training_data(self, weights, photos, tmp_path):
        """Three kinds of images that a network with random weights separates."""
        for split, shift in (("train", 0), ("test", 7)):
            for number, name in enumerate(("cat", "dog", "frog")):
                (tmp_path / split / name).mkdir(parents=True)
                for copy in range(3):
                    shades = [20 + shift + copy] * 3
                    shades[number] = 230 - shift
                    Image.new("RGB", (64, 64), tuple(shades)).save(tmp_path / split / name / f"{copy}.png")
        (tmp_path / "train" / "ant").mkdir()  # moves the training data's indices
        options = ("--knn", str(tmp_path / "train"), "--linear", str(tmp_path / "train"))
        report = self.report(weights, tmp_path / "test", *options)
        assert (report["knn"], report["linear"]) == (100, 100)
        (tmp_path / "test" / "cat").rename(tmp_path / "cats")
        (tmp_path / "test" / "dog").rename(tmp_path / "test" / "cat")
        (tmp_path / "cats").rename(tmp_path / "test" / "dog")
        report = self.report(weights, tmp_path / "test", *options)
        assert (report["knn"], report["linear"]) == (33.33, 33.33)
        output = run("evaluate", str(tmp_path / "test"), "--weights", weights, "--linear", str(tmp_path / "train"))
        assert "linear classifier on the features: top-1 33.33 %" in output
        assert "nearest" not in output

    def test_features_of_mobile_sam(self, folder, tmp_path, capfd, monkeypatch):
        """Weights without classes are measured by the probes alone."""
        weights = str(tmp_path / "sam.pt")
        torch.save(MobileSAM.from_config("1m", img_size=64).state_dict(), weights)
        options = ("--knn", str(folder), "--linear", str(folder))
        report = self.report(weights, folder, *options)
        assert report.keys() == {"images", "knn", "linear"}
        assert report["linear"] > 50
        printed = run("evaluate", str(folder), "--weights", weights, *options)
        assert printed.startswith("12 images: features only\nnearest neighbors on the features: top-1 ")
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), "--weights", weights, *options, "--calibration")
        assert "--calibration has no effect with weights that have no classes" in error

    def test_training_data_without_a_class(self, weights, folder, tmp_path, capfd, monkeypatch):
        shutil.copytree(folder / "cat", tmp_path / "train" / "cat")
        options = ("--weights", weights, "--json", "--knn", str(tmp_path / "train"))
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), *options)
        assert "The data has the classes frog, truck, but " in error

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_broken_images_are_skipped(self, weights, folder, truth, workers):
        broken = folder / "cat" / "a.png"
        broken.write_bytes(b"nothing")
        (folder / "truck" / "b.png").write_bytes(b"")
        options = ("--on-broken", "skip", "--workers", workers, "--knn", str(folder))
        report = self.report(weights, folder, *options)
        assert sorted(report.pop("broken")) == ["cat/a.png", "truck/b.png"]
        report.pop("knn")
        _, notes = run_both("evaluate", str(folder), "--weights", weights, *options, "--batch-size", "1")
        assert "\nImages left out because they cannot be read: 2, e.g. " in notes
        broken.unlink()
        (folder / "truck" / "b.png").unlink()
        assert report == self.report(weights, folder)
        assert report["images"] == 12

    def test_nothing_but_broken_images(self, weights, folder, capfd, monkeypatch):
        for path in folder.rglob("*.png"):
            path.write_bytes(b"nothing")
        options = ("--weights", weights, "--json", "--on-broken", "skip")
        assert "No images were evaluated" in error_of(capfd, monkeypatch, "evaluate", str(folder), *options)


class TestImageNet22k:
    @pytest.fixture
    def large(self, tiny, tmp_path) -> str:
        """A network that takes every image for the class 281 of ImageNet-1k, a tabby, or for one outside of it."""
        tiny.reset_classifier(21841)
        torch.nn.init.zeros_(tiny.head.weight)
        torch.nn.init.zeros_(tiny.head.bias)
        with torch.no_grad():
            tiny.head.bias[2397] = 5
            tiny.head.bias[2399] = 9
        return str(save_checkpoint(tiny, tmp_path / "large.safetensors"))

    def test_classes_of_imagenet_1k(self, large, photos, tmp_path):
        for name in ("tabby", "goldfish"):
            (tmp_path / "data" / name).mkdir(parents=True)
            photos[0].save(tmp_path / "data" / name / "1.png")
        output = CliRunner().invoke(app, ["evaluate", str(tmp_path / "data"), "--weights", large, "--confusion"])
        assert output.exit_code == 0, output.output
        assert "2 images: top-1 50.00 %" in output.stdout
        assert "goldfish predicted as tabby: 1" in output.stdout
        assert "evaluating the 1000 of ImageNet-1k" in output.stderr

    def test_names_of_the_network_come_first(self, large, photos, tmp_path, capfd, monkeypatch):
        (tmp_path / "data" / "class 2399").mkdir(parents=True)
        photos[0].save(tmp_path / "data" / "class 2399" / "1.png")
        arguments = ("evaluate", str(tmp_path / "data"), "--weights", large, "--json")
        assert json.loads(run(*arguments))["top1"] == 100
        assert "--confusion takes up to 2048" in error_of(capfd, monkeypatch, *arguments, "--confusion")


class TestParquet:
    def test_names_in_reversed_order(self, weights, photos, tmp_path):
        """The metadata of ``datasets`` name the classes in another order than the network."""
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        classifier = ImageClassifier.from_config(pretrained=weights)
        columns = {"image": [], "label": []}
        for photo in photos:
            buffer = io.BytesIO()
            photo.save(buffer, "PNG")
            columns["image"].append(buffer.getvalue())
            columns["label"].append(9 - classifier.predict(photo)[0][0].index)
        features = {"label": {"names": CIFAR[::-1], "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "test.parquet")
        report = json.loads(run("evaluate", str(tmp_path / "test.parquet"), "--weights", weights, "--json"))
        assert report["top1"] == 100

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
        report = json.loads(run("evaluate", str(path), "--weights", weights, "--json"))
        expected = expected_accuracy(weights, ClassificationDataset.open(path), labels)
        assert report == {"images": 12, **expected}
        assert 60 < expected["top1"] <= 100


class TestErrors:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("gone", "There is no dataset"),
            ("empty", "holds no images in class folders"),
            ("notes.parquet", "is not a parquet file"),
        ],
    )
    def test_no_data(self, weights, tmp_path, capfd, monkeypatch, data, message):
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes.parquet").write_text("nothing")
        assert message in error_of(capfd, monkeypatch, "evaluate", str(tmp_path / data), "--weights", weights, "--json")

    def test_unknown_class(self, weights, folder, capfd, monkeypatch):
        (folder / "cat").rename(folder / "unicorn")
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), "--weights", weights, "--json")
        assert "The data has the classes unicorn, but the network has airplane" in error

    def test_more_classes_than_the_network(self, weights, folder, capfd, monkeypatch):
        for number in range(11):
            shutil.copytree(folder / "cat", folder / f"kind {number:02}")
        for name in FOLDERS:
            shutil.rmtree(folder / name)
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), "--weights", weights, "--json")
        assert "kind 04 and 6 more, but the network has airplane" in error

    def test_damaged_image(self, weights, folder, capfd, monkeypatch):
        (folder / "cat" / "01.png").write_bytes(b"nothing")
        error = error_of(capfd, monkeypatch, "evaluate", str(folder), "--weights", weights, "--json")
        assert "01.png is not an image that can be read" in error

    @pytest.mark.parametrize("option", ["--limit", "--batch-size"])
    def test_counts_start_at_one(self, folder, option):
        result = CliRunner().invoke(app, ["evaluate", str(folder), option, "0"])
        assert result.exit_code == 2
