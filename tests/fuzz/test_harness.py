"""A part of the fuzzing, and tests of its harness."""

from __future__ import annotations

import mmap
import os
import time

import pytest
import torch

from kornia_tinyvit import TinyViTConfig
from kornia_tinyvit.checkpoints import load_checkpoint
from tests.fuzz import GATES, TARGETS
from tests.fuzz.harness import RAN, Rejected, Target, attack, mutate, run_case
from tests.fuzz.mutants import MUTANTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_targets(target, tmp_path):
    tally = attack(target, 0, range(target.num_cases), tmp_path)
    assert tally.faults == {}
    assert tally.total == target.num_cases
    assert not list(tmp_path.iterdir())


def bare_error(rng, folder):
    return {}["x"]


def torch_error(rng, folder):
    torch.zeros(2) @ torch.zeros(3)


def python_error(rng, folder):
    int("x")


def no_message(rng, folder):
    raise ValueError


def wrong_result(rng, folder):
    assert 1 + 1 == 3, "the sum is wrong"


def too_slow(rng, folder):
    time.sleep(5)


def too_large(rng, folder):
    # Not from the heap, which may have this much free memory.
    with mmap.mmap(-1, 200 * 2**20) as memory:
        memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)


def code(rng, folder):
    (folder / RAN).touch()
    raise Rejected


def leftover(rng, folder):
    (folder / ".weights.safetensors.1a2b.tmp").touch()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (bare_error, "KeyError at test_harness.py"),
        (torch_error, "RuntimeError at test_harness.py"),
        (python_error, "not raised by the package: invalid literal"),
        (no_message, "not raised by the package"),
        (wrong_result, "wrong result, the sum is wrong"),
        (too_slow, "took more than 1 s"),
        (too_large, "took more than 100 MB"),
        (code, "code of the file ran"),
        (leftover, "left a temporary file of weights"),
    ],
)
def test_faults(tmp_path, case, reason):
    outcome, message = run_case(Target("x", case, seconds=1, megabytes=100), 0, 0, tmp_path)
    assert outcome == "fault"
    assert reason in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (lambda rng, folder: TinyViTConfig(img_size=3), "rejected"),
        (lambda rng, folder: load_checkpoint(torch.nn.Linear(1, 1), folder / "none.pth"), "rejected"),
        (lambda rng, folder: None, "accepted"),
    ],
)
def test_no_faults(tmp_path, case, outcome):
    assert run_case(Target("x", case), 0, 0, tmp_path) == (outcome, "")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_mutants_apply(mutant):
    assert mutant.target in (None, *(target.name for target in GATES))
    assert (mutant.target is None) == bool(mutant.note)
    with mutant.patch():
        pass


@pytest.mark.parametrize("entry", ["D1", "D9", "W3"])
def test_mutants_are_found(tmp_path, entry):
    mutant = next(each for each in MUTANTS if each.entry == entry)
    target = next(each for each in GATES if each.name == mutant.target)
    with mutant.patch():
        assert attack(target, 0, range(100), tmp_path, until_fault=True).faults


def test_cases_repeat(tmp_path):
    drawn = []
    target = Target("x", lambda rng, folder: drawn.append(mutate(rng, bytes(999))))
    attack(target, 3, range(20), tmp_path)
    attack(target, 3, range(20), tmp_path)
    assert drawn[:20] == drawn[20:]
    assert len(set(drawn)) > 15
