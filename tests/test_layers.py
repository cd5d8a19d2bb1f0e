from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kornia_tinyvit.layers import Attention, ConvBN, MBConv, Mlp, PatchEmbed, PatchMerging, TinyViTBlock


def scramble(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
        if isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)) and part.weight is not None:
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
        if isinstance(part, Attention):
            nn.init.normal_(part.attention_biases)
    return module


class TestConvBN:
    @pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (3, 1, 8), (5, 1, 8)])
    def test_folding_is_exact(self, kernel, stride, groups):
        layer = scramble(ConvBN(8, 16, kernel, stride, groups)).double().eval()
        x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
        torch.testing.assert_close(layer(x), layer.bn(layer.c(x)))

    def test_gradients_of_folded_weights(self):
        layer = scramble(ConvBN(3, 4, 3)).double().eval()
        x = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
        folded = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        plain = torch.autograd.grad(layer.bn(layer.c(x)).square().sum(), [x, *layer.parameters()])
        torch.testing.assert_close(folded, plain)

    def test_training_updates_statistics(self):
        layer = ConvBN(3, 4, 3).train()
        layer(torch.randn(4, 3, 8, 8))
        assert layer.bn.num_batches_tracked == 1
        assert layer.bn.running_mean.abs().sum() > 0

    def test_frozen_statistics_in_training(self):
        layer = scramble(ConvBN(3, 4, 3)).train()
        layer.bn.eval()
        before = layer.bn.running_mean.clone()
        layer(torch.randn(4, 3, 8, 8)).sum().backward()
        assert torch.equal(layer.bn.running_mean, before)
        assert layer.c.weight.grad is not None
        assert layer.bn.weight.grad is not None

    def test_without_running_statistics(self):
        layer = ConvBN(3, 4, 3).eval()
        layer.bn = nn.BatchNorm2d(4, track_running_stats=False)
        x = torch.randn(4, 3, 8, 8)
        torch.testing.assert_close(layer(x), layer.bn(layer.c(x)))


class TestAttention:
    @given(st.integers(1, 9), st.integers(1, 3))
    def test_bias_is_the_table_at_the_distance(self, window, heads):
        layer = scramble(Attention(4 * heads, heads, window))
        bias = layer.attention_bias()
        assert bias.shape == (heads, window**2, window**2)
        table = layer.attention_biases.view(heads, window, window)
        cells = [(y, x) for y in range(window) for x in range(window)]
        for i, (y, x) in list(enumerate(cells))[:: max(1, window // 2)]:
            for j, (v, u) in enumerate(cells):
                assert torch.equal(bias[:, i, j], table[:, abs(y - v), abs(x - u)])

    def test_against_the_formula(self):
        layer = scramble(Attention(12, 3, 4)).double()
        x = torch.randn(2, 16, 12, dtype=torch.float64)
        # The official layout keeps the query, key and value of a head together.
        qkv = layer.qkv(layer.norm(x)).view(2, 16, 3, 12).permute(0, 2, 1, 3)
        q, k, v = qkv.split(4, dim=3)
        weights = ((q @ k.transpose(-2, -1)) * 4**-0.5 + layer.attention_bias()).softmax(-1)
        expected = layer.proj((weights @ v).transpose(1, 2).reshape(2, 16, 12))
        torch.testing.assert_close(layer(x), expected)

    def test_gradcheck(self):
        layer = scramble(Attention(4, 2, 2)).double()
        x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
        assert gradcheck(layer, (x,))
        assert gradcheck(
            lambda table: torch.func.functional_call(layer, {"attention_biases": table}, x),
            (layer.attention_biases.detach().requires_grad_(),),
        )

    def test_holds_no_buffer(self):
        assert not list(Attention(8, 2, 7).buffers())


class TestBlocks:
    @pytest.mark.parametrize(
        ("layer", "channels", "expected"),
        [
            (PatchEmbed(3, 8), 3, (2, 8, 4, 5)),
            (MBConv(8), 8, (2, 8, 13, 18)),
            (PatchMerging(8, 12), 8, (2, 12, 7, 9)),
            (PatchMerging(8, 12, stride=1), 8, (2, 12, 13, 18)),
            (TinyViTBlock(8, 2, 4), 8, (2, 8, 13, 18)),
        ],
    )
    def test_shapes(self, layer, channels, expected):
        out = layer.eval()(torch.rand(2, channels, 13, 18))
        assert out.shape == expected
        assert out.isfinite().all()

    def test_mlp_shape(self):
        assert Mlp(8, 16)(torch.rand(2, 3, 5, 8)).shape == (2, 3, 5, 8)

    def test_memory_format_stays_channels_last(self):
        x = torch.rand(2, 8, 14, 14).contiguous(memory_format=torch.channels_last)
        for layer in (MBConv(8), TinyViTBlock(8, 2, 7), PatchMerging(8, 8)):
            x = layer.eval()(x)
            assert x.is_contiguous(memory_format=torch.channels_last)

    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8))
    def test_windows_partition_as_the_originals_pad(self, height, width, window):
        block = scramble(TinyViTBlock(4, 2, window)).double().eval()
        tokens = torch.randn(1, height, width, 4, dtype=torch.float64)
        padded = F.pad(tokens, (0, 0, 0, -width % window, 0, -height % window))
        expected = torch.empty_like(padded)
        for top in range(0, padded.shape[1], window):
            for left in range(0, padded.shape[2], window):
                part = padded[:, top : top + window, left : left + window]
                expected[:, top : top + window, left : left + window] = block.attn(part.flatten(1, 2)).view_as(part)
        torch.testing.assert_close(block.window_attention(tokens), expected[:, :height, :width])

    def test_drop_path_drops_whole_samples(self):
        torch.manual_seed(0)
        block = MBConv(4, drop_path=0.5).train()
        block.conv3.bn.bias.data.fill_(100.0)
        out = block(torch.rand(64, 4, 4, 4)).mean((1, 2, 3))
        assert 10 < (out < 50).sum() < 54  # dropped branches keep the input
        assert ((out < 50) | (out > 150)).all()  # kept ones are scaled by 1 / (1 - p)

    def test_dropout_is_off_in_evaluation(self):
        mlp = Mlp(8, 16, drop_rate=0.5).eval()
        x = torch.rand(2, 8)
        assert torch.equal(mlp(x), mlp(x))

    @pytest.mark.parametrize("layer", [MBConv(4, 2), PatchMerging(4, 6), TinyViTBlock(4, 2, 2)])
    def test_gradcheck(self, layer):
        layer = scramble(layer).double().eval()
        x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(layer, (x,))


def pruned(layer: ConvBN) -> None:
    prune.l1_unstructured(layer.c, "weight", 0.5)


def weight_normed(layer: ConvBN) -> None:
    nn.utils.weight_norm(layer.c)
    layer.c.weight_g.data *= 2  # of the next call; until then the attribute weight is out of date


def replaced_norm(norm: nn.Module) -> Callable[[ConvBN], None]:
    return lambda layer: setattr(layer, "bn", scramble(norm))


class Standardized(nn.Conv2d):
    """A convolution with weight standardization."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, None, self.stride, self.padding, groups=self.groups)


class FrozenBatchNorm(nn.BatchNorm2d):
    """A norm whose forward pass is another function of the same tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class LowRank(nn.Module):
    """A wrapper that adds a low-rank update to a convolution, and shows its weight, as adapters do."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 3, base.stride, 1)
        self.up = nn.Conv2d(2, base.out_channels, 1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def standardized(layer: ConvBN) -> None:
    layer.c = Standardized(3, 8, 3, 2, 1, bias=False)


def low_rank(layer: ConvBN) -> None:
    layer.c = LowRank(layer.c)


def patched(layer: ConvBN) -> None:
    layer.c.forward = lambda x: 2 * nn.Conv2d.forward(layer.c, x)


def with_bias(layer: ConvBN) -> None:
    layer.c.bias = nn.Parameter(torch.rand(8))


def dilated(layer: ConvBN) -> None:
    layer.c.dilation, layer.c.padding = (2, 2), (2, 2)


def reflecting(layer: ConvBN) -> None:
    layer.c = nn.Conv2d(3, 8, 3, 2, 1, bias=False, padding_mode="reflect")


def scaling_hook(layer: ConvBN) -> None:
    layer.bn.register_forward_hook(lambda module, args, output: 3 * output)


CHANGES: dict[str, Callable[[ConvBN], object]] = {
    "pruning": pruned,
    "weight norm": weight_normed,
    "parametrized weight norm": lambda layer: parametrizations.weight_norm(layer.c),
    "parametrized spectral norm": lambda layer: parametrizations.spectral_norm(layer.c),
    "GroupNorm": replaced_norm(nn.GroupNorm(2, 8)),
    "SyncBatchNorm": replaced_norm(nn.SyncBatchNorm(8)),
    "Identity": replaced_norm(nn.Identity()),
    "frozen norm": replaced_norm(FrozenBatchNorm(8)),
    "norm without weights": replaced_norm(nn.BatchNorm2d(8, affine=False)),
    "norm without a bias": lambda layer: setattr(layer.bn, "bias", None),
    "norm without statistics": replaced_norm(nn.BatchNorm2d(8, track_running_stats=False)),
    "subclass": standardized,
    "wrapper": low_rank,
    "forward of an instance": patched,
    "bias": with_bias,
    "dilation": dilated,
    "padding mode": reflecting,
    "hook": scaling_hook,
}


class TestChangedLayers:
    """In evaluation a ConvBN equals its modules, however they are changed."""

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_as_the_modules(self, change):
        torch.manual_seed(0)
        layer, x = scramble(ConvBN(3, 8, 3, stride=2)), torch.rand(2, 3, 17, 20)
        original = layer(x)
        CHANGES[change](layer.eval())
        layer.eval()
        found = layer(x)
        assert_close(found, layer.bn(layer.c(x)))
        assert not torch.allclose(found, original)

    def test_plain_layers_are_folded(self, monkeypatch):
        """One convolution and no norm, without gradients, with them, and with a frozen norm in training."""
        monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: pytest.fail("the norm was called"))
        layer = ConvBN(3, 8, 3).eval()
        layer(torch.rand(1, 3, 8, 8))
        layer.train()
        layer.bn.eval()
        layer(torch.rand(1, 3, 8, 8)).sum().backward()
        assert layer.c.weight.grad is not None

    @pytest.mark.parametrize("name", ["c", "bn"])
    @pytest.mark.parametrize(
        "register",
        ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
    )
    def test_hooks_fire(self, name, register):
        layer, calls = ConvBN(3, 8, 3).eval(), []
        handle = getattr(getattr(layer, name), register)(lambda *args: calls.append(1))
        x = torch.rand(1, 3, 8, 8, requires_grad=True)
        layer(x).sum().backward()
        assert calls == [1]
        handle.remove()
        layer(x).sum().backward()
        assert calls == [1]

    def test_hooks_on_stages_fire(self, tiny, images):
        seen = []
        for stage in tiny.layers:
            stage.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        tiny.forward_intermediates(images)
        assert seen == [*tiny.feature_channels[1:], tiny.feature_channels[-1]]

    def test_global_hooks_fire(self):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(type(module)))
        try:
            ConvBN(3, 8, 3).eval()(torch.rand(1, 3, 8, 8))
        finally:
            handle.remove()
        assert seen == [nn.Conv2d, nn.BatchNorm2d, ConvBN]

    def test_floating_point_operations(self, tiny):
        """torch's counter finds the same in training and evaluation, for each module."""
        counts = []
        for mode in (True, False):
            with FlopCounterMode(display=False) as counter:
                tiny.train(mode)(torch.rand(2, 3, 64, 64))
            counts.append({name: dict(found) for name, found in counter.get_flop_counts().items()})
        assert counts[0] == counts[1]
        assert "TinyViT.patch_embed.seq.0.c" in counts[1]

    def test_gradient_of_an_activation(self, tiny):
        """Grad-CAM: activation and gradient of a convolution in evaluation mode."""
        kept = []
        tiny.layers[0].blocks[0].conv3.c.register_forward_hook(lambda module, args, output: kept.append(output))
        logits = tiny(torch.rand(1, 3, 64, 64))
        (gradient,) = torch.autograd.grad(logits[0, 0], kept[0])
        assert gradient.shape == kept[0].shape == (1, 16, 16, 16)
        assert gradient.abs().sum() > 0
