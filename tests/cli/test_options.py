"""Options without effect are errors."""

from __future__ import annotations

import pytest

from tests.helpers import error_of
from tests.scenes import make_images

TASKS = {
    "classification": ("--min-area 1",),
    "semantic": ("--tta", "--confusion", "--calibration", "--knn x", "--linear x", "--batch-size 64", "--min-area 9"),
    "promptable": ("--tta", "--per-class", "--batch-size 2", "--knn x"),
    "detection": ("--tta", "--min-area 9", "--linear x"),
}
TRAININGS = {
    "classification": ("--class-balance 0", "--rotate", "--prompts 8", "--queries 9", "--hidden-dim 64"),
    "semantic": ("--box-fraction 0.5", "--min-area 2", "--queries 9"),
    "promptable": ("--class-balance 1", "--queries 9"),
    "detection": ("--class-balance 1", "--prompts 8"),
}


@pytest.mark.parametrize(("command", "tasks"), [("evaluate", TASKS), ("train", TRAININGS)])
def test_of_another_task(tmp_path, capfd, monkeypatch, command, tasks):
    for task, options in tasks.items():
        for option in options:
            error = error_of(capfd, monkeypatch, command, str(tmp_path), "--task", task, *option.split())
            assert f"{option.split()[0]} has no effect with --task {task}; leave it out" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate x --task semantic --tta --confusion", "--tta, --confusion have no effect with --task semantic"),
        ("contract x --max-macs 1M --validation y --hold-out 0.1", "--hold-out has no effect with --validation"),
        ("contract x --max-macs 1M --rounds 3", "--rounds has no effect without --refine"),
        ("contract x --max-macs 1M --refine y --steps 3", "--steps has no effect with --refine"),
        (
            "contract x --max-macs 1M --engine openvino --engine-device cpu",
            "--engine, --engine-device have no effect without",
        ),
        ("contract x --max-latency-ms 9 --engine-batch 4", "--engine-batch has no effect without --min-throughput"),
        ("convert --out x --format timm --name me", "--name has no effect with --format timm"),
        ("benchmark --limit 4", "--limit has no effect without --data"),
    ],
)
def test_without_the_option_it_belongs_to(capfd, monkeypatch, words, message):
    assert message in error_of(capfd, monkeypatch, *words.split())


def test_without_validation_images(tmp_path, capfd, monkeypatch):
    command = ("train", str(make_images(tmp_path)), "--validate-every", "2")
    assert "--validate-every has no effect without validation images" in error_of(capfd, monkeypatch, *command)
