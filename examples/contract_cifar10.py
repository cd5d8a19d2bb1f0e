"""Search a network with at most 1.3M parameters and 30M multiply-accumulates for CIFAR-10, and compare it with `1m`.

    python examples/contract_cifar10.py DATA --out runs/contract

The `5m` is trained at 64x64 pixels for a few epochs and contracted on a proxy split of the training images: every
candidate inherits its parent's weights and is trained for a short time. The result is refined by trades within the
budget, with longer training from random weights. Finally the winner and the hand-designed `1m` are trained from random
weights in the same way and evaluated on the test images. DATA is a folder with `train.parquet` and `test.parquet` in
the Hugging Face layout. All steps run on the command line; run the script again to resume.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from kornia_tinyvit import TinyViT, TinyViTConfig, save_checkpoint
from kornia_tinyvit.contraction import count

IMG_SIZE = 64
CLASSES = 10
# The published windows of 7 and 14 do not divide feature maps of 8, 4 and 2 cells and would mostly attend to padding:
# the search starts with windows over the whole feature maps, like those of `1m`.
WINDOWS = (8, 8, 4, 2)
BUDGET = ("--max-parameters", "1.3M", "--max-macs", "30M")
DROP_PATH = 0.05  # that of the recipe for `1m`, for both networks


def run(*command: object, processes: int = 1) -> dict:
    """Run a command of kornia-tinyvit, distributed over processes, and return its result."""
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    words = [sys.executable, *map(str, launch), "-m", "kornia_tinyvit", *map(str, command), "--json"]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def recipe(batch_size: int) -> list[object]:
    return ["--recipe", "cifar10", "--img-size", IMG_SIZE, "--batch-size", batch_size]


def limited(args: argparse.Namespace) -> list[object]:
    return [] if args.limit is None else ["--limit", args.limit]


def train_seed(args: argparse.Namespace) -> str:
    """Train the seed network of the search, whose weights define the importance of its channels and blocks."""
    file = args.out / "untrained.safetensors"
    torch.manual_seed(0)
    save_checkpoint(TinyViT.from_config("5m", img_size=IMG_SIZE, num_classes=CLASSES, window_sizes=WINDOWS), file)
    options = ["--variant", file, *recipe(args.batch_size), "--base-lr", args.search_lr, "--epochs", args.seed_epochs]
    place = ["--workers", args.workers, "--out", args.out / "seed"]
    return run("train", args.data / "train.parquet", *options, *place, processes=args.processes)["last"]


def search(seed: str, args: argparse.Namespace) -> dict:
    proxy = ["--epochs", args.proxy_epochs, "--limit", args.proxy_images, "--hold-out", args.hold_out]
    options = ["--variant", seed, "--weights", seed, *BUDGET, *proxy, *recipe(args.proxy_batch_size)]
    steps = ["--steps", args.steps, "--min-depth", args.min_depth, "--processes", args.processes, "--seed", 0]
    rate = ["--base-lr", args.search_lr]
    return run("contract", args.data / "train.parquet", *options, *rate, *steps, "--out", args.out / "search")


def refine(seed: str, winner: str, args: argparse.Namespace) -> dict:
    trades = ["--refine", winner, "--rounds", args.rounds, "--candidates", args.candidates]
    proxy = ["--epochs", args.trade_epochs, "--hold-out", args.trade_hold_out, *recipe(args.proxy_batch_size)]
    options = ["--variant", seed, *BUDGET, "--min-depth", args.min_depth, "--processes", args.processes, "--seed", 0]
    place = [*limited(args), "--out", args.out / "refined"]
    return run("contract", args.data / "train.parquet", *trades, *options, *proxy, *place)


def show(result: dict) -> None:
    for step in result["path"]:
        parameters, macs = (step["costs"][name] / 1e6 for name in ("parameters", "macs"))
        numbers = f"{parameters:.2f}M parameters, {macs:.1f}M MACs, {step['accuracy']:.2f} %"
        print(f"{step['factor'] or 'start':>32}: {numbers}", flush=True)
    print(f"{result['evaluated']} candidates trained\n")


def train(name: str, variant: str, args: argparse.Namespace, seed: int) -> float:
    """Train a network with the recipe and return its top-1 on the test images in percent."""
    out = args.out / f"{name}-{seed}"
    length = ["--epochs", args.epochs, *limited(args), "--workers", args.workers]
    options = ["--variant", variant, *recipe(args.batch_size), *length, "--init-seed", seed, "--out", out]
    run("train", args.data / "train.parquet", *options)
    return run("evaluate", args.data / "test.parquet", "--weights", out / "last.safetensors")["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/contract"))
    parser.add_argument("--seed-epochs", type=int, default=3, help="training epochs of the seed network")
    # With the recipe's 8e-3, which is for networks of the size of `1m`, the seed diverged in its second epoch.
    parser.add_argument("--search-lr", type=float, default=3e-3, help="base learning rate of seed and candidates")
    parser.add_argument("--steps", type=int, default=12, help="steps of the search")
    parser.add_argument("--min-depth", type=int, default=1, help="minimum number of blocks per stage")
    parser.add_argument("--proxy-images", type=int, default=12_500)
    parser.add_argument("--proxy-epochs", type=int, default=1)
    # Half the recipe's batch size, for twice as many steps on the same images.
    parser.add_argument("--proxy-batch-size", type=int, default=64)
    parser.add_argument("--hold-out", type=float, default=0.2, help="fraction of those for evaluation")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of trades")
    parser.add_argument("--candidates", type=int, default=6, help="networks evaluated per round of trades")
    parser.add_argument("--trade-epochs", type=int, default=2, help="on all but the held-out training images")
    parser.add_argument("--trade-hold-out", type=float, default=0.1)
    parser.add_argument("--processes", type=int, default=1, help="networks that are trained at a time")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of the final training")
    parser.add_argument("--limit", type=int, default=None, help="training images of the final training and of trades")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.processes)))

    seed = train_seed(args)
    result = search(seed, args)
    show(result)
    result = refine(seed, result["winner"], args)
    show(result)

    winner = TinyViT.from_config(pretrained=result["winner"], drop_path_rate=DROP_PATH)
    file = save_checkpoint(winner, args.out / "winner.safetensors")
    networks = {
        "1m": ("1m", TinyViTConfig.from_variant("1m", num_classes=CLASSES)),
        "contracted": (str(file), winner.config),
    }
    print(f"{'network':>10}  parameters       MACs  top-1 mean (spread)")
    for name, (variant, config) in networks.items():
        costs = count(config)
        with ThreadPoolExecutor(args.processes) as pool:
            top1 = list(pool.map(partial(train, name, variant, args), args.seeds))
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        numbers = f"{costs['parameters']:10,}  {costs['macs']:9,.0f}  {statistics.mean(top1):6.2f} ({spread:.2f})"
        print(f"{name:>10}  {numbers}", flush=True)
    print(winner.config)


if __name__ == "__main__":
    main()
