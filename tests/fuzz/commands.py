"""Hostile words for the command line: exit status 0, 1 with a sentence, or 2 with typer's usage; never a traceback."""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import sys
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest import mock

import typer

from kornia_tinyvit.checkpoints import tensors
from kornia_tinyvit.cli import app, distill_app, main
from tests.fuzz.data import a_image, valid
from tests.fuzz.files import contents
from tests.fuzz.harness import Rejected, Target, error_fault, mutate

NUMBERS = ("0", "1", "-1", "2", "3", "64", "1e9", "99999999999999999999", "nan", "inf", "0.5", "x", "", "½")
WORDS = (
    "",
    "x",
    "\0",
    "--",
    "-",
    "5m",
    "9m",
    "1m",
    "cifar10",
    "cpu",
    "cuda:9",
    "meta",
    "png",
    "stop",
    "skip",
    "no",
    "fp16",
    "ü\n",
)


LONG = ("repetitions", "epochs", "steps")  # 10**20 of them are asked for rightly, and take what they take
FILES = ("weights", "sam_weights", "teacher", "store", "variant")  # texts that may be paths


@cache
def commands() -> dict[tuple[str, ...], Any]:
    """Return the parameters of every command by its words."""
    root: Any = typer.main.get_command(app)
    found = {}
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        if inner is None:
            found[name,] = command.params
        else:
            found |= {(name, each): below.params for each, below in inner.items()}
    return found


@cache
def kinds() -> dict[str, dict[str, type]]:
    """Return the type of each command's parameters, without ``None`` and lists."""
    found: dict[str, dict[str, type]] = {}
    for each in (*app.registered_commands, *distill_app.registered_commands):
        assert each.callback is not None
        hints = get_type_hints(each.callback)
        found.setdefault(each.callback.__name__, {}).update({name: _plain(hint) for name, hint in hints.items()})
    return found


def _plain(hint: Any) -> type:
    inner = [each for each in get_args(hint) if each is not type(None)]
    return _plain(inner[0]) if inner else hint


def a_word(rng: random.Random, kind: type, name: str, folder: Path) -> str:
    """Return a value for a parameter, most of the time of its kind."""
    if issubclass(kind, Path) or (name in FILES and rng.random() < 0.7):
        return a_place(rng, folder)
    if issubclass(kind, Enum) and rng.random() < 0.8:
        return str(rng.choice(list(kind)).value)
    if name in LONG:
        return rng.choice(NUMBERS[:4])
    return rng.choice(NUMBERS if issubclass(kind, (int, float)) or rng.random() < 0.2 else WORDS)


def a_place(rng: random.Random, folder: Path) -> str:
    """Write something where a path is expected, and return the path."""
    kind = rng.randrange(8)
    path = folder / f"p{rng.randrange(10**6)}"
    if kind == 0:
        return str(path / "none")
    if kind == 1:
        return rng.choice(("/proc/none", "/dev/null", "/dev/null/x", "\0", "x" * 5000, "", ".", "/dev/full"))
    if kind == 2:
        path.mkdir()
        return str(a_image(rng, path))
    if kind == 3:
        path = path.with_suffix(rng.choice((".yaml", ".json", ".tar", ".parquet", ".txt")))
        path.write_bytes(mutate(rng, b'{"train": "images", "val": "images", "names": ["a"]}'))
        return str(path)
    if kind == 4:
        path = path.with_suffix(rng.choice((".safetensors", ".pt")))
        content = contents()[rng.choice(("own", "detector", "segmenter", "zip"))]
        path.write_bytes(mutate(rng, content, 2000) if rng.random() < 0.5 else content)
        return str(path)
    for name in rng.choice((("cat", "dog"), ("images", "masks"), ("images", "labels"), ("cat",), ())):
        (path / name).mkdir(parents=True)
        (path / name / "1.png").write_bytes(valid("RGB", "png"))
    path.mkdir(exist_ok=True)
    return str(path)


def a_line(rng: random.Random, folder: Path) -> list[str]:
    """Return words for a command, most of them of the right kind."""
    words = rng.choice(list(commands()))
    line = list(words)
    options = [each for each in commands()[words] if each.param_type_name == "option"]
    chosen = rng.sample(options, min(len(options), rng.choice((0, 1, 2, 4))))
    for parameter in (*chosen, *(each for each in commands()[words] if each.param_type_name == "argument")):
        kind = kinds()[words[-1]].get(str(parameter.name), str)
        if parameter.param_type_name == "option":
            line.append(rng.choice(parameter.opts))
        if kind is not bool:
            line.append(a_word(rng, kind, str(parameter.name), folder))
    given = {word for word in line if word.startswith("--")}
    return line + _small(words, given, folder)


def _small(words: tuple[str, ...], given: set[str], folder: Path) -> list[str]:
    """Return options that keep what is accepted small and inside of the folder."""
    known = {name for parameter in commands()[words] for name in parameter.opts}
    usual = {
        "--out": str(folder / "out"), "--variant": "1m", "--weights": "cifar10", "--epochs": "1", "--workers": "0",
        "--img-size": "32", "--recipe": "cifar10", "--batch-size": "2", "--repetitions": "1", "--engines": "eager",
        "--steps": "1", "--batch-sizes": "1",
    }  # fmt: skip
    if words[-1] in ("segment", "detect"):
        usual.pop("--img-size")
    return [word for name, value in usual.items() if name in known - given for word in (name, value)]


def command_line(rng: random.Random, folder: Path) -> None:
    line = [word.replace("\0", "") if rng.random() < 0.9 else word for word in a_line(rng, folder)]
    status, error, cause = run(line, folder)
    assert status in (0, 1, 2), f"status {status} of {line}"
    assert "Traceback" not in error, f"a traceback of {line}"
    if status == 1 and cause is not None:
        assert error.startswith("Error: "), f"{error[:80]!r} of {line}"
        reason = error_fault(cause)
        place = _place(cause)
        assert reason is None or _of_the_system(cause), (
            f"{reason}: {type(cause).__name__} {place} {str(cause)[:120]} of {line[0]}"
        )
    if status:
        raise Rejected("an error of the command line")


def _place(error: BaseException) -> str:
    trace = inspect.getinnerframes(error.__traceback__)[-1]  # type: ignore[arg-type]
    return f"at {Path(trace.filename).name}:{trace.lineno}"


def _of_the_system(error: BaseException) -> bool:
    """Return whether an error is from the operating system and names a file."""
    return isinstance(error, OSError) and error.filename is not None


def run(line: list[str], folder: Path) -> tuple[int, str, BaseException | None]:
    """Run a command in this process, without a network; return its status, its errors and their cause."""
    out, error = io.StringIO(), io.StringIO()

    def no_network(*_: Any, **__: Any) -> str:
        raise RuntimeError("no network here")

    with (
        mock.patch.object(sys, "argv", ["kornia-tinyvit", *line]),
        mock.patch.object(tensors, "download_file_from_url", no_network),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        contextlib.chdir(folder),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
            cause = end.__context__ if code == 1 and not isinstance(end.__context__, SystemExit) else None
            return code, error.getvalue(), None if "Exit" in type(cause).__name__ else cause
    return 0, error.getvalue(), None


TARGETS = (Target("command lines", command_line, (), seconds=60, megabytes=2000, num_cases=8),)
