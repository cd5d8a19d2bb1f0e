"""Compare the time of ``import kornia_tinyvit`` with ``import kornia`` and ``import torch``.

    python benchmarks/import_time.py                  # 15 rounds, about 3 minutes on a core
    python benchmarks/import_time.py --rounds 5

Each import runs in a separate process, interleaved, after a warm-up round that reads the files into the page cache.
Reported are the medians of wall-clock time and CPU time, which depends less on other load, and the ratios to kornia.
Then follow the packages whose modules take the most time without their imports, by ``python -X importtime``.
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
TOP = 6  # packages that are listed


def time_import(module: str) -> tuple[float, float]:
    """Return the wall-clock and CPU seconds of a process that imports a module."""
    start = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-c", f"import {module}"], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"import {module} failed.")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def own_times(module: str) -> Counter[str]:
    """Return the milliseconds of the modules of each package, without their imports."""
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
    print(f"\nProcess with one import, median of {args.rounds}, ratio to kornia")
    medians = [
        [statistics.median(times) for times in zip(*column, strict=True)] for column in zip(*rounds, strict=True)
    ]
    kornia = medians[IMPORTS.index("kornia")]
    for module, (wall, processor) in zip(IMPORTS, medians, strict=True):
        label = "nothing" if module == "sys" else module
        print(
            f"  {label:20} wall {wall * 1e3:7.0f} ms ({wall / kornia[0]:.2f}x)   "
            f"CPU {processor * 1e3:7.0f} ms ({processor / kornia[1]:.2f}x)"
        )
    print("\nTime of modules without their imports, by package, ms (one process with -X importtime)")
    theirs, ours = own_times("kornia"), own_times("kornia_tinyvit")
    for name, each in ours.most_common(TOP):
        print(f"  {name:22} import kornia {theirs[name]:7.0f}   import kornia_tinyvit {each:7.0f}")


if __name__ == "__main__":
    main()
