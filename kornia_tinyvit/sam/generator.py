"""Segment everything: the masks of a grid of points, filtered, each object once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kornia_tinyvit.ops import (
    RLE,
    compress_rle,
    decode_rle,
    encode_rle,
    mask_boxes,
    nms,
    remove_small_regions,
    rle_area,
    uncompress_rle,
)
from kornia_tinyvit.sam.decoder import CHUNK, CPU_CHUNK, UPSCALING, FoldedMaskDecoder
from kornia_tinyvit.sam.embedding import Geometry, ImageEmbedding
from kornia_tinyvit.sam.transforms import ImageLike, list_images, open_image

__all__ = ["OUTPUT_MODES", "Mask", "MaskGenerator"]

#: How masks may be returned, and what makes them so.
OUTPUT_MODES: dict[str, Callable[[RLE], Any]] = {
    "binary_mask": decode_rle,
    "uncompressed_rle": uncompress_rle,
    "coco_rle": compress_rle,
}

_MOST = 2**53  # whole numbers up to which floats tell apart
EDGE = 20  # pixels from a crop's edge within which a mask counts as cut off
PIXELS = 1 << 21  # enlarged at a time: 8 MiB of logits
LOGITS = 1 << 30  # bytes of a crop's candidates kept as logits, enough for 1,024 points; those beyond are encoded

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class Mask:
    """An object that :func:`generate_masks` found; lengths in pixels of the photo.

    Args:
        segmentation: the mask: boolean :math:`(H, W)`, or its :class:`~kornia_tinyvit.ops.rle.RLE`.
        area: its pixels.
        bbox: left, top, width and height of the box around it. As in segment-anything the last two are differences
            of pixel indices, one less than the pixels the mask spans.
        predicted_iou: the network's guess of its quality.
        stability_score: IoU of the masks at thresholds above and below.
        point_coords: the point that found it, in a list: ``[[x, y]]``.
        crop_box: left, top, width and height of the crop it was found in.
    """

    segmentation: NDArray[np.bool_] | RLE
    area: int
    bbox: list[int]
    predicted_iou: float
    stability_score: float
    point_coords: list[list[float]]
    crop_box: list[int]


@dataclass(frozen=True)
class _Masks:
    """Masks and what is known about them; all but logits on the CPU."""

    masks: list[Any]  # logits (r, c), or compressed codes: as lists the runs of a ragged mask take 20 times the memory
    boxes: Tensor  # (K, 4)
    iou: Tensor  # (K,)
    stability: Tensor  # (K,)
    points: Tensor  # (K, 2)
    crops: Tensor  # (K, 4)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.boxes, self.iou, self.stability, self.points, self.crops

    def select(self, indices: Tensor) -> _Masks:
        masks = [self.masks[index] for index in indices.tolist()]
        return _Masks(masks, *(each[indices] for each in self._tensors()))

    @classmethod
    def join(cls, parts: Sequence[_Masks]) -> _Masks:
        columns = zip(*(part._tensors() for part in parts), strict=True)
        return cls([each for part in parts for each in part.masks], *map(torch.cat, columns))


@dataclass(eq=False)
class MaskGenerator:
    """Settings of the search for everything in an image; a call searches, see :meth:`MobileSAM.generate_masks`.

    Names, order and defaults are those of segment-anything's ``SamAutomaticMaskGenerator``. A point's masks must pass
    the network's own judgement, be stable against the threshold, and not be cut off by the edge of a crop; of masks
    whose boxes overlap, the best stays.

    Args:
        points_per_side: points of the grid along a side of the photo; ``None`` with ``point_grids``.
        points_per_batch: the most points decoded together. On a CPU 8 are best, and taken if it allows.
        pred_iou_thresh: keep masks whose predicted IoU is above it; 0 keeps all.
        stability_score_thresh: keep masks whose stability is at least this; 0 keeps all.
        stability_score_offset: the stability is the IoU of the masks at the threshold plus and minus this.
        box_nms_thresh: of masks of a crop whose boxes have a larger IoU, only the best is kept.
        crop_n_layers: also segment enlarged crops, :math:`4^i` in layer :math:`i`.
        crop_nms_thresh: as ``box_nms_thresh``, among the masks of all crops; those of smaller crops are preferred.
        crop_overlap_ratio: overlap of the crops of the first layer as a share of the photo's short side; it is halved
            from layer to layer.
        crop_n_points_downscale_factor: ``points_per_side`` is divided by this from layer to layer.
        point_grids: for each layer from 0 on, points :math:`(G, 2)`, x and y in [0, 1], instead of
            ``points_per_side``.
        min_mask_region_area: fill holes and drop islands of fewer pixels, then suppress duplicates again.
        output_mode: what ``segmentation`` is. ``"binary_mask"``: an array, a byte a pixel, so 8 MB each for a photo of
            3840x2160; ``"coco_rle"``: runs as text, some kilobytes; ``"uncompressed_rle"``: runs as a list, some tens
            of kilobytes.
        dtype: precision of the decoder's work on the image. ``torch.bfloat16`` is faster on hardware that has it;
            masks near a threshold may come or go, and borders move.
        batch_size: photos that the encoder sees at a time.

    Raises:
        ValueError: if a setting is out of its range.
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
    dtype: torch.dtype | None = None
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}; got {self.output_mode!r}.")
        others = ("point_grids", "output_mode", "dtype")
        numbers = {name: value or 0 for name, value in vars(self).items() if name not in others}
        broken = [f"{name}={number}" for name, number in numbers.items() if not abs(number) < _MOST]  # nor NaN
        if broken:
            raise ValueError(f"Settings are finite numbers below 2**53; got {', '.join(broken)}.")
        if min(self.points_per_batch, self.batch_size) < 1 or self.crop_n_layers < 0:
            raise ValueError(
                "points_per_batch and batch_size must be at least 1, crop_n_layers at least 0; "
                f"got {self.points_per_batch}, {self.batch_size} and {self.crop_n_layers}."
            )
        factor = self.crop_n_points_downscale_factor
        if factor <= 0:
            raise ValueError(f"crop_n_points_downscale_factor must be positive; got {factor}.")
        self.grids = self._lay_grids()

    def _lay_grids(self) -> list[Tensor]:
        """Return the points of each layer, :math:`(G, 2)` in [0, 1]."""
        side, factor, layers = self.points_per_side, self.crop_n_points_downscale_factor, self.crop_n_layers + 1
        if (side is None) == (self.point_grids is None):
            raise ValueError("Give either points_per_side or point_grids, and None for the other.")
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
    def __call__(
        self, sam: Any, image: ImageLike | Sequence[ImageLike] | ImageEmbedding
    ) -> list[Mask] | list[list[Mask]]:
        """Search an image, several, or an embedding; see :meth:`MobileSAM.generate_masks`, which calls this.

        Args:
            sam: the :class:`MobileSAM`.
            image: as there.
        """
        decoder = FoldedMaskDecoder(sam.mask_decoder, self.dtype)
        if isinstance(image, ImageEmbedding):
            if self.crop_n_layers:
                raise ValueError(
                    f"crop_n_layers={self.crop_n_layers} looks at parts of the photo, enlarged, and an embedding "
                    "holds no pixels: pass the photo, or crop_n_layers=0."
                )
            sam.check_embedding(image)
            first = next(decoder.parameters())
            return [self._search(sam, decoder, None, whole.to(first.device, first.dtype)) for whole in image]
        photos = list_images(image)
        found = []
        for start in range(0, len(photos), self.batch_size):
            pixels = [open_image(photo) for photo in photos[start : start + self.batch_size]]
            for each, whole in zip(pixels, sam.embed_pixels(pixels), strict=True):
                found.append(self._search(sam, decoder, each, whole))
        return found[0] if len(photos) == 1 and photos[0] is image else found

    def _search(self, sam: Any, decoder: FoldedMaskDecoder, pixels: Tensor | None, whole: ImageEmbedding) -> list[Mask]:
        """Return the masks of an image, whose pixels are needed for crops alone."""
        size = whole.geometries[0].original_size
        parts = []
        for box, layer in _crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio):
            embedding = whole
            if pixels is not None and layer:
                left, top, right, bottom = box
                embedding = sam.embed_pixels([pixels[:, top:bottom, left:right]])
            parts.append(_Crop(sam, decoder, self, embedding, box, size).search(self.grids[layer]))
        found = _Masks.join(parts)
        if len(parts) > 1:
            sides = found.crops[:, 2:] - found.crops[:, :2]
            found = found.select(nms(found.boxes, 1 / sides.prod(1), self.crop_nms_thresh))
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            found = _without_small_regions(found, self.min_mask_region_area, threshold)
        return [_record(found, index, self.output_mode) for index in range(len(found.masks))]


class _Crop:
    """A part of an image, searched on its own; its embedding, and the way of its masks back into the image."""

    def __init__(
        self,
        sam: Any,
        decoder: FoldedMaskDecoder,
        settings: MaskGenerator,
        embedding: ImageEmbedding,
        box: Box,
        size: tuple[int, int],
    ) -> None:
        self.encoder, self.decoder, self.settings = sam.prompt_encoder, decoder, settings
        self.threshold, self.box, self.size = sam.mask_threshold, box, size
        self.geometry, features = embedding.geometries[0], embedding.features
        _, dense = self.encoder(points=None, boxes=None, masks=None)
        self.image = decoder.prepare(features, self.encoder.get_dense_pe(), dense)
        low_size = (UPSCALING * features.shape[2], UPSCALING * features.shape[3])
        self.enlarge = _Enlargement(self.geometry, low_size, features.device)

    def search(self, grid: Tensor) -> _Masks:
        """Return the masks of the points of a grid :math:`(G, 2)` in [0, 1], each object once, in the image."""
        left, top, right, bottom = self.box
        points = grid * grid.new_tensor([right - left, bottom - top])
        masks = (self.decoder.decoder.num_mask_tokens - 1) * len(points)
        slots = _slots(self.enlarge, masks)
        found = _Masks.join([self._filter(*proposed, slots) for proposed in self._propose(points)])
        found = found.select(nms(found.boxes, found.iou, self.settings.box_nms_thresh))
        offset = torch.tensor([left, top])
        return dataclasses.replace(
            found,
            masks=[_encode(mask, self.enlarge, self.box, self.size, self.threshold) for mask in found.masks],
            boxes=found.boxes + offset.repeat(2),
            points=found.points + offset,
        )

    def _propose(self, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield logits :math:`(K, r, c)`, predicted IoU and point of the masks whose predicted IoU passes."""
        device, least = self.image.tokens.device, self.settings.pred_iou_thresh
        size = min(self.settings.points_per_batch, CPU_CHUNK if device.type == "cpu" else CHUNK)
        for batch in points.split(size):
            placed = self.geometry.map_points(batch)[:, None].to(device, torch.float32)
            labels = torch.ones(placed.shape[:2], device=device)
            sparse, _ = self.encoder(points=(placed, labels), boxes=None, masks=None)
            prompted = self.decoder.prompt(self.image, sparse)
            iou = prompted.iou[:, 1:]  # the first mask is for prompts that are not ambiguous
            passing = iou > least if least > 0 else torch.ones_like(iou).bool()
            (prompts,) = passing.any(1).nonzero(as_tuple=True)
            logits = self.decoder.upscale(prompted, prompts.tolist(), self.enlarge.cells)[:, 1:]
            yield logits[passing[prompts]], iou[passing], batch[passing.nonzero()[:, 0].cpu()]

    def _filter(self, logits: Tensor, iou: Tensor, points: Tensor, slots: Iterator[Tensor]) -> _Masks:
        """Keep masks that are stable and not cut off, enlarging a few at a time; as logits, or encoded without room."""
        s, parts = self.settings, []
        step = max(1, PIXELS // (self.enlarge.rows.shape[0] * self.enlarge.columns.shape[1]))
        for start in range(0, max(1, len(logits)), step):
            rows = slice(start, start + step)
            large = self.enlarge(logits[rows])
            inside = large > self.threshold
            stability = _stability(large, self.threshold, s.stability_score_offset)
            boxes = _boxes(inside)
            keep = ~_near_crop_edge(boxes, self.box, self.size)
            if s.stability_score_thresh > 0:  # a mask without a pixel has no stability, and passes no threshold
                keep &= stability >= s.stability_score_thresh
            masks: list[Tensor | RLE] = []
            for index in keep.nonzero()[:, 0].tolist():
                if (slot := next(slots, None)) is not None:
                    masks.append(slot.copy_(logits[start + index]))
                else:
                    masks.append(_compress(inside[index], self.box, self.size))
            crops = torch.tensor(self.box).expand(len(masks), 4)
            kept = (boxes[keep], iou[rows][keep], stability[keep], points[rows][keep.cpu()], crops)
            parts.append(_Masks(masks, *(each.cpu() for each in kept)))
        return _Masks.join(parts)


def _grid(side: int) -> Tensor:
    """Return the centers of a square's cells, row after row, :math:`(side^2, 2)`."""
    centers = torch.from_numpy(np.linspace(1 / (2 * side), 1 - 1 / (2 * side), side))
    return torch.stack([centers.repeat(side), centers.repeat_interleave(side)], 1)


def _crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[Box, int]]:
    """Return the crops with their layers: the whole photo, then grids of overlapping crops, column after column."""
    height, width = size
    crops: list[tuple[Box, int]] = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        side = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / side))
        wide, high = (math.ceil((overlap * (side - 1) + length) / side) for length in (width, height))
        for column, row in itertools.product(range(side), repeat=2):
            left, top = column * (wide - overlap), row * (high - overlap)
            box = (left, top, min(left + wide, width), min(top + high, height))
            if box[0] < box[2] and box[1] < box[3]:  # a photo of few pixels has no more to give
                crops.append((box, layer))
    return crops


class _Enlargement:
    """Enlarge low-resolution logits to the photo, as segment-anything does: to the input, and what is not padding on.

    Both steps are linear along each side and together a matrix; bilinear interpolation of the unit vectors gives it.

    Args:
        geometry: how the photo lies in the input.
        low_size: height and width of the logits.
        device: where they are.
    """

    def __init__(self, geometry: Geometry, low_size: tuple[int, int], device: torch.device) -> None:
        sides = zip(low_size, geometry.img_size, geometry.input_size, geometry.original_size, strict=True)
        rows, columns = (_interpolation(*side, device) for side in sides)
        self.rows, self.columns = rows.mT.contiguous(), columns

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the embedding whose masks reach into the photo."""
        return math.ceil(self.rows.shape[1] / UPSCALING), math.ceil(self.columns.shape[0] / UPSCALING)

    def __call__(self, logits: Tensor) -> Tensor:
        """Map the logits :math:`(K, r, c)` of those cells to :math:`(K, H, W)`."""
        used = logits[:, : self.rows.shape[1], : self.columns.shape[0]].float()
        return torch.bmm(self.rows.expand(len(logits), -1, -1), used @ self.columns)


def _interpolation(low: int, padded: int, used: int, full: int, device: torch.device) -> Tensor:
    """Return the weights :math:`(r, full)` of the first :math:`r` values, which are all that the result depends on."""
    weights = F.interpolate(torch.eye(low, device=device)[None], padded, mode="linear", align_corners=False)
    weights = F.interpolate(weights[..., :used], full, mode="linear", align_corners=False)[0]
    return weights[: int(weights.any(1).nonzero().max()) + 1]


def _slots(enlarge: _Enlargement, count: int) -> Iterator[Tensor]:
    """Return places for the logits of a crop's candidates, as many as there may be and fit, in one block of memory.

    On their own they would lie between the large buffers that come and go, and leave no holes for the next ones: with
    an allocator that is slow to give memory back, the process would grow by several times what they take.
    """
    rows, columns = (UPSCALING * cells for cells in enlarge.cells)
    fitting = LOGITS // (4 * rows * columns)
    return iter(torch.empty(min(count, fitting), rows, columns, device=enlarge.rows.device))


def _stability(logits: Tensor, threshold: float, offset: float) -> Tensor:
    inner, outer = ((logits > threshold + shift).sum((1, 2), dtype=torch.int32) for shift in (offset, -offset))
    return inner / outer


def _boxes(masks: Tensor) -> Tensor:
    """Return the first and last columns and rows of masks :math:`(K, H, W)`, :math:`(K, 4)`; zeros for empty masks."""
    edges = mask_boxes(masks).long()
    return (edges - edges.new_tensor([0, 0, 1, 1])).clamp(min=0)


def _near_crop_edge(boxes: Tensor, crop: Box, size: tuple[int, int]) -> Tensor:
    """Tell which boxes, in pixels of the crop, end at an edge of the crop that is no edge of the photo."""
    placed = boxes + boxes.new_tensor(crop[:2] * 2)
    near_crop, near_photo = (
        (placed - boxes.new_tensor(edges)).abs() <= EDGE for edges in (crop, (0, 0, size[1], size[0]))
    )
    return (near_crop & ~near_photo).any(1)


def _encode(mask: Tensor | RLE, enlarge: _Enlargement, crop: Box, size: tuple[int, int], threshold: float) -> RLE:
    if not isinstance(mask, Tensor):
        return mask
    return _compress(enlarge(mask[None])[0] > threshold, crop, size)


def _compress(mask: Tensor, crop: Box, size: tuple[int, int]) -> RLE:
    """Encode a mask of a crop as one of the photo."""
    left, top, right, bottom = crop
    return encode_rle(F.pad(mask, (left, size[1] - right, top, size[0] - bottom)), compressed=True)


def _without_small_regions(found: _Masks, min_area: int, threshold: float) -> _Masks:
    """Remove small regions and holes, then duplicates, of which masks that were not changed are preferred."""
    rles, boxes, unchanged = [], [], []
    for rle, box in zip(found.masks, found.boxes, strict=True):
        mask, filled = remove_small_regions(decode_rle(rle), min_area, "holes")
        mask, dropped = remove_small_regions(mask, min_area, "islands")
        unchanged.append(not (filled or dropped))
        rles.append(rle if unchanged[-1] else encode_rle(mask, compressed=True))
        boxes.append(box if unchanged[-1] else _boxes(torch.from_numpy(mask)[None])[0])
    if not rles:
        return found
    cleaned = dataclasses.replace(found, masks=rles, boxes=torch.stack(boxes))
    return cleaned.select(nms(cleaned.boxes, torch.tensor(unchanged).float(), threshold))


def _record(found: _Masks, index: int, output_mode: str) -> Mask:
    rle = found.masks[index]
    return Mask(
        segmentation=OUTPUT_MODES[output_mode](rle),
        area=rle_area(rle),
        bbox=_to_width_and_height(found.boxes[index]),
        predicted_iou=found.iou[index].item(),
        stability_score=found.stability[index].item(),
        point_coords=[found.points[index].tolist()],
        crop_box=_to_width_and_height(found.crops[index]),
    )


def _to_width_and_height(box: Tensor) -> list[int]:
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]
