"""Frozen parts in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kornia_tinyvit import MobileSAM, SemanticSegmenter, TinyViT
from kornia_tinyvit.training import DetectorTraining, PromptedSAM, freeze_parts
from tests.conftest import TINY
from tests.test_detection import make_detector
from tests.training.test_loop import RECIPE, fit, folder, make_model  # noqa: F401


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Return the first two parts of the names of tensors that differ."""
    return {".".join(name.split(".")[:2]) for name, each in module.state_dict().items() if not each.equal(before[name])}


class TestFreezeParts:
    def test_stages(self, images):
        """Frozen stages are in evaluation mode, record no graph, keep their statistics, and learn again afterwards."""
        model = TinyViT(**TINY | {"drop_path_rate": 0.5}).train()
        before, features, learning = snapshot(model), [], [each.requires_grad for each in model.parameters()]
        model.layers[1].register_forward_hook(lambda _, __, found: features.append(found))
        with freeze_parts(model, ["stages=2"]):
            for _ in range(2):
                model.train()(images).sum().backward()
            assert not features[0].requires_grad
            assert torch.equal(*features)
            grown = {name.split(".")[1] for name, each in model.named_parameters() if each.grad is not None}
            assert grown == {"2", "3", "weight", "bias"}
        assert changed(model, before) == {"layers.2", "layers.3"}  # statistics of batch norm
        assert [each.requires_grad for each in model.parameters()] == learning
        model.train()(images)
        assert "patch_embed.seq" in changed(model, before)

    @pytest.mark.parametrize("kind", ["segmenter", "detector", "sam"])
    def test_backbones_of_the_tasks(self, kind):
        encoder = TinyViT(**TINY | {"mobile_sam": kind == "sam", "num_classes": 0})
        model: nn.Module
        if kind == "segmenter":
            model = SemanticSegmenter(encoder, num_classes=2, width=16)
        elif kind == "sam":
            model = PromptedSAM(MobileSAM(encoder, 64))
        else:
            model = DetectorTraining(make_detector())
        every = [each for each in model.parameters() if each.requires_grad]
        with freeze_parts(model, ["backbone", "prompt_encoder"] if kind == "sam" else ["backbone"]):
            kept = [each for each in model.parameters() if each.requires_grad]
            groups = model.parameter_groups(1.0)
            assert {id(each) for group in groups for each in group["params"]} == {id(each) for each in kept}
        assert 0 < len(kept) < len(every)
        names = {name for name, each in model.named_parameters() if any(each is other for other in kept)}
        assert not any(word in name for name in names for word in ("patch_embed", "prompt_encoder", "stages."))
        assert any("decoder" in name for name in names)

    @pytest.mark.parametrize("part", ["stages=0", "stages=5", "stages", "prompt_encoder", "head", "image_encoder"])
    def test_unknown_part(self, tiny, part):
        with (
            pytest.raises(ValueError, match=f"no part '{part}' to freeze; expected backbone, stages=1 to stages=4\\."),
            freeze_parts(tiny, [part]),
        ):
            pass
        assert all(each.requires_grad for each in tiny.parameters())


def test_training(folder, tmp_path):  # noqa: F811
    model = make_model(drop_path_rate=0.3)
    before = snapshot(model)
    fit(folder, tmp_path / "out", replace(RECIPE, epochs=1, freeze=("stages=3",)), model)
    assert changed(model, before) == {"layers.3", "norm_head.weight", "norm_head.bias", "head.weight", "head.bias"}
    assert all(each.requires_grad for each in model.parameters())
    with pytest.raises(ValueError, match=r"recipe\.freeze: it has \['stages=3'\], requested \[\]"):
        fit(folder, tmp_path / "out", replace(RECIPE, epochs=1))
