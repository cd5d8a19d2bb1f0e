"""Detectors on the command line: trained, and config about photos."""

from __future__ import annotations

import json
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.data import DetectionDataset
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.images import read_image
from kornia_tinyvit.training import evaluate
from kornia_tinyvit.visualization import draw_detections
from tests import scenes
from tests.helpers import KINDS, CommandProcess, error_of, run, run_both, write_kind
from tests.scenes import damage, make_coco, write_coco
from tests.test_detection import NAMES, make_detector

EVALUATE = sys.modules["kornia_tinyvit.cli.evaluate"]  # the package has the command under this name
PHOTO = ASSETS / "photos" / "chelsea.png"  # 451x300


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(make_detector().save(tmp_path_factory.mktemp("weights") / "detector.safetensors"))


class TestDetect:
    def test_json(self, weights, tmp_path):
        photos = [str(PHOTO), str(ASSETS / "photos" / "rocket.jpg")]
        options = ("--weights", weights, "--threshold", "0.012", "--out", str(tmp_path / "new" / "folder"), "--json")
        rows = json.loads(run("detect", *photos, *options))
        assert rows == json.loads((tmp_path / "new" / "folder" / "detections.json").read_text())
        expected = TinyViTDetector.from_config(pretrained=weights).predict(photos, 0.012)
        for row, photo, found in zip(rows, photos, expected, strict=True):
            assert row["photo"] == photo
            assert len(found) > 0
            assert [each["score"] for each in row["detections"]] == pytest.approx([each.score for each in found])
            assert [each["box"] for each in row["detections"]] == [pytest.approx(each.box, abs=1e-2) for each in found]
            assert {each["label"] for each in row["detections"]} <= set(NAMES)
            assert Image.open(row["drawn"]).size == (row["width"], row["height"]) == Image.open(photo).size

    def test_images_with_boxes(self, weights, tmp_path):
        run("detect", str(PHOTO), "--weights", weights, "--threshold", "0", "--out", str(tmp_path))
        drawn, photo = (np.asarray(Image.open(path).convert("RGB")) for path in (tmp_path / "chelsea.png", PHOTO))
        assert (drawn != photo).any()
        found = TinyViTDetector.from_config(pretrained=weights).predict(PHOTO, 0.0)[0]
        assert np.array_equal(drawn, np.asarray(draw_detections(read_image(PHOTO), found)))

    def test_kinds_of_files(self, weights, tmp_path):
        paths, pixels = zip(*(write_kind(tmp_path, kind) for kind in KINDS), strict=True)
        options = ("--weights", weights, "--threshold", "0", "--out", str(tmp_path / "out"), "--json")
        rows = json.loads(run("detect", *paths, *options))
        expected = TinyViTDetector.from_config(pretrained=weights).predict(pixels, 0.0)
        for row, image, found in zip(rows, pixels, expected, strict=True):
            assert [each["score"] for each in row["detections"]] == pytest.approx([each.score for each in found])
            assert (row["width"], row["height"]) == Image.open(row["drawn"]).size == (451, 300)
            drawn = np.asarray(Image.open(row["drawn"])).astype(int)
            levels = (image * 255).round() if image.is_floating_point() else image
            assert (abs(drawn - levels.movedim(0, 2).numpy()).max(2) == 0).mean() > 0.5  # beside the boxes

    def test_text(self, weights, tmp_path):
        options = ("--weights", weights, "--out", str(tmp_path))
        (first, *lines) = run("detect", str(PHOTO), *options, "--threshold", "0").splitlines()
        assert first == f"{PHOTO}: 10 objects, see {tmp_path / 'chelsea.png'}"
        assert len(lines) == 10
        assert lines[0].strip().split(" ")[1] == "%"
        assert ": 0 objects, see" in run("detect", str(PHOTO), *options, "--threshold", "0.99")

    def test_nms(self, weights, tmp_path, monkeypatch):
        boxes = torch.full((1, 10, 4), 0.5)
        monkeypatch.setattr(TinyViTDetector, "forward", lambda self, images: (torch.eye(10, 3)[None], boxes))
        command = ("detect", str(PHOTO), "--weights", weights, "--threshold", "0", "--out", str(tmp_path), "--json")
        rows = [json.loads(run(*command, *options))[0]["detections"] for options in ((), ("--nms", "0.7"))]
        assert [len(each) for each in rows] == [10, 3]
        assert sorted(each["label"] for each in rows[1]) == sorted(NAMES)

    def test_photos_of_one_name(self, weights, tmp_path):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            Image.new("RGB", (40, 30), "red").save(tmp_path / folder / "1.png")
        photos = [str(tmp_path / folder / "1.png") for folder in ("a", "b")]
        rows = json.loads(run("detect", *photos, "--weights", weights, "--out", str(tmp_path / "out"), "--json"))
        assert [row["drawn"].rsplit("/", 1)[1] for row in rows] == ["1.png", "1-2.png"]

    def test_errors(self, weights, tmp_path, capfd, monkeypatch):
        out = ("--out", str(tmp_path))
        command = ("detect", "gone.png", "--weights", weights, *out)
        assert "gone.png" in error_of(capfd, monkeypatch, *command)
        command = ("detect", str(PHOTO), "--weights", "gone.safetensors", *out)
        assert "There is no checkpoint file" in error_of(capfd, monkeypatch, *command)


class TestDrawing:
    def test_boxes_and_colors(self):
        found = make_detector().predict(torch.rand(3, 60, 80), 0.0)[:1][0][:2]
        plain = torch.full((3, 60, 80), 0.5)
        assert np.array_equal(np.asarray(draw_detections(plain, [])), np.full((60, 80, 3), 128))
        drawn = np.asarray(draw_detections(plain, found)).astype(int)
        left, _, right, bottom = (int(value) for value in found[0].box)
        assert (drawn[bottom - 1, (left + right) // 2] != 128).any()
        assert not np.array_equal(drawn, np.asarray(draw_detections(plain, found, scores=False)))


class TestTrain:
    def command(self, folder, tmp_path, *options):
        small = ("--variant", "1m", "--img-size", "64", "--queries", "10", "--batch-size", "2", "--workers", "0")
        out = ("--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out"))
        return ("train", str(folder), "--task", "detection", *small, *out, *options)

    def test_yolo(self, tmp_path):
        data, validation = (scenes.make_boxes(tmp_path / name, 2, seed=1) for name in ("data", "val"))
        result = json.loads(run(*self.command(data, tmp_path, "--validation", str(validation), "--json")))
        files = {"best", "last", "broken", "seconds", "is_main_process"}
        assert result.keys() == files | {"steps", "map", "best_epoch", "stopped_early"}
        detector = TinyViTDetector.from_config(pretrained=result["best"])
        assert (detector.class_names, detector.config.num_queries) == (scenes.BOX_NAMES, 10)
        scores = evaluate(detector, DetectionDataset.open(validation))
        assert scores.map == pytest.approx(result["map"], abs=1e-3)
        config = json.loads((tmp_path / "out" / "run.json").read_text())
        assert (config["augmentation"]["kind"], config["loss"]["kind"]) == ("boxes", "boxes")

    def test_coco(self, tmp_path):
        annotations = [*make_coco()["annotations"], {"id": 5, "image_id": 9, "category_id": 3, "bbox": [50, 0, 9, 9]}]
        path = write_coco(tmp_path / "coco", make_coco(annotations=annotations))
        printed, notes = run_both(*self.command(path, tmp_path, "--validation", str(path), "--weights", "cifar10"))
        opening, validation, recipe, dropped, rates = notes.splitlines()
        found = "2 images, 1 object, 2 classes, 1 crowd or difficult object ignored, 1 box without an area left out"
        assert opening == f"{found}; not divided into splits; device cpu; weights cifar10"
        assert validation == f"Validation: {found}; not divided into splits"
        assert recipe.startswith("Recipe detection_small: fine-tuning on fewer than 2,000 images")
        assert dropped.startswith("Boxes left out: 1, e.g. ")
        assert rates.startswith("Learning rate ")
        assert ", mAP " in printed.strip().splitlines()[-1]

    @pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
    )
    @pytest.mark.slow
    def test_two_processes(self, tmp_path):
        """They share the images, some without objects, and three validation images between them."""
        data = scenes.make_boxes(tmp_path / "data", 4)
        validation = scenes.make_boxes(tmp_path / "val", 3, seed=1)
        options = ("--validation", str(validation), "--process-batch", "2", "--batch-size", "4", "--json")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        ranks = [
            CommandProcess(
                tmp_path / str(rank), *self.command(data, tmp_path, *options), RANK=str(rank), LOCAL_RANK=str(rank),
                WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            )
            for rank in range(2)
        ]  # fmt: skip
        (code, out, err), other = (rank.wait() for rank in ranks)
        assert (code, other[:2]) == (0, (0, "")), err + other[2]
        result = json.loads(out)
        kept = TinyViTDetector.from_config(pretrained=result["best"])
        assert result["map"] == pytest.approx(evaluate(kept, DetectionDataset.open(validation)).map, abs=1e-3)
        assert result["steps"] == 1

    def test_errors(self, tmp_path, capfd, monkeypatch):
        data = scenes.make_boxes(tmp_path / "data", 2, seed=1)
        assert "There is no dataset" in error_of(capfd, monkeypatch, *self.command(tmp_path / "gone", tmp_path))
        error = error_of(capfd, monkeypatch, *self.command(data, tmp_path, "--queries", "90"))
        assert "num_queries=90 exceeds the 84 cells" in error
        (data / "labels" / "00.txt").write_text("7 0.5 0.5 0.1 0.1")
        assert "00.txt:1 has the class 7" in error_of(capfd, monkeypatch, *self.command(data, tmp_path))


class TestEvaluate:
    def command(self, folder, weights, *options):
        return ("evaluate", str(folder), "--task", "detection", "--weights", weights, "--batch-size", "2", *options)

    @pytest.fixture
    def own(self, tmp_path) -> str:
        detector = make_detector()
        detector.class_names = scenes.BOX_NAMES
        return str(detector.save(tmp_path / "own.safetensors"))

    def test_json(self, own, tmp_path):
        data = scenes.make_boxes(tmp_path / "data", 3, seed=1)
        result = json.loads(run(*self.command(data, own, "--per-class", "--json")))
        images = DetectionDataset.open(data, "val")
        found = evaluate(TinyViTDetector.from_config(pretrained=own), images)
        rows = result.pop("per_class")
        assert [row["class"] for row in rows] == ["disc", "box"]
        for row, curve in zip(rows, (each for each in found.class_curves if each.best_f1 >= 0), strict=True):
            assert row.keys() == {"class", "map", "best_f1", "threshold", "precision"}
            assert row["best_f1"] == pytest.approx(curve.best_f1, abs=0.01)
            assert row["precision"] == pytest.approx(curve.precision.tolist(), abs=0.01)
        assert result.pop("precision") == pytest.approx(found.curve.precision.tolist(), abs=0.01)
        assert result == pytest.approx(found.to_dict(), abs=1e-3)
        assert json.loads(run(*self.command(data, own, "--limit", "2", "--json")))["images"] == 2

    def test_curves(self, own, tmp_path, monkeypatch):
        """A detector of two perfect boxes and their duplicates: half of the detections are wrong without --nms."""
        data = scenes.make_boxes(tmp_path / "data", 1, seed=1)
        _, objects = DetectionDataset.open(data)[0]
        image = DetectionDataset.open(data)[0][0]
        corners = objects.boxes / torch.tensor(image.shape[1:]).flip(0).repeat(2)
        boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
        count = len(boxes)
        logits = torch.full((1, 10, len(scenes.BOX_NAMES)), -9.0)
        for row in range(2 * count):
            logits[0, row, objects.labels[row % count]] = 2.0
        logits[0, count : 2 * count] += -1
        queries = torch.cat([boxes, boxes, torch.full((10 - 2 * count, 4), 0.01)])[None]
        monkeypatch.setattr(TinyViTDetector, "forward", lambda self, images: (logits, queries))
        plot = tmp_path / "new" / "curves.png"
        plain = json.loads(run(*self.command(data, own, "--json")))
        found = json.loads(run(*self.command(data, own, "--json", "--nms", "0.5", "--plot", str(plot))))
        assert (plain["best_f1"], found["best_f1"]) == (100, 100)
        assert found["precision"] == [100.0] * 101
        assert plain["threshold"] > found["threshold"]
        assert Image.open(plot).format == "PNG"
        printed, notes = run_both(*self.command(data, own, "--plot", str(plot), "--per-class"))
        assert f"best F1 100.00 %, at scores of {plain['threshold']:.2f} or more" in printed
        assert "Precision at recall 10, 30, 50, 70, 90 %: 100.0, 100.0, 100.0, 100.0, 100.0 %" in printed
        assert f"Precision-recall curves: {plot}" in notes

    def test_size_and_variant(self, own, tmp_path, capfd, monkeypatch):
        data = scenes.make_boxes(tmp_path / "data", 2, seed=1)
        sizes, measure = [], EVALUATE.evaluate_network

        def record(network, *arguments, **settings):
            sizes.append(network.squares.size)
            return measure(network, *arguments, **settings)

        monkeypatch.setattr(EVALUATE, "evaluate_network", record)
        for options in ((), ("--img-size", "96")):
            run(*self.command(data, own, *options))
        assert sizes == [64, 96]
        assert "another architecture" in error_of(capfd, monkeypatch, *self.command(data, own, "--variant", "5m"))

    def test_text_and_broken_images(self, own, tmp_path, capfd, monkeypatch):
        data = scenes.make_boxes(tmp_path / "data", 3, seed=1)
        damage(data / "images" / "01.png")
        assert "01.png" in error_of(capfd, monkeypatch, *self.command(data, own, "--json"))
        printed, notes = run_both(*self.command(data, own, "--on-broken", "skip", "--per-class"))
        assert "2 images, 2 objects: mAP " in printed
        assert "cannot be read: 1, e.g. 01.png" in notes
        assert "disc" in printed

    def test_errors(self, weights, tmp_path, capfd, monkeypatch):
        data = scenes.make_boxes(tmp_path / "data", 2, seed=1)
        assert "The data has the classes disc, box, but the network has cat, dog, owl" in error_of(
            capfd, monkeypatch, *self.command(data, weights)
        )
        error = error_of(capfd, monkeypatch, *self.command(data, weights, "--tta", "--confusion"))
        assert "--tta, --confusion have no effect with --task detection" in error
        error = error_of(capfd, monkeypatch, "evaluate", str(data), "--task", "detection")
        assert "no published weights for --task detection" in error
