"""Compare this package's, kornia's and timm's TinyViT in eager mode.

    python benchmarks/eager.py                 # the full table, about 12 minutes on 2 cores
    python benchmarks/eager.py --quick         # 5m only, fewer repetitions

All networks of a comparison take the same images, have the same weights if their layouts allow, and are interleaved.
Reported are medians and their ratios, with the default and the tuned memory allocator (docs/guides/allocator.rst), each
in a separate process. Peak memory is the increase of the resident set over that of the loaded network during forward
passes, measured in one process per network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch

from kornia_tinyvit.deploy.measurement import describe_machine, interleaved

TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def build(library: str, variant: str, **kwargs) -> torch.nn.Module:
    """Return a network of a library in evaluation mode."""
    torch.manual_seed(0)
    if library == "kornia":
        from kornia.models.tiny_vit import TinyViT as KorniaTinyViT

        return KorniaTinyViT.from_config(variant, **kwargs).eval()
    if library == "timm":
        import timm

        return timm.create_model(f"tiny_vit_{variant}_224", num_classes=1000).eval()
    from kornia_tinyvit import TinyViT

    return TinyViT.from_config(variant, **kwargs).eval()


def libraries() -> tuple[list[str], list[str]]:
    """Return the available libraries, and a message for each that is missing."""
    present, absent = ["ours", "kornia"], []
    try:
        import timm  # noqa: F401

        present.append("timm")
    except (ImportError, RuntimeError) as error:  # timm imports torchvision, which may not fit this torch
        absent.append(f"timm is skipped: {str(error).splitlines()[0]}")
    return present, absent


def medians(steps: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Return the median of each step in milliseconds. All steps use torch's threads, so no pauses are needed."""
    return {name: 1000 * seconds for name, seconds in interleaved(steps, repetitions, settle=0).items()}


def forward_step(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode():
            return model(images)

    return step


def training_step(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    labels = torch.arange(len(images))
    model.train()

    def step() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    return step


def compare_forward(variants: list[str], names: list[str], quick: bool) -> list[dict]:
    rows = []
    for variant in variants:
        models = {name: build(name, variant) for name in names}
        if "kornia" in models:
            models["ours"].load_state_dict(models["kornia"].state_dict())
        for batch, repetitions in ((1, 15 if quick else 40), (16, 5 if quick else 11)):
            images = torch.rand(batch, 3, 224, 224)
            times = medians({name: forward_step(model, images) for name, model in models.items()}, repetitions)
            rows.append({"variant": variant, "batch": batch, "ms": times})
    return rows


def compare_small(quick: bool) -> list[dict]:
    """Compare windows cropped to the feature map with padding on small images."""
    rows = []
    for size in (32, 64):
        for kind, make in (("forward", forward_step), ("training step", training_step)):
            steps = {}
            for name, windows in (("fit", "fit"), ("padded", None)):
                model = build("ours", "5m", img_size=size, window_sizes=windows)
                steps[name] = make(model, torch.rand(16, 3, size, size))
            steps["kornia"] = make(build("kornia", "5m", img_size=size), torch.rand(16, 3, size, size))
            rows.append({"size": size, "kind": kind, "ms": medians(steps, 5 if quick else 11)})
    return rows


def peak_memory(library: str, variant: str, batch: int) -> float:
    """Return the increase of the resident set during forward passes over that of the loaded network, in MB."""
    model, images = build(library, variant), torch.rand(batch, 3, 224, 224)
    torch.nn.Conv2d(3, 8, 3)(torch.rand(1, 3, 16, 16))  # load torch's libraries first, which are not counted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = status("VmRSS")
    for _ in range(3):
        forward_step(model, images)()
    return status("VmHWM") - before


def status(field: str) -> float:
    """Return a memory field of this process in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def child(task: dict, tuned: bool, threads: int, script: str = __file__) -> object:
    """Run a task of a script in a separate process and return its result."""
    environment = {key: value for key, value in os.environ.items() if key not in TUNED}
    environment |= {"OMP_NUM_THREADS": str(threads)} | (TUNED if tuned else {})
    command = [sys.executable, "-W", "ignore", script, "--child", json.dumps(task)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_child(task: dict) -> object:
    if task["what"] == "memory":
        return peak_memory(task["library"], task["variant"], task["batch"])
    if task["what"] == "small":
        return compare_small(task["quick"])
    return compare_forward(task["variants"], task["names"], task["quick"])


def report(variants: list[str], quick: bool, threads: int) -> None:
    names, absent = libraries()
    machine = describe_machine()
    versions = " ".join(f"{name} {machine.versions[name]}" for name in ("torch", "kornia", *names[2:]))
    print(
        f"{machine.date}  {machine.architecture} {machine.processor}, {threads} threads, "
        f"{versions}, Python {machine.versions['Python']}"
    )
    print("\n".join(absent))
    for tuned in (False, True):
        print(f"\nAllocator {'tuned' if tuned else 'default'}: forward at 224, float32, median ms (ratio to ours)")
        for variant in variants:
            rows = child({"what": "forward", "variants": [variant], "names": names, "quick": quick}, tuned, threads)
            for row in rows:
                ours = row["ms"]["ours"]
                cells = [f"{name} {ms:7.1f} ({ms / ours:4.2f}x)" for name, ms in row["ms"].items()]
                print(f"  {row['variant']:>4} batch {row['batch']:2}   " + "   ".join(cells), flush=True)
        print("5m on small images, batch 16, median ms; images per second; ratio of padded to fit")
        for row in child({"what": "small", "quick": quick}, tuned, threads):
            times = row["ms"]
            cells = [f"{name} {ms:7.1f} ms {16000 / ms:6.0f}/s" for name, ms in times.items()]
            print(
                f"  {row['size']} px {row['kind']:13}   " + "   ".join(cells),
                f"  {times['padded'] / times['fit']:4.2f}x",
            )
    print("\nAllocator default: peak memory of forward passes at 224, MB over the loaded network")
    for variant in variants:
        for batch in (1, 16):
            task = {"what": "memory", "variant": variant, "batch": batch}
            peaks = {name: child(task | {"library": name}, False, threads) for name in names}
            cells = [f"{name} {peak:7.0f}" for name, peak in peaks.items()]
            print(f"  {variant:>4} batch {batch:2}   " + "   ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5m only, fewer repetitions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(args.child)))
    else:
        report(["5m"] if args.quick else ["5m", "11m", "21m"], args.quick, args.threads)


if __name__ == "__main__":
    main()
