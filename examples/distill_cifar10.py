"""Compare training on labels, with the teacher in every step, and on stored soft labels, on CIFAR-10 with three seeds.

    python examples/cifar10_teacher.py DATA --out runs/teacher.safetensors
    python examples/distill_cifar10.py DATA --out runs/distill

Students of variant `1m` are trained with the same images, augmentation, order, number of steps and initial weights. The
teacher's top-5 labels are stored once for all seeds. Every training is a process of the command line, whose CPU time
and peak memory are measured by the system. Finished trainings are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

KINDS = ("labels", "online", "stored")
TEACHER = str(Path(__file__).with_name("cifar10_teacher.py")) + ":build"


def run(command: list[str], record: Path) -> dict:
    """Run a command of kornia-tinyvit and return its result, CPU seconds and peak memory."""
    known = json.loads(record.read_text()) if record.exists() else {}
    if known.get("command") == command:
        return known
    process = subprocess.Popen(
        [sys.executable, "-m", "kornia_tinyvit", *command, "--json"], stdout=subprocess.PIPE, text=True
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    result = json.loads(output.splitlines()[-1])
    result |= {"command": command, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}
    record.write_text(json.dumps(result))
    return result


def student(kind: str, seed: int, args: argparse.Namespace, store: Path) -> dict:
    """Train a student and evaluate it on the test images."""
    out = args.out / f"{kind}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    source = {"labels": ["train"], "online": ["distill", "train"], "stored": ["distill", "train"]}[kind]
    data = [str(args.data / "train.parquet"), *([str(store)] if kind == "stored" else [])]
    teacher = ["--teacher", args.teacher] if kind == "online" else []
    fixed = ["--variant", "1m", "--init-seed", str(seed), "--workers", "0", "--out", str(out), *common(args)]
    trained = run([*source, *data, *teacher, *fixed, "--batch-size", str(args.batch_size)], out / "trained.json")
    weights = ["--weights", str(out / "last.safetensors"), "--img-size", str(args.img_size)]
    tested = run(["evaluate", str(args.data / "test.parquet"), *weights], out / "tested.json")
    return trained | {"top1": tested["top1"]}


def common(args: argparse.Namespace) -> list[str]:
    images = ["--limit", str(args.limit), "--recipe", args.recipe]
    return [*images, "--epochs", str(args.epochs), "--img-size", str(args.img_size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--limit", type=int, default=10_000, help="size of a random training subset with a fixed seed")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher", default=TEACHER)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    store = args.out / "store"
    saving = [
        "distill",
        "save",
        str(args.data / "train.parquet"),
        str(store),
        "--teacher",
        args.teacher,
        "--top-k",
        "5",
    ]
    saved = run([*saving, "--workers", "0", *common(args)], args.out / "saved.json")
    print(f"stored {saved['records']} records, {saved['bytes'] / 1e6:.1f} MB, {saved['cpu_s']:.0f} s", flush=True)
    results: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for seed in args.seeds:
        for kind in KINDS:
            result = student(kind, seed, args, store)
            results[kind].append(result)
            numbers = f"top-1 {result['top1']:.2f} %, {result['cpu_s'] / args.epochs:.1f} s per epoch"
            print(f"{kind:>7} seed {seed}: {numbers}, peak {result['peak_mb']:.0f} MB", flush=True)
    print(f"\n{'':>7}  top-1 mean (spread)  s per epoch   peak MB")
    for kind, rows in results.items():
        top1 = [row["top1"] for row in rows]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        seconds = statistics.median(row["cpu_s"] for row in rows) / args.epochs
        memory = statistics.median(row["peak_mb"] for row in rows)
        print(f"{kind:>7}  {statistics.mean(top1):6.2f} ({spread:.2f})        {seconds:8.1f}   {memory:8.0f}")


if __name__ == "__main__":
    main()
