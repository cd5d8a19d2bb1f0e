"""What the command line and the benchmarks measure with: the machine, its peak, a network's work, and times in turn."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "Machine",
    "as_step",
    "count_flops",
    "describe_machine",
    "interleaved",
    "matrix_peak",
]

Key = TypeVar("Key", bound=Hashable)

PACKAGES = ("torch", "kornia", "onnxruntime", "openvino", "nncf", "timm")
# What the engines choose their kernels by, as Linux names it on x86 and on ARM.
INSTRUCTIONS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimddp", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip
_CPU_SIZES = (512, 1024, 2048)  # sides of matrices: which of them is the fastest depends on the caches
_GPU_SIZES = (4096, 8192)


@dataclass(frozen=True)
class Machine:
    """Where something was measured.

    Args:
        date: the day, as ``2026-01-31``.
        architecture: such as ``x86_64``.
        processor: name of the processor, or of the GPU.
        threads: how many threads torch and the engines use.
        instructions: those of :data:`INSTRUCTIONS` that the processor has.
        versions: versions of Python and of those :data:`PACKAGES` that are installed.
        allocator: ``"tuned"`` or ``"default"``, see :func:`~kornia_tinyvit.allocator.keep_memory`.
    """

    date: str
    architecture: str
    processor: str
    threads: int
    instructions: tuple[str, ...]
    versions: dict[str, str]
    allocator: str

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        instructions = f" ({' '.join(self.instructions)})" if self.instructions else ""
        return f"{self.date}  {self.architecture} {self.processor}{instructions}, {self.threads} threads, {versions}"


def describe_machine(device: str | torch.device = "cpu", allocator_tuned: bool = False) -> Machine:
    """Describe this machine, its software and the settings of this process that decide over speed.

    Args:
        device: what is measured on.
        allocator_tuned: whether the process tuned the allocator; the variable ``MALLOC_MMAP_THRESHOLD_`` is seen.
    """
    fields = _read_cpuinfo()
    flags = fields.get("flags", fields.get("Features", "")).split()
    processor = fields.get("model name") or platform.processor() or "unknown"
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
    tuned = allocator_tuned or "MALLOC_MMAP_THRESHOLD_" in os.environ
    return Machine(
        date=str(date.today()),
        architecture=platform.machine(),
        processor=processor,
        threads=torch.get_num_threads(),
        instructions=tuple(name for name in INSTRUCTIONS if name in flags),
        versions={"Python": platform.python_version(), **_versions()},
        allocator="tuned" if tuned else "default",
    )


def _read_cpuinfo() -> dict[str, str]:
    """Return what Linux tells of the first processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def matrix_peak(dtype: torch.dtype, device: str | torch.device = "cpu") -> float | None:
    """Return what torch reaches in a product of large matrices, in GFLOP/s (for int8, 10^9 operations a second).

    A network that consisted of such products alone could not be faster, so shares of it tell what is left to gain.

    Args:
        dtype: type of the matrices. int8 adds up in int32.
        device: where to multiply, on the CPU with as many threads as torch uses.

    Returns:
        The best of some sizes and repetitions; ``None`` for int8 where torch has no fast product of it.
    """
    sizes = _CPU_SIZES if torch.device(device).type == "cpu" else _GPU_SIZES
    # Without a kernel for the machine torch multiplies int8 in a plain loop, and the larger sizes would take minutes.
    if dtype == torch.int8 and _rate(dtype, sizes[0], device) < _rate(torch.float32, sizes[0], device):
        return None
    return max(_rate(dtype, size, device) for size in sizes)


def _rate(dtype: torch.dtype, size: int, device: str | torch.device) -> float:
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        multiply(left, right)
        if left.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def count_flops(module: Callable[[Tensor], object], images: Tensor) -> int:
    """Return the floating point operations of matrix products and convolutions, two for each multiplication and sum.

    Args:
        module: a network in plain PyTorch, or its method; engines may run operators that torch does not count.
        images: images :math:`(B, C, H, W)`; the operations are those of the whole batch.
    """
    # torch counts fused attention on the CPU only in recent versions, and the products that it is made of in all.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(images)
    return int(counter.get_total_flops())


def as_step(run: Callable[[Tensor], object], images: Tensor) -> Callable[[], object]:
    """Return what runs a network on images and waits until their device has done so, for :func:`interleaved`."""

    def step() -> object:
        out = run(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return out

    return step


def interleaved(
    steps: Mapping[Key, Callable[[], object]], repetitions: int, warmup: int = 2, settle: float = 0.02
) -> dict[Key, float]:
    """Run steps in turn, so that what else the machine does meets all of them, and return the medians.

    Args:
        steps: what to measure, by name.
        repetitions: timed runs of each.
        warmup: rounds before those.
        settle: seconds to wait before each timed run, which an untimed one then precedes; 0 leaves out both. Threads
            of other runtimes wait busily for some milliseconds after their last work, which slows down whoever comes
            next, and leave the caches full of other weights.

    Returns:
        The median of each step in seconds.

    Raises:
        ValueError: if there are no repetitions.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1; got {repetitions}.")
    seconds: dict[Key, list[float]] = {name: [] for name in steps}
    for repetition in range(warmup + repetitions):
        for name, step in steps.items():
            if repetition >= warmup and settle:
                time.sleep(settle)
                step()
            start = time.perf_counter()
            step()
            if repetition >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}
