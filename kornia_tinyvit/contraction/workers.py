"""Evaluations of candidates, in several processes that end with the search."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.model import TinyViT

__all__ = ["Evaluate"]

#: From a configuration and the trained network it was contracted from (``None`` where there is none) to its accuracy,
#: and, where it trained one, the network that the next contractions start from.
Evaluate = Callable[[TinyViTConfig, TinyViT | None], float | tuple[float, TinyViT]]


@contextmanager
def open_workers(processes: int) -> Iterator[Executor | None]:
    """Give so many processes, which share the threads and end with this one however it ends; ``None`` for one."""
    if processes == 1:
        yield None
        return
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads, CUDA and the search's lock
    with ProcessPoolExecutor(processes, context, _begin_worker, (threads,)) as pool:
        yield pool


def run_evaluations(
    workers: Executor | None, evaluate: Evaluate, files: dict[TinyViTConfig, Path], parent: Path | None
) -> Iterator[tuple[TinyViTConfig, dict[str, Any]]]:
    """Evaluate networks, and yield what was found in the order in which the evaluations end.

    Args:
        workers: of :func:`open_workers`.
        evaluate: tells the accuracy of a network; with several processes it is pickled.
        files: the networks, and where each one's weights go if its evaluation trains it.
        parent: the weights that all of them start from.

    Raises:
        ValueError: if an accuracy is no number, or a trained network another one.
    """
    if workers is None:
        yield from ((config, _evaluate(evaluate, config, parent, file)) for config, file in files.items())
        return
    running = {workers.submit(_evaluate, evaluate, config, parent, file): config for config, file in files.items()}
    try:
        for done in as_completed(running):
            yield running[done], done.result()
    finally:
        for future in running:
            future.cancel()


def _evaluate(evaluate: Evaluate, config: TinyViTConfig, parent: Path | None, file: Path) -> dict[str, Any]:
    """Evaluate a network in this process; what it trained is written to a file."""
    began = time.perf_counter()
    found = evaluate(config, None if parent is None else TinyViT.from_config(pretrained=parent))
    accuracy, network = found if isinstance(found, tuple) else (found, None)
    if not math.isfinite(accuracy):
        raise ValueError(f"The evaluation of {config} said {accuracy!r}; expected a finite number.")
    if network is not None:
        if network.config != config:
            raise ValueError(f"The evaluation was asked about {config} and returned the network {network.config}.")
        save_checkpoint(network, file)
    seconds = round(time.perf_counter() - began, 3)
    return {"accuracy": float(accuracy), "trained": network is not None, "seconds": seconds}


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
