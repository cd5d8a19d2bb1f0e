import argparse
import json

import pytest
import torch

from kornia_tinyvit import ImageClassifier, TinyViT
from kornia_tinyvit.checkpoints.catalog import find_weights
from tests.helpers import CIFAR, error_of, make_weights, run, run_both


@pytest.fixture
def weights(tiny, tmp_path) -> str:
    return make_weights(tiny, tmp_path)


class TestTransformers:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("transformers")

    def test_folder(self, weights, images, tmp_path):
        folder = tmp_path / "hub"
        output = run("convert", "--out", str(folder), "--weights", weights, "--name", "me/mine")
        assert output.splitlines()[-1] == str(folder)
        classifier = ImageClassifier.from_config(pretrained=folder)
        assert classifier.class_names == CIFAR
        assert torch.equal(classifier.model(images), TinyViT.from_config(pretrained=weights)(images))
        assert "# me/mine" in (folder / "README.md").read_text()

    def test_folder_that_is_a_file(self, tmp_path, capfd, monkeypatch):
        (tmp_path / "hub").write_text("mine")
        assert "hub is a file; expected a folder" in error_of(
            capfd, monkeypatch, "convert", "--out", str(tmp_path / "hub")
        )
        assert (tmp_path / "hub").read_text() == "mine"

    def test_of_the_package(self, tmp_path):
        run("convert", "--out", str(tmp_path / "hub"))
        assert json.loads((tmp_path / "hub" / "config.json").read_text())["id2label"]["7"] == "horse"


class TestOtherFormats:
    def test_around(self, weights, images, tmp_path):
        """From a file to timm's folder and from there to a file again."""
        run("convert", "--out", str(tmp_path / "timm"), "--weights", weights, "--format", "timm")
        values = json.loads((tmp_path / "timm" / "config.json").read_text())
        assert values["label_names"] == list(CIFAR)
        assert values["pretrained_cfg"]["crop_pct"] == 15 / 16
        out = tmp_path / "again.safetensors"
        run("convert", "--out", str(out), "--weights", str(tmp_path / "timm"))
        again = ImageClassifier.from_config(pretrained=out)
        assert again.class_names == CIFAR
        assert again.model.config == TinyViT.from_config(pretrained=weights).config
        assert torch.equal(again.model(images), TinyViT.from_config(pretrained=weights)(images))

    def test_moving_average(self, tiny, tmp_path):
        average = {name: tensor + 1 for name, tensor in tiny.state_dict().items()}
        content = {"state_dict": tiny.state_dict(), "state_dict_ema": average, "args": argparse.Namespace(lr=1e-3)}
        torch.save(content, tmp_path / "last.pth.tar")
        command = ("convert", "--weights", str(tmp_path / "last.pth.tar"), "--out", str(tmp_path / "a.safetensors"))
        _, notes = run_both(*command)
        assert "Left out: args (argparse.Namespace)" in notes
        assert "Also holds EMA weights (state_dict_ema)" in notes
        assert torch.equal(TinyViT.from_config(pretrained=tmp_path / "a.safetensors").head.weight, tiny.head.weight)
        run(*command, "--use-ema")
        found = TinyViT.from_config(pretrained=tmp_path / "a.safetensors")
        assert torch.equal(found.head.weight, tiny.head.weight + 1)

    def test_errors(self, tmp_path, capfd, monkeypatch):
        command = ("convert", "--out", str(tmp_path / "x"), "--format", "timm", "--weights")
        assert "There is no checkpoint file" in error_of(capfd, monkeypatch, *command, str(tmp_path / "none.pth"))
        assert "has no config.json" in error_of(capfd, monkeypatch, *command, str(tmp_path))
        assert "has no EMA weights" in error_of(
            capfd, monkeypatch, *command, str(find_weights("1m", "cifar10").asset_path), "--use-ema"
        )
        assert "--use-ema has no effect" in error_of(capfd, monkeypatch, *command[:-1], "--use-ema")
        assert not (tmp_path / "x").exists()
