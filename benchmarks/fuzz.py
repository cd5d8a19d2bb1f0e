"""Fuzz the public functions of the package, and count accepted, rejected and faulty cases.

    python benchmarks/fuzz.py --minutes 20 --seeds 0,1      # inputs with known answers: images, checkpoints, data sets
    python benchmarks/fuzz.py --targets all --minutes 20    # and random invalid input for everything else
    python benchmarks/fuzz.py --targets "safetensors files" --seeds 0 --case 17      # repeat one case, with traceback
    python benchmarks/fuzz.py --mutants                     # which known faults it finds when they are put back

Each target of `tests/fuzz` runs for an equal part of the time, or a number of cases, in a separate process. Faults,
which are defined in `tests/fuzz/harness.py`, are reported with the number of their case.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from textwrap import shorten
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from kornia_tinyvit.deploy.measurement import describe_machine
from tests.fuzz import GATES, TARGETS
from tests.fuzz.harness import Tally, Target, attack
from tests.fuzz.mutants import MUTANTS, Mutant

fork = multiprocessing.get_context("fork")  # imports take seconds and are done once
COLUMNS = ("cases", "per s", "rejected", "accepted", "faults")
GROUPS = {"gates": GATES, "all": TARGETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="time for all targets and seeds together")
    parser.add_argument("--count", type=int, default=10**9, help="maximum number of cases per target and seed")
    parser.add_argument("--seeds", default="0", help="comma-separated random seeds")
    parser.add_argument("--targets", default="gates", help="gates, all, or comma-separated names")
    parser.add_argument("--processes", type=int, default=2, help="targets at the same time")
    parser.add_argument("--case", type=int, help="run only this case of one target")
    parser.add_argument("--mutants", action="store_true", help="put known faults back; minutes for each of them")
    args = parser.parse_args()
    known = {target.name: target for target in TARGETS}
    names = [name.strip() for name in args.targets.split(",")]
    if unknown := [name for name in names if name not in known and name not in GROUPS]:
        parser.error(f"unknown target {unknown[0]!r}, expected one of {', '.join((*GROUPS, *known))}")
    targets = [target for name in names for target in GROUPS.get(name, (known.get(name),))]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    warnings.simplefilter("ignore")  # about strange images, by Pillow
    if args.case is not None:
        repeat(targets[0], seeds[0], args.case)
        return
    print("$ python benchmarks/fuzz.py", *(f'"{each}"' if " " in each else each for each in sys.argv[1:]))
    print(describe_machine(), flush=True)
    if args.mutants:
        run_mutants(seeds[0], args)
    else:
        run_all(targets, seeds, args)


@dataclass
class Job:
    """A target with a seed, in one process at a time."""

    target: Target
    seed: int
    seconds: float
    count: int
    journal: Path
    mutant: Mutant | None = None
    tally: Tally = field(default_factory=Tally)
    used: float = 0
    first: int = 0
    started: float = 0
    process: Any = None

    def start(self) -> None:
        """Start the process at the case :attr:`first`."""
        self.started = time.monotonic()
        self.process = fork.Process(target=run, args=(self,))
        self.process.start()

    def ended(self) -> bool:
        """Read what the process wrote; after a crash, be ready to start with the next case."""
        self.process.join()
        self.used += time.monotonic() - self.started
        lines = [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []
        self.journal.unlink(missing_ok=True)
        for number, outcome, reason in lines:
            self.tally.add(number, outcome, reason)
        if self.process.exitcode == 0:
            return True
        crashed = lines[-1][0] + 1 if lines else self.first
        self.tally.add(crashed, "fault", f"the process ended with exit code {self.process.exitcode}: no exception")
        self.first = crashed + 1
        return self.first >= self.count or self.used > self.seconds


def run_all(targets: list[Target], seeds: list[int], args: argparse.Namespace) -> None:
    width = max(len(target.name) for target in targets)
    print(f"\n{'target':{width}}", *(f"{column:>9}" for column in COLUMNS))
    seconds = 60 * args.minutes * args.processes / (len(targets) * len(seeds))
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            Job(target, seed, seconds, args.count, Path(folder) / f"{number}-{seed}.jsonl")
            for number, target in enumerate(targets)
            for seed in seeds
        ]
        run_jobs(jobs, args.processes, lambda done: print_done(done, jobs, width))
    print_row("all", jobs, width)
    for job in jobs:
        for reason, cases in job.tally.faults.items():
            seed = f" of seed {job.seed}" if len(seeds) > 1 else ""
            print(f"  {job.target.name}, case {cases[0]}{seed} and {len(cases) - 1} more: {reason}")


def run_mutants(seed: int, args: argparse.Namespace) -> None:
    """Print for each mutant whether its target finds it, and after how many cases."""
    known = {target.name: target for target in GATES}
    mutants = (*(Mutant("none", target.name, target.name, nullcontext) for target in GATES), *MUTANTS)
    print(f"\n{'mutant':6} {'found':5} {'cases':>6}  fault")
    with tempfile.TemporaryDirectory() as folder:
        seconds, jobs = 60 * args.minutes, []
        for number, mutant in enumerate(mutants):
            with mutant.patch():
                pass  # raises an error if what it patches has gone
            if mutant.target is not None:
                target, journal = known[mutant.target], Path(folder) / f"{number}.jsonl"
                jobs.append(Job(target, seed, seconds, args.count, journal, mutant))
        run_jobs(jobs, args.processes, lambda job: None)
    results = {id(job.mutant): job for job in jobs}
    for mutant in mutants:
        job = results.get(id(mutant))
        faults = {} if job is None else job.tally.faults
        cases = f"{job.tally.total:,}" if job is not None else "-"
        print(f"{mutant.entry:6} {'yes' if faults else 'no':5} {cases:>6}  {mutant.what}")
        if note := next(iter(faults), mutant.note):
            print(f"{'':20}  {shorten(note, 180, placeholder=' ...')}")


def run_jobs(jobs: list[Job], processes: int, done: Any) -> None:
    waiting, running = deque(jobs), {}
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.popleft()
            job.start()
            running[job.process.sentinel] = job
        for sentinel in wait(list(running)):
            job = running.pop(sentinel)
            if job.ended():
                done(job)
            else:
                waiting.appendleft(job)


def print_done(done: Job, jobs: list[Job], width: int) -> None:
    """Print the row of a target when all of its seeds have been run."""
    same = [job for job in jobs if job.target is done.target]
    done.process = None
    if all(job.process is None and job.used for job in same):
        print_row(done.target.name, same, width)


def print_row(name: str, jobs: list[Job], width: int) -> None:
    total, used = sum(job.tally.total for job in jobs), sum(job.used for job in jobs)
    numbers = [sum(job.tally.counts[each] for job in jobs) for each in ("rejected", "accepted", "fault")]
    print(
        f"{name:{width}} {total:9,} {total / max(used, 1e-9):9.1f}", *(f"{number:9,}" for number in numbers), flush=True
    )


def run(job: Job) -> None:
    """Run a target in this process and write a line to the journal after each case."""
    with tempfile.TemporaryDirectory() as folder, open(job.journal, "a", buffering=1) as journal:

        class JournalTally(Tally):
            def add(self, number: int, outcome: str, reason: str = "") -> None:
                super().add(number, outcome, reason)
                journal.write(json.dumps([number, outcome, reason]) + "\n")

        numbers = range(job.first, job.count)
        with nullcontext() if job.mutant is None else job.mutant.patch():
            attack(
                job.target,
                job.seed,
                numbers,
                Path(folder),
                job.seconds - job.used,
                JournalTally(),
                until_fault=job.mutant is not None,
            )


def repeat(target: Target, seed: int, number: int) -> None:
    """Run one case without catching exceptions."""
    with tempfile.TemporaryDirectory() as folder:
        target.case(random.Random(f"{target.name}/{seed}/{number}"), Path(folder))
    print("accepted")


if __name__ == "__main__":
    main()
