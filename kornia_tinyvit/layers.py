"""The building blocks of TinyViT, independent of the model.

Feature maps are :math:`(B, C, H, W)` tensors in channels-last memory, which makes the permutation to tokens
:math:`(B, H, W, C)` for attention, and back, a view without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from kornia.models.common import DropPath
from torch import Tensor, nn

from kornia_tinyvit.modules import is_plain

__all__ = ["Attention", "ConvBN", "MBConv", "Mlp", "PatchEmbed", "PatchMerging", "TinyViTBlock"]

_CONFIG: Any = torch.fx.experimental._config
TORCH_2_7 = hasattr(_CONFIG, "backed_size_oblivious")


class ConvBN(nn.Module):
    """A convolution without bias followed by batch normalization.

    When the normalization uses its running statistics (in evaluation, or frozen in training), both run as one
    convolution. Its weights are folded at every call, which is differentiable and leaves no cache to go stale. The
    modules are called instead if one of them is replaced, pruned or parametrized, or has hooks.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the square kernel; the padding is half of it.
        stride: stride of the convolution.
        groups: groups of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        r"""Map :math:`(B, C_{in}, H, W)` to :math:`(B, C_{out}, \lceil H/s \rceil, \lceil W/s \rceil)`."""
        if torch.jit.is_scripting():  # which does not compile the other branches
            x = self.bn(self.c(x))
        elif self.is_foldable():
            conv = self.c
            x = F.conv2d(x, *self.fold(), conv.stride, conv.padding, conv.dilation, conv.groups)
        else:
            x = self.bn(self.c(x))
        return x

    def is_foldable(self) -> bool:
        """Return whether convolution and normalization are equal to one convolution, whatever the input."""
        # Dictionaries, because Module.__getattr__ would take a tenth of the time of a small layer.
        modules: dict[str, Any] = self._modules
        conv, norm = modules["c"], modules["bn"]
        if norm.training or not (is_plain(conv, nn.Conv2d) and is_plain(norm, nn.BatchNorm2d)):
            return False
        weight, scale = conv._parameters.get("weight"), norm._parameters.get("weight")
        return bool(
            weight is not None
            and scale is not None
            and weight.dtype == scale.dtype
            and norm._parameters["bias"] is not None
            and norm._buffers["running_mean"] is not None
            and conv._parameters["bias"] is None
            and conv.padding_mode == "zeros"
        )

    def fold(self) -> tuple[Tensor, Tensor]:
        r"""Return weight :math:`(C_{out}, C_{in} / groups, k, k)` and bias :math:`(C_{out},)` of that convolution.

        Both are differentiable.

        With running mean :math:`m` and variance :math:`v`, the normalization multiplies each output channel by
        :math:`s = w / \sqrt{v + eps}` and adds :math:`b - s m`.
        """
        norm: Any = self.bn
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight = self.c.weight * scale.view(-1, 1, 1, 1)
        return weight, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


class PatchEmbed(nn.Module):
    """The stem: two convolutions of stride 2.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the output.
        activation: activation class.
    """

    def __init__(self, in_chans: int, embed_dim: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            ConvBN(in_chans, embed_dim // 2, 3, stride=2),
            activation(),
            ConvBN(embed_dim // 2, embed_dim, 3, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        r"""Map :math:`(B, C_{in}, H, W)` to :math:`(B, C, \lceil H/4 \rceil, \lceil W/4 \rceil)`."""
        return self.seq(x)


class MBConv(nn.Module):
    """Mobile inverted bottleneck: 1x1 expansion, depthwise convolution, 1x1 projection, residual connection.

    Args:
        dim: channels of input and output.
        expand_ratio: ratio of hidden to input channels.
        activation: activation class.
        drop_path: stochastic depth probability of the residual branch.
    """

    def __init__(
        self, dim: int, expand_ratio: float = 4.0, activation: type[nn.Module] = nn.GELU, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        hidden = int(dim * expand_ratio)
        self.conv1 = ConvBN(dim, hidden, 1)
        self.act1 = activation()
        self.conv2 = ConvBN(hidden, hidden, 3, groups=hidden)
        self.act2 = activation()
        self.conv3 = ConvBN(hidden, dim, 1)
        self.drop_path = DropPath(drop_path)
        self.act3 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map :math:`(B, C, H, W)` to the same shape."""
        # One statement per layer: nested calls would keep the input of each layer alive during the next one.
        y = self.conv1(x)
        y = self.act1(y)
        y = self.conv2(y)
        y = self.act2(y)
        y = self.conv3(y)
        return self.act3(x + self.drop_path(y))


class PatchMerging(nn.Sequential):
    r"""Downsampling between stages: an MBConv without residual connection.

    Maps :math:`(B, C_{in}, H, W)` to :math:`(B, C_{out}, \lceil H/s \rceil, \lceil W/s \rceil)`.

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
        stride: stride :math:`s` of the depthwise convolution; 1 in the last downsampling of MobileSAM.
        activation: activation class.
    """

    def __init__(self, dim: int, out_dim: int, stride: int = 2, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.conv1 = ConvBN(dim, out_dim, 1)
        self.act1 = activation()
        self.conv2 = ConvBN(out_dim, out_dim, 3, stride=stride, groups=out_dim)
        self.act2 = activation()
        self.conv3 = ConvBN(out_dim, out_dim, 1)


class Attention(nn.Module):
    """Multi-head self-attention within a square window, with a learned bias per relative offset.

    The attention score of two tokens ``dy`` rows and ``dx`` columns apart gets the bias
    ``attention_biases[head, abs(dy) * window_size + abs(dx)]`` (LeViT, arXiv:2104.01136).

    Args:
        dim: channels of the tokens.
        num_heads: attention heads, each with :math:`C / heads` channels.
        window_size: side of the window in tokens.

    Attributes:
        attend: the attention function of queries, keys and values :math:`(B, heads, N, C / heads)` and the bias.
            transformers replaces it to select an implementation.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window_size**2))
        self.attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def attention_bias(self) -> Tensor:
        """Return the biases of all pairs of tokens, :math:`(heads, N, N)` with :math:`N` = ``window_size ** 2``.

        They are gathered at every call, which takes 2 % of a forward pass of one image, instead of cached.
        """
        side, tokens = self.window_size, self.window_size * self.window_size  # TorchScript's ** returns a float
        row = torch.arange(side, device=self.attention_biases.device, dtype=torch.int32)
        distance = (row[:, None] - row).abs()
        index = (distance * side)[:, None, :, None] + distance[None, :, None, :]
        biases = self.attention_biases.index_select(1, index.flatten())
        return biases.view(self.num_heads, tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Map the tokens :math:`(B, N, C)` of windows to the same shape."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, 3, -1))
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind()  # each (B, heads, N, C / heads)
        bias = self.attention_bias().to(q.dtype)  # autocast lowers the precision of q alone
        x = self.attend(q, k, v, bias.unsqueeze(0)).transpose(1, 2)
        if torch.compiler.is_compiling():
            # Attention functions differ in the strides of their output, for which a program may be decomposed later.
            x = x.clone(memory_format=torch.contiguous_format)
        return self.proj(x.flatten(2))


class Mlp(nn.Module):
    """Layer normalization and a two-layer perceptron.

    Args:
        dim: channels of the tokens.
        hidden_dim: channels between the two linear layers.
        activation: activation class.
        drop_rate: dropout probability after each linear layer.
    """

    def __init__(
        self, dim: int, hidden_dim: int, activation: type[nn.Module] = nn.GELU, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = activation()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens :math:`(*, C)` to the same shape."""
        x = self.drop(self.act(self.fc1(self.norm(x))))
        return self.drop(self.fc2(x))


def without_size_specialization() -> AbstractContextManager[None]:
    """Disable the 0/1 specialization of dynamic sizes during tracing, where torch can (from 2.7 on).

    Otherwise torch compares every dynamic size with 1 and makes the result a condition of the exported graph.
    """
    return _CONFIG.patch(backed_size_oblivious=True) if TORCH_2_7 else nullcontext()


class TinyViTBlock(nn.Module):
    """Window attention, a depthwise convolution across window borders, and an MLP.

    Args:
        dim: channels of input and output.
        num_heads: attention heads.
        window_size: side of the attention windows in tokens.
        mlp_ratio: ratio of hidden to input channels of the MLP.
        drop_rate: dropout probability of the MLP.
        drop_path: stochastic depth probability of the residual branches.
        local_conv_size: odd kernel size of the depthwise convolution.
        activation: activation class.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        local_conv_size: int = 3,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, window_size)
        self.drop_path1 = DropPath(drop_path)
        self.local_conv = ConvBN(dim, dim, local_conv_size, groups=dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation, drop_rate)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map :math:`(B, C, H, W)` to the same shape."""
        tokens = x.permute(0, 2, 3, 1)
        tokens = tokens + self.drop_path1(self.window_attention(tokens))
        x = self.local_conv(tokens.permute(0, 3, 1, 2))
        tokens = x.permute(0, 2, 3, 1)
        tokens = tokens + self.drop_path2(self.mlp(tokens))
        return tokens.permute(0, 3, 1, 2)

    def window_attention(self, tokens: Tensor) -> Tensor:
        """Apply attention to the windows that tile tokens :math:`(B, H, W, C)`, zero-padded at the bottom and right.

        Eager mode skips the partition and the padding where the size needs none. A traced graph must hold for every
        size and always contains both.

        Args:
            tokens: tokens :math:`(B, H, W, C)`.

        Returns:
            Tokens of the same shape.
        """
        height, width, side = tokens.shape[1], tokens.shape[2], self.attn.window_size
        # ONNX rounds -(-height // side) towards zero.
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        tracing = torch.compiler.is_compiling()
        if not tracing and height == width == side:
            return self.attn(tokens.flatten(1, 2)).view_as(tokens)

        if not torch.jit.is_scripting() and tracing and not torch.compiler.is_dynamo_compiling():
            # Otherwise torch.export would fix whether there is one window or several in a direction.
            with without_size_specialization():
                return self.attend_windows(tokens, rows, columns)
        return self.attend_windows(tokens, rows, columns)

    def attend_windows(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Apply attention to windows, whatever their number and the padding.

        Args:
            tokens: tokens :math:`(B, H, W, C)`.
            rows: number of windows in a column.
            columns: number of windows in a row.

        Returns:
            Tokens of the same shape.
        """
        batch, height, width, channels = tokens.shape
        side = self.attn.window_size
        pad_h, pad_w = rows * side - height, columns * side - width
        padded = torch.compiler.is_compiling() or pad_h > 0 or pad_w > 0
        if padded:
            tokens = F.pad(tokens, (0, 0, 0, pad_w, 0, pad_h))
        # One name per tensor that is no longer needed: how long each lives decides which memory the next one gets.
        windows = tokens.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
        windows = windows.clone(memory_format=torch.contiguous_format)
        windows = self.attn(windows.view(batch * rows * columns, side * side, channels))
        windows = windows.view(batch, rows, columns, side, side, channels).transpose(2, 3)
        tokens = windows.clone(memory_format=torch.contiguous_format)
        tokens = tokens.view(batch, rows * side, columns * side, channels)
        # Negative padding crops; unlike a slice, it keeps the sizes of a traced graph symbolic.
        return F.pad(tokens, (0, 0, 0, -pad_w, 0, -pad_h)) if padded else tokens
