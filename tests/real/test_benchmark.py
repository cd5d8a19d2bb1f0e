"""The measures of ``benchmarks/real.py`` on masks with known results."""

import numpy as np
import pytest
import torch


@pytest.fixture
def scripts(benchmark_scripts):
    import original
    import real_masks
    import real_published

    return original, real_masks, real_published


def rectangle(top, bottom, size=(8, 10)):
    mask = np.zeros(size, bool)
    mask[top:bottom] = True
    return mask


def test_masks_are_kept(scripts, tmp_path):
    masks = np.random.default_rng(0).random((3, 7, 9)) > 0.5
    scripts[0].save_masks(tmp_path / "photo.npz", masks, scores=[1, 2, 3], cpu_s=0.5)
    found = scripts[0].load_masks(tmp_path / "photo.npz")
    assert np.array_equal(found["masks"], masks)
    assert (found["scores"].tolist(), float(found["cpu_s"])) == ([1, 2, 3], 0.5)
    scripts[0].save_masks(tmp_path / "none.npz", [])
    assert len(scripts[0].load_masks(tmp_path / "none.npz")["masks"]) == 0


def test_ious(scripts):
    halves = np.stack([rectangle(0, 4), rectangle(4, 8)])
    others = np.stack([rectangle(0, 4), rectangle(2, 6), rectangle(0, 8)])
    expected = [[1, 1 / 3, 1 / 2], [0, 1 / 3, 1 / 2]]
    np.testing.assert_allclose(scripts[1].pairwise_ious(halves, others), expected, rtol=1e-6)
    assert scripts[1].pairwise_ious(halves, others[:0]).shape == (2, 0)


def test_recall(scripts):
    """One person drew two regions, of which one is found; another one region, which is found, and a small one."""
    people = [
        np.stack([rectangle(0, 4), rectangle(4, 8)]),
        np.stack([rectangle(0, 7), rectangle(7, 8)]),
    ]
    masks = np.stack([rectangle(0, 5)])
    recall = scripts[2].recall
    assert recall(masks, people, 0) == (1 / 2 + 1 / 2) / 2
    assert recall(masks, people, 0.2) == (1 / 2 + 1) / 2
    assert recall(masks[:0], people, 0) == 0


def test_regions(scripts, tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    person = np.zeros((1, 1), [("Segmentation", object)])
    person[0, 0]["Segmentation"] = np.array([[1, 1, 2], [3, 3, 2]], np.uint16)
    truth = np.empty((1, 1), object)
    truth[0, 0] = person
    scipy_io.savemat(tmp_path / "1.mat", {"groundTruth": truth})
    (regions,) = scripts[2].read_regions(tmp_path / "1.mat")
    assert regions.shape == (3, 2, 3)
    assert regions.sum((1, 2)).tolist() == [2, 2, 2]


def test_standard_error(scripts):
    assert scripts[1].standard_error(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(np.sqrt(5 / 3) / 2)


def test_rectangle(scripts):
    """The longer side has 1024 pixels, the other is rounded up to a multiple of 64."""
    rectangle = scripts[2].rectangle
    assert rectangle(torch.zeros(3, 480, 640)) == (768, 1024)
    assert rectangle(torch.zeros(3, 640, 427)) == (1024, 704)
    assert rectangle(torch.zeros(3, 500, 500)) == (1024, 1024)
