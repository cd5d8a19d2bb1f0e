"""Evaluations of candidates, optionally in several processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.model import TinyViT

__all__ = ["Evaluate"]

#: Evaluation: maps a configuration and the trained network it was contracted from (or ``None``) to the accuracy, and
#: optionally the trained network, which the next contractions inherit from.
Evaluate = Callable[[TinyViTConfig, TinyViT | None], float | tuple[float, TinyViT]]


def open_workers(processes: int) -> AbstractContextManager[Executor | None]:
    """Open a pool of processes that share the threads of this one and exit with it; ``None`` for one process."""
    if processes == 1:
        return nullcontext()
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")  # fork would inherit threads, CUDA and the search's lock
    return ProcessPoolExecutor(processes, context, _init_worker, (threads,))


def run_evaluations(
    workers: Executor | None, evaluate: Evaluate, files: dict[TinyViTConfig, Path], parent: Path | None
) -> Iterator[tuple[TinyViTConfig, dict[str, Any]]]:
    """Evaluate networks and yield their results in order of completion.

    Args:
        workers: see :func:`open_workers`.
        evaluate: the evaluation; with several processes it is pickled.
        files: the networks and the files for their trained weights.
        parent: file of the weights that all of them inherit from.

    Raises:
        ValueError: if an accuracy is not finite, or a trained network has another configuration.
    """
    if workers is None:
        yield from ((config, _evaluate(evaluate, config, parent, file)) for config, file in files.items())
        return
    running = {workers.submit(_evaluate, evaluate, config, parent, file): config for config, file in files.items()}
    try:
        for done in as_completed(running):
            yield running[done], done.result()
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGINT)  # the trainings save their states, see interruption.py
        raise
    finally:
        for future in running:
            future.cancel()


def _evaluate(evaluate: Evaluate, config: TinyViTConfig, parent: Path | None, file: Path) -> dict[str, Any]:
    """Evaluate a network in this process and write its trained weights to a file."""
    began = time.perf_counter()
    found = evaluate(config, None if parent is None else TinyViT.from_config(pretrained=parent))
    accuracy, network = found if isinstance(found, tuple) else (found, None)
    if not math.isfinite(accuracy):
        raise ValueError(f"The evaluation of {config} returned {accuracy!r}; expected a finite number.")
    if network is not None:
        if network.config != config:
            raise ValueError(f"The evaluation of {config} returned the network {network.config}.")
        save_checkpoint(network, file)
    seconds = round(time.perf_counter() - began, 3)
    return {"accuracy": float(accuracy), "trained": network is not None, "seconds": seconds}


def _init_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
