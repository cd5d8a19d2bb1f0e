import io

import numpy as np
import pytest
import torch
from PIL import Image, features

from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.images import read_image, read_pixels, to_pil, to_uint8


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

    def test_pixels_limit(self, photo, tmp_path):
        photo.save(tmp_path / "photo.png")
        count = photo.width * photo.height
        assert read_pixels(tmp_path / "photo.png", max_pixels=count).shape == (3, photo.height, photo.width)
        with pytest.raises(ValueError, match=rf"it has {photo.width}x{photo.height} pixels, more than {count - 1}"):
            read_pixels(tmp_path / "photo.png", max_pixels=count - 1)


class TestToPil:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_there_and_back(self, channels):
        pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
        assert torch.equal(read_pixels(to_pil(pixels), channels), pixels)
        assert torch.equal(read_pixels(to_pil(pixels.float() / 255), channels), pixels)

    def test_values_beyond(self):
        assert to_uint8(torch.tensor([-0.5, 0.002, 1.5], requires_grad=True)).tolist() == [0, 1, 255]
