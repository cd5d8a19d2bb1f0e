"""Compare the speed of this checkout with another one: networks in eager mode, MobileSAM and imports.

    python benchmarks/against.py OTHER                # 20 rounds, about 20 minutes on 2 cores
    python benchmarks/against.py OTHER --only "batch 1"

OTHER is the root of another checkout, such as a clone at the previous commit. Each checkout has one process for all
rounds, which builds the networks of its `eager.py` and `segmentation.py`. A round runs each step in both, at least once
and for half a second, in alternating order; each import runs in a new process. The ratio is computed per round, the
other's time over ours, because the speed of the machine may drift; above 1 this checkout is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

IMPORTS = ("kornia_tinyvit", "kornia_tinyvit.cli")
MIN_SECONDS = 0.5  # a step is repeated for this time in each round, and the median is used
HERE = Path(__file__).resolve().parents[1]


def build_steps() -> dict[str, Callable[[], object]]:
    """Return the steps to time, from the benchmarks of the checkout that this process imports."""
    import eager
    import segmentation
    import torch

    steps = {}
    for variant in ("5m", "11m", "21m"):
        network = eager.build("ours", variant)
        for batch in (1, 16):
            steps[f"eager {variant}, batch {batch}"] = eager.forward_step(network, torch.rand(batch, 3, 224, 224))
    small = eager.build("ours", "5m", img_size=64, window_sizes="fit")
    steps["eager 5m, training step at 64"] = eager.training_step(small, torch.rand(16, 3, 64, 64))
    task = {"variant": "5m", "size": 1024, "photo": str(segmentation.ASSETS / "photos" / "rocket.jpg")}
    sam, generator = segmentation.build(task), segmentation.build(task | {"variant": "1m", "size": 512})
    embedding = sam.embed(task["photo"])
    steps["segmentation, embed a photo at 1024"] = lambda: sam.embed(task["photo"])
    for count in (1, 16, 64):
        points = torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(1)) * 400
        steps[f"segmentation, {count} prompts"] = lambda points=points: sam.predict_masks(embedding, points)
    settings = {"points_per_side": 12, "pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1.0}
    steps["segmentation, everything, 144 points at 512"] = lambda: generator.generate_masks(task["photo"], **settings)
    return steps


def serve() -> None:
    """Read names of steps from standard input, run them and print their seconds."""
    import torch

    steps = build_steps()
    print(json.dumps(list(steps)), flush=True)
    for line in sys.stdin:
        seconds: list[float] = []
        with torch.no_grad() if "training" not in line else torch.enable_grad():
            while sum(seconds) < MIN_SECONDS:
                start = time.perf_counter()
                steps[line.rstrip("\n")]()
                seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds), flush=True)


class Side:
    """One checkout and its process."""

    def __init__(self, root: Path) -> None:
        paths = [str(root), str(root / "benchmarks")]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(HERE / "benchmarks" / "against.py"), "--serve"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, text=True)
        self.steps: list[str] = json.loads(self.process.stdout.readline())

    def time(self, step: str) -> float:
        """Return the seconds of a step."""
        if step.startswith("import "):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", step], env=self.environment, check=True)
            return time.perf_counter() - start
        self.process.stdin.write(step + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="only steps whose names contain this")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        # The folder of this script comes first otherwise, and with it this checkout's benchmarks.
        sys.path.remove(str(HERE / "benchmarks"))
        sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
        serve()
        return
    from kornia_tinyvit.deploy.measurement import describe_machine

    ours, other = Side(HERE), Side(args.other.resolve())
    steps = [*ours.steps, *(f"import {module}" for module in IMPORTS)]
    times: dict[str, list[tuple[float, float]]] = {step: [] for step in steps if args.only in step}
    for number in range(args.rounds + 1):
        for step, pairs in times.items():
            pair = {side: side.time(step) for side in ((ours, other) if number % 2 else (other, ours))}
            if number:  # the first round is the warm-up
                pairs.append((pair[ours], pair[other]))
    print(f"$ python benchmarks/against.py OTHER --rounds {args.rounds}" + f" --only {args.only!r}" * bool(args.only))
    print(describe_machine())
    print(f"\nMedians of {args.rounds} rounds, and the median ratio of the rounds, other over ours")
    for step, pairs in times.items():
        mine, theirs = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"  {step:44} ours {mine:8.1f} ms   other {theirs:8.1f} ms   ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
