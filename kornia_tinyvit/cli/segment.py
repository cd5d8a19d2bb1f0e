"""``kornia-tinyvit segment``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor

from kornia_tinyvit.checkpoints import CheckpointError
from kornia_tinyvit.cli.options import Device, Json, build_network
from kornia_tinyvit.files import write_text
from kornia_tinyvit.images import read_pixels, to_pil
from kornia_tinyvit.ops import RLE, decode_rle, encode_rle, mask_boxes
from kornia_tinyvit.sam import MobileSAM
from kornia_tinyvit.visualization import draw_overlay, save_image

Found = list[dict[str, Any]]


#: How masks are written.
Format = StrEnum("Format", ("png", "coco"))


#: Points :math:`(N, 2)` on one object, their labels :math:`(N,)`, and boxes :math:`(K, 4)` around one each.
Prompts = tuple[Tensor | None, Tensor | None, Tensor | None]


def segment(
    photo: Annotated[Path, typer.Argument(help="Image file.")],
    point: Annotated[
        list[str] | None,
        typer.Option(help="x,y on the object, or x,y,0 off it; several describe one object. In pixels of the photo."),
    ] = None,
    box: Annotated[
        list[str] | None, typer.Option(help="left,top,right,bottom around an object; each finds one of its own.")
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Find all there is, without prompts.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the overlay and the masks.")] = Path("segments"),
    mask_format: Annotated[
        Format, typer.Option("--format", help="Masks as a PNG file each, or as one COCO JSON file.")
    ] = Format.png,
    variant: Annotated[
        str | None, typer.Option(help="Encoder: 1m, 5m, 11m or 21m. Default: that of the weights.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Path or URL of a whole MobileSAM. Default: the published one, downloaded once.")
    ] = None,
    img_size: Annotated[
        str | None,
        typer.Option(
            help="Side in pixels to run at, or heightxwidth such as 512x1024; multiples of 16. Default: that of the "
            "weights, 1024."
        ),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Cut objects out of a photo: those at points, in boxes, or everything."""
    prompts = _parse(point or [], box or [], everything)
    pixels = read_pixels(photo)
    sam = _build(variant, checkpoint, device, _parse_size(img_size))
    image = to_pil(pixels)
    found = _everything(sam, image) if everything else _prompted(sam, image, prompts)
    written = _write(out, photo, pixels, found, prompts, mask_format)
    if as_json:
        rows = [{name: value for name, value in each.items() if name != "segmentation"} for each in found]
        print(json.dumps({"photo": str(photo), "files": [str(path) for path in written], "masks": rows}))
        return
    print(f"{photo}: {len(found)} {'mask' if len(found) == 1 else 'masks'}, see {written[0]}")
    for number, each in enumerate(found):
        left, top, width, height = each["bbox"]
        place = f"{each['area']:9} pixels in {width}x{height} at ({left}, {top})"
        print(f"{number:4} {place}, predicted IoU {each['predicted_iou']:.3f}")


def _parse(points: list[str], boxes: list[str], everything: bool) -> Prompts:
    if everything and (points or boxes):
        raise ValueError("--everything takes no --point and no --box.")
    if not (everything or points or boxes):
        raise ValueError("Say what to find: --point x,y, --box left,top,right,bottom or --everything.")
    if points and len(boxes) > 1:
        raise ValueError("Points describe one object, so they go with one --box at most.")
    places = [_numbers("--point", text, (2, 3), "x,y or x,y,label, such as 1,2") for text in points]
    corners = [_numbers("--box", text, (4,), "left,top,right,bottom, such as 1,2,3,4") for text in boxes]
    labels = [int(place[2]) if len(place) == 3 else 1 for place in places]
    if any(label not in (0, 1) for label in labels) or any(len(each) == 3 and each[2] % 1 for each in places):
        raise ValueError("The label of a --point is 1 on the object or 0 off it.")
    return (
        torch.tensor([place[:2] for place in places]) if places else None,
        torch.tensor(labels) if places else None,
        torch.tensor(corners) if corners else None,
    )


def _parse_size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    sides = _numbers("--img-size", text, (1, 2), "a side, or heightxwidth such as 512x1024", int, "x")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _numbers(
    option: str, text: str, counts: tuple[int, ...], form: str, kind: Callable[[str], Any] = float, between: str = ","
) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(between)]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise ValueError(f"{option} takes {form}; got {text!r}.")
    return numbers


def _build(variant: str | None, checkpoint: str | None, device: str, size: int | tuple[int, int] | None) -> MobileSAM:
    try:
        return build_network(MobileSAM, variant, checkpoint or True, device, size)
    except CheckpointError as error:
        if checkpoint is not None:
            raise
        raise CheckpointError(f"{error} On the command line that is --checkpoint FILE.") from error


def _everything(sam: MobileSAM, image: Image.Image) -> Found:
    # Encoded, because hundreds of masks of a large photo do not fit into memory.
    masks = sam.generate_masks(image, output_mode="coco_rle")
    return [
        {
            "segmentation": mask.segmentation,
            # segment-anything tells the distance of the outermost pixels, COCO how many pixels there are.
            "bbox": [*mask.bbox[:2], mask.bbox[2] + 1, mask.bbox[3] + 1],
            "area": mask.area,
            "predicted_iou": mask.predicted_iou,
            "stability_score": mask.stability_score,
        }
        for mask in sorted(masks, key=lambda mask: mask.area, reverse=True)
    ]


def _prompted(sam: MobileSAM, image: Image.Image, prompts: Prompts) -> Found:
    points, labels, boxes = prompts
    if points is not None and labels is not None:
        points, labels = points[None], labels[None]
    best = sam.predict_best(sam.embed(image), points, labels, boxes)
    masks = best.masks()[:, 0].cpu()
    found = []
    for mask, corners, score in zip(masks, mask_boxes(masks).long().tolist(), best.scores[:, 0].tolist(), strict=True):
        left, top, right, bottom = corners
        found.append(
            {
                "segmentation": encode_rle(mask, compressed=True),
                "bbox": [left, top, right - left, bottom - top],
                "area": int(mask.sum()),
                "predicted_iou": score,
            }
        )
    return found


def _write(out: Path, photo: Path, pixels: Tensor, found: Found, prompts: Prompts, form: Format) -> list[Path]:
    """Write the overlay and the masks; return their paths, the overlay first."""
    overlay = out / f"{photo.stem}_overlay.png"
    save_image(overlay, draw_overlay(pixels, _decoded(found), *prompts))
    written = [overlay]
    if form is Format.coco:
        written.append(out / f"{photo.stem}.json")
        write_text(written[-1], json.dumps(_coco(photo, pixels, found)))
        return written
    for number, (each, mask) in enumerate(zip(found, _decoded(found), strict=True)):
        written.append(out / f"{photo.stem}_mask_{number:03}.png")
        save_image(written[-1], Image.fromarray(mask.numpy()))
        each["file"] = str(written[-1])
    return written


def _decoded(found: Found) -> Iterator[Tensor]:
    for each in found:
        rle: RLE = each["segmentation"]
        yield torch.from_numpy(decode_rle(rle).copy())


def _coco(photo: Path, pixels: Tensor, found: Found) -> dict[str, Any]:
    """Return COCO's record of a photo and its masks (cocodataset.org, "Data format")."""
    height, width = pixels.shape[1:]
    return {
        "images": [{"id": 1, "file_name": photo.name, "height": height, "width": width}],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, **each}
            for number, each in enumerate(found, 1)
        ],
    }
