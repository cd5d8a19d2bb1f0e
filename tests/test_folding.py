import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from kornia_tinyvit import TinyViT
from kornia_tinyvit.folding import (
    FoldedAttention,
    FoldedBlock,
    fold,
    fold_batch_norm,
    fold_key_and_value_biases,
    fold_layer_norm,
    fold_normalization,
    fold_scale,
    split_projections,
)
from kornia_tinyvit.layers import Attention, ConvBN, TinyViTBlock
from tests.conftest import TINY, liven


def scramble(module: nn.Module) -> nn.Module:
    """Move every number away from where folding it would not show."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.data.add_(0.3 * torch.randn_like(tensor))
    return module.eval()


class TestFoldBatchNorm:
    @pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (3, 1, 8), (5, 1, 8)])
    def test_exact(self, kernel, stride, groups):
        layer = scramble(ConvBN(8, 16, kernel, stride, groups))
        x = torch.randn(2, 8, 9, 11)
        folded = fold_batch_norm(layer)
        assert isinstance(folded, nn.Conv2d)
        torch.testing.assert_close(folded(x), layer.bn(layer.c(x)), atol=1e-5, rtol=1e-5)

    def test_without_statistics(self):
        layer = ConvBN(3, 4, 3).eval()
        layer.bn = nn.BatchNorm2d(4, track_running_stats=False)
        with pytest.raises(ValueError, match="whose norm depends on the batch"):
            fold_batch_norm(layer)


class TestFoldLayerNorm:
    def test_exact(self):
        norm, linear = scramble(nn.LayerNorm(12, eps=1e-3)), scramble(nn.Linear(12, 7))
        x = 3 * torch.randn(5, 12) + 1
        bare, folded = fold_layer_norm(norm, linear)
        assert bare.weight is None
        torch.testing.assert_close(folded(bare(x)), linear(norm(x)), atol=1e-5, rtol=1e-5)


class TestFoldNormalization:
    MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    @pytest.mark.parametrize("max_value", [1.0, 255.0])
    @pytest.mark.parametrize("size", [(8, 8), (9, 7)])
    def test_exact_up_to_the_edges(self, max_value, size):
        conv = scramble(nn.Conv2d(3, 4, 3, stride=2, padding=1))
        pixels = torch.rand(2, 3, *size)
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (self.MEAN, self.STD))
        folded, offset = fold_normalization(conv, self.MEAN, self.STD, max_value)
        torch.testing.assert_close(
            folded(max_value * pixels - offset), conv((pixels - mean) / std), atol=1e-5, rtol=1e-5
        )


class TestFoldProjections:
    HEADS, DEPTH = 3, 4

    @pytest.fixture
    def projections(self):
        qkv = scramble(nn.Linear(12, 36))
        return qkv, split_projections(qkv, self.HEADS)

    def test_split(self, projections):
        qkv, parts = projections
        x = torch.randn(5, 12)
        joint = qkv(x).unflatten(1, (self.HEADS, 3, self.DEPTH))
        for index, part in enumerate(parts):
            torch.testing.assert_close(part(x).unflatten(1, (self.HEADS, self.DEPTH)), joint[:, :, index])

    def test_scale(self, projections):
        _, (query, _, _) = projections
        x = torch.randn(5, 12)
        torch.testing.assert_close(fold_scale(query, self.HEADS)(x), query(x) / 2)

    def test_key_and_value_biases(self, projections):
        _, (query, key, value) = projections
        proj, x = scramble(nn.Linear(12, 12)), torch.randn(5, 12)
        folded_key, folded_value, folded_proj = fold_key_and_value_biases(key, value, proj)
        assert folded_key.bias is None
        assert folded_value.bias is None
        expected = proj((query(x) @ key(x).mT).softmax(1) @ value(x))
        found = folded_proj((query(x) @ folded_key(x).mT).softmax(1) @ folded_value(x))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class TestFoldAttention:
    @pytest.mark.parametrize("size", [(4, 4), (8, 12), (7, 5), (3, 9)])
    def test_exact_with_and_without_padding(self, size):
        torch.manual_seed(0)
        block = scramble(TinyViTBlock(12, 3, 4))
        tokens = torch.randn(2, *size, 12)
        folded = FoldedAttention(block.attn)
        torch.testing.assert_close(
            folded(tokens.flatten(1, 2), *size),
            block.window_attention(tokens).flatten(1, 2),
            atol=1e-5,
            rtol=1e-5,
        )

    def test_projects_real_tokens_only(self):
        folded = FoldedAttention(scramble(Attention(12, 3, 4)))
        seen = []
        for project in (folded.query, folded.key, folded.value, folded.proj):
            project.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape[1]))
        folded(torch.randn(1, 35, 12), 7, 5)
        assert seen == [35, 35, 35, 35]


class TestFold:
    @pytest.mark.parametrize("size", [(64, 64), (96, 80), (33, 47)])
    def test_same_results(self, tiny, size):
        images = torch.randn(2, 3, *size)
        folded = fold(tiny)
        with torch.inference_mode():
            torch.testing.assert_close(folded(images), tiny(images), atol=1e-4, rtol=1e-4)
            for ours, theirs in zip(
                folded.forward_intermediates(images), tiny.forward_intermediates(images), strict=True
            ):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    def test_mobile_sam(self):
        model = liven(TinyViT(**TINY | {"mobile_sam": True}))
        images = torch.randn(1, 3, 96, 96)
        with torch.inference_mode():
            torch.testing.assert_close(fold(model)(images), model(images), atol=1e-4, rtol=1e-4)

    def test_inside_another_module(self, tiny):
        outer = nn.Sequential(nn.Identity(), tiny)
        folded = fold(outer)
        assert not any(isinstance(module, (ConvBN, nn.BatchNorm2d, Attention)) for module in folded.modules())
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(folded(images), outer(images), atol=1e-4, rtol=1e-4)

    def test_leaves_the_model_alone(self, tiny):
        before = copy.deepcopy(tiny.state_dict())
        model = tiny.train()
        folded = fold(model)
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not folded.training
        for parameter in folded.parameters():
            parameter.data.zero_()
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def double_output(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


class TestChangedLayers:
    """Only layers that compute what their class does are folded; the others keep their effect."""

    IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize(
        "name",
        [
            "patch_embed.seq.0.c",
            "layers.0.downsample.conv2.c",
            "layers.1.blocks.0.local_conv.c",
            "layers.1.blocks.0.attn.qkv",
            "layers.1.blocks.0.attn.proj",
            "layers.1.blocks.0.mlp.fc1",
        ],
    )
    def test_pruning(self, tiny, name):
        before = tiny(self.IMAGES)
        prune.random_unstructured(tiny.get_submodule(name), "weight", 0.5)
        expected = tiny(self.IMAGES)
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(fold(tiny)(self.IMAGES), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        "name",
        [
            "patch_embed.seq.2",
            "patch_embed.seq.2.bn",
            "layers.1.blocks.0",
            "layers.1.blocks.0.local_conv",
            "layers.1.blocks.0.attn",
            "layers.1.blocks.0.attn.norm",
            "layers.1.blocks.0.mlp",
        ],
    )
    def test_hooks(self, tiny, name):
        before = tiny(self.IMAGES)
        tiny.get_submodule(name).register_forward_hook(double_output)
        expected = tiny(self.IMAGES)
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(fold(tiny)(self.IMAGES), expected, atol=1e-4, rtol=1e-4)

    def test_replaced_norm(self, tiny):
        tiny.layers[1].blocks[0].local_conv.bn = nn.GroupNorm(4, 16)
        torch.testing.assert_close(fold(tiny)(self.IMAGES), tiny(self.IMAGES), atol=1e-4, rtol=1e-4)

    def test_others_are_folded(self, tiny):
        prune.random_unstructured(tiny.layers[1].blocks[0].attn.qkv, "weight", 0.5)
        kinds = [type(module) for module in fold(tiny).modules()]
        assert kinds.count(FoldedBlock) == 3
        assert kinds.count(TinyViTBlock) == 1
        assert ConvBN not in kinds
