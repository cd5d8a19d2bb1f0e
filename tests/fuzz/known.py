"""Checks of inputs whose right answer is known: an accepted input has to give it, and valid inputs must be accepted."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

#: What the guide to errors documents.
DOCUMENTED = (ValueError, TypeError, FileNotFoundError)


class Verdict(enum.Enum):
    """What the documentation says of an input."""

    VALID = "valid"
    #: The documentation leaves open whether it is accepted; if it is, the answer is known.
    OPEN = "open"
    INVALID = "invalid"


def check(
    verdict: Verdict,
    what: str,
    call: Callable[[], Any],
    compare: Callable[[Any], None],
    naming: str | tuple[str, ...] = "",
    detail: str = "",
) -> None:
    """Call the package and compare its answer.

    Args:
        verdict: whether the input must be accepted.
        what: the input in a few words; faults with the same text are counted as one.
        call: calls the package.
        compare: raises AssertionError for another answer than the known one.
        naming: text that the error has to contain, such as the name of the file; one of several.
        detail: more about the input.
    """
    raised = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = call()
    except DOCUMENTED as error:
        raised = error
    if raised is not None:
        text = " ".join(str(raised).split())
        assert verdict is not Verdict.VALID, f"{what} is rejected: {detail}: {type(raised).__name__} {text[:300]}"
        names = (naming,) if isinstance(naming, str) else naming
        assert any(name in text for name in names), f"the error for {what} does not say: {naming}: {text[:300]}"
        raise raised
    assert verdict is not Verdict.INVALID, f"{what} is accepted: {detail}"
    compare(answer)


def same(found: Any, wanted: Any, what: str, tolerance: float = 1e-5, detail: str = "") -> None:
    """Compare two tensors or arrays."""
    one, other = (
        torch.as_tensor(np.asarray(each) if isinstance(each, np.ndarray) else each) for each in (found, wanted)
    )
    assert one.shape == other.shape, f"{what} has another shape: {detail}: {tuple(one.shape)}, not {tuple(other.shape)}"
    if one.numel():
        distance = (one.double() - other.double()).abs().max().item()
        assert distance <= tolerance, f"{what} differs: {detail}: by {distance:.3g}"
