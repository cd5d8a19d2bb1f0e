"""Costs of a network, counted or timed, and the budget that limits them."""

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

#: Costs by name: ``parameters``, ``macs``, ``memory`` in bytes, ``latency_ms``, ``throughput`` in images per second.
Costs = dict[str, float]


@dataclass(frozen=True)
class Budget:
    """Limits of a network's costs, any combination of which must hold.

    Args:
        max_parameters: number of parameters, including the head.
        max_macs: multiply-accumulates for one image: half of the count of :mod:`torch.utils.flop_counter`.
        max_latency_ms: median milliseconds for one image in the engine of a :class:`Bench`.
        min_throughput: images per second in batches, in that engine.
        max_memory: bytes of the parameters and of the feature maps of one image, see :func:`count`.

    Raises:
        ValueError: if no limit is given, or one is not positive.

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
        if not given or not all(0 < limit < math.inf for limit in given.values()):
            raise ValueError(f"A budget needs positive limits ({', '.join(vars(self))}); got {given}.")

    @property
    def limits(self) -> Costs:
        """The given limits by name of the cost."""
        return {name[len("max_") :]: limit for name, limit in vars(self).items() if limit is not None}

    def excess(self, costs: Costs) -> float:
        """Return by how much costs exceed the limits: the sum of log(cost / limit) over the exceeded limits.

        A search step can therefore lower any of the exceeded costs, and a factor that lowers two counts for both.

        Args:
            costs: costs of a network.
        """
        return sum(max(0.0, ratio) for ratio in self._log_ratios(costs))

    def holds(self, costs: Costs) -> bool:
        """Return whether all limits hold."""
        return self.excess(costs) == 0

    def slack(self, costs: Costs) -> float:
        """Return how much of the limits is unused, if all hold: the sum of log(limit / cost)."""
        return -sum(self._log_ratios(costs))

    def _log_ratios(self, costs: Costs) -> list[float]:
        """Return log(cost / limit) of each limit; of a throughput, which is a lower limit, the negative."""
        logs = {name: math.log(costs[name] / limit) for name, limit in self.limits.items()}
        return [-log if name == "throughput" else log for name, log in logs.items()]


@dataclass(frozen=True)
class Bench:
    """Settings of latency and throughput measurements: the engine and how it is called.

    Args:
        engine: engine of :func:`~kornia_tinyvit.deploy.optimize`; ``"auto"`` for the fastest installed one.
        dtype: dtype to compute in.
        device: device to run on.
        batch_size: batch size of the throughput; the latency is measured with one image.
        repetitions: timed runs, of which the median is used.

    Raises:
        ValueError: if ``batch_size`` or ``repetitions`` is less than 1.
    """

    engine: str = "eager"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch_size: int = 16
    repetitions: int = 15

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.repetitions < 1:
            raise ValueError(f"batch_size and repetitions must be positive; got {self.batch_size}, {self.repetitions}.")

    def describe(self) -> dict[str, Any]:
        """Return the fields in JSON-compatible types."""
        return dataclasses.asdict(self) | {"dtype": str(self.dtype)}

    def measure(self, config: TinyViTConfig, budget: Budget) -> Costs:
        """Return all counted costs of a network, and those measured costs that the budget limits.

        Args:
            config: the network, which is built with random weights.
            budget: the budget.

        Raises:
            ValueError: if the engine does not support the dtype on this machine.
            ImportError: if the engine's packages are not installed.
        """
        costs = count(config, self.dtype)
        batches = {"latency_ms": 1, "throughput": self.batch_size}
        timed = [name for name in batches if name in budget.limits]
        if not timed:
            return costs
        network = TinyViT.from_config(config).to(self.device).eval()
        steps = {}
        for name in timed:
            images = torch.randn(batches[name], config.in_chans, config.img_size, config.img_size, device=self.device)
            # The calibration images do not affect the latency.
            calibration = [images] if self.dtype == torch.int8 else []
            run = optimize(network, self.engine, self.dtype, example=images, calibration=calibration)
            steps[name] = as_step(run, images)
        for name, seconds in interleaved(steps, self.repetitions).items():
            costs[name] = 1000 * seconds if name == "latency_ms" else self.batch_size / seconds
        return costs


def count(config: TinyViTConfig, dtype: torch.dtype = torch.float32) -> Costs:
    """Count the costs of a network without building it.

    Args:
        config: the network; images have its ``img_size``.
        dtype: dtype of the parameters and feature maps, for the memory.

    Returns:
        ``parameters``; ``macs`` for one image; and ``memory``: bytes of the parameters and the peak of all feature maps
        in memory during the forward pass of one image in eager PyTorch. Engines plan their memory differently, but
        peak at the same layer.

    Raises:
        ValueError: for MobileSAM's encoder, which is not a classifier.

    Example:
        >>> costs = count(TinyViTConfig.from_variant("5m"))
        >>> round(costs["parameters"] / 1e6, 1), round(costs["macs"] / 1e9, 1)
        (5.4, 1.3)
    """
    if config.mobile_sam:
        raise ValueError("MobileSAM's encoder cannot be contracted: the search compares the accuracy of classifiers.")
    counted = [(times, *_count_layer(layer)) for layer, times in _layers(config)]
    parameters = sum(times * weights for times, weights, _, _ in counted)
    macs = sum(times * products for times, _, products, _ in counted)
    peak = max(held for *_, held in counted)
    memory = dtype.itemsize * parameters + dtype.itemsize * peak // 4
    return {"parameters": parameters, "macs": macs, "memory": memory}


_Layer = tuple[Any, ...]  # class, its arguments, shape of its input


def _layers(config: TinyViTConfig) -> Iterator[tuple[_Layer, int]]:
    """Yield the layers of a network and how often they occur; a search counts most of them many times."""
    activation, images = config.activation, (1, config.in_chans, config.img_size, config.img_size)
    yield (PatchEmbed, (config.in_chans, config.embed_dims[0], activation), images), 1
    for stage, (dim, depth) in enumerate(zip(config.embed_dims, config.depths, strict=True)):
        side = -(-config.img_size // config.stage_strides[stage])
        shape = (1, dim, side, side)
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


@functools.lru_cache(maxsize=4096)
def _count_layer(layer: _Layer) -> tuple[int, int, int]:
    """Return the parameters, multiply-accumulates and peak bytes of float32 feature maps of a layer."""
    kind, arguments, shape = layer
    with torch.device("meta"):
        module, images = kind(*arguments).eval(), torch.empty(shape)
    with torch.no_grad(), _LiveBytes(images) as live:
        module(images)
    return sum(parameter.numel() for parameter in module.parameters()), count_flops(module, images) // 2, live.peak


class _LiveBytes(TorchDispatchMode):
    """Tracks the storages of an input and of all tensors that are created in the block, until they are freed.

    Attributes:
        peak: the maximum number of bytes at a time.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.live = WeakSet(_storages(images))
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Views of existing tensors, such as parameters, are not new.
        self.live |= _storages(out) - _storages(args)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.live))
        return out


def _storages(values: Any) -> set[torch.UntypedStorage]:
    return {each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor)}
