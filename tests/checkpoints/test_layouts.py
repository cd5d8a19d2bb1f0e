import copy
import json

import pytest
import torch
from torch import Tensor, nn

from kornia_tinyvit import TinyViT
from kornia_tinyvit.checkpoints.catalog import find_weights
from kornia_tinyvit.checkpoints.layouts import find_network
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
        found = find_network(published(f"{layout}/tiny_vit_{network}"))
        assert found.layout == layout
        assert found.left_out == ()
        assert shapes(found.tensors) == own(network.split("_")[0], WEIGHTS[network])

    def test_mobile_sam(self):
        whole = published("mobile_sam.pt")
        found = find_network(whole)
        assert found.layout == "mobile_sam"
        assert shapes(found.tensors) == own("5m", "mobile_sam")
        # Only the rest of the model and the derived tables are left out.
        assert len(found.tensors) + len(found.left_out) == len(whole)
        rest = {name for name in found.left_out if name.startswith(("prompt_encoder.", "mask_decoder."))}
        assert set(found.left_out) - rest == {name for name in whole if name.endswith("attention_bias_idxs")}
        assert found.others.keys() == rest


def prefixed(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def assert_found(content: object, model: nn.Module, *left_out: str, use_ema: bool = False) -> None:
    """Assert that the tensors of a network are found, and that the rest is reported."""
    found = find_network(content, use_ema)
    expected = model.state_dict()
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)
    assert found.left_out == left_out


class TestFindNetwork:
    def test_official_names_are_unchanged(self, tiny):
        given = tiny.state_dict()
        found = find_network(given)
        assert (found.layout, found.left_out, found.ema) == ("official", (), ())
        assert all(found.tensors[name] is tensor for name, tensor in given.items())

    def test_timm(self, tiny):
        expected = tiny.state_dict()
        found = find_network({to_timm(name): tensor for name, tensor in expected.items()})
        assert found.layout == "timm"
        assert found.tensors.keys() == expected.keys()
        assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("prefix", ["network.", "tinyvit.network."])
    def test_transformers(self, tiny, prefix):
        tiny.reset_classifier(0)
        head = {"classifier.weight": torch.zeros(5, 32), "classifier.bias": torch.zeros(5)}
        found = find_network(prefixed(prefix, tiny) | head)
        assert found.layout == "transformers"
        assert found.tensors.keys() == tiny.state_dict().keys() | {"head.weight", "head.bias"}
        assert found.left_out == ()

    def test_derived_tables_are_dropped_and_reported(self, tiny):
        tables = {f"layers.{stage}.blocks.0.attn.attention_bias_idxs": torch.zeros(4, 4).long() for stage in (1, 2, 3)}
        assert_found(tiny.state_dict() | tables, tiny, *tables)

    @pytest.mark.parametrize(
        "prefix",
        [
            *("module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module."),
            *("net.", "backbone.", "module.model.", "lightning_module.net._orig_mod.encoder.", "network."),
        ],
    )
    def test_prefixes(self, tiny, prefix):
        assert_found(prefixed(prefix, tiny), tiny)
        beside = {"criterion.weight": torch.zeros(7), "n_averaged": torch.tensor(3)}
        assert_found(beside | prefixed(prefix, tiny), tiny, *beside)
        in_timm = {f"{prefix}{to_timm(name)}": tensor for name, tensor in tiny.state_dict().items()}
        assert_found(in_timm | beside, tiny, *beside)

    @pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "weights", "module", "net"])
    def test_training_checkpoint(self, tiny, key):
        assert_found({"epoch": 3, key: tiny.state_dict(), "best": 80.7}, tiny, "epoch", "best")

    def test_nested(self, tiny):
        optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
        content = {"state": {"model": prefixed("module.", tiny), "optimizer": optimizer}, "epoch": 3}
        assert_found(content, tiny, "optimizer", "epoch")
        assert_found([tiny.state_dict(), optimizer], tiny, "1")

    def test_modules(self, tiny):
        """Whole modules, as of ultralytics' ``{"ema": module}``."""
        assert_found({"model": None, "ema": nn.ModuleDict({"net": tiny}), "epoch": 3}, tiny, "model", "epoch")

    def test_wrapped_part_of_mobile_sam(self, tiny):
        others = {"mask_decoder.weight": torch.zeros(2), "prompt_encoder.weight": torch.ones(2)}
        content = prefixed("model.image_encoder._orig_mod.", tiny)
        content |= {f"model.{name}": tensor for name, tensor in others.items()} | {"loss.weight": torch.ones(1)}
        found = find_network({"state_dict": content})
        assert found.layout == "mobile_sam"
        assert found.tensors.keys() == tiny.state_dict().keys()
        assert found.others == others
        assert found.left_out == ("model.mask_decoder.weight", "model.prompt_encoder.weight", "loss.weight")

    def test_names_of_one_module(self, tiny):
        """A module that is an attribute of several others has several names in a state dict."""
        content = prefixed("net.", tiny) | prefixed("alias.", tiny)
        assert_found(content, tiny, *prefixed("alias.", tiny))

    def test_several(self, tiny):
        student, teacher = prefixed("student.", tiny), prefixed("teacher.", copy.deepcopy(tiny))
        with pytest.raises(ValueError, match=r"several TinyViTs, 'state_dict\.student', 'state_dict\.teacher'"):
            find_network({"state_dict": student | teacher})
        assert_found(student, tiny)

    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_state_dict", "ema", "swa_model", "averaged"])
    def test_averages(self, tiny, key, prefix):
        average = copy.deepcopy(tiny)
        average.norm_head.bias.data += 1
        content = {"state_dict": prefixed(prefix, tiny), key: prefixed(prefix, average), "epoch": 3}
        assert_found(content, tiny, "epoch")
        assert find_network(content).ema == (key,)
        assert_found(content, average, "state_dict", "epoch", use_ema=True)
        assert_found({key: prefixed(prefix, average)}, average)

    def test_averages_of_lightning(self, tiny):
        """The callback ``WeightAveraging`` stores the average as ``state_dict``, an own module has a prefix."""
        average = copy.deepcopy(tiny)
        average.norm_head.bias.data += 1
        content = {"state_dict": prefixed("net.", average), "current_model_state": prefixed("net.", tiny)}
        assert_found(content, tiny)
        assert_found(content, average, "current_model_state", use_ema=True)
        content = {"state_dict": prefixed("net.", tiny) | prefixed("net_ema.module.", average)}
        assert_found(content, tiny)
        assert find_network(content).ema == ("state_dict.net_ema",)
        content = {
            "state_dict": prefixed("net.", tiny),
            "callbacks": {"EMACallback": {"weights": average.state_dict()}},
        }
        assert_found(content, tiny)
        assert find_network(content).ema == ("callbacks.EMACallback.weights",)

    def test_no_average(self, tiny):
        with pytest.raises(ValueError, match="has no EMA weights; omit use_ema=True"):
            find_network({"schema": tiny.state_dict()}, use_ema=True)

    def test_input_is_not_modified(self, tiny):
        given = {f"module.{to_timm(name)}": tensor for name, tensor in tiny.state_dict().items()}
        names = list(given)
        find_network(given)
        assert list(given) == names

    def test_cycles(self, tiny):
        content = {"model": tiny.state_dict()}
        content["self"] = content["list"] = [content]
        assert_found(content, tiny)

    @pytest.mark.parametrize("content", [{"epoch": 3}, {"model": "5m"}, {"model.weight": 1}, [1, 2], None, {}])
    def test_other_content(self, content):
        with pytest.raises(ValueError, match=r"has no (TinyViT|state dict)"):
            find_network(content)
