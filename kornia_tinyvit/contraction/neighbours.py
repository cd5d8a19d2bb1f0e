"""The steps a search can take: a network contracted, or given back, in one factor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from kornia_tinyvit.config import NUM_STAGES, TinyViTConfig

__all__ = ["Space", "contractions", "expansions", "smallest"]

# What may be smaller than in the parent, and what may be another altogether since no weight depends on it.
_CONTRACTED = ("embed_dims", "depths", "num_heads", "window_sizes", "mbconv_expand_ratio", "mlp_ratio")
_FREE = ("img_size", "drop_rate", "drop_path_rate", "use_checkpoint")


@dataclass(frozen=True)
class Space:
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


_Step = Callable[[TinyViTConfig], TinyViTConfig | None]


def contractions(config: TinyViTConfig, space: Space) -> dict[str, Iterator[TinyViTConfig]]:
    """Return the neighbours of a network: for each factor, the network contracted by one step, two steps and so on.

    Args:
        config: the network.
        space: how far to go.

    Returns:
        Lazily made configurations by the factor's name, such as ``"embed_dims[2]"`` or ``"mlp_ratio"``.

    Example:
        >>> found = contractions(TinyViTConfig.from_variant("5m"), Space())
        >>> [each.embed_dims for each in found["embed_dims[3]"]][:2]
        [(64, 128, 160, 288), (64, 128, 160, 256)]
    """
    return {name: _repeat(config, step) for name, step in _steps(space).items()}


def expansions(config: TinyViTConfig, within: TinyViTConfig, space: Space) -> dict[str, Iterator[TinyViTConfig]]:
    """Return the neighbours on the way back: for each factor, the network with one step of it more, two and so on.

    Args:
        config: the network.
        within: the network it was contracted from, which none outgrows.
        space: tells the step of the two expansion ratios.

    Returns:
        Configurations by the factor's name, as :func:`contractions` has them; none for a factor whose value no number
        of contractions leads to.

    Example:
        >>> contracted = TinyViTConfig.from_variant("5m").replace(mlp_ratio=3.0, depths=(2, 2, 4, 2))
        >>> found = expansions(contracted, TinyViTConfig.from_variant("5m"), Space())
        >>> {name: len(list(chain)) for name, chain in found.items() if name in ("depths[2]", "mlp_ratio")}
        {'depths[2]': 2, 'mlp_ratio': 2}
    """
    # What may not be contracted so far may still be given back.
    further = dataclasses.replace(space, min_depth=1, min_window=1, min_ratio=space.ratio_step)
    return {name: _way_back(config, _restore(name, config, within), step) for name, step in _steps(further).items()}


def smallest(config: TinyViTConfig, space: Space) -> TinyViTConfig:
    """Return the network with every factor contracted as far as it goes."""
    for step in _steps(space).values():
        for further in _repeat(config, step):
            config = further
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


def _repeat(config: TinyViTConfig, step: _Step) -> Iterator[TinyViTConfig]:
    further = step(config)
    while further is not None:
        yield further
        further = step(further)


def _way_back(config: TinyViTConfig, whole: TinyViTConfig, step: _Step) -> Iterator[TinyViTConfig]:
    """Yield the networks between one and that with a whole factor, the next first."""
    chain = [whole, *_repeat(whole, step)]
    yield from reversed(chain[: chain.index(config)] if config in chain else [])


def _restore(factor: str, config: TinyViTConfig, within: TinyViTConfig) -> TinyViTConfig:
    """Give a network a factor of another one."""
    name, stage = read_factor(factor)
    if stage is None:
        return config.replace(**{name: getattr(within, name)})
    fields = ("embed_dims", "num_heads") if name == "embed_dims" else (name,)
    return config.replace(
        **{field: _with(getattr(config, field), stage, getattr(within, field)[stage]) for field in fields}
    )


def _steps(space: Space) -> dict[str, _Step]:
    steps: dict[str, _Step] = {}
    for stage in range(NUM_STAGES):
        steps[f"embed_dims[{stage}]"] = partial(_narrow, stage)
        steps[f"depths[{stage}]"] = partial(_shorten, stage, space)
        if stage:
            steps[f"window_sizes[{stage}]"] = partial(_tighten, stage, space)
    for name in ("mbconv_expand_ratio", "mlp_ratio"):
        steps[name] = partial(_squeeze, name, space)
    return steps


def _narrow(stage: int, config: TinyViTConfig) -> TinyViTConfig | None:
    """Take away a head; of the first stage, which has none, half as many channels as a head of the second has."""
    head = config.embed_dims[max(stage, 1)] // config.num_heads[max(stage, 1)]
    step = head if stage else max(2, head // 2)
    dim = config.embed_dims[stage] - step
    if dim < step:
        return None
    # The first entry is ignored by the network; it is kept at what the published configurations say.
    heads = dim // head if stage else max(1, dim // head)
    return config.replace(
        embed_dims=_with(config.embed_dims, stage, dim), num_heads=_with(config.num_heads, stage, heads)
    )


def _shorten(stage: int, space: Space, config: TinyViTConfig) -> TinyViTConfig | None:
    depth = config.depths[stage] - 1
    return config.replace(depths=_with(config.depths, stage, depth)) if depth >= space.min_depth else None


def _tighten(stage: int, space: Space, config: TinyViTConfig) -> TinyViTConfig | None:
    """Go to the next smaller window that needs no padding."""
    side = -(-config.img_size // config.stage_strides[stage])
    smaller = range(min(config.window_sizes[stage] - 1, side), space.min_window - 1, -1)
    window = next((size for size in smaller if side % size == 0), None)
    return None if window is None else config.replace(window_sizes=_with(config.window_sizes, stage, window))


def _squeeze(name: str, space: Space, config: TinyViTConfig) -> TinyViTConfig | None:
    ratio = getattr(config, name) - space.ratio_step
    return config.replace(**{name: ratio}) if ratio >= space.min_ratio else None


def _with(values: tuple[int, ...], position: int, value: int) -> tuple[int, ...]:
    return (*values[:position], value, *values[position + 1 :])
