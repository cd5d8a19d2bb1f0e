"""Measure networks in eager mode with the default and the tuned memory allocator, in one process.

    python benchmarks/allocator.py

For kornia's TinyViT and ours, 5m at 224: median milliseconds and page faults of a forward pass, before and after
`keep_memory`. The process must start with glibc's default settings.
"""

from __future__ import annotations

import resource

import torch
from eager import build, forward_step

from kornia_tinyvit.allocator import keep_memory
from kornia_tinyvit.deploy.measurement import describe_machine, interleaved


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure() -> dict[str, tuple[float, float]]:
    """Return milliseconds and page faults of a forward pass of each network."""
    found = {}
    for library in ("kornia", "ours"):
        for batch, repetitions in ((1, 30), (16, 9)):
            step = forward_step(build(library, "5m"), torch.rand(batch, 3, 224, 224))
            step()
            before = page_faults()
            for _ in range(3):
                step()
            faults = (page_faults() - before) / 3
            found[f"{library:6} batch {batch:2}"] = 1000 * interleaved({0: step}, repetitions, settle=0)[0], faults
    return found


def main() -> None:
    print("$ python benchmarks/allocator.py")
    print(describe_machine())
    print("\n                  default                       after keep_memory()")
    plain = measure()
    if not keep_memory():
        raise SystemExit("keep_memory() has no effect without glibc.")
    for name, (ms, faults) in measure().items():
        before, faults_before = plain[name]
        print(
            f"{name}   {before:7.1f} ms {faults_before:8.0f} faults   {ms:7.1f} ms {faults:8.0f} faults"
            f"   {before / ms:4.2f}x"
        )


if __name__ == "__main__":
    main()
