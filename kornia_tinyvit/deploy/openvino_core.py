"""One OpenVINO core per process, without telemetry and thread pinning."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import openvino

__all__ = ["cpu_settings", "openvino_core", "shared_core", "without_telemetry"]


@functools.cache
def openvino_core() -> openvino.Core:
    """Return the only core of the process, which is never destroyed.

    On processors with matrix units, a core enlarges the signal stack of the thread that loads its CPU plugin, and
    restores the previous one on destruction. If cores are not destroyed in reverse order of creation, the thread is
    left with a freed stack, and the next signal with a Python handler, such as the exit of a data loader's worker,
    crashes the process with a segmentation fault.

    Raises:
        ImportError: if OpenVINO is not installed.
    """
    with without_telemetry():
        import openvino
    return openvino.Core()


def cpu_settings(precision: str) -> dict[str, Any]:
    """Return compilation settings for low latency with ``torch.get_num_threads()`` threads.

    CPU pinning is off: OpenVINO counts processors from the first one in each process, which would pin the single
    threads of two processes, such as the workers of a server, to the same processor.

    Args:
        precision: ``"f32"`` or ``"bf16"``.
    """
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }


@contextlib.contextmanager
def shared_core() -> Iterator[None]:
    """Let code in the block that creates an ``openvino.Core``, such as nncf, use :func:`openvino_core` instead."""
    import openvino

    core, original = openvino_core(), openvino.Core
    openvino.Core = lambda: core
    try:
        yield
    finally:
        openvino.Core = original


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Disable the telemetry of openvino and nncf, for the block that imports them first.

    Otherwise they report their use to Intel on import and write an identifier to ``~/intel``. The first import in the
    process decides.
    """
    switches = {"CI": "true", "NNCF_CI": "1"}
    before = {name: os.environ[name] for name in switches if name in os.environ}
    os.environ.update(switches)
    try:
        yield
    finally:
        for name in switches:
            del os.environ[name]
        os.environ.update(before)
