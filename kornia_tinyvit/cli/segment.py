"""``kornia-tinyvit segment``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kornia_tinyvit.checkpoints import CheckpointError
from kornia_tinyvit.cli.options import Network, NetworkRequest
from kornia_tinyvit.cli.requests import argument, command, option
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.files import write_text
from kornia_tinyvit.images import open_image
from kornia_tinyvit.ops import decode_rle, encode_rle, mask_boxes
from kornia_tinyvit.sam import MobileSAM
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.visualization import draw_class_map, draw_overlay, save_image

Format = StrEnum("Format", ("png", "coco"))
#: Points of one object :math:`(N, 2)`, their labels :math:`(N,)`, and boxes :math:`(K, 4)` of one object each.
Prompts = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class SegmentRequest(NetworkRequest):
    """The options of ``segment``."""

    photo: Path = argument("Image file.")
    point: list[str] | None = option(
        "Prompts", "x,y on the object or x,y,0 on the background, in pixels; all points mark one object.", None
    )
    box: list[str] | None = option("Prompts", "left,top,right,bottom; one object per box.", None)
    everything: bool = option("Prompts", "Segment everything, without prompts.", False)
    max_area: float = option(
        "Prompts", "With --everything, leave out masks of more than this fraction of the photo: its background.", 1.0
    )
    weights: str | None = option(
        "Weights",
        "Path or URL of a MobileSAM, or of a semantic network, which takes no prompts. Default: the published "
        "MobileSAM, downloaded once.",
        None,
    )
    img_size: str | None = option(  # type: ignore[assignment]
        "Weights", "Side of the input in pixels, or heightxwidth such as 512x1024. Default: that of the weights.", None
    )
    out: Path = option("Output", "Folder for the overlay and the masks.", Path("segments"))
    format: Format = option(
        "Output",
        "png: a file per mask, or one of class indices; coco: one JSON file with run-length codes.",
        Format.png,
    )


@command
def segment(request: SegmentRequest) -> None:
    """Segment objects in a photo, at points, in boxes, or everything; or its pixels by their class.

    The classes are those of a network of 'train --task semantic'.
    """
    if request.weights is not None and SemanticSegmenter.is_stored_in(request.weights, request.variant):
        _segment_classes(request)
        return
    photo, prompts = request.photo, _parse_prompts(request)
    pixels = open_image(photo)
    sam = _build(request, MobileSAM)
    found = (
        _segment_everything(sam, pixels, request.max_area)
        if request.everything
        else _segment_prompts(sam, pixels, prompts)
    )
    written = _write(request, pixels, found, prompts)
    if request.as_json:
        rows = [{name: value for name, value in each.items() if name != "segmentation"} for each in found]
        print(json.dumps({"photo": str(photo), "files": [str(path) for path in written], "masks": rows}))
        return
    print(f"{photo}: {len(found)} {'mask' if len(found) == 1 else 'masks'}, see {written[0]}")
    for number, each in enumerate(found):
        left, top, width, height = each["bbox"]
        place = f"{each['area']:9} pixels in {width}x{height} at ({left}, {top})"
        print(f"{number:4} {place}, predicted IoU {each['predicted_iou']:.3f}")


def _parse_prompts(request: SegmentRequest) -> Prompts:
    points, boxes = request.point or [], request.box or []
    if request.everything:
        request.reject_unused(("point", "box"), "with --everything")
    elif not (points or boxes):
        raise ValueError("No prompt; give --point x,y, --box left,top,right,bottom or --everything.")
    else:
        request.reject_unused(("max_area",), "without --everything")
    if points and len(boxes) > 1:
        raise ValueError(f"Points mark one object and go with at most one --box; got {len(boxes)} boxes.")
    places = [_numbers("--point", text, (2, 3), "x,y or x,y,label, such as 1,2") for text in points]
    corners = [_numbers("--box", text, (4,), "left,top,right,bottom, such as 1,2,3,4") for text in boxes]
    if any(place[2:] not in ([], [0], [1]) for place in places):
        raise ValueError("The label of a --point must be 1 (object) or 0 (background).")
    return (
        torch.tensor([place[:2] for place in places]) if places else None,
        torch.tensor([int(place[2]) if len(place) == 3 else 1 for place in places]) if places else None,
        torch.tensor(corners) if corners else None,
    )


def _numbers(
    option: str, text: str, counts: tuple[int, ...], form: str, kind: Callable[[str], Any] = float, separator: str = ","
) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(separator)]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise ValueError(f"{option} takes {form}; got {text!r}.")
    return numbers


def _build(request: SegmentRequest, kind: type[Network]) -> Network:
    settings: dict[str, Any] = {}
    if request.img_size is not None:
        form = "a side, or heightxwidth such as 512x1024"
        sides = _numbers("--img-size", request.img_size, (1, 2), form, int, "x")
        settings["img_size"] = sides[0] if len(sides) == 1 else tuple(sides)
    try:
        return request.build_network(kind, request.weights or True, **settings)
    except CheckpointError as error:
        if request.weights is not None:
            raise
        raise CheckpointError(f"{error} Give the file by --weights FILE.") from error


def _segment_everything(sam: MobileSAM, pixels: Tensor, max_area: float) -> list[dict[str, Any]]:
    # Encoded, because hundreds of masks of a large photo do not fit into memory.
    masks = sam.generate_masks(pixels, output_mode="coco_rle", max_area=max_area)
    return [
        {
            "segmentation": mask.segmentation,
            # segment-anything returns the distance between the outermost pixels, COCO counts pixels.
            "bbox": [*mask.bbox[:2], mask.bbox[2] + 1, mask.bbox[3] + 1],
            "area": mask.area,
            "predicted_iou": mask.predicted_iou,
            "stability_score": mask.stability_score,
        }
        for mask in sorted(masks, key=lambda mask: mask.area, reverse=True)
    ]


def _segment_prompts(sam: MobileSAM, pixels: Tensor, prompts: Prompts) -> list[dict[str, Any]]:
    points, labels, boxes = prompts
    if points is not None and labels is not None:
        points, labels = points[None], labels[None]
    best = sam.predict_best(sam.embed(pixels), points, labels, boxes)
    return [
        _encode(mask) | {"predicted_iou": score}
        for mask, score in zip(best.masks()[:, 0].cpu(), best.scores[:, 0].tolist(), strict=True)
    ]


def _encode(mask: Tensor) -> dict[str, Any]:
    """Return the fields of COCO that describe a mask :math:`(H, W)`."""
    ((left, top, right, bottom),) = mask_boxes(mask[None]).long().tolist()
    return {
        "segmentation": encode_rle(mask, compressed=True),
        "bbox": [left, top, right - left, bottom - top],
        "area": int(mask.sum()),
    }


def _write(request: SegmentRequest, pixels: Tensor, found: list[dict[str, Any]], prompts: Prompts) -> list[Path]:
    """Write the overlay and the masks and return their paths, the overlay first."""
    out, photo = request.out, request.photo
    overlay = out / f"{photo.stem}_overlay.png"
    save_image(overlay, draw_overlay(pixels, (each["segmentation"] for each in found), *prompts))
    written = [overlay]
    if request.format is Format.coco:
        written.append(out / f"{photo.stem}.json")
        write_text(written[-1], json.dumps(_coco(photo, pixels.shape[1:], ("object",), found)))
        return written
    for number, each in enumerate(found):
        written.append(out / f"{photo.stem}_mask_{number:03}.png")
        save_image(written[-1], Image.fromarray(decode_rle(each["segmentation"])))
        each["file"] = str(written[-1])
    return written


def _coco(photo: Path, size: Sequence[int], names: Sequence[str], found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return a COCO record of a photo and its masks (cocodataset.org, "Data format"); ids start at 1."""
    height, width = size
    return {
        "images": [{"id": 1, "file_name": photo.name, "height": height, "width": width}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, **each}
            for number, each in enumerate(found, 1)
        ],
    }


def _segment_classes(request: SegmentRequest) -> None:
    """Write the class map of a semantic network, and print the classes with their number of pixels."""
    request.reject_unused(
        ("point", "box", "everything", "max_area"), "with a semantic network, which gives each pixel a class"
    )
    photo, out = request.photo, request.out
    pixels = open_image(photo)
    segmenter = _build(request, SemanticSegmenter)
    names = segmenter.class_names
    classes = segmenter.predict(pixels)[0].cpu()
    present, counts = classes.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    rows = [
        {"class": names[index], "index": index, "pixels": count, "percent": round(100 * count / classes.numel(), 2)}
        for index, count in zip(present[order].tolist(), counts[order].tolist(), strict=True)
    ]
    written = [out / f"{photo.stem}_overlay.png"]
    save_image(written[0], draw_class_map(classes, pixels, names))
    if request.format is Format.coco:
        written.append(out / f"{photo.stem}.json")
        found = (_encode(classes == row["index"]) | {"category_id": row["index"] + 1} for row in rows)
        write_text(written[-1], json.dumps(_coco(photo, classes.shape, names, found)))
    else:
        written.append(out / "masks" / f"{photo.stem}.png")  # as SegmentationDataset reads it
        # 255 is unlabeled in most datasets of 8-bit masks.
        save_image(written[-1], Image.fromarray(classes.numpy().astype(np.uint8 if len(names) < 256 else np.uint16)))
    if request.as_json:
        print(json.dumps({"photo": str(photo), "files": [str(path) for path in written], "classes": rows}))
        return
    print(f"{photo}: {len(rows)} {'class' if len(rows) == 1 else 'classes'}, see {written[0]}")
    cells = ((row["class"], row["index"], row["pixels"], f"{row['percent']:.2f}") for row in rows)
    print_table(["class", "index", "pixels", "%"], cells)
