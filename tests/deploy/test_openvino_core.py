import os
import subprocess
import sys

import pytest

from kornia_tinyvit.deploy.openvino_core import openvino_core, shared_core, without_telemetry

with without_telemetry():
    openvino = pytest.importorskip("openvino", reason="needs kornia-tinyvit[openvino]")

# A worker of a data loader ends, of which Python's handler is told on the stack for signal handlers.
ENGINES_COME_AND_GO = """
import gc, os, signal, sys, torch
from kornia_tinyvit import TinyViT
from kornia_tinyvit.deploy import engines
from kornia_tinyvit.deploy.graph import build_graph
from tests.conftest import SHALLOW

graph, images = build_graph(TinyViT(**SHALLOW).eval()), torch.rand(1, 3, 64, 64)
first, second = (engines.OpenVinoEngine(graph, images, torch.float32) for _ in range(2))
for name in ("first", "second"):
    del globals()[name]
    gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("told"))
if os.fork() == 0:
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_signals_after_engines_that_ended():
    done = subprocess.run([sys.executable, "-c", ENGINES_COME_AND_GO], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


def test_one_core():
    own = openvino.Core
    with shared_core():
        assert openvino.Core() is openvino_core()
    assert openvino.Core is own
    assert openvino_core() is openvino_core()


def test_without_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "false")
    monkeypatch.delenv("NNCF_CI", raising=False)
    with without_telemetry():
        assert (os.environ["CI"], os.environ["NNCF_CI"]) == ("true", "1")
    assert os.environ["CI"] == "false"
    assert "NNCF_CI" not in os.environ
