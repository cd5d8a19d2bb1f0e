import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch

from kornia_tinyvit import files
from kornia_tinyvit.files import locked, replacing, write_text, writing


def test_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "notes.txt"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
        assert os.listdir(path.parent) == ["notes.txt"]


def test_path_as_str(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with replacing("notes.txt") as temporary:
        temporary.write_text("here")
    assert (tmp_path / "notes.txt").read_text() == "here"


def test_write_text(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    for text in ("first", "zweite Fassung, schöner\n"):
        write_text(path, text)
        assert path.read_bytes().decode("utf-8") == text
    assert os.listdir(path.parent) == ["notes.txt"]


@pytest.mark.parametrize(("suffix", "end"), [((), ".tmp"), ((".pt2",), ".pt2")])
def test_temporary_name(tmp_path, suffix, end):
    """It is hidden, in the folder of the file, has the suffix and is unique."""
    path = tmp_path / "program.pt2"
    with replacing(path, *suffix) as first, replacing(path, *suffix) as second:
        assert first != second
        for temporary in (first, second):
            assert not temporary.exists()
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(".program.pt2.")
            assert temporary.suffix == end
            temporary.write_text(temporary.name)
    assert path.read_text() == first.name  # the block that ended last


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("half", [False, True])
def test_error(tmp_path, error, half):
    path = tmp_path / "notes.txt"
    path.write_text("the old file")

    def fail(temporary):
        if half:
            temporary.write_text("half")
        raise error

    with pytest.raises(type(error)), replacing(path) as temporary:
        fail(temporary)
    assert path.read_text() == "the old file"
    assert os.listdir(tmp_path) == ["notes.txt"]


WRITERS = {
    "text": lambda path: path.write_text("x" * 50_000),
    "safetensors": lambda path: safetensors.torch.save_file({"x": torch.zeros(10_000)}, path),
    "torch": lambda path: torch.save({"x": torch.zeros(10_000)}, path),
}


@pytest.fixture
def small_files():
    """Limit the size of files to 20 kB in this process."""
    resource = pytest.importorskip("resource", reason="needs POSIX resource limits")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk(tmp_path, writer, small_files):
    """The error of any writer is the system's and has the name of the file."""
    path = tmp_path / "notes.txt"
    path.write_text("the old file")
    with (
        pytest.raises(OSError, match=r"File too large|No space left on device") as caught,
        replacing(path) as temporary,
    ):
        WRITERS[writer](temporary)
    assert caught.value.filename == str(path)
    assert path.read_text() == "the old file"
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("error", [ValueError("os error"), RuntimeError("unexpected pos"), OSError("broken")])
def test_other_errors_are_not_changed(error):
    with pytest.raises(type(error)) as caught, writing("notes.txt"):
        raise error
    assert caught.value is error


def test_errors_with_a_path_are_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"), writing(tmp_path / "notes.txt"):
        (tmp_path / "missing.txt").read_text()


def test_nothing_written(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("the old file")
    with pytest.raises(FileNotFoundError, match=r"\.notes\.txt\..*\.tmp"), replacing(path):
        pass
    assert path.read_text() == "the old file"


def test_target_is_a_folder(tmp_path):
    (tmp_path / "notes.txt").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "notes.txt") as temporary:
        temporary.write_text("text")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_synced_before_replacing(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (order.append(name), real(*args)))
    with replacing(tmp_path / "notes.txt") as temporary:
        temporary.write_text("text")
    assert order == ["fsync", "replace"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    path = tmp_path / "notes.txt"
    old = os.umask(mask)
    try:
        with replacing(path) as temporary:
            temporary.write_text("text")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed(tmp_path):
    """A process killed while it writes leaves the old file and a hidden temporary file."""
    path = tmp_path / "notes.txt"
    path.write_text("the old file")
    code = f"""
        import os, runpy, signal
        replacing = runpy.run_path({files.__file__!r})["replacing"]  # importing the package takes seconds
        with replacing({str(path)!r}) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "the old file"
    (leftover,) = (name for name in os.listdir(tmp_path) if name != "notes.txt")
    assert leftover.startswith(".notes.txt.")
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [BlockingIOError, ValueError])
def test_locked(tmp_path, error):
    path = tmp_path / "new" / ".lock"
    for _ in range(2):  # it is released at the end
        with locked(path, "held"), pytest.raises(error, match=r"^held$"), locked(path, "held", error):
            pass
