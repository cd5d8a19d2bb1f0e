"""What all commands share: help, version, usage errors, --quiet, --json and --device."""

from __future__ import annotations

import json
import re
import shlex
import sys
from itertools import pairwise

import pytest
import typer

from kornia_tinyvit import cli
from kornia_tinyvit.cli import options
from kornia_tinyvit.cli.requests import PANELS
from kornia_tinyvit.cli.training_options import TrainingRequest
from kornia_tinyvit.version import __version__
from tests.helpers import error_of, run, run_both
from tests.scenes import CLASSES, make_images
from tests.test_commands import faults_of, leaves

COMMANDS = leaves(typer.main.get_command(cli.app))


def test_overview(monkeypatch):
    output = run()
    lines = [line for line in output.splitlines() if "kornia-tinyvit " in line]
    assert [line.split("kornia-tinyvit ")[1].split()[0] for line in lines[:5]] == [
        "classify", "segment", "detect", "train", "export"
    ]  # fmt: skip
    assert "kornia-tinyvit --help" in output
    shown = [line[line.index("kornia-tinyvit ") :] for line in lines[:5]]
    assert faults_of(shown, monkeypatch) == []


def test_version():
    assert run("--version") == f"kornia-tinyvit {__version__}\n"


def test_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    output = run("--help")
    assert "Exit codes: 0 success, 1 error or failed check, 2 wrong usage, 130 interrupted." in " ".join(output.split())
    names = [*dict.fromkeys(example.split()[0] for _, example in cli.COMMANDS)]
    listed = re.findall(r"^│ (\w+) ", output, flags=re.MULTILINE)
    assert listed == names


@pytest.mark.parametrize("name", COMMANDS)
class TestHelp:
    def test_example(self, name, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        (line,) = (line for line in run(*name.split(), "--help").splitlines() if line.startswith(" Example: "))
        example = line.removeprefix(" Example: ").strip()
        assert example.startswith(f"kornia-tinyvit {name}")
        assert faults_of([example], monkeypatch) == []

    def test_options_are_grouped(self, name):
        panels = [each.rich_help_panel for each in COMMANDS[name].params if each.param_type_name == "option"]
        panels = [panel for panel in panels if panel is not None]
        assert all(PANELS.index(one) <= PANELS.index(two) for one, two in pairwise(panels))

    def test_names(self, name):
        names = {each for parameter in COMMANDS[name].params for each in parameter.opts}
        assert {"--json", "--quiet"} <= names
        assert not names & {"--pretrained", "--checkpoint", "--cpu", "--layout", "--as-json"}
        required = [each for each in COMMANDS[name].params if each.required and each.param_type_name == "option"]
        assert {each.opts[0] for each in required} <= {"--weights", "--out", "--teacher"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("clasify a.jpg", "No such command 'clasify'"),
        ("classify", "Missing argument"),
        ("classify a.jpg --top 3", "No such option: --top"),
        ("classify a.jpg --top-k three", "Invalid value for '--top-k'"),
        ("export", "Missing option '--out'"),
        ("train x --task panoptic", "'panoptic'"),
    ],
)
def test_usage_errors(words, message, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["kornia-tinyvit", *words.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    assert (stop.value.code, out) == (2, "")
    error, hint = err.splitlines()
    assert error.startswith("Error: ")
    assert message in error
    assert re.fullmatch(r"See kornia-tinyvit( \w+)* --help\.", hint)


def test_quiet_and_json(tmp_path):
    folder = make_images(tmp_path / "data", each=1)
    for own, known in zip(CLASSES, ("cat", "dog", "ship"), strict=True):
        (folder / own).rename(folder / known)
    output, notes = run_both("evaluate", str(folder))
    assert notes.startswith("3 images, 3 classes; not divided into splits; device cpu; weights cifar10\n")
    assert run_both("evaluate", str(folder), "--quiet") == (output, "")
    report, notes = run_both("evaluate", str(folder), "--json")
    assert json.loads(report)["images"] == 3
    assert "3 images" in notes
    for command in ("demo", "convert"):
        photos = [str(next(folder.rglob("*.png")))] if command == "demo" else ["--format", "timm"]
        values = json.loads(run(command, *photos, "--out", str(tmp_path / command), "--json"))
        assert values


class TestDevice:
    def test_auto(self, monkeypatch):
        assert options.find_device("cpu").type == "cpu"
        monkeypatch.setattr(options.torch.accelerator, "is_available", lambda: False)
        assert options.find_device("auto").type == "cpu"
        monkeypatch.setattr(options.torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(options.torch.accelerator, "current_accelerator", lambda: options.torch.device("cuda"))
        assert options.find_device("auto").type == "cuda"

    def test_training(self, monkeypatch, tmp_path):
        def request(device: str) -> TrainingRequest:
            return TrainingRequest(context=None, data=tmp_path, device=device)

        assert request("cpu").cpu
        assert not request("auto").cpu
        with pytest.raises(ValueError, match="--device meta is not the device of this training, cpu"):
            _ = request("meta").cpu
        monkeypatch.setattr(
            options, "find_device", lambda name: options.torch.device("cuda:0" if name == "auto" else name)
        )
        assert not request("cuda").cpu
        assert not request("cuda:0").cpu
        with pytest.raises(ValueError, match="choose GPUs by CUDA_VISIBLE_DEVICES"):
            _ = request("cuda:1").cpu


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out a.onnx --format pt2", "--format pt2 contradicts the ending of --out a.onnx"),
        ("--out a", "--out must end in .onnx or .pt2; got a."),
        ("--out a.pt2 --photos --dynamic-size", "--dynamic-size has no effect with --photos"),
    ],
)
def test_formats_of_export(words, message, monkeypatch, capfd):
    assert message in error_of(capfd, monkeypatch, "export", *shlex.split(words))


@pytest.mark.parametrize("words", ["--out a --format safetensors", "--out a.safetensors --format timm"])
def test_formats_of_convert(words, monkeypatch, capfd):
    assert "contradicts --out a" in error_of(capfd, monkeypatch, "convert", *words.split())
