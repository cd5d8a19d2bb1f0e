"""The plot of a search."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kornia_tinyvit.contraction import save_search
from kornia_tinyvit.extras import MissingExtraError
from tests.contraction.conftest import FOUND


def test_drawn(tmp_path):
    save_search(tmp_path / "new" / "search.png", FOUND)
    pixels = np.asarray(Image.open(tmp_path / "new" / "search.png").convert("RGB")).astype(int)
    assert pixels.shape == (400, 1120, 3)  # a panel for each limit
    for panel in np.split(pixels, 2, axis=1):
        for color in ((0xB4, 0xB4, 0xB4), (0x30, 0x63, 0x8E), (0xD1, 0x49, 0x5B)):
            inside = panel[60:330, 70:]
            assert (np.abs(inside - color).sum(-1) == 0).sum() > 10


def test_a_single_network(tmp_path):
    save_search(tmp_path / "search.png", replace(FOUND, candidates=FOUND.candidates[:1], kept=(0,)))
    assert (tmp_path / "search.png").stat().st_size > 0


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kornia-tinyvit\[train\]'"):
        save_search(tmp_path / "search.png", FOUND)
    assert list(tmp_path.iterdir()) == []
