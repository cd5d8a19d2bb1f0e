import contextlib
import os
import threading

import pytest
import torch
from torch import nn

from kornia_tinyvit import TinyViT
from kornia_tinyvit.deploy.engines import ENGINES, EagerEngine, InductorEngine, fuse_activations
from kornia_tinyvit.deploy.graph import build_graph
from kornia_tinyvit.folding import fold
from tests.conftest import SHALLOW, liven

pytestmark = pytest.mark.usefixtures("exported_once")
CPU = torch.device("cpu")
SHAPES = [(2, 3, 64, 64), (3, 3, 64, 64), (1, 3, 70, 96)]


def random_images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def engines(model):
    """Engines in float32, each made once."""
    made = {}

    def make(name: str):
        if ENGINES[name].missing():
            pytest.skip(ENGINES[name].missing())
        if name not in made:
            made[name] = ENGINES[name](build_graph(model), random_images(*SHAPES[0]), torch.float32)
        return made[name]

    return make


class TestSameResults:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
    @pytest.mark.slow
    def test_any_batch_and_size(self, engines, model, name, shape):
        images = random_images(*shape)
        torch.testing.assert_close(engines(name)(images), model(images).detach(), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
    def test_results_outlive_the_next_call(self, engines, name):
        first = engines(name)(random_images(2, 3, 64, 64))
        kept = first.clone()
        engines(name)(10 * random_images(2, 3, 64, 64))
        assert torch.equal(first, kept)

    @pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
    def test_threads(self, engines, model, name):
        engine, images = engines(name), [random_images(2, 3, 64, 64) * scale for scale in (1, 2, 3, 4)]
        found: dict[int, list[torch.Tensor]] = {}

        def work(index: int) -> None:
            found[index] = [engine(images[index]) for _ in range(5)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, outputs in found.items():
            for output in outputs:
                torch.testing.assert_close(output, model(images[index]).detach(), atol=1e-4, rtol=1e-4)

    def test_openvino_threads_are_not_pinned(self, engines):
        if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
            pytest.skip("needs Linux and two processors")
        engine, images, bound = engines("openvino"), random_images(2, 3, 64, 64), set()
        worker = threading.Thread(target=lambda: [engine(images) for _ in range(20)])
        worker.start()
        while worker.is_alive():
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(OSError):  # it has ended
                    bound.add(frozenset(os.sched_getaffinity(int(thread))))
        assert bound == {frozenset(os.sched_getaffinity(0))}

    def test_bfloat16(self, model):
        for name, engine in ENGINES.items():
            if name == "inductor" or engine.missing() or torch.bfloat16 not in engine.dtypes(CPU):
                continue
            images = random_images(2, 3, 64, 64)
            found = engine(build_graph(model), images, torch.bfloat16)(images)
            assert found.dtype == torch.float32
            error = (found - model(images)).norm() / model(images).norm()
            assert 1e-5 < error < 0.05

    @pytest.mark.slow
    def test_inductor(self, model):
        if InductorEngine.missing():
            pytest.skip(InductorEngine.missing())
        engine = InductorEngine(build_graph(model), random_images(2, 3, 32, 32), torch.float32)
        images = random_images(2, 3, 32, 32)
        torch.testing.assert_close(engine(images), model(images).detach(), atol=1e-4, rtol=1e-4)


class TestFusedActivations:
    def test_exact_and_complete(self, model):
        folded = fold(model)
        images = random_images(2, 3, 64, 64)
        expected = folded(images)
        fuse_activations(folded)
        left = [name for name, module in folded.named_modules() if isinstance(module, nn.GELU)]
        assert left == ["layers.0.blocks.0.act3"]  # behind a sum
        torch.testing.assert_close(folded(images), expected, atol=1e-4, rtol=1e-4)

    def test_other_activations_stay(self):
        folded = fold(liven(TinyViT(**SHALLOW | {"activation": nn.Hardswish})))
        images = random_images(1, 3, 64, 64)
        expected = folded(images)
        fuse_activations(folded)
        assert sum(isinstance(module, nn.Hardswish) for module in folded.modules()) > 10
        torch.testing.assert_close(folded(images), expected)


class TestSupport:
    def test_dtypes(self):
        assert EagerEngine.dtypes(CPU)[0] == torch.float32
        assert torch.int8 not in EagerEngine.dtypes(CPU)
        assert ENGINES["onnxruntime"].dtypes(CPU) == (torch.float32, torch.int8)
        assert ENGINES["onnxruntime"].dtypes(torch.device("cuda")) == ()

    def test_missing_packages(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert EagerEngine.missing() is None
        line = ENGINES["openvino"].missing()
        assert "openvino, nncf" in line
        assert "pip install 'kornia-tinyvit[openvino]'" in line

    def test_missing_compiler(self, monkeypatch):
        monkeypatch.setattr("kornia_tinyvit.deploy.engines.has_compiler", lambda: False)
        assert "C++ compiler" in InductorEngine.missing()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestCuda:
    @pytest.mark.parametrize("name", ["eager", "inductor"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_same_results(self, model, name, dtype):
        images = random_images(2, 3, 64, 64)
        on_gpu = TinyViT(**SHALLOW).eval()
        on_gpu.load_state_dict(model.state_dict())
        on_gpu.cuda()
        found = ENGINES[name](build_graph(on_gpu), images.cuda(), dtype)(images.cuda()).cpu()
        error = (found - model(images)).norm() / model(images).norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.05)
