import json

import pytest

pytest.importorskip("transformers")

from kornia_tinyvit.config import VARIANTS, TinyViTConfig
from kornia_tinyvit.huggingface import TinyVitConfig, TinyVitSamConfig, TinyVitSamVisionConfig
from tests.huggingface.helpers import tiny_config


class TestNetwork:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_round_trip(self, variant):
        network = VARIANTS[variant].replace(in_chans=2, local_conv_size=5, mlp_ratio=3.0, drop_rate=0.1)
        config = TinyVitConfig.from_network(network)
        assert config.to_network(1000) == network
        assert config.num_labels == 1000
        assert config.to_network() == network.replace(num_classes=0)

    def test_default(self):
        assert TinyVitConfig().to_network(1000) == VARIANTS["5m"]

    def test_activation(self):
        from torch import nn

        config = TinyVitConfig.from_network(TinyViTConfig(activation=nn.SiLU))
        assert config.activation == "SiLU"
        assert config.to_network().activation is nn.SiLU

    def test_labels(self):
        config = TinyVitConfig.from_network(TinyViTConfig(num_classes=2), id2label={0: "cat", 1: "dog"})
        assert config.num_labels == 2
        assert config.id2label[1] == "dog"

    def test_mobile_sam(self):
        with pytest.raises(ValueError, match="use TinyVitSamConfig"):
            TinyVitConfig.from_network(TinyViTConfig(mobile_sam=True))


class TestCommon:
    """transformers' ConfigTester."""

    def test_json(self, tmp_path):
        config = tiny_config(out_indices=[1, 3])
        config.to_json_file(tmp_path / "config.json")
        again = TinyVitConfig.from_json_file(tmp_path / "config.json")
        assert again.to_dict() == config.to_dict()
        values = json.loads(config.to_json_string())
        assert values["model_type"] == "tinyvit"
        assert values["out_features"] == ["stage1", "stage3"]

    def test_save_and_load(self, tmp_path):
        config = tiny_config(id2label={index: f"name {index}" for index in range(7)})
        config.save_pretrained(tmp_path / "a")
        again = TinyVitConfig.from_pretrained(tmp_path / "a")
        assert again.to_dict() == config.to_dict()
        assert TinyVitConfig.from_pretrained(tmp_path, subfolder="a").to_dict() == config.to_dict()
        assert isinstance(again.embed_dims, tuple)
        assert again.id2label[3] == "name 3"

    def test_common_properties(self):
        config = tiny_config()
        assert (config.hidden_size, config.num_hidden_layers, config.hidden_sizes) == (32, 4, config.embed_dims)
        assert config.num_attention_heads == (1, 2, 3, 4)
        config.img_size = 96
        assert config.image_size == 96

    def test_number_of_labels(self):
        config = TinyVitConfig(num_labels=5)
        assert len(config.id2label) == len(config.label2id) == 5
        config.num_labels = 3
        assert len(config.id2label) == len(config.label2id) == 3


class TestErrors:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("embed_dims", (64, 128, 160), "embed_dims must be 4 positive integers"),
            ("num_heads", (2, 4, 7, 10), r"embed_dims\[2\]=160 must be a multiple"),
            ("drop_path_rate", 1.5, r"probability in \[0, 1\)"),
            ("image_size", 16, "img_size must be an integer of at least 32"),
            ("image_size", "large", "img_size must be an integer of at least 32"),
            ("depths", 3, "depths must be 4 positive integers"),
            ("activation", "Swish", "torch.nn has no activation 'Swish'"),
            ("out_features", ["stage9"], "subset of stage_names"),
        ],
    )
    def test_values(self, field, value, message):
        with pytest.raises(ValueError, match=message):
            TinyVitConfig(**{field: value})

    def test_timm(self, tmp_path):
        (tmp_path / "config.json").write_text('{"architecture": "tiny_vit_5m_224", "num_classes": 1000}')
        with pytest.raises(ValueError, match=r"got one of timm\. Load its folder with"):
            TinyVitConfig.from_pretrained(tmp_path)


class TestSam:
    def test_defaults(self):
        config = TinyVitSamConfig()
        assert config.vision_config.to_network() == VARIANTS["5m"].replace(mobile_sam=True, img_size=1024)
        assert config.prompt_encoder_config.image_embedding_size == 64
        assert config.mask_decoder_config.layer_norm_eps == 1e-5

    def test_sizes_agree(self, tmp_path):
        config = TinyVitSamConfig(vision_config=TinyVitSamVisionConfig(image_size=512))
        assert config.prompt_encoder_config.image_size == 512
        config.save_pretrained(tmp_path)
        again = TinyVitSamConfig.from_pretrained(tmp_path)
        assert again.to_dict() == config.to_dict()
        assert isinstance(again.vision_config, TinyVitSamVisionConfig)
