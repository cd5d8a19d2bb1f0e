"""How long ``import kornia_tinyvit`` takes beside ``import kornia`` and ``import torch``.

    python benchmarks/import_time.py                  # 15 rounds, about 3 minutes on a core
    python benchmarks/import_time.py --rounds 5

Every import is a process of its own; the imports of a round run in turn, after a round that brings the files into the
page cache. Reported are the medians of wall-clock and of processor time, the latter being what a busy machine changes
least, and the ratios to kornia. Below stand the packages whose modules take the most time of their own, without what
they import in turn, as ``python -X importtime`` tells.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter

from kornia_tinyvit.deploy.measurement import describe_machine

IMPORTS = ("sys", "torch", "kornia", "kornia_tinyvit", "kornia_tinyvit.cli")
FIRST = 6  # packages that are listed


def time_import(module: str) -> tuple[float, float]:
    """Return the seconds of a process that imports a module: wall-clock and processor."""
    start = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-c", f"import {module}"], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"import {module} failed.")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def own_times(module: str) -> Counter[str]:
    """Return the milliseconds that the modules of each package take of their own."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    times: Counter[str] = Counter()
    for own, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", log):
        top = name.split(".")[0]
        times["the standard library" if top in sys.stdlib_module_names else top] += int(own) / 1000
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rounds = [[time_import(module) for module in IMPORTS] for _ in range(args.rounds + 1)][1:]
    print(f"$ python {' '.join(sys.argv)}")
    print(describe_machine())
    print(f"load average at the end {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print(f"\nA process that imports, median of {args.rounds}, and its ratio to kornia's")
    medians = [
        [statistics.median(times) for times in zip(*column, strict=True)] for column in zip(*rounds, strict=True)
    ]
    kornia = medians[IMPORTS.index("kornia")]
    for module, (wall, processor) in zip(IMPORTS, medians, strict=True):
        label = "nothing" if module == "sys" else module
        print(
            f"  {label:20} wall {wall * 1e3:7.0f} ms ({wall / kornia[0]:.2f}x)   "
            f"processor {processor * 1e3:7.0f} ms ({processor / kornia[1]:.2f}x)"
        )
    print("\nTime of the packages' own modules, ms (one process under -X importtime)")
    theirs, ours = own_times("kornia"), own_times("kornia_tinyvit")
    for name, each in ours.most_common(FIRST):
        print(f"  {name:22} import kornia {theirs[name]:7.0f}   import kornia_tinyvit {each:7.0f}")


if __name__ == "__main__":
    main()
