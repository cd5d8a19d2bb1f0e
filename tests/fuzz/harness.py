"""Hostile input by the thousand: what becomes of each is accepted, refused as promised, or a fault.

A target makes one input of a random generator and hands it to the package. It returns if the input was taken, and has
then looked at what came out; a refusal leaves it as an exception. What is no refusal is a fault:

- an exception of another kind than the function documents, or one that no ``raise`` of this package made, such as a
  bare KeyError or torch's own RuntimeError, or one whose message is no sentence. Only where a program passes an
  argument of another type than is declared, Python's own TypeError will do;
- an AssertionError of the target: what came out is wrong, such as weights of which half were loaded;
- more seconds or more memory than the target allows; code of a file that ran; a temporary file that was left behind;
- a crash of the process, which ``benchmarks/fuzz.py`` sees, since it gives each target a process.

A case is a function of target, seed and number alone, so each fault can be repeated by itself.
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
RAN = "CODE-RAN"  # what hostile pickles write into the folder of their case
WORDS = 4  # of a sentence, at least

Case = Callable[[random.Random, Path], Any]


class TooSlow(BaseException):
    """A case took more seconds than its target allows."""


class Refused(Exception):
    """A target's word that an input was refused, which it has looked at itself."""


@dataclass(frozen=True)
class Target:
    """What is attacked.

    Args:
        name: for the table.
        case: makes an input and hands it over; gets a random generator and an empty folder.
        refusals: the documented exceptions.
        seconds: that a case may take.
        megabytes: that the process may grow by, at most, during a case.
        share: how many cases the tests run.
        typed: whether the input is arguments of declared types, and not the content of a file.
    """

    name: str
    case: Case
    refusals: tuple[type[BaseException], ...] = (ValueError, TypeError, FileNotFoundError)
    seconds: float = 20
    megabytes: int = 700
    share: int = 25
    typed: bool = False


@dataclass
class Tally:
    """What became of a target's inputs."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        return sum(self.counts.values())

    def add(self, number: int, outcome: str, reason: str = "") -> None:
        self.counts[outcome] += 1
        if outcome == "fault":  # those of one place in the code are one, whatever they say
            place = reason.split(": ")[0]
            first = next((known for known in self.faults if known.split(": ")[0] == place), reason)
            self.faults.setdefault(first, []).append(number)


def attack(
    target: Target, seed: int, numbers: Iterable[int], folder: Path, seconds: float = 1e9, tally: Tally | None = None
) -> Tally:
    """Run cases of a target, until the time is up, and count what became of them."""
    tally, end = tally or Tally(), time.monotonic() + seconds
    for number in numbers:
        tally.add(number, *judge(target, seed, number, folder))
        if time.monotonic() > end:
            break
    return tally


def judge(target: Target, seed: int, number: int, folder: Path) -> tuple[str, str]:
    """Run one case; return ``"accepted"``, ``"refused"`` or ``"fault"``, and the reason of a fault."""
    place = folder / f"{target.name.replace(' ', '-')}-{number}"
    place.mkdir(parents=True)
    generator = random.Random(f"{target.name}/{seed}/{number}")
    before = _peak(reset=True)
    outcome, reason = "accepted", ""
    try:
        with _limited(target.seconds):
            target.case(generator, place)
    except (Exception, SystemExit, TooSlow) as error:
        outcome, reason = _judge_error(error, target)
    grown = _peak() - before
    if outcome != "fault" and grown > target.megabytes:
        outcome, reason = "fault", f"took more than {target.megabytes} MB"
    if any(place.rglob(RAN)):
        outcome, reason = "fault", "code of the file ran"
    if leftovers := [path.name for path in place.rglob(".*") if path.name.endswith((".tmp", ".part"))]:
        outcome, reason = "fault", f"left behind {leftovers[0].split('.')[1]}"
    shutil.rmtree(place, ignore_errors=True)
    return outcome, reason


def _judge_error(error: BaseException, target: Target) -> tuple[str, str]:
    kind, text = type(error).__name__, " ".join(str(error).split())
    last = traceback.extract_tb(error.__traceback__)[-2 if isinstance(error, TooSlow) else -1]  # not the alarm's
    place = f"{Path(last.filename).name}:{last.lineno}"
    if isinstance(error, Refused):
        return "refused", ""
    if isinstance(error, TooSlow):
        return "fault", f"took more than {target.seconds} s, in {place}"
    if isinstance(error, AssertionError):
        return "fault", f"wrong result, {text[:200]}"
    if not isinstance(error, target.refusals):
        return "fault", f"{kind} at {place}: {text[:200]}"
    if not (target.typed and isinstance(error, TypeError)) and (reason := broken_promise(error)):
        return "fault", f"{kind} at {place}, {reason}: {text[:200]}"
    return "refused", ""


def broken_promise(error: BaseException) -> str | None:
    """Tell what is wrong with a refusal: not this package's own, or no sentence; ``None`` if nothing is."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = PACKAGE in Path(last.filename).parents
    if not own or not linecache.getline(last.filename, last.lineno or 0).lstrip().startswith("raise"):
        return "not refused by the package itself"
    return None if len(str(error).split()) >= WORDS else "no sentence"


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak(reset: bool = False) -> float:
    """Return the process's largest memory so far in MB; on Linux since the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


#: Numbers that programs trip over.
NUMBERS = (
    0, 1, -1, 2, 3, 7, 31, 32, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63),
    0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), True, False,
)  # fmt: skip
#: And other things where numbers are expected.
THINGS = (None, "", "5m", "x" * 300, "\0", "../..", "ü\n", [], {}, [1], [[1]], {"a": 1}, (1, 2), b"x", object())


def a_number(rng: random.Random) -> Any:
    return rng.choice(NUMBERS)


def a_thing(rng: random.Random) -> Any:
    return rng.choice(THINGS if rng.random() < 0.4 else NUMBERS)


def json_thing(rng: random.Random, depth: int = 2) -> Any:
    """Return anything that JSON can say."""
    kind = rng.randrange(6 if depth else 4)
    if kind == 4:
        return [json_thing(rng, depth - 1) for _ in range(rng.randrange(6))]
    if kind == 5:
        return {rng.choice(("0", "1", "a", "size", "id")): json_thing(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind == 3:
        return rng.choice(("", "5m", "GELU", "Module", "x" * 200, "\0", "ü\n", "nan", "1", "-1"))
    return rng.choice((None, *NUMBERS))


def tamper(rng: random.Random, value: Any) -> Any:
    """Return JSON's value with something in it changed, left out, doubled or put in."""
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
    """Return bytes with some flipped, cut, doubled, zeroed or put in; half of the time among the first ``head``."""
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
