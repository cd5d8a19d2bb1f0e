"""Hostile input for every public door of the package: what is accepted, what is refused as promised, and the faults.

    python benchmarks/fuzz.py --seconds 60 --seed 0
    python benchmarks/fuzz.py --targets "safetensors files" --seed 0 --case 17      # one case again, with its traceback

Each target of `tests/fuzz` runs so long, or so many cases, in a process of its own. A fault is told with the number of
its case; `tests/fuzz/harness.py` tells what counts as one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kornia_tinyvit.deploy.measurement import describe_machine
from tests.fuzz import TARGETS
from tests.fuzz.harness import Tally, Target, attack

fork = multiprocessing.get_context("fork")  # so that what takes seconds to import is imported once
COLUMNS = ("tried", "refused", "accepted", "faults")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--count", type=int, default=10**9, help="cases of each target, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", help="names with commas between them; all if left out")
    parser.add_argument("--case", type=int, help="run this case of one target alone")
    asked = parser.parse_args()
    known = {target.name: target for target in TARGETS}
    chosen = list(known) if asked.targets is None else [name.strip() for name in asked.targets.split(",")]
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"there is no target {unknown[0]!r}; there are {', '.join(known)}")
    if asked.case is not None:
        repeat(known[chosen[0]], asked.seed, asked.case)
        return
    print("$ python benchmarks/fuzz.py", *sys.argv[1:])
    print(describe_machine())
    run_all([known[name] for name in chosen], asked)


def run_all(chosen: list[Target], asked: argparse.Namespace) -> None:
    width = max(len(target.name) for target in chosen)
    print(f"\n{'target':{width}}", *(f"{column:>9}" for column in COLUMNS))
    totals, reasons = [0] * len(COLUMNS), []
    for target in chosen:
        name, tally = target.name, run_apart(target, asked)
        numbers = [tally.tried, *(tally.counts[each] for each in ("refused", "accepted", "fault"))]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        reasons += [f"{name}, case {cases[0]} and {len(cases) - 1} more: {why}" for why, cases in tally.faults.items()]
        print(f"{name:{width}}", *(f"{number:9,}" for number in numbers), flush=True)
    print(f"{'all':{width}}", *(f"{number:9,}" for number in totals))
    for reason in reasons:
        print("  " + reason)


def run_apart(target: Target, asked: argparse.Namespace) -> Tally:
    """Run a target in a process of its own, which may die; go on behind the case that killed it."""
    tally, first = Tally(), 0
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        while True:
            process = fork.Process(target=run_here, args=(target, asked, first, journal))
            process.start()
            process.join()
            lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
            for number, outcome, reason in lines:
                tally.add(number, outcome, reason)
            if process.exitcode == 0:
                return tally
            first = lines[-1][0] + 1 if lines else first
            tally.add(first, "fault", f"the process ended with {process.exitcode}: no exception")
            first += 1
            journal.unlink(missing_ok=True)


def run_here(target: Target, asked: argparse.Namespace, first: int, path: Path) -> None:
    """Run a target in this process and write a line for each case as soon as it is over."""
    with tempfile.TemporaryDirectory() as folder, open(path, "a", buffering=1) as journal:

        class Told(Tally):
            def add(self, number: int, outcome: str, reason: str = "") -> None:
                super().add(number, outcome, reason)
                journal.write(json.dumps([number, outcome, reason]) + "\n")

        attack(target, asked.seed, range(first, asked.count), Path(folder), asked.seconds, Told())


def repeat(target: Target, seed: int, number: int) -> None:
    """Run one case without a net."""
    with tempfile.TemporaryDirectory() as folder:
        target.case(random.Random(f"{target.name}/{seed}/{number}"), Path(folder))
    print("accepted")


if __name__ == "__main__":
    main()
