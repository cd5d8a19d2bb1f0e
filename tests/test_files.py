import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest

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


def test_name_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with replacing("notes.txt") as temporary:
        temporary.write_text("here")
    assert (tmp_path / "notes.txt").read_text() == "here"


def test_text(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    for text in ("first", "zweite Fassung, schöner\n"):
        write_text(path, text)
        assert path.read_bytes().decode("utf-8") == text
    assert os.listdir(path.parent) == ["notes.txt"]


@pytest.mark.parametrize(("suffix", "end"), [((), ".tmp"), ((".pt2",), ".pt2")])
def test_temporary_name(tmp_path, suffix, end):
    """It is hidden, beside the file, ends as asked, and no two are alike."""
    path = tmp_path / "program.pt2"
    with replacing(path, *suffix) as first, replacing(path, *suffix) as second:
        assert first != second
        for temporary in (first, second):
            assert not temporary.exists()
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(".program.pt2.")
            assert temporary.suffix == end
            temporary.write_text(temporary.name)
    assert path.read_text() == first.name  # the last to end


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
    "text": "temporary.write_text('x' * 50_000)",
    "safetensors": "safetensors.torch.save_file({'x': torch.zeros(10_000)}, temporary)",
    "torch": "torch.save({'x': torch.zeros(10_000)}, temporary)",
}


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on files")
@pytest.mark.parametrize("writer", WRITERS)
def test_full(tmp_path, writer):
    """Whoever writes more than there is room for, the error is the system's and names the file."""
    path = tmp_path / "notes.txt"
    path.write_text("the old file")
    code = f"""
        import resource, signal, safetensors.torch, torch
        from kornia_tinyvit.files import replacing
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            with replacing({str(path)!r}) as temporary:
                {WRITERS[writer]}
        except OSError as error:
            print(error.filename, error.strerror)
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert child.stdout in (f"{path} File too large\n", f"{path} No space left on device\n")
    assert path.read_text() == "the old file"
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("error", [ValueError("os error"), RuntimeError("unexpected pos"), OSError("broken")])
def test_other_errors_stay(error):
    with pytest.raises(type(error)) as caught, writing("notes.txt"):
        raise error
    assert caught.value is error


def test_named_errors_stay(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"), writing(tmp_path / "notes.txt"):
        (tmp_path / "missing.txt").read_text()


def test_nothing_written(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("the old file")
    with pytest.raises(FileNotFoundError, match=r"\.notes\.txt\..*\.tmp"), replacing(path):
        pass
    assert path.read_text() == "the old file"


def test_place_is_a_folder(tmp_path):
    (tmp_path / "notes.txt").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "notes.txt") as temporary:
        temporary.write_text("text")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (order.append(name), real(*given)))
    with replacing(tmp_path / "notes.txt") as temporary:
        temporary.write_text("text")
    assert order == ["fsync", "replace"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_mask(tmp_path, mask):
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
    """A process that is killed as it writes leaves the old file and a hidden leftover, which hinders nobody."""
    path = tmp_path / "notes.txt"
    path.write_text("the old file")
    code = f"""
        import os, runpy, signal
        replacing = runpy.run_path({files.__file__!r})["replacing"]  # without the package, which takes seconds
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
    for _ in range(2):  # it is let go at the end
        with locked(path, "held"), pytest.raises(error, match=r"^held$"), locked(path, "held", error):
            pass
