"""Images in every form at every function that takes images; numpy and Pillow give the right pixels."""

import io
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from kornia_tinyvit import ImageClassifier, MobileSAM, SemanticSegmenter, TinyViT, TinyViTConfig, TinyViTDetector
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.images import open_image, read_image, read_pixels, to_pil, to_uint8
from kornia_tinyvit.sam import MaskGenerator
from kornia_tinyvit.visualization import draw_detections, draw_overlay
from tests.conftest import SHALLOW, liven


class TestReadImage:
    @staticmethod
    def corners(image: torch.Tensor) -> list[list[int]]:
        return (image[:, [0, 0, -1, -1], [0, -1, 0, -1]] * 255).round().int().T.tolist()

    @pytest.fixture
    def photo(self) -> Image.Image:
        """An image whose four quarters are red, green, blue and white."""
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:16, :32, 0] = pixels[:16, 32:, 1] = pixels[16:, :32, 2] = 255
        pixels[16:, 32:] = 255
        return Image.fromarray(pixels)

    RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]

    @pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff", "webp"])
    def test_lossless(self, photo, tmp_path, suffix):
        if suffix == "webp" and not features.check("webp"):
            pytest.skip("this Pillow was built without WebP")
        path = tmp_path / f"photo.{suffix}"
        photo.save(path, **({"lossless": True} if suffix == "webp" else {}))
        image = read_image(path)
        assert (image.dtype, image.shape) == (torch.float32, (3, 32, 64))
        assert self.corners(image) == [self.RED, self.GREEN, self.BLUE, self.WHITE]
        assert torch.equal(image, torch.from_numpy(np.array(photo)).movedim(-1, 0) / 255)
        assert torch.equal(read_image(str(path)), image)

    @pytest.mark.parametrize(
        ("orientation", "order"),
        [(1, "RGBW"), (2, "GRWB"), (3, "WBGR"), (4, "BWRG"), (5, "RBGW"), (6, "BRWG"), (7, "WGBR"), (8, "GWRB")],
    )
    def test_orientation(self, photo, tmp_path, orientation, order):
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo.save(tmp_path / "photo.png", exif=exif)
        image = read_image(tmp_path / "photo.png")
        colors = {"R": self.RED, "G": self.GREEN, "B": self.BLUE, "W": self.WHITE}
        assert self.corners(image) == [colors[letter] for letter in order]
        assert image.shape == ((3, 32, 64) if orientation < 5 else (3, 64, 32))

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16"])
    def test_orientation_of_tiff(self, tmp_path, mode, orientation):
        # Pillow would map these files into memory, and garble them.
        levels = np.arange(6 * 4, dtype=np.uint16).reshape(6, 4) * 2000
        image = Image.fromarray(levels) if mode == "I;16" else Image.fromarray((levels // 256).astype(np.uint8))
        exif = Image.Exif()
        exif[0x0112] = orientation
        (image if mode == "I;16" else image.convert(mode)).save(tmp_path / "a.tif", exif=exif)
        turned = levels.T if orientation > 4 else levels
        flips = {2: [1], 3: [0, 1], 4: [0], 6: [1], 7: [0, 1], 8: [0]}.get(orientation, [])
        expected = torch.from_numpy(np.flip(turned, flips).astype(np.float32)) / 65535
        assert (read_image(tmp_path / "a.tif")[0] - expected).abs().max() < 1.01 / 255

    @pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
    def test_jpeg(self, photo, tmp_path, mode):
        photo.convert(mode).save(tmp_path / "photo.jpg", quality=95)
        expected = read_image(photo.convert(mode))
        assert (read_image(tmp_path / "photo.jpg") - expected).abs().mean() < 0.02

    def test_palette(self, photo, tmp_path):
        photo.quantize(4).save(tmp_path / "photo.png")
        assert Image.open(tmp_path / "photo.png").mode == "P"
        assert torch.equal(read_image(tmp_path / "photo.png"), read_image(photo))

    @pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_sixteen_bits_are_not_clipped(self, tmp_path, suffix, channels):
        pixels = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
        Image.fromarray(pixels).save(tmp_path / f"deep.{suffix}")
        image = read_image(tmp_path / f"deep.{suffix}", channels)
        assert image.shape == (channels, 6, 8)
        gray = torch.from_numpy(pixels / 65535).float()
        torch.testing.assert_close(image[:3], gray.expand(min(channels, 3), 6, 8))
        assert (image[3:] == 1).all()

    def test_channels(self, photo, tmp_path):
        photo.putalpha(128)
        photo.save(tmp_path / "photo.png")
        image = read_image(tmp_path / "photo.png", 4)
        torch.testing.assert_close(image[3], torch.full((32, 64), 128 / 255))
        assert self.corners(image[:3]) == [self.RED, self.GREEN, self.BLUE, self.WHITE]
        assert torch.equal(read_image(tmp_path / "photo.png"), image[:3])
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        gray = read_image(tmp_path / "photo.png", 1)
        assert (gray - (image[:3] * weights).sum(0)).abs().max() < 1 / 255

    def test_two_tones_and_transparent_gray(self):
        bits = Image.new("1", (4, 2), 1)
        assert torch.equal(read_image(bits), torch.ones(3, 2, 4))
        assert read_image(Image.new("LA", (4, 2), (51, 0)), 1).unique().tolist() == pytest.approx([0.2])

    def test_no_mode_of_two_channels(self, photo):
        with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
            read_image(photo, 2)

    def test_open_file(self, photo, tmp_path):
        buffer = io.BytesIO()
        photo.save(buffer, "PNG")
        buffer.seek(0)
        assert torch.equal(read_image(buffer), read_image(photo))
        photo.save(tmp_path / "photo.png")
        with open(tmp_path / "photo.png", "rb") as file:
            assert torch.equal(read_image(file), read_image(photo))

    @pytest.mark.parametrize("shape", [(1, 8, 3), (8, 1, 3), (8, 5, 3), (1, 8)])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_flipped_array(self, shape, axis):
        levels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        assert torch.equal(read_pixels(np.flip(levels, axis)), read_pixels(np.flip(levels, axis).copy()))

    def test_tiff_of_a_wrong_size_allocates_no_memory(self, tmp_path):
        Image.new("CMYK", (40, 30)).save(tmp_path / "a.tif")
        content = (tmp_path / "a.tif").read_bytes()
        height = bytes.fromhex("0101 0400 01000000") + (30).to_bytes(4, "little")  # ImageLength, a LONG
        assert height in content
        (tmp_path / "a.tif").write_bytes(content.replace(height, height[:8] + (4_000_000).to_bytes(4, "little")))
        with pytest.raises(ValueError, match="not an image that can be read: buffer is not large enough"):
            read_image(tmp_path / "a.tif")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
            read_image(tmp_path / "missing.jpg")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "avif"])
    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.8])
    def test_truncated(self, tmp_path, suffix, share):
        if suffix in ("webp", "avif") and not features.check(suffix):
            pytest.skip(f"this Pillow was built without {suffix}")
        path = tmp_path / f"half.{suffix}"
        Image.open(ASSETS / "photos" / "chelsea.png").convert("RGB").save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=rf"half\.{suffix} is not an image that can be read"):
            read_image(path)

    @pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
    def test_damaged_inside(self, photo, tmp_path):
        photo.save(tmp_path / "damaged.avif")
        content = bytearray((tmp_path / "damaged.avif").read_bytes())
        pixels = content.index(b"mdat") + 4
        content[pixels : pixels + 10] = bytes(10)
        (tmp_path / "damaged.avif").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.avif is not an image that can be read"):
            read_image(tmp_path / "damaged.avif")

    def test_no_image(self, tmp_path):
        (tmp_path / "notes.jpg").write_text("no image")
        with pytest.raises(ValueError, match=r"notes\.jpg is not an image that can be read"):
            read_image(tmp_path / "notes.jpg")
        with pytest.raises(ValueError, match="is not an image that can be read"):
            read_image(tmp_path)

    def test_bomb(self, photo, tmp_path, monkeypatch):
        photo.save(tmp_path / "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 64 // 2 - 1)
        with pytest.raises(ValueError, match=r"bomb\.png is not an image that can be read: Image size"):
            read_image(tmp_path / "bomb.png")

    @pytest.mark.parametrize(("orientation", "order"), [(1, "RGBW"), (6, "BRWG"), (8, "GWRB")])
    def test_heif(self, photo, tmp_path, monkeypatch, orientation, order):
        """pillow-heif is registered at the first HEIF file, and stores the orientation in the pixels."""
        heif = pytest.importorskip("pillow_heif")
        exif = Image.Exif()
        exif[0x0112] = orientation
        heif.from_pillow(photo).save(tmp_path / "photo.heic", quality=100, exif=exif.tobytes())
        monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
        colors = {"R": self.RED, "G": self.GREEN, "B": self.BLUE, "W": self.WHITE}
        wanted = torch.tensor([colors[letter] for letter in order])
        for image in (tmp_path / "photo.heic", (tmp_path / "photo.heic").read_bytes()):
            assert (torch.tensor(self.corners(read_image(image))) - wanted).abs().max() < 12

    def test_heif_without_its_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
        (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(100))
        with pytest.raises(
            ValueError, match=r"photo\.heic is not .*HEIF files need a package: pip install pillow-heif"
        ):
            read_image(tmp_path / "photo.heic")

    def test_closed(self, photo, tmp_path):
        photo.save(tmp_path / "photo.png")
        with Image.open(tmp_path / "photo.png") as image:
            pass
        with pytest.raises(ValueError, match="The PIL image cannot be read"):
            read_image(image)

    def test_pixels_limit(self, photo, tmp_path):
        photo.save(tmp_path / "photo.png")
        count = photo.width * photo.height
        assert read_pixels(tmp_path / "photo.png", max_pixels=count).shape == (3, photo.height, photo.width)
        with pytest.raises(ValueError, match=rf"it has {photo.width}x{photo.height} pixels, more than {count - 1}"):
            read_pixels(tmp_path / "photo.png", max_pixels=count - 1)


class TestOpenImage:
    @pytest.mark.parametrize("mode", sorted({*Image.MODES} - {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}))
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_modes(self, mode, channels, recwarn):
        image = Image.new(mode, (4, 3))
        pixels = open_image(image, channels)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (channels, 3, 4))
        assert not recwarn.list

    @pytest.mark.parametrize("bands", ["L", "RGB", "RGBA"])
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
    def test_channels(self, bands, mode):
        """Arrays and tensors are converted as Pillow converts images."""
        levels = np.random.default_rng(0).integers(0, 256, (5, 7, len(bands)), dtype=np.uint8)
        image = Image.fromarray(levels[..., 0] if bands == "L" else levels)
        wanted = torch.from_numpy(np.array(image.convert(mode))).view(5, 7, -1).movedim(2, 0)
        assert torch.equal(open_image(levels, len(mode)), wanted)
        found = open_image(torch.from_numpy(levels / 255).movedim(2, 0), len(mode))
        torch.testing.assert_close(found, wanted.double() / 255, rtol=0, atol=0.51 / 255)

    def test_networks_for_other_channels(self):
        levels = np.random.default_rng(0).integers(0, 256, (6, 7, 5), dtype=np.uint8)
        tensor = torch.from_numpy(levels)
        assert torch.equal(open_image(levels, 5), tensor.movedim(2, 0))
        assert torch.equal(open_image(tensor, 5), tensor.movedim(2, 0))
        assert torch.equal(open_image(levels[..., :1], 5), tensor[..., :1].expand(6, 7, 5).movedim(2, 0))
        with pytest.raises(ValueError, match=r"must have 5 or 1 channels; got the shape \(C, H, W\) = \(3, 6, 7\)"):
            open_image(levels[..., :3], 5)
        with pytest.raises(ValueError, match="1, 3 or 4 channels, not 5; pass tensors"):
            open_image(Image.new("RGB", (4, 3)), 5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_tensors_are_kept(self, dtype):
        image = torch.rand(3, 5, 7).to(dtype).requires_grad_()
        assert open_image(image) is image

    def test_ambiguous_shapes(self):
        """The first dimension of tensors and the last of arrays are the channels."""
        levels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        assert torch.equal(open_image(torch.from_numpy(levels)), torch.from_numpy(levels))
        assert torch.equal(open_image(levels), torch.from_numpy(levels).movedim(2, 0))

    def test_read_only_array(self, recwarn):
        levels = np.zeros((5, 7, 3), np.uint8)
        levels.flags.writeable = False
        assert open_image(levels).shape == (3, 5, 7)
        assert not recwarn.list

    def test_ranges_that_files_state(self):
        """Only a finite range that is not empty counts."""
        for low, high in ((0, 0), (3, 1), (0, math.inf)):
            with pytest.raises(ValueError, match=r"must be in \[0, 1\]; got values from 0 to 9"):
                open_image(with_range(low, high, np.arange(10, dtype=np.float32)[None]))


class TestToPil:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_there_and_back(self, channels):
        pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
        assert torch.equal(read_pixels(to_pil(pixels), channels), pixels)
        assert torch.equal(read_pixels(to_pil(pixels.float() / 255), channels), pixels)

    def test_values_beyond(self):
        assert to_uint8(torch.tensor([-0.5, 0.002, 1.5], requires_grad=True)).tolist() == [0, 1, 255]


LEVELS = np.random.default_rng(0).integers(0, 256, (36, 50, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (36, 50), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (36, 50), dtype=np.uint16)
GRAY = LEVELS[..., 0]
UNIT = LEVELS.astype(np.float32) / np.float32(255)
FLIPPED = np.ascontiguousarray(LEVELS[::-1])[::-1]


def png(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def stored(folder: Path, image: Image.Image, name: str = "a.png", **settings: Any) -> Path:
    image.save(folder / name, **settings)
    return folder / name


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def turned() -> bytes:
    """Return a file that is shown upright by its EXIF orientation, a rotation by 90 degrees clockwise."""
    return png(Image.fromarray(np.rot90(LEVELS)), exif=orientation(6))


def palette(transparent: bool = True) -> Image.Image:
    image = Image.fromarray(GRAY // 32, mode=None).convert("L")
    image = Image.frombytes("P", image.size, (GRAY // 32).tobytes())
    image.putpalette([value for index in range(8) for value in (31 * index, 255 - 31 * index, 7)])
    if transparent:
        image.info["transparency"] = bytes((0, 128, 255))
    return image


def colors_of_palette() -> np.ndarray:
    index = (GRAY // 32).astype(np.uint8)
    return np.stack([31 * index, 255 - 31 * index, np.full_like(index, 7)], 2)


def with_range(low: float, high: float, values: np.ndarray) -> bytes:
    """Return a TIFF file that states the range of its values."""
    tags = ImageFileDirectory_v2()
    tags[340], tags[341] = low, high  # SMinSampleValue and SMaxSampleValue
    tags.tagtype[340] = tags.tagtype[341] = 11
    return png(Image.fromarray(values), "TIFF", tiffinfo=tags)


def frames() -> bytes:
    return png(palette(False), "GIF", save_all=True, append_images=[Image.new("P", (50, 36))])


#: Images of 8 bits by name: functions of a folder, and the levels that they stand for, (H, W, 3) or (H, W).
EIGHT_BITS: dict[str, tuple[Callable[[Path], Any], np.ndarray]] = {
    "path": (lambda folder: stored(folder, Image.fromarray(LEVELS)), LEVELS),
    "string": (lambda folder: str(stored(folder, Image.fromarray(LEVELS))), LEVELS),
    "bytes": (lambda _: png(Image.fromarray(LEVELS)), LEVELS),
    "file object": (lambda _: io.BytesIO(png(Image.fromarray(LEVELS))), LEVELS),
    "oriented file": (lambda _: turned(), LEVELS),
    "oriented PIL image": (lambda _: Image.open(io.BytesIO(turned())), LEVELS),
    "oriented TIFF file": (
        lambda folder: stored(folder, Image.fromarray(np.rot90(GRAY)), "a.tif", exif=orientation(6)),
        GRAY,
    ),
    "animation": (lambda _: frames(), colors_of_palette()),
    "1": (lambda _: Image.fromarray(GRAY > 127), 255 * (GRAY > 127)),
    "L": (lambda _: Image.fromarray(GRAY), GRAY),
    "LA": (lambda _: Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)]), GRAY),
    "RGB": (lambda _: Image.fromarray(LEVELS), LEVELS),
    "RGBA": (lambda _: Image.fromarray(np.dstack([LEVELS, ALPHA])), LEVELS),
    "P": (lambda _: palette(), colors_of_palette()),
    "P file": (lambda _: png(palette()), colors_of_palette()),
    "CMYK": (lambda _: Image.fromarray(255 - np.dstack([LEVELS, 0 * ALPHA + 255]), "CMYK"), LEVELS),
    "array (H, W, 3)": (lambda _: LEVELS, LEVELS),
    "array (H, W)": (lambda _: GRAY, GRAY),
    "array (H, W, 1)": (lambda _: GRAY[..., None], GRAY),
    "array (H, W, 4)": (lambda _: np.dstack([LEVELS, ALPHA]), LEVELS),
    "array (1, W, 3)": (lambda _: LEVELS[:1], LEVELS[:1]),
    "array with negative strides": (lambda _: FLIPPED, LEVELS),
    "row with negative strides": (lambda _: LEVELS[:1].copy()[::-1], LEVELS[:1]),
    "bool array": (lambda _: GRAY > 127, 255 * (GRAY > 127)),
    "tensor (3, H, W)": (lambda _: torch.from_numpy(LEVELS).movedim(2, 0), LEVELS),
    "tensor (H, W, 3)": (lambda _: torch.from_numpy(LEVELS), LEVELS),
    "tensor (4, H, W)": (lambda _: torch.from_numpy(np.dstack([LEVELS, ALPHA])).movedim(2, 0), LEVELS),
    "tensor (1, H, W)": (lambda _: torch.from_numpy(GRAY)[None], GRAY),
    "tensor (3, H, 3)": (lambda _: torch.from_numpy(LEVELS[:, :3]).movedim(2, 0), LEVELS[:, :3]),
}  # fmt: skip
#: Other images by name, and their values in [0, 1].
FLOATS: dict[str, tuple[Callable[[Path], Any], np.ndarray]] = {
    "I;16": (lambda _: Image.fromarray(DEEP), DEEP / 65535),
    "PNG of 16 bits": (lambda _: png(Image.fromarray(DEEP)), DEEP / 65535),
    "TIFF of 16 bits": (lambda folder: stored(folder, Image.fromarray(DEEP), "a.tif"), DEEP / 65535),
    "PGM of 12 bits": (lambda _: b"P5 50 36 4095\n" + (DEEP >> 4).astype(">u2").tobytes(), (DEEP >> 4) / 4095),
    "F": (lambda _: Image.fromarray(UNIT[..., 0]), UNIT[..., 0]),
    "TIFF of floats": (lambda folder: stored(folder, Image.fromarray(UNIT[..., 0]), "a.tif"), UNIT[..., 0]),
    "TIFF with a range": (lambda _: with_range(-1, 3, 4 * UNIT[..., 0] - 1), UNIT[..., 0]),
    "TIFF of integers with a range": (lambda _: with_range(0, 65535, DEEP.astype(np.int32)), DEEP / 65535),
    "I in [0, 1]": (lambda _: Image.fromarray((GRAY > 127).astype(np.int32)), GRAY > 127),
    "float32 array": (lambda _: UNIT, UNIT),
    "float64 array": (lambda _: UNIT.astype(np.float64), UNIT),
    "float array (H, W)": (lambda _: UNIT[..., 0], UNIT[..., 0]),
    "float array (H, W, 4)": (lambda _: np.dstack([UNIT, UNIT[..., 0]]), UNIT),
    "uint16 array": (lambda _: DEEP, DEEP / 65535),
    "big-endian array": (lambda _: DEEP.astype(">u2"), DEEP / 65535),
    "float tensor": (lambda _: torch.from_numpy(UNIT).movedim(2, 0), UNIT),
    "float tensor (H, W, 3)": (lambda _: torch.from_numpy(UNIT), UNIT),
    "uint16 tensor": (lambda _: torch.from_numpy(DEEP), DEEP / 65535),
    "tensor with a gradient": (lambda _: torch.from_numpy(UNIT).movedim(2, 0).requires_grad_(), UNIT),
}
#: What is no image, and the error.
INVALID: dict[str, tuple[Any, type[Exception], str]] = {
    "floats up to 255": (255 * UNIT, ValueError, r"got values from 0 to 255\. Divide them by 255"),
    "tensor up to 255": (255 * torch.from_numpy(UNIT).movedim(2, 0), ValueError, "Divide them by 255"),
    "tensor up to 65535": (torch.full((3, 36, 50), 65535.0), ValueError, "full scale, 65535 for 16 bits"),
    "normalized tensor": (torch.linspace(-2.1, 2.6, 5400).view(3, 36, 50), ValueError, "before its normalization"),
    "slightly too large": (torch.full((3, 36, 50), 1.01), ValueError, r"must be in \[0, 1\]; got values from 1\.01"),
    "slightly negative": (torch.full((3, 36, 50), -0.01), ValueError, r"must be in \[0, 1\]; got values from -0\.01"),
    "NaN": (torch.eye(36).repeat(3, 1, 1) / torch.eye(36), ValueError, "contains NaN or infinity"),
    "infinity": (np.full((36, 50), np.inf), ValueError, "contains NaN or infinity"),
    "F up to 65535": (Image.fromarray(DEEP.astype(np.float32)), ValueError, r"PIL image cannot be read.*in \[0, 1\]"),
    "I of 200": (Image.fromarray(np.full((36, 50), 200, np.int32)), ValueError, r"must be in \[0, 1\]"),
    "TIFF up to 65535": (png(Image.fromarray(DEEP.astype(np.float32)), "TIFF"), ValueError, r"must be in \[0, 1\]"),
    "outside of its range": (with_range(0, 1, 2 * UNIT[..., 0]), ValueError, r"must be in \[0, 1\]"),
    "int64": (LEVELS.astype(np.int64), TypeError, r"uint8, uint16, bool or floating point; got int64\. Convert"),
    "int32 tensor": (torch.zeros(3, 36, 50).int(), TypeError, r"got torch\.int32"),
    "complex": (np.zeros((36, 50, 3), complex), TypeError, "got complex128"),
    "complex tensor": (torch.zeros(3, 36, 50) * 1j, TypeError, r"got torch\.complex64"),
    "objects": (np.full((36, 50, 3), None), TypeError, "got object"),
    "two channels": (LEVELS[..., :2], ValueError, r"must have 1 \(gray\), 3 \(RGB\) or 4 \(RGBA\) channels"),
    "five channels": (torch.zeros(5, 36, 50), ValueError, r"\(C, H, W\) = \(5, 36, 50\)"),
    "a row": (np.zeros(9), ValueError, r"An array must be \(H, W, C\) or \(H, W\); got \(9,\)"),
    "five dimensions": (torch.zeros(1, 1, 3, 36, 50), ValueError, r"got \(1, 1, 3, 36, 50\)"),
    "no rows": (LEVELS[:0], ValueError, "must have pixels"),
    "no columns": (torch.zeros(3, 36, 0), ValueError, "must have pixels"),
    "no file": ("nowhere.png", FileNotFoundError, r"There is no image nowhere\.png"),
    "no encoded image": (b"no image", ValueError, "The content of 8 bytes is not an image that can be read"),
    "truncated": (png(Image.fromarray(LEVELS))[:2000], ValueError, "The content of 2000 bytes is not an image"),
    "text file": (io.StringIO("text"), TypeError, "got StringIO"),
    "dictionary": ({"image": LEVELS}, TypeError, "An image must be a path, an encoded file .*; got dict"),
    "None": (None, TypeError, "got NoneType"),
    "number": (3, TypeError, "got int"),
}


@cache
def classifier() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(liven(TinyViT(**SHALLOW)))


@cache
def segmenter() -> SemanticSegmenter:
    torch.manual_seed(0)
    return SemanticSegmenter(liven(TinyViT(**SHALLOW)), num_classes=5, width=16).eval()


@cache
def detector() -> TinyViTDetector:
    torch.manual_seed(0)
    settings = {"hidden_dim": 32, "num_queries": 8, "decoder_layers": 1}
    return TinyViTDetector(liven(TinyViT(**SHALLOW)), num_classes=3, **settings).eval()


@cache
def sam() -> MobileSAM:
    torch.manual_seed(0)
    model = MobileSAM.from_config(TinyViTConfig(**SHALLOW), img_size=64)
    for part in (model.image_encoder, model.prompt_encoder, model.mask_decoder):
        liven(part)
    return model.eval()


GENERATOR = MaskGenerator(points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1)


def classify(image: Any) -> Tensor:
    (found,) = classifier().predict(image, top_k=7)
    return torch.tensor([each.score for each in sorted(found, key=lambda each: each.index)])


def detect(image: Any) -> Tensor:
    (found,) = detector().predict(image, 0.0)
    return torch.tensor([[each.score, *each.box] for each in found])


def generate(image: Any) -> Tensor:
    masks = GENERATOR(sam(), image)
    assert masks
    assert torch.equal(torch.tensor([each.area for each in sam().generate_masks(image, **SETTINGS)]), areas(masks))
    return torch.stack([torch.from_numpy(each.segmentation) for each in masks])


SETTINGS: dict[str, Any] = {
    "points_per_side": 2, "pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1,
}  # fmt: skip


def areas(masks: Any) -> Tensor:
    return torch.tensor([each.area for each in masks])


def prompt(image: Any) -> Tensor:
    prompter = sam().prompter()
    prompter.set_image(image)
    return prompter.embedding().features


def process(image: Any) -> Tensor:
    pytest.importorskip("transformers")
    from kornia_tinyvit.huggingface import TinyVitImageProcessor

    return TinyVitImageProcessor(size=64)(image)["pixel_values"].detach()


ENTRIES: dict[str, Callable[[Any], Tensor]] = {
    "ImageClassifier.predict": classify,
    "SemanticSegmenter.predict": lambda image: segmenter().predict(image)[0],
    "TinyViTDetector.predict": detect,
    "MobileSAM.preprocess": lambda image: sam().preprocess(image)[0].detach(),
    "MobileSAM.embed": lambda image: sam().embed(image).features.detach(),
    "MaskGenerator": generate,
    "MobileSAMPrompter": prompt,
    "TinyVitImageProcessor": process,
    "draw_overlay": lambda image: torch.from_numpy(np.array(draw_overlay(image, []))),
    "draw_detections": lambda image: torch.from_numpy(np.array(draw_detections(image, []))),
}
#: Those that resize 8 bits by Pillow, as segment-anything does, and floats by torch.
BY_PILLOW = ("MobileSAM.preprocess", "MobileSAM.embed", "MaskGenerator")


def in_color(values: np.ndarray) -> np.ndarray:
    return values[..., None].repeat(3, 2) if values.ndim == 2 else values


@cache
def expected(entry: str, form: str) -> Tensor:
    """Return the result for the same pixels, as an RGB image of Pillow or as floats."""
    if form in EIGHT_BITS:
        levels = in_color(EIGHT_BITS[form][1]).astype(np.uint8)
        if entry in BY_PILLOW:
            return ENTRIES[entry](Image.fromarray(levels))
        values = levels / 255
    else:
        values = in_color(FLOATS[form][1]).astype(np.float64)
    return ENTRIES[entry](torch.from_numpy(values).float().movedim(2, 0).contiguous())


class TestForms:
    @pytest.mark.parametrize("entry", ENTRIES)
    @pytest.mark.parametrize("form", [*EIGHT_BITS, *FLOATS])
    def test_pixels(self, entry, form, tmp_path, recwarn):
        image = (EIGHT_BITS | FLOATS)[form][0](tmp_path)
        tolerance = 1e-6 if form in EIGHT_BITS else 1e-4  # Pillow rounds 12 bits to 16
        torch.testing.assert_close(ENTRIES[entry](image), expected(entry, form), rtol=0, atol=tolerance)
        assert not recwarn.list

    @pytest.mark.parametrize("entry", ENTRIES)
    def test_the_image_matters(self, entry):
        assert len({ENTRIES[entry](image).double().sum().item() for image in (LEVELS, 255 - LEVELS, GRAY)}) == 3

    @pytest.mark.parametrize("entry", ENTRIES)
    @pytest.mark.parametrize("form", INVALID)
    def test_invalid(self, entry, form):
        image, error, message = INVALID[form]
        with pytest.raises(error, match=message):
            ENTRIES[entry](image)

    @pytest.mark.parametrize("entry", ENTRIES)
    def test_arrays_with_channels_first(self, entry):
        """transformers' processors take them, but where the last dimension can be the channels, it is."""
        image = LEVELS.transpose(2, 0, 1)
        if entry == "TinyVitImageProcessor":
            assert torch.equal(process(image), process(LEVELS))
            return
        with pytest.raises(ValueError, match=r"channels; got the shape \(C, H, W\) = \(50, 3, 36\)"):
            ENTRIES[entry](image)

    @pytest.mark.parametrize("entry", ENTRIES)
    @pytest.mark.parametrize("overshoot", [1e-3, -1e-3])
    def test_tolerance(self, entry, overshoot):
        """Resizing and augmentation overshoot by a little."""
        ENTRIES[entry](torch.from_numpy(UNIT).movedim(2, 0) + 0.99 * overshoot)

    def test_segment_anything_resizes_8_bits(self):
        """The route of files: Pillow's bilinear resizing of the levels."""
        resized = np.array(Image.fromarray(LEVELS).resize((64, 46), Image.Resampling.BILINEAR))
        mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
        wanted = torch.from_numpy((resized - mean) / std).movedim(2, 0).float()
        found = sam().preprocess(torch.from_numpy(LEVELS).movedim(2, 0))[0][0]
        torch.testing.assert_close(found[:, :46], wanted, rtol=0, atol=1e-5)
        assert (found[:, 46:] == 0).all()


SEVERAL: dict[str, Callable[[Any], Tensor]] = {
    "ImageClassifier.predict": lambda images: torch.tensor(
        [[x.score for x in y] for y in classifier().predict(images)]
    ),
    "SemanticSegmenter.predict": lambda images: torch.cat([x.flatten() for x in segmenter().predict(images)]),
    "TinyViTDetector.predict": lambda images: torch.tensor(
        [[each.score for each in found] for found in detector().predict(images, 0.0)]
    ),
    "MobileSAM.embed": lambda images: sam().embed(images).features.detach(),
    "MaskGenerator": lambda images: torch.cat([areas(masks) for masks in sam().generate_masks(images, **SETTINGS)]),
    "TinyVitImageProcessor": process,
}


class TestSeveral:
    """Batches, and lists of all forms and sizes."""

    @pytest.mark.parametrize("entry", SEVERAL)
    def test_lists(self, entry, tmp_path):
        names = ["path", "bytes", "oriented PIL image", "array (H, W)", "array (1, W, 3)", "tensor (3, H, W)"]
        forms = [EIGHT_BITS[name] for name in names]
        images = [form(tmp_path) for form, _ in forms]
        wanted = SEVERAL[entry]([Image.fromarray(in_color(levels)) for _, levels in forms])
        for listed in (images, tuple(images)):
            torch.testing.assert_close(SEVERAL[entry](listed), wanted)

    @pytest.mark.parametrize("entry", SEVERAL)
    def test_batches(self, entry):
        batch = np.stack([LEVELS, 255 - LEVELS])
        wanted = SEVERAL[entry]([Image.fromarray(levels) for levels in batch])
        tensor = torch.from_numpy(batch)
        for images in (batch, tensor, tensor.movedim(3, 1), list(tensor)):
            torch.testing.assert_close(SEVERAL[entry](images), wanted)

    @pytest.mark.parametrize("entry", SEVERAL)
    def test_the_invalid_one(self, entry):
        with pytest.raises(ValueError, match="Divide them by 255"):
            SEVERAL[entry]([LEVELS, torch.from_numpy(255 * UNIT)])

    def test_generators(self):
        """They are read lazily by the classifier."""
        images = [LEVELS, Image.fromarray(LEVELS)]
        assert classifier().predict(iter(images)) == classifier().predict(images)


class TestGradients:
    def test_reach_the_pixels(self):
        image = torch.from_numpy(UNIT).movedim(2, 0).contiguous().requires_grad_()
        sam().embed(image).features.square().sum().backward()
        assert image.grad is not None
        assert (image.grad != 0).float().mean() > 0.9

    def test_forward_does_not_look_at_values(self):
        """A look would synchronize a GPU; what is outside of [0, 1] is the caller's matter."""
        images = torch.full((1, 3, 64, 64), math.nan)
        for network in (classifier(), segmenter()):
            assert network(images).isnan().any()
