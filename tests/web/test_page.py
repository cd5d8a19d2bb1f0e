"""The page itself, without a browser."""

import dataclasses
import re

import pytest

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.checkpoints import tensors
from kornia_tinyvit.checkpoints.catalog import ASSETS, find_weights
from kornia_tinyvit.web.views import AugmentationParams

page = pytest.importorskip("kornia_tinyvit.web.page", reason="needs the extra demo")


def test_labels_are_no_markup():
    table = page.score_table([("<script>", 0.25, 1.0)])
    assert "&lt;script&gt;" in table
    assert "<script>" not in table
    assert re.findall(r"width: ([\d.]+)%", table) == ["25.0", "100.0"]
    assert re.findall(r">([\d.]+)%<", table) == ["25.0", "100.0"]


def test_a_photo_that_comes_while_another_is_opened_is_opened_next():
    classifier = ImageClassifier.from_config("1m", pretrained="cifar10")
    events = page.build_page(classifier, "mobile_sam", "cpu", [ASSETS / "photos" / "chelsea.png"]).config[
        "dependencies"
    ]
    (opening,) = (event for event in events if event["api_name"] == "_open")
    assert [event for _, event in opening["targets"]] == ["load", "change"]
    shown = [event for event in events if event["trigger_after"] == opening["id"]]
    assert len(shown) == 4
    assert {event["trigger_mode"] for event in (opening, *shown)} == {"always_last"}


def test_a_slider_for_each_change():
    assert list(page.SLIDERS) == [each.name for each in dataclasses.fields(AugmentationParams)]
    for name, (low, high, step) in page.SLIDERS.items():
        assert low <= getattr(AugmentationParams, name) <= high
        assert ((getattr(AugmentationParams, name) - low) / step) == pytest.approx(
            round((getattr(AugmentationParams, name) - low) / step)
        )


def test_weights_that_cannot_be_had(monkeypatch):
    """The tab says so, where the weights may be had, and what to do; and it is tried again."""
    tried = []

    def no_network(urls, **_):
        tried.append(urls)
        raise RuntimeError("no network")

    monkeypatch.setattr(tensors, "download_file_from_url", no_network)
    for _ in range(2):
        with pytest.raises(page.gr.Error) as refused:
            page._telling(page._load_sam)("mobile_sam", "cpu")
        assert all(url in refused.value.message for url in find_weights("5m", "mobile_sam").urls)
        assert "On the command line that is --sam FILE." in refused.value.message
    assert len(tried) == 2


def test_sentences_are_no_markup():
    assert page._sentence(ValueError("<img src=x>\n is no image")) == "&lt;img src=x&gt; is no image"
