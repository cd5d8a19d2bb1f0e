"""Segmenters and MobileSAM measured on the command line."""

from __future__ import annotations

import json

import pytest

from kornia_tinyvit import save_checkpoint
from kornia_tinyvit.data import InstanceDataset, SegmentationDataset
from kornia_tinyvit.training import evaluate
from tests.helpers import error_of, run, run_both
from tests.scenes import NAMES, damage, make_instances, make_scenes
from tests.training.tasks.test_promptable import lively_sam
from tests.training.tasks.test_semantic import make_segmenter


@pytest.fixture
def segmenter(tmp_path) -> str:
    return str(make_segmenter().eval().save(tmp_path / "segmenter.safetensors"))


@pytest.fixture
def sam(tmp_path) -> str:
    return str(save_checkpoint(lively_sam(), tmp_path / "sam.safetensors"))


class TestSemantic:
    def command(self, data, weights, *options):
        return ("evaluate", str(data), "--task", "semantic", "--weights", weights, *options)

    def test_json(self, tmp_path, segmenter):
        data = make_scenes(tmp_path / "data", 3)
        wanted = evaluate(make_segmenter(), SegmentationDataset.open(data))
        result = json.loads(run(*self.command(data, segmenter, "--json", "--per-class")))
        rows = result.pop("per_class")
        assert result == {
            "images": 3,
            "classes_present": 3,
            "mean_iou": round(wanted.mean_iou, 2),
            "pixel_accuracy": round(wanted.pixel_accuracy, 2),
        }
        assert [row["class"] for row in rows] == list(NAMES)
        assert [row["iou"] for row in rows] == pytest.approx(wanted.per_class.tolist(), abs=0.01)
        assert sum(row["pixels"] for row in rows) == wanted.pixels

    def test_text(self, tmp_path, segmenter):
        data = make_scenes(tmp_path / "data", 3)
        printed = run(*self.command(data, segmenter, "--per-class", "--limit", "2"))
        assert [word for line in printed.splitlines() for word in line.split()[:1] if word in NAMES] == list(NAMES)
        assert "2 images: mean IoU " in printed.strip().splitlines()[-1]

    def test_split(self, tmp_path, segmenter):
        for split, seed in (("train", 0), ("val", 5)):
            make_scenes(tmp_path / split, 2, seed)
        described = {split: {kind: f"{split}/{kind}" for kind in ("images", "masks")} for split in ("train", "val")}
        (tmp_path / "data.json").write_text(json.dumps(described | {"classes": list(NAMES)}))
        both = [json.loads(run(*self.command(tmp_path / "data.json", segmenter, "--json", *options)))
                for options in ((), ("--split", "train"))]  # fmt: skip
        wanted = [evaluate(make_segmenter(), SegmentationDataset.open(tmp_path / split)).pixel_accuracy
                  for split in ("val", "train")]  # fmt: skip
        assert [each["pixel_accuracy"] for each in both] == pytest.approx(wanted, abs=0.01)

    def test_broken(self, tmp_path, segmenter, capfd, monkeypatch):
        data = make_scenes(tmp_path / "data", 3)
        damage(data / "images" / "01.png")
        assert "01.png" in error_of(capfd, monkeypatch, *self.command(data, segmenter, "--json"))
        result = json.loads(run(*self.command(data, segmenter, "--json", "--on-broken", "skip")))
        assert (result["images"], result["broken"]) == (2, ["01.png"])

    def test_errors(self, tmp_path, segmenter, capfd, monkeypatch):
        data = make_scenes(tmp_path / "data", 2)
        error = error_of(capfd, monkeypatch, "evaluate", str(data), "--task", "semantic")
        assert "--weights FILE" in error
        error = error_of(capfd, monkeypatch, *self.command(data, segmenter, "--confusion", "--tta"))
        assert "--tta, --confusion have no effect with --task semantic; leave them out" in error
        (data / "classes.txt").write_text("ground\ndisc\ncube")
        assert "has the classes cube, but the network has ground" in error_of(
            capfd, monkeypatch, *self.command(data, segmenter)
        )


class TestPromptable:
    def command(self, data, weights, *options):
        return ("evaluate", str(data), "--task", "promptable", "--weights", weights, *options)

    def test_json(self, tmp_path, sam):
        data = make_instances(tmp_path / "data", 2)
        wanted = evaluate(lively_sam(), InstanceDataset.open(data))
        result = json.loads(run(*self.command(data, sam, "--json", "--workers", "1")))
        rounded = {name: round(value, 2) for name, value in vars(wanted).items()}
        assert result == {"images": 2, **rounded}
        assert result["instances"] == 4

    def test_text(self, tmp_path, sam):
        data = make_instances(tmp_path / "data", 3)
        damage(data / "masks" / "01.png")
        output, notes = run_both(*self.command(data, sam, "--on-broken", "skip"))
        last, broken = (text.strip().splitlines()[-1] for text in (output, notes))
        assert last.startswith("2 images, 4 objects: mean IoU ")
        assert last.endswith("% per point")
        assert broken == "Images left out because they cannot be read: 1, e.g. 01.png"

    def test_options(self, tmp_path, sam, capfd, monkeypatch):
        data = make_instances(tmp_path / "data", 2)
        result = [json.loads(run(*self.command(data, sam, "--json", *options)))
                for options in ((), ("--img-size", "96"), ("--limit", "1"))]  # fmt: skip
        assert result[0]["box_iou"] != result[1]["box_iou"]
        assert [each["instances"] for each in result] == [4, 4, 2]
        error = error_of(capfd, monkeypatch, *self.command(data, sam, "--json", "--min-area", "2000"))
        assert "None of 2 images has an object of at least 2000 pixels" in error
        assert "--per-class has no effect" in error_of(capfd, monkeypatch, *self.command(data, sam, "--per-class"))
