import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kornia_tinyvit import TinyViT
from kornia_tinyvit.sam import Geometry, ImageEmbedding, fingerprint
from tests.conftest import TINY

SQUARE = Geometry.fit((300, 451), (256, 256))
TALL = Geometry.fit((640, 427), (256, 256))


def embedding_of(*geometries: Geometry, encoder: str | None = "abc") -> ImageEmbedding:
    features = torch.rand(len(geometries), 256, 16, 16, generator=torch.Generator().manual_seed(0))
    return ImageEmbedding(features, geometries, encoder)


def preprocess_shape(height: int, width: int, long_side: int) -> tuple[int, int]:
    """``ResizeLongestSide.get_preprocess_shape`` of segment-anything."""
    scale = long_side * 1.0 / max(height, width)
    new_height, new_width = height * scale, width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


class TestGeometry:
    def test_sizes_are_the_originals(self):
        generator = torch.Generator().manual_seed(0)
        sizes = torch.randint(20, 5000, (2000, 2), generator=generator).tolist()
        for height, width in [*sizes, (1380, 2076), (427, 640), (1, 1), (1024, 1024)]:
            if max(height, width) / min(height, width) < 100:
                for side in (1024, 768, 512):
                    expected = preprocess_shape(height, width, side)
                    assert Geometry.fit((height, width), (side, side)).input_size == expected

    @pytest.mark.parametrize(
        ("original", "expected"),
        [((3, 12000), (1, 1024)), ((12000, 1), (1024, 1)), ((1, 500), (2, 1024)), ((500, 1), (1024, 2))],
    )
    def test_short_side_of_one_pixel(self, original, expected):
        assert Geometry.fit(original, (1024, 1024)).input_size == expected

    @pytest.mark.parametrize(
        ("original", "expected"),
        [((300, 400), (768, 1024)), ((300, 300), (768, 768)), ((900, 300), (768, 256)), ((100, 400), (256, 1024))],
    )
    def test_rectangular_input(self, original, expected):
        assert Geometry.fit(original, (768, 1024)).input_size == expected

    @pytest.mark.parametrize("size", [(0, 5), (5, 0)])
    def test_no_pixels(self, size):
        with pytest.raises(ValueError, match=f"must have pixels; got {size[0]}x{size[1]}"):
            Geometry.fit(size, (256, 256))

    def test_points(self):
        geometry = Geometry.fit((1380, 2076), (1024, 1024))
        points = torch.tensor([[0.0, 0.0], [2076.0, 1380.0], [1038.0, 460.0]])
        expected = torch.tensor([[0.0, 0.0], [1024.0, 681.0], [512.0, 227.0]])
        torch.testing.assert_close(geometry.map_points(points), expected)

    def test_restore_crops_the_padding(self):
        logits = torch.full((1, 1, 64, 64), -5.0)
        logits[..., :43, :] = 5.0  # the rows of the image
        restored = SQUARE.restore(logits)
        assert restored.shape == (1, 1, 300, 451)
        assert (restored[..., :295, :] > 0).all()

    def test_restore_nothing(self):
        assert SQUARE.restore(torch.zeros(0, 3, 64, 64)).shape == (0, 3, 300, 451)


class TestContainer:
    def test_indices(self):
        embedding = embedding_of(SQUARE, TALL, SQUARE)
        assert len(embedding) == 3
        for index in (1, -2):
            assert embedding[index].geometries == (TALL,)
            assert torch.equal(embedding[index].features, embedding.features[1:2])
            assert embedding[index].encoder == "abc"
        assert embedding[1:].geometries == (TALL, SQUARE)
        assert [one.geometries[0] for one in embedding] == [SQUARE, TALL, SQUARE]
        with pytest.raises(IndexError):
            embedding[3]

    def test_to(self):
        embedding = embedding_of(SQUARE).to(torch.bfloat16)
        assert embedding.features.dtype == torch.bfloat16
        assert embedding.geometries == (SQUARE,)

    def test_mismatched_features(self):
        features = torch.zeros(1, 256, 16, 16)
        with pytest.raises(ValueError, match=r"B=2 images; got \(1, 256, 16, 16\)"):
            ImageEmbedding(features, (SQUARE, TALL))
        with pytest.raises(ValueError, match=r"B=1 images; got \(256, 16, 16\)"):
            ImageEmbedding(features[0], (SQUARE,))
        with pytest.raises(ValueError, match=r"size \(16, 16\) do not match an input of \(512, 512\) pixels"):
            ImageEmbedding(features, (replace(SQUARE, img_size=(512, 512)),))


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("encoder", ["abc", None])
    def test_round_trip(self, tmp_path, dtype, encoder):
        embedding = embedding_of(SQUARE, TALL, encoder=encoder).to(dtype)
        path = embedding.save(tmp_path / "new" / "photos.safetensors")
        found = ImageEmbedding.load(path)
        assert torch.equal(found.features, embedding.features)
        assert found.features.dtype == dtype
        assert (found.geometries, found.encoder) == (embedding.geometries, encoder)
        assert os.listdir(path.parent) == ["photos.safetensors"]

    def test_no_photos(self, tmp_path):
        found = ImageEmbedding.load(embedding_of().save(tmp_path / "none.safetensors"))
        assert (len(found), found.features.shape) == (0, (0, 256, 16, 16))

    def test_interrupted(self, tmp_path, monkeypatch):
        """An interrupted write leaves the old file."""
        path = embedding_of(SQUARE).save(tmp_path / "photo.safetensors")
        before = path.read_bytes()

        def die(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            embedding_of(TALL).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["photo.safetensors"]

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
    def test_truncated(self, tmp_path, share):
        path = embedding_of(SQUARE).save(tmp_path / "photo.safetensors")
        os.truncate(path, int(path.stat().st_size * share))
        with pytest.raises(ValueError, match=r"photo\.safetensors is damaged or holds no embedding"):
            ImageEmbedding.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            None,
            "[]",
            "{",
            '{"geometries": 3, "encoder": null}',
            '{"geometries": [{"original_size": [1]}], "encoder": null}',
            '{"geometries": [{"original_size": [1, 1], "input_size": [1, 1], "img_size": [512, 512]}], "encoder": ""}',
            '{"geometries": [], "encoder": null}',
            '{"geometries": [{"original_size": [Infinity, 1]}], "encoder": null}',
        ],
    )
    def test_other_metadata(self, tmp_path, change):
        metadata = None if change is None else {"kornia_tinyvit.embedding": change}
        save_file({"features": torch.zeros(1, 256, 16, 16)}, tmp_path / "photo.safetensors", metadata)
        with pytest.raises(ValueError, match=r"photo\.safetensors is damaged or holds no embedding"):
            ImageEmbedding.load(tmp_path / "photo.safetensors")

    def test_other_tensors(self, tmp_path):
        path = embedding_of(SQUARE).save(tmp_path / "photo.safetensors")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            assert set(json.loads(metadata["kornia_tinyvit.embedding"])) == {"geometries", "encoder"}
        save_file({"weights": torch.zeros(1)}, path, metadata)
        with pytest.raises(ValueError, match="holds no embedding"):
            ImageEmbedding.load(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no embedding"):
            ImageEmbedding.load(tmp_path / "gone.safetensors")


class TestFingerprint:
    @pytest.fixture
    def encoder(self):
        torch.manual_seed(0)
        return TinyViT(**TINY, mobile_sam=True).eval()

    def test_any_training_step_changes_it(self, encoder):
        """Also the smallest change in float32 of any tensor that the embedding depends on."""
        before = fingerprint(encoder)
        unused = {"head.weight", "head.bias", "norm_head.weight", "norm_head.bias"}
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                old = parameter.clone()
                parameter.copy_(torch.nextafter(parameter, parameter + 1))
                assert (fingerprint(encoder) == before) == (name in unused), name
                parameter.copy_(old)
        assert fingerprint(encoder) == before
        encoder.train()(torch.rand(2, 3, 64, 64))
        assert fingerprint(encoder) != before  # running statistics are included

    def test_independent_of_memory_format(self, encoder):
        before = fingerprint(encoder)
        assert fingerprint(encoder.to(memory_format=torch.channels_last)) == before
        assert fingerprint(encoder.train()) == before

    def test_precision_matters(self, encoder):
        assert fingerprint(encoder) != fingerprint(encoder.bfloat16())

    def test_no_weights(self):
        assert fingerprint(nn.Identity()) is None
