import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from kornia_tinyvit import TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints import tensors
from kornia_tinyvit.checkpoints.catalog import ASSETS, find_weights
from kornia_tinyvit.data import SegmentationDataset
from kornia_tinyvit.ops import decode_rle
from kornia_tinyvit.sam import MobileSAM
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.visualization import draw_class_map
from tests.helpers import KINDS, cells, error_of, run, write_kind
from tests.sam.test_model import lively
from tests.scenes import NAMES
from tests.training.tasks.test_semantic import TINY, make_segmenter

PHOTO = str(ASSETS / "photos" / "chelsea.png")  # 451x300
BOX = ("--box", "100,20,300,280")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(save_checkpoint(lively(), tmp_path_factory.mktemp("weights") / "sam.safetensors"))


@pytest.fixture(scope="module")
def semantic(tmp_path_factory) -> str:
    return str(make_segmenter().save(tmp_path_factory.mktemp("weights") / "semantic.safetensors"))


@pytest.fixture(scope="module")
def expected(semantic) -> torch.Tensor:
    return SemanticSegmenter.from_config(pretrained=semantic).predict(PHOTO)[0]


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """Keep "everything" small, and let the masks of random weights pass."""
    whole = MobileSAM.generate_masks
    easy = {"points_per_side": 2, "pred_iou_thresh": -1e9, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    monkeypatch.setattr(MobileSAM, "generate_masks", lambda self, image, **more: whole(self, image, **easy, **more))


def pixels_of(path) -> np.ndarray:
    return np.array(Image.open(path))


class TestSegment:
    @pytest.mark.parametrize(
        ("arguments", "prompts", "multimask"),
        [
            (["--point", "200,150"], {"points": [[[200, 150]]]}, True),
            (["--point", "200,150", "--point", "20,280,0"], {"points": [[[200, 150], [20, 280]]]}, False),
            ([*BOX], {"boxes": [[100, 20, 300, 280]]}, False),
            ([*BOX, "--box", "0,0,40.5,300"], {"boxes": [[100, 20, 300, 280], [0, 0, 40.5, 300]]}, False),
            (
                [*BOX, "--point", "200,150"],
                {"points": [[[200, 150]]], "boxes": [[100, 20, 300, 280]]},
                False,
            ),
        ],
    )
    def test_masks(self, weights, tmp_path, arguments, prompts, multimask):
        out = str(tmp_path / "new" / "folder")
        report = json.loads(run("segment", PHOTO, "--weights", weights, "--out", out, "--json", *arguments))
        sam = MobileSAM.from_config(pretrained=weights)
        given = {name: torch.tensor(values, dtype=torch.float32) for name, values in prompts.items()}
        if len(arguments) == 4 and "--box" not in arguments:
            given["labels"] = torch.tensor([[1, 0]])
        (found,) = sam.predict_masks(sam.embed(PHOTO), **given, multimask_output=multimask)
        expected = found.best().masks()[:, 0].numpy()
        assert len(report["masks"]) == len(expected)
        assert report["photo"] == PHOTO
        for each, mask, score in zip(report["masks"], expected, found.best().scores[:, 0].tolist(), strict=True):
            assert np.array_equal(pixels_of(each["file"]), mask)
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1] if len(rows) else [0] * 4
            assert (each["area"], each["bbox"]) == (mask.sum(), box)
            assert each["predicted_iou"] == pytest.approx(score, rel=1e-4)
        assert report["files"] == [f"{out}/chelsea_overlay.png", *(each["file"] for each in report["masks"])]
        overlay = pixels_of(report["files"][0])
        assert overlay.shape == (300, 451, 3)
        assert (overlay != pixels_of(PHOTO)).any()

    def test_everything_as_coco(self, weights, tmp_path):
        arguments = (PHOTO, "--weights", weights, "--everything", "--out", str(tmp_path), "--format", "coco")
        report = json.loads(run("segment", *arguments, "--json"))
        assert report["files"] == [str(tmp_path / "chelsea_overlay.png"), str(tmp_path / "chelsea.json")]
        record = json.loads((tmp_path / "chelsea.json").read_text())
        assert record["images"] == [{"id": 1, "file_name": "chelsea.png", "height": 300, "width": 451}]
        assert len(record["annotations"]) == len(report["masks"]) > 1
        areas = []
        for number, each in enumerate(record["annotations"], 1):
            mask = decode_rle(each["segmentation"])
            rows, columns = np.nonzero(mask)
            assert mask.shape == (300, 451)
            assert each["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert each["area"] == mask.sum()
            assert (each["id"], each["image_id"], each["category_id"], each["iscrowd"]) == (number, 1, 1, 0)
            assert {"predicted_iou", "stability_score"} < each.keys()
            areas.append(each["area"])
        assert areas == sorted(areas, reverse=True)

    def test_max_area(self, weights, tmp_path):
        arguments = (PHOTO, "--weights", weights, "--everything", "--out", str(tmp_path), "--json")
        areas = [each["area"] for each in json.loads(run("segment", *arguments))["masks"]]
        limit = (areas[0] - 1) / (300 * 451)
        kept = json.loads(run("segment", *arguments, "--max-area", str(limit)))["masks"]
        assert [each["area"] for each in kept] == [area for area in areas if area < areas[0]]

    def test_text(self, weights, tmp_path):
        output = run("segment", PHOTO, "--weights", weights, "--out", str(tmp_path), *BOX)
        first, second = output.splitlines()
        assert first == f"{PHOTO}: 1 mask, see {tmp_path}/chelsea_overlay.png"
        area = pixels_of(tmp_path / "chelsea_mask_000.png").sum()
        assert second.split()[:3] == ["0", str(area), "pixels"]

    @pytest.mark.parametrize(("text", "size"), [("128", 128), ("160x256", (160, 256))])
    def test_size(self, weights, tmp_path, text, size):
        command = (PHOTO, "--weights", weights, "--out", str(tmp_path), "--json", *BOX)
        plain, other = (json.loads(run("segment", *command, *more)) for more in ([], ["--img-size", text]))
        sam = MobileSAM.from_config(pretrained=weights, img_size=size)
        box = torch.tensor([[100.0, 20.0, 300.0, 280.0]])
        (found,) = sam.predict_masks(sam.embed(PHOTO), boxes=box, multimask_output=False)
        assert other["masks"][0]["predicted_iou"] == pytest.approx(found.scores.item(), rel=1e-4)
        assert other["masks"][0]["predicted_iou"] != pytest.approx(plain["masks"][0]["predicted_iou"], rel=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds_of_files(self, weights, tmp_path, kind):
        path, pixels = write_kind(tmp_path, kind)
        command = (path, "--weights", weights, "--out", str(tmp_path / "out"), "--json")
        report = json.loads(run("segment", *command, *BOX))
        sam = MobileSAM.from_config(pretrained=weights)
        best = sam.predict_best(sam.embed(pixels), None, None, torch.tensor([[100.0, 20.0, 300.0, 280.0]]))
        assert np.array_equal(pixels_of(report["masks"][0]["file"]), best.masks()[0, 0].numpy())
        overlay = pixels_of(report["files"][0]).astype(int)
        levels = (pixels * 255).round() if pixels.is_floating_point() else pixels
        outside = ~pixels_of(report["masks"][0]["file"])
        outside[18:23, 98:303] = outside[278:283, 98:303] = outside[18:283, 98:103] = outside[18:283, 298:303] = False
        assert np.array_equal(overlay[outside], levels.movedim(0, 2).numpy()[outside])

    @pytest.mark.parametrize("size", [(1, 300), (300, 1), (12000, 20)])
    def test_extreme_shapes(self, weights, tmp_path, size):
        """A photo of one pixel's width and a panorama, from the prompt to the overlay."""
        Image.effect_noise(size, 90).save(tmp_path / "photo.png")
        prompts = (["--point", f"{size[0] / 2},{size[1] / 2}"], ["--everything"])
        for arguments in prompts:
            command = (str(tmp_path / "photo.png"), "--weights", weights, "--out", str(tmp_path / "out"), "--json")
            report = json.loads(run("segment", *command, *arguments))
            assert Image.open(report["files"][0]).size == size
            assert all(Image.open(each["file"]).size == size for each in report["masks"])

    def test_turned_photo(self, weights, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(PHOTO).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        report = json.loads(
            run("segment", str(tmp_path / "turned.png"), "--weights", weights, "--out", str(tmp_path), *BOX, "--json")
        )
        upright = json.loads(run("segment", PHOTO, "--weights", weights, "--out", str(tmp_path), *BOX, "--json"))
        assert np.array_equal(pixels_of(report["masks"][0]["file"]), pixels_of(upright["masks"][0]["file"]))


class TestClasses:
    """A semantic network."""

    def test_files(self, semantic, expected, tmp_path):
        """The class map is a mask that SegmentationDataset reads."""
        (tmp_path / "images").mkdir()
        shutil.copy(PHOTO, tmp_path / "images")
        report = json.loads(run("segment", PHOTO, "--weights", semantic, "--out", str(tmp_path), "--json"))
        overlay, mask = (f"{tmp_path}/{name}" for name in ("chelsea_overlay.png", "masks/chelsea.png"))
        assert (report["photo"], report["files"]) == (PHOTO, [overlay, mask])
        assert np.array_equal(pixels_of(overlay), np.array(draw_class_map(expected, PHOTO, NAMES)))
        assert pixels_of(mask).dtype == np.uint8
        ((_, target),) = SegmentationDataset.open(tmp_path, classes=NAMES)
        assert torch.equal(target, expected)
        counts = expected.flatten().bincount(minlength=3)
        assert len(counts.nonzero()) > 1
        assert report["classes"] == [
            {
                "class": NAMES[index], "index": index, "pixels": int(counts[index]),
                "percent": round(100 * int(counts[index]) / expected.numel(), 2),
            }
            for index in counts.argsort(descending=True).tolist() if counts[index]
        ]  # fmt: skip

    def test_coco(self, semantic, expected, tmp_path):
        command = ("segment", PHOTO, "--weights", semantic, "--out", str(tmp_path), "--format", "coco", "--json")
        report = json.loads(run(*command))
        assert report["files"] == [str(tmp_path / "chelsea_overlay.png"), str(tmp_path / "chelsea.json")]
        record = json.loads((tmp_path / "chelsea.json").read_text())
        assert record["categories"] == [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
        assert len(record["annotations"]) == len(report["classes"])
        for each, row in zip(record["annotations"], report["classes"], strict=True):
            assert (each["category_id"], each["area"]) == (row["index"] + 1, row["pixels"])
            assert np.array_equal(decode_rle(each["segmentation"]), expected == row["index"])

    def test_text(self, semantic, expected, tmp_path):
        output = run("segment", PHOTO, "--weights", semantic, "--out", str(tmp_path))
        present = len(expected.unique())
        assert output.splitlines()[0] == f"{PHOTO}: {present} classes, see {tmp_path}/chelsea_overlay.png"
        name, index, pixels, percent = cells(output)[0]
        largest = int(expected.flatten().mode().values)
        count = int((expected == largest).sum())
        assert (name, index, pixels) == (NAMES[largest], str(largest), str(count))
        assert float(percent) == pytest.approx(100 * count / expected.numel(), abs=0.01)

    def test_more_than_255_classes(self, tmp_path):
        torch.manual_seed(0)
        backbone = TinyViT(**TINY | {"num_classes": 0, "img_size": 32, "window_sizes": (4, 4, 2, 1)})
        network = SemanticSegmenter(backbone, num_classes=300, width=16).eval()
        weights = str(network.save(tmp_path / "many.safetensors"))
        run("segment", PHOTO, "--weights", weights, "--out", str(tmp_path))
        written = pixels_of(tmp_path / "masks" / "chelsea.png")
        assert written.dtype == np.uint16
        assert np.array_equal(written, network.predict(PHOTO)[0])

    def test_size(self, semantic, tmp_path):
        command = ("segment", PHOTO, "--weights", semantic, "--out", str(tmp_path), "--img-size", "96")
        run(*command)
        (wanted,) = SemanticSegmenter.from_config(pretrained=semantic, img_size=96).predict(PHOTO)
        assert np.array_equal(pixels_of(tmp_path / "masks" / "chelsea.png"), wanted)

    def test_errors(self, semantic, tmp_path, capfd, monkeypatch):
        command = ("segment", PHOTO, "--weights", semantic, "--out", str(tmp_path))
        error = error_of(capfd, monkeypatch, *command, *BOX, "--point", "1,2")
        assert "--point, --box have no effect with a semantic network, which gives each pixel a class" in error
        assert "--everything has no effect" in error_of(capfd, monkeypatch, *command, "--everything")
        assert "another architecture" in error_of(capfd, monkeypatch, *command, "--variant", "5m")
        assert "img_size" in error_of(capfd, monkeypatch, *command, "--img-size", "64x96")
        assert not list(tmp_path.iterdir())


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "No prompt; give --point x,y, --box left,top,right,bottom or --everything"),
            (["--everything", *BOX], "--box has no effect with --everything"),
            (["--point", "1,2", *BOX, *BOX], "go with at most one --box; got 2 boxes"),
            ([*BOX, "--max-area", "0.5"], "--max-area has no effect without --everything"),
            (["--everything", "--max-area", "0"], "max_area is a fraction of the image, above 0"),
            (["--point", "1"], "--point takes x,y or x,y,label, such as 1,2; got '1'"),
            (["--point", "1,two"], "got '1,two'"),
            (["--point", "1,2,3"], "The label of a --point must be 1 (object) or 0 (background)"),
            (["--point", "1,2,0.5"], "The label of a --point must be 1 (object) or 0 (background)"),
            (["--box", "1,2,3"], "--box takes left,top,right,bottom, such as 1,2,3,4; got '1,2,3'"),
            (["--point", "452,1"], "Point (452, 1) lies outside of the image of width 451 and height 300"),
            (["--point", "nan,1"], "NaN or infinity"),
            (["--box", "9,9,9,20"], "Box (9, 9, 9, 20) is empty"),
            ([*BOX, "--img-size", "100"], "img_size must be a multiple of 16"),
            ([*BOX, "--img-size", "160x100"], "img_size must be a multiple of 16"),
            ([*BOX, "--img-size", "large"], "--img-size takes a side, or heightxwidth such as 512x1024; got 'large'"),
            ([*BOX, "--img-size", "64x64x64"], "--img-size takes a side, or heightxwidth"),
            (["--everything", "--img-size", ""], "--img-size takes a side, or heightxwidth"),
            ([*BOX, "--variant", "5m"], "another architecture"),
            ([*BOX, "--device", "toaster"], "--device toaster is not available"),
        ],
    )
    def test_one_line(self, weights, tmp_path, capfd, monkeypatch, arguments, message):
        error = error_of(capfd, monkeypatch, "segment", PHOTO, "--weights", weights, "--out", str(tmp_path), *arguments)
        assert message in error
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("photo", "message"), [("gone.png", "There is no image"), ("notes.png", "is not an image that can be read")]
    )
    def test_photo(self, weights, tmp_path, capfd, monkeypatch, photo, message):
        (tmp_path / "notes.png").write_text("no image")
        assert message in error_of(capfd, monkeypatch, "segment", str(tmp_path / photo), "--weights", weights, *BOX)

    def test_no_weights(self, capfd, monkeypatch, tmp_path):
        """One line, with the addresses, and what to do with a file from there."""

        def no_network(urls, **_):
            raise RuntimeError("no network")

        monkeypatch.setattr(tensors, "download_file_from_url", no_network)
        error = error_of(capfd, monkeypatch, "segment", PHOTO, *BOX)
        assert all(url in error for url in find_weights("5m", "mobile_sam").urls)
        assert "Give the file by --weights FILE." in error
        assert "with a 5m encoder, not with 21m" in error_of(
            capfd, monkeypatch, "segment", PHOTO, *BOX, "--variant", "21m"
        )

    def test_broken_checkpoint(self, capfd, monkeypatch, tmp_path):
        (tmp_path / "sam.pt").write_bytes(b"<!DOCTYPE html>")
        error = error_of(capfd, monkeypatch, "segment", PHOTO, *BOX, "--weights", str(tmp_path / "sam.pt"))
        assert "sam.pt is damaged" in error
        assert "--weights FILE" not in error
