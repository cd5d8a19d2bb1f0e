"""Fuzz the public functions of the package with random invalid input, and count accepted, rejected and faulty cases.

    python benchmarks/fuzz.py --seconds 60 --seed 0
    python benchmarks/fuzz.py --targets "safetensors files" --seed 0 --case 17      # repeat one case, with traceback

Each target of `tests/fuzz` runs for a time or a number of cases in a separate process. Faults, which are defined in
`tests/fuzz/harness.py`, are reported with the number of their case.
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

fork = multiprocessing.get_context("fork")  # imports take seconds and are done once
COLUMNS = ("cases", "rejected", "accepted", "faults")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="time for each target")
    parser.add_argument("--count", type=int, default=10**9, help="maximum number of cases for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", help="comma-separated names (default: all)")
    parser.add_argument("--case", type=int, help="run only this case of one target")
    args = parser.parse_args()
    known = {target.name: target for target in TARGETS}
    names = list(known) if args.targets is None else [name.strip() for name in args.targets.split(",")]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown target {unknown[0]!r}, expected one of {', '.join(known)}")
    if args.case is not None:
        repeat(known[names[0]], args.seed, args.case)
        return
    print("$ python benchmarks/fuzz.py", *sys.argv[1:])
    print(describe_machine())
    run_all([known[name] for name in names], args)


def run_all(targets: list[Target], args: argparse.Namespace) -> None:
    width = max(len(target.name) for target in targets)
    print(f"\n{'target':{width}}", *(f"{column:>9}" for column in COLUMNS))
    totals, reasons = [0] * len(COLUMNS), []
    for target in targets:
        name, tally = target.name, run_in_process(target, args)
        numbers = [tally.total, *(tally.counts[each] for each in ("rejected", "accepted", "fault"))]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        reasons += [f"{name}, case {cases[0]} and {len(cases) - 1} more: {why}" for why, cases in tally.faults.items()]
        print(f"{name:{width}}", *(f"{number:9,}" for number in numbers), flush=True)
    print(f"{'all':{width}}", *(f"{number:9,}" for number in totals))
    for reason in reasons:
        print("  " + reason)


def run_in_process(target: Target, args: argparse.Namespace) -> Tally:
    """Run a target in a separate process; after a crash, continue with the next case."""
    tally, first = Tally(), 0
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        while True:
            process = fork.Process(target=run, args=(target, args, first, journal))
            process.start()
            process.join()
            lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
            for number, outcome, reason in lines:
                tally.add(number, outcome, reason)
            if process.exitcode == 0:
                return tally
            first = lines[-1][0] + 1 if lines else first
            tally.add(first, "fault", f"the process ended with exit code {process.exitcode}: no exception")
            first += 1
            journal.unlink(missing_ok=True)


def run(target: Target, args: argparse.Namespace, first: int, path: Path) -> None:
    """Run a target in this process and write a line to the journal after each case."""
    with tempfile.TemporaryDirectory() as folder, open(path, "a", buffering=1) as journal:

        class JournalTally(Tally):
            def add(self, number: int, outcome: str, reason: str = "") -> None:
                super().add(number, outcome, reason)
                journal.write(json.dumps([number, outcome, reason]) + "\n")

        attack(target, args.seed, range(first, args.count), Path(folder), args.seconds, JournalTally())


def repeat(target: Target, seed: int, number: int) -> None:
    """Run one case without catching exceptions."""
    with tempfile.TemporaryDirectory() as folder:
        target.case(random.Random(f"{target.name}/{seed}/{number}"), Path(folder))
    print("accepted")


if __name__ == "__main__":
    main()
