import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kornia_tinyvit
from kornia_tinyvit import ImageClassifier, TinyViT
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.deploy import quantization
from kornia_tinyvit.deploy.accuracy import compare
from kornia_tinyvit.deploy.openvino_core import openvino_core, without_telemetry
from kornia_tinyvit.deploy.quantization import quantize_onnx, quantize_openvino
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.folding import fold
from kornia_tinyvit.images import read_image
from tests.conftest import shared

onnx = pytest.importorskip("onnx", reason="needs kornia-tinyvit[export]")
ort = pytest.importorskip("onnxruntime", reason="needs kornia-tinyvit[export]")
with without_telemetry():
    pytest.importorskip("openvino", reason="needs kornia-tinyvit[openvino]")
    pytest.importorskip("nncf", reason="needs kornia-tinyvit[openvino]")

pytestmark = pytest.mark.slow  # exports and calibrates a real network
PHOTOS = Path(kornia_tinyvit.__file__).parent / "assets" / "photos"


@pytest.fixture(scope="module")
def network():
    return fold(TinyViT.from_config("1m", pretrained="cifar10"))


@pytest.fixture(scope="module")
def graph(network, tmp_path_factory):
    """The ONNX file of the network."""
    path = tmp_path_factory.mktemp("quantization") / "float.onnx"
    batch = torch.export.Dim("batch", min=1)
    example = torch.randn(2, 3, 96, 96)
    program = torch.onnx.export(
        network, (example,), dynamo=True, opset_version=23, dynamic_shapes=({0: batch},), verbose=False
    )
    program.save(path, external_data=False)
    return path


@pytest.fixture(scope="module")
def crops():
    """Normalized crops of the demo photos, 32 for the calibration and 80 for the comparison."""
    generator = torch.Generator().manual_seed(0)
    photos = [read_image(path) for path in sorted(PHOTOS.glob("*.[jp][pn]g"))]
    pieces = []
    for index in range(112):
        photo = photos[index % len(photos)]
        side = int(torch.randint(48, min(photo.shape[1:]), (), generator=generator))
        top, left = (int(torch.randint(size - side, (), generator=generator)) for size in photo.shape[1:])
        piece = photo[None, :, top : top + side, left : left + side]
        pieces.append(F.interpolate(piece, size=(96, 96), mode="area"))
    pipeline = ImageClassifier.from_config("1m", pretrained="cifar10").preprocessing
    normalized = (torch.cat(pieces) - pipeline.mean.view(1, 3, 1, 1)) / pipeline.std.view(1, 3, 1, 1)
    return normalized[:32], normalized[32:]


@pytest.fixture(scope="module")
def onnx_int8(graph, crops):
    return quantize_onnx(graph, crops[0].split(20))


@pytest.fixture(scope="module")
def openvino_int8(graph, crops):
    return quantize_openvino(openvino_core().read_model(graph), crops[0].split(20))


def run_onnx(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def run_openvino(model):
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


class TestOnnxRuntime:
    def test_agrees(self, network, onnx_int8, crops):
        result = compare(network, run_onnx(onnx_int8), crops[1].split(40))
        assert result.agreement >= 95
        assert 1e-3 < result.mean_error < 0.05  # quantized, with a small error

    def test_linear_layers_are_integers(self, graph, onnx_int8):
        weights = {tensor.name: tensor for tensor in onnx_int8.graph.initializer}
        made_of = {node.output[0]: node for node in onnx_int8.graph.node}
        linear = [node for node in onnx_int8.graph.node if node.op_type in {"MatMul", "Gemm"}]
        assert len(linear) == 49
        for node in linear:
            first, second = (made_of[name] for name in node.input[:2])
            assert first.op_type == second.op_type == "DequantizeLinear"
            weight, scale = (weights[name] for name in second.input[:2])
            assert weight.data_type == onnx.TensorProto.INT8
            assert len(scale.dims) == 1  # one scale per output channel
            assert weight.dims[0 if node.op_type == "Gemm" else 1] == scale.dims[0]
        before = operators(onnx.load(graph))
        assert all(operators(onnx_int8)[name] == before[name] for name in ("Attention", "Gelu", "LayerNormalization"))

    def test_smaller(self, graph, onnx_int8):
        assert len(onnx_int8.SerializeToString()) < 0.5 * graph.stat().st_size

    def test_interface_and_metadata(self, graph, crops):
        model = onnx.load(graph)
        onnx.helper.set_model_props(model, {"classes": "cat,dog"})
        before = model.SerializeToString()
        quantized = quantize_onnx(model, [crops[0][:8]])
        assert model.SerializeToString() == before
        assert [(entry.key, entry.value) for entry in quantized.metadata_props] == [("classes", "cat,dog")]
        assert quantized.graph.input == model.graph.input
        assert quantized.graph.output == model.graph.output

    def test_external_data_and_other_batches(self, graph, onnx_int8, crops, tmp_path):
        external = tmp_path / "external.onnx"
        onnx.save(onnx.load(graph), external, save_as_external_data=True, location="weights.bin", size_threshold=0)
        assert (tmp_path / "weights.bin").stat().st_size > external.stat().st_size
        again = quantize_onnx(str(external), crops[0].split(5))
        assert run_onnx(again)(crops[1]).equal(run_onnx(onnx_int8)(crops[1]))

    def test_no_output_and_no_logging(self, graph, crops, capfd, monkeypatch):
        import logging

        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        quantize_onnx(graph, [crops[0][:2]])
        assert logging.getLogger().handlers == []
        assert capfd.readouterr() == ("", "")


class TestOpenvino:
    def test_agrees(self, network, openvino_int8, crops):
        result = compare(network, run_openvino(openvino_int8), crops[1].split(40))
        assert result.agreement >= 95
        assert 1e-3 < result.mean_error < 0.08

    def test_linear_layers_are_integers(self, openvino_int8):
        compiled = openvino_core().compile_model(openvino_int8, "CPU")
        information = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
        kinds = Counter(
            (str(info["layerType"].astype(str)), str(info["primitiveType"].astype(str))) for info in information
        )
        linear = {primitive: count for (kind, primitive), count in kinds.items() if kind.startswith("FullyConnected")}
        assert sum(linear.values()) == 49
        assert all("i8" in primitive or "u8" in primitive for primitive in linear), linear

    def test_deterministic_and_no_output(self, graph, openvino_int8, crops, capfd):
        float_model = openvino_core().read_model(graph)
        operators = len(float_model.get_ops())
        again = quantize_openvino(float_model, crops[0].split(7))
        assert capfd.readouterr().out == ""
        assert len(float_model.get_ops()) == operators
        assert run_openvino(again)(crops[1]).equal(run_openvino(openvino_int8)(crops[1]))


class TestCifar10:
    """The accuracy drop on a sample of the test images; the documentation has a table of all of them."""

    @pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
    def test_top1(self, network, graph, engine):
        classifier = ImageClassifier.from_config("1m", pretrained="cifar10")

        def batches(name, count):
            photos = ClassificationDataset.open(shared(f"data/cifar10/{name}.parquet")).sample(count)
            for start in range(0, count, 100):
                items = [photos[row] for row in range(start, min(start + 100, count))]
                images = classifier.preprocessing(torch.stack([image for image, _ in items]))
                yield images, torch.tensor([label for _, label in items])

        calibration = (images for images, _ in batches("train", 128))
        if engine == "onnxruntime":
            candidate = run_onnx(quantize_onnx(graph, calibration))
        else:
            candidate = run_openvino(quantize_openvino(openvino_core().read_model(graph), calibration))
        result = compare(network, candidate, batches("test", 1000))
        assert result.images == 1000
        assert result.top1_candidate >= result.top1_reference - 1  # 0.5 points are 5 images
        assert result.agreement >= 97.5


class TestErrors:
    @pytest.fixture(params=["onnxruntime", "openvino"])
    def quantize(self, request, graph):
        if request.param == "onnxruntime":
            return lambda images: quantize_onnx(graph, images)
        return lambda images: quantize_openvino(openvino_core().read_model(graph), images)

    def test_images(self, quantize):
        with pytest.raises(ValueError, match="none"):
            quantize([])
        with pytest.raises(ValueError, match=r"takes images \(B, 3, 96, 96\); got calibration images \(2, 3, 32, 96\)"):
            quantize([torch.rand(2, 3, 32, 96)])
        with pytest.raises(ValueError, match=r"got calibration images \(3, 96, 96\)"):
            quantize(torch.rand(2, 3, 96, 96))
        with pytest.raises(TypeError, match="float32 images; got uint8 calibration images"):
            quantize([torch.zeros(2, 3, 96, 96, dtype=torch.uint8)])
        with pytest.raises(TypeError, match="as tensors; got ndarray"):
            quantize([np.zeros((2, 3, 96, 96), np.float32)])

    def test_missing(self, monkeypatch, graph, crops):
        model = openvino_core().read_model(graph)
        monkeypatch.setitem(sys.modules, "nncf", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'kornia-tinyvit\[openvino\]'"):
            quantize_openvino(model, [crops[0]])
        monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'kornia-tinyvit\[export\]'"):
            quantize_onnx(graph, [crops[0]])


def test_number_of_images_is_limited(graph, monkeypatch):
    assert quantization.CALIBRATION_IMAGES == 256
    monkeypatch.setattr(quantization, "CALIBRATION_IMAGES", 16)
    sizes = []

    def batches():
        while True:
            sizes.append(5)
            yield torch.rand(5, 3, 96, 96)

    quantize_onnx(graph, batches())
    assert sum(sizes) <= 16 + 5
