"""MobileSAM as two ONNX files: an encoder of photos, and a decoder of prompts."""

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
from kornia_tinyvit.deploy.graph import build_graph
from kornia_tinyvit.files import replacing
from kornia_tinyvit.folding import fold
from kornia_tinyvit.sam.embedding import Geometry
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.sam.transforms import PIXEL_MEAN, PIXEL_STD

if TYPE_CHECKING:
    import onnx

__all__ = ["export_mobile_sam"]

_LABELS = {"none": -1, "off": 0, "on": 1, "top_left": 2, "bottom_right": 3}
_OUTPUTS = ["masks", "iou_predictions", "low_res_masks"]


def export_mobile_sam(
    sam: MobileSAM, folder: str | Path, *, opset: int = 20, tolerance: float = 1e-3
) -> tuple[Path, Path]:
    r"""Write ``encoder.onnx``, to run once a photo, and ``decoder.onnx``, to run at every prompt.

    The encoder's input is ``images`` :math:`(1, 3, H', W')`, uint8: a photo resized to the ``input_size`` of
    :meth:`Geometry.fit`, as large as it can be with its aspect ratio. Normalization and padding are inside, since what
    pads is the mean color, which 8 bits cannot hold. Its output is ``image_embeddings``
    :math:`(1, 256, h/16, w/16)`, for the network's input of :math:`h \times w` pixels.

    The decoder has the inputs and outputs of segment-anything's ONNX export (``segment_anything/utils/onnx.py``), all
    float32, but takes any number of prompts :math:`P` at once:

    - ``image_embeddings``: what the encoder returned;
    - ``point_coords``: :math:`(P, N, 2)`, x and y in pixels of the resized photo;
    - ``point_labels``: :math:`(P, N)`, 1 on the object, 0 off it, 2 the upper left and 3 the lower right corner of a
      box, -1 no point. SAM was trained with one point of -1 behind the others where there is no box;
    - ``mask_input``: :math:`(P, 1, h/4, w/4)`, logits of an earlier prediction, or zeros;
    - ``has_mask_input``: :math:`(P,)`, 1 where that mask counts, 0 where it does not;
    - ``orig_im_size``: :math:`(2,)`, height and width of the photo.

    It returns ``masks`` :math:`(P, 4, H, W)`, logits of the photo's size, positive on the object;
    ``iou_predictions`` :math:`(P, 4)`; and ``low_res_masks`` :math:`(P, 4, h/4, w/4)`, any of which can be the next
    ``mask_input``. The first of the four masks is for prompts that are clear, such as boxes or several points, the
    others for those that may mean several things. Full-size logits of many prompts take memory: 16 bytes a prompt and
    pixel.

    Each file is run in ONNX Runtime, with two numbers of prompts and of points, boxes and masks, and photos upright and
    wide, and compared with the network in PyTorch before it gets its name. Metadata tell the configuration, what the
    inputs have to be and the mask threshold, as JSON under keys that begin with ``kornia_tinyvit.``.

    Args:
        sam: the network; it is left as it is.
        folder: where to write; it is made.
        opset: version of the operators.
        tolerance: largest difference to accept, of outputs whose values are up to 1, else in proportion.

    Returns:
        The paths of the encoder and the decoder.

    Raises:
        ExportError: if an output differs, or the exporter cannot write the opset; files that were there before stay.
        ValueError: if the opset is older than 18 or newer than the installed onnx.
        MissingExtraError: if onnx, onnxscript or onnxruntime is not installed.
    """
    check_opset(opset)
    encoder, decoder = Path(folder) / "encoder.onnx", Path(folder) / "decoder.onnx"
    network = copy.deepcopy(sam).to("cpu", torch.float32).eval()
    with replacing(encoder, ".onnx") as new_encoder, replacing(decoder, ".onnx") as new_decoder, torch.no_grad():
        run = write_onnx(_encoder(network, opset), new_encoder, opset, _describe_encoder(network))
        _check_encoder(network, run, tolerance)
        run = write_onnx(_decoder(network, opset), new_decoder, opset, _describe_decoder(network))
        _check_decoder(network, run, tolerance)
    return encoder, decoder


class _EncoderGraph(nn.Module):
    """From a resized photo of 8 bits to its features."""

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
    """kornia's prompt encoder and mask decoder, behind inputs that are tensors whatever is asked."""

    position: Tensor
    kinds: Tensor
    img_sides: Tensor

    def __init__(self, sam: MobileSAM) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = fold(sam.prompt_encoder), fold(sam.mask_decoder)
        self.img_size = sam.img_size
        encoder = sam.prompt_encoder
        self.register_buffer("position", encoder.get_dense_pe())
        kinds = [encoder.not_a_point_embed, *encoder.point_embeddings]  # of the labels -1 to 3
        self.register_buffer("kinds", torch.cat([kind.weight for kind in kinds]))
        self.register_buffer("img_sides", torch.tensor(sam.img_size, dtype=torch.float64))

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sparse = self._sparse(point_coords, point_labels)
        dense = self._dense(mask_input, has_mask_input)
        low, iou = self.mask_decoder.predict_masks(image_embeddings, self.position, sparse, dense)
        return self._restore(low, orig_im_size), iou, low

    def _sparse(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Embed points and corners :math:`(P, N, C)`; where no point is, its place does not count."""
        # Points are whole pixels, whose centers are half a pixel on.
        places = self.prompt_encoder.pe_layer.forward_with_coords(coords + 0.5, self.img_size)
        labels = labels.unsqueeze(-1)
        is_kind = labels == torch.arange(len(self.kinds), device=labels.device) + _LABELS["none"]
        return places * (labels != _LABELS["none"]) + is_kind.to(places.dtype) @ self.kinds

    def _dense(self, masks: Tensor, given: Tensor) -> Tensor:
        """Embed masks :math:`(P, C, h/16, w/16)`, or that there is none."""
        none = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        return torch.where(given.view(-1, 1, 1, 1) > 0, self.prompt_encoder.mask_downscaling(masks), none)

    def _restore(self, low: Tensor, orig_im_size: Tensor) -> Tensor:
        """Do what :meth:`Geometry.restore` does, for a size that is known when the graph runs."""
        exact = orig_im_size.to(torch.float64)  # as Python's numbers, so that sides are rounded as Geometry.fit does
        scale = (self.img_sides / exact).min()
        used = (exact * scale + 0.5).floor().clamp(min=1).long().tolist()
        full = orig_im_size.long().tolist()
        for side, limit in zip(used, self.img_size, strict=True):
            torch._check(side <= limit)
        for side in (*used, *full):
            torch._check(side >= 1)
        padded = F.interpolate(low, self.img_size, mode="bilinear", align_corners=False)
        return F.interpolate(padded[:, :, : used[0], : used[1]], full, mode="bilinear", align_corners=False)


def _encoder(sam: MobileSAM, opset: int) -> onnx.ModelProto:
    height, width = sam.img_size
    photo = torch.zeros(1, 3, height - 1, width - 2, dtype=torch.uint8)  # open sizes must differ, see trace
    program = trace(_EncoderGraph(sam), {"images": photo}, {"images": (2, 3)})
    return to_onnx(program, opset, outputs=["image_embeddings"])


def _decoder(sam: MobileSAM, opset: int) -> onnx.ModelProto:
    inputs = _draw_prompts(sam, prompts=2, points=3, size=(150, 200))
    open_dims = {"point_coords": (0, 1), "point_labels": (0, 1), "mask_input": (0,), "has_mask_input": (0,)}
    return to_onnx(trace(_DecoderGraph(sam), inputs, open_dims), opset, list(inputs), _OUTPUTS)


def _describe_encoder(sam: MobileSAM) -> dict[str, str]:
    told = {
        "pixels": "uint8",
        "range": [0, 255],
        "mean": PIXEL_MEAN,
        "std": PIXEL_STD,
        "normalization_inside": True,
        "padding_inside": True,
        "img_size": sam.img_size,
        "resize_inside": False,
    }
    return describe(sam.config, part="encoder", input=told)


def _describe_decoder(sam: MobileSAM) -> dict[str, str]:
    told = {"img_size": sam.img_size, "point_labels": _LABELS}
    return describe(sam.config, part="decoder", input=told, mask_threshold=sam.mask_threshold)


def _draw_prompts(
    sam: MobileSAM, prompts: int, points: int, size: tuple[int, int], boxes: bool = False, mask: int = -1
) -> dict[str, Tensor]:
    """Return inputs of the exported decoder: prompts of so many points, with a box each or without.

    Args:
        sam: the network.
        prompts: number of prompts.
        points: number of points of each.
        size: height and width of the photo.
        boxes: add boxes.
        mask: which of the prompts has a mask.
    """
    generator = torch.Generator().manual_seed(prompts)
    height, width = Geometry.fit(size, sam.img_size).input_size
    places = torch.rand(prompts, points + 2, 2, generator=generator) * torch.tensor([width, height])
    labels = torch.arange(prompts * points).view(prompts, points).add(1).remainder(2)
    if boxes:
        last, kinds = places[:, points:].sort(1).values, [_LABELS["top_left"], _LABELS["bottom_right"]]
    else:  # kornia's prompt encoder adds the point that is none itself
        last, kinds = torch.zeros(prompts, 1, 2), [_LABELS["none"]]
    return {
        "image_embeddings": torch.randn(
            1, sam.mask_decoder.transformer_dim, *sam.prompt_encoder.image_embedding_size, generator=generator
        ),
        "point_coords": torch.cat([places[:, :points], last], 1),
        "point_labels": torch.cat([labels, torch.tensor(kinds).expand(prompts, -1)], 1).float(),
        "mask_input": 4 * torch.randn(prompts, 1, *sam.prompt_encoder.mask_input_size, generator=generator),
        "has_mask_input": (torch.arange(prompts) == mask).float(),
        "orig_im_size": torch.tensor(size).float(),
    }


def _expect(sam: MobileSAM, features: Tensor, *prompts: Tensor) -> list[Tensor]:
    """Return the logits and scores of kornia's modules, asked one of the decoder's prompts after the other."""
    found = []
    for places, kinds, mask, has_mask in zip(*prompts, strict=True):
        on_or_off, corners = (kinds == 0) | (kinds == 1), kinds >= _LABELS["top_left"]
        sparse, dense = sam.prompt_encoder(
            points=(places[None, on_or_off], kinds[None, on_or_off]),
            boxes=places[corners].view(1, 4) if corners.any() else None,
            masks=mask[None] if has_mask else None,
        )
        found.append(sam.mask_decoder.predict_masks(features, sam.prompt_encoder.get_dense_pe(), sparse, dense))
    return [torch.cat(each) for each in zip(*found, strict=True)]


def _check_encoder(sam: MobileSAM, run: Run, tolerance: float) -> None:
    """Compare an upright and a wide photo, one of which does without padding if the input is square."""
    height, width = sam.img_size
    for size in ((height, width), (height, width // 2 + 1), (height // 3, width)):
        pattern = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(size[1]))
        photo = F.interpolate(pattern, size, mode="bilinear").mul(255).round()
        inputs = normalize(photo / 255, torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD))
        want = sam.image_encoder(F.pad(inputs, (0, width - size[1], 0, height - size[0])))
        (have,) = run({"images": photo.to(torch.uint8)})
        check_difference("image_embeddings", want, have, tolerance)


def _check_decoder(sam: MobileSAM, run: Run, tolerance: float) -> None:
    for inputs in (
        _draw_prompts(sam, prompts=1, points=1, size=(240, 135)),
        _draw_prompts(sam, prompts=3, points=2, size=(101, 333), boxes=True, mask=1),
    ):
        features, *prompts, size = inputs.values()
        low, iou = _expect(sam, features, *prompts)
        height, width = size.int().tolist()
        expected = [Geometry.fit((height, width), sam.img_size).restore(low), iou, low]
        for name, want, have in zip(_OUTPUTS, expected, run(inputs), strict=True):
            check_difference(name, want, have, tolerance)
