"""Compare deployed networks of this package, kornia and timm in the same engines.

    python benchmarks/deploy.py --photos FOLDER --data FILE.parquet     # all sections; FOLDER with JPEG photos
    python benchmarks/deploy.py --quick --sections networks             # few repetitions

networks    each engine and type at 224, batch 1 and 16
mobile_sam  MobileSAM's encoder at 1024
photos      from file to label for 1000 JPEG photos (--photos; fewer are repeated)
accuracy    of the network in the package on labeled images (--data)

The rows of a group are interleaved in one process, with the default and the tuned memory allocator (see
docs/guides/allocator.rst); medians are reported. "over ours" is the ratio to our time in the same engine and type,
"kornia" the speedup over kornia in eager mode, "peak" the fraction of the throughput of a product of large matrices in
the same process. Weights are random, which does not affect the speed; batch norm statistics are computed from data.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import torch
from eager import build, child
from PIL import Image
from torch import Tensor, nn

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.deploy.accuracy import compare
from kornia_tinyvit.deploy.benchmark import read_images
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.deploy.graph import InferenceGraph
from kornia_tinyvit.deploy.measurement import count_flops, describe_machine, interleaved, matrix_peak
from kornia_tinyvit.deploy.openvino_core import cpu_settings, openvino_core
from kornia_tinyvit.deploy.optimization import optimize
from kornia_tinyvit.deploy.quantization import quantize_onnx, quantize_openvino
from kornia_tinyvit.images import read_pixels

SECTIONS = ("networks", "mobile_sam", "photos", "accuracy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
TYPES = {
    "eager": ("float32", "bfloat16"),
    "inductor": ("float32", "bfloat16"),
    "onnxruntime": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
}
OURS = [("ours", engine, dtype) for engine, dtypes in TYPES.items() for dtype in dtypes]
PEERS = [
    *((library, "eager", dtype) for library in ("kornia", "timm", "timm fused") for dtype in TYPES["eager"]),
    *(("timm", engine, dtype) for engine, dtypes in TYPES.items() if engine != "eager" for dtype in dtypes),
]
ENCODERS = [
    *(("ours", engine, dtype) for engine in ("eager", "openvino") for dtype in ("float32", "bfloat16")),
    *(("kornia", "eager", dtype) for dtype in ("float32", "bfloat16")),
]
Run = Callable[[Tensor], object]


def prepare(library: str, variant: str, **kwargs) -> nn.Module:
    """Build a network with batch norm statistics from random images, whose outputs depend on the input."""
    model = build(library.removesuffix(" fused"), variant, **kwargs)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.ones_(norm.weight)  # the last norm of a block is initialized to zero, which disables the block
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 224, 224) if "img_size" not in kwargs else draw_images(1, kwargs["img_size"]))
    model.eval()
    if library == "timm fused":
        from timm.utils.model import reparameterize_model

        return reparameterize_model(model)
    return model


def draw_images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def make(row: tuple[str, str, str], variant: str, images: Tensor, calibration: list[Tensor], **kwargs) -> Run:
    """Return the callable that a row measures."""
    library, engine, name = row
    dtype, model = DTYPES[name], prepare(library, variant, **kwargs)
    if library == "ours":
        return optimize(model, engine, dtype, example=images, calibration=calibration, tune_allocator=False)
    if engine == "eager":
        model = model.to(dtype)
        return torch.inference_mode()(lambda images: model(images.to(dtype)).float())
    if engine == "inductor":
        return ENGINES["inductor"](InferenceGraph(model), images, dtype)
    return exported(model, engine, dtype, images, calibration)


def exported(model: nn.Module, engine: str, dtype: torch.dtype, images: Tensor, calibration: list[Tensor]) -> Run:
    """Export by torch.onnx with a dynamic batch, and run the file with our settings and quantizers."""
    two = torch.cat([images, images])[:2]
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(model, (two,), dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False)
    proto = program.model_proto
    if engine == "onnxruntime":
        import onnxruntime

        proto = quantize_onnx(proto, calibration) if dtype == torch.int8 else proto
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images.numpy()})
    core = openvino_core()
    network = core.read_model(proto.SerializeToString())
    if dtype == torch.int8:
        network = quantize_openvino(network, calibration)
    network.reshape(list(images.shape))
    precision = "f32" if dtype == torch.float32 else "bf16"  # int8 leaves some layers in floating point, like ours
    request = core.compile_model(network, "CPU", cpu_settings(precision)).create_infer_request()
    return lambda images: request.infer({0: images.numpy()}, share_inputs=True)


def measure_networks(task: dict) -> dict:
    """Measure the rows of a group, interleaved; a row that cannot be built contains the reason."""
    size, batch = task["size"], task["batch"]
    kwargs = {"img_size": size, "mobile_sam": True} if task["what"] == "mobile_sam" else {}
    images, calibration = draw_images(batch, size), [draw_images(16, size), draw_images(16, size)] if not kwargs else []
    steps, rows = {}, []
    for row in map(tuple, task["rows"]):
        result = dict(zip(("library", "engine", "dtype"), row, strict=True))
        try:
            run = make(row, task["variant"], images, calibration, **kwargs)
            run(images)
            steps[len(rows)] = lambda run=run: run(images)
        except (ImportError, RuntimeError, ValueError) as error:
            result["absent"] = str(error).strip().splitlines()[0]
        rows.append(result)
    for index, seconds in interleaved(steps, task["repetitions"]).items():
        rows[index]["ms"] = 1000 * seconds
    flops = count_flops(prepare("ours", task["variant"], **kwargs), images)
    peaks = {name: matrix_peak(DTYPES[name]) for name in {row["dtype"] for row in rows}}
    for row in rows:
        if "ms" in row and peaks[row["dtype"]]:
            row["gflops"] = flops / row["ms"] / 1e6
            row["peak"] = row["gflops"] / peaks[row["dtype"]]
    return {"rows": rows, "peaks": peaks, "gflop": flops / 1e9}


def decode_kornia(path: Path) -> Tensor:
    """Decode with kornia-rs (libjpeg-turbo), which returns grayscale photos with one channel; those use Pillow."""
    import kornia_rs.io

    pixels = torch.from_numpy(kornia_rs.io.read_image_jpegturbo(str(path)))
    return pixels.permute(2, 0, 1) if pixels.shape[-1] == 3 else read_pixels(path)


def label_with_ours(classifier: ImageClassifier, decode: Callable[[Path], Tensor], batch: int) -> Callable:
    def label(paths: list[Path]) -> list[int]:
        photos = (decode(path).float() / 255 for path in paths)
        return [best.index for (best,) in classifier.predict(photos, top_k=1, batch_size=batch)]

    return label


class PillowPhotos(torch.utils.data.Dataset):
    """Photos read by Pillow, as usual with timm."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def label_with_timm(batch: int, workers: int) -> Callable[[list[Path]], list[int]]:
    """Return a function that labels photos with timm's network and transform, one by one or from a data loader."""
    model = prepare("timm", "5m")
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config({}, model=model))

    @torch.inference_mode()
    def label(paths: list[Path]) -> list[int]:
        dataset = PillowPhotos(paths, transform)
        if batch == 1:
            return [model(dataset[index].unsqueeze(0)).argmax(1).item() for index in range(len(dataset))]
        loader = torch.utils.data.DataLoader(dataset, batch, num_workers=workers)
        return [label for images in loader for label in model(images).argmax(1).tolist()]

    return label


def measure_photos(task: dict) -> list[dict]:
    """Measure photos per second from file to label, and of the decoders alone."""
    paths = list(islice(cycle(sorted(Path(task["folder"]).rglob("*.jpg"))), task["count"]))
    rows: dict[str, Callable | str] = {}
    decoders = {"Pillow": read_pixels, "kornia-rs": decode_kornia}
    for name, decode in decoders.items():
        rows[f"{name}: decoding alone"] = lambda paths, decode=decode: [decode(path) for path in paths]
    for batch, workers in ((1, 0), (16, 0), (16, torch.get_num_threads())):
        name = f"timm + Pillow, eager, batch {batch}" + (f", {workers} workers" if batch > 1 else "")
        try:
            rows[name] = label_with_timm(batch, workers)
        except (ImportError, RuntimeError) as error:
            rows[name] = str(error).splitlines()[0]
    classifier = ImageClassifier(prepare("ours", "5m")).eval()
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 16):
            # Inductor compiles for a minute and is not the fastest, see the networks above.
            engines = [name for name in ENGINES if name != "inductor" and not absent(name, dtype)]
            images = draw_images(batch, 224).sigmoid()
            fast = optimize(
                classifier,
                engines,
                DTYPES[dtype],
                example=images,
                calibration=[images],
                tolerance=1.0,  # accuracy is meaningless with random weights
                tune_allocator=False,
            )
            for name, decode in decoders.items():
                rows[f"ours + {name}, {fast.model.engine} {dtype}, batch {batch}"] = label_with_ours(
                    fast, decode, batch
                )
    steps = {name: (lambda run=run: run(paths)) for name, run in rows.items() if callable(run)}
    for name in steps:
        rows[name](paths[:32])
    times = interleaved(steps, 1, warmup=0, settle=0)
    return [
        {"row": name, "per_s": len(paths) / times[name]} if name in times else {"row": name, "absent": run}
        for name, run in rows.items()
    ]


def absent(engine: str, dtype: str) -> str | None:
    """Return why an engine does not support a type on this machine, or None."""
    missing = ENGINES[engine].missing()
    if missing is None and DTYPES[dtype] not in ENGINES[engine].dtypes(torch.device("cpu")):
        return f"{engine} does not support {dtype} on this machine"
    return missing


def measure_accuracy(task: dict) -> dict:
    """Evaluate each engine and type with the network in the package on labeled images."""
    classifier = ImageClassifier.from_config("1m", pretrained="cifar10").eval()
    model, found = classifier.model, read_images(classifier, task["data"], task["limit"])
    batches = list(zip(found.images.split(50), found.labels.split(50), strict=True))
    rows = []
    for engine, dtypes in TYPES.items():
        for dtype in dtypes:
            row = {"engine": engine, "dtype": dtype, "absent": absent(engine, dtype)}
            if row["absent"] is None:
                calibration = found.calibration.split(16)
                example = batches[0][0]
                fast = optimize(model, engine, DTYPES[dtype], example=example, calibration=calibration)
                agreement = compare(model, fast, batches)
                row |= {"top1": agreement.top1_candidate, "agreement": agreement.agreement}
                row |= {"error": agreement.mean_error, "reference": agreement.top1_reference}
            rows.append(row)
    return {"images": len(found.labels), "rows": rows}


def show_networks(found: dict) -> None:
    ms = {(row["library"], row["engine"], row["dtype"]): row.get("ms") for row in found["rows"]}
    kornia = ms["kornia", "eager", "float32"]
    for row in found["rows"]:
        name = f"    {row['library']:10} {row['engine']:11} {row['dtype']:8}"
        if "absent" in row:
            print(f"{name}   skipped: {row['absent']}")
            continue
        ours = ms.get(("ours", row["engine"], row["dtype"]))
        over = f"{row['ms'] / ours:4.2f}x over ours" if row["library"] != "ours" and ours else 14 * " "
        peak = f"{row['gflops']:7.0f} GFLOP/s {row['peak']:4.0%} of peak" if "peak" in row else ""
        print(f"{name} {row['ms']:9.2f} ms   {kornia / row['ms']:5.2f}x kornia   {over} {peak}")
    peaks = ", ".join(f"{name} {peak:.0f}" for name, peak in sorted(found["peaks"].items()) if peak)
    print(f"    {found['gflop']:.2f} GFLOP; GFLOP/s of large matrix products: {peaks}", flush=True)


def show_photos(rows: list[dict]) -> None:
    best = max((row["per_s"] for row in rows if row["row"].startswith("timm") and "per_s" in row), default=None)
    for row in rows:
        if "absent" in row:
            print(f"    {row['row']:44} skipped: {row['absent']}")
        else:
            over = f"   {row['per_s'] / best:5.2f}x timm's fastest" if best and "ours" in row["row"] else ""
            print(f"    {row['row']:44} {row['per_s']:7.1f} photos/s{over}", flush=True)


def show_accuracy(found: dict) -> None:
    for row in found["rows"]:
        name = f"    {row['engine']:11} {row['dtype']:8}"
        if row["absent"] is not None:
            print(f"{name}   skipped: {row['absent']}")
            continue
        change = row["top1"] - row["reference"]
        numbers = f"top-1 {row['top1']:6.2f} % ({change:+.2f})   agreement {row['agreement']:6.2f} %"
        print(f"{name} {numbers}   mean relative error {row['error']:.1e}")


def report(args: argparse.Namespace) -> dict:
    """Run the sections, each group in a separate process, print their tables and return the results."""
    print(f"$ python benchmarks/deploy.py {shlex.join(sys.argv[1:])}".rstrip())
    torch.set_num_threads(args.threads)
    machine = describe_machine()
    print(f"{machine}\n", flush=True)
    groups = []
    for tuned in {"both": (False, True), "tuned": (True,), "plain": (False,)}[args.allocator]:
        allocator = f"allocator {'tuned' if tuned else 'default'}"
        if "networks" in args.sections:
            for variant in args.variants.split(","):
                for batch, repetitions in ((1, 3 if args.quick else 40), (16, 1 if args.quick else 11)):
                    task = {"what": "networks", "variant": variant, "size": 224, "batch": batch}
                    task |= {"rows": PEERS + OURS, "repetitions": repetitions}
                    groups.append((f"{variant} at 224, batch {batch}, {allocator}", task, tuned, show_networks))
        if "mobile_sam" in args.sections:
            task = {"what": "mobile_sam", "variant": "5m", "size": 1024, "batch": 1, "rows": ENCODERS}
            task["repetitions"] = 1 if args.quick else 7
            groups.append((f"MobileSAM's encoder at 1024, batch 1, {allocator}", task, tuned, show_networks))
        if "photos" in args.sections:
            count = 32 if args.quick else 1000
            task = {"what": "photos", "folder": args.photos, "count": count}
            groups.append((f"From file to label, {count} photos, 5m at 224, {allocator}", task, tuned, show_photos))
    if "accuracy" in args.sections:
        task = {"what": "accuracy", "data": args.data, "limit": 200 if args.quick else 9700}
        groups.append(("Accuracy of the network in the package, 1m at 64", task, True, show_accuracy))
    results = []
    for title, task, tuned, show in groups:
        print(title)
        result = child(task, tuned, args.threads, __file__)
        show(result)
        print(flush=True)
        results.append({"title": title, "allocator_tuned": tuned, "result": result})
    return {"machine": vars(machine), "groups": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--variants", default="5m", help="comma-separated variants of the networks")
    parser.add_argument("--photos", help="folder of JPEG photos")
    parser.add_argument("--data", help="labeled images of CIFAR-10's classes, in a format of 'evaluate'")
    parser.add_argument("--quick", action="store_true", help="few repetitions and images")
    parser.add_argument("--allocator", choices=("both", "tuned", "plain"), default="both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="file to write all numbers to")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure = {"photos": measure_photos, "accuracy": measure_accuracy}
        print(json.dumps(measure.get(args.child["what"], measure_networks)(args.child)))
        return
    for section, option in (("photos", args.photos), ("accuracy", args.data)):
        if section in args.sections and option is None:
            parser.error(f"the section {section} requires --{'photos' if section == 'photos' else 'data'}")
    if "photos" in args.sections and not any(Path(args.photos).rglob("*.jpg")):
        parser.error(f"{args.photos} contains no .jpg files")
    if set(args.sections) - set(SECTIONS):
        parser.error(f"--sections must be of {', '.join(SECTIONS)}")
    results = report(args)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
