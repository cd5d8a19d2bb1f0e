import ast
import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import kornia
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kornia.contrib.visual_prompter import VisualPrompter
from kornia.models.sam import Sam, SamConfig
from kornia.models.sam.architecture.mask_decoder import MaskDecoder
from kornia.models.sam.architecture.prompt_encoder import PromptEncoder
from kornia.models.sam.architecture.transformer import TwoWayTransformer
from kornia.models.tiny_vit import TinyViT as KorniaTinyViT
from PIL import Image
from torch import Tensor, nn

import kornia_tinyvit
from kornia_tinyvit import CheckpointError, TinyViT, TinyViTConfig, save_checkpoint
from kornia_tinyvit.checkpoints import catalog, loading
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.deploy import optimize
from kornia_tinyvit.sam import ImageEmbedding, MaskPrediction, MobileSAM, decoder
from tests.checkpoints.test_loading import Runs, server  # noqa: F401 - a fixture
from tests.conftest import TINY, liven, shared

SIDE = 256
SMALL = TinyViTConfig.from_variant("1m", **TINY | {"window_sizes": (7, 7, 14, 7), "img_size": SIDE, "mobile_sam": True})
LOWRES = (SIDE // 4, SIDE // 4)
PHOTOS = ["chelsea.png", "rocket.jpg", "tall", "strip"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> dict[str, Path]:
    """Photos of several aspect ratios: 451x300, 640x427, 199x427 and 640x61."""
    folder = tmp_path_factory.mktemp("photos")
    paths = {name: ASSETS / "photos" / name for name in ("chelsea.png", "rocket.jpg")}
    rocket = Image.open(paths["rocket.jpg"])
    for name, box in {"tall": (240, 0, 439, 427), "strip": (0, 300, 640, 361)}.items():
        paths[name] = folder / f"{name}.png"
        rocket.crop(box).save(paths[name])
    return paths


def lively(img_size: int | tuple[int, int] = SIDE, seed: int = 0) -> MobileSAM:
    """A small network whose masks depend on the photo and the prompts."""
    torch.manual_seed(seed)
    model = MobileSAM.from_config(SMALL, img_size=img_size)
    for part in (model.image_encoder, model.prompt_encoder, model.mask_decoder):
        liven(part, seed)
    return model.eval()


@pytest.fixture(scope="module")
def sam() -> MobileSAM:
    return lively()


def kornia_parts(side: int) -> tuple[PromptEncoder, MaskDecoder]:
    prompt_encoder = PromptEncoder(256, (side // 16, side // 16), (side, side), 16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    return prompt_encoder, MaskDecoder(transformer_dim=256, transformer=transformer)


class CachedEncoder(nn.Module):
    """An image encoder that computes the embedding of each input once, for comparisons of decoders."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.img_size, self.cache = encoder, SIDE, {}

    def forward(self, inputs: Tensor) -> Tensor:
        key = inputs.numpy().tobytes()
        if key not in self.cache:
            self.cache[key] = self.encoder(inputs)
        return self.cache[key]


@pytest.fixture(scope="module")
def twin(sam) -> Sam:
    """kornia's SAM with the same weights, copied by load_state_dict."""
    fields = {name: getattr(SMALL, name) for name in ("embed_dims", "depths", "num_heads", "window_sizes")}
    encoder = KorniaTinyViT(img_size=SIDE, num_classes=7, mobile_sam=True, **fields)
    model = Sam(encoder, *kornia_parts(SIDE))
    model.load_state_dict(sam.state_dict())
    model.image_encoder = CachedEncoder(model.image_encoder)
    return model.eval()


@pytest.fixture(scope="module")
def embeddings(sam, photos) -> dict[str, ImageEmbedding]:
    return {name: sam.embed(photos[name]) for name in PHOTOS}


def predictor_input(path: Path, side: int) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """Model input of ``SamPredictor.set_image`` of segment-anything."""
    image = Image.open(path).convert("RGB")
    scale = side / max(image.size)
    width, height = (int(pixels * scale + 0.5) for pixels in image.size)
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR)))
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    pixels = ((pixels.float() - mean) / std).permute(2, 0, 1)
    return F.pad(pixels, (0, side - width, 0, side - height)), (height, width), (image.height, image.width)


def prompts_for(kind: str, height: int, width: int) -> dict[str, Tensor]:
    """Three prompts of a kind at different places of an image."""
    scale = torch.tensor([width, height])
    points = torch.tensor([[[0.5, 0.5], [0.1, 0.9]], [[0.2, 0.3], [0.9, 0.8]], [[0.0, 0.0], [1.0, 1.0]]]) * scale
    boxes = torch.tensor([[[0.2, 0.1], [0.7, 0.9]], [[0.0, 0.0], [1.0, 1.0]], [[0.45, 0.4], [0.52, 0.6]]]) * scale
    masks = 4 * torch.randn(3, 1, *LOWRES, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([[1, 0], [1, 1], [1, -1]])
    known = {
        "point": {"points": points[:, :1], "labels": labels[:, :1]},
        "points": {"points": points, "labels": labels},
        "box": {"boxes": boxes.flatten(1)},
        "mask": {"masks": masks},
    }
    return {name: tensor for part in kind.split("+") for name, tensor in known[part].items()}


def expected_by_kornia(twin: Sam, path: Path, prompts: dict[str, Tensor], multimask: bool):
    """kornia's ``Sam.forward`` with segment-anything's preprocessing of image and prompts."""
    inputs, size, original = predictor_input(path, SIDE)
    scale = torch.tensor([size[1] / original[1], size[0] / original[0]])
    record = {}
    if "points" in prompts:
        record["points"] = (prompts["points"] * scale, prompts["labels"])
    if "boxes" in prompts:
        record["boxes"] = (prompts["boxes"].reshape(-1, 2, 2) * scale).reshape(-1, 4)
    if "masks" in prompts:
        record["mask_inputs"] = prompts["masks"]
    (found,) = twin(inputs[None], [record], multimask)
    found.original_res_logits(size, original, (SIDE, SIDE))
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


class TestSmoke:
    @pytest.mark.parametrize("variant", ["1m", "5m", "11m", "21m"])
    def test_any_variant(self, variant):
        with torch.device("meta"):
            model = MobileSAM(TinyViT.from_config(variant, mobile_sam=True, img_size=SIDE))
        features = model.image_encoder(torch.empty(2, 3, SIDE, SIDE, device="meta"))
        assert features.shape == (2, 256, 16, 16)
        assert model.config.embed_dims == TinyViTConfig.from_variant(variant).embed_dims

    def test_defaults(self):
        with torch.device("meta"):
            model = MobileSAM.from_config()
        assert (model.img_size, model.training) == ((1024, 1024), True)
        assert model.prompt_encoder.image_embedding_size == (64, 64)
        assert model.config == TinyViTConfig.from_variant("5m", mobile_sam=True, img_size=1024)
        assert isinstance(model, Sam)
        assert "img_size=(1024, 1024)" in repr(model)

    def test_from_name(self):
        with torch.device("meta"):
            assert MobileSAM.from_name("11m").config.embed_dims[2] == 256

    def test_public(self):
        assert kornia_tinyvit.MobileSAM is MobileSAM
        with pytest.raises(AttributeError, match="has no attribute 'MobileSam'"):
            _ = kornia_tinyvit.MobileSam

    def test_lazy_import(self):
        """Importing the package does not import SAM."""
        code = "import sys, kornia_tinyvit; print([each for each in sys.modules if 'segment' in each or 'sam' in each])"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        assert not {"kornia_tinyvit.sam", "kornia.models.sam", "kornia.contrib.visual_prompter"} & set(
            ast.literal_eval(done.stdout)
        )

    @pytest.mark.parametrize("size", [16, 1000, 0, -64, (64,), (64, 64, 64), (64, 100), 64.0, (64.0, 64)])
    def test_size(self, size):
        with pytest.raises(ValueError, match="img_size must be a multiple of 16 >= 32, or two"):
            MobileSAM.from_config(SMALL, img_size=size)

    def test_other_encoder(self):
        with pytest.raises(ValueError, match="3 input channels and mobile_sam=True"):
            MobileSAM(TinyViT(**TINY))
        with pytest.raises(ValueError, match="3 input channels and mobile_sam=True"):
            MobileSAM(TinyViT(**TINY, mobile_sam=True, in_chans=1))
        with pytest.raises(ValueError, match="no TinyViT variant '6m'"):
            MobileSAM.from_config("6m")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    keys = json.loads(shared("reference/checkpoint_keys.json").read_text())["mobile_sam.pt"]
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.zeros((), dtype=torch.long)
        if name.endswith("num_batches_tracked")
        else 0.02 * torch.randn(shape, generator=generator).abs()
        if name.endswith("running_var")
        else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in keys.items()
    }


class TestPublishedFile:
    """A file of random numbers with the names and shapes of mobile_sam.pt."""

    def test_loads_whole(self, tensors, tmp_path):
        torch.save(tensors, tmp_path / "mobile_sam.pt")
        model = MobileSAM.from_config(pretrained=tmp_path / "mobile_sam.pt")
        assert not model.training
        assert (model.img_size, model.config.embed_dims) == ((1024, 1024), (64, 128, 160, 320))
        found = model.state_dict()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    def test_to_kornia_and_back(self, tensors):
        theirs = Sam.from_config(SamConfig("mobile_sam"))
        ours = MobileSAM.from_config("5m", pretrained=tensors)
        theirs.load_state_dict(ours.state_dict())
        assert theirs.state_dict().keys() == ours.state_dict().keys()
        theirs = Sam.from_config(SamConfig("mobile_sam"))
        ours = MobileSAM.from_config(pretrained=theirs.state_dict())
        mine = ours.state_dict()
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.state_dict().items())


class TestCheckpoints:
    @pytest.mark.parametrize("wrap", ["plain", "model", "module", "safetensors"])
    def test_own_files(self, sam, tmp_path, wrap):
        path = tmp_path / ("sam.safetensors" if wrap == "safetensors" else "sam.pt")
        weights = sam.state_dict()
        if wrap == "safetensors":
            save_checkpoint(sam, path)
        elif wrap == "module":
            torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)
        else:
            torch.save({"model": weights, "epoch": 3} if wrap == "model" else weights, path)
        for model in (MobileSAM.from_config(pretrained=path), MobileSAM.from_config(pretrained=path.as_uri())):
            assert not model.training
            assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        # Only our own files store the resolution.
        assert model.img_size == ((SIDE, SIDE) if wrap == "safetensors" else (1024, 1024))

    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_a_file_is_read_once(self, sam, tmp_path, monkeypatch, suffix):
        path, reads = tmp_path / f"sam.{suffix}", []
        if suffix == "pt":
            torch.save(sam.state_dict(), path)
        else:
            save_checkpoint(sam, path)
        read = loading.read_tensors
        monkeypatch.setattr(loading, "read_tensors", lambda path: reads.append(path) or read(path))
        MobileSAM.from_config(pretrained=path)
        assert reads == [path]

    def test_encoder_alone(self, sam, tmp_path):
        encoder = TinyViT.from_config(pretrained=save_checkpoint(sam, tmp_path / "sam.safetensors"))
        inputs = torch.rand(1, 3, SIDE, SIDE)
        with torch.no_grad():
            assert torch.equal(encoder(inputs), sam.image_encoder(inputs))

    def test_ignores_attention_bias_indices(self, sam):
        weights = sam.state_dict()
        weights["image_encoder.layers.1.blocks.0.attn.attention_bias_idxs"] = torch.zeros(49, 49)
        MobileSAM.from_config(pretrained=weights)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("mask_decoder.iou_token.weight"), "missing keys mask_decoder.iou_token.weight"),
            (
                lambda w: w.pop("prompt_encoder.no_mask_embed.weight"),
                "missing keys prompt_encoder.no_mask_embed",
            ),
            (lambda w: w.pop("image_encoder.neck.2.weight"), "missing keys neck.2.weight"),
            (lambda w: w.update({"mask_decoder.hq.weight": torch.zeros(1)}), "unexpected keys mask_decoder.hq"),
            (lambda w: w.update({"prompt_encoder.x": torch.zeros(1)}), "unexpected keys prompt_encoder.x"),
            (lambda w: w.update({"mask_decoder.mask_tokens.weight": torch.zeros(5, 256)}), r"\(5, 256\) in the file"),
            (lambda w: w.update({"mask_decoder.iou_token.weight": torch.full((1, 256), math.nan)}), "NaN or infinite"),
            (lambda w: w.update({"image_encoder.neck.1.bias": torch.full((256,), math.inf)}), "NaN or infinite"),
        ],
    )
    def test_strict(self, sam, tmp_path, change, message):
        weights = dict(sam.state_dict())
        change(weights)
        with pytest.raises(CheckpointError, match=message):
            MobileSAM.from_config(pretrained=weights)

    def test_other_networks(self, sam, tmp_path):
        with pytest.raises(CheckpointError, match="holds only a TinyViT, without prompt encoder"):
            MobileSAM.from_config(pretrained=sam.image_encoder.state_dict())
        with pytest.raises(CheckpointError, match="has no TinyViT"):
            MobileSAM.from_config(pretrained={"image_encoder.blocks.0.norm1.weight": torch.zeros(768)})
        with pytest.raises(CheckpointError, match="another architecture: embed_dims"):
            MobileSAM.from_config("5m", pretrained=sam.state_dict())

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
    def test_truncated(self, sam, tmp_path, share):
        path = tmp_path / "sam.pt"
        torch.save(sam.state_dict(), path)
        os.truncate(path, int(path.stat().st_size * share))
        with pytest.raises(CheckpointError, match=r"sam\.pt is (truncated|damaged)"):
            MobileSAM.from_config(pretrained=path)

    @pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
    @pytest.mark.slow
    def test_wrapped_parts(self, sam, tmp_path, wrap):
        """A compiled or parallel part is saved, loaded and compared under its plain names."""
        sam = copy.deepcopy(sam)
        expected, embedding = dict(sam.state_dict()), sam.embed(torch.rand(3, 48, 80))
        sam.image_encoder, sam.mask_decoder = wrap(sam.image_encoder).eval(), wrap(sam.mask_decoder).eval()
        assert sam.config.mobile_sam
        assert sam.embed(torch.rand(3, 48, 80)).encoder == embedding.encoder
        box = torch.tensor([[10.0, 5.0, 60.0, 40.0]])
        assert sam.predict_masks(embedding, boxes=box)[0].scores.shape == (1, 3)
        torch.save(sam.state_dict(), tmp_path / "sam.pt")
        for path in (save_checkpoint(sam, tmp_path / "sam.safetensors"), tmp_path / "sam.pt"):
            loaded = MobileSAM.from_config(pretrained=path, img_size=sam.img_size)
            assert loaded.state_dict().keys() == expected.keys()
            assert all(torch.equal(loaded.state_dict()[name], each) for name, each in expected.items())
            assert loaded.embed(torch.rand(3, 48, 80)).encoder == embedding.encoder

    def test_code_does_not_run(self, sam, tmp_path):
        torch.save(sam.state_dict() | {"mask_decoder.extra": Runs(tmp_path / "marker")}, tmp_path / "sam.pt")
        loaded = MobileSAM.from_config(pretrained=tmp_path / "sam.pt")
        assert all(torch.equal(loaded.state_dict()[name], each) for name, each in sam.state_dict().items())
        assert not (tmp_path / "marker").exists()

    def test_arguments(self, tmp_path):
        with pytest.raises(TypeError, match="positional"):
            MobileSAM.from_config("5m", True)
        with pytest.raises(CheckpointError, match="There is no checkpoint file"):
            MobileSAM.from_config(pretrained=tmp_path / "gone.pt")
        with pytest.raises(CheckpointError, match="published with a 5m encoder, not with 21m"):
            MobileSAM.from_config("21m", pretrained=True)


@pytest.mark.filterwarnings("ignore:Failed to download", "ignore:Transient failure")
class TestDownload:
    @pytest.fixture
    def published(self, server, tensors, tmp_path, monkeypatch):  # noqa: F811
        """The catalog's entry, its addresses moved to this machine."""
        entry = catalog.find_weights("5m", "mobile_sam")
        local = tuple(f"{server.url}/{number}/mobile_sam.pt" for number in range(len(entry.urls)))
        entries = [replace(each, urls=local) if each == entry else each for each in catalog.CATALOG]
        monkeypatch.setattr(catalog, "CATALOG", tuple(entries))
        torch.save(tensors, tmp_path / "served.pt")
        return (tmp_path / "served.pt").read_bytes()

    @pytest.mark.parametrize("pretrained", [True, "mobile_sam"])
    def test_once(self, server, published, tensors, pretrained):  # noqa: F811
        server.files = {"/1/mobile_sam.pt": published}  # the second URL, after the first failed
        for _ in range(2):
            model = MobileSAM.from_config(pretrained=pretrained)
            assert torch.equal(model.mask_decoder.iou_token.weight, tensors["mask_decoder.iou_token.weight"])
        assert server.requests == ["/0/mobile_sam.pt", "/1/mobile_sam.pt"]

    def test_dead(self, server, published):  # noqa: F811
        with pytest.raises(CheckpointError, match=r"could not be downloaded from(?s:.)*/0/mobile_sam\.pt(?s:.)*/1/"):
            MobileSAM.from_config(pretrained=True)


class TestPreprocessing:
    @pytest.mark.parametrize("name", PHOTOS)
    def test_files_as_segment_anything(self, sam, photos, name):
        inputs, (geometry,) = sam.preprocess(photos[name])
        expected, size, original = predictor_input(photos[name], SIDE)
        assert (geometry.input_size, geometry.original_size) == (size, original)
        torch.testing.assert_close(inputs[0], expected, rtol=0, atol=2e-6)
        image = Image.open(photos[name])
        assert torch.equal(sam.preprocess(image)[0], inputs)

    @pytest.mark.parametrize("name", PHOTOS)
    def test_tensors(self, sam, photos, name):
        """``apply_image_torch``; up to 1/255 from Pillow's result in uint8."""
        photo = kornia.image.image_to_tensor(np.array(Image.open(photos[name]))).float() / 255
        inputs, (geometry,) = sam.preprocess(photo)
        height, width = geometry.input_size
        resized = F.interpolate(photo[None] * 255, (height, width), mode="bilinear", antialias=True)
        mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        expected = (resized - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(inputs[:, :, :height, :width], expected, rtol=0, atol=1e-5)
        from_file = sam.preprocess(photos[name])[0]
        assert (inputs - from_file).abs().max() < 1.1 / 57
        assert (inputs - from_file).abs().max() > 0

    def test_padding_is_zero(self, sam):
        inputs, _ = sam.preprocess(torch.ones(3, 100, 200))
        assert (inputs[0, :, 128:] == 0).all()
        assert (inputs[0, :, :128] > 1).all()

    def test_many(self, sam, photos):
        mixed = [photos["tall"], Image.open(photos["strip"]), torch.rand(3, 30, 40)]
        inputs, geometries = sam.preprocess(mixed)
        for index, photo in enumerate(mixed):
            single, (geometry,) = sam.preprocess(photo)
            assert torch.equal(inputs[index], single[0])
            assert geometries[index] == geometry
        batch = torch.rand(2, 3, 30, 40)
        assert torch.equal(sam.preprocess(batch)[0], sam.preprocess(list(batch))[0])
        assert sam.preprocess(batch[:0])[0].shape == (0, 3, SIDE, SIDE)

    def test_gradients_reach_the_pixels(self, sam):
        photo = torch.rand(3, 300, 200, requires_grad=True)
        sam.preprocess(photo)[0].sum().backward()
        assert (photo.grad != 0).all()

    @pytest.mark.parametrize("name", PHOTOS)
    def test_uint8_as_files(self, sam, photos, name):
        """Arrays and tensors of 8 bits take the exact route of files."""
        levels = np.array(Image.open(photos[name]).convert("RGB"))
        expected, geometries = sam.preprocess(photos[name])
        tensor = torch.from_numpy(levels)
        for image in (levels, tensor, tensor.movedim(2, 0), tensor.movedim(2, 0)[None], levels[None]):
            inputs, found = sam.preprocess(image)
            assert found == geometries
            assert torch.equal(inputs, expected)
        assert torch.equal(sam.embed(levels).features, sam.embed(photos[name]).features)

    def test_kinds_of_files(self, sam, tmp_path):
        pixels = np.random.default_rng(0).integers(256, size=(50, 80, 3), dtype=np.uint8)
        upright = Image.fromarray(pixels)
        upright.save(tmp_path / "upright.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees clockwise
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        upright.convert("RGBA").save(tmp_path / "opacity.png")
        expected, (geometry,) = sam.preprocess(tmp_path / "upright.png")
        assert geometry.original_size == (50, 80)
        for name in ("turned.png", "opacity.png"):
            inputs, (found,) = sam.preprocess(tmp_path / name)
            assert found == geometry
            assert torch.equal(inputs, expected)
        upright.convert("L").save(tmp_path / "gray.png")
        Image.merge("RGB", [upright.convert("L")] * 3).save(tmp_path / "same.png")
        assert torch.equal(sam.preprocess(tmp_path / "gray.png")[0], sam.preprocess(tmp_path / "same.png")[0])

    @pytest.mark.parametrize("size", [(300, 1), (1, 300), (1, 1), (3, 12000), (12000, 300)])
    def test_extreme_shapes(self, sam, size):
        for photo in (torch.rand(3, *size), Image.new("RGB", size[::-1], "red")):
            embedding = sam.embed(photo)
            point = torch.tensor([[[size[1] / 2, size[0] / 2]]])
            (found,) = sam.predict_masks(embedding, point)
            assert found.masks().shape == (1, 3, *size)
            assert found.logits().isfinite().all()

    def test_half_precision(self):
        model = lively().bfloat16()
        expected = lively().preprocess(torch.full((3, 20, 20), 0.3))[0]
        inputs, _ = model.preprocess(torch.full((3, 20, 20), 0.3))
        assert torch.equal(inputs, expected.bfloat16())

    @pytest.mark.parametrize(
        ("photo", "error", "message"),
        [
            (
                torch.zeros(3, 8, 8, dtype=torch.int64),
                TypeError,
                "uint8, uint16, bool or floating point; got torch.int64",
            ),
            (
                torch.zeros(2, 8, 8),
                ValueError,
                r"must have 1 \(gray\), 3 \(RGB\) or 4 \(RGBA\) channels; got .*\(2, 8, 8\)",
            ),
            (torch.zeros(3, 0, 8), ValueError, r"must have pixels; got the shape \(C, H, W\) = \(3, 0, 8\)"),
            (torch.full((3, 8, 8), math.nan), ValueError, "The image contains NaN or infinity"),
            (torch.full((3, 8, 8), math.inf), ValueError, "The image contains NaN or infinity"),
            ([3], TypeError, "An image must be a path, .* an array or a tensor; got int"),
            ("gone.jpg", FileNotFoundError, "There is no image gone.jpg"),
        ],
    )
    def test_errors(self, sam, photo, error, message):
        for method in (sam.preprocess, sam.embed):
            with pytest.raises(error, match=message):
                method(photo)


class TestPositions:
    def test_square_is_kornias(self, sam):
        theirs, _ = kornia_parts(SIDE)
        theirs.load_state_dict(sam.prompt_encoder.state_dict())
        assert torch.equal(sam.prompt_encoder.get_dense_pe(), theirs.get_dense_pe())

    def test_scale_invariance(self, sam):
        """A point has the same position embedding at twice the input size."""
        small = MobileSAM.from_config(SMALL, img_size=SIDE // 2).eval()
        small.load_state_dict(sam.state_dict())
        points, labels = torch.tensor([[[100.0, 30.0]]]), torch.ones(1, 1)
        fine, _ = sam.prompt_encoder((points * 2 + 0.5, labels), None, None)
        coarse, _ = small.prompt_encoder((points, labels), None, None)
        torch.testing.assert_close(fine, coarse)

    @pytest.mark.parametrize("size", [(192, 256), (256, 128)])
    def test_rectangular_input_is_a_crop_of_the_square(self, sam, size):
        oblong = MobileSAM.from_config(SMALL, img_size=size).eval()
        oblong.load_state_dict(sam.state_dict())
        height, width = size[0] // 16, size[1] // 16
        assert oblong.prompt_encoder.input_image_size == size
        expected = sam.prompt_encoder.get_dense_pe()[..., :height, :width]
        assert torch.equal(oblong.prompt_encoder.get_dense_pe(), expected)
        boxes = torch.tensor([[10.0, 20.0, 90.0, 100.0]])
        assert torch.equal(oblong.prompt_encoder(None, boxes, None)[0], sam.prompt_encoder(None, boxes, None)[0])

    @pytest.mark.parametrize("size", [512, 768, (512, 1024), (1024, 512)])
    def test_usual_sizes(self, sam, photos, size):
        """Position embeddings are those of kornia's encoder of the square."""
        side = size if isinstance(size, int) else max(size)
        model = MobileSAM.from_config(SMALL, img_size=size).eval()
        model.load_state_dict(sam.state_dict())
        theirs, _ = kornia_parts(side)
        theirs.load_state_dict(sam.prompt_encoder.state_dict())
        height, width = model.img_size
        expected = theirs.get_dense_pe()[..., : height // 16, : width // 16]
        assert torch.equal(model.prompt_encoder.get_dense_pe(), expected)
        corners = torch.tensor([[20.0, 30.0, width - 9.0, height - 5.0]])
        assert torch.equal(model.prompt_encoder(None, corners, None)[0], theirs(None, corners, None)[0])
        (found,) = model.predict_masks(model.embed(photos["strip"]), boxes=torch.tensor([[9.0, 9.0, 300.0, 60.0]]))
        assert found.low_res_logits.shape == (1, 3, height // 4, width // 4)
        assert found.masks().shape == (1, 3, 61, 640)

    def test_rectangular_masks(self, photos):
        oblong = lively((192, 256))
        embedding = oblong.embed(photos["chelsea.png"])
        assert embedding.features.shape == (1, 256, 12, 16)
        (found,) = oblong.predict_masks(embedding, boxes=torch.tensor([[100.0, 20.0, 300.0, 280.0]] * 2))
        assert found.low_res_logits.shape == (2, 3, 48, 64)
        assert found.masks().shape == (2, 3, 300, 451)
        again = found.low_res_logits[:, :1]
        oblong.predict_masks(embedding, masks=again)


class TestPredictMasks:
    @pytest.mark.parametrize("multimask", [True, False])
    @pytest.mark.parametrize("kind", ["point", "points", "box", "mask", "points+box", "box+mask", "point+box+mask"])
    @pytest.mark.parametrize("name", PHOTOS)
    def test_as_kornia(self, sam, twin, photos, embeddings, name, kind, multimask):
        height, width = Image.open(photos[name]).size[::-1]
        prompts = prompts_for(kind, height, width)
        expected = expected_by_kornia(twin, photos[name], prompts, multimask)
        for count in (3, 1):  # several prompts, which share the computation on the image, and a single one
            some = {key: tensor[:count] for key, tensor in prompts.items()}
            (found,) = sam.predict_masks(embeddings[name], **some, multimask_output=multimask)
            assert_close(found.low_res_logits, expected.logits[:count])
            assert_close(found.scores, expected.scores[:count])
            logits = found.logits()
            assert_close(logits, expected._original_res_logits[:count])
            assert torch.equal(found.masks(), logits > 0)
        # The masks depend on the image and on the prompts.
        assert expected.logits.std() > 0.3
        assert (expected.logits[0] - expected.logits[1]).abs().max() > 0.1

    def test_forward_is_kornias(self, sam, twin, photos):
        inputs, _ = sam.preprocess([photos["chelsea.png"], photos["tall"]])
        records = [{"boxes": torch.tensor([[1.0, 2.0, 90.0, 80.0]])}, {"mask_inputs": torch.rand(2, 1, *LOWRES)}]
        for ours, theirs in zip(sam(inputs, records, True), twin(inputs, records, True), strict=True):
            assert_close(ours.logits, theirs.logits)
            assert_close(ours.scores, theirs.scores)

    def test_prompts_per_image(self, sam, photos):
        names = ["chelsea.png", "tall", "strip"]
        paths = [photos[name] for name in names]
        points = [torch.tensor([[[20.0, 30.0]], [[100.0, 50.0]]]), None, torch.zeros(0, 1, 2)]
        boxes = [None, torch.tensor([[10.0, 20.0, 90.0, 200.0]]), None]
        found = sam.predict_masks(sam.embed(paths, batch_size=2), points, boxes=boxes)
        for index, (path, count) in enumerate(zip(paths, (2, 1, 0), strict=True)):
            (alone,) = sam.predict_masks(sam.embed(path), points[index], boxes=boxes[index])
            assert_close(found[index].low_res_logits, alone.low_res_logits)
            assert_close(found[index].scores, alone.scores)
            width, height = Image.open(path).size
            assert found[index].masks().shape == (count, 3, height, width)

    @pytest.mark.parametrize("kind", ["points", "box", "mask"])
    @pytest.mark.parametrize(("multimask", "masks"), [(True, 3), (False, 1)])
    def test_no_prompts(self, sam, photos, kind, multimask, masks):
        prompts = {name: tensor[:0] for name, tensor in prompts_for(kind, 300, 451).items()}
        (found,) = sam.predict_masks(sam.embed(photos["chelsea.png"]), **prompts, multimask_output=multimask)
        assert found.low_res_logits.shape == (0, masks, *LOWRES)
        assert found.masks().shape == found.logits().shape == (0, masks, 300, 451)
        assert found.masks().dtype == torch.bool
        assert found.best().scores.shape == (0, 1)

    def test_no_prompts_in_training(self):
        model = lively().train()
        embedding = model.embed(torch.rand(2, 3, 60, 80))
        empty = [torch.zeros(0, 4)] * 2
        assert [each.scores.shape for each in model.predict_masks(embedding, boxes=empty)] == [(0, 3)] * 2

    def test_half_precision(self, sam, photos):
        """Coordinates are exact; the error of bfloat16 is a few percent of the logits' range."""
        half = copy.deepcopy(sam).bfloat16()
        height, width = Image.open(photos["tall"]).size[::-1]
        prompts = prompts_for("points+box", height, width)
        (expected,) = sam.predict_masks(sam.embed(photos["tall"]), **prompts)
        (found,) = half.predict_masks(half.embed(photos["tall"]), **prompts)
        assert found.low_res_logits.dtype == torch.bfloat16
        error = (found.logits().float() - expected.logits()).abs().mean()
        assert error < 0.05 * (expected.logits().amax() - expected.logits().amin())

    def test_optimized_encoder(self, sam, photos):
        fast = copy.deepcopy(sam)
        fast.image_encoder = optimize(fast.image_encoder, engine="eager", tune_allocator=False)
        boxes = torch.tensor([[10.0, 20.0, 90.0, 200.0]])
        (expected,) = sam.predict_masks(sam.embed(photos["tall"]), boxes=boxes)
        for network in (fast, sam):  # an optimized encoder has no fingerprint
            (found,) = network.predict_masks(fast.embed(photos["tall"]), boxes=boxes)
            assert_close(found.low_res_logits, expected.low_res_logits)

    def test_no_photos(self, sam):
        embedding = sam.embed([])
        assert embedding.features.shape == (0, 256, 16, 16)
        assert sam.predict_masks(embedding) == []

    def test_best(self):
        logits = torch.arange(6.0).reshape(2, 3, 1, 1).expand(2, 3, 4, 4)
        prediction = MaskPrediction(logits, torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.2, 0.4]]), None)
        assert torch.equal(prediction.best().scores, torch.tensor([[0.9], [0.5]]))
        assert prediction.best().low_res_logits[:, :, 0, 0].tolist() == [[1.0], [3.0]]

    def test_mask_prompt_of_an_earlier_prediction(self, sam, photos):
        embedding = sam.embed(photos["chelsea.png"])
        boxes = torch.tensor([[100.0, 20.0, 300.0, 280.0]])
        (first,) = sam.predict_masks(embedding, boxes=boxes)
        (second,) = sam.predict_masks(embedding, boxes=boxes, masks=first.best().low_res_logits)
        assert (first.low_res_logits - second.low_res_logits).abs().max() > 0.1

    def test_outside(self, sam, photos):
        embedding = sam.embed(photos["chelsea.png"])
        with pytest.raises(ValueError, match=r"Point \(452, 10\) lies outside of the image of width 451"):
            sam.predict_masks(embedding, torch.tensor([[[452.0, 10.0]]]))
        with pytest.raises(ValueError, match="There are no prompts"):
            sam.predict_masks(embedding)

    def test_prompts_as_arrays(self, sam):
        embedding = sam.embed(ASSETS / "photos" / "chelsea.png")
        prompts = {"points": torch.tensor([[[200.0, 150.0]]]), "labels": torch.tensor([[1]])}
        prompts |= {"boxes": torch.tensor([[100.0, 20.0, 300.0, 280.0]])}
        (expected,) = sam.predict_masks(embedding, **prompts)
        (found,) = sam.predict_masks(embedding, **{kind: tensor.numpy() for kind, tensor in prompts.items()})
        assert torch.equal(found.low_res_logits, expected.low_res_logits)
        best = sam.predict_best(embedding, prompts["points"].numpy(), None, None)
        wanted = sam.predict_best(embedding, prompts["points"], None, None)
        assert torch.equal(best.low_res_logits, wanted.low_res_logits)

    def test_best_for_a_prompt(self, sam):
        """The best of three masks for a single point; the single mask for other prompts."""
        embedding = sam.embed(ASSETS / "photos" / "chelsea.png")
        point, box = torch.tensor([[[200.0, 150.0]]]), torch.tensor([[100.0, 20.0, 300.0, 280.0]])
        two, labels = torch.tensor([[[200.0, 150.0], [20.0, 280.0]]]), torch.tensor([[1, 0]])
        for prompts, several in (
            ((point, None, None), True),
            ((two, labels, None), False),
            ((None, None, box), False),
            ((point, None, box), False),
        ):
            found = sam.predict_best(embedding, *prompts)
            (expected,) = sam.predict_masks(embedding, *prompts, multimask_output=several)
            assert torch.equal(found.low_res_logits, expected.best().low_res_logits)
        with pytest.raises(ValueError, match="A tensor holds the points of one image"):
            sam.predict_best(sam.embed([ASSETS / "photos" / "chelsea.png"] * 2), point, None, None)


class TestEmbedding:
    def test_saved_one_gives_the_same_masks(self, sam, photos, tmp_path):
        embedding = sam.embed([photos["tall"], photos["strip"]])
        found = type(embedding).load(embedding.save(tmp_path / "photos.safetensors"))
        boxes = [torch.tensor([[10.0, 20.0, 90.0, 50.0]])] * 2
        for before, after in zip(
            sam.predict_masks(embedding, boxes=boxes), sam.predict_masks(found, boxes=boxes), strict=True
        ):
            assert torch.equal(before.logits(), after.logits())

    def test_rejects_other_weights(self, sam, photos):
        embedding = sam.embed(photos["tall"])
        boxes = torch.tensor([[10.0, 20.0, 90.0, 50.0]])
        other = lively(seed=1)
        with pytest.raises(ValueError, match="encoder with other weights"):
            other.predict_masks(embedding, boxes=boxes)
        other.load_state_dict(sam.state_dict())
        other.predict_masks(embedding, boxes=boxes)
        unknown = type(embedding)(embedding.features, embedding.geometries)
        lively(seed=1).predict_masks(unknown, boxes=boxes)

    def test_rejects_another_input_size(self, sam, photos):
        small = MobileSAM.from_config(SMALL, img_size=128).eval()
        small.load_state_dict(sam.state_dict())
        with pytest.raises(ValueError, match=r"input size \(128, 128\); this network has \(256, 256\)"):
            sam.predict_masks(small.embed(photos["tall"]), boxes=torch.tensor([[10.0, 20.0, 90.0, 50.0]]))

    def test_modes_and_gradients(self, photos):
        """Under no_grad the embedding is that of evaluation mode; in training mode it requires a gradient."""
        model = lively()
        quiet = model.embed(photos["tall"])
        assert not quiet.features.requires_grad
        model.train()
        with torch.no_grad():
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            assert torch.equal(model.embed(photos["tall"]).features, quiet.features)
        assert model.image_encoder.layers[0].blocks[0].training
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.embed(photos["tall"]).features.requires_grad  # including batch normalization

    def test_batch_size(self, sam, photos):
        with pytest.raises(ValueError, match="batch_size must be a positive integer; got 0"):
            sam.embed(photos["tall"], batch_size=0)


class TestGradients:
    BOXES = torch.tensor([[10.0, 20.0, 90.0, 200.0], [30.0, 20.0, 120.0, 180.0]])

    def test_decoder_is_trained(self, photos):
        """Fine-tuning with a frozen encoder."""
        model = lively()
        model.train()
        model.image_encoder.eval().requires_grad_(False)
        embedding = model.embed(photos["tall"])
        assert not embedding.features.requires_grad
        (found,) = model.predict_masks(embedding, boxes=self.BOXES)
        (found.logits().mean() + found.scores.mean()).backward()
        assert model.mask_decoder.mask_tokens.weight.grad.abs().sum() > 0
        assert model.prompt_encoder.point_embeddings[2].weight.grad.abs().sum() > 0
        with torch.no_grad():
            (shared_work,) = model.predict_masks(embedding, boxes=self.BOXES)
        assert not shared_work.low_res_logits.requires_grad
        assert_close(shared_work.low_res_logits, found.low_res_logits.detach())

    def test_from_the_masks_to_the_pixels(self, sam):
        photo = torch.rand(3, 200, 150, requires_grad=True)
        (found,) = sam.predict_masks(sam.embed(photo), boxes=self.BOXES)
        found.logits().square().mean().backward()
        assert photo.grad.isfinite().all()
        assert (photo.grad != 0).float().mean() > 0.99
        assert not sam.image_encoder.training

    def test_to_the_boxes(self, sam, photos):
        boxes = self.BOXES.clone().requires_grad_()
        (found,) = sam.predict_masks(sam.embed(photos["tall"]), boxes=boxes)
        found.scores.sum().backward()
        assert (boxes.grad != 0).all()

    def test_none_recorded_otherwise(self, sam, photos):
        for count in (1, 2):
            (found,) = sam.predict_masks(sam.embed(photos["tall"]), boxes=self.BOXES[:count])
            assert not found.low_res_logits.requires_grad
            assert not found.scores.requires_grad

    def test_work_is_shared(self, sam, photos, monkeypatch):
        """In predict_masks, in kornia's forward and in the prompter."""
        calls = []

        class Counted(decoder.FoldedMaskDecoder):
            def forward(self, *arguments):
                calls.append(len(arguments[2]))
                return super().forward(*arguments)

        monkeypatch.setattr(decoder, "FoldedMaskDecoder", Counted)
        boxes = self.BOXES.repeat(3, 1)
        sam.predict_masks(sam.embed(photos["tall"]), boxes=boxes)
        sam(sam.preprocess(photos["tall"])[0], [{"boxes": boxes}], True)
        prompter = sam.prompter()
        prompter.set_image(torch.rand(3, 250, 150))
        prompter.predict(boxes=boxes)
        assert calls == [6, 6, 6]


@pytest.fixture(scope="module")
def theirs(twin) -> VisualPrompter:
    """kornia's prompter over kornia's network."""
    prompter = VisualPrompter(SamConfig(None, None, False, 8, 1, 1, (0,)))
    prompter.model = twin
    side = kornia.augmentation.Resize(SIDE, side="long", align_corners=False, antialias=True)
    prompter.transforms = kornia.augmentation.AugmentationSequential(side, same_on_batch=True)
    prompter._valid_masks = lambda masks: masks  # kornia supports only 1024 pixels
    return prompter


@pytest.fixture(scope="module", params=PHOTOS)
def prompters(request, sam, theirs, photos):
    """Both prompters with an image set, and its size."""
    image = kornia.image.image_to_tensor(np.array(Image.open(photos[request.param]))).float() / 255
    ours = sam.prompter()
    for prompter in (ours, theirs):
        prompter.set_image(image)
    return ours, theirs, tuple(image.shape[1:])


class TestPrompter:
    """kornia's prompter over MobileSAM and over kornia's own network."""

    @pytest.mark.parametrize("kind", ["point", "points", "box", "mask", "points+box", "box+mask"])
    def test_as_over_kornias_network(self, prompters, kind):
        *both, size = prompters
        prompts = prompts_for(kind, *size)
        given = {
            "keypoints": prompts.get("points"),
            "keypoints_labels": prompts.get("labels"),
            "boxes": prompts.get("boxes"),
            "masks": prompts.get("masks"),
        }
        results = [prompter.predict(**given) for prompter in both]
        assert_close(results[0].logits, results[1].logits)
        assert_close(results[0].scores, results[1].scores)
        assert_close(results[0]._original_res_logits, results[1]._original_res_logits)
        assert results[0].binary_masks.shape == (3, 3, *size)

    def test_close_to_ours(self, sam):
        """Without rounding of the image size the prompters differ only by half a pixel of points; boxes agree."""
        photo = torch.rand(3, 128, 256, generator=torch.Generator().manual_seed(0))
        boxes = torch.tensor([[10.0, 20.0, 200.0, 100.0]])
        prompter = sam.prompter()
        prompter.set_image(photo)
        (found,) = sam.predict_masks(sam.embed(photo), boxes=boxes)
        assert_close(prompter.predict(boxes=boxes).logits, found.low_res_logits)

    def test_shares_the_network(self):
        model = lively()
        state = torch.random.get_rng_state()
        prompter = model.prompter()
        assert torch.equal(torch.random.get_rng_state(), state)
        assert prompter.model is model
        assert (prompter.device, prompter.dtype) == (torch.device("cpu"), torch.float32)
        assert not any(isinstance(value, Tensor) and value.is_meta for value in vars(prompter).values())

    def test_embedding(self, sam, photos, tmp_path):
        """Embeddings are exchanged with embed in both directions, also through a file."""
        photo = kornia.image.image_to_tensor(np.array(Image.open(photos["tall"]))).float() / 255
        prompts = prompts_for("points+box", *photo.shape[1:])
        given = {"keypoints": prompts["points"], "keypoints_labels": prompts["labels"], "boxes": prompts["boxes"]}
        prompter = sam.prompter()
        prompter.set_image(photo)
        expected = prompter.predict(**given)
        path = prompter.embedding().save(tmp_path / "photo.safetensors")
        later = sam.prompter()
        later.set_embedding(ImageEmbedding.load(path))
        found = later.predict(**given)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.binary_masks, expected.binary_masks)
        later.set_embedding(sam.embed(photo))
        assert later.embedding().geometries == sam.embed(photo).geometries
        (ours,) = sam.predict_masks(sam.embed(photo), boxes=prompts["boxes"])
        theirs = later.predict(boxes=prompts["boxes"])
        assert_close(theirs.logits, ours.low_res_logits)
        assert_close(theirs._original_res_logits, ours.logits())

    def test_embedding_errors(self, sam, photos):
        prompter = sam.prompter()
        with pytest.raises(RuntimeError, match="There is no image: call set_image or set_embedding first"):
            prompter.embedding()
        with pytest.raises(ValueError, match="Expected the embedding of one image; got 2"):
            prompter.set_embedding(sam.embed(torch.rand(2, 3, 50, 60)))
        with pytest.raises(ValueError, match="encoder with other weights"):
            prompter.set_embedding(lively(seed=1).embed(photos["tall"]))
        assert not prompter.is_image_set

    def test_errors(self, sam):
        with pytest.raises(ValueError, match=r"the input of this network is 192x256\. Use embed and predict_masks"):
            lively((192, 256)).prompter()
        prompter = sam.prompter()
        prompter.set_image(torch.rand(3, 60, 80))
        with pytest.raises(ValueError, match=r"Masks must be \(K, 1, 64, 64\); got \(1, 1, 256, 256\)"):
            prompter.predict(masks=torch.zeros(1, 1, 256, 256))


class TestGenerateMasks:
    def test_everything(self, sam, photos):
        settings = {"points_per_side": 3, "pred_iou_thresh": -1e9, "stability_score_thresh": 0.0}
        found = sam.generate_masks(photos["tall"], **settings)
        assert found
        assert all(mask.segmentation.shape == (427, 199) for mask in found)
        with pytest.raises(TypeError, match="points_per_edge"):
            sam.generate_masks(photos["tall"], points_per_edge=3)
