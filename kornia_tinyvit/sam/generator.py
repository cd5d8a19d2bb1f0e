"""Automatic mask generation: masks from a grid of point prompts, filtered and deduplicated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kornia_tinyvit import ops
from kornia_tinyvit.images import Images, is_single, list_images, open_image
from kornia_tinyvit.modules import evaluation_copy
from kornia_tinyvit.sam.decoder import CHUNK, CPU_CHUNK, UPSCALING, FoldedMaskDecoder
from kornia_tinyvit.sam.embedding import Geometry, ImageEmbedding

__all__ = ["OUTPUT_MODES", "Mask", "MaskGenerator"]

#: Output modes, and the function from a run-length code to ``Mask.segmentation`` of each.
OUTPUT_MODES: dict[str, Callable[[ops.RLE], Any]] = {
    "binary_mask": ops.decode_rle,
    "uncompressed_rle": ops.uncompress_rle,
    "coco_rle": ops.compress_rle,
}

_LIMIT = 2**53  # floats represent every integer below
_NO_NUMBERS = ("point_grids", "output_mode", "dtype", "grids")
EDGE = 20  # pixels from a crop's edge within which a mask counts as cut off, as in segment-anything
PIXELS = 1 << 21  # upsampled at a time: 8 MiB of logits
LOGITS = 1 << 30  # bytes of logits kept per crop, enough for 1,024 points; further candidates are encoded at once

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask of :meth:`MobileSAM.generate_masks`; lengths in pixels of the image.

    Args:
        segmentation: the mask: boolean :math:`(H, W)`, or its :class:`~kornia_tinyvit.ops.rle.RLE`.
        area: number of pixels.
        bbox: left, top, width and height of the bounding box. As in segment-anything, width and height are differences
            of pixel indices, one less than the pixels covered.
        predicted_iou: IoU with the object, predicted by the network.
        stability_score: IoU of the masks at a higher and a lower threshold.
        point_coords: the point prompt, ``[[x, y]]``.
        crop_box: left, top, width and height of the crop.
    """

    segmentation: NDArray[np.bool_] | ops.RLE
    area: int
    bbox: list[int]
    predicted_iou: float
    stability_score: float
    point_coords: list[list[float]]
    crop_box: list[int]


@dataclass
class _Candidate:
    """A mask before non-maximum suppression; box and point in pixels of the crop, later of the image."""

    mask: Any  # logits (r, c), or compressed RLE: as a list the runs of a ragged mask take 20 times the memory
    box: list[int]
    iou: float
    stability: float
    point: list[float]
    crop: Box


@dataclass(eq=False)
class MaskGenerator:
    """Settings of automatic mask generation; call it, or :meth:`MobileSAM.generate_masks`, with an image.

    Names, order and defaults are those of segment-anything's ``SamAutomaticMaskGenerator``, which has no ``max_area``,
    ``dtype`` and ``batch_size``. Masks are filtered by predicted IoU, stability score, area and the edges of crops,
    then deduplicated by non-maximum suppression of their boxes.

    Args:
        points_per_side: points of the grid along each side of the image; ``None`` with ``point_grids``.
        points_per_batch: maximum number of points decoded together. A CPU decodes at most 8, which is fastest.
        pred_iou_thresh: keep masks with a larger predicted IoU; 0 keeps all.
        stability_score_thresh: keep masks with at least this stability score; 0 keeps all.
        stability_score_offset: the stability score is the IoU of the masks at the threshold plus and minus this.
        box_nms_thresh: IoU threshold of non-maximum suppression within a crop.
        crop_n_layers: layers of crops to segment in addition to the image, :math:`4^i` crops in layer :math:`i`.
        crop_nms_thresh: IoU threshold of non-maximum suppression between crops; masks of smaller crops are preferred.
        crop_overlap_ratio: overlap of the crops of the first layer as a fraction of the image's shorter side, halved
            from layer to layer.
        crop_n_points_downscale_factor: ``points_per_side`` is divided by this from layer to layer.
        point_grids: points :math:`(G, 2)` for each layer from 0, x and y in [0, 1], instead of ``points_per_side``.
        min_mask_region_area: fill holes and remove islands of fewer pixels, then suppress duplicates again.
        output_mode: form of ``segmentation``. ``"binary_mask"``: an array with a byte per pixel, 8 MB for an image of
            3840x2160; ``"coco_rle"``: compressed run lengths, some kilobytes; ``"uncompressed_rle"``: a list of run
            lengths, some tens of kilobytes.
        max_area: keep masks of at most this fraction of the image's area. A lower value such as 0.5 removes masks of
            the background, as of microscopy images, before they can suppress others; 1 keeps all.
        dtype: dtype of the decoder's image side. ``torch.bfloat16`` is faster on hardware that supports it; masks near
            a threshold may change.
        batch_size: images encoded together.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a setting is not a number where one is expected.
    """

    points_per_side: int | None = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: Sequence[NDArray[np.float64] | Tensor] | None = None
    min_mask_region_area: int = 0
    output_mode: Literal["binary_mask", "uncompressed_rle", "coco_rle"] = "binary_mask"
    max_area: float = 1.0
    dtype: torch.dtype | None = None
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}; got {self.output_mode!r}.")
        fields = {name: value for name, value in vars(self).items() if name not in _NO_NUMBERS and value is not None}
        if wrong := [f"{name}={value!r}" for name, value in fields.items() if not isinstance(value, Real)]:
            raise TypeError(f"Settings must be numbers; got {', '.join(wrong)}.")
        numbers: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Real)}
        invalid = [f"{name}={number}" for name, number in numbers.items() if not abs(number) < _LIMIT]  # also NaN
        if invalid:
            raise ValueError(f"Settings must be finite numbers below 2**53; got {', '.join(invalid)}.")
        if min(self.points_per_batch, self.batch_size) < 1 or self.crop_n_layers < 0:
            raise ValueError(
                "points_per_batch and batch_size must be at least 1, crop_n_layers at least 0; "
                f"got {self.points_per_batch}, {self.batch_size} and {self.crop_n_layers}."
            )
        if not 0 < self.max_area <= 1:
            raise ValueError(f"max_area is a fraction of the image, above 0 and at most 1; got {self.max_area}.")
        factor = self.crop_n_points_downscale_factor
        if factor <= 0:
            raise ValueError(f"crop_n_points_downscale_factor must be positive; got {factor}.")
        self.grids = self._build_grids()

    def _build_grids(self) -> list[Tensor]:
        """Return the points of each layer, :math:`(G, 2)` in [0, 1]."""
        side, factor, layers = self.points_per_side, self.crop_n_points_downscale_factor, self.crop_n_layers + 1
        if (side is None) == (self.point_grids is None):
            raise ValueError("Pass either points_per_side or point_grids, and None for the other.")
        if side is not None:
            sides = [int(side / factor**layer) for layer in range(layers)]
            if min(sides) < 1:
                raise ValueError(
                    f"points_per_side={side} divided by {factor} from layer to layer leaves no points: {sides}."
                )
            return [_grid(points) for points in sides]
        grids = [torch.as_tensor(grid).to("cpu", torch.float64) for grid in self.point_grids or ()]
        if len(grids) < layers or any(grid.ndim != 2 or grid.shape[1] != 2 or not len(grid) for grid in grids):
            raise ValueError(f"point_grids must be {layers} arrays (G, 2); got {[tuple(g.shape) for g in grids]}.")
        return grids

    @torch.no_grad()
    def __call__(self, sam: Any, image: Images | ImageEmbedding) -> list[Mask] | list[list[Mask]]:
        """Generate the masks of an image, several images, or an embedding.

        Args:
            sam: the :class:`MobileSAM`.
            image: as in :meth:`MobileSAM.generate_masks`, which lists what it returns and raises.
        """
        sam = evaluation_copy(sam)
        decoder = FoldedMaskDecoder(sam.mask_decoder, self.dtype)
        if isinstance(image, ImageEmbedding):
            if self.crop_n_layers:
                raise ValueError(
                    f"crop_n_layers={self.crop_n_layers} needs the pixels of the image, which an embedding does not "
                    "contain: pass the image, or crop_n_layers=0."
                )
            sam.check_embedding(image)
            first = next(decoder.parameters())
            return [self._run(sam, decoder, None, whole.to(first.device, first.dtype)) for whole in image]
        images = list_images(image)
        results = []
        for start in range(0, len(images), self.batch_size):
            pixels = [open_image(each) for each in images[start : start + self.batch_size]]
            for each, whole in zip(pixels, sam.embed(pixels, len(pixels)), strict=True):
                results.append(self._run(sam, decoder, each, whole))
        return results[0] if is_single(image) else results

    def _run(self, sam: Any, decoder: FoldedMaskDecoder, pixels: Tensor | None, whole: ImageEmbedding) -> list[Mask]:
        """Return the masks of an image; the pixels are needed only for crops."""
        size = whole.geometries[0].original_size
        crops = _crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        candidates = []
        for box, layer in crops:
            embedding = whole
            if pixels is not None and layer:
                left, top, right, bottom = box
                embedding = sam.embed(pixels[:, top:bottom, left:right])
            candidates += _Crop(sam, decoder, self, embedding, box, size).generate(self.grids[layer])
        if len(crops) > 1:
            areas = [math.prod(_to_xywh(each.crop)[2:]) for each in candidates]
            candidates = _suppress(candidates, [1 / area for area in areas], self.crop_nms_thresh)
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            candidates = _clean(candidates, self.min_mask_region_area, threshold)
        return [
            Mask(
                segmentation=OUTPUT_MODES[self.output_mode](each.mask),
                area=ops.rle_area(each.mask),
                bbox=_to_xywh(each.box),
                predicted_iou=each.iou,
                stability_score=each.stability,
                point_coords=[each.point],
                crop_box=_to_xywh(each.crop),
            )
            for each in candidates
        ]


@dataclass(eq=False)
class _Crop:
    """A crop of an image with its embedding; the mapping of its masks to the image."""

    sam: Any
    decoder: FoldedMaskDecoder
    settings: MaskGenerator
    embedding: ImageEmbedding
    box: Box
    size: tuple[int, int]

    def __post_init__(self) -> None:
        self.geometry, features = self.embedding.geometries[0], self.embedding.features
        _, dense = self.sam.prompt_encoder(points=None, boxes=None, masks=None)
        self.image = self.decoder.prepare(features, self.sam.prompt_encoder.get_dense_pe(), dense)
        low_size = (UPSCALING * features.shape[2], UPSCALING * features.shape[3])
        self.upsample = _Upsample(self.geometry, low_size, features.device)

    def generate(self, grid: Tensor) -> list[_Candidate]:
        """Return the masks of a grid of points :math:`(G, 2)` in [0, 1] after suppression, encoded in the image."""
        left, top, right, bottom = self.box
        points = grid * grid.new_tensor([right - left, bottom - top])
        # Logits are copied into one block of memory. Small tensors between the large temporary ones would fragment an
        # allocator that returns memory late, and the process would grow by several times their size.
        rows, columns = (UPSCALING * cells for cells in self.upsample.cells)
        count = min((self.decoder.decoder.num_mask_tokens - 1) * len(points), LOGITS // (4 * rows * columns))
        slots = iter(torch.empty(count, rows, columns, device=self.upsample.rows.device))
        candidates = [each for batch in self._predict(points) for each in self._filter(*batch, slots)]
        candidates = _suppress(candidates, [each.iou for each in candidates], self.settings.box_nms_thresh)
        for each in candidates:
            each.mask = self._encode(each.mask)
            each.box = [side + offset for side, offset in zip(each.box, (left, top, left, top), strict=True)]
            each.point = [each.point[0] + left, each.point[1] + top]
        return candidates

    def _predict(self, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield low-resolution logits :math:`(K, r, c)`, predicted IoU and point of masks above ``pred_iou_thresh``."""
        device, threshold = self.image.tokens.device, self.settings.pred_iou_thresh
        size = min(self.settings.points_per_batch, CPU_CHUNK if device.type == "cpu" else CHUNK)
        for batch in points.split(size):
            mapped = self.geometry.map_points(batch)[:, None].to(device, torch.float32)
            labels = torch.ones(mapped.shape[:2], device=device)
            sparse, _ = self.sam.prompt_encoder(points=(mapped, labels), boxes=None, masks=None)
            prompted = self.decoder.prompt(self.image, sparse)
            iou = prompted.iou[:, 1:]  # the first mask is that of multimask_output=False
            passing = iou > threshold if threshold > 0 else torch.ones_like(iou).bool()
            (prompts,) = passing.any(1).nonzero(as_tuple=True)
            logits = self.decoder.upscale(prompted, prompts.tolist(), self.upsample.cells)[:, 1:]
            yield logits[passing[prompts]], iou[passing], batch[passing.nonzero()[:, 0].cpu()]

    def _filter(self, logits: Tensor, iou: Tensor, points: Tensor, slots: Iterator[Tensor]) -> Iterator[_Candidate]:
        """Yield stable masks that are not cut off, as logits while there are slots, then encoded."""
        step = max(1, PIXELS // (self.upsample.rows.shape[0] * self.upsample.columns.shape[1]))
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            upsampled = self.upsample(logits[rows])
            inside = upsampled > self.sam.mask_threshold
            stability = _stability(upsampled, self.sam.mask_threshold, self.settings.stability_score_offset)
            boxes = _boxes(inside)
            keep = ~_near_crop_edge(boxes, self.box, self.size)
            if self.settings.stability_score_thresh > 0:  # the score of an empty mask is NaN and passes no threshold
                keep &= stability >= self.settings.stability_score_thresh
            if self.settings.max_area < 1:
                keep &= inside.sum((1, 2)) <= self.settings.max_area * math.prod(self.size)
            values = zip(boxes.tolist(), iou[rows].tolist(), stability.tolist(), points[rows].tolist(), strict=True)
            for index, fields in itertools.compress(enumerate(values), keep.tolist()):
                slot = next(slots, None)
                mask = self._compress(inside[index]) if slot is None else slot.copy_(logits[start + index])
                yield _Candidate(mask, *fields, self.box)

    def _encode(self, mask: Tensor | ops.RLE) -> ops.RLE:
        if not isinstance(mask, Tensor):
            return mask
        return self._compress(self.upsample(mask[None])[0] > self.sam.mask_threshold)

    def _compress(self, mask: Tensor) -> ops.RLE:
        """Encode a mask of the crop as a mask of the image."""
        left, top, right, bottom = self.box
        height, width = self.size
        return ops.encode_rle(F.pad(mask, (left, width - right, top, height - bottom)), compressed=True)


def _grid(side: int) -> Tensor:
    """Return the centers of a grid of cells in row-major order, :math:`(side^2, 2)`."""
    centers = torch.from_numpy(np.linspace(1 / (2 * side), 1 - 1 / (2 * side), side))
    return torch.stack([centers.repeat(side), centers.repeat_interleave(side)], 1)


def _crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[Box, int]]:
    """Return crops with their layers: the whole image, then grids of overlapping crops in column-major order."""
    height, width = size
    crops: list[tuple[Box, int]] = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        side = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / side))
        wide, high = (math.ceil((overlap * (side - 1) + length) / side) for length in (width, height))
        for column, row in itertools.product(range(side), repeat=2):
            left, top = column * (wide - overlap), row * (high - overlap)
            box = (left, top, min(left + wide, width), min(top + high, height))
            if box[0] < box[2] and box[1] < box[3]:  # not empty, as in an image of few pixels
                crops.append((box, layer))
    return crops


class _Upsample:
    """Upsample low-resolution logits to the image in one matrix product per axis.

    segment-anything resizes to the model input, crops the padding and resizes to the image. Both steps are linear in
    each axis; their product is the bilinear interpolation of the unit vectors.

    Args:
        geometry: placement of the image in the model input.
        low_size: height and width of the logits.
        device: their device.
    """

    def __init__(self, geometry: Geometry, low_size: tuple[int, int], device: torch.device) -> None:
        sides = zip(low_size, geometry.img_size, geometry.input_size, geometry.original_size, strict=True)
        rows, columns = (_interpolation(*side, device) for side in sides)
        self.rows, self.columns = rows.mT.contiguous(), columns

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the embedding that affect the masks within the image."""
        return math.ceil(self.rows.shape[1] / UPSCALING), math.ceil(self.columns.shape[0] / UPSCALING)

    def __call__(self, logits: Tensor) -> Tensor:
        """Map the logits :math:`(K, r, c)` of those cells to :math:`(K, H, W)`."""
        used = logits[:, : self.rows.shape[1], : self.columns.shape[0]].float()
        return torch.bmm(self.rows.expand(len(logits), -1, -1), used @ self.columns)


def _interpolation(low: int, padded: int, used: int, full: int, device: torch.device) -> Tensor:
    """Return the weights :math:`(r, full)` of the first :math:`r` values; the others do not affect the result."""
    weights = F.interpolate(torch.eye(low, device=device)[None], padded, mode="linear", align_corners=False)
    weights = F.interpolate(weights[..., :used], full, mode="linear", align_corners=False)[0]
    return weights[: int(weights.any(1).nonzero().max()) + 1]


def _stability(logits: Tensor, threshold: float, offset: float) -> Tensor:
    inner, outer = ((logits > threshold + shift).sum((1, 2), dtype=torch.int32) for shift in (offset, -offset))
    return inner / outer


def _boxes(masks: Tensor) -> Tensor:
    """Return the first and last columns and rows of masks :math:`(K, H, W)`, :math:`(K, 4)`; zeros for empty masks."""
    edges = ops.mask_boxes(masks).long()
    return (edges - edges.new_tensor([0, 0, 1, 1])).clamp(min=0)


def _near_crop_edge(boxes: Tensor, crop: Box, size: tuple[int, int]) -> Tensor:
    """Return which boxes, in pixels of the crop, end at an edge of the crop that is not an edge of the image."""
    shifted = boxes + boxes.new_tensor(crop[:2] * 2)
    near_crop = (shifted - boxes.new_tensor(crop)).abs() <= EDGE
    near_image = (shifted - boxes.new_tensor((0, 0, size[1], size[0]))).abs() <= EDGE
    return (near_crop & ~near_image).any(1)


def _suppress(candidates: list[_Candidate], scores: list[float], threshold: float) -> list[_Candidate]:
    boxes = torch.tensor([each.box for each in candidates]).view(-1, 4)
    return [candidates[index] for index in ops.nms(boxes, torch.tensor(scores), threshold).tolist()]


def _clean(candidates: list[_Candidate], min_area: int, threshold: float) -> list[_Candidate]:
    """Remove small regions and holes, then duplicates; unchanged masks are preferred."""
    scores = []
    for each in candidates:
        mask, filled = ops.remove_small_regions(ops.decode_rle(each.mask), min_area, "holes")
        mask, removed = ops.remove_small_regions(mask, min_area, "islands")
        changed = filled or removed
        if changed:
            each.mask = ops.encode_rle(mask, compressed=True)
            each.box = _boxes(torch.from_numpy(mask)[None])[0].tolist()
        scores.append(float(not changed))
    return _suppress(candidates, scores, threshold)


def _to_xywh(box: Sequence[int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
