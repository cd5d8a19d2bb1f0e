"""The page of the web demo, without a browser."""

import dataclasses
import re

import pytest

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.checkpoints import tensors
from kornia_tinyvit.checkpoints.catalog import ASSETS, find_weights
from kornia_tinyvit.web.views import AugmentationParams

page = pytest.importorskip("kornia_tinyvit.web.page", reason="needs the extra demo")


def test_labels_are_escaped():
    table = page.score_table([("<script>", 0.25, 1.0)])
    assert "&lt;script&gt;" in table
    assert "<script>" not in table
    assert re.findall(r"width: ([\d.]+)%", table) == ["25.0", "100.0"]
    assert re.findall(r">([\d.]+)%<", table) == ["25.0", "100.0"]


def test_uploads_are_queued():
    classifier = ImageClassifier.from_config("1m", pretrained="cifar10")
    events = page.build_page(classifier, "mobile_sam", "cpu", [ASSETS / "photos" / "chelsea.png"]).config[
        "dependencies"
    ]
    (opening,) = (event for event in events if event["api_name"] == "_open")
    assert [event for _, event in opening["targets"]] == ["load", "change"]
    shown = [event for event in events if event["trigger_after"] == opening["id"]]
    assert len(shown) == 4
    assert {event["trigger_mode"] for event in (opening, *shown)} == {"always_last"}


def test_one_slider_per_augmentation():
    assert list(page.SLIDERS) == [each.name for each in dataclasses.fields(AugmentationParams)]
    for name, (low, high, step) in page.SLIDERS.items():
        assert low <= getattr(AugmentationParams, name) <= high
        assert ((getattr(AugmentationParams, name) - low) / step) == pytest.approx(
            round((getattr(AugmentationParams, name) - low) / step)
        )


def test_failed_download(monkeypatch):
    """The error lists the URLs of the weights and the option for a file; the download is retried."""
    attempts = []

    def no_network(urls, **_):
        attempts.append(urls)
        raise RuntimeError("no network")

    monkeypatch.setattr(tensors, "download_file_from_url", no_network)
    for _ in range(2):
        with pytest.raises(page.gr.Error) as raised:
            page._with_errors(page._load_sam)("mobile_sam", "cpu")
        assert all(url in raised.value.message for url in find_weights("5m", "mobile_sam").urls)
        assert "On the command line: --sam-weights FILE." in raised.value.message
    assert len(attempts) == 2


def test_messages_are_no_markup():
    assert page._message(ValueError("<img src=x>\n is no image")) == "&lt;img src=x&gt; is no image"
