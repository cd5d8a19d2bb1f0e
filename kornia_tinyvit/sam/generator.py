"""Segment everything: the masks of a grid of points, filtered, each object once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from kornia.geometry.bbox import nms
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kornia_tinyvit.images import read_pixels, to_pixels
from kornia_tinyvit.ops.regions import remove_small_regions
from kornia_tinyvit.ops.rle import RLE, decode_rle, encode_rle, rle_area, uncompress_rle
from kornia_tinyvit.sam.decoder import CHUNK, CPU_CHUNK, UPSCALING, FoldedMaskDecoder
from kornia_tinyvit.sam.embedding import Geometry, ImageEmbedding

if TYPE_CHECKING:
    from kornia_tinyvit.sam.model import MobileSAM

__all__ = ["OUTPUT_MODES", "Mask", "Photo", "generate_masks"]

#: What is taken for a photo.
Photo = Tensor | str | Path | Image.Image | NDArray[np.uint8]

_MOST = 2**53  # whole numbers up to which floats tell apart

#: How masks may be returned.
OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")

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
class _Settings:
    points_per_batch: int
    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    box_nms_thresh: float
    crop_n_layers: int
    crop_nms_thresh: float
    crop_overlap_ratio: float
    min_mask_region_area: int
    output_mode: str
    mask_threshold: float


@dataclass(frozen=True)
class _Candidates:
    """Masks of a crop that pass the filters, before duplicates are removed; all but the logits on the CPU."""

    masks: list[Tensor | RLE]  # logits (r, c), or encoded in the photo, each
    boxes: Tensor  # (K, 4), in pixels of the crop
    iou: Tensor  # (K,)
    stability: Tensor  # (K,)
    points: Tensor  # (K, 2), in pixels of the crop

    @classmethod
    def join(cls, parts: Sequence[_Candidates]) -> _Candidates:
        names = ("boxes", "iou", "stability", "points")
        masks = [each for part in parts for each in part.masks]
        return cls(masks, *(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class _Found:
    """Masks in the photo."""

    rles: list[RLE]  # compressed: as lists the runs of a ragged mask take twenty times the memory
    boxes: Tensor
    iou: Tensor
    stability: Tensor
    points: Tensor
    crops: Tensor

    def select(self, indices: Tensor) -> _Found:
        rles = [self.rles[index] for index in indices.tolist()]
        rest = (self.boxes, self.iou, self.stability, self.points, self.crops)
        return _Found(rles, *(each[indices] for each in rest))

    @classmethod
    def join(cls, parts: Sequence[_Found]) -> _Found:
        names = ("boxes", "iou", "stability", "points", "crops")
        rles = [rle for part in parts for rle in part.rles]
        return cls(rles, *(torch.cat([getattr(part, name) for part in parts]) for name in names))


@overload
def generate_masks(sam: MobileSAM, image: Photo, *args: Any, **settings: Any) -> list[Mask]: ...


@overload
def generate_masks(
    sam: MobileSAM, image: Sequence[Photo] | ImageEmbedding, *args: Any, **settings: Any
) -> list[list[Mask]]: ...


@torch.no_grad()
def generate_masks(
    sam: MobileSAM,
    image: Photo | Sequence[Photo] | ImageEmbedding,
    points_per_side: int | None = 32,
    points_per_batch: int = 64,
    pred_iou_thresh: float = 0.88,
    stability_score_thresh: float = 0.95,
    stability_score_offset: float = 1.0,
    box_nms_thresh: float = 0.7,
    crop_n_layers: int = 0,
    crop_nms_thresh: float = 0.7,
    crop_overlap_ratio: float = 512 / 1500,
    crop_n_points_downscale_factor: int = 1,
    point_grids: Sequence[NDArray[np.float64] | Tensor] | None = None,
    min_mask_region_area: int = 0,
    output_mode: Literal["binary_mask", "uncompressed_rle", "coco_rle"] = "binary_mask",
    dtype: torch.dtype | None = None,
    batch_size: int = 4,
) -> list[Mask] | list[list[Mask]]:
    """Segment everything in a photo, or in each of several.

    The masks are those of segment-anything's ``SamAutomaticMaskGenerator`` on the same weights with the same settings,
    in the same order. A point's masks must pass the network's own judgement, be stable against the threshold, and not
    be cut off by the edge of a crop; of masks whose boxes overlap, the best stays.

    Candidates take up to a quarter of a megabyte each until duplicates are removed; for what is returned see
    ``output_mode``.

    Args:
        sam: the network.
        image: a photo as :meth:`MobileSAM.embed` takes it, or a uint8 array :math:`(H, W, 3)`; several of these in a
            sequence, or in a tensor :math:`(B, 3, H, W)` or array :math:`(B, H, W, 3)`; or what
            :meth:`MobileSAM.embed` returned, here or before in a file, which saves the encoder. Files, PIL images and
            arrays are resized exactly as segment-anything does it.
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
        dtype: precision of the decoder's work on the picture. ``torch.bfloat16`` is faster on hardware that has it;
            masks near a threshold may come or go, and borders move.
        batch_size: photos that the encoder sees at a time.

    Returns:
        The masks of a photo, the best first within a crop; of several photos or an embedding, a list of these, one for
        each photo.

    Raises:
        TypeError: if the image is of no kind that is known.
        ValueError: if a setting is out of its range, the image has no pixels or another shape, or an embedding is of
            other weights, of another input size, or given with crop layers, which need the photo.

    Example:
        >>> from kornia_tinyvit.sam import MobileSAM
        >>> sam = MobileSAM.from_config("1m", img_size=64).eval()
        >>> masks = generate_masks(sam, torch.rand(3, 48, 80), points_per_side=2, stability_score_thresh=0)
        >>> [mask.segmentation.shape for mask in masks if mask.area > 48 * 80]
        []
        >>> len(generate_masks(sam, torch.rand(2, 3, 48, 80), points_per_side=2))
        2
    """
    if output_mode not in OUTPUT_MODES:
        raise ValueError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}; got {output_mode!r}.")
    numbers = {
        "pred_iou_thresh": pred_iou_thresh, "stability_score_thresh": stability_score_thresh,
        "stability_score_offset": stability_score_offset, "box_nms_thresh": box_nms_thresh,
        "crop_nms_thresh": crop_nms_thresh, "crop_overlap_ratio": crop_overlap_ratio,
        "crop_n_points_downscale_factor": crop_n_points_downscale_factor, "min_mask_region_area": min_mask_region_area,
        "points_per_side": points_per_side or 0, "points_per_batch": points_per_batch, "batch_size": batch_size,
        "crop_n_layers": crop_n_layers,
    }  # fmt: skip
    broken = [f"{name}={number}" for name, number in numbers.items() if not abs(number) < _MOST]  # nor NaN
    if broken:
        raise ValueError(f"Settings are finite numbers below 2**53; got {', '.join(broken)}.")
    if min(points_per_batch, batch_size) < 1 or crop_n_layers < 0:
        raise ValueError(
            "points_per_batch and batch_size must be at least 1, crop_n_layers at least 0; "
            f"got {points_per_batch}, {batch_size} and {crop_n_layers}."
        )
    if crop_n_points_downscale_factor <= 0:
        raise ValueError(f"crop_n_points_downscale_factor must be positive; got {crop_n_points_downscale_factor}.")
    settings = _Settings(
        points_per_batch,
        pred_iou_thresh,
        stability_score_thresh,
        stability_score_offset,
        box_nms_thresh,
        crop_n_layers,
        crop_nms_thresh,
        crop_overlap_ratio,
        min_mask_region_area,
        output_mode,
        sam.mask_threshold,
    )
    grids = _point_grids(points_per_side, crop_n_layers, crop_n_points_downscale_factor, point_grids)
    segment = _Everything(sam, FoldedMaskDecoder(sam.mask_decoder, dtype), grids, settings)
    if isinstance(image, ImageEmbedding):
        return segment.embedded(image)
    several = isinstance(image, Sequence) and not isinstance(image, str)
    if several or (isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4):
        photos = cast("Sequence[Photo]", image)
        batches = (photos[start : start + batch_size] for start in range(0, len(photos), batch_size))
        return [masks for batch in batches for masks in segment([_open(photo) for photo in batch])]
    return segment([_open(cast("Photo", image))])[0]


@dataclass(frozen=True)
class _Everything:
    """The search for everything in photos, with its settings."""

    sam: MobileSAM
    decoder: FoldedMaskDecoder
    grids: list[Tensor]
    settings: _Settings

    def __call__(self, photos: list[Tensor | Image.Image]) -> list[list[Mask]]:
        """Return the masks of each photo; the encoder sees all photos together, and crops one by one."""
        embedding = self.sam.embed(photos, batch_size=max(1, len(photos)))
        return [self._search(photo, whole) for photo, whole in zip(photos, embedding, strict=True)]

    def embedded(self, embedding: ImageEmbedding) -> list[list[Mask]]:
        """Return the masks of each photo of an embedding."""
        if self.settings.crop_n_layers:
            raise ValueError(
                f"crop_n_layers={self.settings.crop_n_layers} looks at parts of the photo, enlarged, and an embedding "
                "holds no pixels: pass the photo, or crop_n_layers=0."
            )
        self.sam.check_embedding(embedding)
        first = next(self.decoder.parameters())
        return [self._search(None, whole.to(first.device, first.dtype)) for whole in embedding]

    def _search(self, photo: Tensor | Image.Image | None, whole: ImageEmbedding) -> list[Mask]:
        s = self.settings
        size = whole.geometries[0].original_size
        crops = _crop_boxes(size, s.crop_n_layers, s.crop_overlap_ratio)
        found = _Found.join([self._search_crop(photo, whole, crop, layer) for crop, layer in crops])
        if len(crops) > 1:
            sides = found.crops[:, 2:] - found.crops[:, :2]
            found = found.select(suppress_boxes(found.boxes, 1 / sides.prod(1), s.crop_nms_thresh))
        if s.min_mask_region_area > 0:
            threshold = max(s.box_nms_thresh, s.crop_nms_thresh)
            found = _without_small_regions(found, s.min_mask_region_area, threshold)
        return [_record(found, index, s.output_mode) for index in range(len(found.rles))]

    def _search_crop(self, photo: Tensor | Image.Image | None, whole: ImageEmbedding, crop: Box, layer: int) -> _Found:
        """Segment a part of the photo, and tell where in the photo its masks are."""
        embedding = whole if photo is None or layer == 0 else self.sam.embed(_cut(photo, crop))
        size, s = whole.geometries[0].original_size, self.settings
        prompts = _Prompts(self.sam, self.decoder, embedding.features, embedding.geometries[0])
        enlarge = _Enlargement(embedding.geometries[0], prompts.low_size, embedding.features.device)
        left, top, right, bottom = crop
        points = self.grids[layer] * self.grids[layer].new_tensor([right - left, bottom - top])
        masks = (self.decoder.decoder.num_mask_tokens - 1) * len(points)
        store = _Store(enlarge, prompts.image.tokens, masks)
        batches = [
            _filter(*proposed, enlarge, store, crop, size, s) for proposed in prompts.propose(points, enlarge.cells, s)
        ]
        found = _Candidates.join(batches)
        kept = suppress_boxes(found.boxes, found.iou, s.box_nms_thresh)
        offset = torch.tensor([left, top])
        return _Found(
            [_encode(found.masks[index], enlarge, crop, size, s.mask_threshold) for index in kept.tolist()],
            found.boxes[kept] + offset.repeat(2),
            found.iou[kept],
            found.stability[kept],
            found.points[kept] + offset,
            torch.tensor(crop).expand(len(kept), 4),
        )


def _open(image: Photo) -> Tensor | Image.Image:
    """Return the photo as something that :meth:`MobileSAM.embed` takes and that can be cropped."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or not image.numel():
            raise ValueError(f"A photo must be (3, H, W) with pixels; got {tuple(image.shape)}.")
        return image
    if isinstance(image, (str, Path)):
        image = read_pixels(image).movedim(0, -1).numpy()
    elif isinstance(image, Image.Image):
        image = to_pixels(image).movedim(0, -1).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"A photo is a tensor, an array, a path or a PIL image; got {type(image).__name__}.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"An array must be uint8 (H, W, 3) with pixels; got {image.dtype} {image.shape}.")
    return Image.fromarray(image)


def _point_grids(
    side: int | None, layers: int, factor: int, grids: Sequence[NDArray[np.float64] | Tensor] | None
) -> list[Tensor]:
    """Return the points of each layer, :math:`(G, 2)` in [0, 1]."""
    if (side is None) == (grids is None):
        raise ValueError("Give either points_per_side or point_grids, and None for the other.")
    if grids is not None:
        points = [torch.as_tensor(grid).to("cpu", torch.float64) for grid in grids]
        if len(points) <= layers or any(grid.ndim != 2 or grid.shape[1] != 2 or not len(grid) for grid in points):
            raise ValueError(f"point_grids must be {layers + 1} arrays (G, 2); got {[tuple(g.shape) for g in points]}.")
        return points
    sides = [int(cast("int", side) / factor**layer) for layer in range(layers + 1)]
    if min(sides) < 1:
        raise ValueError(f"points_per_side={side} divided by {factor} from layer to layer leaves no points: {sides}.")
    return [_grid(points) for points in sides]


def _grid(side: int) -> Tensor:
    """Return the centres of a square's cells, row after row, :math:`(side^2, 2)`."""
    centres = torch.from_numpy(np.linspace(1 / (2 * side), 1 - 1 / (2 * side), side))
    return torch.stack([centres.repeat(side), centres.repeat_interleave(side)], 1)


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


def _cut(photo: Tensor | Image.Image, crop: Box) -> Tensor | Image.Image:
    left, top, right, bottom = crop
    return photo.crop(crop) if isinstance(photo, Image.Image) else photo[:, top:bottom, left:right]


class _Prompts:
    """Points of a crop, asked a few at a time."""

    def __init__(self, sam: MobileSAM, decoder: FoldedMaskDecoder, features: Tensor, geometry: Geometry) -> None:
        self.encoder, self.decoder, self.geometry = sam.prompt_encoder, decoder, geometry
        _, dense = self.encoder(points=None, boxes=None, masks=None)
        self.image = decoder.prepare(features, self.encoder.get_dense_pe(), dense)
        self.low_size = (UPSCALING * features.shape[2], UPSCALING * features.shape[3])

    def propose(
        self, points: Tensor, cells: tuple[int, int], settings: _Settings
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield logits :math:`(K, r, c)`, predicted IoU and point of the masks whose predicted IoU passes."""
        device = self.image.tokens.device
        size = min(settings.points_per_batch, CPU_CHUNK if device.type == "cpu" else CHUNK)
        for batch in points.split(size):
            placed = self.geometry.map_points(batch)[:, None].to(device, torch.float32)
            labels = torch.ones(placed.shape[:2], device=device)
            sparse, _ = self.encoder(points=(placed, labels), boxes=None, masks=None)
            prompted = self.decoder.prompt(self.image, sparse)
            iou = prompted.iou[:, 1:]  # the first mask is for prompts that are not ambiguous
            passing = iou > settings.pred_iou_thresh if settings.pred_iou_thresh > 0 else torch.ones_like(iou).bool()
            (prompts,) = passing.any(1).nonzero(as_tuple=True)
            logits = self.decoder.upscale(prompted, prompts.tolist(), cells)[:, 1:]
            yield logits[passing[prompts]], iou[passing], batch[passing.nonzero()[:, 0].cpu()]


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


class _Store:
    """A block of memory for the logits of a crop's candidates.

    On their own they would lie between the large buffers that come and go, and leave no holes for the next ones: with
    an allocator that is slow to give memory back, the process would grow by several times what they take.

    Args:
        enlarge: what enlarges them, which tells their size.
        like: a tensor of their device.
        count: how many there are at the most.
    """

    def __init__(self, enlarge: _Enlargement, like: Tensor, count: int) -> None:
        rows, columns = (UPSCALING * cells for cells in enlarge.cells)
        fitting = LOGITS // (4 * rows * columns)
        self._block = torch.empty(min(count, fitting), rows, columns, device=like.device)
        self._used = 0

    @property
    def room(self) -> bool:
        """Whether one more fits."""
        return self._used < len(self._block)

    def keep(self, logits: Tensor) -> Tensor:
        """Copy logits :math:`(r, c)` into the block."""
        self._used += 1
        return self._block[self._used - 1].copy_(logits)


def _filter(
    logits: Tensor,
    iou: Tensor,
    points: Tensor,
    enlarge: _Enlargement,
    store: _Store,
    crop: Box,
    size: tuple[int, int],
    s: _Settings,
) -> _Candidates:
    """Keep masks that are stable and not cut off, enlarging a few at a time; as logits, or encoded without room."""
    parts = []
    step = max(1, PIXELS // (enlarge.rows.shape[0] * enlarge.columns.shape[1]))
    for start in range(0, max(1, len(logits)), step):
        rows = slice(start, start + step)
        large = enlarge(logits[rows])
        stability = _stability(large, s.mask_threshold, s.stability_score_offset)
        boxes = _boxes(large > s.mask_threshold)
        keep = ~_near_crop_edge(boxes, crop, size)
        if s.stability_score_thresh > 0:  # a mask without a pixel has no stability, and passes no threshold
            keep &= stability >= s.stability_score_thresh
        found = (boxes[keep], iou[rows][keep], stability[keep], points[rows][keep.cpu()])
        masks: list[Tensor | RLE] = [
            store.keep(logits[start + index]) if store.room else _compress(large[index] > s.mask_threshold, crop, size)
            for index in keep.nonzero()[:, 0].tolist()
        ]
        parts.append(_Candidates(masks, *(each.cpu() for each in found)))
    return _Candidates.join(parts)


def _stability(logits: Tensor, threshold: float, offset: float) -> Tensor:
    inner, outer = ((logits > threshold + shift).sum((1, 2), dtype=torch.int32) for shift in (offset, -offset))
    return inner / outer


def _boxes(masks: Tensor) -> Tensor:
    """Return the first and last columns and rows of masks :math:`(K, H, W)`, :math:`(K, 4)`; zeros for empty masks."""
    rows, columns = masks.any(2), masks.any(1)
    left, top = _first(columns), _first(rows)
    right, bottom = (each.shape[1] - 1 - _first(each.flip(1)) for each in (columns, rows))
    return torch.stack([left, top, right, bottom], 1) * rows.any(1, keepdim=True)


def _first(flags: Tensor) -> Tensor:
    return flags.byte().argmax(1)


def _near_crop_edge(boxes: Tensor, crop: Box, size: tuple[int, int]) -> Tensor:
    """Tell which boxes, in pixels of the crop, end at an edge of the crop that is no edge of the photo."""
    placed = boxes + boxes.new_tensor(crop[:2] * 2)
    near_crop, near_photo = (
        (placed - boxes.new_tensor(edges)).abs() <= EDGE for edges in (crop, (0, 0, size[1], size[0]))
    )
    return (near_crop & ~near_photo).any(1)


def suppress_boxes(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return the boxes that non-maximum suppression keeps, the best first, exactly as torchvision's.

    kornia's does the work. It may exchange equal scores, drops boxes without area that meet, and compares with the
    threshold rounded to float32.
    """
    order = scores.argsort(descending=True, stable=True)
    corners = boxes[order].float()
    (solid,) = ((corners[:, 2:] - corners[:, :2]).prod(1) > 0).nonzero(as_tuple=True)
    limit = np.float32(threshold)
    if float(limit) > threshold:
        limit = np.nextafter(limit, np.float32(-1))
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[solid] = False
    keep[solid[nms(corners[solid], torch.arange(len(solid), 0, -1).float(), float(limit))]] = True
    return order[keep]


def _encode(mask: Tensor | RLE, enlarge: _Enlargement, crop: Box, size: tuple[int, int], threshold: float) -> RLE:
    if not isinstance(mask, Tensor):
        return mask
    return _compress(enlarge(mask[None])[0] > threshold, crop, size)


def _compress(mask: Tensor, crop: Box, size: tuple[int, int]) -> RLE:
    """Encode a mask of a crop as one of the photo."""
    left, top, right, bottom = crop
    return encode_rle(F.pad(mask, (left, size[1] - right, top, size[0] - bottom)), compressed=True)


def _without_small_regions(found: _Found, min_area: int, threshold: float) -> _Found:
    """Remove small regions and holes, then duplicates, of which masks that were not changed are preferred."""
    rles, boxes, unchanged = [], [], []
    for rle, box in zip(found.rles, found.boxes, strict=True):
        mask, filled = remove_small_regions(decode_rle(rle), min_area, "holes")
        mask, dropped = remove_small_regions(mask, min_area, "islands")
        unchanged.append(not (filled or dropped))
        rles.append(rle if unchanged[-1] else encode_rle(mask, compressed=True))
        boxes.append(box if unchanged[-1] else _boxes(torch.from_numpy(mask)[None])[0])
    if not rles:
        return found
    cleaned = dataclasses.replace(found, rles=rles, boxes=torch.stack(boxes))
    return cleaned.select(suppress_boxes(cleaned.boxes, torch.tensor(unchanged).float(), threshold))


def _record(found: _Found, index: int, output_mode: str) -> Mask:
    rle = found.rles[index]
    segmentation = {"binary_mask": decode_rle, "uncompressed_rle": uncompress_rle, "coco_rle": lambda rle: rle}
    return Mask(
        segmentation=segmentation[output_mode](rle),
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
