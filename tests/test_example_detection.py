"""The detection example, run in a separate process."""

from __future__ import annotations

import pytest

from kornia_tinyvit.data import DetectionDataset
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.training import evaluate
from tests import scenes
from tests.test_examples import EXAMPLES, json_lines, read_uint8, run


@pytest.mark.slow
def test_detect_objects(tmp_path):
    data = scenes.make_boxes(tmp_path / "data", 4, seed=1)
    options = ("--images", 2, "--img-size", 64, "--hidden-dim", 16, "--queries", 8, "--decoder-layers", 1)
    options += ("--denoising", 4, "--epochs", 2, "--batch-size", 2, "--shown", 2, "--device", "cpu", "--out", "runs/it")
    output = run(EXAMPLES / "detect_objects.py", data, *options, cwd=tmp_path)
    assert "2 images, 3 classes, 2 steps" in output
    train, val = json_lines(output)
    assert (train["split"], train["images"], val["split"], val["images"]) == ("train", 2, "val", 4)
    kept = TinyViTDetector.from_config(pretrained=tmp_path / "runs" / "it" / "last.safetensors")
    assert kept.class_names == scenes.BOX_NAMES
    scores = evaluate(kept, DetectionDataset.open(data, "val"))
    assert val["map50"] == pytest.approx(scores.map50, abs=0.01)
    sheet = read_uint8(tmp_path / "runs" / "it" / "train.png")
    assert sheet.shape[1] == 2 * 320 + 8
    resumed = run(EXAMPLES / "detect_objects.py", data, *options, cwd=tmp_path)
    assert json_lines(resumed) == [train, val]
