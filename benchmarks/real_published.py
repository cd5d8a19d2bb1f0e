"""MobileSAM with its published weights, for real.py: parity, precision, and everything in photos."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from deploy import DTYPES, absent
from original import load_masks, save_masks
from real_masks import GENERATORS, cache, child, pairwise_ious, segment, standard_error
from torch import Tensor, nn

from kornia_tinyvit import MobileSAM
from kornia_tinyvit.data import InstanceDataset
from kornia_tinyvit.deploy import optimize
from kornia_tinyvit.deploy.measurement import interleaved
from kornia_tinyvit.ops import central_points, mask_boxes
from kornia_tinyvit.sam import ImageEmbedding
from kornia_tinyvit.training.metrics.promptable import mask_ious

#: Photos of coco128 that are segmented whole: an interior, people at a table, a street with few objects.
WHOLE = ("000000000139", "000000001353", "000000003255")
MIN_AREA = 400  # pixels of an object in the comparison with the original
#: Number of points, whether with a box, masks per prompt, and whether the best mask is fed back with the same prompt.
KINDS = {
    "point, 3 masks": (1, False, 3, False),
    "2 points, 3 masks": (2, False, 3, False),
    "box, 1 mask": (0, True, 1, False),
    "box, 3 masks": (0, True, 3, False),
    "box and 2 points, 1 mask": (2, True, 1, False),
    "point, refined": (1, False, 3, True),
    "box, refined": (0, True, 1, True),
}
#: Engine and precision of the encoder; the decoder is in float32.
ENCODERS = (
    ("eager", "float32"), ("eager", "bfloat16"), ("eager", "float16"),
    ("onnxruntime", "float32"), ("onnxruntime", "int8"),
    ("openvino", "float32"), ("openvino", "bfloat16"), ("openvino", "int8"),
)  # fmt: skip
CALIBRATION = 100  # photos
SMALL = 32 * 32  # pixels of a small object of COCO
MIN_REGION = 0.001  # fraction of the image


def open_objects(data: Path, split: str) -> InstanceDataset:
    """Open the photos of coco128 that have outlines of objects."""
    labels = data / "instance_segmentation" / "labels" / split
    return InstanceDataset.open(data / "images" / split, instances=labels)


# Parity


def draw_prompts(images: InstanceDataset, photos: int, objects: int) -> list[dict]:
    """Return the prompts of the first objects of the first photos that have enough large ones."""
    found: list[dict] = []
    for index in range(len(images)):
        masks = images.read(index)[1]
        masks = masks[masks.sum((1, 2)) >= MIN_AREA][:objects]
        if len(masks) < objects or len(found) == photos:
            continue
        boxes, centers = mask_boxes(masks).tolist(), central_points(masks).tolist()
        prompts = []
        for kind, (points, boxed, outputs, refined) in KINDS.items():
            for row, box in enumerate(boxes):
                arguments: dict = {"box": box} if boxed else {}
                if points:  # on the object, and on another one
                    arguments["point_coords"] = [centers[row], centers[row - 1]][:points]
                    arguments["point_labels"] = [1, 0][:points]
                prompts.append({"kind": kind, "arguments": arguments, "multimask": outputs > 1, "refined": refined})
        found.append({"path": images.place(index), "prompts": prompts})
    return found


def predict_ours(sam: MobileSAM, photo: dict) -> list[tuple[str, Tensor]]:
    """Return the kind and the masks of each prompt of a photo."""
    embedding, results = sam.embed(photo["path"]), []
    for prompt in photo["prompts"]:
        names = {"points": "point_coords", "labels": "point_labels", "boxes": "box"}
        given = {ours: prompt["arguments"].get(theirs) for ours, theirs in names.items()}
        prompts = {name: None if value is None else torch.tensor([value]) for name, value in given.items()}
        (found,) = sam.predict_masks(embedding, **prompts, multimask_output=prompt["multimask"])
        if prompt["refined"]:
            low = found.best().low_res_logits
            (found,) = sam.predict_masks(embedding, **prompts, masks=low, multimask_output=False)
        results.append((prompt["kind"], found.masks()[0]))
    return results


def compare_prompts(args: argparse.Namespace) -> None:
    """Print how many masks of each kind of prompt equal those of the original code."""
    photos = draw_prompts(open_objects(args.data, "val2017"), photos=args.photos, objects=3)
    sam = MobileSAM.from_config(pretrained=args.weights)
    folder = cache(args, args.weights, "prompts", hashlib.sha256(json.dumps(photos).encode()).hexdigest()[:12])
    files = [folder / f"{Path(photo['path']).stem}.npz" for photo in photos]
    task = {"what": "prompts", "weights": args.weights, "photos": photos, "files": [str(file) for file in files]}
    versions = json.loads(child(args, task, original=True))
    print("original: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    rows: dict[str, list[tuple[float, int]]] = {kind: [] for kind in KINDS}
    for photo, file in zip(photos, files, strict=True):
        expected = iter(load_masks(file)["masks"])
        for kind, masks in predict_ours(sam, photo):
            for mask, other in zip(masks.numpy(), expected, strict=False):
                rows[kind].append((pairwise_ious(mask[None], other[None]).item(), int((mask != other).sum())))
    print(f"\nPrompts for 3 objects in each of {len(photos)} photos of val2017, float32")
    for kind, pairs in rows.items():
        ious, off = zip(*pairs, strict=True)
        same = f"identical {off.count(0):3} of {len(off):3}"
        print(f"    {kind:25} {same}   worst IoU {min(ious):.5f}   pixels off, all masks {sum(off)}", flush=True)


def compare_everything(args: argparse.Namespace) -> None:
    """Print time, memory and agreement of everything in photos, each in a process of its own."""
    print("\nEverything, 32x32 points, default settings; a process per photo and row, one after the other")
    totals: dict[str, list[float]] = {}
    for stem in WHOLE[: args.whole]:
        photo = args.data / "images" / "val2017" / f"{stem}.jpg"
        reference = load_masks(segment(args, args.weights, "original", [photo])[0])
        for who in GENERATORS:
            found = load_masks(segment(args, args.weights, who, [photo])[0])
            totals.setdefault(who, []).append(float(found["cpu_s"]))
            times = f"{found['cpu_s']:6.1f} CPU s, peak {found['peak_mb']:5.0f} MB, {len(found['masks']):3} masks"
            over = f"{reference['cpu_s'] / found['cpu_s']:4.1f}x, {found['peak_mb'] / reference['peak_mb']:.2f} memory"
            print(f"    {stem} {who:14} {times}   {over}   {describe_agreement(reference, found)}", flush=True)
    for who, seconds in totals.items():
        print(f"    all          {who:14} {sum(seconds):6.1f} CPU s   {sum(totals['original']) / sum(seconds):4.1f}x")


def describe_agreement(reference: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> str:
    """Return how many masks of the reference have one of IoU 0.99, 0.9 and 1, and whether order and scores agree."""
    best = pairwise_ious(reference["masks"], found["masks"]).max(1, initial=0)
    counts = "/".join(str(int((best >= iou).sum())) for iou in (0.99, 0.9, 1))
    same = len(reference["boxes"]) == len(found["boxes"]) and bool((reference["boxes"] == found["boxes"]).all())
    if not same:
        return f"IoU .99/.9/identical {counts}"
    error = np.abs(reference["scores"] - found["scores"]).max(initial=0)
    return f"IoU .99/.9/identical {counts}, same order and boxes, scores within {error:.0e}"


def parity(args: argparse.Namespace) -> None:
    """Compare the masks of the published weights with those of the original code."""
    if args.original is None:
        raise SystemExit("parity compares with the original code: give --original PYTHON (see benchmarks/original.py).")
    compare_prompts(args)
    compare_everything(args)


# Precision


def build_encoders(args: argparse.Namespace, sam: MobileSAM) -> dict[tuple[str, str], nn.Module]:
    """Return the encoders, int8 calibrated on training photos, and print the rows that this machine cannot run."""
    training = sorted((args.data / "images" / "train2017").glob("*.jpg"))
    photos = random.Random(args.seed).sample(training, CALIBRATION)
    calibration = [sam.preprocess(photo)[0] for photo in photos]
    encoders: dict[tuple[str, str], nn.Module] = {}
    for engine, name in ENCODERS:
        dtype = DTYPES.get(name, torch.float16)
        reason = absent(engine, name) if name in DTYPES else None
        try:
            if reason is None:
                encoders[engine, name] = optimize(
                    sam.image_encoder, engine, dtype, example=calibration[0], calibration=calibration
                )
        except (ImportError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
        if reason:
            print(f"    {engine:11} {name:8}   skipped: {reason}", flush=True)
    return encoders


def decode(sam: MobileSAM, embedding: ImageEmbedding, boxes: Tensor, points: Tensor) -> np.ndarray:
    """Return the masks of N boxes, followed by those of N points, (2N, H, W)."""
    boxed = sam.predict_best(embedding, None, None, boxes)
    pointed = sam.predict_best(embedding, points[:, None], None, None)
    return torch.cat([boxed.masks(), pointed.masks()])[:, 0].numpy()


def object_ious(file: Path, others: np.ndarray) -> np.ndarray:
    """Return the IoUs of the masks of N boxes and N points with others (2N, H, W), as (N, 2)."""
    pairs = zip(load_masks(file)["masks"], others, strict=True)
    ious = [pairwise_ious(mask[None], other[None]).item() for mask, other in pairs]
    return np.stack(np.split(np.array(ious), 2), 1)


@torch.no_grad()
def predict_objects(args: argparse.Namespace, images: InstanceDataset) -> tuple[dict, dict]:
    """Return for each encoder the files of its masks of the objects of each photo, and its milliseconds per photo."""
    sam = MobileSAM.from_config(pretrained=args.weights)
    encoders = build_encoders(args, sam)
    files: dict[tuple[str, str], list[Path]] = {row: [] for row in encoders}
    for index in range(len(images)):
        pixels, masks = images.read(index)
        inputs, geometries = sam.preprocess(pixels)
        boxes, points = mask_boxes(masks), central_points(masks)
        for row, encoder in encoders.items():
            file = cache(args, args.weights, "precision", "_".join(row)) / f"{Path(images.name(index)).stem}.npz"
            files[row].append(file)
            if not file.exists():
                save_masks(file, decode(sam, ImageEmbedding(encoder(inputs), geometries), boxes, points))
    steps = {row: functools.partial(encoder, inputs) for row, encoder in encoders.items()}
    seconds = interleaved(steps, repetitions=args.repetitions)
    return files, {row: 1000 * each for row, each in seconds.items()}


def precision(args: argparse.Namespace) -> None:
    """Print the accuracy of box and point prompts for each engine and precision of the encoder."""
    print(f"Engines; int8 calibrated on {CALIBRATION} photos of train2017, seed {args.seed}", flush=True)
    images = open_objects(args.data, "val2017").with_instances()
    images = images.sample(min(args.photos, len(images)), args.seed)
    files, ms = predict_objects(args, images)
    truth = [torch.cat([images.read(index)[1]] * 2).numpy() for index in range(len(images))]
    float32 = [load_masks(file)["masks"] for file in files["eager", "float32"]]
    found = {
        row: [np.concatenate([*map(object_ious, paths, others)]) for others in (truth, float32)]
        for row, paths in files.items()
    }
    base, _ = found["eager", "float32"]
    print(f"\n{len(base)} objects in {len(images)} photos of val2017; IoU in %, change from float32 in eager mode")
    for row, (ious, same) in found.items():
        cells = []
        for name, iou, change, float32s in zip(("boxes", "points"), ious.T, (ious - base).T, same.T, strict=True):
            cells.append(
                f"{name} {100 * iou.mean():5.2f} {100 * change.mean():+5.2f} ± {100 * standard_error(change):.2f}"
            )
            cells.append(f"IoU with float32's masks {float32s.mean():.4f}, least {float32s.min():.3f}")
        print(f"    {row[0]:11} {row[1]:8} {ms[row]:6.0f} ms   {'   '.join(cells)}", flush=True)


# Input sizes and refinement


@functools.cache
def build_sam(weights: str, size: int | tuple[int, int]) -> MobileSAM:
    return MobileSAM.from_config(pretrained=weights, img_size=size)


def rectangle(image: Tensor) -> tuple[int, int]:
    """Return the input size without most of the padding: 1024 pixels, and less in multiples of 64."""
    height, width = (math.ceil(16 * side / max(image.shape[1:])) * 64 for side in image.shape[1:])
    return height, width


def measure_inputs(weights: str, image: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Return the IoUs of the masks of N boxes and N points, (N, 2), for each input size, and after refinement."""
    sizes = {"1024x1024": 1024, "768x768": 768, "512x512": 512, "rectangle": rectangle(image)}
    prompts = [{"boxes": mask_boxes(masks)}, {"points": central_points(masks)[:, None]}]
    ious = {}
    for name, size in sizes.items():
        sam = build_sam(weights, size)
        embedding = sam.embed(image)
        first = [sam.predict_best(embedding, each.get("points"), None, each.get("boxes")) for each in prompts]
        ious[name] = torch.stack([mask_ious(each.masks()[:, 0], masks) for each in first], 1)
        if name == "1024x1024":
            low = [each.low_res_logits for each in first]
            again = [
                sam.predict_masks(embedding, **each, masks=mask, multimask_output=False)[0]
                for each, mask in zip(prompts, low, strict=True)
            ]
            ious["fed back"] = torch.stack([mask_ious(each.masks()[:, 0], masks) for each in again], 1)
    return ious


def inputs(args: argparse.Namespace) -> None:
    """Print the accuracy of boxes and points for other input sizes, and of masks that are fed back."""
    images = open_objects(args.data, "val2017").with_instances()
    images = images.sample(min(args.photos, len(images)), args.seed)
    found: dict[str, list[Tensor]] = {}
    areas = []
    for index in range(len(images)):
        pixels, masks = images.read(index)
        areas.append(masks.sum((1, 2)))
        for name, ious in measure_inputs(args.weights, pixels, masks).items():
            found.setdefault(name, []).append(ious)
    small = (torch.cat(areas) < SMALL).numpy()
    base = torch.cat(found["1024x1024"]).numpy()
    print(f"{len(base)} objects in {len(images)} photos of val2017, {small.sum()} of less than 32x32 pixels; IoU in %")
    for name, parts in found.items():
        ious = torch.cat(parts).numpy()
        cells = []
        for kind, iou, change in zip(("boxes", "points"), ious.T, (ious - base).T, strict=True):
            mean = f"{100 * iou.mean():5.2f} {100 * change.mean():+6.2f} ± {100 * standard_error(change):.2f}"
            cells.append(f"{kind} {mean}, small objects {100 * iou[small].mean():5.2f}")
        print(f"    {name:10} {'   '.join(cells)}", flush=True)


# Everything


def read_regions(path: Path) -> list[np.ndarray]:
    """Return the regions (N, H, W) that each person drew in a photo of BSDS500."""
    from scipy.io import loadmat

    maps = [each["Segmentation"][0, 0] for each in loadmat(path)["groundTruth"][0]]
    return [labels == np.unique(labels)[:, None, None] for labels in maps]


def recall(masks: np.ndarray, people: Iterable[np.ndarray], min_area: float) -> float:
    """Return the fraction of the regions that have a mask of IoU 0.5 or more, averaged over people.

    Regions of less than ``min_area``, as a fraction of the image, are left out.
    """
    fractions = []
    for regions in people:
        kept = regions[regions.mean((1, 2)) >= min_area]
        fractions.append((pairwise_ious(kept, masks).max(1, initial=0) >= 0.5).mean())
    return float(np.mean(fractions))


@functools.cache
def measure_recall(file: Path, truth: Path) -> tuple[float, float, int, float]:
    """Return the recall of all regions and of those of :data:`MIN_REGION`, in per cent, the masks and CPU seconds."""
    found, people = load_masks(file), read_regions(truth)
    recalls = (100 * recall(found["masks"], people, area) for area in (0, MIN_REGION))
    return *recalls, len(found["masks"]), float(found["cpu_s"])


def everything(args: argparse.Namespace) -> None:
    """Print the average recall of the regions of BSDS500's test photos."""
    photos = sorted((args.data / "images" / "test").glob("*.jpg"), key=lambda photo: int(photo.stem))
    random.Random(args.seed).shuffle(photos)
    counts = {"ours bfloat16": args.photos, "ours": args.float32, "original": args.originals if args.original else 0}
    files = {who: segment(args, args.weights, who, photos[:count]) for who, count in counts.items() if count}
    truth = [args.data / "groundTruth" / "test" / f"{photo.stem}.mat" for photo in photos]
    print(f"Recall at IoU 0.5 in %, mean over people, then over photos: all regions / of {MIN_REGION:.1%} of the image")
    for count in sorted({len(paths) for paths in files.values()}):
        print(f"{count} of {len(photos)} test photos")
        for who, paths in files.items():
            if len(paths) >= count:
                every, large, masks, seconds = np.array([*map(measure_recall, paths[:count], truth)]).T
                scores = " / ".join(f"{each.mean():5.2f} ± {standard_error(each):.2f}" for each in (every, large))
                cost = f"{masks.mean():5.1f} masks and {seconds.mean():6.1f} CPU s per photo"
                print(f"    {who:14} {scores}   {cost}", flush=True)
