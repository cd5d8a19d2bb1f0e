"""SAM's mask decoder for many prompts per image: the same results with a third of the operations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from kornia.models.common import MLP, LayerNorm2d
from kornia.models.sam.architecture.common import MLPBlock
from kornia.models.sam.architecture.mask_decoder import MaskDecoder
from kornia.models.sam.architecture.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor, nn

from kornia_tinyvit.modules import is_plain

__all__ = ["FoldedMaskDecoder", "PreparedImage", "PromptedImage", "SharingMaskDecoder", "UnfoldedImage"]

# Prompts decoded together: few on a CPU, whose caches hold their image tokens; more elsewhere, for utilization.
CPU_CHUNK, CHUNK = 8, 64
BAND = 8  # rows of the embedding upscaled together, for the caches, too
UPSCALING = 4  # resolution of the masks over that of the embedding
#: The layers of kornia's decoder, which :class:`FoldedMaskDecoder` knows.
_FOLDABLE = {
    Attention,
    LayerNorm2d,
    MLP,
    MLPBlock,
    TwoWayAttentionBlock,
    TwoWayTransformer,
    nn.ConvTranspose2d,
    nn.Embedding,
    nn.GELU,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.ReLU,
    nn.Sequential,
}


@dataclass(frozen=True)
class PreparedImage:
    """Tensors shared by all prompts of an image; returned by :meth:`FoldedMaskDecoder.prepare`.

    With :math:`S = hw` cells, :math:`H` heads of dimension :math:`d`, and :math:`B` equal to 1, or to the number of
    prompts if each has its own dense embedding:

    Args:
        size: height and width of the embedding in cells.
        tokens: image embedding plus dense prompt embedding, :math:`(B, S, C)`.
        keys: keys of the first token-to-image attention, :math:`(B, H, d, S)`.
        values: values of the same attention, :math:`(B, H, S, d)`.
        queries: queries of the first image-to-token attention, :math:`(B, H, d, S)`.
        position_keys: part of the positional encoding in the keys of each later token-to-image attention,
            :math:`(1, H, d, S)`.
        position_queries: the same in the queries of each later image-to-token attention.
    """

    size: tuple[int, int]
    tokens: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor
    position_keys: list[Tensor]
    position_queries: list[Tensor]


@dataclass(frozen=True)
class UnfoldedImage:
    """Tensors for a decoder with changed layers, in place of a :class:`PreparedImage`.

    Args:
        size: height and width of the embedding in cells.
        tokens: image embedding plus dense prompt embedding, :math:`(B, S, C)`.
        position: positional encoding, :math:`(1, S, C)`.
    """

    size: tuple[int, int]
    tokens: Tensor
    position: Tensor


@dataclass(frozen=True)
class PromptedImage:
    """Output of the decoder's transformer for an image and :math:`P` prompts.

    Args:
        size: height and width of the embedding in cells.
        tokens: image tokens, :math:`(P, S, C)`.
        mask_tokens: mask tokens, :math:`(P, M, C)`.
        iou: predicted IoU of the masks, :math:`(P, M)`.
    """

    size: tuple[int, int]
    tokens: Tensor
    mask_tokens: Tensor
    iou: Tensor


class FoldedMaskDecoder(nn.Module):
    r"""Run kornia's ``MaskDecoder`` on many prompts of one image.

    A call gives the decoder's results and gradients up to rounding. Prompts have few tokens :math:`N`, the image
    thousands: each projection of image tokens is folded into the prompt side, :math:`q (W k)^T = (q W) k^T` for keys
    and queries, :math:`a (k W) = (a k) W` for values and outputs. Everything before the first attention between them is
    computed once per image.

    The steps are available separately: :meth:`prepare` an image, :meth:`prompt` it for predicted IoUs, :meth:`upscale`
    only the masks that pass a filter.

    It refers to the decoder and stores no derived weights, so changes of weights take effect. A decoder with layers
    that are replaced, pruned, parametrized or have hooks, as with adapters, runs as it is, without folding.

    Args:
        decoder: the decoder.
        dtype: dtype of the image side of a folded decoder; default that of the parameters, which the prompt side always
            has. ``torch.bfloat16`` takes two thirds of the time on CPUs with bfloat16 instructions and changes logits
            by some percent.

    Raises:
        TypeError: if the decoder is not kornia's.
    """

    def __init__(self, decoder: MaskDecoder, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(decoder, MaskDecoder) or type(decoder).predict_masks is not MaskDecoder.predict_masks:
            raise TypeError(f"FoldedMaskDecoder takes kornia's MaskDecoder; got {type(decoder).__name__}.")
        self.decoder = decoder
        self.dtype = dtype

    @property
    def folds(self) -> bool:
        """Whether the decoder is folded: all its layers are kornia's, unchanged."""
        _, *layers = self.decoder.modules()
        return all(type(layer) in _FOLDABLE and is_plain(layer, type(layer)) for layer in layers)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks; see kornia's ``MaskDecoder.forward``.

        Args:
            image_embeddings: embedding of one image, :math:`(1, C, h, w)`, of any height and width.
            image_pe: its positional encoding, of the same shape.
            sparse_prompt_embeddings: embeddings of points and boxes, :math:`(P, N, C)`; :math:`P` and :math:`N` may
                be 0.
            dense_prompt_embeddings: embeddings of masks, :math:`(P, C, h, w)`, or :math:`(1, C, h, w)` for all
                prompts. The latter, also expanded as by the prompt encoder, is faster.
            multimask_output: return the masks for ambiguous prompts instead of the single one.

        Returns:
            Logits :math:`(P, M, 4h, 4w)` and predicted IoUs :math:`(P, M)`, with :math:`M` 3 or 1 in SAM.

        Raises:
            ValueError: if the shapes do not match.
        """
        sparse, dense = sparse_prompt_embeddings, dense_prompt_embeddings
        if sparse.ndim != 3 or len(dense) not in {1, len(sparse)}:
            raise ValueError(
                "Sparse prompts must be (P, N, C), and dense ones (P, C, h, w) or (1, C, h, w); got "
                f"{tuple(sparse.shape)} and {tuple(dense.shape)}."
            )
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        if not len(sparse):
            count = len(range(self.decoder.num_mask_tokens)[chosen])
            height, width = (UPSCALING * side for side in image_embeddings.shape[2:])
            return sparse.new_zeros(0, count, height, width), sparse.new_zeros(0, count)
        shared = dense.shape[0] == 1 or dense.stride(0) == 0
        image = self.prepare(image_embeddings, image_pe, dense[:1]) if shared else None
        size = CPU_CHUNK if sparse.device.type == "cpu" else CHUNK
        masks, iou = [], []
        for start in range(0, len(sparse), size):
            rows = slice(start, start + size)
            prompted = self.prompt(image or self.prepare(image_embeddings, image_pe, dense[rows]), sparse[rows])
            masks.append(self.upscale(prompted)[:, chosen])
            iou.append(prompted.iou[:, chosen])
        return torch.cat(masks), torch.cat(iou)

    def prepare(
        self, image_embeddings: Tensor, image_pe: Tensor, dense_prompt_embeddings: Tensor
    ) -> PreparedImage | UnfoldedImage:
        """Compute the tensors shared by all prompts of an image.

        Args:
            image_embeddings: embedding of the image, :math:`(1, C, h, w)`.
            image_pe: its positional encoding, of the same shape.
            dense_prompt_embeddings: embedding of no mask or of one mask for all prompts, :math:`(1, C, h, w)`; or one
                for each of the prompts decoded together, :math:`(P, C, h, w)`.

        Raises:
            ValueError: if the shapes do not match.
        """
        shape, channels = tuple(image_embeddings.shape), self.decoder.transformer_dim
        if len(shape) != 4 or shape[:2] != (1, channels):
            raise ValueError(f"Expected the embedding (1, {channels}, h, w) of one image; got {shape}.")
        if tuple(image_pe.shape) != shape:
            raise ValueError(f"The positional encoding must be {shape}; got {tuple(image_pe.shape)}.")
        if dense_prompt_embeddings.shape[1:] != image_embeddings.shape[1:]:
            dense = tuple(dense_prompt_embeddings.shape)
            raise ValueError(f"Dense prompts must be (P, {', '.join(map(str, shape[1:]))}); got {dense}.")
        size = cast("tuple[int, int]", tuple(image_embeddings.shape[2:]))
        if not self.folds:
            tokens = image_embeddings + dense_prompt_embeddings
            return UnfoldedImage(size, tokens.flatten(2).mT, image_pe.flatten(2).mT)
        transformer = cast("TwoWayTransformer", self.decoder.transformer)
        first, *later = cast("Iterable[TwoWayAttentionBlock]", transformer.layers)
        reading, writing = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        tokens = (image_embeddings + dense_prompt_embeddings).flatten(2).mT.contiguous()
        position = image_pe.flatten(2).mT
        placed = tokens + position
        to_image = [*(layer.cross_attn_token_to_image for layer in later), transformer.final_attn_token_to_image]
        from_image = [layer.cross_attn_image_to_token for layer in later]
        return PreparedImage(
            size=size,
            tokens=self._cast(tokens),
            keys=self._cast(_heads(reading.k_proj(placed), reading).mT),
            values=self._cast(_heads(reading.v_proj(tokens), reading)),
            queries=self._cast(_heads(writing.q_proj(placed), writing).mT),
            # Without the keys' bias: it adds the same to all scores of a query, and softmax is invariant to that.
            position_keys=[self._cast(_heads(F.linear(position, a.k_proj.weight), a).mT) for a in to_image],
            position_queries=[self._cast(_heads(a.q_proj(position), a).mT) for a in from_image],
        )

    def prompt(self, image: PreparedImage | UnfoldedImage, sparse_prompt_embeddings: Tensor) -> PromptedImage:
        """Run the transformer and predict the IoU of the masks.

        Memory grows by about :math:`2 S (C + HN)` numbers per prompt.

        Args:
            image: the prepared image.
            sparse_prompt_embeddings: embeddings of points and boxes, :math:`(P, N, C)`.

        Returns:
            The image with the results of the prompts.

        Raises:
            ValueError: if the image was prepared for another number of prompts.
        """
        prompts = len(sparse_prompt_embeddings)
        if len(image.tokens) not in {1, prompts}:
            raise ValueError(f"The image was prepared for {len(image.tokens)} dense prompts; got {prompts} sparse.")
        decoder, transformer = self.decoder, cast("TwoWayTransformer", self.decoder.transformer)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        pe = torch.cat([own.expand(prompts, -1, -1), sparse_prompt_embeddings], 1)
        if isinstance(image, UnfoldedImage):
            maps = (x.expand(prompts, -1, -1).mT.unflatten(2, image.size) for x in (image.tokens, image.position))
            tokens, image_tokens = transformer(*maps, pe)
            mask_tokens = tokens[:, 1 : 1 + decoder.num_mask_tokens]
            return PromptedImage(image.size, image_tokens, mask_tokens, decoder.iou_prediction_head(tokens[:, 0]))
        tokens, image_tokens = pe, image.tokens
        for index, layer in enumerate(cast("Iterable[TwoWayAttentionBlock]", transformer.layers)):
            tokens, image_tokens = _exchange(layer, index, image, tokens, pe, image_tokens)
        final = transformer.final_attn_token_to_image
        tokens = tokens + _attend_to_image(final, tokens + pe, image_tokens, image.position_keys[-1])
        tokens = transformer.norm_final_attn(tokens)
        mask_tokens = tokens[:, 1 : 1 + decoder.num_mask_tokens]
        return PromptedImage(image.size, image_tokens, mask_tokens, decoder.iou_prediction_head(tokens[:, 0]))

    def upscale(
        self, prompted: PromptedImage, prompts: Iterable[int] | None = None, cells: tuple[int, int] | None = None
    ) -> Tensor:
        """Compute the masks of some prompts in a part of the image.

        Args:
            prompted: result of :meth:`prompt`.
            prompts: indices of the prompts; ``None`` for all.
            cells: rows and columns of the embedding to compute, from the top left; ``None`` for all. Upscaling is local
                to each cell, so masks are exact up to the border.

        Returns:
            Logits of all masks of those prompts, the single-mask output first, :math:`(P', M, 4h', 4w')`.
        """
        rows, columns = cells or prompted.size
        chosen = range(len(prompted.tokens)) if prompts is None else list(prompts)
        decoder, networks = self.decoder, self.decoder.output_hypernetworks_mlps
        weights = torch.stack([network(prompted.mask_tokens[:, i]) for i, network in enumerate(networks)], 1)
        if not self.folds:
            maps = decoder.output_upscaling(prompted.tokens[chosen].mT.unflatten(2, prompted.size))
            masks = (weights[chosen] @ maps.flatten(2)).unflatten(2, maps.shape[2:])
            return masks[..., : UPSCALING * rows, : UPSCALING * columns]
        maps = prompted.tokens.unflatten(1, prompted.size)[:, :rows, :columns]
        if not chosen:
            return weights.new_empty(0, len(networks), UPSCALING * rows, UPSCALING * columns)
        layers = decoder.output_upscaling
        linears = [_as_linear(cast("nn.ConvTranspose2d", layers[index]), maps.dtype) for index in (0, 3)]
        # unbind, because the gradient of maps[index] has the size of all maps.
        each, mixing = maps.unbind(), weights.to(maps.dtype).unbind()
        masks = [_upscale(layers, linears, each[index], mixing[index]) for index in chosen]
        return torch.stack(masks).to(prompted.mask_tokens.dtype)

    def _cast(self, x: Tensor) -> Tensor:
        return x.contiguous() if self.dtype is None else x.to(self.dtype).contiguous()


class SharingMaskDecoder(MaskDecoder):
    """kornia's ``MaskDecoder`` that runs as :class:`FoldedMaskDecoder`.

    Weights, arguments and, up to rounding, results and gradients are those of ``MaskDecoder``, which runs while a
    program is compiled or exported, and with changed layers.
    """

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks; see kornia's ``MaskDecoder.forward``.

        Args:
            image_embeddings: embedding of one image, :math:`(1, C, h, w)`.
            image_pe: its positional encoding, of the same shape.
            sparse_prompt_embeddings: embeddings of points and boxes, :math:`(P, N, C)`; :math:`P` may be 0.
            dense_prompt_embeddings: embeddings of masks, :math:`(P, C, h, w)`.
            multimask_output: predict three masks per prompt; otherwise one.

        Returns:
            Logits :math:`(P, M, 4h, 4w)` and predicted IoUs :math:`(P, M)`.
        """
        prompts = (sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output)
        folded, some = FoldedMaskDecoder(self), len(sparse_prompt_embeddings) > 0
        if some and (torch.compiler.is_compiling() or not folded.folds):
            return super().forward(image_embeddings, image_pe, *prompts)
        return folded(image_embeddings, image_pe, *prompts)


def _exchange(
    layer: TwoWayAttentionBlock, index: int, image: PreparedImage, tokens: Tensor, pe: Tensor, image_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one layer of the two-way transformer on prompts :math:`(P, N, C)` and image :math:`(P, S, C)`."""
    if layer.skip_first_layer_pe:
        tokens = layer.self_attn(tokens, tokens, tokens)
    else:
        tokens = tokens + layer.self_attn(tokens + pe, tokens + pe, tokens)
    tokens = layer.norm1(tokens)
    to_image, from_image = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    if index == 0:
        seen = _attend_to_shared(to_image, tokens + pe, image.keys, image.values)
    else:
        seen = _attend_to_image(to_image, tokens + pe, image_tokens, image.position_keys[index - 1])
    tokens = layer.norm2(tokens + seen)
    tokens = layer.norm3(tokens + layer.mlp(tokens))
    keys = _scaled(from_image, from_image.k_proj(tokens + pe))
    if index == 0:
        scores = _times(keys, image.queries)
    else:
        scores = _scores(keys, from_image.q_proj, image_tokens, image.position_queries[index - 1])
    return tokens, _update(image_tokens, scores, from_image, tokens, layer.norm4)


def _upscale(layers: nn.Sequential, linears: list[tuple[Tensor, Tensor]], cells: Tensor, weights: Tensor) -> Tensor:
    """Map the tokens :math:`(h, w, C)` and the weights :math:`(M, C')` of a prompt to its masks :math:`(M, 4h, 4w)`.

    A transposed convolution whose kernel size equals its stride is a linear layer from one cell to four.
    """
    bands = []
    for band in cells.split(BAND):
        x = F.linear(band.reshape(-1, band.shape[2]), *linears[0])
        x = layers[2](_normalize(x.unflatten(1, (4, -1)), cast("LayerNorm2d", layers[1])))
        x = layers[4](F.linear(x, *linears[1])).view(-1, weights.shape[1])
        # Each cell holds 2x2 cells of 2x2 pixels.
        bands.append((weights @ x.mT).view(-1, *band.shape[:2], 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6))
    return torch.cat(bands, 1).flatten(4, 6).flatten(1, 3)


def _normalize(x: Tensor, norm: nn.LayerNorm | LayerNorm2d) -> Tensor:
    """Normalize over the last dimension, in the dtype of the input."""
    if torch.is_grad_enabled() and x.dtype != norm.weight.dtype:
        # In lower precision torch sums the gradients of weight and bias over all tokens in that precision.
        return F.layer_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.bias, norm.eps).to(x.dtype)
    return F.layer_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _as_linear(conv: nn.ConvTranspose2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weight :math:`(4C', C)` and bias of the linear layer that equals a 2x2 transposed convolution."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return weight.to(dtype), cast("Tensor", conv.bias).repeat(4).to(dtype)


def _attend_to_shared(attention: Attention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from prompts :math:`(P, N, C)` to prepared keys and values."""
    scores = _times(_scaled(attention, attention.q_proj(queries)), keys)
    # Heads are the first dimension in memory; softmax over another order would copy.
    weights = scores.transpose(0, 1).softmax(-1).transpose(0, 1)
    return _merge(attention, _times(weights, values))


def _attend_to_image(attention: Attention, queries: Tensor, image_tokens: Tensor, position: Tensor) -> Tensor:
    """Attend from prompts :math:`(P, N, C)` to image tokens :math:`(P, S, C)` without projecting the latter."""
    scores = _scores(_scaled(attention, attention.q_proj(queries)), attention.k_proj, image_tokens, position)
    mixed = scores.softmax(-1).flatten(1, 2) @ image_tokens
    mixed = mixed.to(queries.dtype).unflatten(1, scores.shape[1:3])
    # Attention weights sum to one, so the bias of the values is added once.
    heads = attention.num_heads
    seen = _times(mixed, attention.v_proj.weight.unflatten(0, (heads, -1)).mT.unsqueeze(0))
    return _merge(attention, seen + attention.v_proj.bias.view(heads, 1, -1))


def _update(image_tokens: Tensor, scores: Tensor, attention: Attention, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Attend from image tokens to prompts with scores :math:`(P, H, N, S)`; returns image tokens :math:`(P, S, C)`."""
    heads = attention.num_heads
    values = _heads(attention.v_proj(tokens), attention)
    written = _times(values, attention.out_proj.weight.mT.unflatten(0, (heads, -1)).unsqueeze(0))
    written = written + attention.out_proj.bias / heads  # attention weights of each head sum to one
    weights = scores.softmax(2).flatten(1, 2).mT
    image_tokens = torch.baddbmm(
        image_tokens.expand(len(tokens), -1, -1), weights, written.flatten(1, 2).to(image_tokens.dtype)
    )
    return _normalize(image_tokens, norm)


def _scores(prompts: Tensor, projection: nn.Linear, image_tokens: Tensor, position: Tensor) -> Tensor:
    """Return scores :math:`(P, H, N, S)` of prompts :math:`(P, H, N, d)` with image tokens plus position."""
    folded = _times(prompts, projection.weight.unflatten(0, (prompts.shape[1], -1)).unsqueeze(0))
    scores = folded.flatten(1, 2).to(image_tokens.dtype) @ image_tokens.mT
    scores, position = scores.unflatten(1, prompts.shape[1:3]), _times(prompts, position)
    return torch.add(scores, position, out=None if scores.requires_grad else scores)


def _times(x: Tensor, shared: Tensor) -> Tensor:
    """Multiply :math:`(P, H, N, a)` by :math:`(B, H, a, b)`; for :math:`B = 1` in one product for all prompts."""
    x = x.to(shared.dtype)
    if len(shared) > 1:
        return x @ shared
    together = torch.bmm(x.transpose(0, 1).flatten(1, 2), shared[0])
    return together.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def _heads(x: Tensor, attention: Attention) -> Tensor:
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _scaled(attention: Attention, projected: Tensor) -> Tensor:
    return _heads(projected, attention) / math.sqrt(attention.internal_dim // attention.num_heads)


def _merge(attention: Attention, x: Tensor) -> Tensor:
    return attention.out_proj(x.transpose(1, 2).flatten(2).to(attention.out_proj.weight.dtype))
