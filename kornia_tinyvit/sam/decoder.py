"""SAM's mask decoder for many prompts over one image: the same numbers, from a third of the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from kornia.models.common import LayerNorm2d
from kornia.models.sam.architecture.mask_decoder import MaskDecoder
from kornia.models.sam.architecture.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor, nn

__all__ = ["FoldedMaskDecoder", "PreparedImage", "PromptedImage", "SharingMaskDecoder"]

# Prompts decoded together. On a CPU the tokens of few images stay in its caches; a GPU wants more work at a time.
CPU_CHUNK, CHUNK = 8, 64
BAND = 8  # rows of the embedding upscaled together, for the same reason
UPSCALING = 4  # cells of a mask along a cell of the embedding


@dataclass(frozen=True)
class PreparedImage:
    """What all prompts over one image share, made by :meth:`FoldedMaskDecoder.prepare`.

    With :math:`S = hw` cells, :math:`H` heads of depth :math:`d`, and :math:`B` 1, or the number of prompts if each
    has a dense embedding of its own:

    Args:
        size: height and width of the embedding in cells.
        tokens: embedding with the dense prompt added, :math:`(B, S, C)`.
        keys: of the first attention from the prompts to the image, :math:`(B, H, d, S)`.
        values: of the same attention, :math:`(B, H, S, d)`.
        queries: of the first attention from the image to the prompts, :math:`(B, H, d, S)`.
        position_keys: what the position adds to the keys of each later attention to the image, :math:`(1, H, d, S)`.
        position_queries: what it adds to the queries of each later attention from the image, of the same shape.
    """

    size: tuple[int, int]
    tokens: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor
    position_keys: list[Tensor]
    position_queries: list[Tensor]


@dataclass(frozen=True)
class PromptedImage:
    """What the decoder's transformer makes of an image and :math:`P` prompts.

    Args:
        size: height and width of the embedding in cells.
        tokens: the image's tokens, :math:`(P, S, C)`.
        mask_tokens: tokens of the masks, :math:`(P, M, C)`.
        iou: predicted quality of the masks, :math:`(P, M)`.
    """

    size: tuple[int, int]
    tokens: Tensor
    mask_tokens: Tensor
    iou: Tensor


class FoldedMaskDecoder(nn.Module):
    r"""Run a kornia ``MaskDecoder`` on many prompts over one image, for inference.

    Calling it is calling the decoder, with the same results but for rounding. Prompts have few tokens :math:`N`, the
    image thousands, so each projection of the image is moved to the prompts' side, where it is small:
    :math:`q (W k)^T = (q W) k^T` for the keys and queries, :math:`a (k W) = (a k) W` for the values and outputs. What
    comes before the first exchange is the same for all prompts and computed once.

    The parts can be had one by one: :meth:`prepare` what the prompts share, :meth:`prompt` it to learn the quality of
    the masks, and :meth:`upscale` only the masks that are good enough.

    It holds the decoder itself and nothing derived from it: what changes there changes here.

    Args:
        decoder: the decoder.
        dtype: precision of the work on the image's side; the prompts' side keeps that of the parameters. ``None`` is
            the parameters' too. ``torch.bfloat16`` takes two thirds of the time on a CPU that multiplies it, and moves
            logits by some per cent.

    Raises:
        TypeError: if the decoder is not kornia's with its two-way transformer.
    """

    def __init__(self, decoder: MaskDecoder, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(decoder, MaskDecoder) or not isinstance(decoder.transformer, TwoWayTransformer):
            raise TypeError(
                "FoldedMaskDecoder takes kornia's MaskDecoder with a TwoWayTransformer; got "
                f"{type(decoder).__name__} with {type(getattr(decoder, 'transformer', None)).__name__}."
            )
        self.decoder = decoder
        self.dtype = dtype

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks, as ``MaskDecoder.forward`` does.

        Args:
            image_embeddings: embedding of one image, :math:`(1, C, h, w)`, of any height and width.
            image_pe: its positional encoding, of the same shape.
            sparse_prompt_embeddings: embeddings of points and boxes, :math:`(P, N, C)`; :math:`P` and :math:`N` may
                be 0.
            dense_prompt_embeddings: embeddings of masks, :math:`(P, C, h, w)`, or :math:`(1, C, h, w)` for all. One
                for all, or expanded from one as the prompt encoder does without masks, lets the prompts share more.
            multimask_output: return the masks for ambiguous prompts instead of the single one.

        Returns:
            Logits :math:`(P, M, 4h, 4w)` and predicted qualities :math:`(P, M)`, :math:`M` being 3 or 1 in SAM.

        Raises:
            RuntimeError: if gradients would be wanted.
            ValueError: if the shapes do not fit.
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

    def prepare(self, image_embeddings: Tensor, image_pe: Tensor, dense_prompt_embeddings: Tensor) -> PreparedImage:
        """Compute what all prompts over an image share.

        Args:
            image_embeddings: embedding of the image, :math:`(1, C, h, w)`.
            image_pe: its positional encoding, of the same shape.
            dense_prompt_embeddings: embedding of no mask, or of the mask that all prompts share,
                :math:`(1, C, h, w)`; or one for each of the prompts that will be asked together, :math:`(P, C, h, w)`.

        Raises:
            RuntimeError: if gradients would be wanted.
            ValueError: if the shapes do not fit.
        """
        _check_image(image_embeddings, image_pe, dense_prompt_embeddings, self.decoder.transformer_dim)
        self._refuse_gradients(image_embeddings, image_pe, dense_prompt_embeddings)
        transformer = cast("TwoWayTransformer", self.decoder.transformer)
        layers = list(cast("Iterable[TwoWayAttentionBlock]", transformer.layers))
        first, later = layers[0], layers[1:]
        reading, writing = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        tokens = (image_embeddings + dense_prompt_embeddings).flatten(2).mT.contiguous()
        position = image_pe.flatten(2).mT
        placed = tokens + position
        to_image = [*(layer.cross_attn_token_to_image for layer in later), transformer.final_attn_token_to_image]
        from_image = [layer.cross_attn_image_to_token for layer in later]
        return PreparedImage(
            size=cast("tuple[int, int]", tuple(image_embeddings.shape[2:])),
            tokens=self._cast(tokens),
            keys=self._cast(_heads(reading.k_proj(placed), reading).mT),
            values=self._cast(_heads(reading.v_proj(tokens), reading)),
            queries=self._cast(_heads(writing.q_proj(placed), writing).mT),
            # A key's bias adds the same to all scores of a query, which its softmax does not see.
            position_keys=[self._cast(_heads(F.linear(position, a.k_proj.weight), a).mT) for a in to_image],
            position_queries=[self._cast(_heads(a.q_proj(position), a).mT) for a in from_image],
        )

    def prompt(self, image: PreparedImage, sparse_prompt_embeddings: Tensor) -> PromptedImage:
        """Let prompts and image exchange what they know, and predict the quality of the masks.

        Memory grows with the prompts, by some :math:`2 S (C + HN)` numbers each.

        Args:
            image: the image, prepared.
            sparse_prompt_embeddings: embeddings of points and boxes, :math:`(P, N, C)`.

        Returns:
            The image with the results of the prompts.

        Raises:
            RuntimeError: if gradients would be wanted.
            ValueError: if the image was prepared for another number of prompts.
        """
        self._refuse_gradients(image.tokens, sparse_prompt_embeddings)
        prompts = len(sparse_prompt_embeddings)
        if len(image.tokens) not in {1, prompts}:
            raise ValueError(
                f"The image was prepared for {len(image.tokens)} dense prompts; got {prompts} sparse ones."
            )
        decoder, transformer = self.decoder, cast("TwoWayTransformer", self.decoder.transformer)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        identity = torch.cat([own.expand(prompts, -1, -1), sparse_prompt_embeddings], 1)
        tokens, image_tokens = identity, image.tokens
        for index, layer in enumerate(cast("Iterable[TwoWayAttentionBlock]", transformer.layers)):
            tokens, image_tokens = _exchange(layer, index, image, tokens, identity, image_tokens)
        final = transformer.final_attn_token_to_image
        tokens = tokens + _attend_to_image(final, tokens + identity, image_tokens, image.position_keys[-1])
        tokens = transformer.norm_final_attn(tokens)
        mask_tokens = tokens[:, 1 : 1 + decoder.num_mask_tokens]
        return PromptedImage(image.size, image_tokens, mask_tokens, decoder.iou_prediction_head(tokens[:, 0]))

    def upscale(
        self, prompted: PromptedImage, prompts: Iterable[int] | None = None, cells: tuple[int, int] | None = None
    ) -> Tensor:
        """Compute the masks of some prompts, where the image is.

        Args:
            prompted: what :meth:`prompt` returned.
            prompts: indices of the prompts; ``None`` for all.
            cells: rows and columns of the embedding, from the top left, whose masks are wanted; ``None`` for all. The
                upscaling looks at no neighbors, so they are exact up to their edges.

        Returns:
            Logits of all masks of those prompts, the single one first, :math:`(P', M, 4h', 4w')`.
        """
        self._refuse_gradients(prompted.tokens)
        rows, columns = cells or prompted.size
        chosen = range(len(prompted.tokens)) if prompts is None else list(prompts)
        networks = self.decoder.output_hypernetworks_mlps
        weights = torch.stack([network(prompted.mask_tokens[:, i]) for i, network in enumerate(networks)], 1)
        masks = weights.new_empty(len(chosen), len(networks), UPSCALING * rows, UPSCALING * columns)
        maps = prompted.tokens.unflatten(1, prompted.size)[:, :rows, :columns]
        layers = self.decoder.output_upscaling
        linears = [_as_linear(cast("nn.ConvTranspose2d", layers[index]), maps.dtype) for index in (0, 3)]
        for mask, index in zip(masks, chosen, strict=True):
            _upscale(layers, linears, maps[index], weights[index].to(maps.dtype), out=mask)
        return masks

    def _cast(self, x: Tensor) -> Tensor:
        return x.contiguous() if self.dtype is None else x.to(self.dtype).contiguous()

    def _refuse_gradients(self, *inputs: Tensor) -> None:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *self.parameters())):
            raise RuntimeError(
                "FoldedMaskDecoder is for inference only. Call it under torch.no_grad() or torch.inference_mode(); for "
                "gradients use the MaskDecoder it was made from, which takes the same arguments."
            )


class SharingMaskDecoder(MaskDecoder):
    """kornia's ``MaskDecoder``, whose prompts share their work wherever no gradient is recorded.

    The names of its weights, its arguments and, but for rounding, its results are the same. Under
    :func:`torch.no_grad` it runs as :class:`FoldedMaskDecoder`, whoever calls it; with gradients, or in a program that
    is being compiled or exported, it runs as kornia's.
    """

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks, as ``MaskDecoder.forward`` does; also for no prompts.

        Args:
            image_embeddings: features of one photo, :math:`(1, C, h, w)`.
            image_pe: position codes of their cells, of the same shape.
            sparse_prompt_embeddings: points and boxes of the prompts, :math:`(P, N, C)`.
            dense_prompt_embeddings: masks of the prompts, :math:`(P, C, h, w)`.
            multimask_output: three masks a prompt, otherwise one.

        Returns:
            Logits :math:`(P, M, 4h, 4w)` and predicted IoUs :math:`(P, M)`.
        """
        prompts = (sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output)
        if (torch.is_grad_enabled() or torch.compiler.is_compiling()) and len(sparse_prompt_embeddings):
            return super().forward(image_embeddings, image_pe, *prompts)
        with torch.no_grad():
            return FoldedMaskDecoder(self)(image_embeddings, image_pe, *prompts)


def _exchange(
    layer: TwoWayAttentionBlock,
    index: int,
    image: PreparedImage,
    tokens: Tensor,
    identity: Tensor,
    image_tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run one layer of the two-way transformer on prompts :math:`(P, N, C)` and image :math:`(P, S, C)`."""
    if layer.skip_first_layer_pe:
        tokens = layer.self_attn(tokens, tokens, tokens)
    else:
        tokens = tokens + layer.self_attn(tokens + identity, tokens + identity, tokens)
    tokens = layer.norm1(tokens)
    to_image, from_image = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    if index == 0:
        seen = _attend_to_shared(to_image, tokens + identity, image.keys, image.values)
    else:
        seen = _attend_to_image(to_image, tokens + identity, image_tokens, image.position_keys[index - 1])
    tokens = layer.norm2(tokens + seen)
    tokens = layer.norm3(tokens + layer.mlp(tokens))
    keys = _scaled(from_image, from_image.k_proj(tokens + identity))
    if index == 0:
        scores = _times(keys, image.queries)
    else:
        scores = _scores(keys, from_image.q_proj, image_tokens, image.position_queries[index - 1])
    return tokens, _update(image_tokens, scores, from_image, tokens, layer.norm4)


def _upscale(
    layers: nn.Sequential, linears: list[tuple[Tensor, Tensor]], cells: Tensor, weights: Tensor, out: Tensor
) -> None:
    """Map the tokens :math:`(h, w, C)` and the weights :math:`(M, C')` of a prompt to its masks :math:`(M, 4h, 4w)`.

    Transposed convolutions whose kernels are as large as their strides are linear layers: a cell makes its own four.
    """
    for band, target in zip(cells.split(BAND), out.split(UPSCALING * BAND, 1), strict=True):
        x = F.linear(band.reshape(-1, band.shape[2]), *linears[0])
        x = layers[2](_normalize(x.unflatten(1, (4, -1)), cast("LayerNorm2d", layers[1])))
        x = layers[4](F.linear(x, *linears[1])).view(-1, weights.shape[1])
        # Each cell holds 2x2 cells of 2x2 pixels.
        x = (weights @ x.mT).view(-1, *band.shape[:2], 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        target.copy_(x.reshape(target.shape))


def _normalize(x: Tensor, norm: nn.LayerNorm | LayerNorm2d) -> Tensor:
    """Normalize over the last dimension, in the precision of the input."""
    return F.layer_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _as_linear(conv: nn.ConvTranspose2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weight :math:`(4C', C)` and bias of the linear layer that equals a transposed convolution of 2x2."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return weight.to(dtype), cast("Tensor", conv.bias).repeat(4).to(dtype)


def _attend_to_shared(attention: Attention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Let prompts :math:`(P, N, C)` attend to keys and values projected before."""
    scores = _times(_scaled(attention, attention.q_proj(queries)), keys)
    # The heads lead in memory; a softmax of them in another order would copy them.
    weights = scores.transpose(0, 1).softmax(-1).transpose(0, 1)
    return _merge(attention, _times(weights, values))


def _attend_to_image(attention: Attention, queries: Tensor, image_tokens: Tensor, position: Tensor) -> Tensor:
    """Let prompts :math:`(P, N, C)` attend to an image :math:`(P, S, C)` whose keys and values are never computed."""
    scores = _scores(_scaled(attention, attention.q_proj(queries)), attention.k_proj, image_tokens, position)
    mixed = scores.softmax(-1).flatten(1, 2) @ image_tokens
    mixed = mixed.to(queries.dtype).unflatten(1, scores.shape[1:3])
    # The weights of the softmax sum to one, so the bias of the values comes through as it is.
    heads = attention.num_heads
    seen = _times(mixed, attention.v_proj.weight.unflatten(0, (heads, -1)).mT.unsqueeze(0))
    return _merge(attention, seen + attention.v_proj.bias.view(heads, 1, -1))


def _update(image_tokens: Tensor, scores: Tensor, attention: Attention, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Let the image take from the prompts what its scores :math:`(P, H, N, S)` ask for; returns :math:`(P, S, C)`."""
    heads = attention.num_heads
    values = _heads(attention.v_proj(tokens), attention)
    written = _times(values, attention.out_proj.weight.mT.unflatten(0, (heads, -1)).unsqueeze(0))
    written = written + attention.out_proj.bias / heads  # each head's weights sum to one
    weights = scores.softmax(2).flatten(1, 2).mT
    image_tokens = torch.baddbmm(
        image_tokens.expand(len(tokens), -1, -1), weights, written.flatten(1, 2).to(image_tokens.dtype)
    )
    return _normalize(image_tokens, norm)


def _scores(prompts: Tensor, projection: nn.Linear, image_tokens: Tensor, position: Tensor) -> Tensor:
    """Return the scores :math:`(P, H, N, S)` of prompts :math:`(P, H, N, d)` and an image with its position added."""
    folded = _times(prompts, projection.weight.unflatten(0, (prompts.shape[1], -1)).unsqueeze(0))
    scores = folded.flatten(1, 2).to(image_tokens.dtype) @ image_tokens.mT
    return scores.unflatten(1, prompts.shape[1:3]).add_(_times(prompts, position))


def _times(x: Tensor, shared: Tensor) -> Tensor:
    """Multiply :math:`(P, H, N, a)` by :math:`(B, H, a, b)`, for :math:`B = 1` without repeating it for each prompt."""
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


def _check_image(image_embeddings: Tensor, image_pe: Tensor, dense: Tensor, channels: int) -> None:
    shape = tuple(image_embeddings.shape)
    if len(shape) != 4 or shape[:2] != (1, channels):
        raise ValueError(f"FoldedMaskDecoder takes the embedding (1, {channels}, h, w) of one image; got {shape}.")
    if tuple(image_pe.shape) != shape:
        raise ValueError(f"The positional encoding must be {shape}, as the embedding; got {tuple(image_pe.shape)}.")
    if dense.shape[1:] != image_embeddings.shape[1:]:
        raise ValueError(f"Dense prompts must be (P, {', '.join(map(str, shape[1:]))}); got {tuple(dense.shape)}.")
