import json
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.cli import app
from tests.helpers import CIFAR, KINDS, CommandProcess, cells, error_of, make_weights, run, write_kind

PHOTOS = [str(ASSETS / "photos" / name) for name in ("chelsea.png", "horse.png", "rocket.jpg")]


@pytest.fixture
def weights(tiny, tmp_path) -> str:
    return make_weights(tiny, tmp_path)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # so that no table is folded


class TestClassify:
    def test_json(self, weights):
        rows = json.loads(run("classify", *PHOTOS, "--weights", weights, "--json"))
        assert [row["photo"] for row in rows] == PHOTOS
        expected = ImageClassifier.from_config(pretrained=weights).predict(PHOTOS)
        for row, found in zip(rows, expected, strict=True):
            assert [each["label"] for each in row["predictions"]] == [each.label for each in found]
            assert [each["index"] for each in row["predictions"]] == [each.index for each in found]
            assert [each["score"] for each in row["predictions"]] == pytest.approx([each.score for each in found])

    def test_kinds_of_files(self, weights, tmp_path):
        paths, pixels = zip(*(write_kind(tmp_path, kind) for kind in KINDS), strict=True)
        rows = json.loads(run("classify", *paths, "--weights", weights, "--json"))
        expected = ImageClassifier.from_config(pretrained=weights).predict(pixels)
        for row, found in zip(rows, expected, strict=True):
            assert [each["score"] for each in row["predictions"]] == pytest.approx([each.score for each in found])
        assert len({row["predictions"][0]["score"] for row in rows}) == 5  # three of one gray image, two of one palette

    def test_table_has_the_same_values(self, weights):
        rows = json.loads(run("classify", *PHOTOS, "--weights", weights, "--json"))
        expected = [
            [row["photo"] if rank == 0 else "", each["label"], f"{each['score']:.1%}"]
            for row in rows
            for rank, each in enumerate(row["predictions"])
        ]
        assert cells(run("classify", *PHOTOS, "--weights", weights)) == expected

    @pytest.mark.parametrize(("top_k", "count"), [("1", 1), ("3", 3), ("50", 10)])
    def test_top_k(self, weights, top_k, count):
        (row,) = json.loads(run("classify", PHOTOS[0], "--weights", weights, "--top-k", top_k, "--json"))
        assert len(row["predictions"]) == count

    @pytest.mark.parametrize(
        ("option", "changes"), [(["--tta"], {"views": ImageClassifier.DEFAULT_VIEWS}), (["--img-size", "48"], {})]
    )
    def test_options(self, weights, option, changes):
        arguments = ("classify", PHOTOS[0], "--weights", weights, "--json", "--top-k", "10")
        scores, plain = (
            {each["label"]: each["score"] for each in json.loads(run(*arguments, *more))[0]["predictions"]}
            for more in (option, [])
        )
        size = {"img_size": 48} if "--img-size" in option else {}
        expected = ImageClassifier.from_config(pretrained=weights, **changes, **size).predict(PHOTOS[0], 10)[0]
        assert scores == pytest.approx({each.label: each.score for each in expected}, rel=1e-4)
        assert scores != pytest.approx(plain, rel=1e-2)

    def test_names_are_no_markup(self, weights, tmp_path):
        shutil.copy(PHOTOS[1], tmp_path / "a[bold]b :cat:.png")
        output = run("classify", str(tmp_path / "a[bold]b :cat:.png"), "--weights", weights, "--top-k", "1")
        assert "a[bold]b :cat:.png" in output

    def test_network_in_the_package(self):
        rows = json.loads(run("classify", PHOTOS[1], "--json"))
        assert {each["label"] for each in rows[0]["predictions"]} < set(CIFAR)

    def test_help(self):
        assert "classify" in CliRunner().invoke(app, ["--help"]).stdout
        assert "--top-k" in CliRunner().invoke(app, ["classify", "--help"], env={"TERM": "dumb"}).stdout
        assert CliRunner().invoke(app, ["classify"]).exit_code == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{tmp}/gone.jpg", "--weights", "{weights}"], "There is no image {tmp}/gone.jpg"),
            (["{tmp}/notes.jpg", "--weights", "{weights}"], "{tmp}/notes.jpg is not an image that can be read"),
            (["{tmp}", "--weights", "{weights}"], "{tmp} is not an image that can be read"),
            (["{photo}", "--variant", "6m"], "no TinyViT variant '6m'; choose one of 1m, 5m, 11m, 21m"),
            (["{photo}", "--weights", "{weights}", "--variant", "6m"], "no TinyViT variant '6m'"),
            (["{photo}", "--weights", "{weights}", "--variant", "5m"], "{weights}"),
            (["{photo}", "--weights", "in2k", "--variant", "5m"], "no weights and no file 'in2k'"),
            (["{photo}", "--weights", "{tmp}/gone.pth"], "no checkpoint file {tmp}/gone.pth"),
            (["{photo}", "--weights", "{tmp}/notes.jpg"], "{tmp}/notes.jpg"),
            (["{photo}", "--weights", "{weights}", "--device", "toaster"], "--device toaster is not available"),
            (["{photo}", "--weights", "{weights}", "--device", "cuda:99"], "--device cuda:99 is not available"),
            (["{photo}", "--weights", "{weights}", "--top-k", "0"], "top_k must be a positive integer; got 0"),
            (["{photo}", "--weights", "{weights}", "--img-size", "8"], "img_size must be an integer of at least 32"),
            (["{photo}", "--variant", "5m", "--weights", "mobile_sam_"], "no weights and no file"),
        ],
    )
    def test_one_line(self, weights, tmp_path, capfd, monkeypatch, arguments, message):
        (tmp_path / "notes.jpg").write_text("no image")
        known = {"tmp": tmp_path, "weights": weights, "photo": PHOTOS[0]}
        arguments = [argument.format(**known) for argument in arguments]
        assert message.format(**known) in error_of(capfd, monkeypatch, "classify", *arguments)


class TestProcess:
    def test_json_output(self, weights, tmp_path):
        Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
        photo = str(tmp_path / "red.png")
        code, out, err = CommandProcess(tmp_path, "classify", photo, "--weights", weights, "--json").wait()
        assert (code, err) == (0, "")
        assert json.loads(out)[0]["photo"] == photo

    def test_error(self, weights, tmp_path):
        photo = tmp_path / "gone.jpg"
        done = CommandProcess(tmp_path, "classify", str(photo), "--weights", weights).wait()
        assert done == (1, "", f"Error: There is no image {photo}.\n")

    def test_no_network(self, tmp_path):
        url = "http://weights.invalid/tiny.safetensors"
        dead = "http://127.0.0.1:9"
        proxies = {"http_proxy": dead, "https_proxy": dead, "no_proxy": "", "KORNIA_DOWNLOAD_TIMEOUT": "1"}
        arguments = ("classify", PHOTOS[0], "--weights", url)
        code, out, err = CommandProcess(tmp_path, *arguments, **proxies, TORCH_HOME=str(tmp_path)).wait()
        assert (code, out) == (1, "")
        assert "Traceback" not in err
        *progress, last = err.splitlines()
        assert not any(line.startswith("Error") for line in progress)
        assert last.startswith(f"Error: The weights could not be downloaded from {url}")
        assert "Without a network connection, download" in last
