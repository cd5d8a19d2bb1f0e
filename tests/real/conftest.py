"""The published MobileSAM and the photo whose masks by the original code are recorded."""

import pytest

from kornia_tinyvit import MobileSAM
from tests.conftest import shared
from tests.real.data.record_masks import PHOTO
from tests.test_documents import ROOT


@pytest.fixture(scope="session")
def sam():
    return MobileSAM.from_config(pretrained=shared("data/mobile_sam/mobile_sam.pt"))


@pytest.fixture(scope="session")
def embedding(sam):
    return sam.embed(ROOT / PHOTO)


@pytest.fixture
def benchmark_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
