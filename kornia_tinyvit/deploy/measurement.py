"""Measurements for the command line and the benchmarks: hardware and software, peak performance, FLOPs and latency."""

from __future__ import annotations

import contextlib
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

__all__ = ["Machine", "as_step", "count_flops", "describe_machine", "interleaved", "matrix_peak"]

Key = TypeVar("Key", bound=Hashable)

PACKAGES = ("torch", "kornia", "onnxruntime", "openvino", "nncf", "timm")
# Instruction sets that decide which kernels the engines use, by their names in Linux on x86 and ARM.
INSTRUCTIONS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimddp", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip
_CPU_SIZES = (512, 1024, 2048)  # matrix sizes: the caches decide which is the fastest
_GPU_SIZES = (4096, 8192)


@dataclass(frozen=True)
class Machine:
    """Hardware and software of a measurement.

    Args:
        date: the date in ISO format.
        architecture: such as ``x86_64``.
        processor: name of the processor, or of the GPU.
        threads: number of threads of torch and the engines.
        instructions: those of :data:`INSTRUCTIONS` that the processor has.
        versions: versions of Python and of the installed ones of :data:`PACKAGES`.
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
    """Describe this machine, its software and the settings of this process that affect performance.

    Args:
        device: the measured device.
        allocator_tuned: whether the process tuned the allocator; the environment variable ``MALLOC_MMAP_THRESHOLD_``
            also counts as tuned.

    Returns:
        The description.
    """
    fields = _read_cpuinfo()
    flags = fields.get("flags", fields.get("Features", "")).split()
    processor = fields.get("model name") or platform.processor() or "unknown"
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return Machine(
        date=str(date.today()),
        architecture=platform.machine(),
        processor=processor,
        threads=torch.get_num_threads(),
        instructions=tuple(name for name in INSTRUCTIONS if name in flags),
        versions=versions,
        allocator="tuned" if allocator_tuned or "MALLOC_MMAP_THRESHOLD_" in os.environ else "default",
    )


def _read_cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in ``/proc/cpuinfo``; an empty dictionary on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def matrix_peak(dtype: torch.dtype, device: str | torch.device = "cpu") -> float | None:
    """Measure the performance of torch's products of large matrices, an upper bound for the network's.

    Args:
        dtype: dtype of the matrices; int8 accumulates in int32.
        device: the device; a CPU uses ``torch.get_num_threads()`` threads.

    Returns:
        The best of several sizes and repetitions in GFLOP/s (for int8, 10^9 operations per second); ``None`` for int8
        where torch has no fast kernel.
    """
    sizes = _CPU_SIZES if torch.device(device).type == "cpu" else _GPU_SIZES
    # Without a kernel for the processor torch multiplies int8 in a naive loop, which takes minutes at larger sizes.
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
    """Count the floating-point operations of matrix products and convolutions; a multiply-accumulate counts as two.

    Args:
        module: a network in plain PyTorch, or its method; torch does not count the custom operators of engines.
        images: images :math:`(B, C, H, W)`; the result is for the whole batch.

    Returns:
        The number of operations.
    """
    # Only recent versions of torch count fused attention on the CPU; the math backend is counted by all.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(images)
    return int(counter.get_total_flops())


def as_step(run: Callable[[Tensor], object], images: Tensor) -> Callable[[], object]:
    """Return a function for :func:`interleaved` that runs a network on images and synchronizes their device.

    Args:
        run: function of images.
        images: images :math:`(B, C, H, W)`.
    """

    def step() -> object:
        out = run(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return out

    return step


def interleaved(
    steps: Mapping[Key, Callable[[], object]], repetitions: int, warmup: int = 2, settle: float = 0.02
) -> dict[Key, float]:
    """Time functions in turn, which spreads disturbances by other processes evenly over them.

    Args:
        steps: the functions by name.
        repetitions: timed runs of each.
        warmup: untimed rounds before those.
        settle: seconds to wait before each timed run, followed by an untimed run; 0 disables both. The threads of some
            runtimes spin for milliseconds after a run, and their weights replace the next function's in the caches.

    Returns:
        The median time of each function in seconds.

    Raises:
        ValueError: if ``repetitions`` is less than 1.
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
