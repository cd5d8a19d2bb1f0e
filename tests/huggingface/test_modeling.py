"""Outputs of the models: equal to those of the network, with hidden states and attentions."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from kornia_tinyvit import TinyViT
from kornia_tinyvit.huggingface import TinyVitBackbone, TinyVitForImageClassification, TinyVitModel
from tests.huggingface.helpers import tiny_backbone, tiny_classifier, tiny_config, tiny_network


def stem(network: TinyViT, images: Tensor) -> Tensor:
    return network.patch_embed(images.contiguous(memory_format=torch.channels_last))


class TestEqualsTheNetwork:
    @pytest.mark.parametrize("size", [(64, 64), (96, 64), (45, 71)])
    def test_logits(self, size):
        images = torch.rand(2, 3, *size)
        assert torch.equal(tiny_classifier()(images).logits, tiny_network()(images))

    def test_logits_in_training(self, images):
        assert torch.equal(tiny_classifier().train()(images).logits, tiny_network().train()(images))

    def test_features(self, images):
        network = tiny_network()
        outputs = tiny_classifier().tinyvit(images, output_hidden_states=True)
        features = network.forward_features(images)
        assert torch.equal(outputs.last_hidden_state, features)
        assert torch.equal(outputs.pooler_output, network.forward_head(features, pre_logits=True))
        for found, expected in zip(outputs.hidden_states[1:], network.forward_intermediates(images), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(outputs.hidden_states[0], stem(network, images))

    def test_backbone(self, images):
        maps = tiny_backbone(out_indices=[0, 2, 3, 4])(images).feature_maps
        reference = tiny_network().forward_intermediates(images)
        assert torch.equal(maps[0], stem(tiny_network(), images))
        for found, expected in zip(maps[1:], reference[1:], strict=True):
            assert torch.equal(found, expected)

    def test_network(self):
        """The model contains an instance of the package's network."""
        model = tiny_classifier()
        assert type(model.tinyvit.network) is type(tiny_network())
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny_network().parameters())

    def test_bfloat16(self, images):
        model = tiny_classifier().to(torch.bfloat16)
        expected = tiny_network().to(torch.bfloat16)(images.bfloat16())
        assert torch.equal(model(images).logits, expected)  # float32 images are cast


class TestOutputs:
    def test_return_dict(self, images):
        model = tiny_classifier()
        as_dict = model(images, output_hidden_states=True)
        as_tuple = model(images, output_hidden_states=True, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], as_dict.logits)
        assert len(as_tuple[1]) == len(as_dict.hidden_states) == 5
        model.config.return_dict = False
        assert isinstance(model(images), tuple)

    def test_hidden_states_by_configuration(self, images):
        model = tiny_classifier()
        assert model(images).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(images).hidden_states) == 5

    def test_some_hidden_states(self, images):
        every = tiny_classifier()(images, output_hidden_states=True).hidden_states
        some = tiny_classifier()(images, output_hidden_states=[1, -1]).hidden_states
        assert [state is not None for state in some] == [False, True, False, False, True]
        assert torch.equal(some[4], every[4])

    def test_without_classes(self, images):
        model = TinyVitForImageClassification(tiny_config(num_labels=0)).eval()
        assert torch.equal(model(images).logits, model.tinyvit(images).pooler_output)


class TestAttention:
    def test_eager_is_near_sdpa(self, images):
        model = tiny_classifier()
        fused = model(images).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(images).logits, fused, rtol=1e-4, atol=1e-4)

    def test_eager_returns_attentions(self):
        config = tiny_config(attn_implementation="eager")
        outputs = TinyVitModel(config).eval()(torch.rand(2, 3, 64, 96), output_attentions=True)
        # Stages of 1, 2 and 1 blocks; feature maps of 8x12, 4x6 and 2x3 tokens in windows of 4, 5 and 3.
        windows = [(2, 6, 16), (3, 2, 25), (3, 2, 25), (4, 1, 9)]
        shapes = [tuple(each.shape) for each in outputs.attentions]
        assert shapes == [(2 * count, heads, tokens, tokens) for heads, count, tokens in windows]
        for each in outputs.attentions:
            torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:-1]))

    def test_attention_weights(self, images):
        model = tiny_classifier()
        model.set_attn_implementation("eager")
        first = model.tinyvit.network.layers[1].blocks[0]
        seen = []
        first.attn.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        weights = model(images, output_attentions=True).attentions[0]
        tokens = model.tinyvit(images, output_hidden_states=True).hidden_states[1]
        tokens = model.tinyvit.network.layers[0].downsample(tokens).permute(0, 2, 3, 1)
        windows = tokens.unflatten(2, (2, 4)).unflatten(1, (2, 4)).transpose(2, 3).reshape(8, 16, -1)
        values = first.attn.qkv(first.attn.norm(windows)).unflatten(-1, (2, 3, -1))[..., 2, :].transpose(1, 2)
        torch.testing.assert_close((weights @ values).transpose(1, 2).flatten(2), seen[0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", [TinyVitModel, TinyVitForImageClassification, TinyVitBackbone])
    def test_sdpa(self, kind, images):
        with pytest.raises(ValueError, match="'sdpa' does not return weights; load the model"):
            kind(tiny_config())(images, output_attentions=True)

    def test_unsupported_implementation(self):
        with pytest.raises(ValueError, match="Flash Attention 2"):
            TinyVitModel(tiny_config(attn_implementation="flash_attention_2"))


class TestErrors:
    def test_integers(self):
        with pytest.raises(TypeError, match="Images must be floating point"):
            tiny_classifier()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))

    def test_too_small(self):
        with pytest.raises(ValueError, match="at least 32x32 pixels; got 16x64"):
            tiny_classifier()(torch.rand(1, 3, 16, 64))

    def test_no_tensor(self):
        with pytest.raises(TypeError, match="must be a floating point tensor"):
            tiny_classifier()("photo.jpg")
