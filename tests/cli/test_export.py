import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from kornia_tinyvit import ImageClassifier, SemanticSegmenter, TinyViT, TinyViTDetector, save_checkpoint
from kornia_tinyvit.cli import app
from kornia_tinyvit.deploy.export import ExportError
from kornia_tinyvit.sam import MobileSAM
from tests.conftest import SHALLOW, liven
from tests.helpers import CIFAR, error_of, make_weights, run

MODULE = sys.modules["kornia_tinyvit.cli.export"]  # the package has the command under this name


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return make_weights(liven(TinyViT(**SHALLOW)).eval(), tmp_path_factory.mktemp("weights"))


class TestOnnx:
    @pytest.fixture(autouse=True)
    def runtime(self):
        pytest.importorskip("onnxscript")
        return pytest.importorskip("onnxruntime")

    @pytest.mark.slow
    def test_network(self, runtime, weights, tmp_path):
        out = tmp_path / "new" / "network.onnx"
        report = json.loads(run("export", "--out", str(out), "--weights", weights, "--json"))
        assert report == {
            "path": str(out),
            "format": "onnx",
            "method": "forward",
            "pixels": "normalized",
            "dtype": "float32",
            "input": ["B", 3, 64, 64],
            "outputs": {"logits": ["B", 10]},
            "bytes": out.stat().st_size,
        }
        session = runtime.InferenceSession(str(out))
        images = torch.randn(3, 3, 64, 64)
        classifier = ImageClassifier.from_config(pretrained=weights)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), classifier.model(images), rtol=1e-4, atol=1e-4)
        stored = session.get_modelmeta().custom_metadata_map["kornia_tinyvit.class_names"]
        assert tuple(json.loads(stored)) == CIFAR

    @pytest.mark.slow
    def test_photos(self, runtime, weights, tmp_path):
        out = tmp_path / "photos.onnx"
        options = ("--photos", "--pixels", "uint8", "--opset", "18", "--img-size", "96")
        output = run("export", "--out", str(out), "--weights", weights, *options)
        assert output.startswith(f"{out}: ")
        assert output.endswith(" MB, from images (B, 3, H, W), uint8 in [0, 255], to logits (B, 10)\n")
        photo = torch.randint(0, 256, (1, 3, 90, 120), dtype=torch.uint8)
        (found,) = runtime.InferenceSession(str(out)).run(None, {"images": photo.numpy()})
        classifier = ImageClassifier.from_config(pretrained=weights, img_size=96)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), classifier(photo / 255), rtol=1e-3, atol=1e-3)

    def test_differences_are_errors(self, weights, tmp_path, capfd, monkeypatch):
        def fail(*args, **kwargs):
            raise ExportError("The export differs.")

        monkeypatch.setattr(MODULE, "export_onnx", fail)
        out = str(tmp_path / "x.onnx")
        assert "The export differs." in error_of(capfd, monkeypatch, "export", "--out", out, "--weights", weights)


class TestProgram:
    @pytest.mark.slow
    def test_program(self, weights, tmp_path):
        out = tmp_path / "network.pt2"
        assert "(B, 3, 64, 64), float32 normalized, to logits (B, 10)" in run(
            "export", "--out", str(out), "--weights", weights
        )
        images = torch.randn(2, 3, 64, 64)
        classifier = ImageClassifier.from_config(pretrained=weights)
        with torch.no_grad():
            found = torch.export.load(out).module()(images)
            torch.testing.assert_close(found, classifier.model(images), rtol=1e-4, atol=1e-4)

    def test_mobile_sam(self, tmp_path):
        """An encoder, which is no classifier."""
        torch.manual_seed(0)
        encoder = liven(TinyViT(**SHALLOW | {"num_classes": 0, "mobile_sam": True}))
        path = str(save_checkpoint(encoder, tmp_path / "sam.safetensors"))
        report = json.loads(run("export", "--out", str(tmp_path / "sam.pt2"), "--weights", path, "--json"))
        assert report["outputs"] == {"embedding": ["B", 256, 4, 4]}

    def test_settings_reach_the_exporter(self, weights, tmp_path, monkeypatch):
        received = {}

        def write(model, path, **settings):
            received.update(settings)
            path.write_bytes(b"12345")

        monkeypatch.setattr(MODULE, "export_program", write)
        options = ("--method", "forward_intermediates", "--dynamic-size", "--pixels", "unit", "--compiled", "--json")
        report = json.loads(run("export", "--out", str(tmp_path / "maps.pt2"), "--weights", weights, *options))
        assert received == {
            "method": "forward_intermediates",
            "pixels": "unit",
            "dynamic_size": True,
            "compiled": True,
            "class_names": CIFAR,
        }
        assert (report["input"], report["bytes"]) == (["B", 3, "H", "W"], 5)
        assert report["outputs"]["stage1"] == ["B", SHALLOW["embed_dims"][0], 16, 16]
        assert len(report["outputs"]) == len(SHALLOW["depths"])


class TestKinds:
    """Every kind of checkpoint that the package writes."""

    @pytest.fixture
    def received(self, monkeypatch):
        """Replace the exporters, which take seconds, by ones that record the network and the settings."""
        calls = []

        def write(model, path, **settings):
            calls.append((model, settings))
            path.write_bytes(b"12345")

        def write_mobile_sam(sam, folder, *, prefix, opset):
            calls.append((sam, {}))
            folder.mkdir(exist_ok=True)
            paths = folder / f"{prefix}encoder.onnx", folder / f"{prefix}decoder.onnx"
            for path in paths:
                path.write_bytes(b"12345")
            return paths

        monkeypatch.setattr(MODULE, "export_onnx", write)
        monkeypatch.setattr(MODULE, "export_mobile_sam", write_mobile_sam)
        return calls

    @pytest.fixture
    def backbone(self):
        torch.manual_seed(0)
        return TinyViT(**SHALLOW | {"num_classes": 0})

    def test_segmenter(self, received, backbone, tmp_path):
        weights = SemanticSegmenter(backbone, num_classes=5, width=8).save(tmp_path / "best.safetensors")
        out = tmp_path / "segmenter.onnx"
        line = run("export", "--out", str(out), "--weights", str(weights), "--pixels", "uint8", "--dynamic-size")
        assert line.endswith("from images (B, 3, H, W), uint8 in [0, 255], to logits (B, 5, 64, 64)\n")
        [(model, settings)] = received
        assert isinstance(model, SemanticSegmenter)
        assert settings["dynamic_size"]

    def test_detector(self, received, backbone, tmp_path, capfd, monkeypatch):
        detector = TinyViTDetector(backbone, num_classes=5, hidden_dim=32, num_queries=20, decoder_layers=1)
        weights = str(detector.save(tmp_path / "best.safetensors"))
        out = str(tmp_path / "detector.onnx")
        line = run("export", "--out", out, "--weights", weights)
        assert "images (B, 3, H, W), float32 in [0, 1], to logits (B, 20, 5), boxes (B, 20, 4)" in line
        assert isinstance(received[0][0], TinyViTDetector)
        error = error_of(capfd, monkeypatch, "export", "--out", out, "--weights", weights, "--photos")
        assert "--photos has no effect with a detector" in error

    def test_backbone(self, received, backbone, tmp_path):
        weights = str(save_checkpoint(backbone, tmp_path / "backbone.safetensors"))
        assert "to features (B, 32)" in run("export", "--out", str(tmp_path / "b.onnx"), "--weights", weights)
        assert isinstance(received[0][0], TinyViT)

    @pytest.mark.parametrize(
        ("out", "files"),
        [
            ("sam.onnx", ("sam.encoder.onnx", "sam.decoder.onnx")),
            ("new", ("new/encoder.onnx", "new/decoder.onnx")),
        ],
    )
    def test_mobile_sam(self, received, tmp_path, capfd, monkeypatch, out, files):
        encoder = TinyViT(**SHALLOW | {"num_classes": 0, "mobile_sam": True})
        weights = str(save_checkpoint(MobileSAM(encoder), tmp_path / "mobile_sam.safetensors"))
        paths = [tmp_path / name for name in files]
        printed = run("export", "--out", str(tmp_path / out), "--weights", weights)
        assert printed == "".join(f"{path}: 0.0 MB\n" for path in paths)
        assert all(path.exists() for path in paths)
        assert isinstance(received[0][0], MobileSAM)
        for options, message in (
            (("--format", "pt2"), "A MobileSAM is exported to ONNX only"),
            (("--photos",), "--photos has no effect with a MobileSAM"),
        ):
            arguments = ("export", "--out", str(tmp_path / "folder"), "--weights", weights, *options)
            assert message in error_of(capfd, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("network.tflite", (), "--out must end in .onnx or .pt2; got network.tflite"),
        ("network", (), "--out must end in .onnx or .pt2; got network. Only a MobileSAM"),
        ("network.onnx", ("--compiled",), "--compiled has no effect with --format onnx"),
        ("network.pt2", ("--opset", "20"), "--opset has no effect with --format pt2"),
        ("network.pt2", ("--photos", "--method", "forward_features"), "forward_features is a method of a"),
        ("network.pt2", ("--photos", "--pixels", "normalized"), "unit or uint8 images"),
    ],
)
def test_errors(weights, tmp_path, capfd, monkeypatch, out, options, message):
    error = error_of(capfd, monkeypatch, "export", "--out", str(tmp_path / out), "--weights", weights, *options)
    assert message in error
    assert not (tmp_path / out).exists()


def test_unknown_choices(weights, tmp_path):
    for option in ("--method", "--pixels"):
        result = CliRunner().invoke(app, ["export", "--out", str(tmp_path / "x.onnx"), option, "other"])
        assert result.exit_code == 2
