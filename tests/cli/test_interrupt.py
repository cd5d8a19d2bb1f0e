"""Ctrl-C leaves work that the printed command resumes."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

from kornia_tinyvit import TinyViT, cli, save_checkpoint
from kornia_tinyvit.distillation import LabelStore
from tests.cli.test_distill import TEACHER
from tests.conftest import TINY
from tests.helpers import CommandProcess, json_lines, run
from tests.scenes import make_images

SMALL = ("--recipe", "cifar10", "--img-size", "32", "--batch-size", "4")
SLOW_TEACHER = TEACHER.replace(
    "        return images", "        import time\n        time.sleep(0.02)\n        return images"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), each=4)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    """The file of a network of 30 thousand weights."""
    return str(
        save_checkpoint(TinyViT(**TINY | {"img_size": 32}), tmp_path_factory.mktemp("network") / "tiny.safetensors")
    )


def interrupt(folder: Path, command: tuple[str, ...], ready: Callable[[], bool]) -> list[str]:
    """Run a command, send SIGINT when it is ready, and return the command that it prints."""
    process = CommandProcess(folder, *command)
    process.signal(signal.SIGINT, ready)
    code, _, err = process.wait()
    assert code == 130, err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("Interrupted. Resume: kornia-tinyvit ")
    return shlex.split(last.partition(": kornia-tinyvit ")[2])


@pytest.mark.slow
def test_train(folder, network, tmp_path):
    command = (
        "train",
        str(folder),
        "--variant",
        network,
        *SMALL,
        "--epochs",
        "12",
        "--workers",
        "0",
        "--device",
        "cpu",
    )
    out, whole = tmp_path / "it's out", tmp_path / "whole"
    resume = interrupt(tmp_path, (*command, "--out", str(out)), lambda: len(json_lines(out / "metrics.jsonl")) > 1)
    assert resume == [*command, "--out", str(out)]
    state = json_lines(out / "metrics.jsonl")[-1]["step"]
    assert 0 < state < 36
    run(*resume)
    run(*command, "--out", str(whole))
    for name in ("last", "best"):
        found, expected = (load_file(each / f"{name}.safetensors") for each in (out, whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    epochs = [[line for line in json_lines(each / "metrics.jsonl") if "seconds" in line] for each in (out, whole)]
    assert [line["epoch"] for line in epochs[0]] == [line["epoch"] for line in epochs[1]] == [*range(1, 13)]


@pytest.mark.slow
def test_distill_save(folder, tmp_path):
    (tmp_path / "colors.py").write_text(SLOW_TEACHER)
    command = ("distill", "save", str(folder))
    options = (
        "--teacher", f"{tmp_path}/colors.py:build", "--recipe", "cifar10_distill", "--img-size", "32", "--epochs", "4",
        "--top-k", "2", "--workers", "1", "--batch-size", "2",
    )  # fmt: skip
    store = tmp_path / "store"
    resume = interrupt(tmp_path, (*command, str(store), *options), lambda: any(store.glob("epoch-*/*.safetensors")))
    assert resume == [*command, str(store), *options]
    written, present = map(int, re.search(r"(\d+) records written, (\d+) already present", run(*resume)).groups())
    assert written + present == 48
    assert written > 0
    run(*command, str(tmp_path / "whole"), *options)
    for epoch in range(4):
        found, expected = (LabelStore(each).read(epoch, range(12)) for each in (store, tmp_path / "whole"))
        assert torch.equal(found.probabilities, expected.probabilities)


@pytest.mark.slow
def test_contract(folder, network, tmp_path):
    # About 40 candidates: a busy machine may notice the first one late.
    options = ("--variant", network, *SMALL, "--hold-out", "0.25", "--max-parameters", "12k", "--steps", "60", "--json")
    out = tmp_path / "out"
    command = ("contract", str(folder), *options, "--device", "cpu", "--out", str(out))

    def ready() -> bool:
        return any(line["event"] == "evaluated" for line in json_lines(out / "search.jsonl"))

    resume = interrupt(tmp_path, command, ready)
    assert resume == [*command]
    evaluated = [line for line in json_lines(out / "search.jsonl") if line["event"] == "evaluated"]
    report = json.loads(run(*resume))
    assert report["evaluated"] > len(evaluated)
    lines = [line for line in json_lines(out / "search.jsonl") if line["event"] == "evaluated"]
    assert lines[: len(evaluated)] == evaluated


@pytest.mark.parametrize("command", [["classify", "a.png"], ["distill", "check", "a", "b"], ["trainer"]])
def test_other_commands(command, monkeypatch, capsys):
    """Their work cannot be resumed, so no command is printed."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(typer.core.TyperGroup, "invoke", stop)
    monkeypatch.setattr(sys, "argv", ["kornia-tinyvit", *command])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"
