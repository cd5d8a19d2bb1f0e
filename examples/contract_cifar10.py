"""Find a network of at most 1.3M parameters and 30M multiply-accumulates for CIFAR-10, and put it beside the `1m`.

    python examples/contract_cifar10.py DATA --out runs/contract

The search contracts the `5m` at 64x64 pixels on a proxy split of the training pictures: every candidate starts from
what is left of its parent's weights and is trained for a few epochs. Then the winner and the hand-made `1m` get the
same training from random weights, and the test pictures decide. DATA is a folder with `train.parquet` and
`test.parquet` in the Hugging Face layout. Everything is a process of the command line; what is done is not done again
when the same command is given after a stop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from kornia_tinyvit import TinyViT, TinyViTConfig, save_checkpoint
from kornia_tinyvit.contraction import count

IMG_SIZE = 64
CLASSES = 10
BUDGET = ("--max-parameters", "1.3M", "--max-macs", "30M")
DROP_PATH = 0.05  # of the recipe's training of `1m`, for both


def run(*command: object) -> dict:
    """Run a command of kornia-tinyvit and return what it told."""
    words = [sys.executable, "-m", "kornia_tinyvit", *map(str, command), "--json"]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def search(args: argparse.Namespace) -> dict:
    out = args.out / "search"
    proxy = ["--epochs", args.proxy_epochs, "--limit", args.proxy_pictures, "--hold-out", args.hold_out]
    sizes = ["--recipe", "cifar10", "--img-size", IMG_SIZE, "--batch-size", args.batch_size]
    options = ["--variant", "5m", *BUDGET, *proxy, *sizes, "--steps", args.steps, "--processes", args.processes]
    return run("contract", args.data / "train.parquet", *options, "--seed", 0, "--out", out)


def train(name: str, variant: str, seed: int, args: argparse.Namespace) -> float:
    """Train a network as the recipe says, and return its top-1 on the test pictures in per cent."""
    out = args.out / f"{name}-{seed}"
    sizes = ["--recipe", "cifar10", "--img-size", IMG_SIZE, "--batch-size", args.batch_size, "--epochs", args.epochs]
    limit = [] if args.limit is None else ["--limit", args.limit]
    options = ["--variant", variant, *sizes, *limit, "--workers", args.workers, "--init-seed", seed, "--out", out]
    run("train", args.data / "train.parquet", *options)
    return run("evaluate", args.data / "test.parquet", "--pretrained", out / "last.safetensors")["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/contract"))
    parser.add_argument("--steps", type=int, default=16, help="steps of the search")
    parser.add_argument("--proxy-pictures", type=int, default=20_000)
    parser.add_argument("--proxy-epochs", type=int, default=2)
    parser.add_argument("--hold-out", type=float, default=0.1, help="share of those that candidates are measured on")
    parser.add_argument("--processes", type=int, default=1, help="candidates that are trained at a time")
    parser.add_argument("--epochs", type=int, default=30, help="of the final trainings")
    parser.add_argument("--limit", type=int, default=None, help="training pictures of those; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    found = search(args)
    for step in found["path"]:
        size, work = (step["costs"][name] / 1e6 for name in ("parameters", "macs"))
        told = f"{size:.2f}M parameters, {work:.1f}M MACs, {step['accuracy']:.2f} %"
        print(f"{step['factor'] or 'seed':>20}: {told}", flush=True)
    print(f"{found['evaluated']} candidates trained")

    winner = TinyViT.from_config(pretrained=found["winner"], drop_path_rate=DROP_PATH)
    file = save_checkpoint(winner, args.out / "winner.safetensors")
    networks = {
        "1m": ("1m", TinyViTConfig.from_variant("1m", num_classes=CLASSES)),
        "contracted": (str(file), winner.config),
    }
    print(f"\n{'network':>10}  parameters       MACs  top-1 mean (spread)")
    for name, (variant, config) in networks.items():
        costs = count(config)
        top1 = [train(name, variant, seed, args) for seed in args.seeds]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        numbers = f"{costs['parameters']:10,}  {costs['macs']:9,.0f}  {statistics.mean(top1):6.2f} ({spread:.2f})"
        print(f"{name:>10}  {numbers}", flush=True)
    print(winner.config)


if __name__ == "__main__":
    main()
