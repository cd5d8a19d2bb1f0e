"""What a network costs, and what it may cost: counted on no device, timed in the user's own engine."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.deploy.measurement import as_step, count_flops, interleaved
from kornia_tinyvit.deploy.optimization import optimize
from kornia_tinyvit.layers import MBConv, PatchEmbed, PatchMerging, TinyViTBlock
from kornia_tinyvit.model import TinyViT

__all__ = ["Bench", "Budget", "Costs", "count"]

#: Costs by name: ``parameters``, ``macs``, ``memory`` in bytes, ``latency_ms``, ``throughput`` in images a second.
Costs = dict[str, float]


@dataclass(frozen=True)
class Budget:
    """What a network may cost; any mixture of limits, each of which has to hold.

    Args:
        max_parameters: weights, the head's included.
        max_macs: multiply-accumulates for one image: half of what :mod:`torch.utils.flop_counter` counts.
        max_latency_ms: median milliseconds for one image, in the engine of a :class:`Bench`.
        min_throughput: images a second in batches, in that engine.
        max_memory: bytes of the weights and of what is held at once on the way of one image, see :func:`count`.

    Raises:
        ValueError: if there is no limit, or one is not positive.

    Example:
        >>> budget = Budget(max_parameters=1.3e6, max_macs=30e6)
        >>> budget.holds({"parameters": 1.2e6, "macs": 31e6})
        False
    """

    max_parameters: float | None = None
    max_macs: float | None = None
    max_latency_ms: float | None = None
    min_throughput: float | None = None
    max_memory: float | None = None

    def __post_init__(self) -> None:
        given = {name: limit for name, limit in vars(self).items() if limit is not None}
        wrong = [f"{name}={limit!r}" for name, limit in given.items() if not 0 < limit < math.inf]
        if not given:
            raise ValueError(f"A budget needs a limit: {', '.join(vars(self))}.")
        if wrong:
            raise ValueError(f"The limits of a budget are positive numbers; got {', '.join(wrong)}.")

    @property
    def limits(self) -> Costs:
        """The limits there are, by the name of the cost."""
        return {name[len("max_") :]: limit for name, limit in vars(self).items() if limit is not None}

    def excess(self, costs: Costs) -> float:
        """Return how far costs are beyond the limits: the sum of log(cost / limit) over those that do not hold.

        The sum lets a step be taken on any of the limits, and a factor that lowers two of them counts for both.
        """
        return sum(max(0.0, beyond) for beyond in self._beyond(costs))

    def holds(self, costs: Costs) -> bool:
        """Return whether all limits hold."""
        return self.excess(costs) == 0

    def slack(self, costs: Costs) -> float:
        """Return how much costs that hold leave of the limits: the sum of log(limit / cost) over all of them."""
        return -sum(self._beyond(costs))

    def _beyond(self, costs: Costs) -> list[float]:
        """Return log(cost / limit) of each limit; of a throughput, which is a lower limit, its negative."""
        logs = {name: math.log(costs[name] / limit) for name, limit in self.limits.items()}
        return [-log if name == "throughput" else log for name, log in logs.items()]


@dataclass(frozen=True)
class Bench:
    """How a network's speed is measured: the engine that will run it, and how it will be called.

    Args:
        engine: engine of :func:`~kornia_tinyvit.deploy.optimize`; ``"auto"`` for the fastest that is installed.
        dtype: type to compute in.
        device: where to run.
        batch_size: images at a time for the throughput; the latency is that of one image.
        repetitions: timed runs; their median counts.

    Raises:
        ValueError: if a number is not positive.
    """

    engine: str = "eager"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch_size: int = 16
    repetitions: int = 15

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.repetitions < 1:
            raise ValueError(
                f"batch_size and repetitions are at least 1; got {self.batch_size} and {self.repetitions}."
            )

    def describe(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return dataclasses.asdict(self) | {"dtype": str(self.dtype)}

    def measure(self, config: TinyViTConfig, budget: Budget) -> Costs:
        """Return what a network costs: all that is counted, and what the budget limits of what is timed.

        Args:
            config: the network; its weights do not matter and are random.
            budget: tells which times are needed.

        Raises:
            ValueError: if the engine cannot run the type here.
            ImportError: if the engine's packages are not installed.
        """
        costs = count(config, self.dtype)
        batches = {"latency_ms": 1, "throughput": self.batch_size}
        wanted = [name for name in batches if name in budget.limits]
        if not wanted:
            return costs
        network = TinyViT.from_config(config).to(self.device).eval()
        steps = {}
        for name in wanted:
            images = torch.randn(batches[name], config.in_chans, *_square(config, 1), device=self.device)
            # int8 takes the ranges of its numbers from images; which ones they are does not change the time.
            calibration = [images] if self.dtype == torch.int8 else []
            run = optimize(network, self.engine, self.dtype, example=images, calibration=calibration)
            steps[name] = as_step(run, images)
        for name, seconds in interleaved(steps, self.repetitions).items():
            costs[name] = 1000 * seconds if name == "latency_ms" else self.batch_size / seconds
        return costs


def count(config: TinyViTConfig, dtype: torch.dtype = torch.float32) -> Costs:
    """Count what a network costs on any machine, without building it.

    Args:
        config: the network; images have its ``img_size``.
        dtype: type of the weights and maps, for the memory.

    Returns:
        ``parameters``; ``macs`` for one image; and ``memory``: bytes of the weights and of the maps that plain
        PyTorch holds at once, at the worst place of the way of one image. Engines plan their memory otherwise, but
        the widest place is the same.

    Raises:
        ValueError: for MobileSAM's encoder, which is no classifier.

    Example:
        >>> costs = count(TinyViTConfig.from_variant("5m"))
        >>> round(costs["parameters"] / 1e6, 1), round(costs["macs"] / 1e9, 1)
        (5.4, 1.3)
    """
    if config.mobile_sam:
        raise ValueError("MobileSAM's encoder cannot be contracted: the search compares the accuracy of classifiers.")
    parameters = macs = maps = 0
    for part, times in _parts(config):
        weights, products, held = _count_part(part)
        parameters += times * weights
        macs += times * products
        maps = max(maps, held)
    scale = dtype.itemsize
    return {"parameters": parameters, "macs": macs, "memory": scale * parameters + scale * maps // 4}


_Part = tuple[Any, ...]  # class, its arguments, shape of its input


def _parts(config: TinyViTConfig) -> Iterator[tuple[_Part, int]]:
    """Yield what the network is made of, and how often: a search meets the same blocks again and again."""
    activation, images = config.activation, (1, config.in_chans, *_square(config, 1))
    yield (PatchEmbed, (config.in_chans, config.embed_dims[0], activation), images), 1
    for stage, (dim, depth) in enumerate(zip(config.embed_dims, config.depths, strict=True)):
        shape = (1, dim, *_square(config, config.stage_strides[stage]))
        if stage == 0:
            yield (MBConv, (dim, config.mbconv_expand_ratio, activation), shape), depth
        else:
            heads, window = config.num_heads[stage], config.window_sizes[stage]
            settings = (dim, heads, window, config.mlp_ratio, 0.0, 0.0, config.local_conv_size, activation)
            yield (TinyViTBlock, settings, shape), depth
        if stage + 1 < len(config.depths):
            yield (PatchMerging, (dim, config.embed_dims[stage + 1], 2, activation), shape), 1
    yield (nn.LayerNorm, (config.embed_dims[-1],), (1, config.embed_dims[-1])), 1
    if config.num_classes:
        yield (nn.Linear, (config.embed_dims[-1], config.num_classes), (1, config.embed_dims[-1])), 1


def _square(config: TinyViTConfig, stride: int) -> tuple[int, int]:
    side = -(-config.img_size // stride)
    return side, side


@functools.lru_cache(maxsize=4096)
def _count_part(part: _Part) -> tuple[int, int, int]:
    """Return weights, multiply-accumulates and the bytes of float32 maps held at once."""
    kind, arguments, shape = part
    with torch.device("meta"):
        module, images = kind(*arguments).eval(), torch.empty(shape)
    flops = count_flops(module, images)
    with torch.no_grad(), _LiveBytes(images) as live:
        module(images)
    return sum(parameter.numel() for parameter in module.parameters()), flops // 2, live.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of an input and of all tensors that are made inside the block, until they are freed.

    Attributes:
        peak: the most there were at a time.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.live = WeakSet(_storages(images))
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A view of what was there before the block, such as a weight, is not new.
        self.live |= _storages(out) - _storages(args)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.live))
        return out


def _storages(values: Any) -> set[torch.UntypedStorage]:
    return {each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor)}
