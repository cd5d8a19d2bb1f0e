"""Folding: the same function of the images with fewer operators.

Each function folds one thing, exactly but for rounding, and :func:`fold` applies them all to a copy of a network. A
folded network is for inference: it no longer has the parameters that were folded away.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from kornia.models.common import LayerNorm2d
from torch import Tensor, nn

from kornia_tinyvit.layers import Attention, ConvBN, TinyViTBlock
from kornia_tinyvit.model import Blocks

__all__ = [
    "FoldedAttention",
    "FoldedBlock",
    "fold",
    "fold_batch_norm",
    "fold_key_and_value_biases",
    "fold_layer_norm",
    "fold_normalization",
    "fold_scale",
    "split_projections",
]

Module = TypeVar("Module", bound=nn.Module)


def fold_batch_norm(layer: ConvBN) -> nn.Conv2d:
    """Return the convolution that equals a convolution with its batch norm in evaluation mode.

    With running mean :math:`m` and variance :math:`v`, the norm multiplies each output channel by
    :math:`s = w / sqrt(v + eps)` and adds :math:`b - s m`.

    Raises:
        ValueError: if the norm keeps no running statistics.
    """
    conv, norm = layer.c, layer.bn
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("A batch norm without running statistics changes with the batch and cannot be folded.")
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return _conv(conv, conv.weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale)


def fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[nn.LayerNorm, nn.Linear]:
    """Return a layer norm without affine part and the linear layer that has taken it over.

    :math:`W (g n + b) + c = (W g) n + (W b + c)`.
    """
    bare = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    return bare, _linear(linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias)


def fold_normalization(
    conv: nn.Conv2d, mean: Sequence[float], std: Sequence[float], levels: float
) -> tuple[nn.Conv2d, Tensor]:
    """Return the first convolution for images that are not normalized yet, and what to subtract from them.

    The deviations go into the weights. The mean is still subtracted, in the pass over the pixels that a conversion
    from integers takes anyway, because then the zeros that pad the map mean what they meant before: the mean color.
    In the bias it would be wrong along the edges, and in bfloat16 large terms would cancel.

    Args:
        conv: a convolution of normalized images.
        mean: channel means, for values in [0, 1].
        std: channel deviations.
        levels: the largest value of a pixel: 1 for floats in [0, 1], 255 for uint8.

    Returns:
        The convolution, and the mean :math:`(1, C, 1, 1)` in the pixels' own unit.
    """
    folded = _conv(conv, conv.weight / (levels * torch.tensor(std).to(conv.weight).view(1, -1, 1, 1)), conv.bias)
    return folded, levels * torch.tensor(mean).to(conv.weight).view(1, -1, 1, 1)


def split_projections(qkv: nn.Linear, num_heads: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Return the projections to queries, keys and values as layers of their own, each with its heads in order.

    The rows of the joint layer are ordered head, then query, key and value.
    """
    weights = qkv.weight.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    biases = qkv.bias.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    query, key, value = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return query, key, value


def fold_scale(query: nn.Linear, num_heads: int) -> nn.Linear:
    r"""Return the projection to queries with the scale of the scores, :math:`d^{-1/2}`, in its weights."""
    scale = (query.out_features // num_heads) ** -0.5
    return _linear(query.weight * scale, query.bias * scale)


def fold_key_and_value_biases(
    key: nn.Linear, value: nn.Linear, proj: nn.Linear
) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Return the projections to keys and values without a bias, and that of the output, which has taken over.

    The keys' bias goes: it adds the same to all scores of a query, which a softmax does not see. The values' bias moves
    behind the attention, whose weights sum to 1, and there into the bias of the output's projection.
    """
    folded = _linear(proj.weight, proj.bias + proj.weight @ value.bias)
    return _linear(key.weight), _linear(value.weight), folded


class FoldedAttention(nn.Module):
    r"""Window attention over the tokens of a whole map, with everything constant folded away.

    Only real tokens are normalized and projected. What fills the last windows of a map that they do not divide are
    zeros behind the projections: a padded token of the original is a zero vector, its key and value are the biases of
    the projections, and those are folded away.

    Args:
        attention: window attention of a :class:`~kornia_tinyvit.layers.TinyViTBlock`.

    Attributes:
        bias: what is added to the scores, spread over all pairs of tokens: :math:`(1, heads, N, N)`.
    """

    bias: Tensor

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.norm, qkv = fold_layer_norm(attention.norm, attention.qkv)
        query, key, value = split_projections(qkv, attention.num_heads)
        self.query = fold_scale(query, attention.num_heads)
        self.key, self.value, self.proj = fold_key_and_value_biases(key, value, attention.proj)
        self.window_size = attention.window_size
        self.register_buffer("bias", attention.attention_bias().detach().clone().unsqueeze(0))

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Map the tokens :math:`(B, HW, C)` of a map to the same shape."""
        x = self.norm(tokens)
        q, k, v = (self._windows(project(x), height, width) for project in (self.query, self.key, self.value))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0)
        return self.proj(self._merge(x, height, width))

    def _windows(self, x: Tensor, height: int, width: int) -> Tensor:
        """Cut the tokens of a map :math:`(B, HW, C)` into heads of windows :math:`(B', heads, N, d)`."""
        batch, _, channels = x.shape
        side, heads = self.window_size, self.bias.shape[1]
        rows, columns = _count_windows(height, side), _count_windows(width, side)
        if _needs_padding(height, width, side):
            x = x.unflatten(1, (height, width))
            x = F.pad(x, (0, 0, 0, columns * side - width, 0, rows * side - height))
        x = x.reshape(batch, rows, side, columns, side, heads, channels // heads)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch * rows * columns, heads, side * side, channels // heads)

    def _merge(self, x: Tensor, height: int, width: int) -> Tensor:
        """Undo :meth:`_windows`."""
        side, heads, depth = self.window_size, x.shape[1], x.shape[3]
        rows, columns = _count_windows(height, side), _count_windows(width, side)
        x = x.view(-1, rows, columns, heads, side, side, depth).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(-1, rows * side, columns * side, heads * depth)
        if _needs_padding(height, width, side):
            # Padding by negative amounts crops, and unlike a slice keeps the sizes a traced graph knows.
            x = F.pad(x, (0, 0, 0, width - columns * side, 0, height - rows * side))
        return x.flatten(1, 2)


def _count_windows(length: int, side: int) -> int:
    return (length + side - 1) // side  # not -(-length // side): ONNX rounds quotients towards zero


def _needs_padding(height: int, width: int, side: int) -> bool:
    """Tell whether windows reach beyond a map; an export that keeps its size open has to hold for both answers."""
    unknown = any(isinstance(size, torch.SymInt) for size in (height, width))
    return unknown or height % side > 0 or width % side > 0


class ChannelNorm(nn.Module):
    """kornia's ``LayerNorm2d`` over tokens, where engines know it as a layer norm and not as eight operators.

    Args:
        norm: the norm of MobileSAM's neck.
    """

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(norm.weight.shape[0], norm.eps, device="meta")
        self.norm.weight, self.norm.bias = _constant(norm.weight), _constant(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map :math:`(B, C, H, W)` to the same shape."""
        height, width = x.shape[2:]
        return _to_map(self.norm(_to_tokens(x)), height, width)


class FoldedBlock(nn.Module):
    """A :class:`~kornia_tinyvit.layers.TinyViTBlock` for inference, its parts folded.

    Tokens are :math:`(B, HW, C)`: of four dimensions, OpenVINO takes their layer norm apart (a tenth of the time).

    Args:
        block: the block.
    """

    def __init__(self, block: TinyViTBlock) -> None:
        super().__init__()
        self.attn = FoldedAttention(block.attn)
        self.local_conv = fold_batch_norm(block.local_conv)
        self.mlp = copy.copy(block.mlp)
        self.mlp.norm, self.mlp.fc1 = fold_layer_norm(block.mlp.norm, block.mlp.fc1)

    def forward(self, x: Tensor) -> Tensor:
        """Map :math:`(B, C, H, W)` to the same shape."""
        height, width = x.shape[2:]
        tokens = _to_tokens(x)
        tokens = tokens + self.attn(tokens, height, width)
        x = self.local_conv(_to_map(tokens, height, width))
        tokens = _to_tokens(x)
        tokens = tokens + self.mlp(tokens)
        return _to_map(tokens, height, width)


def _to_tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


@torch.no_grad()
def fold(module: Module) -> Module:
    """Return a folded copy of a network: the same outputs in evaluation mode from fewer operators.

    Args:
        module: a :class:`~kornia_tinyvit.TinyViT`, or anything that holds one; it is left as it is.

    Example:
        >>> from kornia_tinyvit import TinyViT
        >>> model = TinyViT.from_config("1m", pretrained="cifar10")
        >>> images = torch.rand(2, 3, 96, 96)
        >>> torch.allclose(fold(model)(images), model(images), atol=1e-4)
        True
    """
    folded = copy.deepcopy(module).eval().requires_grad_(False)
    for parent in list(folded.modules()):
        if isinstance(parent, Blocks):
            parent.gradient_checkpointing = False
        for name, child in list(parent.named_children()):
            if isinstance(child, TinyViTBlock):
                setattr(parent, name, FoldedBlock(child))
            elif isinstance(child, ConvBN):
                setattr(parent, name, fold_batch_norm(child))
            elif isinstance(child, LayerNorm2d):
                setattr(parent, name, ChannelNorm(child))
    return folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a convolution like another one with other numbers."""
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        cast("tuple[int, int]", conv.kernel_size),
        cast("tuple[int, int]", conv.stride),
        cast("tuple[int, int]", conv.padding),
        groups=conv.groups,
        device="meta",
    )
    folded.weight, folded.bias = _constant(weight), None if bias is None else _constant(bias)
    return folded


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = _constant(weight)
    if bias is not None:
        linear.bias = _constant(bias)
    return linear


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
