import json

import pytest
import torch
from safetensors.torch import load_file

from kornia_tinyvit import CheckpointError, ImageClassifier, TinyViT, TinyViTConfig, load_checkpoint
from kornia_tinyvit.checkpoints import read_checkpoint
from kornia_tinyvit.checkpoints.catalog import find_weights
from kornia_tinyvit.checkpoints.hub import timm_config, write_timm_folder
from kornia_tinyvit.checkpoints.layouts import find_network, to_timm
from kornia_tinyvit.preprocessing import Preprocessing
from tests.checkpoints.test_layouts import published
from tests.checkpoints.test_layouts import to_timm as reference_name
from tests.conftest import shared

PREPROCESSING = Preprocessing(64, 0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
NAMES = tuple("abcdefg")

#: A config.json as timm writes it (``save_config_for_hf``) for its 5m.
OF_TIMM = {
    "architecture": "tiny_vit_5m_224",
    "num_classes": 1000,
    "num_features": 320,
    "pretrained_cfg": {
        "tag": "dist_in22k_ft_in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 1000,
        "pool_size": [7, 7],
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "head.fc",
    },
}


class TestTimm:
    def test_round_trip(self, tiny, images, tmp_path):
        write_timm_folder(tiny, tmp_path / "timm", NAMES)
        found = read_checkpoint(tmp_path / "timm")
        assert found.layout == "timm"
        assert found.config == tiny.config
        assert found.class_names == NAMES
        assert torch.equal(TinyViT.from_config(pretrained=tmp_path / "timm")(images), tiny(images))

    def test_names(self, tiny, tmp_path):
        write_timm_folder(tiny, tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        assert tensors.keys() == {reference_name(name) for name in tiny.state_dict()}

    @pytest.mark.parametrize("network", ["5m_224", "21m_512"])
    def test_published_names(self, network):
        ours = find_network(published(f"timm/tiny_vit_{network}")).tensors
        assert {to_timm(name) for name in ours} == published(f"timm/tiny_vit_{network}").keys()

    def test_real_weights(self, tmp_path):
        """Weights written by timm are unchanged after reading and writing them."""
        weights = load_file(shared("reference/timm_tiny.safetensors"))
        model = TinyViT.from_config(pretrained=shared("reference/timm_tiny.safetensors"))
        write_timm_folder(model, tmp_path)
        again = load_file(tmp_path / "model.safetensors")
        assert {name: tensor for name, tensor in again.items() if name in weights}.keys() == weights.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())

    def test_config_of_timm(self, tiny, tmp_path):
        write_timm_folder(tiny, tmp_path)
        values = OF_TIMM | {"label_names": {str(index): name for index, name in enumerate(NAMES)}}
        values["pretrained_cfg"] = OF_TIMM["pretrained_cfg"] | {"input_size": [3, 96, 96]}
        (tmp_path / "config.json").write_text(json.dumps(values))
        found = read_checkpoint(tmp_path)
        assert found.config.img_size == 96
        assert found.class_names == NAMES
        assert ImageClassifier.from_config(pretrained=tmp_path).class_names == NAMES

    @pytest.mark.parametrize(
        ("variant", "name", "architecture"),
        [
            ("5m", "in1k", "tiny_vit_5m_224"),
            ("11m", "in22k", "tiny_vit_11m_224"),
            ("21m", "in1k", "tiny_vit_21m_224"),
            ("21m", "in1k_384", "tiny_vit_21m_384"),
            ("21m", "in1k_512", "tiny_vit_21m_512"),
        ],
    )
    def test_architecture_names(self, variant, name, architecture):
        weights = find_weights(variant, name)
        values = timm_config(weights.config, weights.preprocessing)
        assert values["architecture"] == architecture
        assert "model_args" not in values
        assert values["num_classes"] == weights.num_classes
        assert values["pretrained_cfg"]["input_size"] == [3, weights.img_size, weights.img_size]

    def test_unnamed_architecture(self):
        values = timm_config(TinyViTConfig.from_variant("1m", in_chans=1), PREPROCESSING)
        assert values["architecture"] == "tiny_vit_5m_224"
        assert values["model_args"] == {
            "in_chans": 1,
            "embed_dims": (32, 64, 96, 160),
            "depths": (2, 2, 4, 2),
            "num_heads": (1, 2, 3, 5),
            "window_sizes": (8, 8, 4, 2),
        }

    def test_same_fields_as_timm(self):
        values = timm_config(find_weights("5m", "in1k").config, Preprocessing(224, 0.95))
        for name, value in OF_TIMM["pretrained_cfg"].items():
            if name not in ("tag", "mean", "std"):
                assert values["pretrained_cfg"][name] == value, name

    def test_errors(self, tiny, tmp_path):
        with pytest.raises(ValueError, match="no MobileSAM"):
            timm_config(TinyViTConfig(mobile_sam=True), PREPROCESSING)
        with pytest.raises(ValueError, match="activation GELU only"):
            timm_config(TinyViTConfig(activation=torch.nn.ReLU), PREPROCESSING)
        with pytest.raises(ValueError, match="Got 2 class names for 7 classes"):
            write_timm_folder(tiny, tmp_path, ["a", "b"])
        with pytest.raises(TypeError, match="Expected a TinyViT; got Linear"):
            write_timm_folder(torch.nn.Linear(1, 1), tmp_path)
        assert not list(tmp_path.iterdir())


class TestReading:
    @pytest.fixture
    def folder(self, tiny, tmp_path):
        write_timm_folder(tiny, tmp_path / "timm")
        return tmp_path / "timm"

    def test_load_checkpoint(self, folder, tiny, images):
        model = TinyViT.from_config(tiny.config).eval()
        report = load_checkpoint(model, folder)
        assert report.layout == "timm"
        assert torch.equal(model(images), tiny(images))

    def test_relative_name(self, folder, monkeypatch):
        monkeypatch.chdir(folder.parent)
        assert TinyViT.from_config(pretrained="timm").config.img_size == 64

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (None, r"has no config\.json; expected a folder of the Hugging Face hub"),
            ({"model_type": "vit"}, "is the configuration of vit; expected a TinyViT"),
            ({"architecture": "resnet50"}, "expected a TinyViT of timm; got resnet50"),
            ([1, 2], "expected a JSON object in config.json; got list"),
            ({"model_type": "tinyvit", "depths": [1, 1]}, "depths must be 4 positive integers"),
            ({"architecture": "tiny_vit_5m_224", "pretrained_cfg": {"input_size": 3}}, "cannot be used"),
            ({"architecture": "tiny_vit_5m_224", "label_names": {"a": "b"}}, "cannot be used"),
        ],
    )
    def test_errors(self, folder, config, message):
        if config is None:
            (folder / "config.json").unlink()
        else:
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(folder)

    def test_damaged_config(self, folder):
        (folder / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match="cannot be used"):
            read_checkpoint(folder)

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"There is no checkpoint file .*model\.safetensors"):
            read_checkpoint(folder)

    def test_configuration_of_another_network(self, folder):
        values = {"model_type": "tinyvit", "architectures": ["TinyVitForImageClassification"]}
        (folder / "config.json").write_text(json.dumps(values | {"id2label": {str(i): str(i) for i in range(7)}}))
        with pytest.raises(CheckpointError, match=r"configuration stored in .* is of another network"):
            read_checkpoint(folder)
