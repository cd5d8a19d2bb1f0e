"""The steps a search can take: a network contracted, or given back, in one factor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, repeat, takewhile
from typing import Any

from kornia_tinyvit.config import NUM_STAGES, TinyViTConfig

__all__ = ["SearchSpace", "contractions", "expansions", "smallest"]

# What may be smaller than in the parent, and what may be another altogether since no weight depends on it.
_CONTRACTED = ("embed_dims", "depths", "num_heads", "window_sizes", "mbconv_expand_ratio", "mlp_ratio")
_FREE = ("img_size", "drop_rate", "drop_path_rate", "use_checkpoint")
_STAGED = ("embed_dims", "depths", "window_sizes")
_FACTORS = [f"{name}[{stage}]" for stage in range(NUM_STAGES) for name in _STAGED]
_FACTORS.remove("window_sizes[0]")  # the first stage has no windows
_FACTORS += ["mbconv_expand_ratio", "mlp_ratio"]


@dataclass(frozen=True)
class SearchSpace:
    """How far each factor of a network may be contracted, and in which steps.

    The factors are those of arXiv:2207.10666, section 3.2: width and depth of each stage, window of each attention
    stage, expansion of the MBConv blocks and of the MLPs. Widths change by whole heads of unchanged width, in the
    convolutional stage by half of that; windows go to the next smaller size that tiles the stage's map.

    Args:
        min_depth: fewest blocks of a stage.
        min_window: smallest window in tokens.
        ratio_step: step of the two expansions.
        min_ratio: smallest expansion.

    Raises:
        ValueError: if a number is out of its range.
    """

    min_depth: int = 1
    min_window: int = 2
    ratio_step: float = 0.5
    min_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_depth", "min_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)!r}.")
        for name in ("ratio_step", "min_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)!r}.")


def contractions(config: TinyViTConfig, space: SearchSpace) -> dict[str, Iterator[TinyViTConfig]]:
    """Return the neighbors of a network: for each factor, the network contracted by one step, two steps and so on.

    Args:
        config: the network.
        space: how far to go.

    Returns:
        Lazily made configurations by the factor's name, such as ``"embed_dims[2]"`` or ``"mlp_ratio"``.

    Example:
        >>> found = contractions(TinyViTConfig.from_variant("5m"), SearchSpace())
        >>> [each.embed_dims for each in found["embed_dims[3]"]][:2]
        [(64, 128, 160, 288), (64, 128, 160, 256)]
    """
    return {factor: map(partial(_with, config, factor), _less(config, factor, space)) for factor in _FACTORS}


def expansions(config: TinyViTConfig, within: TinyViTConfig, space: SearchSpace) -> dict[str, Iterator[TinyViTConfig]]:
    """Return the neighbors on the way back: for each factor, the network with one step of it more, two and so on.

    Args:
        config: the network.
        within: the network it was contracted from, which none outgrows.
        space: tells the step of the two expansion ratios.

    Returns:
        Configurations by the factor's name, as :func:`contractions` has them; none for a factor whose value no number
        of contractions leads to.

    Example:
        >>> contracted = TinyViTConfig.from_variant("5m").replace(mlp_ratio=3.0, depths=(2, 2, 4, 2))
        >>> found = expansions(contracted, TinyViTConfig.from_variant("5m"), SearchSpace())
        >>> {name: len(list(chain)) for name, chain in found.items() if name in ("depths[2]", "mlp_ratio")}
        {'depths[2]': 2, 'mlp_ratio': 2}
    """
    # What may not be contracted so far may still be given back.
    further = dataclasses.replace(space, min_depth=1, min_window=1, min_ratio=space.ratio_step)
    found: dict[str, Iterator[TinyViTConfig]] = {}
    for factor in _FACTORS:
        most, now = _value(within, factor), _value(config, factor)
        values = [most, *_less(_with(config, factor, most), factor, further)]
        back = reversed(values[: values.index(now)] if now in values else [])
        found[factor] = map(partial(_with, config, factor), back)
    return found


def smallest(config: TinyViTConfig, space: SearchSpace) -> TinyViTConfig:
    """Return the network with every factor contracted as far as it goes."""
    for factor in _FACTORS:
        for least in _less(config, factor, space):
            config = _with(config, factor, least)
    return config


def read_factor(factor: str) -> tuple[str, int | None]:
    """Return the field that a factor's name tells, and the stage, if it is of one."""
    name, _, stage = factor.rstrip("]").partition("[")
    return name, int(stage) if stage else None


def check_contracted(config: TinyViTConfig, parent: TinyViTConfig) -> None:
    """Refuse a network that is not its parent with less of some factors.

    Raises:
        ValueError: if it is larger in some way, or differs in what is no factor and what weights depend on.
    """
    if parent.mobile_sam or config.mobile_sam:
        raise ValueError("MobileSAM's encoder cannot be contracted; give a classifier.")
    others = [
        name
        for name in parent.__dataclass_fields__
        if name not in (*_CONTRACTED, *_FREE) and getattr(parent, name) != getattr(config, name)
    ]
    if others:
        raise ValueError(f"A contracted network has its parent's {', '.join(others)}; the configuration has others.")
    for name in _CONTRACTED:
        most, wanted = _numbers(parent, name), _numbers(config, name)
        if any(more < less for more, less in zip(most, wanted, strict=True)):
            raise ValueError(f"{name} can only become smaller; the parent has {most}, the configuration {wanted}.")
    for stage in range(1, NUM_STAGES):
        widths = [each.embed_dims[stage] // each.num_heads[stage] for each in (parent, config)]
        if widths[0] != widths[1]:
            raise ValueError(f"The heads of stage {stage} are {widths[0]} wide and stay so; got {widths[1]}.")


def _numbers(config: TinyViTConfig, name: str) -> tuple[float, ...]:
    """Return a factor, of the stages where it means something."""
    value = getattr(config, name)
    if name in ("num_heads", "window_sizes"):  # the first stage ignores its entry
        return tuple(value[1:])
    return value if isinstance(value, tuple) else (value,)


def _value(config: TinyViTConfig, factor: str) -> Any:
    name, stage = read_factor(factor)
    value = getattr(config, name)
    return value if stage is None else value[stage]


def _with(config: TinyViTConfig, factor: str, value: Any) -> TinyViTConfig:
    """Return a network with another value of a factor; heads stay as wide as they are."""
    name, stage = read_factor(factor)
    if stage is None:
        return config.replace(**{name: value})
    changed = {name: value}
    if name == "embed_dims":
        # The network ignores the first entry; it is kept at what the published configurations say.
        changed["num_heads"] = max(1, value // _head_width(config, stage))
    fields = {field: list(getattr(config, field)) for field in changed}
    for field, number in changed.items():
        fields[field][stage] = number
    return config.replace(**fields)


def _less(config: TinyViTConfig, factor: str, space: SearchSpace) -> Iterator[float]:
    """Yield the values that a factor can be contracted to, the next first."""
    name, stage = read_factor(factor)
    value = _value(config, factor)
    if stage is None:
        ratios = accumulate(repeat(-space.ratio_step), initial=value)
        return takewhile(lambda ratio: ratio >= space.min_ratio, islice(ratios, 1, None))
    if name == "depths":
        return iter(range(value - 1, space.min_depth - 1, -1))
    if name == "window_sizes":  # those that need no padding
        side = -(-config.img_size // config.stage_strides[stage])
        return (size for size in range(min(value - 1, side), space.min_window - 1, -1) if side % size == 0)
    # Of the first stage, which has no heads, half as many channels go as a head of the second has.
    head = _head_width(config, stage)
    step = head if stage else max(2, head // 2)
    return iter(range(value - step, step - 1, -step))


def _head_width(config: TinyViTConfig, stage: int) -> int:
    """Return the channels of a head, for the first stage those of the second's."""
    return config.embed_dims[max(stage, 1)] // config.num_heads[max(stage, 1)]
