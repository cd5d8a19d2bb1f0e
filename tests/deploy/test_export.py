import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kornia_tinyvit import ImageClassifier, SemanticSegmenter, TinyViT, TinyViTConfig, TinyViTDetector
from kornia_tinyvit.deploy import export
from kornia_tinyvit.deploy.export import ExportError, check_difference, export_onnx, export_program
from kornia_tinyvit.deploy.openvino_core import openvino_core
from kornia_tinyvit.detection import DetectorConfig
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.sam import MobileSAM
from kornia_tinyvit.semantic import SegmenterConfig
from tests.conftest import SHALLOW, liven
from tests.deploy.conftest import checksum

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def by_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]


def by_openvino(path):
    pytest.importorskip("openvino")
    core = openvino_core()
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: [torch.from_numpy(each.copy()) for each in model(images.numpy()).values()]


ENGINES = [by_onnxruntime, by_openvino]


def check(outputs, expected):
    torch.testing.assert_close(list(outputs), [each.detach() for each in expected], atol=1e-3, rtol=1e-3)


def outputs(path):
    return [output.name for output in onnx.load(path).graph.output]


def shapes(path):
    graph = onnx.load(path).graph
    dims = {each.name: each.type.tensor_type.shape.dim for each in [*graph.input, *graph.output]}
    return {name: [dim.dim_param or dim.dim_value for dim in sizes] for name, sizes in dims.items()}


def properties(path):
    return {each.key.removeprefix("kornia_tinyvit."): json.loads(each.value) for each in onnx.load(path).metadata_props}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Trace equal graphs only once in this module."""
    with pytest.MonkeyPatch.context() as patch:
        trace, programs = export.ExportTask.program, {}

        def program(task):
            graph = task.graph
            key = (checksum(graph), graph.method, graph.pixels, task.size, task.dynamic_batch, task.dynamic_size)
            if key not in programs:
                programs[key] = trace(task)
            return programs[key]

        patch.setattr(export.ExportTask, "program", program)
        yield


@pytest.fixture(scope="module")
def classifier(model):
    return ImageClassifier(model, class_names=["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]).eval()


@pytest.fixture(scope="module")
def classifier_file(classifier, folder):
    return str(export_onnx(classifier, folder / "classifier.onnx", pixels="uint8", opset=23))


@pytest.fixture(scope="module")
def backbone_file(model, folder):
    path = folder / "new" / "backbone.onnx"
    return str(export_onnx(model, path, method="forward_intermediates", dynamic_size=True))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return liven(TinyViT(**SHALLOW | {"mobile_sam": True, "num_classes": 0}))


@pytest.fixture(scope="module")
def encoder_file(encoder, folder):
    return str(export_onnx(encoder, folder / "encoder.onnx", img_size=(64, 96), dynamic_batch=False))


class TestOnnx:
    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("shape", [(1, 120, 160), (4, 160, 120), (2, 33, 90), (1, 64, 64)])
    def test_classifier(self, classifier, classifier_file, engine, shape):
        batch, height, width = shape
        images = nn.functional.interpolate(torch.rand(batch, 3, 5, 6), (height, width)).mul(255).to(torch.uint8)
        check(engine(classifier_file)(images), [classifier(images / 255)])

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("shape", [(1, 64, 64), (3, 70, 33), (2, 39, 128), (1, 32, 32)])
    def test_backbone(self, model, backbone_file, engine, shape):
        batch, height, width = shape
        images = torch.randn(batch, 3, height, width)
        check(engine(backbone_file)(images), model.forward_intermediates(images))

    @pytest.mark.parametrize("engine", ENGINES)
    def test_encoder(self, encoder, encoder_file, engine):
        images = torch.randn(1, 3, 64, 96)
        check(engine(encoder_file)(images), [encoder(images)])

    def test_outputs(self, classifier_file, backbone_file, encoder_file):
        assert outputs(classifier_file) == ["logits"]
        assert outputs(backbone_file) == ["stage1", "stage2", "stage3", "stage4"]
        assert outputs(encoder_file) == ["embedding"]

    def test_operators(self, classifier_file, encoder_file):
        kinds = {}
        for path, opset in ((classifier_file, 23), (encoder_file, 20)):
            proto = onnx.load(path)
            assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
            kinds[opset] = {node.op_type for node in proto.graph.node}
        assert {"Gelu", "Attention"} <= kinds[23]
        assert "Gelu" in kinds[20]
        assert "Attention" not in kinds[20]

    def test_static_shapes(self, encoder_file):
        [images] = onnx.load(encoder_file).graph.input
        assert images.name == "images"
        assert [dim.dim_value for dim in images.type.tensor_type.shape.dim] == [1, 3, 64, 96]

    def test_axes(self, classifier_file, backbone_file):
        assert shapes(classifier_file) == {"images": ["batch", 3, "height", "width"], "logits": ["batch", 7]}
        found = shapes(backbone_file)
        assert found["images"] == ["batch", 3, "height", "width"]
        for name, stride in zip(("stage1", "stage2", "stage3", "stage4"), (4, 8, 16, 32), strict=True):
            batch, _, *sides = found[name]
            assert batch == "batch"
            assert [eval(side, {"height": 70, "width": 33}) for side in sides] == [-(-70 // stride), -(-33 // stride)]

    def test_weights_have_no_value_info(self, classifier_file, backbone_file, encoder_file):
        """ONNX Runtime's quantizer transposes weights, and then fails on an entry with the old shape."""
        for path in (classifier_file, backbone_file, encoder_file):
            graph = onnx.load(path).graph
            weights = {each.name for each in graph.initializer}
            assert weights
            assert graph.value_info
            assert weights.isdisjoint(each.name for each in graph.value_info)

    def test_metadata(self, classifier, classifier_file, model, backbone_file):
        values = properties(classifier_file)
        assert TinyViTConfig.from_dict(values["config"]) == classifier.model.config
        assert tuple(values["class_names"]) == classifier.class_names
        assert values["kind"] == "classifier"
        assert values["method"] == "forward"
        assert values["input"]["pixels"] == "uint8"
        assert values["input"]["range"] == [0, 255]
        assert values["input"]["normalization_inside"]
        assert values["input"]["resize_inside"]
        assert values["input"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
        values = properties(backbone_file)
        assert TinyViTConfig.from_dict(values["config"]) == model.config
        assert "class_names" not in values
        assert not values["input"]["normalization_inside"]
        assert not values["input"]["resize_inside"]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return liven(TinyViT(**SHALLOW | {"num_classes": 0}))


@pytest.fixture(scope="module")
def segmenter(backbone):
    torch.manual_seed(0)
    return SemanticSegmenter(backbone, class_names=["sky", "sea"], num_classes=2, width=8).eval()


@pytest.fixture(scope="module")
def detector(backbone):
    torch.manual_seed(0)
    settings = {"hidden_dim": 32, "num_queries": 20, "decoder_layers": 1}
    return TinyViTDetector(backbone, num_classes=2, class_names=["ant", "bee"], **settings).eval()


class TestTasks:
    @pytest.mark.slow
    def test_segmenter(self, segmenter, folder):
        path = str(export_onnx(segmenter, folder / "segmenter.onnx"))
        images = torch.rand(2, 3, 64, 64)
        check(by_onnxruntime(path)(images), [segmenter(images)])
        assert shapes(path) == {"images": ["batch", 3, 64, 64], "logits": ["batch", 2, 64, 64]}
        values = properties(path)
        assert values["kind"] == "segmenter"
        assert SegmenterConfig.from_dict(values["config"]) == segmenter.config
        assert values["class_names"] == ["sky", "sea"]
        assert values["input"]["range"] == [0, 1]
        assert values["input"]["normalization_inside"]
        assert not values["input"]["resize_inside"]

    @pytest.mark.slow
    @pytest.mark.parametrize("pixels", ["unit", "uint8"])
    def test_detector(self, detector, folder, pixels):
        path = str(export_onnx(detector, folder / f"{pixels}.onnx", pixels=pixels))
        for shape in ((1, 3, 90, 120), (3, 3, 64, 50)):
            images = nn.functional.interpolate(torch.rand(*shape[:2], 5, 6), shape[2:])
            levels = (255 * images).byte()
            found = by_onnxruntime(path)(levels if pixels == "uint8" else images)
            check(found, detector(levels / 255 if pixels == "uint8" else images))
        sizes = {"images": ["batch", 3, "height", "width"], "logits": ["batch", 20, 2], "boxes": ["batch", 20, 4]}
        assert shapes(path) == sizes
        values = properties(path)
        assert values["kind"] == "detector"
        assert DetectorConfig.from_dict(values["config"]) == detector.config
        assert values["class_names"] == ["ant", "bee"]
        assert values["input"]["pixels"] == pixels
        assert values["input"]["resize_inside"]
        assert values["input"]["crop_fraction"] is None

    def test_order_of_queries(self):
        """Rounding swaps queries of almost equal scores; other differences are errors."""
        expected = [torch.randn(2, 20, 3), torch.rand(2, 20, 4)]
        order = torch.randperm(20)
        found = export._match_queries(expected, [each[:, order] for each in expected])
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        expected[1][0, 3] += 0.1
        with pytest.raises(ExportError, match="boxes"):
            check_difference("boxes", expected[1], export._match_queries(expected, found)[1], 1e-4)

    def test_outputs_of_other_modules(self, backbone):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone = backbone

            def forward(self, images):
                x = self.backbone(images)
                return x, x.sum(1)

        assert export.ExportTask(Pair()).outputs == ["output1", "output2"]
        assert export.ExportTask(nn.Sequential(backbone)).outputs == ["output"]
        assert json.loads(export.ExportTask(Pair()).metadata()["kornia_tinyvit.kind"]) == "module"

    def test_documented_metadata(self, segmenter, detector, classifier):
        """The guide lists every key, and every field of the input."""
        page = (Path(__file__).parents[2] / "docs/guides/onnx.rst").read_text()
        for model in (segmenter, detector, classifier):
            metadata = export.ExportTask(model).metadata()
            names = {key.removeprefix("kornia_tinyvit.") for key in metadata}
            assert {"version", "kind", "config", "method", "input", "class_names"} == names
            fields = json.loads(metadata["kornia_tinyvit.input"])
            assert [name for name in [*names, *fields] if f"``{name}``" not in page] == []

    def test_mobile_sam(self):
        with pytest.raises(ValueError, match="A MobileSAM has two graphs; export it with export_mobile_sam"):
            export.ExportTask(MobileSAM(TinyViT(**SHALLOW | {"mobile_sam": True, "num_classes": 0})))


class TestPrograms:
    def test_backbone(self, model, folder):
        path = export_program(model, folder / "backbone.pt2", method="forward_intermediates", dynamic_size=True)
        files = {"metadata.json": ""}
        program = torch.export.load(path, extra_files=files).module()
        for shape in ((1, 3, 64, 64), (3, 3, 70, 33), (2, 3, 39, 128)):
            images = torch.randn(shape)
            check(program(images), model.forward_intermediates(images))
        assert "kornia_tinyvit.config" in json.loads(files["metadata.json"])

    def test_suffix(self, model, folder):
        with pytest.raises(ValueError, match=r"end in \.pt2; got backbone\.onnx"):
            export_program(model, folder / "backbone.onnx")

    def test_without_compiler(self, model, folder, monkeypatch):
        from torch._inductor import cpp_builder, exc

        def raise_error(*_):
            raise exc.InvalidCxxCompiler

        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", raise_error)
        with pytest.raises(ExportError, match="needs a C\\+\\+ compiler"):
            export_program(model, folder / "none.pt2", compiled=True)


class TestErrors:
    @pytest.fixture
    def place(self, tmp_path):
        path = tmp_path / "network.pt2"
        path.write_text("old")
        yield path
        assert [entry.name for entry in tmp_path.iterdir()] == ["network.pt2"]
        assert path.read_text() == "old"

    @pytest.mark.slow
    def test_mismatch(self, model, place, monkeypatch):
        load = torch.export.load

        def load_modified(path):
            program = load(path)
            with torch.no_grad():
                program.state_dict["network.head.bias"][0] += 0.01
            return program

        monkeypatch.setattr(torch.export, "load", load_modified)
        with pytest.raises(ExportError, match=r"differs from the network by .* in logits, more than 0\.0001"):
            export_program(model, place)

    def test_failing_write(self, model, place, monkeypatch):
        def write_partially(path, archive):
            with path.open("wb") as file:
                file.write(archive[:99])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write_partially)
        with pytest.raises(OSError, match=rf"No space left on device: '{place}'"):
            export_program(model, place)

    def test_shapes_and_nan(self):
        with pytest.raises(ExportError, match=r"\(1, 2\) instead of \(1, 3\)"):
            check_difference("logits", torch.zeros(1, 3), torch.zeros(1, 2), 1e-4)
        with pytest.raises(ExportError, match="by nan"):
            check_difference("logits", torch.zeros(1, 3), torch.full((1, 3), torch.nan), 1e-4)

    @pytest.mark.parametrize("opset", [17, 99])
    def test_opset(self, model, place, opset):
        with pytest.raises(ValueError, match=f"opset must be from 18 to .*; got {opset}"):
            export_onnx(model, place, opset=opset)

    def test_another_opset(self, encoder, encoder_file, place, monkeypatch):
        """torch silently falls back to another opset if it does not support the requested one."""
        monkeypatch.setattr(export, "to_onnx", lambda *_, **__: onnx.load(encoder_file))
        with pytest.raises(ExportError, match=r"wrote opset \{'': 20\} instead of 21"):
            export_onnx(encoder, place, opset=21)

    @pytest.mark.usefixtures("without_onnxscript")
    def test_missing_extra(self, model, place):
        with pytest.raises(MissingExtraError, match=r"pip install 'kornia-tinyvit\[export\]'"):
            export_onnx(model, place)

    def test_class_names(self, model, place):
        with pytest.raises(ValueError, match="Got 1 class names for 7 classes"):
            export_onnx(model, place, class_names=["cat"])

    def test_model_without_tinyvit(self, place):
        with pytest.raises(ValueError, match="no TinyViT in this Identity"):
            export_onnx(nn.Identity(), place)
