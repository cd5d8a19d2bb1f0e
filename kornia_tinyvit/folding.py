"""Folding of constant operations into weights for inference.

:func:`fold` applies all functions of this module to a copy of a network. The outputs are equal up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from kornia.models.common import LayerNorm2d
from torch import Tensor, nn

from kornia_tinyvit.layers import Attention, ConvBN, Mlp, TinyViTBlock
from kornia_tinyvit.model import Blocks
from kornia_tinyvit.modules import is_plain

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
    """Fold the batch norm of a layer into its convolution.

    Args:
        layer: the layer, in evaluation mode.

    Returns:
        The convolution.

    Raises:
        ValueError: if :meth:`ConvBN.is_foldable <kornia_tinyvit.layers.ConvBN.is_foldable>` is false.
    """
    if not layer.is_foldable():
        raise ValueError(
            "A ConvBN cannot be folded whose norm depends on the batch, or whose parts are replaced, pruned, "
            "parametrized or have hooks. Call eval(), and make changes of weights permanent."
        )
    return _conv(layer.c, *layer.fold())


def fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[nn.LayerNorm, nn.Linear]:
    """Fold the weight and bias of a layer norm into the next linear layer.

    :math:`W (g n + b) + c = (W g) n + (W b + c)`.

    Args:
        norm: the layer norm.
        linear: the linear layer.

    Returns:
        The layer norm without weight and bias, and the linear layer.
    """
    bare = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    return bare, _linear(linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias)


def fold_normalization(
    conv: nn.Conv2d, mean: Sequence[float], std: Sequence[float], max_value: float
) -> tuple[nn.Conv2d, Tensor]:
    """Fold the division by the standard deviations into the first convolution.

    The mean stays a subtraction: folded into the bias, it would be wrong at the borders, where the padding stands for
    the mean color, and in bfloat16 large terms would cancel.

    Args:
        conv: a convolution of normalized images.
        mean: channel means, for values in [0, 1].
        std: channel standard deviations, for values in [0, 1].
        max_value: the largest pixel value: 1 for floats in [0, 1], 255 for uint8.

    Returns:
        The convolution for images from which the mean was subtracted, and the mean :math:`(1, C, 1, 1)` in units of
        the pixel values.
    """
    folded = _conv(conv, conv.weight / (max_value * torch.tensor(std).to(conv.weight).view(1, -1, 1, 1)), conv.bias)
    return folded, max_value * torch.tensor(mean).to(conv.weight).view(1, -1, 1, 1)


def split_projections(qkv: nn.Linear, num_heads: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Split the joint projection, whose rows are ordered by head first, into those of queries, keys and values.

    Args:
        qkv: the joint projection.
        num_heads: attention heads.

    Returns:
        The projections to queries, keys and values.
    """
    weights = qkv.weight.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    biases = qkv.bias.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    query, key, value = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return query, key, value


def fold_scale(query: nn.Linear, num_heads: int) -> nn.Linear:
    r"""Fold the scale of the attention scores, :math:`d^{-1/2}`, into the projection to queries.

    Args:
        query: the projection to queries.
        num_heads: attention heads.

    Returns:
        The projection, for attention with scale 1.
    """
    scale = (query.out_features // num_heads) ** -0.5
    return _linear(query.weight * scale, query.bias * scale)


def fold_key_and_value_biases(
    key: nn.Linear, value: nn.Linear, proj: nn.Linear
) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Remove the biases of the projections to keys and values.

    The bias of the keys adds the same value to all scores of a query, to which a softmax is invariant. The bias of the
    values passes through the attention unchanged, since its weights sum to 1, and is folded into the output projection.

    Args:
        key: the projection to keys.
        value: the projection to values.
        proj: the output projection.

    Returns:
        The three projections, those to keys and values without bias.
    """
    folded = _linear(proj.weight, proj.bias + proj.weight @ value.bias)
    return _linear(key.weight), _linear(value.weight), folded


class FoldedAttention(nn.Module):
    """Window attention over the tokens of a feature map, folded.

    The tokens are padded after the projections instead of before. This is equivalent: a padded token is normalized
    to zero, and the biases that were its key and value are folded away.

    Args:
        attention: window attention of a :class:`~kornia_tinyvit.layers.TinyViTBlock`.

    Attributes:
        bias: attention bias of all pairs of tokens, :math:`(1, heads, N, N)`.
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
        """Map the tokens :math:`(B, HW, C)` of a feature map to the same shape.

        Args:
            tokens: the tokens in row-major order.
            height: height :math:`H` of the feature map.
            width: width :math:`W` of the feature map.
        """
        x = self.norm(tokens)
        q, k, v = (self._windows(project(x), height, width) for project in (self.query, self.key, self.value))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0)
        return self.proj(self._merge(x, height, width))

    def _windows(self, x: Tensor, height: int, width: int) -> Tensor:
        """Partition tokens :math:`(B, HW, C)` into windows and heads :math:`(B', heads, N, d)`."""
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
            # Negative padding crops; unlike a slice, it keeps the sizes of a traced graph symbolic.
            x = F.pad(x, (0, 0, 0, width - columns * side, 0, height - rows * side))
        return x.flatten(1, 2)


def _count_windows(length: int, side: int) -> int:
    return (length + side - 1) // side  # ONNX rounds -(-length // side) towards zero


def _needs_padding(height: int, width: int, side: int) -> bool:
    """Return whether windows extend beyond a feature map, or may in an export with dynamic shapes."""
    dynamic = any(isinstance(size, torch.SymInt) for size in (height, width))
    return dynamic or height % side > 0 or width % side > 0


class ChannelNorm(nn.Module):
    """kornia's ``LayerNorm2d`` as a layer norm of tokens, which inference engines fuse; else it is eight operators.

    Args:
        norm: a norm of MobileSAM's neck.
    """

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(norm.weight.shape[0], norm.eps, device="meta")
        self.norm.weight, self.norm.bias = _constant(norm.weight), _constant(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map :math:`(B, C, H, W)` to the same shape."""
        height, width = x.shape[2:]
        return _to_features(self.norm(_to_tokens(x)), height, width)


class FoldedBlock(nn.Module):
    """A :class:`~kornia_tinyvit.layers.TinyViTBlock` with folded layers.

    Tokens are :math:`(B, HW, C)`: OpenVINO does not fuse the layer norm of four dimensions, which takes 10 % longer.

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
        x = self.local_conv(_to_features(tokens, height, width))
        tokens = _to_tokens(x)
        tokens = tokens + self.mlp(tokens)
        return _to_features(tokens, height, width)


def _to_tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_features(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


@torch.no_grad()
def fold(module: Module) -> Module:
    """Return a folded copy of a network for inference.

    Layers that are replaced, pruned, parametrized or have hooks are not folded.

    Args:
        module: a :class:`~kornia_tinyvit.TinyViT` or a module that contains one, which is not changed.

    Example:
        >>> from kornia_tinyvit import TinyViT
        >>> model = TinyViT.from_config("1m", pretrained="cifar10")
        >>> images = torch.rand(2, 3, 96, 96)
        >>> torch.allclose(fold(model)(images), model(images), atol=1e-4)
        True
    """
    # Pruning and weight norm leave a weight with a history, which deepcopy rejects.
    values = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    folded = copy.deepcopy(module, {id(value): value.detach().clone() for value in values})
    folded = folded.eval().requires_grad_(False)
    for parent in list(folded.modules()):
        if isinstance(parent, Blocks):
            parent.gradient_checkpointing = False
        for name, child in list(parent.named_children()):
            if is_plain(child, TinyViTBlock) and _is_foldable(child):
                setattr(parent, name, FoldedBlock(child))
            elif is_plain(child, ConvBN) and child.is_foldable():
                setattr(parent, name, fold_batch_norm(child))
            elif is_plain(child, LayerNorm2d):
                setattr(parent, name, ChannelNorm(child))
    return folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _is_foldable(block: TinyViTBlock) -> bool:
    attn, mlp = block.attn, block.mlp
    return (
        is_plain(attn, Attention)
        and is_plain(mlp, Mlp)
        and is_plain(block.local_conv, ConvBN)
        and block.local_conv.is_foldable()
        and all(is_plain(norm, nn.LayerNorm) and norm.bias is not None for norm in (attn.norm, mlp.norm))
        and all(is_plain(linear, nn.Linear) and linear.bias is not None for linear in (attn.qkv, attn.proj, mlp.fc1))
    )


def _conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a convolution with other weights."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    folded = nn.Conv2d(**{name: getattr(conv, name) for name in names}, device="meta")
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
