"""Cascade R-CNN built from torchvision's modules; skipped without torchvision."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kornia_tinyvit import TinyViT
from tests import scenes

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[1] / "examples" / "cascade_rcnn.py"


@pytest.fixture(scope="module")
def cascade():
    """The example as a module."""
    pytest.importorskip("torchvision", reason="Cascade R-CNN uses torchvision's modules")
    spec = importlib.util.spec_from_file_location("cascade_rcnn", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestCascade:
    def build(self, cascade):
        torch.manual_seed(0)
        network = TinyViT.from_config("1m", num_classes=0)
        return cascade.cascade_rcnn(network, 3, channels=16, hidden=32, min_size=96, max_size=192)

    def test_feature_pyramid(self, cascade):
        features = cascade.PyramidBackbone(TinyViT.from_config("1m", num_classes=0), 16)(torch.rand(1, 3, 96, 128))
        assert [tuple(each.shape[2:]) for each in features.values()] == [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
        assert {each.shape[1] for each in features.values()} == {16}

    def test_gradients_reach_every_parameter(self, cascade):
        model = self.build(cascade).train()
        targets = [{"boxes": torch.tensor([[10.0, 20, 60, 80]]), "labels": torch.tensor([2])},
                   {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]  # fmt: skip
        losses = model([torch.rand(3, 90, 120), torch.rand(3, 120, 70)], targets)
        assert {name for name in losses if name[-1] in "012"} == {
            f"{k} {n}" for k in ("scores", "boxes") for n in range(3)
        }
        sum(losses.values()).backward()
        unused = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
        assert unused == []
        assert model.backbone.network.patch_embed.seq[0].c.weight.grad.abs().sum() > 0

    def test_heads_refine_the_boxes_of_the_previous_one(self, cascade):
        model = self.build(cascade).eval()
        proposals = []
        for head in model.roi_heads.heads:
            torch.nn.init.zeros_(head.box_predictor.box.weight)
            head.box_predictor.box.bias.data = torch.tensor([head.box_coder.weights[0] * 0.1, 0.0, 0.0, 0.0])
            head.box_roi_pool.register_forward_pre_hook(lambda _, inputs: proposals.append(inputs[1][0].clone()))
        with torch.inference_mode():
            features = model.backbone(torch.rand(1, 3, 96, 192))
            model.roi_heads(features, [torch.tensor([[20.0, 10, 60, 50]])], [(96, 192)])
        # Each head moves a box of 40 pixels by a tenth of its width.
        assert [each[0].tolist() for each in proposals] == [
            pytest.approx([20 + 4 * n, 10, 60 + 4 * n, 50], abs=1e-3) for n in range(3)
        ]

    def test_training(self, cascade, tmp_path):
        data = scenes.make_boxes(tmp_path / "data", 2, seed=1)
        options = ("--size", 96, "--channels", 32, "--hidden", 64, "--steps", 16, "--lr", 2e-3)
        environment = os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(EXAMPLE), str(data), *map(str, options)]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        first, last = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
        assert (first["parts"], last["step"]) == (8, 15)
        assert last["loss"] < 0.8 * first["loss"]
        assert len(re.findall(r"^\d\d\.png: \d+ boxes", output, re.MULTILINE)) == 2
