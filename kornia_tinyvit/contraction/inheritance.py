"""Weight inheritance: a contracted network keeps the most important channels, heads and blocks of its parent."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kornia_tinyvit.config import NUM_STAGES, TinyViTConfig
from kornia_tinyvit.contraction.neighbors import check_contracted
from kornia_tinyvit.layers import Attention, ConvBN, MBConv, PatchMerging, TinyViTBlock
from kornia_tinyvit.model import TinyViT

__all__ = ["inherit"]

#: Settings of convolutions, norms and activations that are not in the state dict.
_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "eps", "approximate")


@torch.no_grad()
def inherit(parent: TinyViT, config: TinyViTConfig) -> TinyViT:
    """Contract a network to a configuration and inherit the most important weights.

    The importance of a channel or head is the L2 norm of its output weights, including batch norms, times that of the
    weights that read it. The importance of a block is the norm of the output weights of its residual branches, plus the
    distance of the convolution between attention and MLP from the identity; this term is left out for the first block
    of a stage, since the patch merging before it takes over what that convolution does to a constant feature map.
    Filter norms as importance follow arXiv:1608.08710 (there L1). Kept parts stay in their order; a smaller window
    keeps the attention biases of the remaining distances.

    Removing hidden channels, channels of the convolutional stage, or whole blocks with zero weights does not change the
    outputs. Removing channels of an attention stage does, even if they are zero: its layer norms average over all
    channels.

    Args:
        parent: the network; it is not modified.
        config: the contracted configuration.

    Returns:
        A new network on the parent's device, in training mode.

    Raises:
        ValueError: if a factor of the configuration is larger than the parent's, another field differs, or layers of
            the parent are replaced, pruned or parametrized.

    Example:
        >>> parent = TinyViT.from_config("1m", pretrained="cifar10")
        >>> inherit(parent, parent.config.replace(mlp_ratio=3.0)).config.mlp_ratio
        3.0
    """
    check_contracted(config, parent.config)
    _check_layers(parent)
    weight = parent.norm_head.weight
    child = TinyViT.from_config(config).to(device=weight.device, dtype=weight.dtype)
    same_size = config.img_size == parent.config.img_size
    child.preprocessing = parent.preprocessing if same_size else parent.preprocessing.resize(config.img_size)
    child.class_names = parent.class_names
    # The importance of channels depends on the kept blocks only.
    blocks = [_kept_blocks(parent, stage, config.depths[stage]) for stage in range(NUM_STAGES)]
    channels = [_kept_channels(parent, stage, blocks[stage], config.embed_dims[stage]) for stage in range(NUM_STAGES)]
    old_stem, new_stem = _stem(parent), _stem(child)
    hidden = _most_important(_writers(old_stem[0]), _readers(old_stem[2]), new_stem[0].c.out_channels)
    _cut(old_stem[0], new_stem[0], hidden)
    _cut(old_stem[2], new_stem[2], channels[0], hidden)
    for stage in range(NUM_STAGES):
        source, target = _stages(parent)[stage], _stages(child)[stage]
        for old, new in zip((source.blocks[number] for number in blocks[stage]), target.blocks, strict=True):
            if stage == 0:
                _cut_convs(old, new, channels[0], channels[0])
            else:
                _cut_block(old, new, channels[stage])
        if target.downsample is not None:
            _cut_convs(source.downsample, target.downsample, channels[stage], channels[stage + 1])
            dropped = list(_stages(parent)[stage + 1].blocks)[: blocks[stage + 1][0]]
            side = -(-config.img_size // config.stage_strides[stage + 1])
            _absorb(target.downsample, dropped, channels[stage + 1], side)
    _cut(parent.norm_head, child.norm_head, channels[-1])
    if config.num_classes:
        _cut(parent.head, child.head, slice(None), channels[-1])
    return child


def _check_layers(parent: TinyViT) -> None:
    """Raise an error if a layer of the parent is not the one of its configuration, or has other weights or settings."""
    with torch.device("meta"):
        original = TinyViT.from_config(parent.config)
    tensors = parent.state_dict().keys() ^ original.state_dict().keys()
    kinds = {name: _kind(layer) for name, layer in original.named_modules()}
    changed = {name.rpartition(".")[0] for name in tensors}
    changed |= {name for name, layer in parent.named_modules() if _kind(layer) != kinds.get(name)}
    if changed:
        raise ValueError(
            f"Weights cannot be inherited from changed layers, here {', '.join(sorted(changed)[:3])}. Make pruning "
            "and parametrizations permanent, such as by torch.nn.utils.prune.remove, and merge adapters."
        )


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Return the class of a layer and its settings that affect the output in evaluation."""
    return type(layer), *(getattr(layer, name, None) for name in _SETTINGS)


def _stages(model: TinyViT) -> list[Any]:
    return list(cast("nn.Sequential", model.layers))


def _stem(model: TinyViT) -> Any:
    return model.patch_embed.seq


def _kept_blocks(parent: TinyViT, stage: int, depth: int) -> list[int]:
    """Return the blocks to keep; the least important ones are removed one at a time."""
    blocks = _stages(parent)[stage].blocks
    kept = list(range(len(blocks)))
    while len(kept) > depth:
        scores = [
            float(torch.cat(_written(blocks[each]), 1).norm()) + (_distance_from_identity(blocks[each]) if at else 0)
            for at, each in enumerate(kept)
        ]
        kept.pop(scores.index(min(scores)))
    return kept


def _written(block: MBConv | TinyViTBlock) -> list[Tensor]:
    """Return the output weights of a block's residual branches."""
    layers = [block.conv3] if isinstance(block, MBConv) else [block.attn.proj, block.mlp.fc2]
    return [_writers(layer) for layer in layers]


def _distance_from_identity(block: MBConv | TinyViTBlock) -> float:
    """Return the distance of the convolution between attention and MLP, which has no shortcut, from the identity."""
    if isinstance(block, MBConv):
        return 0.0
    filters = _writers(block.local_conv).clone()
    filters[:, (filters.shape[1] - 1) // 2] -= 1  # the center of the kernel; the last column is the bias
    return float(filters.norm())


def _absorb(merging: PatchMerging, blocks: list[TinyViTBlock], channels: Tensor, side: int) -> None:
    """Fold into a merging what the convolutions of removed blocks do to a constant feature map: a scale and a shift."""
    for block in blocks:
        size = block.local_conv.c.kernel_size[0]
        filters = _writers(block.local_conv)[channels]
        constant = filters.new_ones(1, len(channels), side, side)
        kernels = filters[:, :-1].view(-1, 1, size, size)
        scale = F.conv2d(constant, kernels, padding=size // 2, groups=len(channels)).mean((0, 2, 3))
        norm = merging.conv3.bn
        norm.weight.mul_(scale)
        norm.bias.mul_(scale).add_(filters[:, -1])


def _kept_channels(parent: TinyViT, stage: int, blocks: list[int], width: int) -> Tensor:
    """Return the channels of a stage's feature map to keep, by all layers that write or read it."""
    stages = _stages(parent)
    written = [_writers(stages[stage - 1].downsample.conv3 if stage else _stem(parent)[2])]
    read = []
    for number in blocks:
        block = stages[stage].blocks[number]
        written += _written(block)
        if isinstance(block, MBConv):
            read.append(_readers(block.conv1))
        else:
            read += [_readers(block.attn.qkv, block.attn.norm), _readers(block.mlp.fc1, block.mlp.norm)]
    if stage + 1 < NUM_STAGES:
        read.append(_readers(stages[stage].downsample.conv1))
    elif parent.config.num_classes:
        read.append(_readers(cast("nn.Linear", parent.head), parent.norm_head))
    return _most_important(torch.cat(written, 1), torch.cat(read, 1), width)


def _most_important(written: Tensor, read: Tensor, count: int) -> Tensor:
    """Return the channels to keep, in order, given one row per channel of the weights that write and read it."""
    scores = written.norm(dim=1) * read.norm(dim=1)
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _writers(layer: ConvBN | nn.Linear) -> Tensor:
    """Return the weights and bias that write each channel, batch norm folded, one row per channel."""
    weight, bias = layer.fold() if isinstance(layer, ConvBN) else (layer.weight, layer.bias)
    return torch.cat([weight.flatten(1), bias[:, None]], 1)


def _readers(layer: ConvBN | nn.Linear, norm: nn.LayerNorm | None = None) -> Tensor:
    """Return the weights that read each channel, scaled by a norm before the layer, one row per channel."""
    weight = layer.c.weight if isinstance(layer, ConvBN) else layer.weight
    rows = weight.transpose(0, 1).flatten(1)
    return rows if norm is None else rows * norm.weight[:, None]


def _cut_convs(old: MBConv | PatchMerging, new: MBConv | PatchMerging, before: Tensor, after: Tensor) -> None:
    hidden = _most_important(_writers(old.conv2), _readers(old.conv3), new.conv1.c.out_channels)
    _cut(old.conv1, new.conv1, hidden, before)
    _cut(old.conv2, new.conv2, hidden)
    _cut(old.conv3, new.conv3, after, hidden)


def _cut_block(old: TinyViTBlock, new: TinyViTBlock, channels: Tensor) -> None:
    _cut_attention(old.attn, new.attn, channels)
    _cut(old.local_conv, new.local_conv, channels)
    hidden = _most_important(_writers(old.mlp.fc1), _readers(old.mlp.fc2), new.mlp.fc1.out_features)
    _cut(old.mlp.norm, new.mlp.norm, channels)
    _cut(old.mlp.fc1, new.mlp.fc1, hidden, channels)
    _cut(old.mlp.fc2, new.mlp.fc2, channels, hidden)


def _cut_attention(old: Attention, new: Attention, channels: Tensor) -> None:
    # The output of a head is its values, the last third of its rows; the projection reads it.
    rows = old.qkv.weight.new_tensor(range(old.qkv.out_features), dtype=torch.long).view(old.num_heads, 3, -1)
    values = _writers(old.qkv)[rows[:, 2]].flatten(1)
    read = _readers(old.proj).unflatten(0, (old.num_heads, -1)).flatten(1)
    heads = _most_important(values, read, new.num_heads)
    _cut(old.norm, new.norm, channels)
    _cut(old.qkv, new.qkv, rows[heads].flatten(), channels)
    columns = torch.arange(old.proj.in_features, device=heads.device).view(old.num_heads, -1)
    _cut(old.proj, new.proj, channels, columns[heads].flatten())
    side = new.window_size
    biases = old.attention_biases.unflatten(1, (old.window_size, old.window_size))[heads, :side, :side]
    new.attention_biases.copy_(biases.flatten(1))


def _cut(old: nn.Module, new: nn.Module, out: Tensor | slice, into: Tensor | slice = slice(None)) -> None:
    """Copy the weights of the output channels ``out`` and the input channels ``into`` of a layer.

    Depthwise convolutions need only ``out``: their weights have one input channel.
    """
    kept = {}
    for name, values in old.state_dict().items():
        rows = values[out] if values.ndim else values
        kept[name] = rows[:, into] if rows.ndim > 1 else rows
    new.load_state_dict(kept)
