"""Export of MobileSAM to two ONNX files: the image encoder, and the prompt encoder with the mask decoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from torch import Tensor, nn

from kornia_tinyvit.deploy.export import check_difference, describe
from kornia_tinyvit.deploy.formats.onnx import Run, check_opset, to_onnx, write_onnx
from kornia_tinyvit.deploy.formats.program import trace
from kornia_tinyvit.deploy.graph import build_graph, synthetic_images
from kornia_tinyvit.files import replacing
from kornia_tinyvit.folding import fold
from kornia_tinyvit.modules import without_wrappers
from kornia_tinyvit.sam.embedding import Geometry
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.sam.transforms import PIXEL_MEAN, PIXEL_STD

if TYPE_CHECKING:
    import onnx

__all__ = ["export_mobile_sam"]

_LABELS = {"none": -1, "off": 0, "on": 1, "top_left": 2, "bottom_right": 3}
_OUTPUTS = ["masks", "iou_predictions", "low_res_masks"]
_DECODER_AXES = {
    "point_coords": {0: "prompts", 1: "points"},
    "point_labels": {0: "prompts", 1: "points"},
    "mask_input": {0: "mask_inputs"},
    "has_mask_input": {0: "has_mask_inputs"},
    "masks": {2: "height", 3: "width"},
}


def export_mobile_sam(
    sam: MobileSAM, folder: str | Path, *, prefix: str = "", opset: int = 20, tolerance: float = 1e-3
) -> tuple[Path, Path]:
    r"""Export ``encoder.onnx``, which runs once per image, and ``decoder.onnx``, which runs for every set of prompts.

    The encoder's input is ``images`` :math:`(1, 3, H', W')`, uint8: an image resized to the ``input_size`` of
    :meth:`Geometry.fit`. Normalization and padding are part of the graph, since the padding is the mean color, which
    uint8 cannot represent. The output is ``image_embeddings`` :math:`(1, 256, h/16, w/16)` for the network's input of
    :math:`h \times w` pixels.

    The decoder has the inputs and outputs of segment-anything's ONNX export (``segment_anything/utils/onnx.py``), all
    float32, but for any number of prompts :math:`P`:

    - ``image_embeddings``: output of the encoder;
    - ``point_coords``: :math:`(P, N, 2)`, x and y in pixels of the resized image;
    - ``point_labels``: :math:`(P, N)`, 1 foreground, 0 background, 2 upper left and 3 lower right corner of a box, -1
      padding. As in SAM's training, prompts without a box need one padding point at the end;
    - ``mask_input``: :math:`(P, 1, h/4, w/4)`, logits of a previous prediction, or zeros; or one for all prompts,
      :math:`(1, 1, h/4, w/4)`;
    - ``has_mask_input``: :math:`(P,)` or :math:`(1,)`, 1 where ``mask_input`` is used, 0 where it is ignored;
    - ``orig_im_size``: :math:`(2,)`, height and width of the original image.

    The outputs are ``masks`` :math:`(P, 4, H, W)`, logits at the original size, positive in the foreground;
    ``iou_predictions`` :math:`(P, 4)`; and ``low_res_masks`` :math:`(P, 4, h/4, w/4)`, each of which can be the next
    ``mask_input``. The first of the four masks is for unambiguous prompts, such as boxes or several points, the others
    for ambiguous ones. The ``masks`` take 16 bytes of memory per prompt and pixel.

    Each file is compared with the network in ONNX Runtime before it is renamed to its final name: with two numbers of
    prompts and points, boxes and masks, and portrait and landscape images. The metadata properties are listed in the
    guide :doc:`/guides/onnx`.

    Args:
        sam: the network; it is not modified.
        folder: the output folder; it is created.
        prefix: start of the names of both files, such as ``"mobile_sam."``.
        opset: opset version.
        tolerance: see :func:`~kornia_tinyvit.deploy.export_onnx`.

    Returns:
        The paths of the encoder and the decoder.

    Raises:
        ExportError: if an output differs, or the exporter does not support the opset; existing files are kept.
        ValueError: if the opset is older than 18 or newer than the installed onnx supports.
        MissingExtraError: if onnx, onnxscript or onnxruntime is not installed.
    """
    check_opset(opset)
    encoder, decoder = (Path(folder) / f"{prefix}{part}.onnx" for part in ("encoder", "decoder"))
    network = copy.deepcopy(without_wrappers(sam)).to("cpu", torch.float32).eval()
    with replacing(encoder, ".onnx") as new_encoder, replacing(decoder, ".onnx") as new_decoder, torch.no_grad():
        encoder_input = {
            "pixels": "uint8",
            "range": [0, 255],
            "mean": PIXEL_MEAN,
            "std": PIXEL_STD,
            "normalization_inside": True,
            "padding_inside": True,
            "img_size": sam.img_size,
            "resize_inside": False,
        }
        metadata = describe(sam.config, kind="mobile_sam", part="encoder", input=encoder_input)
        _check_encoder(network, write_onnx(_encoder(network, opset), new_encoder, opset, metadata), tolerance)
        decoder_input = {"img_size": sam.img_size, "point_labels": _LABELS}
        settings = {"input": decoder_input, "mask_threshold": sam.mask_threshold}
        metadata = describe(sam.config, kind="mobile_sam", part="decoder", **settings)
        _check_decoder(network, write_onnx(_decoder(network, opset), new_decoder, opset, metadata), tolerance)
    return encoder, decoder


class _EncoderGraph(nn.Module):
    """Maps a resized uint8 image to its embedding."""

    mean: Tensor

    def __init__(self, sam: MobileSAM) -> None:
        super().__init__()
        graph = build_graph(sam.image_encoder, pixels="uint8")
        self.network = graph.network
        self.register_buffer("mean", graph.mean)
        self.img_size = sam.img_size

    def forward(self, images: Tensor) -> Tensor:
        below, right = (side - used for side, used in zip(self.img_size, images.shape[2:], strict=True))
        return self.network(F.pad(images.float() - self.mean, (0, right, 0, below)))


class _DecoderGraph(nn.Module):
    """kornia's prompt encoder and mask decoder with tensor inputs for every kind of prompt."""

    position: Tensor
    label_embeddings: Tensor

    def __init__(self, sam: MobileSAM) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = fold(sam.prompt_encoder), fold(sam.mask_decoder)
        self.img_size = sam.img_size
        encoder = sam.prompt_encoder
        self.register_buffer("position", encoder.get_dense_pe())
        embeddings = [encoder.not_a_point_embed, *encoder.point_embeddings]  # of the labels -1 to 3
        self.register_buffer("label_embeddings", torch.cat([embedding.weight for embedding in embeddings]))

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Coordinates are indices of pixels, whose centers are at half a pixel.
        positions = self.prompt_encoder.pe_layer.forward_with_coords(point_coords + 0.5, self.img_size)
        labels = point_labels.unsqueeze(-1)
        one_hot = labels == torch.arange(len(self.label_embeddings), device=labels.device) + _LABELS["none"]
        # Padding points have no position.
        sparse = positions * (labels != _LABELS["none"]) + one_hot.to(positions.dtype) @ self.label_embeddings
        no_mask = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        mask_input, has_mask_input = (_expand(each, point_coords.shape[0]) for each in (mask_input, has_mask_input))
        has_mask = has_mask_input.view(-1, 1, 1, 1) > 0
        dense = torch.where(has_mask, self.prompt_encoder.mask_downscaling(mask_input), no_mask)
        low, iou = self.mask_decoder.predict_masks(image_embeddings, self.position, sparse, dense)
        return self._restore(low, orig_im_size), iou, low

    def _restore(self, low: Tensor, orig_im_size: Tensor) -> Tensor:
        """Upscale logits like :meth:`Geometry.restore`, for an image size given as a tensor."""
        exact = orig_im_size.to(torch.float64)  # sides must be rounded as in Geometry.fit
        scale = (torch.tensor(self.img_size, dtype=torch.float64) / exact).min()
        used = (exact * scale + 0.5).floor().clamp(min=1).long().tolist()
        full = orig_im_size.long().tolist()
        for side, limit in zip(used, self.img_size, strict=True):
            torch._check(side <= limit)
        for side in (*used, *full):
            torch._check(side >= 1)
        padded = F.interpolate(low, self.img_size, mode="bilinear", align_corners=False)
        return F.interpolate(padded[:, :, : used[0], : used[1]], full, mode="bilinear", align_corners=False)


def _expand(x: Tensor, count: int) -> Tensor:
    """Repeat a tensor of one row, and return one of ``count`` rows as it is; other numbers fail in the runtime.

    Broadcasting would be traced for one of the two cases only.
    """
    rows = x.shape[0]
    several = torch.sym_min(rows - 1, 1)  # 0 for one row, otherwise 1
    surplus = torch.sym_max(rows - count, 0) * several  # makes the indices too large
    return x.index_select(0, torch.arange(count, device=x.device) * several + surplus * rows)


def _encoder(sam: MobileSAM, opset: int) -> onnx.ModelProto:
    height, width = sam.img_size
    image = torch.zeros(1, 3, height - 1, width - 2, dtype=torch.uint8)  # dynamic sizes must differ, see trace
    axes = {"images": {2: "height", 3: "width"}}
    return to_onnx(trace(_EncoderGraph(sam), {"images": image}, axes), opset, outputs=["image_embeddings"], axes=axes)


def _decoder(sam: MobileSAM, opset: int) -> onnx.ModelProto:
    inputs = _example_prompts(sam, prompts=2, points=3, size=(150, 200))
    # Dynamic sizes must differ, see trace.
    inputs |= {"mask_input": inputs["mask_input"].repeat(3, 1, 1, 1), "has_mask_input": torch.zeros(7)}
    return to_onnx(trace(_DecoderGraph(sam), inputs, _DECODER_AXES), opset, list(inputs), _OUTPUTS, _DECODER_AXES)


def _example_prompts(
    sam: MobileSAM, prompts: int, points: int, size: tuple[int, int], boxes: bool = False, mask: int = -1
) -> dict[str, Tensor]:
    """Return example inputs of the exported decoder.

    Args:
        sam: the network.
        prompts: number of prompts.
        points: number of points per prompt.
        size: height and width of the original image.
        boxes: whether to add one box per prompt.
        mask: index of the prompt with a mask; -1 for no mask.
    """
    generator = torch.Generator().manual_seed(prompts)
    height, width = Geometry.fit(size, sam.img_size).input_size
    coords = torch.rand(prompts, points + 2, 2, generator=generator) * torch.tensor([width, height])
    labels = torch.arange(prompts * points).view(prompts, points).add(1).remainder(2)
    if boxes:
        last, last_labels = coords[:, points:].sort(1).values, [_LABELS["top_left"], _LABELS["bottom_right"]]
    else:  # kornia's prompt encoder adds the padding point itself
        last, last_labels = torch.zeros(prompts, 1, 2), [_LABELS["none"]]
    return {
        "image_embeddings": torch.randn(
            1, sam.mask_decoder.transformer_dim, *sam.prompt_encoder.image_embedding_size, generator=generator
        ),
        "point_coords": torch.cat([coords[:, :points], last], 1),
        "point_labels": torch.cat([labels, torch.tensor(last_labels).expand(prompts, -1)], 1).float(),
        "mask_input": 4 * torch.randn(prompts, 1, *sam.prompt_encoder.mask_input_size, generator=generator),
        "has_mask_input": (torch.arange(prompts) == mask).float(),
        "orig_im_size": torch.tensor(size).float(),
    }


def _expected_masks(sam: MobileSAM, features: Tensor, *prompts: Tensor) -> list[Tensor]:
    """Return the low-resolution logits and scores of kornia's modules, which take one prompt at a time."""
    outputs = []
    for coords, labels, mask, has_mask in zip(*prompts, strict=True):
        is_point, is_corner = (labels == 0) | (labels == 1), labels >= _LABELS["top_left"]
        sparse, dense = sam.prompt_encoder(
            points=(coords[None, is_point], labels[None, is_point]),
            boxes=coords[is_corner].view(1, 4) if is_corner.any() else None,
            masks=mask[None] if has_mask else None,
        )
        outputs.append(sam.mask_decoder.predict_masks(features, sam.prompt_encoder.get_dense_pe(), sparse, dense))
    return [torch.cat(each) for each in zip(*outputs, strict=True)]


def _check_encoder(sam: MobileSAM, run: Run, tolerance: float) -> None:
    """Compare images without padding, with padding on the right and with padding at the bottom."""
    height, width = sam.img_size
    for size in ((height, width), (height, width // 2 + 1), (height // 3, width)):
        image = synthetic_images(sam.config, 1, size, "uint8")
        inputs = normalize(image / 255, torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD))
        expected = sam.image_encoder(F.pad(inputs, (0, width - size[1], 0, height - size[0])))
        check_difference("image_embeddings", expected, run(image)[0], tolerance)


def _check_decoder(sam: MobileSAM, run: Run, tolerance: float) -> None:
    for inputs in (
        _example_prompts(sam, prompts=1, points=1, size=(240, 135)),
        _example_prompts(sam, prompts=3, points=2, size=(101, 333), boxes=True, mask=1),
    ):
        features, *prompts, size = inputs.values()
        low, iou = _expected_masks(sam, features, *prompts)
        height, width = size.int().tolist()
        outputs = [Geometry.fit((height, width), sam.img_size).restore(low), iou, low]
        for name, expected, found in zip(_OUTPUTS, outputs, run(*inputs.values()), strict=True):
            check_difference(name, expected, found, tolerance)
