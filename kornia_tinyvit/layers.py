"""The building blocks of TinyViT, each knowing nothing of the whole.

Maps are :math:`(B, C, H, W)` tensors kept in channels-last memory, so that turning one into tokens
:math:`(B, H, W, C)` for attention and back is a change of view and never a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from kornia.models.common import DropPath
from torch import Tensor, nn

__all__ = ["Attention", "ConvBN", "MBConv", "Mlp", "PatchEmbed", "PatchMerging", "TinyViTBlock"]

_CONFIG: Any = torch.fx.experimental._config
TORCH_2_7 = hasattr(_CONFIG, "backed_size_oblivious")


class ConvBN(nn.Module):
    """A convolution without bias followed by batch normalization.

    While the normalization uses its running statistics (evaluation, or frozen statistics in training) both are one
    affine map, so they run as one convolution whose weights are folded at every call: exact, differentiable, and with
    nothing kept that a later change of the weights could leave behind. Hooks on ``c`` and ``bn`` therefore fire in
    training only.

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map.
        kernel_size: side of the square kernel; the map is padded by half of it.
        stride: stride of the convolution.
        groups: blocked connections from input to output.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        r"""Map :math:`(B, C_{in}, H, W)` to :math:`(B, C_{out}, \lceil H/s \rceil, \lceil W/s \rceil)`."""
        mean, variance = self.bn.running_mean, self.bn.running_var
        if self.bn.training or mean is None or variance is None:
            return self.bn(self.c(x))
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        weight = self.c.weight * scale.view(-1, 1, 1, 1)
        bias = torch.addcmul(self.bn.bias, mean, scale, value=-1)
        return F.conv2d(x, weight, bias, self.c.stride, self.c.padding, groups=self.c.groups)


class PatchEmbed(nn.Module):
    """The stem: two strided convolutions that turn an image into tokens of 4 by 4 pixels.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the tokens.
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
    """Mobile inverted bottleneck: expand, filter each channel, project, add.

    Args:
        dim: channels of the map.
        expand_ratio: hidden over input width.
        activation: activation class.
        drop_path: probability of skipping the residual branch for a sample in training.
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
        # A statement for each step: nested calls would keep the wide map before a step alive during the step after it.
        y = self.conv1(x)
        y = self.act1(y)
        y = self.conv2(y)
        y = self.act2(y)
        y = self.conv3(y)
        return self.act3(x + self.drop_path(y))


class PatchMerging(nn.Module):
    """Downsampling between stages: an MBConv without shortcut whose depthwise convolution may be strided.

    Args:
        dim: channels of the input map.
        out_dim: channels of the output map.
        stride: 2 halves the map; 1 keeps it (MobileSAM's last merging).
        activation: activation class.
    """

    def __init__(self, dim: int, out_dim: int, stride: int = 2, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.conv1 = ConvBN(dim, out_dim, 1)
        self.act1 = activation()
        self.conv2 = ConvBN(out_dim, out_dim, 3, stride=stride, groups=out_dim)
        self.act2 = activation()
        self.conv3 = ConvBN(out_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        r"""Map :math:`(B, C_{in}, H, W)` to :math:`(B, C_{out}, \lceil H/s \rceil, \lceil W/s \rceil)`."""
        x = self.conv1(x)
        x = self.act1(x)
        x = self.conv2(x)
        x = self.act2(x)
        return self.conv3(x)


class Attention(nn.Module):
    r"""Multi-head self-attention inside a square window, with a learned bias for every distance.

    Two tokens :math:`\Delta y` rows and :math:`\Delta x` columns apart share one bias per head,
    ``attention_biases[head, abs(dy) * window_size + abs(dx)]`` (LeViT, arXiv:2104.01136).

    Attributes:
        attend: what maps queries, keys and values :math:`(B, heads, N, C / heads)` and the biases to the shape of the
            queries; torch's attention, unless a library around the network brings its own.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads, each :math:`C / heads` wide.
        window_size: side of the window in tokens.
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
        """Spread the table over all pairs of tokens: :math:`(heads, N, N)` with :math:`N` = ``window_size ** 2``.

        It is made anew at every call: that takes 2 % of a forward pass of one image and cannot go stale.
        """
        side = torch.arange(self.window_size, device=self.attention_biases.device, dtype=torch.int32)
        distance = (side[:, None] - side).abs()
        index = (distance * self.window_size)[:, None, :, None] + distance[None, :, None, :]
        biases = self.attention_biases.index_select(1, index.flatten())
        return biases.view(self.num_heads, self.window_size**2, self.window_size**2)

    def forward(self, x: Tensor) -> Tensor:
        """Map windows of tokens :math:`(B, N, C)` to the same shape."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, 3, -1))
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind()  # each (B, heads, N, C / heads)
        bias = self.attention_bias().to(q.dtype)  # autocast computes q in a narrower type than the table's
        x = self.attend(q, k, v, bias.unsqueeze(0))
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Layer normalization, a linear layer, the activation, and a linear layer back.

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


def open_sizes_at_one() -> AbstractContextManager[None]:
    """Keep torch from setting apart the size 1 of dimensions that are open, where it can (from 2.7 on).

    It asks of every open size whether it is 1 and makes the answer a condition of the exported graph, unless it is told
    to treat sizes as unknown, as torch.onnx.export does.
    """
    return _CONFIG.patch(backed_size_oblivious=True) if TORCH_2_7 else nullcontext()


def _any_number_of_windows() -> AbstractContextManager[None]:
    """Keep torch.export from fixing whether an open image has one window or several in a direction."""
    exporting = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return open_sizes_at_one() if exporting else nullcontext()


class TinyViTBlock(nn.Module):
    """Window attention, a depthwise convolution that lets neighboring windows talk, and an MLP.

    Args:
        dim: channels of the map.
        num_heads: attention heads.
        window_size: side of the attention windows in tokens.
        mlp_ratio: hidden over input width of the MLP.
        drop_rate: dropout probability inside the MLP.
        drop_path: probability of skipping a residual branch for a sample in training.
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
        """Attend inside windows that tile the map :math:`(B, H, W, C)`, padded with zeros below and right.

        Eager mode skips what a size does not need. A traced graph has to hold for every size, so it always takes the
        general way, which is written so that it does not depend on how many windows there are.
        """
        batch, height, width, channels = tokens.shape
        side = self.attn.window_size
        rows, columns = (height + side - 1) // side, (width + side - 1) // side  # ONNX rounds towards zero
        pad_h, pad_w = rows * side - height, columns * side - width
        tracing = torch.compiler.is_compiling()
        if not tracing and rows == columns == 1 and not (pad_h or pad_w):
            return self.attn(tokens.flatten(1, 2)).view_as(tokens)

        if tracing or pad_h or pad_w:
            tokens = F.pad(tokens, (0, 0, 0, pad_w, 0, pad_h))
        with _any_number_of_windows():
            windows = tokens.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
            windows = windows.clone(memory_format=torch.contiguous_format)
            windows = self.attn(windows.view(batch * rows * columns, side * side, channels))
            windows = windows.view(batch, rows, columns, side, side, channels).transpose(2, 3)
            tokens = windows.clone(memory_format=torch.contiguous_format)
            tokens = tokens.view(batch, rows * side, columns * side, channels)
        # Padding by negative amounts crops, and unlike a slice keeps the sizes a traced graph knows.
        return F.pad(tokens, (0, 0, 0, -pad_w, 0, -pad_h)) if tracing or pad_h or pad_w else tokens


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and each of its parts back into its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
