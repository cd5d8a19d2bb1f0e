import json

import pytest
import torch
from torch import Tensor

from kornia_tinyvit import TinyViT
from kornia_tinyvit.checkpoints.catalog import find_weights
from kornia_tinyvit.checkpoints.layouts import translate, unwrap
from tests.conftest import shared

WEIGHTS = {"5m_224": "in1k", "11m_224": "in1k", "21m_224": "in1k", "21m_384": "in1k_384", "21m_512": "in1k_512"}


def published(name: str) -> dict[str, Tensor]:
    """Tensors without memory under the names and with the shapes of a published file."""
    shapes = json.loads(shared("reference/checkpoint_keys.json").read_text())[name]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def own(variant: str, weights: str) -> dict[str, torch.Size]:
    """The names and shapes of our network."""
    with torch.device("meta"):
        model = TinyViT.from_config(find_weights(variant, weights).config)
    return shapes(model.state_dict())


def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def to_timm(name: str) -> str:
    """Convert a name to timm's part by part, independent of the package's patterns."""
    parts = name.split(".")
    if parts[0] == "head":
        return ".".join(["head", "fc", *parts[1:]])
    if parts[0] == "norm_head":
        return ".".join(["head", "norm", *parts[1:]])
    if parts[:2] == ["patch_embed", "seq"]:
        parts[1:3] = [{"0": "conv1", "2": "conv2"}[parts[2]]]
    if parts[0] == "layers":
        parts[0] = "stages"
        if parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + 1)
    return ".".join("conv" if part == "c" else part for part in parts)


class TestPublished:
    @pytest.mark.parametrize("network", WEIGHTS)
    @pytest.mark.parametrize("layout", ["official", "timm"])
    def test_names_and_shapes(self, layout, network):
        tensors, found, left_out = translate(published(f"{layout}/tiny_vit_{network}"))
        assert found == layout
        assert left_out == []
        assert shapes(tensors) == own(network.split("_")[0], WEIGHTS[network])

    def test_mobile_sam(self):
        whole = published("mobile_sam.pt")
        tensors, found, left_out = translate(whole)
        assert found == "mobile_sam"
        assert shapes(tensors) == own("5m", "mobile_sam")
        # Only the rest of the model and the derived tables are left out.
        assert len(tensors) + len(left_out) == len(whole)
        rest = {name for name in left_out if name.startswith(("prompt_encoder.", "mask_decoder."))}
        assert set(left_out) - rest == {name for name in whole if name.endswith("attention_bias_idxs")}


class TestTranslate:
    def test_official_names_are_unchanged(self, tiny):
        given = tiny.state_dict()
        tensors, layout, left_out = translate(given)
        assert (layout, left_out) == ("official", [])
        assert tensors.keys() == given.keys()
        assert all(tensors[name] is tensor for name, tensor in given.items())

    def test_timm(self, tiny):
        expected = tiny.state_dict()
        tensors, layout, _ = translate({to_timm(name): tensor for name, tensor in expected.items()})
        assert layout == "timm"
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)

    def test_derived_tables_are_dropped_and_reported(self, tiny):
        tables = {f"layers.{stage}.blocks.0.attn.attention_bias_idxs": torch.zeros(4, 4).long() for stage in (1, 2, 3)}
        tensors, _, left_out = translate(tiny.state_dict() | tables)
        assert left_out == list(tables)
        assert tensors.keys() == tiny.state_dict().keys()

    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module."]
    )
    def test_prefixes(self, tiny, prefix):
        tensors, layout, _ = translate({prefix + name: tensor for name, tensor in tiny.state_dict().items()})
        assert layout == "official"
        assert tensors.keys() == tiny.state_dict().keys()

    def test_prefix_of_some_names(self):
        names = {"module.a", "b"}
        assert translate(dict.fromkeys(names, torch.zeros(1)))[0].keys() == names

    def test_input_is_not_modified(self, tiny):
        given = {f"module.{to_timm(name)}": tensor for name, tensor in tiny.state_dict().items()}
        names = list(given)
        translate(given)
        assert list(given) == names

    def test_empty(self):
        assert translate({}) == ({}, "official", [])


class TestUnwrap:
    @pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
    def test_training_checkpoint(self, tiny, key):
        weights = tiny.state_dict()
        assert unwrap({key: weights, "epoch": 3, "max_accuracy": 80.7}) is weights

    def test_nested(self, tiny):
        weights = tiny.state_dict()
        assert unwrap({"state_dict": {"model": weights}, "epoch": 3}) is weights

    @pytest.mark.parametrize("content", [{"epoch": 3}, {"model": "5m"}, {"model.weight": 1}, [1, 2], None])
    def test_other_content(self, content):
        assert unwrap(content) is content
