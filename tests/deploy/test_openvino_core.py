import os
import subprocess
import sys

import pytest

from kornia_tinyvit.deploy.openvino_core import openvino_core, shared_core, without_telemetry

with without_telemetry():
    openvino = pytest.importorskip("openvino", reason="needs kornia-tinyvit[openvino]")

# Forks a child whose exit signals the parent, like the worker of a data loader.
DESTROYED_ENGINES = """
import gc, onnx, os, signal, torch
from kornia_tinyvit.deploy import engines
from kornia_tinyvit.deploy.graph import InferenceGraph

model = onnx.parser.parse_model(
    '<ir_version: 8, opset_import: ["": 17]> relu (float[B, 3, H, W] x) => (float[B, 3, H, W] y) {y = Relu(x)}'
)
graph, images = InferenceGraph(torch.nn.ReLU()), torch.rand(1, 3, 64, 64)
graph.to_onnx = lambda *_, **__: model  # torch's export takes longer than the rest
first, second = (engines.OpenVinoEngine(graph, images, torch.float32) for _ in range(2))
for name in ("first", "second"):
    del globals()[name]
    gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("signal handled"))
if os.fork() == 0:
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_signals_after_destroyed_engines():
    done = subprocess.run([sys.executable, "-c", DESTROYED_ENGINES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "signal handled\n"), done.stderr


def test_shared_core():
    original = openvino.Core
    with shared_core():
        assert openvino.Core() is openvino_core()
    assert openvino.Core is original
    assert openvino_core() is openvino_core()


def test_without_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "false")
    monkeypatch.delenv("NNCF_CI", raising=False)
    with without_telemetry():
        assert (os.environ["CI"], os.environ["NNCF_CI"]) == ("true", "1")
    assert os.environ["CI"] == "false"
    assert "NNCF_CI" not in os.environ
