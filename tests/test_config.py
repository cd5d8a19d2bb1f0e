import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kornia_tinyvit import TinyViTConfig
from kornia_tinyvit.config import VARIANTS, resolve_window_sizes


class TestVariants:
    @pytest.mark.parametrize(
        ("name", "dims", "heads", "drop_path"),
        [
            ("5m", (64, 128, 160, 320), (2, 4, 5, 10), 0.0),
            ("11m", (64, 128, 256, 448), (2, 4, 8, 14), 0.1),
            ("21m", (96, 192, 384, 576), (3, 6, 12, 18), 0.2),
        ],
    )
    def test_published(self, name, dims, heads, drop_path):
        config = TinyViTConfig.from_variant(name)
        assert (config.embed_dims, config.num_heads, config.drop_path_rate) == (dims, heads, drop_path)
        assert (config.depths, config.window_sizes, config.img_size) == ((2, 2, 6, 2), (7, 7, 14, 7), 224)

    def test_1m(self):
        config = TinyViTConfig.from_variant("1m")
        assert (config.embed_dims, config.depths, config.num_heads) == ((32, 64, 96, 160), (2, 2, 4, 2), (1, 2, 3, 5))
        assert (config.window_sizes, config.img_size) == ((8, 8, 4, 2), 64)

    def test_unknown(self):
        with pytest.raises(ValueError, match="no TinyViT variant '7m'; choose one of 1m, 5m, 11m, 21m"):
            TinyViTConfig.from_variant("7m")


class TestExceptions:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"embed_dims": (64, 128, 160)}, "4 positive integers"),
            ({"embed_dims": (64, 128, 160, -1)}, "4 positive integers"),
            ({"embed_dims": (64, 128, 160, 3.5)}, "4 positive integers"),
            ({"depths": "2262"}, "4 positive integers"),
            ({"embed_dims": (1, 128, 160, 320)}, "embed_dims\\[0\\] must be at least 2"),
            ({"num_heads": (2, 4, 6, 10)}, "embed_dims\\[2\\]=160 must be a multiple of num_heads\\[2\\]=6"),
            ({"img_size": 31}, "img_size must be an integer of at least 32; got 31"),
            ({"in_chans": 0}, "in_chans"),
            ({"num_classes": -1}, "num_classes"),
            ({"num_classes": True}, "num_classes"),
            ({"local_conv_size": 4}, "must be odd"),
            ({"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
            ({"drop_path_rate": 1.0}, r"probability in \[0, 1\)"),
            ({"drop_rate": float("nan")}, r"probability in \[0, 1\)"),
            ({"activation": "GELU"}, "a class such as torch.nn.GELU"),
            ({"width": 3}, "no field width"),
            ({"mlp_ratio": float("inf")}, "mlp_ratio must be positive"),
            ({"mlp_ratio": 1e-3}, "expand 128 channels to at least one; got 0.001"),
            ({"mbconv_expand_ratio": "4"}, "mbconv_expand_ratio must be positive"),
            ({"drop_rate": None}, r"probability in \[0, 1\); got None"),
            ({"use_checkpoint": (1, 2)}, "use_checkpoint must be True or False"),
            ({"mobile_sam": "no"}, "mobile_sam must be True or False"),
        ],
    )
    def test_fields(self, changes, message):
        with pytest.raises(ValueError, match=message):
            TinyViTConfig.from_variant("5m", **changes)

    def test_lists_become_tuples(self):
        assert TinyViTConfig.from_variant("5m", depths=[1, 2, 3, 4]).depths == (1, 2, 3, 4)


class TestDictionary:
    @given(
        st.sampled_from(list(VARIANTS)),
        st.integers(32, 2048),
        st.sampled_from([nn.GELU, nn.SiLU, nn.ReLU]),
        st.floats(0, 0.9),
    )
    def test_round_trip(self, variant, img_size, activation, drop):
        config = TinyViTConfig.from_variant(variant, img_size=img_size, activation=activation, drop_path_rate=drop)
        assert TinyViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_custom_activation(self):
        class Wave(nn.Module): ...

        with pytest.raises(ValueError, match="Only activations of"):
            TinyViTConfig(activation=Wave).to_dict()

    def test_unknown_activation(self):
        with pytest.raises(ValueError, match="no activation 'system'"):
            TinyViTConfig.from_dict({"activation": "system"})
        with pytest.raises(ValueError, match="no activation 'Parameter'"):
            TinyViTConfig.from_dict({"activation": "Parameter"})

    def test_unknown_field(self):
        with pytest.raises(ValueError, match="no field code"):
            TinyViTConfig.from_dict({"code": "x"})
        with pytest.raises(ValueError, match="has no field ; its fields are"):
            TinyViTConfig.from_dict({"": "x"})


@pytest.mark.parametrize("values", [None, 3, ["img_size"], {1: 2}, "5m"])
def test_not_a_dictionary(values):
    with pytest.raises(ValueError, match="must be a dictionary with field names as keys"):
        TinyViTConfig.from_dict(values)


@pytest.mark.parametrize("name", ["Module", "Transformer", "Flatten", "GLU", "Linear", "functional", 3, ["GELU"]])
def test_not_an_activation(name):
    with pytest.raises(ValueError, match="has no activation"):
        TinyViTConfig.from_dict({"activation": name})


class TestWindows:
    @pytest.mark.parametrize(("img_size", "expected"), [(384, (12, 12, 24, 12)), (512, (16, 16, 32, 16))])
    def test_scale_gives_the_published_sizes(self, img_size, expected):
        assert resolve_window_sizes(VARIANTS["21m"], img_size, "scale") == expected

    def test_scale_keeps_mobile_sams_windows(self):
        encoder = VARIANTS["5m"].replace(img_size=1024, mobile_sam=True)
        assert resolve_window_sizes(encoder, 224, "scale") == (7, 7, 14, 7)

    def test_default_keeps_the_windows(self):
        assert resolve_window_sizes(VARIANTS["5m"], 512, None) == (7, 7, 14, 7)

    @given(st.integers(32, 300))
    def test_fit_never_exceeds_the_feature_map(self, img_size):
        windows = resolve_window_sizes(VARIANTS["5m"], img_size, "fit")
        x = torch.empty(1, 1, img_size, img_size, device="meta")
        for window, original in zip(windows, (7, 7, 14, 7), strict=True):
            x = nn.functional.max_pool2d(x, 3, 4 if x.shape[-1] == img_size else 2, 1)
            assert window == min(original, -(-x.shape[-1] // 1))

    def test_explicit(self):
        assert resolve_window_sizes(VARIANTS["5m"], 224, [8, 8, 16, 8]) == (8, 8, 16, 8)

    @pytest.mark.parametrize("img_size", [float("inf"), float("nan"), 0, "64", True, None])
    def test_img_size(self, img_size):
        with pytest.raises(ValueError, match="img_size must be a positive integer"):
            resolve_window_sizes(VARIANTS["5m"], img_size, "scale")

    @pytest.mark.parametrize("windows", ["fill", (7, 7), (0, 1, 1, 1)])
    def test_window_sizes(self, windows):
        with pytest.raises(ValueError, match="window_sizes must be"):
            resolve_window_sizes(VARIANTS["5m"], 224, windows)
