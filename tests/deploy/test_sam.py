import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from kornia_tinyvit import TinyViT, TinyViTConfig
from kornia_tinyvit.deploy import sam as export
from kornia_tinyvit.deploy.export import ExportError
from kornia_tinyvit.deploy.sam import export_mobile_sam
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.sam import Geometry, MobileSAM
from tests.conftest import SHALLOW, liven
from tests.sam.reference_network import IMG_SIZE, build_network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.slow  # two exports
SIZES = [(150, 200), (301, 77), (256, 256), (1, 90), (31, 2001)]


@pytest.fixture(scope="module")
def sam():
    """A network with a small encoder, and masks that depend on the prompts."""
    torch.manual_seed(0)
    reference = build_network()
    config = SHALLOW | {"mobile_sam": True, "num_classes": 0, "img_size": IMG_SIZE}
    sam = MobileSAM(liven(TinyViT(**config)))
    sam.prompt_encoder.load_state_dict(reference.prompt_encoder.state_dict())
    sam.mask_decoder.load_state_dict(reference.mask_decoder.state_dict())
    return sam.eval()


@pytest.fixture(scope="module")
def files(sam, tmp_path_factory):
    return export_mobile_sam(sam, tmp_path_factory.mktemp("exports") / "new")


@pytest.fixture
def sessions(files):
    return [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in files]


@pytest.fixture
def written(files, monkeypatch):
    """Load the graphs from the files instead of tracing them, which is slow."""
    for name, path in zip(("_encoder", "_decoder"), files, strict=True):
        monkeypatch.setattr(export, name, lambda *_, path=path: onnx.load(path))


def draw_photo(height, width):
    pattern = torch.rand(1, 3, 6, 5, generator=torch.Generator().manual_seed(height))
    pixels = torch.nn.functional.interpolate(pattern, (height, width), mode="bilinear")[0].mul(255).byte()
    return Image.fromarray(pixels.movedim(0, -1).contiguous().numpy())


def draw_prompts(prompts, height, width):
    """Return two points and one box per prompt in pixels of the image."""
    generator = torch.Generator().manual_seed(prompts)
    positions = torch.rand(prompts, 4, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat([positions[:, 2:].amin(1) * 0.9, positions[:, 2:].amax(1)], 1)
    return positions[:, :2], torch.tensor([[1, 0]]).expand(prompts, -1), boxes


def run_encoder(session, photo):
    geometry = Geometry.fit((photo.height, photo.width), (IMG_SIZE, IMG_SIZE))
    resized = np.array(photo.resize(geometry.input_size[::-1], Image.Resampling.BILINEAR))
    return session.run(None, {"images": resized.transpose(2, 0, 1)[None]})[0]


def run_decoder(session, features, size, points, labels, boxes=None, masks=None):
    """Run the decoder like a client in a browser, without this package's geometry."""
    scale = IMG_SIZE / max(size)
    used = np.maximum(1, np.floor(np.array(size) * scale + 0.5))
    ratio = (used / np.array(size))[::-1]
    prompts = len(points)
    if boxes is None:
        corners, corner_labels = np.zeros((prompts, 1, 2)), -np.ones((prompts, 1))
    else:
        corners, corner_labels = boxes.numpy().reshape(-1, 2, 2) * ratio, np.tile([2, 3], (prompts, 1))
    side = IMG_SIZE // 4
    given = np.zeros((prompts, 1, side, side)) if masks is None else masks.numpy()
    inputs = {
        "image_embeddings": features,
        "point_coords": np.concatenate([points.numpy() * ratio, corners], 1),
        "point_labels": np.concatenate([labels.numpy(), corner_labels], 1),
        "mask_input": given,
        "has_mask_input": np.full(prompts, masks is not None),
        "orig_im_size": np.array(size),
    }
    return session.run(None, {name: array.astype(np.float32) for name, array in inputs.items()})


def check(found, predictions):
    """Compare the four masks with the single-mask and the multimask output."""
    single, several = predictions
    expected = [single.logits(), several.logits()], [single.scores, several.scores]
    expected += ([single.low_res_logits, several.low_res_logits],)
    for actual, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), torch.cat(reference, 1), atol=2e-3, rtol=1e-3)


class TestFiles:
    @pytest.mark.parametrize("size", SIZES)
    def test_encoder(self, sam, sessions, size):
        photo = draw_photo(*size)
        expected = sam.embed(photo).features
        torch.testing.assert_close(torch.from_numpy(run_encoder(sessions[0], photo)), expected, atol=1e-3, rtol=1e-3)
        assert expected.std() > 0.1

    @pytest.mark.parametrize("size", SIZES[:2])
    @pytest.mark.parametrize("prompts", [1, 5])
    @pytest.mark.parametrize("box", [False, True])
    @pytest.mark.parametrize("mask", [False, True])
    def test_decoder(self, sam, sessions, size, prompts, box, mask):
        embedding = sam.embed(draw_photo(*size))
        points, labels, boxes = draw_prompts(prompts, *size)
        masks = 4 * torch.randn(prompts, 1, IMG_SIZE // 4, IMG_SIZE // 4) if mask else None
        boxes = boxes if box else None
        both = [
            sam.predict_masks(embedding, points, labels, boxes, masks, multimask_output=several)[0]
            for several in (False, True)
        ]
        found = run_decoder(sessions[1], embedding.features.numpy(), size, points, labels, boxes, masks)
        assert found[0].shape == (prompts, 4, *size)
        check(found, both)

    @pytest.mark.parametrize("size", SIZES[2:])
    def test_sides(self, sam, sessions, size):
        """Images without padding, of a single row, and with a short side that scales to less than a pixel."""
        embedding = sam.embed(draw_photo(*size))
        points, labels, _ = draw_prompts(2, *size)
        both = [sam.predict_masks(embedding, points, labels, multimask_output=some)[0] for some in (False, True)]
        check(run_decoder(sessions[1], embedding.features.numpy(), size, points, labels), both)

    def test_next_mask(self, sam, sessions):
        """Low-resolution logits are valid mask inputs."""
        embedding = sam.embed(draw_photo(150, 200))
        points, labels, _ = draw_prompts(2, 150, 200)
        first = run_decoder(sessions[1], embedding.features.numpy(), (150, 200), points, labels)
        best = torch.from_numpy(first[2][:, 2:3])
        second = run_decoder(sessions[1], embedding.features.numpy(), (150, 200), points, labels, masks=best)
        (expected,) = sam.predict_masks(embedding, points, labels, masks=best)
        torch.testing.assert_close(torch.from_numpy(second[1][:, 1:]), expected.scores, atol=2e-3, rtol=1e-3)
        assert abs(second[1] - first[1]).max() > 0.01

    @pytest.mark.parametrize(("masks", "flags"), [(1, 1), (1, 3), (3, 1)])
    def test_one_mask_for_all_prompts(self, sam, sessions, masks, flags):
        points, labels, _ = draw_prompts(3, 150, 200)
        inputs = {
            "image_embeddings": sam.embed(draw_photo(150, 200)).features,
            "point_coords": points,
            "point_labels": labels,
            "mask_input": 4 * torch.randn(1, 1, 64, 64).expand(3, -1, -1, -1),
            "has_mask_input": torch.ones(3),
            "orig_im_size": torch.tensor([150, 200]),
        }
        inputs = {name: each.float().numpy() for name, each in inputs.items()}
        expected = sessions[1].run(None, inputs)
        inputs |= {"mask_input": inputs["mask_input"][:masks], "has_mask_input": inputs["has_mask_input"][:flags]}
        for found, wanted in zip(sessions[1].run(None, inputs), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        inputs["mask_input"] = np.zeros((2, 1, 64, 64), np.float32)
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            sessions[1].run(None, inputs)

    def test_names_and_shapes(self, sessions):
        encoder, decoder = sessions
        assert [(each.name, each.type) for each in encoder.get_inputs()] == [("images", "tensor(uint8)")]
        assert [(each.name, each.shape) for each in encoder.get_outputs()] == [("image_embeddings", [1, 256, 16, 16])]
        shapes = {each.name: each.shape for each in decoder.get_inputs()}
        # segment_anything/utils/onnx.py and scripts/export_onnx_model.py
        names = "image_embeddings point_coords point_labels mask_input has_mask_input orig_im_size"
        assert list(shapes) == names.split()
        assert {each.type for each in decoder.get_inputs()} == {"tensor(float)"}
        assert [each.name for each in decoder.get_outputs()] == ["masks", "iou_predictions", "low_res_masks"]
        assert shapes["image_embeddings"] == [1, 256, 16, 16]
        assert shapes["point_coords"] == ["prompts", "points", 2]
        assert shapes["point_labels"] == ["prompts", "points"]
        assert shapes["mask_input"] == ["mask_inputs", 1, 64, 64]
        assert shapes["has_mask_input"] == ["has_mask_inputs"]
        assert decoder.get_outputs()[0].shape == ["prompts", 4, "height", "width"]
        assert encoder.get_inputs()[0].shape == [1, 3, "height", "width"]

    def test_metadata(self, sam, files):
        metadata = [{each.key: json.loads(each.value) for each in onnx.load(path).metadata_props} for path in files]
        for each, part in zip(metadata, ("encoder", "decoder"), strict=True):
            assert TinyViTConfig.from_dict(each["kornia_tinyvit.config"]) == sam.config
            assert each["kornia_tinyvit.part"] == part
            assert each["kornia_tinyvit.kind"] == "mobile_sam"
            assert each["kornia_tinyvit.input"]["img_size"] == [IMG_SIZE, IMG_SIZE]
        assert metadata[0]["kornia_tinyvit.input"]["pixels"] == "uint8"
        assert metadata[1]["kornia_tinyvit.input"]["point_labels"]["bottom_right"] == 3
        assert metadata[1]["kornia_tinyvit.mask_threshold"] == 0


class TestErrors:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "encoder.onnx").write_text("old")
        yield tmp_path
        assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"encoder.onnx": "old"}

    @pytest.mark.parametrize(
        ("name", "output"),
        [
            ("image_encoder.neck.3.bias", "image_embeddings"),
            ("mask_decoder.iou_prediction_head.layers.2.bias", "iou_predictions"),
            ("prompt_encoder.point_embeddings.0.weight", "masks"),
            ("prompt_encoder.point_embeddings.1.weight", "masks"),
            ("prompt_encoder.point_embeddings.2.weight", "masks"),
            ("prompt_encoder.point_embeddings.3.weight", "masks"),
            ("prompt_encoder.not_a_point_embed.weight", "masks"),
            ("prompt_encoder.no_mask_embed.weight", "masks"),
            ("prompt_encoder.mask_downscaling.6.bias", "masks"),
            ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "masks"),
        ],
    )
    @pytest.mark.usefixtures("written")
    def test_mismatch(self, sam, folder, name, output):
        other = copy.deepcopy(sam)
        other.state_dict()[name].flatten()[:8].add_(0.3)
        with pytest.raises(ExportError, match=rf"differs from the network by .* in {output}, more than 0\.001"):
            export_mobile_sam(other, folder)

    @pytest.mark.usefixtures("without_onnxscript")
    def test_missing_extra(self, sam, folder):
        with pytest.raises(MissingExtraError, match=r"pip install 'kornia-tinyvit\[export\]'"):
            export_mobile_sam(sam, folder)

    @pytest.mark.parametrize("opset", [17, 99])
    def test_opset(self, sam, folder, opset):
        with pytest.raises(ValueError, match=f"opset must be from 18 to .*; got {opset}"):
            export_mobile_sam(sam, folder, opset=opset)

    @pytest.mark.usefixtures("written")
    def test_another_opset(self, sam, folder):
        """torch silently falls back to another opset if it does not support the requested one."""
        with pytest.raises(ExportError, match=r"wrote opset \{'': 20\} instead of 21"):
            export_mobile_sam(sam, folder, opset=21)


@pytest.mark.usefixtures("written")
def test_network_is_not_modified(sam, tmp_path):
    """A network in training mode is exported in evaluation mode, and not modified."""
    training = copy.deepcopy(sam).train()
    before = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    export_mobile_sam(training, tmp_path)
    assert training.training
    assert training.image_encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.state_dict().items())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["decoder.onnx", "encoder.onnx"]
