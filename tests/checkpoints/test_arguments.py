"""Preprocessing in checkpoints of trainings with timm and the official code."""

import argparse
import sys
import types

import pytest
import torch

from kornia_tinyvit import CheckpointError, ImageClassifier, TinyViT
from kornia_tinyvit.checkpoints import read_checkpoint
from kornia_tinyvit.checkpoints.layouts import to_timm
from kornia_tinyvit.preprocessing import Preprocessing

#: Arguments of timm's train.py that concern images, with its defaults.
ARGUMENTS = {
    "model": "tiny_vit_5m_224",
    "img_size": None,
    "input_size": None,
    "crop_pct": None,
    "mean": None,
    "std": None,
    "interpolation": "",
    "train_interpolation": "random",
}
OTHER = {"img_size": 96, "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}


class CfgNode(dict):
    """yacs's, of which the official code makes its configuration."""


def node(**values) -> CfgNode:
    found = CfgNode(values)
    found.__dict__["__immutable__"] = True
    return found


def save_training(tiny, path, **entries):
    weights = {to_timm(name): tensor for name, tensor in tiny.state_dict().items()}
    torch.save({"epoch": 3, "arch": "tiny_vit_5m_224", "state_dict": weights, **entries}, path)
    return path


@pytest.fixture
def yacs(monkeypatch):
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    for name in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, name, module)


class TestTimm:
    def test_arguments(self, tiny, tmp_path):
        path = save_training(tiny, tmp_path / "best.pth.tar", args=argparse.Namespace(**ARGUMENTS | OTHER))
        expected = Preprocessing(96, 0.9, "bilinear", (0.5,) * 3, (0.25,) * 3)
        classifier = ImageClassifier.from_config(pretrained=path)
        assert classifier.preprocessing.settings == classifier.model.preprocessing == expected
        assert classifier.model.config.img_size == 96

    def test_of_a_state_dict(self, tiny):
        found = read_checkpoint({"model": tiny.state_dict(), "args": argparse.Namespace(**ARGUMENTS | OTHER)})
        assert found.preprocessing.std == (0.25,) * 3

    def test_input_size(self, tiny, tmp_path):
        arguments = ARGUMENTS | {"input_size": [3, 96, 96], "crop_pct": 1.0}
        found = read_checkpoint(save_training(tiny, tmp_path / "best.pth", args=argparse.Namespace(**arguments)))
        assert found.preprocessing == Preprocessing(96, 1.0)

    @pytest.mark.parametrize(
        "arguments", [ARGUMENTS, {"img_size": 96, "mean": "x"}, {"input_size": 224, "lr": 1e-3}, {}, None, [1]]
    )
    def test_nothing_stated(self, tiny, tmp_path, arguments):
        """Without a value the preprocessing is the default; other programs use the same names otherwise."""
        arguments = argparse.Namespace(**arguments) if isinstance(arguments, dict) else arguments
        assert read_checkpoint(save_training(tiny, tmp_path / "best.pth", args=arguments)).preprocessing is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"interpolation": "lanczos"}, "interpolation must be one of"),
            ({"crop_mode": "border"}, "expected crop_mode center"),
            ({"img_size": 8}, "img_size"),
            ({"input_size": [3]}, "cannot be used"),
            ({"mean": torch.zeros(3)}, "cannot be used"),
            ({"std": [0, 0, 0]}, "std not 0"),
        ],
    )
    def test_exceptions(self, tiny, tmp_path, changes, message):
        path = save_training(tiny, tmp_path / "best.pth", args=argparse.Namespace(**ARGUMENTS | changes))
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


class TestOfficial:
    @pytest.mark.parametrize(
        ("data", "crops", "expected"),
        [
            ({}, True, Preprocessing(96, 0.875)),
            ({"INTERPOLATION": "random"}, False, Preprocessing(96, None, "bilinear")),
            ({"MEAN_AND_STD_TYPE": "inception"}, True, Preprocessing(96, 0.875, mean=(0.5,) * 3, std=(0.5,) * 3)),
        ],
    )
    def test_configuration(self, yacs, tiny, tmp_path, data, crops, expected):
        data = {"IMG_SIZE": 96, "INTERPOLATION": "bicubic", "MEAN_AND_STD_TYPE": "default", **data}
        config = node(DATA=node(**data), TEST=node(CROP=crops))
        torch.save({"model": tiny.state_dict(), "config": config}, tmp_path / "ckpt_epoch_1.pth")
        model = TinyViT.from_config(pretrained=tmp_path / "ckpt_epoch_1.pth")
        assert (model.preprocessing, model.config.img_size) == (expected, 96)

    def test_unknown_statistics(self, yacs, tiny, tmp_path):
        data = node(IMG_SIZE=96, INTERPOLATION="bicubic", MEAN_AND_STD_TYPE="own")
        torch.save({"model": tiny.state_dict(), "config": node(DATA=data)}, tmp_path / "ckpt_epoch_1.pth")
        with pytest.raises(CheckpointError, match="expected MEAN_AND_STD_TYPE default, inception, clip; got own"):
            read_checkpoint(tmp_path / "ckpt_epoch_1.pth")


def test_pickled_network(tiny, tmp_path):
    tiny.preprocessing = Preprocessing(64, 0.9, "bilinear", (0.5,) * 3, (0.25,) * 3)
    torch.save(tiny, tmp_path / "whole.pt")
    assert TinyViT.from_config(pretrained=tmp_path / "whole.pt").preprocessing == tiny.preprocessing
