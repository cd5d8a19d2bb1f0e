"""Known faults as patches, which show what the fuzzing finds: `python benchmarks/fuzz.py --mutants`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

IMAGES, CHECKPOINTS = "images with known pixels", "checkpoints with known tensors"
DATA, MODULES = "data sets with known samples", "modules with known outputs"
Patch = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Mutant:
    """A fault that is put back.

    Args:
        entry: name of the fault.
        what: what is wrong.
        target: the target that should find it; ``None`` if none can.
        patch: context in which the package has the fault.
        note: why no target can find it.
    """

    entry: str
    what: str
    target: str | None
    patch: Patch
    note: str = ""


MUTANTS: tuple[Mutant, ...] = ()
