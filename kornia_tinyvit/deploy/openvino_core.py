"""OpenVINO, loaded so that it harms nothing else in the process."""

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
    """Return the process's only core, which is never given up.

    On processors with matrix units a core gives the thread that loads its CPU plugin a larger stack for signal
    handlers, and puts the former one back when it ends. Cores that do not end in the reverse order of their beginning
    leave the thread with a stack that is no longer there, and the next signal with a handler in Python, such as that of
    a data loader's worker that ends, kills the process with a segmentation fault.

    Raises:
        ImportError: if OpenVINO is not installed.
    """
    with without_telemetry():
        import openvino
    return openvino.Core()


def cpu_settings(precision: str) -> dict[str, Any]:
    """Return how a network is compiled for few images at a time: ``"f32"`` or ``"bf16"``, on PyTorch's threads.

    OpenVINO would bind its threads to processors, counted from the first one in each process: two processes of one
    thread, such as a server's workers, would share one processor and leave the others idle.
    """
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }


@contextlib.contextmanager
def shared_core() -> Iterator[None]:
    """Let code in here that asks OpenVINO for a core of its own, as nncf does, have :func:`openvino_core`."""
    import openvino

    core, own = openvino_core(), openvino.Core
    openvino.Core = lambda: core
    try:
        yield
    finally:
        openvino.Core = own


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Import openvino or nncf in here, and they do not report their use to Intel.

    Otherwise they do so at their import, without asking, and write an identification into ``~/intel``. What they find
    when they are first imported holds for the process.
    """
    switches = {"CI": "true", "NNCF_CI": "1"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
