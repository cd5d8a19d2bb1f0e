"""Every kind of exported ONNX file with the tools that its users run on it."""

from __future__ import annotations

import functools
import io
import logging
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from kornia_tinyvit import ImageClassifier, SemanticSegmenter, TinyViT, TinyViTDetector
from kornia_tinyvit.deploy.export import export_onnx
from kornia_tinyvit.deploy.sam import export_mobile_sam
from kornia_tinyvit.sam import MobileSAM
from tests.conftest import SHALLOW, liven
from tests.sam.reference_network import IMG_SIZE, build_network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FILES = (
    "network",
    "network_opset_18",
    "network_opset_23",
    "network_any_size",
    "features",
    "stages",
    "classifier",
    "segmenter",
    "detector",
    "encoder",
    "decoder",
)
TOOLS = ("check", "infer_shapes", "unoptimized", "simplify", "quantize_dynamic", "quantize_static")


@functools.cache
def network(**changes):
    torch.manual_seed(0)
    return liven(TinyViT(**SHALLOW | changes))


@functools.cache
def mobile_sam():
    reference = build_network()
    sam = MobileSAM(network(mobile_sam=True, num_classes=0, img_size=IMG_SIZE))
    sam.prompt_encoder.load_state_dict(reference.prompt_encoder.state_dict())
    sam.mask_decoder.load_state_dict(reference.mask_decoder.state_dict())
    return sam.eval()


def detector():
    torch.manual_seed(0)
    return TinyViTDetector(
        network(num_classes=0), num_classes=5, hidden_dim=32, num_queries=20, decoder_layers=1
    ).eval()


def segmenter():
    torch.manual_seed(0)
    return SemanticSegmenter(network(num_classes=0), num_classes=5, width=16).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")

    @functools.cache
    def export(kind):
        path = folder / f"{kind}.onnx"
        if kind in ("encoder", "decoder"):
            export_mobile_sam(mobile_sam(), folder)
            return path
        model, settings = {
            "network": (network, {}),
            "network_opset_18": (network, {"opset": 18}),
            "network_opset_23": (network, {"opset": 23}),
            "network_any_size": (network, {"dynamic_size": True}),
            "features": (network, {"method": "forward_features"}),
            "stages": (network, {"method": "forward_intermediates", "dynamic_size": True}),
            "classifier": (lambda: ImageClassifier(network()).eval(), {"pixels": "uint8"}),
            "segmenter": (segmenter, {"dynamic_size": True}),
            "detector": (detector, {}),
        }[kind]
        return export_onnx(model(), path, **settings)

    return export


def open_session(path, optimized=True):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session, inputs):
    return [torch.from_numpy(each) for each in session.run(None, inputs)]


def draw_inputs(path, seed):
    """Return inputs whose dynamic sizes depend on the seed."""
    generator = np.random.default_rng(seed)
    sizes = {"batch": 1 + seed, "prompts": 1 + seed, "mask_inputs": 1, "has_mask_inputs": 1 + seed, "points": 2 + seed}
    sizes |= {"height": 64 + 17 * seed, "width": 96 - 11 * seed}
    inputs = {}
    for value in open_session(path).get_inputs():
        shape = [sizes.get(size, size) for size in value.shape]
        kind = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[value.type]
        if value.name == "images":
            pattern = torch.from_numpy(generator.random((shape[0], 3, 6, 5), np.float32))
            images = torch.nn.functional.interpolate(pattern, shape[2:], mode="bilinear").numpy()
            inputs[value.name] = (255 * images if kind == np.uint8 else images).astype(kind)
        else:
            made = {
                "point_coords": lambda shape: 200 * generator.random(shape),
                "point_labels": lambda shape: generator.integers(0, 2, shape),
                "has_mask_input": np.ones,
                "orig_im_size": lambda _: np.array([100 + seed, 140]),
            }.get(value.name, generator.standard_normal)
            inputs[value.name] = made(shape).astype(kind)
    return inputs


class Reader:
    def __init__(self, path):
        self.inputs = (draw_inputs(path, seed) for seed in (0, 0, 1, 2))

    def get_next(self):
        return next(self.inputs, None)


def apply(tool, path, target):
    """Return a session of what a tool makes of a file."""
    if tool == "check":
        onnx.checker.check_model(path, full_check=True)
    elif tool == "infer_shapes":
        inferred = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
        onnx.save(inferred, target)
        return open_session(target)
    elif tool == "simplify":
        onnxsim = pytest.importorskip("onnxsim")
        simplified, equal = onnxsim.simplify(onnx.load(path))
        assert equal
        onnx.save(simplified, target)
        return open_session(target)
    elif tool.startswith("quantize"):
        from onnxruntime import quantization

        settings = {"calibration_data_reader": Reader(path)} if tool == "quantize_static" else {}
        if tool == "quantize_dynamic" and path.stem == "network_opset_23":
            # The quantizer takes ONNX's Attention for ONNX Runtime's operator of that name.
            settings["op_types_to_quantize"] = ["MatMul", "Gemm", "Conv"]
        getattr(quantization, tool)(path, target, **settings)
        return open_session(target)
    return open_session(path, optimized=tool != "unoptimized")


def match_queries(expected, found):
    """Return the queries of a detector in the order of another's."""
    order = torch.cdist(torch.cat(expected, -1), torch.cat(found, -1)).argmin(-1, keepdim=True)
    return [each.gather(1, order.expand(-1, -1, each.shape[-1])) for each in found]


@pytest.fixture(autouse=True)
def silent():
    """The quantizer prints every tensor that it leaves out, and configures the root logger."""
    handlers = list(logging.root.handlers)
    with redirect_stdout(io.StringIO()):
        yield
    logging.root.handlers[:] = handlers


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "network" else pytest.mark.slow) for kind in FILES]
)
def test_tools(exported, tmp_path, kind, tool):
    path = exported(kind)
    reference, session = open_session(path), apply(tool, path, tmp_path / "new.onnx")
    assert [each.shape for each in session.get_inputs()] == [each.shape for each in reference.get_inputs()]
    for seed in (1, 2):  # two values of every dynamic size
        inputs = draw_inputs(path, seed)
        expected, found = run(reference, inputs), run(session, inputs)
        assert [each.shape for each in found] == [each.shape for each in expected]
        if kind == "detector":
            found = match_queries(expected, found)
        for wanted, actual in zip(expected, found, strict=True):
            if tool.startswith("quantize"):  # 8 bits of a small network, calibrated on four images
                assert (actual - wanted).norm() / wanted.norm() < 0.5
            else:
                torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)
