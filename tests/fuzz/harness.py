"""Fuzzing with random invalid input: each case is accepted, rejected with a documented error, or a fault.

A target generates a random input and passes it to the package. If the input is accepted, the target checks the result;
otherwise an exception leaves the target. The following are faults:

- an exception of another type than documented, an exception that was not raised by this package, such as a KeyError or
  torch's RuntimeError, or one without a message of several words. For arguments of another type than declared, Python's
  TypeError is accepted;
- an AssertionError of the target: the result is wrong, such as a partly loaded checkpoint;
- exceeding the limits of time or memory; running code of a file; leaving a temporary file;
- a crash of the process, which ``benchmarks/fuzz.py`` detects by running each target in a separate process.

A case depends only on target, seed and number, so each fault can be reproduced.
"""

from __future__ import annotations

import linecache
import random
import resource
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2] / "kornia_tinyvit"
MUTANTS = Path(__file__).with_name("mutants.py")  # parts of the package with a fault
RAN = "CODE-RAN"  # file that malicious pickles write to the folder of their case
MIN_WORDS = 4  # of an error message

Case = Callable[[random.Random, Path], Any]


class TimeLimitExceeded(BaseException):
    """A case exceeded the time limit of its target."""


class Rejected(Exception):
    """Raised by a target that has checked the error of a rejected input."""


@dataclass(frozen=True)
class Target:
    """A function under test and its limits.

    Args:
        name: name in the table.
        case: function of a random generator and an empty folder that generates an input and runs it.
        errors: the documented exceptions.
        seconds: time limit of a case.
        megabytes: limit of the memory growth of the process during a case.
        num_cases: number of cases in the tests.
        typed: whether the input consists of arguments with declared types, not the content of a file.
    """

    name: str
    case: Case
    errors: tuple[type[BaseException], ...] = (ValueError, TypeError, FileNotFoundError)
    seconds: float = 20
    megabytes: int = 700
    num_cases: int = 25
    typed: bool = False


@dataclass
class Tally:
    """Outcomes of the cases of a target."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, number: int, outcome: str, reason: str = "") -> None:
        self.counts[outcome] += 1
        if outcome == "fault":  # faults at the same line are counted as one
            place = reason.split(": ")[0]
            first = next((known for known in self.faults if known.split(": ")[0] == place), reason)
            self.faults.setdefault(first, []).append(number)


def attack(
    target: Target,
    seed: int,
    numbers: Iterable[int],
    folder: Path,
    seconds: float = 1e9,
    tally: Tally | None = None,
    until_fault: bool = False,
) -> Tally:
    """Run cases of a target within a time limit, or until the first fault, and count their outcomes."""
    tally, end = tally or Tally(), time.monotonic() + seconds
    for number in numbers:
        tally.add(number, *run_case(target, seed, number, folder))
        if time.monotonic() > end or (until_fault and tally.faults):
            break
    return tally


def run_case(target: Target, seed: int, number: int, folder: Path) -> tuple[str, str]:
    """Run one case; return ``"accepted"``, ``"rejected"`` or ``"fault"``, and the reason of a fault."""
    place = folder / f"{target.name.replace(' ', '-')}-{number}"
    place.mkdir(parents=True)
    generator = random.Random(f"{target.name}/{seed}/{number}")
    before = _peak(reset=True)
    outcome, reason = "accepted", ""
    try:
        with _limited(target.seconds):
            target.case(generator, place)
    except (Exception, SystemExit, TimeLimitExceeded) as error:
        outcome, reason = _classify_error(error, target, place)
    grown = _peak() - before
    if outcome != "fault" and grown > target.megabytes:
        outcome, reason = "fault", f"took more than {target.megabytes} MB"
    if any(place.rglob(RAN)):
        outcome, reason = "fault", "code of the file ran"
    if leftovers := [path.name for path in place.rglob(".*") if path.name.endswith((".tmp", ".part"))]:
        outcome, reason = "fault", f"left a temporary file of {leftovers[0].split('.')[1]}"
    shutil.rmtree(place, ignore_errors=True)
    return outcome, reason


def _classify_error(error: BaseException, target: Target, folder: Path) -> tuple[str, str]:
    text = str(error).replace(f"{folder}/", "").replace(f"{PACKAGE.parent}/", "")
    kind, text = type(error).__name__, " ".join(text.split())
    last = traceback.extract_tb(error.__traceback__)[
        -2 if isinstance(error, TimeLimitExceeded) else -1
    ]  # skip the signal handler
    place = f"{Path(last.filename).name}:{last.lineno}"
    if isinstance(error, Rejected):
        return "rejected", ""
    if isinstance(error, TimeLimitExceeded):
        return "fault", f"took more than {target.seconds} s, in {place}"
    if isinstance(error, AssertionError):
        return "fault", f"wrong result, {text[:200]}"
    if not isinstance(error, target.errors):
        return "fault", f"{kind} at {place}: {text[:200]}"
    if not (target.typed and isinstance(error, TypeError)) and (reason := error_fault(error)):
        return "fault", f"{kind} at {place}, {reason}: {text[:200]}"
    return "rejected", ""


def error_fault(error: BaseException) -> str | None:
    """Return the fault of an error: not raised by this package, or too short a message; ``None`` for a valid error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = PACKAGE in Path(last.filename).parents or Path(last.filename) == MUTANTS
    if not own or not linecache.getline(last.filename, last.lineno or 0).lstrip().startswith("raise"):
        return "not raised by the package"
    return None if len(str(error).split()) >= MIN_WORDS else "message too short"


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeLimitExceeded

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak(reset: bool = False) -> float:
    """Return the peak memory of the process in MB; on Linux since the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


#: Numbers that are likely to cause errors.
NUMBERS = (
    0, 1, -1, 2, 3, 7, 31, 32, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63),
    0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), True, False,
)  # fmt: skip
#: Values of other types.
THINGS = (None, "", "5m", "x" * 300, "\0", "../..", "ü\n", [], {}, [1], [[1]], {"a": 1}, (1, 2), b"x", object())


def a_number(rng: random.Random) -> Any:
    return rng.choice(NUMBERS)


def a_thing(rng: random.Random) -> Any:
    return rng.choice(THINGS if rng.random() < 0.4 else NUMBERS)


def json_thing(rng: random.Random, depth: int = 2) -> Any:
    """Return a random JSON value."""
    kind = rng.randrange(6 if depth else 4)
    if kind == 4:
        return [json_thing(rng, depth - 1) for _ in range(rng.randrange(6))]
    if kind == 5:
        return {rng.choice(("0", "1", "a", "size", "id")): json_thing(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind == 3:
        return rng.choice(("", "5m", "GELU", "Module", "x" * 200, "\0", "ü\n", "nan", "1", "-1"))
    return rng.choice((None, *NUMBERS))


def tamper(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with a random change, removal, duplication or insertion."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        how = rng.randrange(8)
        if how == 0:
            return {name: each for name, each in value.items() if name != key}
        if how == 1:
            return value | {rng.choice(("extra", "", "__class__")): json_thing(rng)}
        return value | {key: tamper(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        position, how = rng.randrange(len(value)), rng.randrange(6)
        if how == 0:
            return value[:position] + value[position + 1 :]
        if how == 1:
            return value[: position + 1] + value[position:]
        return [*value[:position], tamper(rng, value[position]), *value[position + 1 :]]
    return json_thing(rng)


def mutate(rng: random.Random, content: bytes, head: int = 0) -> bytes:
    """Return bytes with random changes, removals, duplications and insertions, half of them in the first ``head``."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        end = min(head, len(changed)) if head and rng.random() < 0.5 else len(changed)
        if not end:
            break
        position, how = rng.randrange(end), rng.randrange(8)
        span = rng.choice((1, 2, 4, 8, 64, 1024))
        if how <= 2:
            changed[position] ^= 1 << rng.randrange(8)
        elif how == 3:
            changed[position] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif how == 4:
            changed[position : position + span] = bytes(rng.choice((0, 0xFF)) for _ in range(1)) * span
        elif how == 5:
            del changed[position : position + span]
        elif how == 6:
            changed[position:position] = changed[position : position + span]
        else:
            del changed[position:]
    return bytes(changed)
