"""The checks that transformers applies to all its models.

They correspond to ``tests/test_modeling_common.py`` and ``tests/test_backbone_common.py`` of transformers, which its
wheel does not contain. The following do not apply:

- text: token embeddings, causal masks, generation, caches, ``inputs_embeds``, feed-forward chunking;
- flash and flex attention: they do not support a learned attention bias;
- offloading to the CPU or the disk, splitting between devices and tensor parallelism: a convolution is fused with its
  norm at every call, so the hooks that load their weights are not called. ``_no_split_modules`` keeps the network, at
  most 85 MB, on one device;
- initialization with a configured range: the initialization is that of the network and tested here;
- remote code: the classes are part of an installed package.

Problem types, gradient checkpointing, training and export are tested in the other files of this folder.
"""

import copy
import inspect

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.backbone_utils import BackboneType

from kornia_tinyvit.huggingface import TinyVitBackbone, TinyVitConfig, TinyVitForImageClassification, TinyVitModel
from kornia_tinyvit.layers import Attention
from tests.huggingface.helpers import tiny_backbone, tiny_classifier, tiny_config

MODELS = {
    "model": lambda: tiny_classifier().tinyvit,
    "classifier": tiny_classifier,
    "backbone": lambda: tiny_backbone(out_indices=[1, 3]),
}


@pytest.fixture(params=MODELS)
def model(request) -> PreTrainedModel:
    return MODELS[request.param]().eval()


def first(model: PreTrainedModel, images: torch.Tensor, **kwargs) -> torch.Tensor:
    """Return the first output of a model as one tensor."""
    output = model(images, return_dict=False, **kwargs)[0]
    return output if isinstance(output, torch.Tensor) else torch.cat([each.flatten(1) for each in output], 1)


class TestFiles:
    def test_save_and_load(self, model, images, tmp_path):
        model.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert not again.training
        assert torch.equal(first(again, images), first(model, images))

    def test_tensors_of_the_file(self, model, tmp_path):
        """The file contains exactly the state dict, with all buffers."""
        model.save_pretrained(tmp_path)
        saved, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], state[name]) for name in state)
        assert {name for name, _ in model.named_buffers()} <= state.keys()

    def test_contiguous(self, model, tmp_path):
        model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
        assert all(
            parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last)
            for parameter in type(model).from_pretrained(tmp_path).parameters()
        )

    @pytest.mark.parametrize("kind", [TinyVitForImageClassification, TinyVitModel, TinyVitBackbone])
    def test_from_classifier(self, kind, images, tmp_path):
        tiny_classifier().save_pretrained(tmp_path)
        model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        expected = tiny_classifier().tinyvit(images).last_hidden_state
        found = model(images, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(found, expected)

    def test_classifier_from_model(self, tmp_path):
        tiny_classifier().tinyvit.save_pretrained(tmp_path)
        model, info = TinyVitForImageClassification.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
        assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
        assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert not model.classifier.bias.any()

    def test_mismatched_head(self, tmp_path):
        tiny_classifier().save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="mismatch"):
            TinyVitForImageClassification.from_pretrained(tmp_path, num_labels=4)
        model = TinyVitForImageClassification.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
        assert model(torch.rand(1, 3, 64, 64)).logits.shape == (1, 4)
        assert torch.equal(model.tinyvit.network.norm_head.weight, tiny_classifier().tinyvit.network.norm_head.weight)

    def test_missing_weights_are_initialized(self, tmp_path):
        """Tensors missing in a file are initialized, not left uninitialized."""
        tiny_classifier().save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        save_file({"classifier.bias": load_file(path)["classifier.bias"]}, path, {"format": "pt"})
        model = TinyVitForImageClassification.from_pretrained(tmp_path)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert torch.equal(module.running_mean, torch.zeros_like(module.running_mean))
                assert torch.equal(module.running_var, torch.ones_like(module.running_var))
                assert module.num_batches_tracked == 0
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                assert torch.equal(module.weight, torch.ones_like(module.weight))
                assert not module.bias.any()
            if isinstance(module, nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                assert bound / 4 < module.weight.abs().max() <= bound
            if isinstance(module, Attention):
                assert not module.attention_biases.any()
                assert module.qkv.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert torch.equal(model.classifier.bias, tiny_classifier().classifier.bias)

    def test_torch_save(self, model, images, tmp_path):
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        again = type(model)(model.config).eval()
        again.load_state_dict(torch.load(tmp_path / "weights.pt"))
        assert torch.equal(first(again, images), first(model, images))

    def test_precision(self, model, tmp_path):
        model.to(torch.bfloat16).save_pretrained(tmp_path)
        assert type(model).from_pretrained(tmp_path).dtype == torch.bfloat16  # as it was saved
        again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
        assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}

    def test_state_dict(self, model, images):
        """Load from a configuration and a state dict."""
        again = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
        assert torch.equal(first(again, images), first(model, images))


class TestAutoClasses:
    def test_classes(self, tmp_path):
        tiny_classifier().save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is TinyVitConfig
        assert type(AutoModel.from_pretrained(tmp_path)) is TinyVitModel
        assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is TinyVitForImageClassification
        assert type(AutoModel.from_config(tiny_config())) is TinyVitModel
        assert type(AutoBackbone.from_config(tiny_config())) is TinyVitBackbone


class TestDevices:
    def test_device_map(self, model, images, tmp_path):
        pytest.importorskip("accelerate")
        model.save_pretrained(tmp_path)
        for device_map in ("cpu", "auto", {"": "cpu"}):
            again = type(model).from_pretrained(tmp_path, device_map=device_map)
            torch.testing.assert_close(first(again, images.to(again.device)).cpu(), first(model, images))

    def test_no_split(self, model):
        accelerate = pytest.importorskip("accelerate")
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        memory = {0: size // 2, "cpu": 10 * size}
        found = accelerate.infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules))
        network = {device for name, device in found.items() if "network" in name or name in ("", "tinyvit")}
        assert network == {"cpu"}

    def test_meta_device(self, model):
        with torch.device("meta"):
            empty = type(model)(model.config)
        assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
        empty.load_state_dict(model.state_dict(), assign=True)
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(first(empty.eval(), images), first(model, images))

    def test_deep_copy(self, model, images):
        again = copy.deepcopy(model)
        again.config._attn_implementation = "eager"
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(first(model, images), first(copy.deepcopy(model), images))
        assert again(images, output_attentions=True).attentions  # the attention uses the copied configuration


class TestForward:
    def test_signature(self, model):
        assert next(iter(inspect.signature(model.forward).parameters)) == "pixel_values"
        assert model.main_input_name == "pixel_values"

    def test_determinism(self, model, images):
        assert torch.equal(first(model, images), first(model, images))

    def test_batching_equivalence(self, model, images):
        one_by_one = torch.cat([first(model, image[None]) for image in images])
        torch.testing.assert_close(first(model, images), one_by_one, rtol=1e-4, atol=1e-5)

    def test_input_embeddings(self, model):
        assert isinstance(model.get_input_embeddings(), nn.Module)
        assert model.get_output_embeddings() is None

    def test_tuple_and_dict(self, model, images):
        options = {"output_hidden_states": True}
        as_dict, as_tuple = model(images, **options), model(images, return_dict=False, **options)
        flat = [each for value in as_dict.to_tuple() for each in (value if isinstance(value, tuple) else (value,))]
        other = [each for value in as_tuple for each in (value if isinstance(value, tuple) else (value,))]
        assert len(flat) == len(other)
        assert all(torch.equal(*pair) for pair in zip(flat, other, strict=True))

    def test_retained_gradients(self, model, images):
        model.set_attn_implementation("eager")
        outputs = model(images, output_hidden_states=True, output_attentions=True)
        states = (*outputs.hidden_states[:2], outputs.attentions[0])
        for state in states:
            state.retain_grad()
        outputs.hidden_states[-1].square().sum().backward()
        assert all(state.grad is not None for state in states)

    def test_gradients_of_all_parameters(self, model, images):
        for output in model.train()(images, return_dict=False):
            sum(each.square().sum() for each in output).backward(retain_graph=True)
        # The backbone returns the feature maps of its first and third stage.
        unused = ("layers.2.downsample", "layers.3") if isinstance(model, TinyVitBackbone) else ()
        idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert all(any(part in name for part in unused) for name in idle)

    def test_compiled(self, images):
        model = tiny_classifier(depths=(1, 1, 1, 1))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(first(compiled, images), first(model, images))

    def test_size(self, model):
        assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000

    def test_tags(self, model):
        assert "tinyvit" in model.model_tags


class TestBackbone:
    def test_configuration(self):
        config = TinyVitConfig()
        assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
        assert (config.out_features, config.out_indices) == (["stage4"], [4])
        assert TinyVitConfig(out_features=["stage1", "stage3"]).out_indices == [1, 3]
        assert TinyVitConfig(out_indices=[0, 2]).out_features == ["stem", "stage2"]
        both = TinyVitConfig(out_features=["stem", "stage1"], out_indices=[0, 1])
        assert (both.out_features, both.out_indices) == (["stem", "stage1"], [0, 1])
        with pytest.raises(ValueError, match="same stages"):
            TinyVitConfig(out_features=["stage1", "stage2"], out_indices=[0, 2])

    def test_changed_configuration(self, images):
        config = tiny_config(out_indices=[1, 3])
        config.out_features = ["stem", "stage4"]
        backbone = TinyVitBackbone(config).eval()
        assert [each.shape[1] for each in backbone(images).feature_maps] == backbone.channels == [16, 32]
        config.out_indices = None
        assert TinyVitBackbone(config).channels == [32]

    def test_attributes(self):
        backbone = tiny_backbone(out_indices=[1, 3])
        assert isinstance(backbone.backbone_type, BackboneType)
        assert backbone.num_features == [16, 16, 16, 24, 32]
        assert backbone.out_feature_channels == dict(zip(backbone.stage_names, backbone.num_features, strict=True))
        assert (backbone.out_features, backbone.out_indices) == (["stage1", "stage3"], [1, 3])
        assert backbone.channels == [16, 24]

    def test_outputs(self, images):
        backbone = tiny_backbone(out_indices=[1, 3])
        outputs = backbone(images)
        assert isinstance(outputs.feature_maps, tuple)
        assert [tuple(each.shape) for each in outputs.feature_maps] == [(2, 16, 16, 16), (2, 24, 4, 4)]
        assert outputs.hidden_states is None
        assert outputs.attentions is None
        assert len(backbone(images, output_hidden_states=True).hidden_states) == 5
        backbone.set_attn_implementation("eager")
        assert len(backbone(images, output_attentions=True).attentions) == 4

    def test_filtered_arguments(self, images):
        outputs = tiny_backbone().forward_with_filtered_kwargs(images, output_hidden_states=False)
        assert len(outputs.feature_maps) == 1
