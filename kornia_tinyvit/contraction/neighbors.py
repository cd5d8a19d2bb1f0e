"""Steps of a search: contract or expand a network in one factor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, repeat, takewhile
from typing import Any

import numpy as np

from kornia_tinyvit.config import NUM_STAGES, TinyViTConfig

__all__ = ["SearchSpace", "contractions", "expansions", "smallest"]

# Fields that may be smaller than in the parent, and fields that may differ since no weight depends on them.
_CONTRACTED = ("embed_dims", "depths", "num_heads", "window_sizes", "mbconv_expand_ratio", "mlp_ratio")
_FREE = ("img_size", "drop_rate", "drop_path_rate", "use_checkpoint")
_FACTORS = [f"{name}[{stage}]" for stage in range(NUM_STAGES) for name in ("embed_dims", "depths", "window_sizes")]
_FACTORS.remove("window_sizes[0]")  # the first stage has no windows
_FACTORS += ["mbconv_expand_ratio", "mlp_ratio"]


@dataclass(frozen=True)
class SearchSpace:
    """Limits and step sizes of the factors of a network.

    The factors are those of arXiv:2207.10666, section 3.2: width and depth of each stage, window size of each attention
    stage, expansion ratios of the MBConv blocks and of the MLPs. Widths change by whole heads of constant width, in the
    convolutional stage by half of that; window sizes change to the next smaller divisor of the feature map's side.

    Args:
        min_depth: minimum number of blocks per stage.
        min_window: minimum window size in tokens.
        ratio_step: step of the two expansion ratios.
        min_ratio: minimum expansion ratio.

    Raises:
        ValueError: if ``min_depth`` or ``min_window`` is less than 1, or a ratio is not positive.
    """

    min_depth: int = 1
    min_window: int = 2
    ratio_step: float = 0.5
    min_ratio: float = 1.0

    def __post_init__(self) -> None:
        if min(self.min_depth, self.min_window) < 1 or not min(self.ratio_step, self.min_ratio) > 0:
            raise ValueError(f"min_depth and min_window must be >= 1, ratio_step and min_ratio > 0; got {self}.")


def contractions(config: TinyViTConfig, space: SearchSpace) -> dict[str, Iterator[TinyViTConfig]]:
    """Return the contractions of a network: for each factor, the network with one step less of it, two steps and so on.

    Args:
        config: the network.
        space: limits and step sizes.

    Returns:
        Iterators over configurations by name of the factor, such as ``"embed_dims[2]"`` or ``"mlp_ratio"``.

    Example:
        >>> found = contractions(TinyViTConfig.from_variant("5m"), SearchSpace())
        >>> [each.embed_dims for each in found["embed_dims[3]"]][:2]
        [(64, 128, 160, 288), (64, 128, 160, 256)]
    """
    return {factor: map(partial(_with, config, factor), _less(config, factor, space)) for factor in _FACTORS}


def expansions(config: TinyViTConfig, within: TinyViTConfig, space: SearchSpace) -> dict[str, Iterator[TinyViTConfig]]:
    """Return the expansions of a network: for each factor, the network with one step more of it, two steps and so on.

    Args:
        config: the network.
        within: the network it was contracted from, whose factors are the maxima.
        space: step sizes.

    Returns:
        Iterators over configurations by name of the factor; empty for a factor whose value is not a whole number of
        steps below the maximum.

    Example:
        >>> contracted = TinyViTConfig.from_variant("5m").replace(mlp_ratio=3.0, depths=(2, 2, 4, 2))
        >>> found = expansions(contracted, TinyViTConfig.from_variant("5m"), SearchSpace())
        >>> {name: len(list(chain)) for name, chain in found.items() if name in ("depths[2]", "mlp_ratio")}
        {'depths[2]': 2, 'mlp_ratio': 2}
    """
    # The minima apply to contractions only: a network below them can still be expanded.
    further = dataclasses.replace(space, min_depth=1, min_window=1, min_ratio=space.ratio_step)
    found: dict[str, Iterator[TinyViTConfig]] = {}
    for factor in _FACTORS:
        most, now = _value(within, factor), _value(config, factor)
        values = [most, *_less(_with(config, factor, most), factor, further)]
        back = reversed(values[: values.index(now)] if now in values else [])
        found[factor] = map(partial(_with, config, factor), back)
    return found


def smallest(config: TinyViTConfig, space: SearchSpace) -> TinyViTConfig:
    """Return the network with every factor contracted to its minimum.

    Args:
        config: configuration of the network.
        space: the search space, which sets the minimums.
    """
    for factor in _FACTORS:
        for least in _less(config, factor, space):
            config = _with(config, factor, least)
    return config


def read_factor(factor: str) -> tuple[str, int | None]:
    """Return the field and the stage of a factor's name; the stage is ``None`` for the expansion ratios."""
    name, _, stage = factor.rstrip("]").partition("[")
    return name, int(stage) if stage else None


def check_contracted(config: TinyViTConfig, parent: TinyViTConfig) -> None:
    """Raise an error if a configuration is not a contraction of its parent.

    Raises:
        ValueError: if a factor is larger than the parent's, or another field that weights depend on differs.
    """
    if parent.mobile_sam or config.mobile_sam:
        raise ValueError("MobileSAM's encoder cannot be contracted; give a classifier.")
    fixed = vars(parent).keys() - {*_CONTRACTED, *_FREE}
    others = sorted(name for name in fixed if getattr(parent, name) != getattr(config, name))
    if others:
        raise ValueError(f"A contracted network must keep its parent's {', '.join(others)}; the configuration differs.")
    for name in _CONTRACTED:
        unused = 1 if name in ("num_heads", "window_sizes") else 0  # the first stage has no attention
        most, given = (np.atleast_1d(getattr(each, name))[unused:] for each in (parent, config))
        if (given > most).any():
            raise ValueError(f"{name} can only become smaller; the parent has {most}, the configuration {given}.")
    for stage in range(1, NUM_STAGES):
        widths = [_head_width(each, stage) for each in (parent, config)]
        if widths[0] != widths[1]:
            raise ValueError(f"Heads of stage {stage} must keep their width of {widths[0]}; got {widths[1]}.")


def _value(config: TinyViTConfig, factor: str) -> Any:
    name, stage = read_factor(factor)
    value = getattr(config, name)
    return value if stage is None else value[stage]


def _with(config: TinyViTConfig, factor: str, value: Any) -> TinyViTConfig:
    """Return a network with another value of a factor and the same width of heads."""
    name, stage = read_factor(factor)
    if stage is None:
        return config.replace(**{name: value})
    changed = {name: value}
    if name == "embed_dims":
        # The network ignores the first entry; the published configurations have it.
        changed["num_heads"] = max(1, value // _head_width(config, stage))
    fields = {field: list(getattr(config, field)) for field in changed}
    for field, number in changed.items():
        fields[field][stage] = number
    return config.replace(**fields)


def _less(config: TinyViTConfig, factor: str, space: SearchSpace) -> Iterator[float]:
    """Yield the values that a factor can be contracted to, in descending order."""
    name, stage = read_factor(factor)
    value = _value(config, factor)
    if stage is None:
        ratios = accumulate(repeat(-space.ratio_step), initial=value)
        return takewhile(lambda ratio: ratio >= space.min_ratio, islice(ratios, 1, None))
    if name == "depths":
        return iter(range(value - 1, space.min_depth - 1, -1))
    if name == "window_sizes":  # sizes without padding
        side = -(-config.img_size // config.stage_strides[stage])
        return (size for size in range(min(value - 1, side), space.min_window - 1, -1) if side % size == 0)
    # The first stage has no heads; its step is half the head width of the second.
    head = _head_width(config, stage)
    step = head if stage else max(2, head // 2)
    return iter(range(value - step, step - 1, -step))


def _head_width(config: TinyViTConfig, stage: int) -> int:
    """Return the width of a head; for the first stage, of the second's."""
    return config.embed_dims[max(stage, 1)] // config.num_heads[max(stage, 1)]
