"""Compare MobileSAM with kornia and segment-anything: encoder, decoder, and automatic mask generation.

    python benchmarks/segmentation.py                           # all sections, some minutes each
    python benchmarks/segmentation.py --sections everything     # 1,024 points: 4 minutes on one core
    python benchmarks/segmentation.py --quick                   # a small network and few points, to test the script

encoder     at 1024, kornia's in eager mode and ours by deploy.optimize
sizes       our encoder in eager mode with other input sizes
prompts     the decoder with 1, 16 and 64 points on one image: kornia's, and FoldedMaskDecoder with the same weights
everything  segment-anything's SamAutomaticMaskGenerator and our generate_masks, both with our encoder in eager mode,
            the same weights and the same settings

The encoders are interleaved in one process, and medians are reported. Each row of the other sections runs in a separate
process. Reported are its peak memory, in total and over the loaded network, its wall-clock time, and its CPU time
("computed"), which is meaningful also on a machine with other load. The memory allocator is tuned (see
docs/guides/allocator.rst); --allocator both also measures the default one. segment-anything needs torchvision; without
both its row is skipped.

Weights are random, initialized to produce large connected masks. The scores of random networks are all high or all low,
so the thresholds are quantiles: a sixth of the masks pass both, and none is suppressed. "agree" is the number of masks
of segment-anything for which we have one with an IoU of 0.99 or more, "identical" the number of equal masks.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deploy import ENCODERS, measure_networks, show_networks
from eager import child, status
from kornia.models.sam.architecture.mask_decoder import MaskDecoder
from torch import Tensor, nn

from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.deploy.measurement import describe_machine
from kornia_tinyvit.images import read_pixels
from kornia_tinyvit.ops import decode_rle
from kornia_tinyvit.sam import FoldedMaskDecoder, MobileSAM

SECTIONS = ("encoder", "sizes", "prompts", "everything")
DECODERS = ("kornia", "ours", "ours bfloat16")
GENERATORS = ("segment-anything", "ours", "ours bfloat16")
PROMPTS = (1, 16, 64)
SIZES = ((1024, 1024), (768, 768), (512, 1024), (512, 512))
PASSING_IOU, PASSING_STABILITY = 0.35, 0.5  # fractions of the masks that pass the first and then the second threshold
BOX_NMS = 1.0  # random masks extend over the whole image, so NMS would remove all but one or two


@torch.no_grad()
def build(task: dict) -> MobileSAM:
    """Build a network with random weights whose masks are connected and depend on the image."""
    torch.manual_seed(0)
    sam = MobileSAM.from_config(task["variant"], img_size=task["size"]).eval()
    for name, parameter in sam.named_parameters():
        if parameter.ndim > 1:
            is_table = "embed" in name or "token" in name.split(".")[-2]
            nn.init.normal_(parameter, std=1.5 if is_table else 1.5 / parameter[0].numel() ** 0.5)
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
    sam.image_encoder.neck[3].weight.mul_(3)
    for layer in sam.mask_decoder.output_upscaling[::3]:  # equal logits within a cell
        layer.weight.copy_(layer.weight[..., :1, :1].expand_as(layer.weight))
    return sam


def as_original(sam: MobileSAM) -> nn.Module:
    """Return segment-anything's model with the same weights and our encoder."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    side = sam.img_size[0]
    prompt_encoder = PromptEncoder(256, (side // 16, side // 16), (side, side), mask_in_chans=16)
    prompt_encoder.load_state_dict(sam.prompt_encoder.state_dict())
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    mask_decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
    mask_decoder.load_state_dict(sam.mask_decoder.state_dict())
    sam.image_encoder.img_size = side
    return Sam(sam.image_encoder, prompt_encoder, mask_decoder).eval()


def timed(step: Callable[[], Any], repetitions: int, warmup: int) -> tuple[Any, dict]:
    """Return the result of a step, its median wall-clock and CPU seconds, and its peak memory in MB."""
    torch.nn.Conv2d(3, 8, 3)(torch.rand(1, 3, 16, 16))  # load torch's libraries first, which are not counted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = status("VmRSS")
    clocks: list[tuple[float, float]] = []
    for _ in range(warmup + repetitions):
        start = time.perf_counter(), time.process_time()
        result = step()
        clocks.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    peak = status("VmHWM")
    seconds, computed = (statistics.median(each[warmup:]) for each in zip(*clocks, strict=True))
    return result, {"s": seconds, "cpu_s": computed, "peak_mb": peak, "over_mb": peak - before}


@torch.no_grad()
def measure_sizes(task: dict) -> list[dict]:
    """Measure the encoder with several input sizes."""
    rows = []
    for height, width in SIZES:
        shape = [side * task["size"] // SIZES[0][0] for side in (height, width)]
        sam = build(task | {"size": tuple(shape)})
        inputs = torch.rand(1, 3, *shape)
        times = timed(functools.partial(sam.image_encoder, inputs), task["repetitions"], warmup=1)[1]
        rows.append({"shape": shape} | times)
    return rows


@torch.no_grad()
def measure_prompts(task: dict) -> dict:
    """Measure a decoder with prompts of one point."""
    sam = build(task)
    dtype = torch.bfloat16 if "bfloat16" in task["who"] else None
    kornias = functools.partial(MaskDecoder.forward, sam.mask_decoder)
    decoder = kornias if task["who"] == "kornia" else FoldedMaskDecoder(sam.mask_decoder, dtype)
    cells = task["size"] // 16

    def arguments(count: int) -> tuple[Tensor, ...]:
        features = torch.randn(1, 256, cells, cells, generator=torch.Generator().manual_seed(0))
        points = torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(1)) * task["size"]
        sparse, dense = sam.prompt_encoder(points=(points, torch.ones(count, 1)), boxes=None, masks=None)
        return features, sam.prompt_encoder.get_dense_pe(), sparse, dense

    prompts = arguments(task["count"])
    _, times = timed(lambda: decoder(*prompts, multimask_output=True), task["repetitions"], warmup=1)
    few = arguments(2)
    logits, expected = (each(*few, multimask_output=True)[0] for each in (decoder, kornias))
    return times | {"error": ((logits - expected).abs().mean() / expected.abs().mean()).item()}


def read_photo(task: dict) -> np.ndarray:
    return read_pixels(task["photo"]).movedim(0, -1).contiguous().numpy()


def measure_thresholds(task: dict) -> dict:
    """Return the thresholds that the given fractions of the masks of a coarse grid pass."""
    everything = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1.0}
    side = min(task["points_per_side"], 12)
    found = build(task).generate_masks(read_photo(task), points_per_side=side, **everything, output_mode="coco_rle")
    iou, stability = (np.array([getattr(m, name) for m in found]) for name in ("predicted_iou", "stability_score"))
    best = np.quantile(iou, 1 - PASSING_IOU)
    stable = np.nanquantile(stability[iou > best], 1 - PASSING_STABILITY)
    return {"pred_iou_thresh": float(best), "stability_score_thresh": float(stable), "box_nms_thresh": BOX_NMS}


def measure_everything(task: dict) -> dict:
    """Measure a generator once and write its masks to a file."""
    sam, photo = build(task), read_photo(task)
    settings = task["settings"] | {"points_per_side": task["points_per_side"], "output_mode": "coco_rle"}
    try:
        if task["who"] == "segment-anything":
            from segment_anything import SamAutomaticMaskGenerator

            generator = SamAutomaticMaskGenerator(as_original(sam), **settings)
            masks, times = timed(lambda: generator.generate(photo), 1, warmup=0)
            rles = [each["segmentation"] for each in masks]
        else:
            dtype = torch.bfloat16 if "bfloat16" in task["who"] else None
            masks, times = timed(lambda: sam.generate_masks(photo, **settings, dtype=dtype), 1, warmup=0)
            rles = [each.segmentation for each in masks]
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter if it does not fit torch
        return {"absent": str(error).strip().splitlines()[0]}
    Path(task["masks"]).write_text(json.dumps(rles))
    return times | {"masks": len(rles)}


def agreement(reference: list[dict], found: list[dict]) -> dict:
    """Count the masks of the reference with an identical mask, and with a mask of IoU 0.99 or more."""
    texts = {rle["counts"] for rle in found}
    missed = [decode_rle(rle) for rle in reference if rle["counts"] not in texts]
    masks = [decode_rle(rle) for rle in found] if missed else []
    best = [max(((mask & other).sum() / max(1, (mask | other).sum()) for other in masks), default=0) for mask in missed]
    identical = len(reference) - len(missed)
    return {"identical": identical, "agree": identical + sum(bool(iou >= 0.99) for iou in best)}


def everything(args: argparse.Namespace, task: dict, tuned: bool) -> list[dict]:
    """Run all generators, each in a separate process, and compare their masks."""
    settings = child(task | {"what": "thresholds"}, tuned, args.threads, __file__)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {who: Path(folder) / f"{who}.json" for who in choose(GENERATORS, args)}
        for who, path in paths.items():
            one = task | {"what": "everything", "who": who, "settings": settings, "masks": str(path)}
            rows.append({"who": who} | child(one, tuned, args.threads, __file__))
        reference, *others = [json.loads(path.read_text()) if path.exists() else None for path in paths.values()]
        for row, found in zip(rows[1:], others, strict=True):
            if reference is not None and found is not None:
                row.update(agreement(reference, found))
    return rows


def choose(rows: tuple[str, ...], args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(who for who in rows if args.bfloat16 or "bfloat16" not in who)


def prompts(args: argparse.Namespace, task: dict, tuned: bool) -> list[dict]:
    """Run all decoders with all numbers of prompts, each in a separate process."""
    rows = []
    for count in PROMPTS[:2] if args.quick else PROMPTS:
        for who in choose(DECODERS, args):
            one = task | {"what": "prompts", "who": who, "count": count, "repetitions": 2 if args.quick else 7}
            rows.append({"who": who, "count": count} | child(one, tuned, args.threads, __file__))
    return rows


def show_sizes(rows: list[dict]) -> None:
    for row in rows:
        height, width = row["shape"]
        print(f"    {height:4}x{width:<4} {show_times(row, rows[0], 'the largest')}", flush=True)


def show_prompts(rows: list[dict]) -> None:
    kornia = {row["count"]: row for row in rows if row["who"] == "kornia"}
    for row in rows:
        error = "" if row["who"] == "kornia" else f"   relative error of the logits {row['error']:.1e}"
        times = show_times(row, kornia[row["count"]], "kornia")
        print(f"    {row['who']:16} {row['count']:3} prompts {times}   {show_memory(row)}{error}", flush=True)


def show_everything(rows: list[dict]) -> None:
    reference = rows[0]
    for row in rows:
        if "absent" in row:
            print(f"    {row['who']:16}   skipped: {row['absent']}")
            continue
        same = ""
        if "agree" in row:
            same = f"   of {reference['masks']} masks {row['agree']} agree, {row['identical']} identical"
        times = show_times(row, reference, "segment-anything")
        print(f"    {row['who']:16} {times}   {show_memory(row)}   {row['masks']} masks{same}")
    sys.stdout.flush()


def show_times(row: dict, reference: dict, name: str) -> str:
    times = f"{row['s']:8.3f} s, computed {row['cpu_s']:8.3f} s"
    if "s" not in reference:
        return times
    return f"{times}   {reference['s'] / row['s']:5.2f}x {name}, computed {reference['cpu_s'] / row['cpu_s']:5.2f}x"


def show_memory(row: dict) -> str:
    return f"peak {row['peak_mb']:6.0f} MB, {row['over_mb']:6.0f} over the network"


def report(args: argparse.Namespace) -> dict:
    """Run the sections, print their tables and return the results."""
    print(f"$ python benchmarks/segmentation.py {shlex.join(sys.argv[1:])}".rstrip())
    torch.set_num_threads(args.threads)
    machine = describe_machine()
    print(f"{machine}\n", flush=True)
    variant, size = ("1m", 256) if args.quick else ("5m", 1024)
    task = {"variant": variant, "size": size, "photo": args.photo, "points_per_side": args.points_per_side}
    # The export to the engines takes most of a minute.
    rows = [row for row in ENCODERS if row[1] == "eager" or not args.quick]
    encoder = {"what": "mobile_sam", "variant": "5m", "size": size, "batch": 1, "rows": rows}
    encoder["repetitions"] = 1 if args.quick else 7
    kinds: dict[str, tuple[str, Callable, Callable]] = {
        "encoder": (
            f"Encoder, 5m at {size}",
            lambda tuned: child(encoder, tuned, args.threads, __file__),
            show_networks,
        ),
        "sizes": (
            f"Encoder, {variant}, eager, at other sizes",
            lambda tuned: child(
                task | {"what": "sizes", "repetitions": 1 if args.quick else 3}, tuned, args.threads, __file__
            ),
            show_sizes,
        ),
        "prompts": (f"Decoder at {size}", lambda tuned: prompts(args, task, tuned), show_prompts),
        "everything": (
            f"Mask generation, {variant} at {size}, {args.points_per_side}x{args.points_per_side} points",
            lambda tuned: everything(args, task, tuned),
            show_everything,
        ),
    }
    results = []
    for tuned in {"both": (False, True), "tuned": (True,), "plain": (False,)}[args.allocator]:
        for section in args.sections:
            title, run, show = kinds[section]
            print(f"{title}, allocator {'tuned' if tuned else 'default'}", flush=True)
            result = run(tuned)
            show(result)
            print(flush=True)
            results.append({"section": section, "title": title, "allocator_tuned": tuned, "result": result})
    return {"machine": vars(machine), "groups": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sections", type=lambda text: text.split(","), default=list(SECTIONS), help=f"of {','.join(SECTIONS)}"
    )
    parser.add_argument(
        "--photo", default=str(ASSETS / "photos" / "rocket.jpg"), help="default: a photo of the package"
    )
    parser.add_argument("--points-per-side", type=int, help="default: 32, or 4 with --quick")
    parser.add_argument("--quick", action="store_true", help="a small network at 256 pixels, few repetitions")
    parser.add_argument("--no-bfloat16", dest="bfloat16", action="store_false", help="skip the rows in bfloat16")
    parser.add_argument("--allocator", choices=("both", "tuned", "plain"), default="tuned")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="file to write all numbers to")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measures = {
            "mobile_sam": measure_networks,
            "sizes": measure_sizes,
            "prompts": measure_prompts,
            "thresholds": measure_thresholds,
            "everything": measure_everything,
        }
        print(json.dumps(measures[args.child["what"]](args.child)))
        return
    if set(args.sections) - set(SECTIONS):
        parser.error(f"--sections must be of {', '.join(SECTIONS)}")
    args.points_per_side = args.points_per_side or (4 if args.quick else 32)
    results = report(args)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
