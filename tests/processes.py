"""Child processes of tests, from a fork server that has imported torch: they start in milliseconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([
    "accelerate", "tests.checkpoints.test_loading", "tests.distillation.test_saving", "tests.distillation.test_store",
    "tests.helpers", "tests.training.test_loop", "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard",
])  # fmt: skip


def start(target: Callable[..., None], *args: Any) -> multiprocessing.Process:
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    return process
