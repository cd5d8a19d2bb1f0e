import shutil
import socket
import sys
from pathlib import Path

import pytest
from PIL import Image

from kornia_tinyvit import ImageClassifier
from tests.helpers import PHOTOS, cells, error_of, make_weights, run


@pytest.fixture
def weights(tiny, tmp_path) -> str:
    return make_weights(tiny, tmp_path)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


class TestDemo:
    def test_own_photos(self, weights, tmp_path):
        photo = tmp_path / "odd[name].jpg"
        Image.open(PHOTOS / "rocket.jpg").resize((90, 60)).save(photo)
        out = tmp_path / "sheets" / "new"
        rows = cells(run("demo", str(photo), str(PHOTOS / "horse.png"), "--out", str(out), "--weights", weights))
        assert [row[0] for row in rows] == ["odd[name].jpg", "horse.png"]
        classifier = ImageClassifier.from_config(pretrained=weights, views=ImageClassifier.DEFAULT_VIEWS)
        found = classifier.predict([photo, PHOTOS / "horse.png"])
        for row, (first, second, *_) in zip(rows, found, strict=True):
            assert row[1:5] == [first.label, f"{first.score:.1%}", second.label, f"{second.score:.1%}"]
            assert Image.open(row[5]).format == "PNG"
            assert Path(row[5]).parent == out
        assert sorted(path.name for path in out.iterdir()) == ["horse.png", "odd[name].png"]

    def test_repeats(self, weights, tmp_path):
        for name in ("a", "b"):
            run("demo", str(PHOTOS / "horse.png"), "--out", str(tmp_path / name), "--weights", weights)
        sheets = [(tmp_path / name / "horse.png").read_bytes() for name in ("a", "b")]
        assert sheets[0] == sheets[1]

    def test_packaged_photos(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rows = cells(run("demo"))
        found = {row[0]: row[1] for row in rows}
        assert found == {"chelsea.png": "cat", "horse.png": "horse", "rocket.jpg": found["rocket.jpg"]}
        names = ["chelsea.png", "horse.png", "rocket.png"]
        assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == names
        for name in names:
            Image.open(tmp_path / "demo" / name).verify()


class TestErrors:
    def test_a_photo_is_never_replaced(self, weights, tmp_path, capfd, monkeypatch):
        photo = tmp_path / "horse.png"
        shutil.copy(PHOTOS / "horse.png", photo)
        error = error_of(capfd, monkeypatch, "demo", str(photo), "--out", str(tmp_path), "--weights", weights)
        assert "would replace a photo or another sheet" in error
        assert photo.read_bytes() == (PHOTOS / "horse.png").read_bytes()

    def test_nor_another_sheet(self, weights, tmp_path, capfd, monkeypatch):
        photos = [tmp_path / folder / "1.png" for folder in ("cats", "dogs")]
        for photo in photos:
            photo.parent.mkdir()
            shutil.copy(PHOTOS / "horse.png", photo)
        out = tmp_path / "demo"
        error = error_of(capfd, monkeypatch, "demo", *map(str, photos), "--out", str(out), "--weights", weights)
        assert "would replace a photo or another sheet" in error

    def test_no_image(self, weights, tmp_path, capfd, monkeypatch):
        (tmp_path / "notes.jpg").write_text("no image")
        arguments = (str(tmp_path / "notes.jpg"), "--out", str(tmp_path / "demo"), "--weights", weights)
        assert "notes.jpg is not an image that can be read" in error_of(capfd, monkeypatch, "demo", *arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--port", "80"], "--port has no effect without --web; leave it out"),
            (["--host", "0.0.0.0"], "--host has no effect without --web; leave it out"),
            (["--sam-weights", "mobile_sam"], "--sam-weights has no effect without --web; leave it out"),
            (["--web", "--out", "demo"], "--out has no effect with --web; leave it out"),
            (["--web", "gone.png"], "There is no image gone.png"),
            (["--web", "--sam-weights", "gone.safetensors"], "There is no file gone.safetensors for --sam-weights"),
            (["--web", "--host", "203.0.113.7", "--port", "0"], "Port 0 of 203.0.113.7 cannot be used"),
            (["--web", "--device", "toaster"], "--device toaster is not available"),
        ],
    )
    def test_page(self, weights, tmp_path, capfd, monkeypatch, arguments, message):
        pytest.importorskip("gradio", reason="needs the extra demo")
        monkeypatch.chdir(tmp_path)
        assert message in error_of(capfd, monkeypatch, "demo", "--weights", weights, *arguments)
        assert not (tmp_path / "demo").exists()

    def test_taken_port(self, weights, capfd, monkeypatch):
        pytest.importorskip("gradio", reason="needs the extra demo")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            output = error_of(capfd, monkeypatch, "demo", "--weights", weights, "--web", "--port", port)
        assert f"Port {port} of 127.0.0.1 cannot be used" in output
        assert "Choose another --port, or 0." in output

    def test_empty_options_of_the_page_are_the_defaults(self, weights, monkeypatch):
        page = pytest.importorskip("kornia_tinyvit.web.page", reason="needs the extra demo")
        served = []
        monkeypatch.setattr(page, "serve", lambda *output: served.append((output[1], output[4])))
        run("demo", "--weights", weights, "--web", "--host", "", "--sam-weights", "")
        assert served == [("mobile_sam", "127.0.0.1")]

    def test_page_without_gradio(self, weights, capfd, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        monkeypatch.delitem(sys.modules, "kornia_tinyvit.web.page", raising=False)
        output = error_of(capfd, monkeypatch, "demo", "--weights", weights, "--web")
        assert output == "Error: The web demo needs gradio: pip install 'kornia-tinyvit[demo]'."
